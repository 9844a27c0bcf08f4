"""What an operator should see while something goes on. The command line prints it; nothing here does."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from unsealerd.core.conversation import Challenge


class KeyFileExposed(msgspec.Struct, frozen=True):
    """Others than the owner may read this private key. ``mode``: the permission bits."""

    path: Path
    mode: int


class HostsExposed(msgspec.Struct, frozen=True):
    """Others than the owner may write what says whom the operator answers. ``mode``: the permission bits."""

    path: Path
    mode: int


class TlsOnly(msgspec.Struct, frozen=True):
    """Only its TLS key speaks for this host: whoever has the host's disk can pose as it."""

    host: str


class Challenged(msgspec.Struct, frozen=True):
    """The host was verified, and this is what it says. Its strings are printable ASCII. ``words``: for a phone call."""

    challenge: Challenge
    words: tuple[str, ...]
    times: int = 1
    """How often it asks the key that it asks most often."""
    silent: bool = False
    """Nothing will be asked of the person before the keys answer: no PIN, no touch, no passphrase."""


class Exchanging(msgspec.Struct, frozen=True):
    """The private key of this recipient is about to be used: a card may want a touch now."""

    recipient: str


class TouchNeeded(msgspec.Struct, frozen=True):
    """The device may wait for a touch now."""

    device: str


class PinPadUsed(msgspec.Struct, frozen=True):
    """The PIN is to be entered at the reader itself; it never enters this computer. ``tries_left``: None if not known."""

    device: str
    tries_left: int | None


Event = KeyFileExposed | HostsExposed | TlsOnly | Challenged | Exchanging | TouchNeeded | PinPadUsed
OnEvent = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """For who wants to see nothing."""
