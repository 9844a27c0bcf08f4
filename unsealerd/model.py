"""The words of the design as types. No logic, no I/O."""

import enum

KEY_NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
"""What a key may be called: a regular expression. Names become file names of sockets."""


class State(enum.Enum):
    UNINITIALISED = "uninitialised"
    LOCKED = "locked"
    UNLOCKED = "unlocked"


class LockReason(enum.Enum):
    """Why a host is locked. Operators see it in the challenge."""

    FIRST_BOOT = "first_boot"
    UNEXPECTED_REBOOT = "unexpected_reboot"
    NOT_THE_NEXT_BOOT = "not_the_next_boot"
    PCR_MISMATCH = "pcr_mismatch"
    SEALED_COPY_USED = "sealed_copy_used"
    SEALED_COPY_DAMAGED = "sealed_copy_damaged"
    TPM_MISSING = "tpm_missing"
    TPM_CHANGED = "tpm_changed"
    TPM_LOCKOUT = "tpm_lockout"
    TPM_FAILED = "tpm_failed"
    ROLLBACK = "rollback"
    BACKUP_DAMAGED = "backup_damaged"
    BACKUP_FOREIGN = "backup_foreign"
    STORAGE_FAILED = "storage_failed"
    LEASE_EXPIRED = "lease_expired"
    LOCKED_BY_ADMIN = "locked_by_admin"
    DAEMON_STOPPED = "daemon_stopped"
    MEMORY_REFUSED = "memory_refused"


class VersionState(enum.Enum):
    PRIMARY = "primary"
    ACTIVE = "active"
    RETIRED = "retired"
    REVOKED = "revoked"


class Operation(enum.Enum):
    READ = "read"
    SIGN = "sign"
    VERIFY = "verify"


class SealKind(enum.Enum):
    """What will come between the seal and the next start."""

    REBOOT = "reboot"  # the TPM is reset
    KEXEC = "kexec"  # it is not


class Purpose(enum.Enum):
    """What an operator's answer is for."""

    UNLOCK = "unlock"
    DRILL = "drill"  # to prove that the backup still opens; nothing is unlocked


class Curve(enum.Enum):
    P256 = "p256"
    X25519 = "x25519"
