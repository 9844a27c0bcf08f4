"""Blinding: the operator's private key is applied to a point that says nothing about the backup.

    server    draw b;  B = b·R                    R is the ephemeral point of a stanza, D = d·G the operator's
    operator  x(d·B)
    server    x(b⁻¹ · lift(x(d·B))) = x(d·R)      what the stanza's key derivation takes

All scalar multiplication is the library's Diffie-Hellman, which gives x coordinates only. That is enough: P and -P
share their x, so the sign chosen when x is lifted to a point never shows in the next x.

**P-256.** b is uniform in [1, n-1], the group has prime order n, and the sign of B is drawn too: B is uniform over all
points but the identity, whatever R is. **X25519.** A scalar must be clamped (a multiple of 8 between 2²⁵⁴ and 2²⁵⁵), so b
is drawn until its inverse modulo the group's order L has a clamped representative c + k·L, which half of all b have. The
multiples of 8 take any part of small order away. B is indistinguishable from a uniform point: only who can compute the
discrete logarithm of B to the base R could see whether it is one of the scalars that are drawn.

What Python and the library force out of secret memory: the scalar and its inverse as ``int`` and ``bytes`` within one call
of `draw`, on P-256 within `unblind` too, and the result of a Diffie-Hellman as ``bytes`` until it is copied. They cannot
be wiped; they die with the call. A scalar is worth something only together with an answer to the same session, and the
result opens one stanza of one generation of the backup.
"""

import os
from typing import TYPE_CHECKING, NoReturn, Self

from unsealerd.core.secret import SecretBuffer, fill_random
from unsealerd.errors import BadAnswer, BadPoint, SessionExpired
from unsealerd.model import Curve

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

FIELD_SIZE = 32  # bytes of a coordinate and of a scalar, on both curves
P256_POINT_SIZE = 65  # bytes: 0x04 | x | y, SEC 1 section 2.3.3

# SEC 2 section 2.4.2: the order of P-256.
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
# RFC 7748 section 4.1: the prime of Curve25519 and the order L of its large subgroup.
X25519_PRIME = 2**255 - 19
_X25519_ORDER = 2**252 + 27742317777372353535851937790883648493
# https://cr.yp.to/ecdh.html, "How do I validate Curve25519 public keys?": every canonical u of small order, on the curve and on
# its twist. With any other, no clamped scalar gives zero (RFC 7748 section 6.1).
_X25519_SMALL = frozenset(
    {
        0,
        1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
        X25519_PRIME - 1,
    }
)


def validate_point(curve: Curve, point: bytes) -> None:
    """Raise ``BadPoint`` unless a private key may be applied to ``point``.

    P-256: 65 bytes, uncompressed SEC 1, on the curve; the identity has no such form. X25519: 32 bytes, a canonical u
    coordinate, not of small order.
    """
    match curve:
        case Curve.P256:
            if len(point) != P256_POINT_SIZE:
                raise BadPoint("not an uncompressed P-256 point of 65 bytes")
            _p256_public(point)
        case Curve.X25519:
            if len(point) != FIELD_SIZE or int.from_bytes(point, "little") >= X25519_PRIME:
                raise BadPoint("not a canonical X25519 coordinate of 32 bytes")
            if int.from_bytes(point, "little") in _X25519_SMALL:
                raise BadPoint("a point of small order")


