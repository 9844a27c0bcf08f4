"""What an operator should see while something goes on. The command line prints it; nothing here does."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from unsealerd.core.conversation import Challenge


@dataclass(frozen=True, slots=True)
class KeyFileExposed:
    """Others than the owner may read this private key. ``mode``: the permission bits."""

    path: Path
    mode: int


@dataclass(frozen=True, slots=True)
class TlsOnly:
    """Only its TLS key speaks for this host: whoever has the host's disk can pose as it."""

    host: str


@dataclass(frozen=True, slots=True)
class Challenged:
    """The host was verified, and this is what it says. Its strings are printable ASCII. ``words``: for a phone call."""

    challenge: Challenge
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Exchanging:
    """The private key of this recipient is about to be used: a card may want a touch now."""

    recipient: str


@dataclass(frozen=True, slots=True)
class TouchNeeded:
    """The device may wait for a touch now."""

    device: str


@dataclass(frozen=True, slots=True)
class PinPadUsed:
    """The PIN is to be entered at the reader itself; it never enters this computer. ``tries_left``: None if not known."""

    device: str
    tries_left: int | None


Event = KeyFileExposed | TlsOnly | Challenged | Exchanging | TouchNeeded | PinPadUsed
OnEvent = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """For who wants to see nothing."""
