"""Makes tests/vectors/ecdh.json: what a private key may and may not be applied to, on P-256 and on X25519.

    python tests/ecdh_vectors.py > tests/vectors/ecdh.json

Written from SEC 1, SEC 2 and RFC 7748 with plain integers, apart from the package and from every library. Deterministic.
Each invalid vector has one thing wrong with it, which its name says.
"""

import hashlib
import json
from collections.abc import Iterator

P = 2**256 - 2**224 + 2**192 + 2**96 - 1
B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
G = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)
SECP256K1_G = (
    0x79BE667EF9DCBBAC55A06295CE870B07029BFCDB2DCE28D959F2815B16F81798,
    0x483ADA7726A3C4655DA4FBFC0E1108A8FD17B448A68554199C47D08FFB10D4B8,
)
Q = 2**255 - 19
Point = tuple[int, int] | None


def number(label: str, below: int) -> int:
    return int.from_bytes(hashlib.sha512(label.encode()).digest(), "big") % below


# --- P-256


def add(a: Point, b: Point) -> Point:
    if a is None or b is None:
        return a or b
    if a[0] == b[0] and (a[1] + b[1]) % P == 0:
        return None
    slope = (
        (3 * a[0] * a[0] - 3) * pow(2 * a[1], -1, P) if a == b else (b[1] - a[1]) * pow(b[0] - a[0], -1, P)
    ) % P
    x = (slope * slope - a[0] - b[0]) % P
    return x, (slope * (a[0] - x) - a[1]) % P


def times(scalar: int, point: Point) -> tuple[int, int]:
    result: Point = None
    while scalar:
        if scalar & 1:
            result = add(result, point)
        point, scalar = add(point, point), scalar >> 1
    assert result is not None
    return result


def right_side(x: int) -> int:
    return (x**3 - 3 * x + B) % P


