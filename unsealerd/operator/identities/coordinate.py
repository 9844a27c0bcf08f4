"""What cards and tokens give for a Diffie-Hellman on P-256, as the 32 bytes that are answered.

x                 32 bytes: PIV, PKCS#11, most OpenPGP cards; fewer, where a card leaves leading zeros out
04 | x | y        65 bytes: some OpenPGP cards
"""

from unsealerd.core.blinding import FIELD_SIZE, P256_POINT_SIZE, validate_point
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import BadPoint, CardFailed
from unsealerd.model import Curve


def x_of(answer: bytes, device: str) -> SecretBuffer:
    """x, 32 bytes with its leading zeros. Raises `CardFailed` for what no Diffie-Hellman on P-256 gives."""
    if len(answer) == P256_POINT_SIZE:
        try:
            validate_point(Curve.P256, answer)
        except BadPoint as err:
            raise CardFailed(f"{device}: the answer is not a point of P-256") from err
        return SecretBuffer.copy_of(memoryview(answer)[1 : 1 + FIELD_SIZE])
    if not 0 < len(answer) <= FIELD_SIZE or not any(answer):
        raise CardFailed(f"{device}: the answer is not a coordinate of P-256")
    x = SecretBuffer(FIELD_SIZE)
    x.view[FIELD_SIZE - len(answer) :] = answer
    return x


def compressed(point: bytes) -> bytes:
    """33 bytes from 65. SEC 1 section 2.3.3; ``point`` is valid."""
    return bytes((2 | point[-1] & 1,)) + point[1 : 1 + FIELD_SIZE]
