"""The daemon's way to its TPM: opened for one operation, so that nothing depends on it in between."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from unsealerd.daemon.store import SMALL_FILE, DurableDirectory
from unsealerd.errors import TpmChanged, TpmMissing, UnsealerdError

if TYPE_CHECKING:
    from unsealerd.tpm.device import Tpm
    from unsealerd.tpm.facts import TpmFacts
    from unsealerd.tpm.pin import TpmPin

PIN = "tpm.json"


class TpmSettings(msgspec.Struct, frozen=True):
    tcti: str
    pcrs: tuple[int, ...]
    extra_resets: int


class TpmLink:
    """The TPM that the configuration names (`settings`; None: none), and what was pinned of it."""

    def __init__(self, directory: DurableDirectory) -> None:
        self._directory = directory
        self.settings: TpmSettings | None = None

    @contextlib.contextmanager
    def session(self, *, attach: bool = True) -> Iterator["Tpm | None"]:
        """The TPM, open and found to be the pinned one. None without a TPM. Raises the Tpm* errors."""
        if self.settings is None:
            yield None
            return
        from unsealerd.tpm.device import Tpm

        tpm = Tpm.open(self.settings.tcti)
        try:
            if attach:
                self.attach(tpm)
            yield tpm
        finally:
            tpm.close()

    def attach(self, tpm: "Tpm") -> None:
        pin = self.pin()
        if pin is None:
            raise TpmChanged(f"{PIN} is missing: no TPM was pinned for this backup")
        tpm.attach(pin)

    def pin(self) -> "TpmPin | None":
        """What was pinned at initialisation. Raises `TpmChanged` if it cannot be read."""
        from unsealerd.tpm.pin import TpmPin

        data = self._directory.read(PIN, SMALL_FILE)
        return None if data is None else TpmPin.decode(data)

    def pin_anew(self, tpm: "Tpm") -> None:
        """Make a counter in this TPM, and pin it from now on."""
        self._directory.write(PIN, tpm.enrol().encode())

    def reset_count(self) -> int | None:
        """The TPM's count of resets, or None where there is none to ask."""
        try:
            with self.session(attach=False) as tpm:
                return None if tpm is None else tpm.facts().reset_count
        except UnsealerdError:
            return None

    def facts(self) -> "tuple[TpmFacts, int | None]":
        """The TPM as it is now, and the counter, if there is one yet. Raises the Tpm* errors."""
        with self.session(attach=False) as tpm:
            if tpm is None:
                raise TpmMissing("no TPM is configured")
            pcrs = () if self.settings is None else self.settings.pcrs
            pin = self.pin()
            if pin is None:
                return tpm.facts(pcrs), None
            tpm.attach(pin)
            return tpm.facts(pcrs), tpm.counter()
