"""The closed vocabulary of errors: one class per name.

The class name is the name everywhere: in Varlink errors (``io.unsealerd.NAME``), in gRPC status details, in
audit records and in the table of exit codes. A peer is told the name and no more; ``str(error)`` is for
the local administrator and the log, and never holds a secret.
"""

import enum
from typing import ClassVar

from unsealerd.model import LockReason


class Fault(enum.Enum):
    """Whose fault an error is."""

    CALLER = "caller"
    PEER = "peer"
    STORED_DATA = "stored data"
    HARDWARE = "hardware"
    CONFIGURATION = "configuration"


class UnsealerdError(Exception):
    """Base of every named error. Never raised itself."""

    fault: ClassVar[Fault]

    def __init__(self, detail: str = "") -> None:
        super().__init__(detail)
        self.detail = detail

    @property
    def name(self) -> str:
        return type(self).__name__


# --- the caller's: a service, or an administrator


class BadRequest(UnsealerdError):
    """The request is malformed, or a parameter is out of range."""

    fault = Fault.CALLER


class AccessDenied(UnsealerdError):
    """The policy, or a file mode, does not let this caller do this."""

    fault = Fault.CALLER


class CallerChanged(UnsealerdError):
    """The process behind the connection ended, or moved to another unit, since it connected."""

    fault = Fault.CALLER


class KeyNotFound(UnsealerdError):
    """No key of that name."""

    fault = Fault.CALLER


class VersionNotFound(UnsealerdError):
    """The key has no such version, or it was revoked."""

    fault = Fault.CALLER


class Locked(UnsealerdError):
    """The keys are not in memory: the daemon waits for an operator."""

    fault = Fault.CALLER


class NotLocked(UnsealerdError):
    """Asked to unlock what is unlocked."""

    fault = Fault.CALLER


class NotInitialised(UnsealerdError):
    """There is no keyring yet."""

    fault = Fault.CALLER


class AlreadyInitialised(UnsealerdError):
    """There is a keyring, or what is left of one, and it would be overwritten."""

    fault = Fault.CALLER


class NotArmed(UnsealerdError):
    """There is no sealed copy to destroy."""

    fault = Fault.CALLER


class DaemonUnreachable(UnsealerdError):
    """Nothing answers on the daemon's socket."""

    fault = Fault.CALLER


class LimitExceeded(UnsealerdError):
    """Too large, too many or too slow."""

    fault = Fault.CALLER


# --- the peer's: an operator as the server sees it, a host as the operator sees it


class BadMessage(UnsealerdError):
    """A message that the protocol does not allow here."""

    fault = Fault.PEER


class BadPoint(UnsealerdError):
    """Not a point of the curve, or one that must be refused (identity, small order)."""

    fault = Fault.PEER


class BadAnswer(UnsealerdError):
    """An answer that does not open the backup."""

    fault = Fault.PEER


class NotAnOperator(UnsealerdError):
    """None of the offered identities is an operator of this host."""

    fault = Fault.PEER


class SessionExpired(UnsealerdError):
    """The unlock session is over: its time ran out, or it was answered already."""

    fault = Fault.PEER


class HostUnknown(UnsealerdError):
    """The host was never added, so nothing says what its identity should be."""

    fault = Fault.PEER


class HostMismatch(UnsealerdError):
    """What answers at this address is not the host that was added."""

    fault = Fault.PEER


class HostUnreachable(UnsealerdError):
    """No gateway answers at this address."""

    fault = Fault.PEER


# --- stored data


class AgeArmorInvalid(UnsealerdError):
    """Not the strict ASCII armor of an age file."""

    fault = Fault.STORED_DATA


class AgeHeaderInvalid(UnsealerdError):
    """Not a well-formed age v1 header, or a stanza that the specification refuses."""

    fault = Fault.STORED_DATA


class AgeMacInvalid(UnsealerdError):
    """The header was changed: its MAC does not match the file key."""

    fault = Fault.STORED_DATA


class AgeNoMatch(UnsealerdError):
    """No stanza is addressed to the identities at hand."""

    fault = Fault.STORED_DATA


class AgePayloadInvalid(UnsealerdError):
    """The payload is truncated, extended or changed."""

    fault = Fault.STORED_DATA


class KeyringInvalid(UnsealerdError):
    """What is inside the backup is not a keyring of this format."""

    fault = Fault.STORED_DATA


