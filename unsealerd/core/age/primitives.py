"""The few uses of cryptography that age makes, each with the reason why it is safe.

What the library forces out of secret memory here: its AEAD object copies the key it is given and frees the copy
with the object, at the end of the call that made it. It is loaded at the first use: a host that starts locked decrypts nothing.
"""

from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import AgeNoMatch

FILE_KEY_SIZE = 16  # bytes
KEY_SIZE = 32  # bytes, of every derived key
TAG_SIZE = 16  # bytes, of Poly1305
WRAPPED_SIZE = FILE_KEY_SIZE + TAG_SIZE

# A wrapping key is derived from a fresh ephemeral share or salt, and encrypts one file key: its nonce may be fixed.
_ZERO_NONCE = bytes(12)


def derive(secret: memoryview, salt: bytes, info: bytes) -> SecretBuffer:
    """HKDF-SHA-256, 32 bytes, from secret memory to secret memory. An empty salt is RFC 5869's default one."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    key = SecretBuffer(KEY_SIZE)
    HKDF(SHA256(), KEY_SIZE, salt, info).derive_into(secret, key.view)
    return key


def wrap_file_key(file_key: SecretBuffer, key: memoryview) -> bytes:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    if len(file_key) != FILE_KEY_SIZE:
        raise ValueError("a file key is 16 bytes")
    body = bytearray(WRAPPED_SIZE)
    ChaCha20Poly1305(key).encrypt_into(_ZERO_NONCE, file_key.view, None, body)
    return bytes(body)


def unwrap_file_key(body: bytes, key: memoryview, nonce: bytes | memoryview = _ZERO_NONCE) -> SecretBuffer:
    """The file key. Raises ``AgeNoMatch`` if the body was made with another key.

    The length of the body was checked before: one ciphertext that opens under many keys (a partitioning oracle)
    needs room.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    file_key = SecretBuffer(FILE_KEY_SIZE)
    try:
        ChaCha20Poly1305(key).decrypt_into(nonce, body, None, file_key.view)
    except InvalidTag as err:
        file_key.close()
        raise AgeNoMatch("the stanza was made for another key") from err
    return file_key
