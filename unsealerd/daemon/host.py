"""The host: its state, and the one place where a change of it is authorised, audited and done.

Runs on the event loop. What blocks is done by the `Keeper` on one worker thread, one change at a time; services go on reading the
keyring that is current meanwhile. A replaced keyring is wiped here, on the loop, where no request can be half way through it.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unsealerd.config import Config, Operator
from unsealerd.core import schedule
from unsealerd.core.auditchain import Facts
from unsealerd.core.draft import Draft
from unsealerd.core.keyring import Keyring
from unsealerd.core.lifecycle import HostEvent
from unsealerd.core.rules import KnownOperator, Rules
from unsealerd.core.secret import SecretBuffer
from unsealerd.daemon import machine
from unsealerd.daemon.audit import AuditLog
from unsealerd.daemon.custody import Custody
from unsealerd.daemon.fdstore import FdStore, Received
from unsealerd.daemon.lockreason import FINAL, LOCKS
from unsealerd.daemon.proven import Proofs
from unsealerd.daemon.tpmlink import TpmSettings
from unsealerd.errors import (
    AlreadyInitialised,
    AuditUnwritable,
    BackupDamaged,
    ConfigInvalid,
    IdentityInvalid,
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

UNSEAL_PATIENCE = 30  # seconds that the start waits for the TPM before it says that it is ready, locked

_log = logging.getLogger("unsealerd")


class Host(Custody):
    def __init__(
        self,
        config: Config,
        id_file: Path,
        clock: Callable[[], float],
        audit: AuditLog,
        descriptors: FdStore | None = None,
        received: Sequence[Received] = (),
    ) -> None:
        """As `Custody`."""
        super().__init__(config, id_file, clock, audit, descriptors, received)
        self.proofs = Proofs(self._directory)
        self.policy_epoch = 0
        self._on_configured: list[Callable[[], None]] = []
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

    # --- parts

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
