"""When each operator was last proven to open the backup: by a drill, or by an answer that was accepted."""

from collections.abc import Collection

import msgspec

from unsealerd.core.rules import KnownOperator
from unsealerd.daemon.store import SMALL_FILE, DurableDirectory
from unsealerd.errors import StorageFailed

PROOFS = "proofs.json"


class Proofs:
    """``proofs.json``: recipient → Unix seconds. By recipient, since a name may get another key.

    A hint for people that decides nothing: a file that is damaged counts as none, and is written anew.
    """

    def __init__(self, directory: DurableDirectory) -> None:
        self._directory = directory
        self._known: dict[str, int] | None = None

    def of(self, operator: KnownOperator) -> int | None:
        return self._proofs().get(str(operator.recipient))

    def record(self, recipients: Collection[str], operators: tuple[KnownOperator, ...], now: int) -> None:
        """These opened the backup just now. ``operators``: of the configuration. Raises `StorageFailed`."""
        self._write({**self._kept(operators), **dict.fromkeys(recipients, now)})

    def note(self, recipients: Collection[str], operators: tuple[KnownOperator, ...], now: int) -> None:
        """The same, but on disk only with the next `save`."""
        self._known = {**self._kept(operators), **dict.fromkeys(recipients, now)}

    def save(self) -> None:
        """Raises `StorageFailed`."""
        self._write(self._proofs())

    def retain(self, operators: tuple[KnownOperator, ...]) -> None:
        """Forget who is no operator any more. Raises `StorageFailed`."""
        kept = self._kept(operators)
        if kept != self._proofs():
            self._write(kept)

    def _kept(self, operators: tuple[KnownOperator, ...]) -> dict[str, int]:
        recipients = {str(operator.recipient) for operator in operators}
        return {recipient: time for recipient, time in self._proofs().items() if recipient in recipients}

    def _write(self, proofs: dict[str, int]) -> None:
        self._directory.write(PROOFS, msgspec.json.encode(proofs, order="sorted") + b"\n")
        self._known = proofs

    def _proofs(self) -> dict[str, int]:
        if self._known is None:
            try:
                data = self._directory.read(PROOFS, SMALL_FILE)
                self._known = msgspec.json.decode(data or b"{}", type=dict[str, int])
            except (StorageFailed, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                self._known = {}
        return self._known
