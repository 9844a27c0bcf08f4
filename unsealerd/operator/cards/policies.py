"""What a key in a YubiKey wants before each use. The numbers are Yubico's, in metadata and in attestations."""

import enum


class PinPolicy(enum.Enum):
    DEFAULT = 0
    NEVER = 1
    ONCE = 2
    ALWAYS = 3
    MATCH_ONCE = 4
    MATCH_ALWAYS = 5


class TouchPolicy(enum.Enum):
    DEFAULT = 0
    NEVER = 1
    ALWAYS = 2
    CACHED = 3


Policies = tuple[PinPolicy, TouchPolicy]


def parse_policies(data: bytes) -> Policies | None:
    """From two bytes, PIN and touch; None for what is neither."""
    if len(data) != 2:
        return None
    try:
        return PinPolicy(data[0]), TouchPolicy(data[1])
    except ValueError:
        return None
