"""The messages of an unlock session as io.unsealerd.Unlock has them, for both who send and who receive.

They are values without behaviour: sizes and meaning are checked where they matter. In JSON, bytes are base64 (RFC 4648,
section 4, padded), which is what msgspec makes of ``bytes`` too.
"""

import msgspec

from unsealerd import errors
from unsealerd.model import Curve, Purpose, State

INTERFACE = "io.unsealerd.Unlock"

ERROR_METADATA = "unsealerd-error"
"""The key of gRPC's trailing metadata under which the name of an error travels."""

NETWORK_ERRORS: frozenset[type[errors.UnsealerdError]] = frozenset(
    {
        errors.AuditUnwritable,
        errors.BackupDamaged,
        errors.BackupForeign,
        errors.BadAnswer,
        errors.BadMessage,
        errors.BadPoint,
        errors.BadRequest,
        errors.CallerChanged,
        errors.ConfigInvalid,
        errors.DaemonUnreachable,
        errors.KeyringInvalid,
        errors.LimitExceeded,
        errors.NotAnOperator,
        errors.NotInitialised,
        errors.NotInstalled,
        errors.NotLocked,
        errors.Rollback,
        errors.SessionExpired,
        errors.StorageFailed,
        errors.TpmChanged,
        errors.TpmFailed,
        errors.TpmLockout,
        errors.TpmMissing,
    }
)
"""What a peer may be told: the interface's errors, and that the daemon is not there.

Not `SealRefused`, which says more than its name (why the host is locked is in the challenge): it travels as `TpmFailed`.
"""


class Question(msgspec.Struct, frozen=True):
    tag: bytes
    curve: Curve
    point: bytes
    kdf: str | None = None
    """Only for an operator with a passphrase: how it becomes the private key."""


class Challenge(msgspec.Struct, frozen=True):
    session: bytes
    questions: tuple[Question, ...]
    lock_reason: str
    boot_id: str
    host_name: str
    uptime: int
    backup_time: int
    shares_present: int
    shares_needed: int
    deadline: int
    generation: int | None = None


class Answer(msgspec.Struct, frozen=True):
    question: int
    x: bytes


class Outcome(msgspec.Struct, frozen=True):
    """``result`` is ``accepted`` or the name of an error."""

    question: int
    result: str


class Result(msgspec.Struct, frozen=True):
    state: State
    shares_present: int
    shares_needed: int
    outcomes: tuple[Outcome, ...]
    answered: tuple[str, ...] = ()
    """Who has answered so far in this window; told to who is one of them, like what follows."""
    missing: tuple[str, ...] = ()
    """Who has not, and could."""
    seconds_left: int | None = None
    """Until the answers so far are forgotten; None: no window is open."""


class Status(msgspec.Struct, frozen=True):
    state: State
    shares_present: int
    shares_needed: int
    lock_reason: str | None = None


class HelloCall(msgspec.Struct, frozen=True):
    """The parameters of the method Hello."""

    version: int
    nonce: bytes
    tags: tuple[bytes, ...]
    peer: str
    purpose: Purpose = Purpose.UNLOCK


class HelloReply(msgspec.Struct, frozen=True):
    challenge: Challenge


class AnswerCall(msgspec.Struct, frozen=True):
    """The parameters of the method Answer."""

    session: bytes
    answers: tuple[Answer, ...]
    reason: str
    accept_rollback: bool
