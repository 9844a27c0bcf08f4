"""The p256tag recipient type, for keys in hardware. C2SP age.md, "p256tag recipient stanza".

    -> p256tag TAG ENC     ENC, BODY = HPKE SealBase(recipient, info, aad = "", file key), RFC 9180 section 6.1
    BODY                   TAG       = HKDF-Extract-SHA-256(salt = info, ENC | SHA-256(recipient)[:4])[:4]

Sealing is the library's HPKE. Opening is written out below, since the library would want the private key, and all there
is of it here is the x coordinate of a Diffie-Hellman.
"""

import functools
import hashlib
import hmac
from typing import TYPE_CHECKING

import msgspec

from unsealerd.core.age import bech32
from unsealerd.core.age.base64 import decode_unpadded, encode_unpadded
from unsealerd.core.age.header import Stanza
from unsealerd.core.age.primitives import KEY_SIZE, WRAPPED_SIZE, unwrap_file_key
from unsealerd.core.blinding import P256_POINT_SIZE, validate_point
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import AgeHeaderInvalid, BadPoint, IdentityInvalid
from unsealerd.model import Curve

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

STANZA_TYPE = "p256tag"
RECIPIENT_PREFIX = "age1tag"
COMPRESSED_SIZE = 33  # bytes
TAG_SIZE = 4  # bytes
_INFO = b"age-encryption.org/p256tag"

# RFC 9180 section 7: DHKEM(P-256, HKDF-SHA256) = 0x0010, HKDF-SHA256 = 0x0001, ChaCha20Poly1305 = 0x0003.
_KEM_SUITE = b"KEM\x00\x10"
_HPKE_SUITE = b"HPKE\x00\x10\x00\x01\x00\x03"
_MODE_BASE = b"\x00"
_NONCE_SIZE = 12  # bytes


class P256TagRecipient(msgspec.Struct, frozen=True):
    """A public key on P-256, ``age1tag1...``. Raises ``IdentityInvalid`` for what is not a point."""

    public: bytes  # 33 bytes, compressed SEC 1

    def __post_init__(self) -> None:
        self._key()

    @property
    def curve(self) -> Curve:
        return Curve.P256

    @property
    def uncompressed(self) -> bytes:
        """The same point as 65 bytes, the form that HPKE's SerializePublicKey gives."""
        return _sec1(self._key(), compressed=False)

    def __str__(self) -> str:
        return _spelled(self.public)

    def tag(self, enc: bytes) -> bytes:
        """The hint in a stanza that lets an operator be found before anybody is asked."""
        # HKDF-Extract is HMAC with the salt as its key (RFC 5869 section 2.2).
        return hmac.digest(_INFO, enc + hashlib.sha256(self.public).digest()[:4], "sha256")[:TAG_SIZE]

    def wrap(self, file_key: SecretBuffer) -> Stanza:
        from cryptography.hazmat.primitives import hpke

        suite = hpke.Suite(hpke.KEM.P256, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)
        sealed = suite.encrypt(file_key.view, self._key(), info=_INFO)  # enc | ciphertext
        enc, body = sealed[:P256_POINT_SIZE], sealed[P256_POINT_SIZE:]
        if len(body) != WRAPPED_SIZE:
            raise ValueError("a file key is 16 bytes")
        return Stanza(
            STANZA_TYPE, (encode_unpadded(self.tag(enc)).decode(), encode_unpadded(enc).decode()), body
        )

    def ephemeral(self, stanza: Stanza) -> bytes | None:
        """The encapsulated point, 65 bytes, of a stanza that carries our tag; None for any other.

        Raises ``AgeHeaderInvalid`` for a malformed stanza, ours or not.
        """
        if stanza.type != STANZA_TYPE:
            return None
        tag, enc = _arguments(stanza)
        try:
            validate_point(Curve.P256, enc)
        except BadPoint as err:
            raise AgeHeaderInvalid("a p256tag stanza with a point that is not on P-256") from err
        return enc if tag == self.tag(enc) else None

    def unwrap(self, stanza: Stanza, shared: SecretBuffer) -> SecretBuffer:
        """The file key. Raises ``AgeNoMatch`` if the stanza is for somebody else or ``shared`` is wrong.

        HPKE's OpenBase from the x coordinate on: RFC 9180 sections 4.1 (Decap), 5.1 (KeySchedule), 5.2 (Open).
        """
        _, enc = _arguments(stanza)
        with SecretBuffer(KEY_SIZE) as kem_secret, SecretBuffer(KEY_SIZE + _NONCE_SIZE) as schedule:
            key, base_nonce = schedule.view[:KEY_SIZE], schedule.view[KEY_SIZE:]
            _extract_and_expand(shared, enc + self.uncompressed, kem_secret.view)
            _key_schedule(kem_secret.view, key, base_nonce)
            # The first message's nonce is base_nonce XOR 0.
            return unwrap_file_key(stanza.body, key, base_nonce)

    def _key(self) -> "EllipticCurvePublicKey":
        from cryptography.hazmat.primitives.asymmetric import ec

        try:
            if len(self.public) != COMPRESSED_SIZE:
                raise ValueError("not 33 bytes")
            return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), self.public)
        except ValueError as err:
            raise IdentityInvalid("an age1tag recipient that is not a compressed point of P-256") from err


