"""The shares that operators have given so far, where several are needed to open the backup.

They are in secret memory and nowhere else. The first one opens a window; at its end all are wiped, as they are when the host
is unlocked or locked, and when the backup is damaged or another one. An unlock that fails for another reason (`Rollback`, the
TPM, the disk) leaves them: else one operator could cancel what the others gave. None lies about for longer than the window.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping

import msgspec

from unsealerd.core.age import verify_mac
from unsealerd.core.secret import SecretBuffer
from unsealerd.core.sharing import Backup, Sharing
from unsealerd.errors import AgeMacInvalid, BackupDamaged


class Combined(msgspec.Struct, frozen=True):
    """What all shares together gave. The buffer is the caller's to wipe."""

    file_key: SecretBuffer
    operators: tuple[str, ...]
    """Whose shares these were."""
    accept_rollback: bool
    """Whether each of these said so."""


class _Given(msgspec.Struct, frozen=True):
    share: SecretBuffer
    accept_rollback: bool


class Gathering:
    def __init__(
        self, monotonic: Callable[[], float], on_drop: Callable[[str, tuple[str, ...]], None]
    ) -> None:
        """``on_drop``: told why, and whose shares, when shares are wiped unused."""
        self._monotonic = monotonic
        self._on_drop = on_drop
        self._given: dict[int, _Given] = {}
        self._backup: Backup | None = None
        self._sharing: Sharing | None = None
        self._ends = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._attempts = 0

    def add(
        self,
        backup: Backup,
        sharing: Sharing,
        shares: Mapping[int, SecretBuffer],
        *,
        window: int,
        accept_rollback: bool,
    ) -> None:
        """Take these shares over; those of operators who had answered before replace theirs.

        ``window``: seconds, if these are the first.
        """
        self._end_in_time()
        self.follow(backup)
        if not self._given:
            self._backup, self._sharing = backup, sharing
            self._ends = self._monotonic() + window
            self._timer = asyncio.get_running_loop().call_later(window, self._expire)
        for index, share in shares.items():
            old = self._given.pop(index, None)
            if old is not None:
                old.share.close()
            self._given[index] = _Given(share, accept_rollback)

    def combine(self) -> Combined | None:
        """The file key, if the rules are satisfied; None if they are not. Who gets it says what came of it: `settle`.

        Where those who accept a rollback are enough, it is theirs: nobody's "no" takes away what so many agreed on.

        Raises `BackupDamaged` if what the shares give is not this header's file key, and wipes them: each is authentic, so
        it is nobody's fault among the operators, and somebody has changed the backup.
        """
        sharing, backup = self._sharing, self._backup
        if sharing is None or backup is None or not sharing.rules.satisfied(self.answered):
            return None
        accepting = {index: given.share for index, given in self._given.items() if given.accept_rollback}
        accept = sharing.rules.satisfied(self._names(sharing, accepting))
        used = accepting if accept else {index: given.share for index, given in self._given.items()}
        operators = self._names(sharing, used)
        try:
            file_key = sharing.combine(used)
        except BaseException:
            self._wipe()
            raise
        try:
            verify_mac(backup.header, file_key)
        except AgeMacInvalid as err:
            file_key.close()
            self._wipe()
            raise BackupDamaged("the header of the backup was changed") from err
        self._attempts += 1
        return Combined(file_key, operators, accept)

    def settle(self, *, keep: bool) -> None:
        """What `combine` gave was tried; wipe the shares unless they are to be tried again."""
        self._attempts -= 1
        if not keep:
            self._wipe()

    @property
    def trying(self) -> bool:
        """Whether what `combine` gave is being tried."""
        return self._attempts > 0

    def spend(self) -> None:
        """Wipe the shares: they were of use."""
        self._wipe()

    def follow(self, backup: Backup) -> None:
        """The backup on disk is this one: shares of another are worth nothing any more."""
        if self._given and backup != self._backup:
            self.drop("the backup is another one")

    def drop(self, why: str) -> None:
        """Wipe the shares unused."""
        if self._given:
            operators = self.answered
            self._wipe()
            self._on_drop(why, operators)

    @property
    def answered(self) -> tuple[str, ...]:
        """The names of whose shares there are, in the order of the backup's list."""
        self._end_in_time()
        if self._sharing is None:
            return ()
        return self._names(self._sharing, self._given)

    @property
    def seconds_left(self) -> int | None:
        """Of the window; None if none is open."""
        return max(1, int(self._ends - self._monotonic())) if self.answered else None

    @staticmethod
    def _names(sharing: Sharing, places: Collection[int]) -> tuple[str, ...]:
        return tuple(sharing.rules.operators[index].name for index in sorted(places))

    def _end_in_time(self) -> None:
        """A timer may be late."""
        if self._given and self._monotonic() >= self._ends:
            self._expire()

    def _expire(self) -> None:
        self._ends = float("inf")
        self.drop("the window is over")

    def _wipe(self) -> None:
        for given in self._given.values():
            given.share.close()
        self._given.clear()
        self._backup = self._sharing = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
