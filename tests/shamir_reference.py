#!/usr/bin/env python3
"""Shamir over GF(2^8) a second time, by logarithm tables, and the vectors made with it.

usage: tests/shamir_reference.py > tests/vectors/shamir.json

Shares no code with the package. Tables indexed by secret bytes are fine here: nothing here is secret.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence

POLYNOMIAL = 0x11B
GENERATOR = 3  # x + 1 generates the multiplicative group, x does not


def tables() -> tuple[list[int], list[int]]:
    exponents, logarithms = [0] * 510, [0] * 256
    value = 1
    for power in range(255):
        exponents[power] = exponents[power + 255] = value
        logarithms[value] = power
        doubled = value << 1
        value ^= doubled ^ (POLYNOMIAL if doubled & 0x100 else 0)  # times the generator
    return exponents, logarithms


EXP, LOG = tables()


def multiply(a: int, b: int) -> int:
    return EXP[LOG[a] + LOG[b]] if a and b else 0


def divide(a: int, b: int) -> int:
    return EXP[LOG[a] - LOG[b] + 255] if a else 0


def share(coefficients: Sequence[bytes], x: int) -> bytes:
    """The powers of x summed up, the constant term first."""
    out = bytearray(len(coefficients[0]))
    for power, row in enumerate(coefficients):
        factor = EXP[LOG[x] * power % 255]
        for at, byte in enumerate(row):
            out[at] ^= multiply(factor, byte)
    return bytes(out)


def secret(shares: dict[int, bytes]) -> bytes:
    """Solves the linear equations by Gaussian elimination, where the package interpolates."""
    numbers = sorted(shares)
    size = len(numbers)
    out = bytearray()
    for at in range(len(shares[numbers[0]])):
        rows = [[EXP[LOG[x] * power % 255] for power in range(size)] + [shares[x][at]] for x in numbers]
        for column in range(size):
            pivot = next(row for row in range(column, size) if rows[row][column])
            rows[column], rows[pivot] = rows[pivot], rows[column]
            rows[column] = [divide(cell, rows[column][column]) for cell in rows[column]]
            for row in range(size):
                if row != column:
                    factor = rows[row][column]
                    rows[row] = [
                        a ^ multiply(factor, b) for a, b in zip(rows[row], rows[column], strict=True)
                    ]
        out.append(rows[0][size])
    return bytes(out)


def vectors() -> list[dict[str, object]]:
    """Fixed ones: coefficients from SHA-256 of what they are for."""
    found: list[dict[str, object]] = []
    for threshold, count in [(1, 1), (1, 3), (2, 2), (2, 3), (3, 5), (5, 9), (16, 32), (2, 255)]:
        name = f"{threshold} of {count}"
        rows = [hashlib.sha256(f"{name} {row}".encode()).digest()[:16] for row in range(threshold)]
        shares = {x: share(rows, x) for x in range(1, count + 1)}
        for chosen in itertools.islice(itertools.combinations(shares, threshold), 3):
            assert secret({x: shares[x] for x in chosen}) == rows[0]
        found.append(
            {
                "name": name,
                "threshold": threshold,
                "coefficients": [row.hex() for row in rows],
                "shares": [each.hex() for each in shares.values()],
            }
        )
    return found


if __name__ == "__main__":
    print(json.dumps(vectors(), indent=1))
