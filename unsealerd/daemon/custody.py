"""What becomes of a keyring that is open: it is written anew, sealed, made void again, or locked.

Each of these runs alone (`Worker.alone`). What blocks is done by the `Keeper` on the worker's thread; services go on reading the
keyring that is current meanwhile.
"""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from unsealerd.config import Config
from unsealerd.core import schedule
from unsealerd.core.auditchain import Facts
from unsealerd.core.draft import Draft
from unsealerd.core.keyring import Keyring
from unsealerd.core.lifecycle import HostEvent
from unsealerd.daemon import machine
from unsealerd.daemon.audit import AuditLog
from unsealerd.daemon.fdstore import FdStore, Received
from unsealerd.daemon.keeper import Keeper, Written
from unsealerd.daemon.keptmemory import PREFIX, KeptMemory
from unsealerd.daemon.lockreason import LockMemory
from unsealerd.daemon.standing import Standing
from unsealerd.daemon.store import BackupStore, DurableDirectory
from unsealerd.daemon.tpmlink import TpmLink
from unsealerd.daemon.worker import Worker
from unsealerd.errors import NotArmed, TpmFailed, UnsealerdError
from unsealerd.model import LockReason, SealKind, State

T = TypeVar("T")
LOCK_PATIENCE = 10  # seconds that `lock` waits for the change in hand, and then for the TPM
_LOCKED = "locked by the administrator"

_log = logging.getLogger("unsealerd")


