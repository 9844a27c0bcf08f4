"""Error names as gRPC statuses: the one place at this edge that maps them.

The code groups the names for tools that know nothing of unsealerd. The name itself travels as the status message and in the
trailing metadata `unsealerd-error`, and nothing else does.
"""

from grpc import StatusCode

from unsealerd import errors
from unsealerd.core.conversation import INTERFACE, NETWORK_ERRORS

_CODES: dict[type[errors.UnsealerdError], StatusCode] = {
    errors.BadMessage: StatusCode.INVALID_ARGUMENT,
    errors.BadPoint: StatusCode.INVALID_ARGUMENT,
    errors.BadRequest: StatusCode.INVALID_ARGUMENT,
    errors.BadAnswer: StatusCode.PERMISSION_DENIED,
    errors.NotAnOperator: StatusCode.PERMISSION_DENIED,
    errors.SessionExpired: StatusCode.DEADLINE_EXCEEDED,
    errors.LimitExceeded: StatusCode.RESOURCE_EXHAUSTED,
    errors.NotLocked: StatusCode.FAILED_PRECONDITION,
    errors.NotInitialised: StatusCode.FAILED_PRECONDITION,
    errors.Rollback: StatusCode.FAILED_PRECONDITION,
    errors.BackupForeign: StatusCode.FAILED_PRECONDITION,
    errors.BackupDamaged: StatusCode.DATA_LOSS,
    errors.KeyringInvalid: StatusCode.DATA_LOSS,
    errors.CallerChanged: StatusCode.INTERNAL,
    errors.ConfigInvalid: StatusCode.INTERNAL,
    errors.NotInstalled: StatusCode.INTERNAL,
    errors.StorageFailed: StatusCode.INTERNAL,
    errors.AuditUnwritable: StatusCode.INTERNAL,
    errors.TpmMissing: StatusCode.INTERNAL,
    errors.TpmChanged: StatusCode.INTERNAL,
    errors.TpmLockout: StatusCode.INTERNAL,
    errors.TpmFailed: StatusCode.INTERNAL,
    errors.DaemonUnreachable: StatusCode.UNAVAILABLE,
}


def code(kind: type[errors.UnsealerdError]) -> StatusCode:
    """The status code of one of `NETWORK_ERRORS`."""
    return _CODES[kind]


def from_daemon(name: str) -> type[errors.UnsealerdError]:
    """The class of a Varlink error's name.

    A refused parameter is a malformed message of the peer, for the gateway passes on what the peer said. Any other name
    that the interface does not have is a daemon that this gateway does not understand: `DaemonUnreachable`.
    """
    interface, _, short = name.rpartition(".")
    if interface == INTERFACE:
        kind = errors.named(short)
        if kind is errors.SealRefused:
            return errors.TpmFailed
        if kind in NETWORK_ERRORS:
            return kind
    elif name == "org.varlink.service.InvalidParameter":
        return errors.BadMessage
    return errors.DaemonUnreachable
