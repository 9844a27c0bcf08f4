"""Canonical base64, the only kind an age file may hold.

RFC 4648 section 4; headers carry it without padding, armor with it. Section 3.5 asks for zero trailing bits.
"""

import binascii


def encode_unpadded(data: bytes) -> bytes:
    return binascii.b2a_base64(data, newline=False).rstrip(b"=")


def decode_unpadded(text: bytes) -> bytes:
    """The bytes of an unpadded, canonical text. Raises ``ValueError`` for anything else."""
    if text.endswith(b"="):
        raise ValueError("padded base64")
    return decode_padded(text + b"=" * (-len(text) % 4))


def decode_padded(text: bytes) -> bytes:
    """The bytes of a padded, canonical text. Raises ``ValueError`` for anything else.

    The library's decoder is lax about foreign characters, padding and trailing bits. Encoding again and comparing
    is strict about all of them at once: each sequence of bytes has exactly one canonical text.
    """
    data = binascii.a2b_base64(text)  # binascii.Error is a ValueError
    if binascii.b2a_base64(data, newline=False) != text:
        raise ValueError("not canonical base64")
    return data
