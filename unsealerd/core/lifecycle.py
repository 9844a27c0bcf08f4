"""The state machines, as tables: what is not listed is refused."""

import enum

from unsealerd.model import State, VersionState


class VersionEvent(enum.Enum):
    SUPERSEDE = "supersede"  # a newer primary, with an overlap
    REPLACE = "replace"  # a newer primary, without one
    EXPIRE = "expire"  # the overlap is over
    REVOKE = "revoke"


VERSION_TABLE: dict[tuple[VersionState, VersionEvent], VersionState] = {
    (VersionState.PRIMARY, VersionEvent.SUPERSEDE): VersionState.ACTIVE,
    (VersionState.PRIMARY, VersionEvent.REPLACE): VersionState.RETIRED,
    (VersionState.PRIMARY, VersionEvent.REVOKE): VersionState.REVOKED,
    (VersionState.ACTIVE, VersionEvent.EXPIRE): VersionState.RETIRED,
    (VersionState.ACTIVE, VersionEvent.REVOKE): VersionState.REVOKED,
    (VersionState.RETIRED, VersionEvent.REVOKE): VersionState.REVOKED,
}


class HostEvent(enum.Enum):
    INITIALISE = "initialise"
    UNSEAL = "unseal"  # by the TPM
    UNLOCK = "unlock"  # by operators
    RESTORE = "restore"  # from the memory that outlived the daemon
    LOCK = "lock"


HOST_TABLE: dict[tuple[State, HostEvent], State] = {
    (State.UNINITIALISED, HostEvent.INITIALISE): State.UNLOCKED,
    (State.LOCKED, HostEvent.UNSEAL): State.UNLOCKED,
    (State.LOCKED, HostEvent.UNLOCK): State.UNLOCKED,
    (State.LOCKED, HostEvent.RESTORE): State.UNLOCKED,
    (State.UNLOCKED, HostEvent.LOCK): State.LOCKED,
}
