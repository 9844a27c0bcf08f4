"""What the host is at this moment, and how that is told: state, keyring, why it is locked, who watches, what is recorded."""

import asyncio
import logging
from collections.abc import Callable

from unsealerd.core.draft import Change, Draft
from unsealerd.core.keyring import Keyring
from unsealerd.core.lifecycle import HOST_TABLE, HostEvent
from unsealerd.daemon.audit import AuditLog
from unsealerd.daemon.watch import Event, Watchers
from unsealerd.errors import AuditUnwritable, Locked, NotInitialised
from unsealerd.model import LockReason, State

_log = logging.getLogger("unsealerd")


class Standing:
    """Changed on the event loop only, by the `Host` that it is a part of."""

    def __init__(self, clock: Callable[[], float], audit: AuditLog) -> None:
        self._clock = clock
        self.audit = audit
        self.watchers = Watchers()
        self.state = State.UNINITIALISED
        self.lock_reason: LockReason | None = LockReason.FIRST_BOOT
        self.lock_detail = ""
        self.since = int(clock())
        self.keyring: Keyring | None = None
        self.last_generation: int | None = None
        self.rescheduled = asyncio.Event()  # set when `due` may have another answer

    @property
    def now(self) -> int:
        return int(self._clock())

    def open_keyring(self) -> Keyring:
        """The keyring of this moment. Raises `Locked`, `NotInitialised`. Not to be kept across an await."""
        if self.keyring is None:
            if self.state is State.UNINITIALISED:
                raise NotInitialised("there is no keyring yet")
            raise Locked(self.lock_detail)
        return self.keyring

    def _adopt(self, keyring: Keyring) -> None:
        old, self.keyring = self.keyring, keyring
        self.last_generation = keyring.metadata.generation
        self.rescheduled.set()
        if old is not None:
            old.close()

    def _opened(self, keyring: Keyring, drafts: list[Draft]) -> None:
        self._adopt(keyring)
        self.watchers.tell(Event("unlocked", self.state, None, None))
        self._announce(drafts)

    def _move(self, event: HostEvent) -> None:
        self.state = HOST_TABLE[self.state, event]
        self.since = self.now
        if self.state is State.UNLOCKED:
            self.lock_reason, self.lock_detail = None, ""

    def _set_locked(self, reason: LockReason, detail: str) -> None:
        old, self.keyring = self.keyring, None
        if old is not None:
            old.close()
        self.state, self.lock_reason, self.lock_detail, self.since = State.LOCKED, reason, detail, self.now
        self.watchers.tell(Event("locked", self.state, None, None))

    def _reason(self) -> str | None:
        return self.lock_reason.value if self.lock_reason is not None else None

    def _announce(self, drafts: list[Draft]) -> None:
        """Tell those who watch, and the log, what has happened."""
        changes: list[Change] = [change for draft in drafts for change in draft.changes]
        for change in changes:
            self._note(f"key_{change.event}", key=change.key, version=change.version or None)
        for change in changes:
            if change.event in ("created", "rotated", "revoked"):
                self.watchers.tell(Event(change.event, self.state, change.key, change.version))

    def _note(self, event: str, **fields: object) -> None:
        """Record an outcome, or that authority is given up. That it cannot be recorded is logged, and stops and undoes nothing.

        The intent of an outcome was recorded durably before; giving authority up needs no permission, so not the log's either.
        """
        try:
            self.audit.append(event, **fields)
        except AuditUnwritable as err:
            _log.error("audit: %s could not be recorded: %s", event, err.detail)
