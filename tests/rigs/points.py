"""Points and keys for tests of who applies a private key to a point."""

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from unsealerd.core.age import Identity, P256Identity
from unsealerd.core.blinding import Blinding
from unsealerd.core.secret import SecretBuffer
from unsealerd.model import Curve

HOSTILE = {
    "empty": b"",
    "identity": b"\0",
    "off the curve": b"\x04" + bytes(31) + b"\1" + bytes(32),
    "compressed": b"\x02" + bytes.fromhex("6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296"),
    "too short": b"\x04" + bytes(63),
    "too long": b"\x04" + bytes(65),
    "x25519": b"\x09" + bytes(31),
}
"""What no private key may be applied to, by what is wrong with it."""


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def sec1(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The public key, 65 bytes."""
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def new_point() -> bytes:
    return sec1(new_key())


def taken(buffer: SecretBuffer) -> bytes:
    with buffer:
        return bytes(buffer.view)


def exchange_blinded(identity: Identity, key: ec.EllipticCurvePrivateKey, times: int) -> None:
    """Whole sessions: what the identity answers is what the key in software answers, and the blinding comes off."""
    software = P256Identity(key)
    for _ in range(times):
        point = new_point()
        session = Blinding.draw(Curve.P256, point)
        answer = taken(identity.exchange(session.point))
        assert answer == taken(software.exchange(session.point))
        assert taken(session.unblind(answer)) == taken(software.exchange(point))


def point_with_leading_zero(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A point for which x(d·point) begins with a zero byte: one in 256."""
    software = P256Identity(key)
    while True:
        point = new_point()
        if taken(software.exchange(point))[0] == 0:
            return point
