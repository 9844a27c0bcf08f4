"""Age files put together piece by piece, so that exactly one piece can be wrong.

Made from HMAC, X25519 and ChaCha20-Poly1305, not from the code under test. All is fixed: the same call, the same file.
"""

import base64
import hmac
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

# The identity of the specification's example: 32 times 0x42.
IDENTITY = "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX"
SECRET = X25519PrivateKey.from_private_bytes(b"\x42" * 32)
PUBLIC = SECRET.public_key().public_bytes_raw()
STRANGER = X25519PrivateKey.from_private_bytes(b"\x43" * 32).public_key().public_bytes_raw()
EPHEMERAL = X25519PrivateKey.from_private_bytes(b"\x17" * 32)
FILE_KEY = b"YELLOW SUBMARINE"
TEXT = b"attack at dawn"
PRIME = 2**255 - 19
CHUNK = 65536


def b64(data: bytes) -> bytes:
    return base64.b64encode(data).rstrip(b"=")


def loose(text: bytes) -> bytes:
    """The same bytes in another spelling: a bit that base64 does not use is set in the last character."""
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    assert len(text) % 4 != 0
    return text[:-1] + bytes([alphabet[alphabet.index(text[-1:]) + 1]])


def hkdf(ikm: bytes, salt: bytes, info: bytes) -> bytes:
    return hmac.digest(hmac.digest(salt, ikm, "sha256"), info + b"\x01", "sha256")


def body(share: bytes, shared: bytes, file_key: bytes = FILE_KEY, to: bytes = PUBLIC) -> bytes:
    key = hkdf(shared, share + to, b"age-encryption.org/v1/X25519")
    return ChaCha20Poly1305(key).encrypt(bytes(12), file_key, None)


def wrapped(file_key: bytes = FILE_KEY, to: bytes = PUBLIC) -> tuple[bytes, bytes]:
    """Share and body of an X25519 stanza."""
    share = EPHEMERAL.public_key().public_bytes_raw()
    return share, body(share, EPHEMERAL.exchange(X25519PublicKey.from_public_bytes(to)), file_key, to)


SHARE, BODY = wrapped()


def stanza(share: bytes = SHARE, wrapped_key: bytes = BODY) -> bytes:
    return b"-> X25519 " + b64(share) + b"\n" + b64(wrapped_key) + b"\n"


def mac_of(text: bytes) -> bytes:
    return hmac.digest(hkdf(FILE_KEY, b"", b"header"), text, "sha256")


def header(
    stanzas: bytes,
    version: bytes = b"age-encryption.org/v1\n",
    end: Callable[[bytes], bytes] = lambda mac: b" " + b64(mac) + b"\n",
) -> bytes:
    text = version + stanzas + b"---"
    return text + end(mac_of(text))


def chunk(i: int, last: bool, plain: bytes, nonce: bytes = bytes(16)) -> bytes:
    key = hkdf(FILE_KEY, nonce, b"payload")
    return ChaCha20Poly1305(key).encrypt(i.to_bytes(11, "big") + bytes([last]), plain, None)


def payload(plain: bytes) -> bytes:
    parts = [plain[i : i + CHUNK] for i in range(0, len(plain), CHUNK)] or [b""]
    return bytes(16) + b"".join(chunk(i, i == len(parts) - 1, part) for i, part in enumerate(parts))


def file(stanzas: bytes = stanza(), **how: object) -> bytes:
    return header(stanzas, **how) + payload(TEXT)  # type: ignore[arg-type]


def armor(
    data: bytes,
    columns: int = 64,
    eol: bytes = b"\n",
    spelling: Callable[[bytes], bytes] = lambda text: text,
) -> bytes:
    text = spelling(base64.b64encode(data))
    lines = [text[i : i + columns] for i in range(0, len(text), columns)]
    return eol.join([b"-----BEGIN AGE ENCRYPTED FILE-----", *lines, b"-----END AGE ENCRYPTED FILE-----", b""])


def loose_end(text: bytes) -> bytes:
    """Padded base64 in a spelling that is not canonical."""
    bare = text.rstrip(b"=")
    return loose(bare) + text[len(bare) :]


def armored(old: bytes, new: bytes) -> bytes:
    """A good armored file with one thing replaced, once."""
    text = armor(file())
    assert old in text
    return text.replace(old, new, 1)


def padded_to(multiple: int, remainder: int) -> bytes:
    """A file whose length leaves that remainder: stretched with a stanza for nobody."""
    for extra in range(1, multiple * 4):
        data = header(stanza() + b"-> " + b"x" * extra + b"\n\n") + payload(TEXT)
        if len(data) % multiple == remainder:
            return data
    raise AssertionError
