"""Shamir's secret sharing, byte by byte over GF(2^8): from secret memory to secret memory.

Adi Shamir, "How to share a secret" (1979). For each byte a polynomial of degree threshold - 1 is drawn whose value at 0 is that
byte; share x is its value at x, for x = 1, 2, ... Any ``threshold`` shares give the byte back, and with one fewer each of the 256
values is still as likely as before. The field is that of AES: polynomials over GF(2) modulo x^8 + x^4 + x^3 + x + 1 (FIPS 197
section 4.2).

Written out here because the libraries there are take and give ``bytes`` or ``int``, and most look secret bytes up in tables.
Nowhere is a secret multiplied by a secret: one factor is always a share's number, or a weight that follows from the
numbers alone, and these are public. So all branches are on public values; what is done to a secret byte are shifts, masks
and XOR in the range of one byte, which never makes an ``int`` that Python would have to allocate and could leave behind.
"""

from collections.abc import Sequence

from unsealerd.core.secret import SecretBuffer

MAX_SHARES = 255
"""As many as the field has elements beside 0, where the secret is."""

_REDUCTION = 0x1B  # x^8 modulo the field's polynomial


def split(secret: memoryview, threshold: int, shares: Sequence[memoryview]) -> None:
    """Fill in the shares 1, 2, ..., each as long as the secret. ``ValueError`` for what cannot be split so."""
    if not 1 <= threshold <= len(shares) <= MAX_SHARES:
        raise ValueError(f"{threshold} of {len(shares)} shares")
    with SecretBuffer.random((threshold - 1) * secret.nbytes) as drawn:
        size = secret.nbytes
        coefficients = [secret, *(drawn.view[i * size : (i + 1) * size] for i in range(threshold - 1))]
        for number, share in enumerate(shares, 1):
            evaluate(coefficients, number, share)
        for view in coefficients[1:]:
            view.release()


def combine(shares: Sequence[tuple[int, memoryview]], out: memoryview) -> None:
    """Fill in the secret, from numbered shares, at least as many as the threshold. ``ValueError`` for impossible numbers.

    What comes out of too few shares, or of a wrong one, is wrong and looks no different: authenticate it.
    """
    numbers = [number for number, _ in shares]
    if not numbers or len(set(numbers)) != len(numbers) or not all(1 <= x <= MAX_SHARES for x in numbers):
        raise ValueError("shares have different numbers from 1 to 255")
    weights = [weight(number, numbers) for number in numbers]
    for at in range(out.nbytes):
        byte = 0
        for factor, (_, share) in zip(weights, shares, strict=True):
            byte ^= times(factor, share[at])
        out[at] = byte


def evaluate(coefficients: Sequence[memoryview], x: int, out: memoryview) -> None:
    """The value at ``x`` of the polynomials whose coefficients these are, the constant term first."""
    for at in range(out.nbytes):
        byte = 0
        for coefficient in reversed(coefficients):  # Horner's rule
            byte = times(x, byte) ^ coefficient[at]
        out[at] = byte


def times(factor: int, byte: int) -> int:
    """The product in the field. ``factor`` is public; nothing depends on ``byte`` but the result."""
    product = 0
    while factor:
        if factor & 1:
            product ^= byte
        byte = (byte & 0x7F) << 1 ^ (byte >> 7) * _REDUCTION
        factor >>= 1
    return product


def weight(number: int, numbers: Sequence[int]) -> int:
    """How much the share ``number`` counts for the value at 0, given that these shares are there. All of it is public.

    Lagrange's interpolation: the product over the others of other / (other - number); minus is XOR in this field.
    """
    product = 1
    for other in numbers:
        if other != number:
            product = times(product, times(other, _inverse(other ^ number)))
    return product


def _inverse(value: int) -> int:
    """Public, and not 0: value^254, since value^255 is 1."""
    result = 1
    for _ in range(254):
        result = times(value, result)
    return result
