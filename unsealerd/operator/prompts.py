"""How an identity asks for a secret: at the moment of use, through a port that the command line implements."""

from typing import Protocol

import msgspec


class PinRequest(msgspec.Struct, frozen=True):
    """What a person must know before they type a PIN."""

    device: str
    """The device and the key, for people: ``YubiKey 12345678, PIV slot 9D``."""
    tries_left: int | None
    """None if the device does not say."""


class Prompts(Protocol):
    """What comes back is used once and not kept. Raises `PinCancelled` if there is nobody to ask."""

    def pin(self, request: PinRequest) -> bytes: ...

    def passphrase(self, what: str) -> bytes:
        """``what``: whose, for people: ``alice.txt``, ``operator alice``."""
