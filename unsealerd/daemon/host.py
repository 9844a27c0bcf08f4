"""The host: its state, and the one place where a change of it is authorised, audited and done.

Runs on the event loop. What blocks is done by the `Keeper` on one worker thread, one change at a time; services go on reading the
keyring that is current meanwhile. A replaced keyring is wiped here, on the loop, where no request can be half way through it.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from unsealerd.config import Config, Operator
from unsealerd.core import schedule
from unsealerd.core.draft import Draft
from unsealerd.core.keyring import Keyring
from unsealerd.core.lifecycle import HostEvent
from unsealerd.core.rules import KnownOperator, Rules
from unsealerd.core.secret import SecretBuffer
from unsealerd.daemon import machine
from unsealerd.daemon.audit import AuditLog
from unsealerd.daemon.fdstore import FdStore, Received
from unsealerd.daemon.keeper import Keeper, Written
from unsealerd.daemon.keptmemory import PREFIX, KeptMemory
from unsealerd.daemon.lockreason import FINAL, LOCKS, LockMemory
from unsealerd.daemon.proven import Proofs
from unsealerd.daemon.standing import Standing
from unsealerd.daemon.store import BackupStore, DurableDirectory
from unsealerd.daemon.tpmlink import TpmLink, TpmSettings
from unsealerd.daemon.worker import Worker
from unsealerd.errors import (
    AlreadyInitialised,
    AuditUnwritable,
    BackupDamaged,
    ConfigInvalid,
    IdentityInvalid,
    NotArmed,
    NotLocked,
    Rollback,
    SealRefused,
    StorageFailed,
    TpmChanged,
    TpmFailed,
    UnsealerdError,
)
from unsealerd.model import LockReason, SealKind, State

if TYPE_CHECKING:
    from unsealerd.tpm.facts import TpmFacts

T = TypeVar("T")
Facts = dict[str, object]
"""Who asked, as it stands in audit records."""

LOCK_PATIENCE = 10  # seconds that `lock` waits for the change in hand, and then for the TPM
_LOCKED = "locked by the administrator"
UNSEAL_PATIENCE = 30  # seconds that the start waits for the TPM before it says that it is ready, locked

_log = logging.getLogger("unsealerd")


class Host(Standing):
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
        self._directory = DurableDirectory(config.daemon.state_dir)
        self._link = TpmLink(self._directory)
        self._memory = LockMemory(self._directory, self._link)
        store = BackupStore(self._directory)
        images = [entry for entry in received if entry.name.startswith(PREFIX)]
        self.kept = KeptMemory(descriptors or FdStore(), images, store.read, machine.boot_id)
        self.keeper = Keeper(self._directory, store, self._link, self.kept, clock, id_file)
        self.proofs = Proofs(self._directory)
        self._worker = Worker()
        self.policy_epoch = 0
        self._on_configured: list[Callable[[], None]] = []
        self._sealing = False
        self.configure(config)

    # --- configuration

    def configure(self, config: Config) -> None:
        """Take over a configuration. Raises `ConfigInvalid`; the one before then stays in force."""
        if not config.operators and self.keeper.store.present():
            raise ConfigInvalid(
                "operator: there is a keyring, and without an operator nobody could ever unlock it again"
            )
        try:
            operators = tuple(_operator(o) for o in config.operators)
            rules = Rules(operators, config.unlock.threshold, config.unlock.require)
            if operators:
                rules.check()
        except ValueError as err:
            raise ConfigInvalid(f"operator, unlock: {err}") from err
        policy, missing = machine.policy_of(config)
        for name in missing:
            _log.warning("policy: %s does not exist here, so the rule grants nothing", name)
        self.config = config
        self.operators = operators
        self.policy = policy
        self.policy_epoch += 1
        tpm = config.tpm
        settings = None if tpm.tcti is None else TpmSettings(tpm.tcti, tpm.pcrs, config.seal.extra_resets)
        self.keeper.configure(rules, settings)
        self.audit.limit(config.audit.max_size, config.audit.keep)
        for follow in self._on_configured:
            follow()

    def on_configured(self, follow: Callable[[], None]) -> None:
        """Call it whenever a configuration was taken over, before anything else can happen."""
        self._on_configured.append(follow)

    async def reload(self, config: Config, facts: Facts | None = None) -> None:
        """Take over a configuration, make the keys that it declares, and write the backup to its operators."""
        self.audit.append("reload", **(facts or {}))
        await self._worker.finish(self._reload(config))

    # --- reading

    def due(self) -> int | None:
        """Unix seconds at which `tick` has something to do, or None."""
        if self.keyring is None:
            return None
        if self.keeper.outdated or self.keeper.counter_behind:
            return 0
        plan = self.keeper.plan
        times = [schedule.due(self.keyring, self.config.keys), plan.deadline if plan is not None else None]
        return min((time for time in times if time), default=None)

    # --- changing: each is one task of its own, so that a caller who hangs up does not leave it half adopted

    async def start(self) -> None:
        """Open the backup with the sealed copy, if there is one. Never raises for what a host can be in."""
        task = self._worker.begin(self._start())
        await asyncio.wait({task}, timeout=UNSEAL_PATIENCE)
        if task.done():
            task.result()
        else:
            self._set_locked(LockReason.TPM_FAILED, f"no answer in {UNSEAL_PATIENCE} s; still trying")

    async def initialise(self, facts: Facts) -> Keyring:
        return await self._worker.finish(self._initialise(facts))

    async def rotate(self, name: str, facts: Facts) -> None:
        def edit(draft: Draft) -> None:
            declared = self.config.keys.get(name)
            size, overlap = (declared.size, declared.overlap) if declared else (None, 0)
            draft.rotate(name, size=size, overlap=overlap, now=self.now)

        await self._worker.finish(self._edit("key_rotate", edit, {**facts, "key": name}))

    async def revoke(self, name: str, version: int | None, facts: Facts) -> None:
        def edit(draft: Draft) -> None:
            declared = self.config.keys.get(name)
            draft.revoke(name, version, size=declared.size if declared else None, now=self.now)

        facts = {**facts, "key": name, "version": version}
        await self._worker.finish(self._edit("key_revoke", edit, facts, destroy=True))

    async def seal(self, kind: SealKind, deadline: int, facts: Facts) -> None:
        """``deadline``: Unix seconds at which the sealed copy is destroyed; 0: none."""
        await self._worker.finish(self._seal(kind, deadline, facts))

    async def disarm(self, facts: Facts) -> None:
        await self._worker.finish(self._disarm("disarm", facts))

    async def lock(self, facts: Facts) -> None:
        await self._worker.finish(self._lock(facts))

    async def unlock(self, file_key: SecretBuffer, facts: Facts, *, accept_rollback: bool) -> None:
        """Open the backup with a file key that an operator's answer gave. Takes the buffer over."""
        await self._worker.finish(self._unlock(file_key, facts, accept_rollback=accept_rollback))

    async def tick(self) -> None:
        """Do what is due: rotations, the end of overlaps, the end of a lease."""
        await self._worker.finish(self._tick())

    async def tpm_facts(self) -> "tuple[TpmFacts, int | None]":
        """The TPM as it is now, and the counter. Raises the Tpm* errors."""
        return await self.inspect(self._link.facts)

    async def inspect(self, function: Callable[[], T]) -> T:
        """Call what blocks and only reads. Raises `TpmFailed` if it takes too long."""
        return await self._worker.read(function)

    async def close(self) -> bool:
        """Wait for the change in hand, within bounds, then wipe. False if it hangs in the kernel, and cannot be ended."""
        if self.state is State.UNLOCKED and self.keeper.plan is None:
            # For a start in this boot that finds nothing in memory: not a restart then, and no reboot either.
            with contextlib.suppress(UnsealerdError):
                detail = "the service was stopped, and nothing was sealed"
                await self.inspect(lambda: self._memory.remember(LockReason.DAEMON_STOPPED, detail))
        ended = await self._worker.close()
        if self._sealing:
            self._note(
                "seal_failed", error=TpmFailed.__name__, detail="the daemon was ended before it was done"
            )
        self.kept.leave()
        if self.keyring is not None:
            self.keyring.close()
            self.keyring = None
        return ended

    # --- the changes

    async def _start(self) -> None:
        async with self._worker.alone():
            if self.keeper.store.present():
                # Whatever happens below: with a backup there this is no new host.
                self._set_locked(LockReason.UNEXPECTED_REBOOT, "the start is not through")
            try:
                self.audit.open()
                self.audit.append("start", boot_id=machine.boot_id())
                await self._first_state()
            except UnsealerdError as err:
                self._refused(err, LockReason.TPM_FAILED)

    async def _reload(self, config: Config) -> None:
        async with self._worker.alone():
            self.configure(config)
            self.rescheduled.set()  # what fails below is tried again by `tick`
            with contextlib.suppress(StorageFailed):  # it decides nothing
                self.proofs.retain(self.operators)
            if self.keyring is not None:
                draft = Draft(self.keyring)
                self._amend(draft)
                if draft.changes or self.keeper.outdated:
                    await self._write(draft)

    async def _first_state(self) -> None:
        await self._worker.blocking(self.keeper.finish_initialisation)
        if not self.keeper.store.present():
            leftovers = self.keeper.leftovers() + (("the memory of a keyring",) if self.kept.found else ())
            self.kept.wipe()
            if leftovers:
                raise BackupDamaged(f"there is {', '.join(leftovers)}, but no backup")
            return
        if self.kept.found:
            await self._restore()
            return
        if not self.keeper.has_sealed_copy():
            await self._worker.blocking(
                self.keeper.reader.backup
            )  # a backup that nobody can open is said so before anybody tries
            remembered = await self._worker.blocking(self._memory.recall)
            self._set_locked(
                *(remembered or (LockReason.UNEXPECTED_REBOOT, "no sealed copy was left for this boot"))
            )
            self.audit.append("locked", reason=self._reason(), detail=self.lock_detail)
            return
        self.audit.append("unseal")
        drafts: list[Draft] = []
        with self._keeping():
            unsealed = await self._worker.blocking(lambda: self.keeper.unseal(self._amending(drafts)))
            try:
                self.audit.append(
                    "unsealed",
                    generation=unsealed.keyring.metadata.generation,
                    destroyed=unsealed.proof.value,
                )
            except AuditUnwritable:
                unsealed.keyring.close()
                raise
        self._move(HostEvent.UNSEAL)
        self._opened(unsealed.keyring, drafts)

    async def _restore(self) -> None:
        """Take over what the process before this one has left in memory."""
        try:
            keyring = await self._worker.blocking(self.keeper.restore)
        except (SealRefused, Rollback, TpmChanged, BackupDamaged):
            self.kept.wipe()  # for any other reason it waits for the TPM, or the disk, and the next restart
            raise
        try:
            self.audit.append("restored", generation=keyring.metadata.generation)
        except AuditUnwritable:
            keyring.close()
            raise
        self._move(HostEvent.RESTORE)
        self._opened(keyring, [])
        await self._forget_lock()
        if self.keeper.plan is None and self.keeper.has_sealed_copy():
            # Of a reboot that did not happen. A counter that cannot be moved now is moved by `tick`.
            self._note("seal_cancelled")
            with contextlib.suppress(TpmFailed):
                await self._destroy_sealed()

    @contextlib.contextmanager
    def _keeping(self) -> Iterator[None]:
        """Around an opening: what it stores in memory is wiped again if nothing comes of it."""
        self.kept.admit()
        try:
            yield
        except BaseException:
            self.kept.wipe()
            raise

    async def _forget_lock(self) -> None:
        with contextlib.suppress(UnsealerdError):
            await self._worker.blocking(self._memory.forget)

    async def _initialise(self, facts: Facts) -> Keyring:
        async with self._worker.alone():
            if self.state is not State.UNINITIALISED:
                raise AlreadyInitialised("this host has a keyring")
            self.audit.append("initialise", **facts)
            draft = Draft(None)
            self._amend(draft)
            with self._keeping():
                keyring = await self._worker.blocking(lambda: self.keeper.initialise(draft))
            self._move(HostEvent.INITIALISE)
            self._opened(keyring, [draft])
            return keyring

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

    async def _unlock(self, file_key: SecretBuffer, facts: Facts, *, accept_rollback: bool) -> None:
        with file_key:
            async with self._worker.alone():
                if self.state is not State.LOCKED:
                    raise NotLocked("the host is not locked")
                self.audit.append("unlock", accept_rollback=accept_rollback or None, **facts)
                drafts: list[Draft] = []
                with self._keeping():
                    try:
                        unlocked = await self._worker.blocking(
                            lambda: self.keeper.unlock(
                                file_key, self._amending(drafts), accept_rollback=accept_rollback
                            )
                        )
                    except UnsealerdError as err:
                        self._note("unlock_failed", error=err.name, detail=err.detail, **facts)
                        self._refused(err)
                        raise
                    try:
                        self.audit.append(
                            "unlocked", generation=unlocked.keyring.metadata.generation, **facts
                        )
                    except AuditUnwritable:
                        unlocked.keyring.close()
                        raise
                self._move(HostEvent.UNLOCK)
                self._opened(unlocked.keyring, drafts if unlocked.written else [])
                await self._forget_lock()

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

    async def _write(self, draft: Draft, *, destroy: bool = False) -> None:
        keyring = self.open_keyring()
        written = await self._worker.blocking(lambda: self._write_blocking(keyring, draft, destroy))
        self._adopt(written.keyring)
        if written.seal_error is not None:
            self._note("seal_failed", error=written.seal_error.name, detail=written.seal_error.detail)
        self._announce([draft])

    def _write_blocking(self, keyring: Keyring, draft: Draft, destroy: bool) -> Written:
        return self.keeper.change(keyring, draft, forget_previous=destroy)

    # --- parts

    def _amending(self, drafts: list[Draft]) -> Callable[[Draft], None]:
        def amend(draft: Draft) -> None:
            drafts[:] = [draft]
            self._amend(draft)

        return amend

    def _amend(self, draft: Draft) -> None:
        schedule.amend(draft, self.config.keys, self.now)

    def relock(self, err: UnsealerdError) -> None:
        """Locked already: take over a more urgent reason that an attempt to unlock has brought up."""
        if self.state is State.LOCKED and self.lock_reason is not LOCKS.get(type(err)):
            self._refused(err)

    def _refused(self, err: UnsealerdError, otherwise: LockReason | None = None) -> None:
        """Be locked, and say why; an error that has no lock reason of its own changes nothing, or is ``otherwise``."""
        reason = err.reason if isinstance(err, SealRefused) else LOCKS.get(type(err), otherwise)
        if reason is None:
            return
        self._set_locked(reason, err.detail)
        _log.warning("locked: %s (%s)", reason.value, err.detail)
        with contextlib.suppress(UnsealerdError):
            self.audit.append("locked", reason=reason.value, detail=err.detail or None)
            if reason in FINAL and (self.keeper.has_sealed_copy() or reason is LockReason.MEMORY_REFUSED):
                self._memory.remember(reason, err.detail)
                self.keeper.discard_refused()


def _operator(declared: Operator) -> KnownOperator:
    """Raises `ConfigInvalid` for what is no recipient."""
    from unsealerd.core.age import parse_recipient

    try:
        recipient = parse_recipient(declared.recipient)
    except IdentityInvalid as err:
        raise ConfigInvalid(f"operator {declared.name}: {err.detail}") from err
    return KnownOperator(declared.name, recipient, declared.groups, declared.passphrase)
