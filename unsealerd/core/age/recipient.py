"""The two interfaces that carry the format, and the text of a recipient.

One file for each type of key implements them; hardware implements `Identity` elsewhere.
"""

from typing import Protocol

from unsealerd.core.age import bech32, p256tag, x25519
from unsealerd.core.age.header import Stanza
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import IdentityInvalid
from unsealerd.model import Curve

_HYBRID_PREFIXES = ("age1pq", "age1tagpq")


class Recipient(Protocol):
    """A public key: wraps the file key, and finds and opens its stanza when somebody supplies the Diffie-Hellman."""

    @property
    def curve(self) -> Curve: ...

    def wrap(self, file_key: SecretBuffer) -> Stanza: ...

    def ephemeral(self, stanza: Stanza) -> bytes | None:
        """The point R of a stanza that may be ours, validated; None if it is not. ``AgeHeaderInvalid``."""

    def unwrap(self, stanza: Stanza, shared: SecretBuffer) -> SecretBuffer:
        """The file key, from the 32 bytes x(d·R). ``AgeNoMatch``."""

    def __str__(self) -> str:
        """The canonical text, lower case."""


class Identity(Protocol):
    """A private key, wherever it is."""

    @property
    def recipient(self) -> Recipient: ...

    def exchange(self, point: bytes) -> SecretBuffer:
        """x(d·point), 32 bytes. Validates the point first: ``BadPoint``."""


def parse_recipient(text: str) -> Recipient:
    """The recipient of a configuration line. Raises ``IdentityInvalid``.

    Only lower case, as `age` has it, so that a recipient has one spelling.
    """
    try:
        prefix, data = bech32.decode(text)
    except ValueError as err:
        raise IdentityInvalid(f"not an age recipient: {err}") from err
    match prefix:
        case x25519.RECIPIENT_PREFIX:
            return x25519.X25519Recipient(bytes(data))
        case p256tag.RECIPIENT_PREFIX:
            return p256tag.P256TagRecipient(bytes(data))
        case _ if prefix in _HYBRID_PREFIXES:
            raise IdentityInvalid(
                f"{prefix} recipients are not supported: ML-KEM has no blinding, so they cannot be answered blindly"
            )
        case _:
            raise IdentityInvalid("neither an age1... nor an age1tag1... recipient")