@functools.lru_cache(maxsize=1024)
def _spelled(public: bytes) -> str:
    """Remembered, since every hello of anybody asks for that of every operator; nothing in it is secret."""
    return bech32.encode(RECIPIENT_PREFIX, public)


def _arguments(stanza: Stanza) -> tuple[bytes, bytes]:
    """Tag and encapsulated point of a stanza of our type."""
    try:
        tag, enc = (decode_unpadded(text.encode()) for text in stanza.args)
    except ValueError as err:
        raise AgeHeaderInvalid("a p256tag stanza has two arguments, canonical base64") from err
    if len(tag) != TAG_SIZE or len(enc) != P256_POINT_SIZE or len(stanza.body) != WRAPPED_SIZE:
        raise AgeHeaderInvalid("a p256tag stanza has a tag of 4 bytes, a point of 65 and a body of 32")
    return tag, enc


def _extract_and_expand(shared: SecretBuffer, kem_context: bytes, kem_secret: memoryview) -> None:
    """Fill in the KEM's shared secret: ExtractAndExpand of RFC 9180 section 4.1, in one HKDF."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    label = _labelled_input(_KEM_SUITE, b"eae_prk")
    info = _labelled_info(_KEM_SUITE, b"shared_secret", kem_context, len(kem_secret))
    with SecretBuffer(len(label) + len(shared)) as material:
        material.view[: len(label)] = label
        material.view[len(label) :] = shared.view
        HKDF(SHA256(), len(kem_secret), b"", info).derive_into(material.view, kem_secret)


def _key_schedule(kem_secret: memoryview, key: memoryview, base_nonce: memoryview) -> None:
    """Fill in key and nonce: KeySchedule of RFC 9180 section 5.1, mode_base, without a pre-shared key."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

    psk_id_hash = hmac.digest(b"", _labelled_input(_HPKE_SUITE, b"psk_id_hash"), "sha256")
    info_hash = hmac.digest(b"", _labelled_input(_HPKE_SUITE, b"info_hash") + _INFO, "sha256")
    context = _MODE_BASE + psk_id_hash + info_hash
    # The shared secret is the salt here. `hmac.digest` takes it from secret memory but gives bytes: the pseudo-random key
    # of one stanza, gone when this function returns.
    secret = hmac.digest(kem_secret, _labelled_input(_HPKE_SUITE, b"secret"), "sha256")
    for label, out in ((b"key", key), (b"base_nonce", base_nonce)):
        info = _labelled_info(_HPKE_SUITE, label, context, len(out))
        HKDFExpand(SHA256(), len(out), info).derive_into(secret, out)


def _labelled_input(suite: bytes, label: bytes) -> bytes:
    """What LabeledExtract puts before its input. RFC 9180 section 4."""
    return b"HPKE-v1" + suite + label


def _labelled_info(suite: bytes, label: bytes, info: bytes, length: int) -> bytes:
    """The info of LabeledExpand. RFC 9180 section 4."""
    return length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info


def _sec1(key: "EllipticCurvePublicKey", *, compressed: bool) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    form = PublicFormat.CompressedPoint if compressed else PublicFormat.UncompressedPoint
    return key.public_bytes(Encoding.X962, form)


class P256Identity:
    """A private key on P-256 in software. The key lives in the library's memory as long as this object."""

    __slots__ = ("_private", "recipient")

    def __init__(self, private: "EllipticCurvePrivateKey") -> None:
        """Raises ``IdentityInvalid`` for a key on another curve."""
        if private.curve.name != "secp256r1":
            raise IdentityInvalid(f"a key on {private.curve.name}; P-256 is needed")
        self._private = private
        self.recipient = P256TagRecipient(_sec1(private.public_key(), compressed=True))

    def exchange(self, point: bytes) -> SecretBuffer:
        """x(d·point), 32 bytes with leading zeros. Raises ``BadPoint`` before the key is touched."""
        from cryptography.hazmat.primitives.asymmetric import ec

        validate_point(Curve.P256, point)
        public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
        # `exchange` gives bytes: copied into secret memory, and gone at the end of the line.
        return SecretBuffer.copy_of(self._private.exchange(ec.ECDH(), public))