class Custody(Standing):
    """Used by the `Host` that it is a part of."""

    def __init__(
        self,
        config: Config,
        id_file: Path,
        clock: Callable[[], float],
        audit: AuditLog,
        descriptors: FdStore | None = None,
        received: Sequence[Received] = (),
    ) -> None:
        """``id_file``: what says which keyring is this host's (unsealerd/keyringid.py).

        ``received``: what the process before this one has left in the service manager's store; taken over.
        """
        super().__init__(clock, audit)
        self.config = config
        self._directory = DurableDirectory(config.daemon.state_dir)
        self._link = TpmLink(self._directory)
        self._memory = LockMemory(self._directory, self._link)
        store = BackupStore(self._directory)
        images = [entry for entry in received if entry.name.startswith(PREFIX)]
        self.kept = KeptMemory(descriptors or FdStore(), images, store.read, machine.boot_id)
        self.keeper = Keeper(self._directory, store, self._link, self.kept, clock, id_file)
        self._worker = Worker()
        self._sealing = False

    async def inspect(self, function: Callable[[], T]) -> T:
        """Call what blocks and only reads. Raises `TpmFailed` if it takes too long."""
        return await self._worker.read(function)

    # --- written anew

    async def _edit(
        self, event: str, edit: Callable[[Draft], None], facts: Facts, *, destroy: bool = False
    ) -> None:
        async with self._worker.alone():
            draft = Draft(self.open_keyring())
            edit(draft)
            self.audit.append(event, **facts)
            await self._write(draft, destroy=destroy)
            if destroy:
                self._require_counter("the bytes are destroyed here")

    async def _write(self, draft: Draft, *, destroy: bool = False) -> None:
        keyring = self.open_keyring()
        written = await self._worker.blocking(lambda: self._write_blocking(keyring, draft, destroy))
        self._adopt(written.keyring)
        if written.seal_error is not None:
            self._note("seal_failed", error=written.seal_error.name, detail=written.seal_error.detail)
        self._announce([draft])

    def _write_blocking(self, keyring: Keyring, draft: Draft, destroy: bool) -> Written:
        return self.keeper.change(keyring, draft, forget_previous=destroy)

    async def _tick(self) -> None:
        async with self._worker.alone():
            if self.keyring is None:
                return
            plan = self.keeper.plan
            if plan is not None and plan.deadline and plan.deadline <= self.now:
                self._note("lease_expired")  # as `_disarm`
                await self._destroy_sealed()
            draft = Draft(self.open_keyring())
            self._amend(draft)
            if draft.changes or self.keeper.outdated or self.keeper.counter_behind:
                # How many: which ones is recorded one by one when it is done, and a thousand names are no record.
                self.audit.append("scheduled_change", changes=len(draft.changes))
                await self._write(draft)
                self._require_counter("what was due is done")

    def _amend(self, draft: Draft) -> None:
        schedule.amend(draft, self.config.keys, self.now)

    def _amending(self, drafts: list[Draft]) -> Callable[[Draft], None]:
        def amend(draft: Draft) -> None:
            drafts[:] = [draft]
            self._amend(draft)

        return amend

    # --- sealed, and made void again

    async def _seal(self, kind: SealKind, deadline: int, facts: Facts) -> None:
        async with self._worker.alone():
            keyring = self.open_keyring()
            self.audit.append("seal", kind=kind.value, deadline=deadline or None, **facts)
            self._sealing = True
            try:
                written = await self._worker.blocking(lambda: self.keeper.seal(keyring, kind, deadline))
            except UnsealerdError as err:
                self._note("seal_failed", error=err.name, detail=err.detail)
                raise
            finally:
                self._sealing = False
            self._adopt(written.keyring)
            if written.seal_error is not None:
                self._note("seal_failed", error=written.seal_error.name, detail=written.seal_error.detail)
                raise written.seal_error
            self._note("sealed", generation=written.keyring.metadata.generation)
            self.rescheduled.set()

    async def _disarm(self, event: str, facts: Facts) -> None:
        async with self._worker.alone():
            if self.keeper.plan is None and not self.keeper.has_sealed_copy():
                raise NotArmed("there is no sealed copy")
            if self.keyring is None and self.state is State.LOCKED:
                # Without the keyring the counter cannot be moved along; the next unlock does that.
                self._note(event, **facts)  # as below
                await self._worker.blocking(self.keeper.discard_refused)
                return
            self._note(event, **facts)  # an audit log that cannot be written keeps no authority alive
            await self._destroy_sealed()

    async def _destroy_sealed(self, patience: float | None = None) -> None:
        """Raises `TpmFailed` when a copy of the disk would still open: nobody is to believe otherwise.

        ``patience``: seconds. After them the change may still happen, so only who gives the keyring up (`lock`) may set it.
        """
        keyring = self.open_keyring()

        def destroy() -> Written:
            return self.keeper.destroy_sealed(keyring)

        if patience is None:
            written = await self._worker.blocking(destroy)
        else:
            written = await self._worker.within(patience, destroy)
        self._adopt(written.keyring)
        self._require_counter("the sealed copy is gone from this disk")
        self._note("sealed_copy_destroyed")

    def _require_counter(self, what: str) -> None:
        if self.keeper.counter_behind:
            self._note("counter_behind")
            raise TpmFailed(
                f"{what}, but the TPM's counter could not be moved: a copy of the disk from before would still open. "
                "It is tried again every minute; `status` says when it is done"
            )

    # --- locked

    async def _lock(self, facts: Facts) -> None:
        noted = self.state is State.UNLOCKED
        if noted:
            self._note("lock", **facts)  # as `_disarm`
            self.kept.wipe()  # first, whatever comes: a process that dies from here on comes back locked
        try:
            async with self._worker.alone(LOCK_PATIENCE):
                await self._lock_alone({} if noted else facts, noted=noted)
        except TpmFailed:
            if self.state is State.LOCKED:
                raise
            # A change that hangs in the TPM uses the keyring: wiped under it, zeros would become the backup. The end of
            # the process wipes all, and the service manager starts the next one, locked.
            _log.error("locked by ending: the change in hand waits for the TPM")
            os._exit(os.EX_SOFTWARE)

    async def _lock_alone(self, facts: Facts, *, noted: bool) -> None:
        if not noted:
            if self.state is not State.LOCKED or not self.kept.found:
                self.open_keyring()  # says why not
            self._note("lock", **facts)
        try:
            if self.keyring is not None and (self.keeper.plan is not None or self.keeper.has_sealed_copy()):
                await self._destroy_sealed(LOCK_PATIENCE)
        finally:
            # Whatever the disk and the TPM say, and if they say nothing at all: asked to lock, it locks.
            if self.state is State.UNLOCKED:
                self._move(HostEvent.LOCK)
            self._set_locked(LockReason.LOCKED_BY_ADMIN, _LOCKED)
            self.kept.wipe()
        self._note("locked", reason=self._reason())
        try:
            await self.inspect(lambda: self._memory.remember(LockReason.LOCKED_BY_ADMIN, _LOCKED))
        except UnsealerdError as err:
            _log.warning("a restart will not know why it is locked error=%s", err.name)
