"""The keeper of the one keyring: every way to open it, and every way to change it.

Both the TPM and the operators only supply the file key of the one ``keyring.age``. Everything here blocks (disk, TPM) and is
called from one worker thread, one call at a time; the event loop gets the new keyring and closes the old one itself.

The order of every change, and what a crash after each step leaves::

    read the TPM's counter c (first completing a step that was cut off)
    write the backup with value c + 1        → one ahead: the next opening completes it
    increment the counter                    → current; every older backup and sealed copy is dead
    unlink sealed.json                       → or seal the new file key, when a sealed copy is to stay
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from unsealerd.core.age import (
    FILE_KEY_SIZE,
    decrypt_payload,
    encrypt_under,
    parse_header,
)
from unsealerd.core.draft import Draft
from unsealerd.core.keyring import Keyring
from unsealerd.core.rules import Rules
from unsealerd.core.secret import SecretBuffer
from unsealerd.core.sharing import wrap
from unsealerd.daemon.backupreader import BackupReader
from unsealerd.daemon.keptmemory import KeptMemory
from unsealerd.daemon.store import BACKUP, PREVIOUS, SMALL_FILE, BackupStore, DurableDirectory
from unsealerd.daemon.tpmlink import PIN, TpmLink, TpmSettings
from unsealerd.errors import (
    AlreadyInitialised,
    ConfigInvalid,
    Rollback,
    SealRefused,
    StorageFailed,
    TpmChanged,
    TpmFailed,
    TpmLockout,
    TpmMissing,
    UnsealerdError,
)
from unsealerd.model import LockReason, SealKind

if TYPE_CHECKING:
    from unsealerd.tpm.device import Tpm
    from unsealerd.tpm.sealed import SealedCopy

SEALED = "sealed.json"
INITIALISING = "initialising"


class SealPlan(msgspec.Struct, frozen=True):
    """The sealed copy that there is, or is to be."""

    kind: SealKind
    created: int
    deadline: int
    """Unix seconds; 0: no lease."""


class Unsealed(msgspec.Struct, frozen=True):
    keyring: Keyring
    proof: LockReason
    """How the TPM refused the sealed copy afterwards: the proof that it is destroyed."""


class Unlocked(msgspec.Struct, frozen=True):
    keyring: Keyring
    written: bool
    """Whether the backup was written anew; not so if the TPM had to be done without."""


class Written(msgspec.Struct, frozen=True):
    """A change that is durable."""

    keyring: Keyring
    seal_error: UnsealerdError | None
    """Why the sealed copy could not follow it; the change stands all the same."""


class Keeper:
    def __init__(
        self,
        directory: DurableDirectory,
        store: BackupStore,
        link: TpmLink,
        kept: KeptMemory,
        clock: Callable[[], float],
        id_file: Path,
    ) -> None:
        """``id_file``: what says which keyring is this host's."""
        self._directory = directory
        self.store = store
        self.reader = BackupReader(store, id_file)
        self._link = link
        self._kept = kept
        self._clock = clock
        self._rules = Rules(())
        self._written_for: Rules | None = None  # whom this process has written the backup on disk for
        self.plan: SealPlan | None = None
        self.counter_behind = False

    def configure(self, rules: Rules, tpm: TpmSettings | None) -> None:
        """What the configuration says now."""
        self._rules = rules
        self._link.settings = tpm

    @property
    def outdated(self) -> bool:
        """Whether the backup was not written for the operators, and by the rules, that the configuration names now.

        So it is after a restart, whatever was found in memory: a keyring of version 1 gets its lineage then.
        """
        return self._written_for != self._rules

    def _somebody_left(self, rules: Rules) -> bool:
        """Whether the backup on disk may open to others, or to fewer of them, than one that follows these rules.

        A backup without a list of operators does not say who they are, and somebody may have been taken out of the
        configuration while the daemon was not there: the first write after its start leaves no spare of such a one.
        """
        before = self._written_for or self.reader.opened_for
        return before is None or not rules.admits(before)

    @property
    def now(self) -> int:
        return int(self._clock())

    # --- opening

    def has_sealed_copy(self) -> bool:
        return (self._directory.path / SEALED).exists()

    def initialise(self, draft: Draft) -> Keyring:
        """Make the first backup. Raises `AlreadyInitialised`, `ConfigInvalid` and what a change raises."""
        self.finish_initialisation()
        if self.leftovers():
            raise AlreadyInitialised(f"there is {', '.join(self.leftovers())} of a keyring")
        self._directory.write(INITIALISING, b"")
        with self._link.session(attach=False) as tpm:
            if tpm is not None:
                self._pin_once(tpm)
            written = self._change(draft, generation=1, tpm=tpm)
        with contextlib.suppress(StorageFailed):
            self.finish_initialisation()
        return written.keyring

    def _pin_once(self, tpm: "Tpm") -> None:
        """Pin the TPM; with what an initialisation that was cut off has pinned, so that no counter is left behind in the TPM."""
        try:
            self._link.attach(tpm)
        except TpmChanged:
            self._link.pin_anew(tpm)

    def finish_initialisation(self) -> None:
        """An initialisation that was cut off is complete if it has made the backup.

        If not, no key was given out, and it can be repeated.
        """
        if (self._directory.path / INITIALISING).exists() and self.store.present():
            self._directory.remove(INITIALISING)

    def leftovers(self) -> tuple[str, ...]:
        """The files of a keyring that there are, but for the pin of an initialisation that was cut off.

        And the one that says which keyring is this host's: it is written once there is a backup, so that was taken away.
        """
        cut_off = (self._directory.path / INITIALISING).exists()
        names = (BACKUP, PREVIOUS, SEALED) if cut_off else (BACKUP, PREVIOUS, PIN, SEALED)
        found = tuple(name for name in names if (self._directory.path / name).exists())
        id_file = self.reader.id_file
        return (*found, str(id_file)) if id_file.exists() else found

    def unseal(self, amend: Callable[[Draft], None]) -> Unsealed:
        """Open the backup with the sealed copy, once; the sealed copy is dead afterwards, and that is proved.

        ``amend``: what else is to change in the same write. Raises `SealRefused` and the Tpm*, backup and storage errors; the
        keys are then not given.
        """
        copy = self._sealed_copy()
        with self._link.session() as tpm:
            if tpm is None:
                raise SealRefused(LockReason.TPM_MISSING, "there is a sealed copy, and no TPM is configured")
            with tpm.unseal(copy, self.now) as file_key:
                opened = self.reader.decrypt_sealed(file_key)
            with _closing(opened):
                self._require_current(opened, tpm)
                draft = Draft(opened)
                amend(draft)
                fresh = self._change(
                    draft,
                    generation=opened.metadata.generation + 1,
                    tpm=tpm,
                    counter=opened.metadata.counter,
                ).keyring
            try:
                # Here a counter that lags behind is fatal: the copy would still work in this boot.
                if self.counter_behind:
                    raise TpmFailed("the counter could not be incremented after the sealed copy was used")
                proof = tpm.proof_of_destruction(copy)
            except BaseException:
                fresh.close()
                raise
        return Unsealed(fresh, proof)

    def restore(self) -> Keyring:
        """The keyring that the process before this one has left in memory, if it is the one on disk, and current.

        A lease goes on. Raises `SealRefused` (memory_refused) and what `unseal` raises.
        """
        keyring, data = self._kept.restore()
        try:
            self.reader.restored(keyring, data)
            with self._link.session() as tpm:
                if tpm is not None:
                    self._require_current(keyring, tpm)
                elif keyring.metadata.counter is not None:
                    raise TpmMissing("the backup is tied to a TPM, and the configuration names none")
            self.plan = self._lease(keyring)
        except BaseException:
            keyring.close()
            raise
        return keyring

    def _lease(self, keyring: Keyring) -> SealPlan | None:
        """What is left of a lease from before the restart; any other sealed copy was for a reboot that did not happen."""
        with contextlib.suppress(SealRefused, StorageFailed):
            copy = self._sealed_copy()
            if copy.deadline > self.now and copy.counter == keyring.metadata.counter:
                return SealPlan(copy.kind, copy.created, copy.deadline)
        return None

    def unlock(
        self, file_key: SecretBuffer, amend: Callable[[Draft], None], *, accept_rollback: bool
    ) -> Unlocked:
        """Open the backup with the file key that an operator's answer gave.

        The backup is written anew, so that every sealed copy is dead. With ``accept_rollback`` an older backup is taken as it
        is, another TPM is pinned, and a TPM that does not answer is done without: then nothing can be changed until it does.
        """
        opened = self.reader.decrypt(file_key)
        with _closing(opened):
            try:
                return Unlocked(self._adopt(opened, amend, accept_rollback=accept_rollback), written=True)
            except (TpmMissing, TpmFailed, TpmLockout):
                if not accept_rollback:
                    raise
        return Unlocked(self.reader.decrypt(file_key), written=False)

    def _adopt(self, opened: Keyring, amend: Callable[[Draft], None], *, accept_rollback: bool) -> Keyring:
        if self._link.settings is None and opened.metadata.counter is not None and not accept_rollback:
            # Or one line of the configuration would turn the promise off, and that file is on the disk, too.
            raise TpmMissing("the backup is tied to a TPM, and the configuration names none")
        with self._link.session(attach=False) as tpm:
            counter = None
            if tpm is not None:
                try:
                    self._link.attach(tpm)
                    self._require_current(opened, tpm)
                    counter = opened.metadata.counter
                except TpmChanged:
                    if not accept_rollback:
                        raise
                    self._link.pin_anew(tpm)
                except Rollback:
                    if not accept_rollback:
                        raise
            draft = Draft(opened)
            amend(draft)
            return self._change(
                draft, generation=opened.metadata.generation + 1, tpm=tpm, counter=counter
            ).keyring

    # --- changing

    def change(self, current: Keyring, draft: Draft, *, forget_previous: bool = False) -> Written:
        """Make a change durable, and give the keyring that holds it. A sealed copy follows the change.

        Raises `StorageFailed` and the Tpm* errors; then nothing has changed.
        """
        return self._rewrite(current, draft, plan=self.plan, forget_previous=forget_previous)

    def seal(self, current: Keyring, kind: SealKind, deadline: int) -> Written:
        """Write the backup anew and seal its file key. Raises as `change` does, and `TpmMissing` without a TPM."""
        if self._link.settings is None:
            raise TpmMissing("no TPM is configured, so nothing can be sealed")
        return self._rewrite(current, Draft(current), plan=SealPlan(kind, self.now, deadline))

    def destroy_sealed(self, current: Keyring) -> Written:
        """Destroy the sealed copy: on disk, and, by the counter, in every copy of the disk.

        The latter has not happened if `counter_behind` is true afterwards.
        """
        self._directory.remove(SEALED)
        return self._rewrite(current, Draft(current), plan=None)

    def discard_refused(self) -> None:
        """Unlink a sealed copy that no TPM will ever give again."""
        self._directory.remove(SEALED)

    def _rewrite(
        self, current: Keyring, draft: Draft, *, plan: SealPlan | None, forget_previous: bool = False
    ) -> Written:
        if self._link.settings is None and current.metadata.counter is not None:
            raise TpmMissing(
                "the backup is tied to a TPM; without one it has to be unlocked anew, with --accept-rollback"
            )
        with self._link.session() as tpm:
            if tpm is not None:
                self._require_current(current, tpm)
            generation = current.metadata.generation + 1
            return self._change(
                draft,
                generation=generation,
                tpm=tpm,
                counter=current.metadata.counter,
                plan=plan,
                forget_previous=forget_previous,
            )

    def _change(
        self,
        draft: Draft,
        *,
        generation: int,
        tpm: "Tpm | None",
        counter: int | None = None,
        plan: SealPlan | None = None,
        forget_previous: bool = False,
    ) -> Written:
        """``counter``: the TPM's, when `_require_current` has just found it; the increment reads it again, and compares."""
        rules = self._rules  # of one moment: the loop may take over another configuration meanwhile
        if not rules.operators:
            raise ConfigInvalid("no [[operator]]: nobody could ever unlock this host")
        value = None if tpm is None else (tpm.counter() if counter is None else counter) + 1
        fresh = draft.build(generation=generation, counter=value, now=self.now)
        try:
            with SecretBuffer.random(FILE_KEY_SIZE) as file_key:
                data = encrypt_under(wrap(rules, file_key), fresh.buffer.view, file_key)
                self._prove_readable(data, file_key, fresh)
                if forget_previous:
                    self.plan = None
                    self._directory.remove(SEALED)  # it is of what is to be destroyed; a new one follows
                # Who is no operator any more, or not alone, is not to find the generation before beside the new one.
                with self._kept.following(fresh, data):
                    self.store.write(data, forget_previous=forget_previous or self._somebody_left(rules))
                # The change has happened. What fails from here on is reported, and does not undo it.
                self._written_for = rules
                self._advance(tpm, value)
                return Written(fresh, self._follow(tpm, file_key, value, plan))
        except BaseException:
            fresh.close()
            raise

    def _prove_readable(self, data: bytes, file_key: SecretBuffer, fresh: Keyring) -> None:
        """Read back what is about to replace the only backup."""
        with decrypt_payload(data, parse_header(data), file_key) as again:
            if again != fresh.buffer:
                raise StorageFailed("the backup did not read back as it was written")

    def _advance(self, tpm: "Tpm | None", value: int | None) -> None:
        if tpm is None or value is None:
            self.counter_behind = False
            return
        try:
            self.counter_behind = tpm.increment() != value
        except (UnsealerdError, OSError):
            self.counter_behind = True

    def _follow(
        self, tpm: "Tpm | None", file_key: SecretBuffer, value: int | None, plan: SealPlan | None
    ) -> UnsealerdError | None:
        """Seal the new file key where a sealed copy is wanted; unlink the old copy, which is dead, in any case."""
        self.plan = None
        try:
            self._directory.remove(SEALED)
            if plan is None:
                return None
            if tpm is None or value is None or self._link.settings is None or self.counter_behind:
                return TpmFailed("the counter could not be incremented, so nothing was sealed")
            copy = tpm.seal(
                file_key,
                kind=plan.kind,
                pcrs=self._link.settings.pcrs,
                counter=value,
                extra_resets=self._link.settings.extra_resets,
                created=plan.created,
                deadline=plan.deadline,
            )
            self._directory.write(SEALED, copy.encode())
        except UnsealerdError as err:
            return err
        except OSError as err:
            return TpmFailed(str(err.strerror))
        self.plan = plan
        return None

    # --- parts

    def _require_current(self, opened: Keyring, tpm: "Tpm") -> None:
        """Raises `Rollback` or `TpmChanged`. Completes a write that was cut off before its increment.

        The values are not told: the audit log is on the disk, and they are what an older, or a foreign, backup would have to say.
        """
        value = opened.metadata.counter
        if value is None:
            raise TpmChanged("the backup was written without a TPM")
        counter = tpm.counter()
        if value == counter + 1:
            counter = tpm.increment()
        if value < counter:
            raise Rollback("the TPM's counter has moved on since the backup was written")
        if value > counter:
            raise TpmChanged("the backup is ahead of the TPM's counter")

    def _sealed_copy(self) -> "SealedCopy":
        from unsealerd.tpm.sealed import SealedCopy

        data = self._directory.read(SEALED, SMALL_FILE)
        if data is None:
            raise SealRefused(LockReason.UNEXPECTED_REBOOT, "there is no sealed copy")
        return SealedCopy.decode(data)


@contextlib.contextmanager
def _closing(keyring: Keyring) -> Iterator[Keyring]:
    try:
        yield keyring
    finally:
        keyring.close()