class Blinding:
    """One blinded point and the secret that takes the blinding away: once."""

    __slots__ = ("_unblinding", "curve", "point")

    def __init__(self, curve: Curve, point: bytes, unblinding: SecretBuffer) -> None:
        self.curve = curve
        self.point = point  # to be sent; P-256: 65 bytes uncompressed SEC 1, X25519: 32 bytes
        self._unblinding: SecretBuffer | None = unblinding

    @classmethod
    def draw(cls, curve: Curve, point: bytes) -> Self:
        """Blind ``point`` with a fresh scalar. Raises ``BadPoint``."""
        validate_point(curve, point)
        match curve:
            case Curve.P256:
                blinded, unblinding = _draw_p256(point)
            case Curve.X25519:
                blinded, unblinding = _draw_x25519(point)
        return cls(curve, blinded, unblinding)

    def unblind(self, answer: bytes) -> SecretBuffer:
        """x(d·R), 32 bytes, from x(d·B), or on P-256 also from the whole point as some cards give it.

        Raises ``BadAnswer`` for what no operator can have computed, ``SessionExpired`` at the second call, whatever
        came of the first. Whether the answer is the right one is for the authenticated unwrap to say.
        """
        if self._unblinding is None:
            raise SessionExpired("the blinding was used already")
        with self:
            try:
                return self._unblind(answer, self._unblinding)
            except BadPoint as err:
                raise BadAnswer("the answer is not the x coordinate of a point") from err

    def _unblind(self, answer: bytes, unblinding: SecretBuffer) -> SecretBuffer:
        # Zero is what a multiplication by the group's order would give, never what a private key gives.
        if not any(answer):
            raise BadAnswer("the answer is zero")
        match self.curve:
            case Curve.P256:
                scalar = int.from_bytes(unblinding.view, "big")
                return SecretBuffer.copy_of(_p256_times(scalar, _lift(answer)))
            case Curve.X25519:
                validate_point(Curve.X25519, answer)
                return SecretBuffer.copy_of(_x25519(unblinding.view, answer))

    def close(self) -> None:
        """Wipe the scalar. A second call does nothing."""
        if self._unblinding is not None:
            self._unblinding.close()
            self._unblinding = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Blinding on {self.curve.value}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Blinding does not leave its process")


# --- P-256


def _draw_p256(point: bytes) -> tuple[bytes, SecretBuffer]:
    """The blinded point, and the inverse of the scalar, big endian."""
    secret = SecretBuffer(FIELD_SIZE)
    scalar = 0
    # Drawing again, not reducing: each scalar is as likely as any other (FIPS 186-5 section A.2.2).
    while not 0 < scalar < _P256_ORDER:
        fill_random(secret.view)
        scalar = int.from_bytes(secret.view, "big")
    sign = b"\x03" if os.urandom(1)[0] & 1 else b"\x02"
    blinded = _p256_public(sign + _p256_times(scalar, _p256_public(point)))
    secret.view[:] = pow(scalar, -1, _P256_ORDER).to_bytes(FIELD_SIZE, "big")
    return _uncompressed(blinded), secret


def _p256_public(point: bytes) -> "EllipticCurvePublicKey":
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        # Refuses what is off the curve, coordinates not below the prime, the identity and the hybrid forms.
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
    except ValueError as err:
        raise BadPoint("not a point of P-256") from err


def _uncompressed(public: "EllipticCurvePublicKey") -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def _lift(answer: bytes) -> "EllipticCurvePublicKey":
    """A point with that x coordinate; which of the two does not matter. Half of all x have none: ``BadPoint``."""
    match len(answer):
        case 32:  # FIELD_SIZE
            return _p256_public(b"\x02" + answer)
        case 33 | 65:  # compressed, P256_POINT_SIZE
            return _p256_public(answer)
        case _:
            raise BadAnswer("an answer of another length than a coordinate or a point")


def _p256_times(scalar: int, public: "EllipticCurvePublicKey") -> bytes:
    from cryptography.hazmat.primitives.asymmetric import ec

    # The result has the size of the field, with its leading zeros (SEC 1 section 3.3.1).
    return ec.derive_private_key(scalar, ec.SECP256R1()).exchange(ec.ECDH(), public)


# --- X25519


def _draw_x25519(point: bytes) -> tuple[bytes, SecretBuffer]:
    """The blinded point, and the inverse of the scalar in clamped form, little endian."""
    secret = SecretBuffer(FIELD_SIZE)
    while True:
        fill_random(secret.view)
        secret.view[0] &= 0xF8
        secret.view[31] = secret.view[31] & 0x7F | 0x40
        inverse = pow(int.from_bytes(secret.view, "little"), -1, _X25519_ORDER)
        # The k below 8 that makes the three low bits zero; L is odd. Adding 8·L would leave the clamped range.
        k = -inverse * pow(_X25519_ORDER, -1, 8) % 8
        clamped = inverse + k * _X25519_ORDER
        if 1 << 254 <= clamped < 1 << 255:
            blinded = _x25519(secret.view, point)
            secret.view[:] = clamped.to_bytes(FIELD_SIZE, "little")
            return blinded, secret


def _x25519(scalar: bytes | memoryview, point: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        private = X25519PrivateKey.from_private_bytes(scalar)
        return private.exchange(X25519PublicKey.from_public_bytes(point))
    except ValueError as err:
        raise BadPoint("an X25519 point of small order") from err
