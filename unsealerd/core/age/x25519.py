"""The X25519 recipient type: what `age-keygen` makes. C2SP age.md, "The X25519 recipient type".

-> X25519 SHARE        wrap key = HKDF-SHA-256(X25519(secret, SHARE), salt = SHARE | recipient, info)
BODY                   BODY     = ChaCha20-Poly1305(wrap key, file key)
"""

import functools
from typing import TYPE_CHECKING, Self

import msgspec

from unsealerd.core.age import bech32
from unsealerd.core.age.base64 import decode_unpadded, encode_unpadded
from unsealerd.core.age.header import Stanza
from unsealerd.core.age.primitives import WRAPPED_SIZE, derive, unwrap_file_key, wrap_file_key
from unsealerd.core.blinding import FIELD_SIZE, X25519_PRIME, validate_point
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import AgeHeaderInvalid, BadPoint, IdentityInvalid
from unsealerd.model import Curve

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

STANZA_TYPE = "X25519"
RECIPIENT_PREFIX = "age"
IDENTITY_PREFIX = "AGE-SECRET-KEY-"
_INFO = b"age-encryption.org/v1/X25519"


class X25519Recipient(msgspec.Struct, frozen=True):
    """A public key, ``age1...``. Raises ``IdentityInvalid`` for 32 bytes that no identity has."""

    public: bytes  # 32 bytes

    def __post_init__(self) -> None:
        try:
            validate_point(Curve.X25519, self.public)
        except BadPoint as err:
            raise IdentityInvalid(f"an age recipient that no identity has: {err}") from err

    @property
    def curve(self) -> Curve:
        return Curve.X25519

    def __str__(self) -> str:
        return _spelled(self.public)

    def wrap(self, file_key: SecretBuffer) -> Stanza:
        # The ephemeral private key lives in the library's memory, for this call.
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

        ephemeral = X25519PrivateKey.generate()
        share = ephemeral.public_key().public_bytes_raw()
        # `exchange` gives bytes: copied into secret memory, and gone at the end of the line.
        with (
            SecretBuffer.copy_of(
                ephemeral.exchange(X25519PublicKey.from_public_bytes(self.public))
            ) as shared,
            self._wrap_key(share, shared) as key,
        ):
            return Stanza(STANZA_TYPE, (encode_unpadded(share).decode(),), wrap_file_key(file_key, key.view))

    def ephemeral(self, stanza: Stanza) -> bytes | None:
        """The share, as a point that an identity can be asked about; None for another type of stanza.

        Raises ``AgeHeaderInvalid`` for a malformed stanza. Nothing says whose an X25519 stanza is: each may be ours.
        """
        if stanza.type != STANZA_TYPE:
            return None
        # RFC 7748 section 5: the top bit is ignored, and a coordinate that is not below the prime means its remainder.
        # Other parties get the canonical form; the key derivation takes the bytes as they stand.
        number = int.from_bytes(_share(stanza), "little") % (1 << 255) % X25519_PRIME
        point = number.to_bytes(FIELD_SIZE, "little")
        try:
            # "If the shared secret is all 0x00 bytes, the identity implementation MUST abort."
            validate_point(Curve.X25519, point)
        except BadPoint as err:
            raise AgeHeaderInvalid("an X25519 share of small order") from err
        return point

    def unwrap(self, stanza: Stanza, shared: SecretBuffer) -> SecretBuffer:
        """The file key. Raises ``AgeNoMatch`` if the stanza is for somebody else or ``shared`` is wrong."""
        with self._wrap_key(_share(stanza), shared) as key:
            return unwrap_file_key(stanza.body, key.view)

    def _wrap_key(self, share: bytes, shared: SecretBuffer) -> SecretBuffer:
        return derive(shared.view, share + self.public, _INFO)


@functools.lru_cache(maxsize=1024)
def _spelled(public: bytes) -> str:
    """Remembered, since every hello of anybody asks for that of every operator; nothing in it is secret."""
    return bech32.encode(RECIPIENT_PREFIX, public)


def _share(stanza: Stanza) -> bytes:
    try:
        (text,) = stanza.args
        share = decode_unpadded(text.encode())
    except ValueError as err:
        raise AgeHeaderInvalid("an X25519 stanza has one argument, canonical base64") from err
    if len(share) != FIELD_SIZE or len(stanza.body) != WRAPPED_SIZE:
        raise AgeHeaderInvalid("an X25519 stanza has a share of 32 bytes and a body of 32 bytes")
    return share


class X25519Identity:
    """A private key, ``AGE-SECRET-KEY-1...``. The key lives in the library's memory as long as this object."""

    __slots__ = ("_private", "recipient")

    def __init__(self, private: "X25519PrivateKey") -> None:
        self._private = private
        self.recipient = X25519Recipient(private.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> Self:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        return cls(X25519PrivateKey.generate())

    @classmethod
    def parse(cls, text: str) -> Self:
        """The identity of one line of a key file. Raises ``IdentityInvalid``, without the text in it."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        try:
            prefix, secret = bech32.decode(text)
        except ValueError as err:
            raise IdentityInvalid(f"not an age identity: {err}") from err
        try:
            if prefix != IDENTITY_PREFIX or len(secret) != FIELD_SIZE:
                raise IdentityInvalid("not an X25519 age identity (AGE-SECRET-KEY-1...)")
            return cls(X25519PrivateKey.from_private_bytes(secret))
        finally:
            secret[:] = bytes(len(secret))

    def encode(self) -> str:
        """The line for a key file. A ``str`` cannot be wiped: this is for the moment in which a key file is written."""
        return bech32.encode(IDENTITY_PREFIX, self._private.private_bytes_raw())

    def exchange(self, point: bytes) -> SecretBuffer:
        """X25519(secret, point), 32 bytes. Raises ``BadPoint`` before the key is touched."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        validate_point(Curve.X25519, point)
        # `exchange` gives bytes: copied into secret memory, and gone at the end of the line.
        return SecretBuffer.copy_of(self._private.exchange(X25519PublicKey.from_public_bytes(point)))