class BackupDamaged(UnsealerdError):
    """The backup is missing, unreadable or not what was written."""

    fault = Fault.STORED_DATA


class BackupForeign(UnsealerdError):
    """The backup is not of the keyring that is pinned on this host, or what is pinned cannot be read."""

    fault = Fault.STORED_DATA


class Rollback(UnsealerdError):
    """The backup is older than the TPM's counter says it must be."""

    fault = Fault.STORED_DATA


class StorageFailed(UnsealerdError):
    """A file could not be written durably: full disk, read-only file system, I/O error."""

    fault = Fault.STORED_DATA


class AuditUnwritable(UnsealerdError):
    """The audit record could not be made durable, so nothing was done."""

    fault = Fault.STORED_DATA


class AuditBroken(UnsealerdError):
    """The chain of the audit log does not verify."""

    fault = Fault.STORED_DATA


class IdentityInvalid(UnsealerdError):
    """A private or public key that cannot be read: the file, its format or its passphrase."""

    fault = Fault.STORED_DATA


# --- hardware


class TpmMissing(UnsealerdError):
    """No TPM answers where the configuration says there is one."""

    fault = Fault.HARDWARE


class TpmChanged(UnsealerdError):
    """Not the TPM, or not the storage root key or counter, that was pinned at initialisation."""

    fault = Fault.HARDWARE


class TpmLockout(UnsealerdError):
    """The TPM is in dictionary-attack lockout."""

    fault = Fault.HARDWARE


class TpmFailed(UnsealerdError):
    """The TPM answers with an error that no retry cured."""

    fault = Fault.HARDWARE


class SealRefused(UnsealerdError):
    """The TPM did not give the sealed copy: its policy does not hold now, and `reason` says which part."""

    fault = Fault.HARDWARE

    def __init__(self, reason: LockReason, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason


# --- the operator's card or token


class ReaderMissing(UnsealerdError):
    """No card reader, no PC/SC service, or the reader was unplugged."""

    fault = Fault.HARDWARE


class CardMissing(UnsealerdError):
    """No card or token of this kind, or with this serial number, is plugged in."""

    fault = Fault.HARDWARE


class CardRemoved(UnsealerdError):
    """The card was pulled out in the middle."""

    fault = Fault.HARDWARE


class CardBusy(UnsealerdError):
    """Another program uses the card."""

    fault = Fault.HARDWARE


class CardReset(UnsealerdError):
    """Another program reset the card in the middle, and did so again."""

    fault = Fault.HARDWARE


class CardFailed(UnsealerdError):
    """The card or token answers with an error that has no name of its own here."""

    fault = Fault.HARDWARE


class WrongCard(UnsealerdError):
    """The card has no key that fits, or another key than before."""

    fault = Fault.HARDWARE


class TouchMissed(UnsealerdError):
    """The card waited for a touch that did not come."""

    fault = Fault.HARDWARE


class AttestationInvalid(UnsealerdError):
    """The card's attestation does not prove that its key was made inside."""

    fault = Fault.HARDWARE


class PinWrong(UnsealerdError):
    """The card refuses the PIN. `tries_left`: how many more it allows; None if it does not say."""

    fault = Fault.CALLER

    def __init__(self, detail: str = "", tries_left: int | None = None) -> None:
        super().__init__(detail)
        self.tries_left = tries_left


class PinBlocked(UnsealerdError):
    """The PIN was wrong too often: the card takes none until it is unblocked."""

    fault = Fault.HARDWARE


class PinLastTry(UnsealerdError):
    """One try is left before the PIN is blocked, and nobody said to use it."""

    fault = Fault.CALLER


class PinCancelled(UnsealerdError):
    """The PIN was not entered: cancelled, or too late."""

    fault = Fault.CALLER


# --- configuration


class ConfigInvalid(UnsealerdError):
    """The configuration file is missing, unreadable or says something that is not allowed."""

    fault = Fault.CONFIGURATION


class NotInstalled(UnsealerdError):
    """An optional part of the program is needed and is not installed."""

    fault = Fault.CONFIGURATION


def named(name: str) -> type[UnsealerdError] | None:
    """The class of an error name as it travels between processes, or None."""
    found = globals().get(name)
    if isinstance(found, type) and issubclass(found, UnsealerdError) and found is not UnsealerdError:
        return found
    return None
