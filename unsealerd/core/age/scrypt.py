"""The scrypt recipient type: a file that a passphrase opens, as `age -p` makes it. C2SP age.md.

-> scrypt SALT LOG2N     wrap key = scrypt(passphrase, "age-encryption.org/v1/scrypt" | SALT, N = 2^LOG2N, r = 8, p = 1)
BODY                     BODY     = ChaCha20-Poly1305(wrap key, file key)
"""

import re
from collections.abc import Sequence

from unsealerd.core.age.base64 import decode_unpadded
from unsealerd.core.age.header import Stanza
from unsealerd.core.age.primitives import KEY_SIZE, WRAPPED_SIZE, unwrap_file_key
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import AgeHeaderInvalid, AgeNoMatch, LimitExceeded

STANZA_TYPE = "scrypt"
SALT_SIZE = 16  # bytes
# The file says how much work opening it is: 2^22 takes 4 GiB and about a quarter of a minute. `age` stops here too.
MAX_LOG2_WORK = 22
_SALT_LABEL = b"age-encryption.org/v1/scrypt"
_DECIMAL = re.compile(r"[1-9][0-9]*", re.ASCII)


class ScryptIdentity:
    """A passphrase. The caller keeps the memory that it is in, and wipes it."""

    __slots__ = ("_passphrase",)

    def __init__(self, passphrase: bytes | bytearray | memoryview) -> None:
        self._passphrase = passphrase

    def unwrap(self, stanzas: Sequence[Stanza]) -> SecretBuffer:
        """The file key. Raises ``AgeNoMatch`` for another passphrase or a file that no passphrase opens,
        ``AgeHeaderInvalid`` for a malformed stanza, ``LimitExceeded`` if there is not enough memory for the work.
        """
        from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

        stanza = next((s for s in stanzas if s.type == STANZA_TYPE), None)
        if stanza is None:
            raise AgeNoMatch("the file is not encrypted with a passphrase")
        salt, log2_work = _arguments(stanza)
        try:
            with SecretBuffer(KEY_SIZE) as key:
                kdf = Scrypt(salt=_SALT_LABEL + salt, length=KEY_SIZE, n=1 << log2_work, r=8, p=1)
                kdf.derive_into(self._passphrase, key.view)
                return unwrap_file_key(stanza.body, key.view)
        except MemoryError as err:
            raise LimitExceeded(f"the passphrase needs {1 << log2_work} KiB of memory to check") from err


def _arguments(stanza: Stanza) -> tuple[bytes, int]:
    """Salt and binary logarithm of the work factor."""
    try:
        encoded_salt, decimal = stanza.args
        salt = decode_unpadded(encoded_salt.encode())
    except ValueError as err:
        raise AgeHeaderInvalid("an scrypt stanza has a salt, canonical base64, and a work factor") from err
    if len(salt) != SALT_SIZE or len(stanza.body) != WRAPPED_SIZE:
        raise AgeHeaderInvalid("an scrypt stanza has a salt of 16 bytes and a body of 32 bytes")
    # The length first: the digits of a number may go on for ever.
    if len(decimal) > 2 or not _DECIMAL.fullmatch(decimal) or int(decimal) > MAX_LOG2_WORK:
        raise AgeHeaderInvalid(f"an scrypt work factor that is not a decimal number up to {MAX_LOG2_WORK}")
    return salt, int(decimal)