def root(value: int) -> int | None:
    found = pow(value, (P + 1) // 4, P)
    return found if found * found % P == value else None


def plain(point: tuple[int, int], prefix: int = 4) -> bytes:
    return bytes((prefix,)) + point[0].to_bytes(32, "big") + point[1].to_bytes(32, "big")


def p256(d: int) -> tuple[list[tuple[str, bytes, bytes]], list[tuple[str, bytes]]]:
    points = [times(number(f"point {i}", N), G) for i in range(4)]
    valid = [(f"random {i}", point) for i, point in enumerate(points)]
    valid += [
        ("generator", G),
        ("own public key", times(d, G)),
        ("negative", (points[0][0], P - points[0][1])),
    ]
    small = next(x for x in range(1, 100) if root(right_side(x)) is not None)
    small_y = root(right_side(small))
    assert small_y is not None
    valid.append(("small x", (small, small_y)))
    candidate = times(number("search", N), G)
    while times(d, candidate)[0] >> 248:
        moved = add(candidate, G)
        assert moved is not None
        candidate = moved
    valid.append(("leading zero in the shared x", candidate))
    good = [(name, plain(point), times(d, point)[0].to_bytes(32, "big")) for name, point in valid]

    (x, y), whole = points[0], plain(points[0])
    off = next(x for x in range(2, 100) if root(right_side(x)) is None)
    twist_y = root(-right_side(off) % P)
    assert twist_y is not None
    bad = [
        ("off the curve: y + 1", plain((x, (y + 1) % P))),
        ("off the curve: x and y exchanged", plain((y, x))),
        ("off the curve: order 2 on another curve", plain((x, 0))),
        ("off the curve: x is zero", plain((0, 1))),
        ("on the twist", plain((off, twist_y))),
        ("another curve: secp256k1", plain(SECP256K1_G)),
        ("identity: one byte", b"\0"),
        ("identity: 04 and zeros", plain((0, 0))),
        ("identity: zeros", bytes(65)),
        ("x not below the prime", plain((small + P, small_y))),
        ("x is the prime", plain((P, y))),
        ("y is the prime", plain((x, P))),
        ("all ones", b"\x04" + b"\xff" * 64),
        ("compressed", bytes((2 | y & 1,)) + whole[1:33]),
        ("compressed, padded", bytes((2 | y & 1,)) + whole[1:33] + bytes(32)),
        ("hybrid", plain(points[0], 6 | y & 1)),
        ("hybrid with the wrong sign", plain(points[0], 7 ^ y & 1)),
        ("prefix 05", plain(points[0], 5)),
        ("prefix 00", plain(points[0], 0)),
        ("in a DER octet string", b"\x04\x41" + whole),
        ("without a prefix", whole[1:]),
        ("x alone", whole[1:33]),
        ("a byte short", whole[:-1]),
        ("a byte long", whole + b"\0"),
        ("a zero in front", b"\0" + whole),
        ("twice", whole + whole),
        ("empty", b""),
        ("of X25519", (9).to_bytes(32, "little")),
    ]
    return good, bad


# --- X25519, RFC 7748 section 5


def ladder(scalar: int, u: int) -> int:
    x2, z2, x3, z3, swap = 1, 0, u, 1, 0
    for bit in reversed(range(255)):
        now = scalar >> bit & 1
        if swap ^ now:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = now
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a % Q, b * b % Q, d * a % Q, c * b % Q
        e = aa - bb
        x3, z3 = (da + cb) ** 2 % Q, u * (da - cb) ** 2 % Q
        x2, z2 = aa * bb % Q, e * (aa + 121665 * e) % Q
    if swap:
        x2, z2 = x3, z3
    return x2 * pow(z2, Q - 2, Q) % Q


def clamped(d: int) -> int:
    return d % 2**254 & ~7 | 1 << 254


def is_square(value: int) -> bool:
    return pow(value, (Q - 1) // 2, Q) in (0, 1)


def little(value: int) -> bytes:
    return value.to_bytes(32, "little")


def x25519(d: int) -> tuple[list[tuple[str, bytes, bytes]], list[tuple[str, bytes]]]:
    scalar = clamped(d)
    valid = [(f"random {i}", ladder(clamped(number(f"share {i}", 2**255)), 9)) for i in range(4)]
    valid += [("base point", 9), ("own public key", ladder(scalar, 9))]
    twist = next(u for u in range(2, 100) if not is_square(u**3 + 486662 * u**2 + u))
    valid.append(("on the twist", twist))
    first = next(i for i in range(10**4) if ladder(scalar, 10**6 + i) >> 248 == 0)
    valid.append(("leading zero in the shared u", 10**6 + first))
    last = next(i for i in range(10**4) if ladder(scalar, 2 * 10**6 + i) & 0xFF == 0)
    valid.append(("zero as first byte of the shared u", 2 * 10**6 + last))
    good = [(name, little(u), little(ladder(scalar, u))) for name, u in valid]

    eight = (
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    )
    low = {
        "order 4": 0,
        "order 1 or 2": 1,
        "order 8": eight[0],
        "order 8, the other": eight[1],
        "minus one": Q - 1,
    }
    share = little(valid[0][1])
    bad = [(f"small order: {name}", little(u)) for name, u in low.items()]
    bad += [
        (f"small order, not canonical: {name}", little(u + Q)) for name, u in low.items() if u + Q < 2**255
    ]
    bad += [(f"small order, top bit set: {name}", little(u | 1 << 255)) for name, u in low.items()]
    bad += [
        ("not canonical: the prime and nine", little(Q + 9)),
        ("not canonical: all ones", b"\xff" * 32),
        ("top bit set", little(valid[0][1] | 1 << 255)),
        ("a byte short", share[:-1]),
        ("a byte long", share + b"\0"),
        ("empty", b""),
        ("of P-256", plain(G)),
        ("of P-256, compressed", b"\x02" + plain(G)[1:33]),
    ]
    return good, bad


def vectors() -> Iterator[dict[str, object]]:
    d = number("P-256", N - 1) + 1
    secret = number("X25519", 2**255)
    for curve, private, (good, bad) in (
        ("P-256", d.to_bytes(32, "big"), p256(d)),
        ("X25519", little(clamped(secret)), x25519(secret)),
    ):
        yield {
            "curve": curve,
            "private": private.hex(),
            "valid": [{"name": n, "point": p.hex(), "shared": s.hex()} for n, p, s in good],
            "invalid": [{"name": n, "point": p.hex()} for n, p in bad],
        }


if __name__ == "__main__":
    print(json.dumps(list(vectors()), indent=1))
