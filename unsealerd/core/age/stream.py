"""The payload of an age v1 file: STREAM over ChaCha20-Poly1305.

    nonce, 16 bytes | chunk 0 | chunk 1 | ... | last chunk        a chunk: 64 KiB and a tag of 16 bytes

    payload key = HKDF-SHA-256(file key, salt = nonce, info = "payload")
    chunk nonce = 11 bytes of big endian counter | 0x01 for the last chunk, else 0x00

Counter and flag make it impossible to reorder, drop, append or cut at a chunk's end. C2SP age.md, "Payload".
"""

import os
from collections.abc import Iterator

from unsealerd.core.age.primitives import TAG_SIZE, derive
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import AgePayloadInvalid

NONCE_SIZE = 16  # bytes
CHUNK_SIZE = 64 << 10  # bytes of plaintext
_SEALED_CHUNK_SIZE = CHUNK_SIZE + TAG_SIZE


def _chunk_nonces(count: int) -> Iterator[bytes]:
    for i in range(count):
        yield i.to_bytes(11, "big") + (b"\x01" if i == count - 1 else b"\x00")


def encrypt_stream(plaintext: memoryview, file_key: SecretBuffer, out: bytearray) -> None:
    """Append the payload to ``out``, encrypting from one memory straight into the other."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    size = plaintext.nbytes
    count = max(1, -(-size // CHUNK_SIZE))
    nonce = os.urandom(NONCE_SIZE)
    out += nonce
    start = len(out)
    out += bytes(size + count * TAG_SIZE)
    with derive(file_key.view, nonce, b"payload") as key, memoryview(out) as sealed:
        aead = ChaCha20Poly1305(key.view)
        for i, chunk_nonce in enumerate(_chunk_nonces(count)):
            chunk = plaintext[i * CHUNK_SIZE : (i + 1) * CHUNK_SIZE]
            at = start + i * _SEALED_CHUNK_SIZE
            aead.encrypt_into(chunk_nonce, chunk, None, sealed[at : at + chunk.nbytes + TAG_SIZE])


def decrypt_stream(payload: memoryview, file_key: SecretBuffer) -> SecretBuffer:
    """The plaintext of a payload that begins with its nonce: all of it, or ``AgePayloadInvalid``."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    nonce, sealed = bytes(payload[:NONCE_SIZE]), payload[NONCE_SIZE:]
    count = -(-sealed.nbytes // _SEALED_CHUNK_SIZE)
    last = sealed.nbytes - (count - 1) * _SEALED_CHUNK_SIZE
    if len(nonce) < NONCE_SIZE or count == 0 or last < TAG_SIZE:
        raise AgePayloadInvalid("the payload is truncated")
    if last == TAG_SIZE and count > 1:
        raise AgePayloadInvalid("an empty chunk at the end of a payload that is not empty")
    plaintext = SecretBuffer(sealed.nbytes - count * TAG_SIZE)
    try:
        with derive(file_key.view, nonce, b"payload") as key:
            aead = ChaCha20Poly1305(key.view)
            for i, chunk_nonce in enumerate(_chunk_nonces(count)):
                chunk = sealed[i * _SEALED_CHUNK_SIZE : (i + 1) * _SEALED_CHUNK_SIZE]
                at = i * CHUNK_SIZE
                aead.decrypt_into(chunk_nonce, chunk, None, plaintext.view[at : at + chunk.nbytes - TAG_SIZE])
    except InvalidTag as err:
        # Chunks before this one were authentic; half a keyring is still worse than none.
        plaintext.close()
        raise AgePayloadInvalid("a chunk of the payload is not authentic") from err
    return plaintext
