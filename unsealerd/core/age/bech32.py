"""Bech32 (BIP 173) without its length limit, as age writes keys.

    HRP "1" DATA CHECKSUM        DATA: 5 bits a character; CHECKSUM: 6 characters over HRP and DATA

The data part may be a private key, so it is decoded into a ``bytearray`` that the caller wipes.
"""

from collections.abc import Iterable

_CHARSET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_GENERATOR = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)
_CHECKSUM_LENGTH = 6


def encode(hrp: str, data: bytes | bytearray) -> str:
    """The text of ``data``; an upper-case ``hrp`` makes all of it upper-case."""
    upper = hrp.isupper()
    low = hrp.lower()
    values = _to_five_bits(data)
    check = _polymod((*_expand(low), *values, *bytes(_CHECKSUM_LENGTH))) ^ 1
    values += bytes((check >> 5 * (5 - i)) & 31 for i in range(_CHECKSUM_LENGTH))
    text = f"{low}1{''.join(_CHARSET[v] for v in values)}"
    _wipe(values)
    return text.upper() if upper else text


def decode(text: str) -> tuple[str, bytearray]:
    """The human-readable part, in the case it was written in, and the data. Raises ``ValueError``."""
    # ASCII first: other alphabets have letters whose lower case is an ASCII letter, or longer than they are.
    if not text.isascii() or text not in (text.lower(), text.upper()):
        raise ValueError("bech32 of mixed case, or not ASCII")
    hrp, separator, tail = text.rpartition("1")
    if not separator or not hrp or len(tail) < _CHECKSUM_LENGTH:
        raise ValueError("not bech32")
    if any(not 33 <= ord(c) <= 126 for c in hrp):
        raise ValueError("a bech32 prefix of other characters than printable ASCII")
    values = bytearray(len(tail))
    try:
        for i, character in enumerate(tail.lower()):
            value = _CHARSET.find(character)
            if value < 0:
                raise ValueError("a character that bech32 does not have")
            values[i] = value
        if _polymod((*_expand(hrp.lower()), *values)) != 1:
            raise ValueError("the bech32 checksum is wrong")
        return hrp, _to_eight_bits(memoryview(values)[:-_CHECKSUM_LENGTH])
    finally:
        _wipe(values)


def _polymod(values: Iterable[int]) -> int:
    check = 1
    for value in values:
        top = check >> 25
        check = (check & 0x1FFFFFF) << 5 ^ value
        for i, generator in enumerate(_GENERATOR):
            if top >> i & 1:
                check ^= generator
    return check


def _expand(hrp: str) -> bytes:
    """High bits, a zero, low bits: so that the checksum covers the prefix."""
    return bytes(ord(c) >> 5 for c in hrp) + b"\0" + bytes(ord(c) & 31 for c in hrp)


def _to_five_bits(data: bytes | bytearray) -> bytearray:
    out = bytearray()
    accumulator = bits = 0
    for byte in data:
        accumulator = (accumulator << 8 | byte) & 0xFFF
        bits += 8
        while bits >= 5:
            bits -= 5
            out.append(accumulator >> bits & 31)
    if bits:
        out.append(accumulator << (5 - bits) & 31)
    return out


def _to_eight_bits(values: memoryview) -> bytearray:
    # Sized once: a bytearray that grows leaves copies of its content behind.
    out = bytearray(len(values) * 5 // 8)
    accumulator = bits = done = 0
    for value in values:
        accumulator = (accumulator << 5 | value) & 0xFFF
        bits += 5
        if bits >= 8:
            bits -= 8
            out[done] = accumulator >> bits & 0xFF
            done += 1
    # BIP 173: at most 4 bits of padding, all zero; else two texts would say the same bytes.
    if bits >= 5 or accumulator & ((1 << bits) - 1):
        _wipe(out)
        raise ValueError("bech32 padding that is not zero")
    return out


def _wipe(values: bytearray) -> None:
    values[:] = bytes(len(values))
