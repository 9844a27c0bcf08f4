"""Why the host is locked: the reason that belongs to an error, and the memory of it over a restart of the daemon."""

import msgspec

from unsealerd.daemon import machine
from unsealerd.daemon.store import SMALL_FILE, DurableDirectory
from unsealerd.daemon.tpmlink import TpmLink
from unsealerd.errors import (
    AuditUnwritable,
    BackupDamaged,
    BackupForeign,
    NotInstalled,
    Rollback,
    StorageFailed,
    TpmChanged,
    TpmFailed,
    TpmLockout,
    TpmMissing,
    UnsealerdError,
)
from unsealerd.model import LockReason

_LOCK_FILE = "lock.json"

LOCKS: dict[type[UnsealerdError], LockReason] = {
    TpmMissing: LockReason.TPM_MISSING,
    NotInstalled: LockReason.TPM_MISSING,
    TpmChanged: LockReason.TPM_CHANGED,
    TpmLockout: LockReason.TPM_LOCKOUT,
    TpmFailed: LockReason.TPM_FAILED,
    Rollback: LockReason.ROLLBACK,
    BackupDamaged: LockReason.BACKUP_DAMAGED,
    BackupForeign: LockReason.BACKUP_FOREIGN,
    StorageFailed: LockReason.STORAGE_FAILED,
    AuditUnwritable: LockReason.STORAGE_FAILED,
}

# A sealed copy refused for one of these is never given again. For the others it may be: the daemon can be restarted when
# the TPM, or the disk, is back.
FINAL = frozenset(
    {
        LockReason.UNEXPECTED_REBOOT,  # with a sealed copy: it is of the backup before
        LockReason.NOT_THE_NEXT_BOOT,
        LockReason.PCR_MISMATCH,
        LockReason.SEALED_COPY_USED,
        LockReason.SEALED_COPY_DAMAGED,
        LockReason.LEASE_EXPIRED,
        LockReason.MEMORY_REFUSED,  # then no reboot came between, or somebody meddles
    }
)


class _RememberedLock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why the host was locked in this boot, for a daemon that is restarted in it."""

    boot_id: str
    reset_count: int | None
    reason: LockReason
    detail: str


class LockMemory:
    def __init__(self, directory: DurableDirectory, link: TpmLink) -> None:
        self._directory = directory
        self._link = link

    def remember(self, reason: LockReason, detail: str) -> None:
        """Raises `StorageFailed`."""
        record = _RememberedLock(machine.boot_id(), self._link.reset_count(), reason, detail)
        self._directory.write(_LOCK_FILE, msgspec.json.encode(record))

    def forget(self) -> None:
        """The host is unlocked. Raises `StorageFailed`.

        Not synced: what comes back after the machine has crashed is of another boot, and `recall` does not believe it.
        """
        path = self._directory.path / _LOCK_FILE
        try:
            path.unlink(missing_ok=True)
        except OSError as err:
            raise StorageFailed(f"{path}: {err.strerror}") from err

    def recall(self) -> tuple[LockReason, str] | None:
        """The reason from before a restart of the daemon, if neither the machine nor the TPM was reset since."""
        try:
            data = self._directory.read(_LOCK_FILE, SMALL_FILE)
            if data is None:
                return None
            record = msgspec.json.decode(data, type=_RememberedLock)
        except (StorageFailed, ValueError, RecursionError):
            return None
        if record.boot_id != machine.boot_id() or record.reset_count != self._link.reset_count():
            return None
        return record.reason, record.detail
