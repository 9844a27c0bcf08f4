"""From a passphrase to an X25519 private key: Argon2id (RFC 9106), on the operator's machine.

The parameters are public text, in the configuration and in the challenge::

    argon2id$v=19$m=262144,t=4,p=4$SALT        m in KiB; SALT: 16 bytes, base64url without padding

The 32 bytes that come out are the scalar. Nothing but the passphrase stands between who has the backup and the operator's
stanza, so a derivation that is cheaper than `MIN_MEMORY` and `MIN_PASSES` is refused: a hostile host could otherwise ask
for one, and learn from the answer by trying passphrases quickly. The upper bounds keep it from exhausting the operator.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Self

from unsealerd.core.age import X25519Identity
from unsealerd.core.blinding import FIELD_SIZE
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import BadRequest, LimitExceeded, NotInstalled

SALT_SIZE = 16  # bytes
MIN_MEMORY, MAX_MEMORY = 64 << 10, 1 << 20  # KiB
MIN_PASSES, MAX_PASSES = 2, 16
MAX_LANES = 16

DEFAULT_MEMORY = 256 << 10  # KiB; about a second on a laptop, and it fits into any operator's machine
DEFAULT_PASSES = 4
DEFAULT_LANES = 4

_TEXT = re.compile(
    r"argon2id\$v=19\$m=([1-9][0-9]{0,9}),t=([1-9][0-9]{0,2}),p=([1-9][0-9]{0,2})\$([A-Za-z0-9_-]{22})",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Parameters:
    """How much work one guess is, and the salt. Raises `BadRequest` for what is out of bounds."""

    memory: int
    """KiB."""
    passes: int
    lanes: int
    salt: bytes

    def __post_init__(self) -> None:
        bounds = (
            ("m", self.memory, MIN_MEMORY, MAX_MEMORY),
            ("t", self.passes, MIN_PASSES, MAX_PASSES),
            ("p", self.lanes, 1, MAX_LANES),
        )
        for name, value, lowest, highest in bounds:
            if not lowest <= value <= highest:
                raise BadRequest(f"passphrase parameters: {name}={value} is not from {lowest} to {highest}")
        if len(self.salt) != SALT_SIZE:
            raise BadRequest(f"passphrase parameters: the salt is not {SALT_SIZE} bytes")

    @classmethod
    def make(
        cls, memory: int = DEFAULT_MEMORY, passes: int = DEFAULT_PASSES, lanes: int = DEFAULT_LANES
    ) -> Self:
        """With a fresh salt."""
        with SecretBuffer.random(SALT_SIZE) as salt:
            return cls(memory, passes, lanes, bytes(salt.view))

    @classmethod
    def parse(cls, text: str) -> Self:
        """The one spelling, or `BadRequest`."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise BadRequest("passphrase parameters are argon2id$v=19$m=KIB,t=N,p=N$SALT")
        try:
            salt = base64.urlsafe_b64decode(match[4] + "==")
        except binascii.Error as err:
            raise BadRequest("passphrase parameters: the salt is not base64url") from err
        parameters = cls(int(match[1]), int(match[2]), int(match[3]), salt)
        if str(parameters) != text:
            raise BadRequest("passphrase parameters: the salt is not canonical base64url")
        return parameters

    def __str__(self) -> str:
        salt = base64.urlsafe_b64encode(self.salt).rstrip(b"=").decode()
        return f"argon2id$v=19$m={self.memory},t={self.passes},p={self.lanes}${salt}"


def derive(passphrase: memoryview, parameters: Parameters) -> X25519Identity:
    """The private key. Takes about a second, and `Parameters.memory` KiB.

    The bytes of the passphrase count as they are (UTF-8, without a line end). Raises `LimitExceeded` if there is not
    enough memory, `NotInstalled` if the library's OpenSSL is older than 3.2.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

    with SecretBuffer(FIELD_SIZE) as scalar:
        try:
            kdf = Argon2id(
                salt=parameters.salt,
                length=FIELD_SIZE,
                iterations=parameters.passes,
                lanes=parameters.lanes,
                memory_cost=parameters.memory,
            )
            # Any buffer will do, though the library's types say less.
            kdf.derive_into(passphrase, scalar.view)  # type: ignore[arg-type]
        except UnsupportedAlgorithm as err:
            raise NotInstalled("Argon2id: the cryptography package needs OpenSSL 3.2 or later") from err
        except MemoryError as err:
            raise LimitExceeded(f"the passphrase needs {parameters.memory} KiB of memory") from err
        # The library clamps the scalar as RFC 7748 section 5 says: every 32 bytes are a private key.
        return X25519Identity(X25519PrivateKey.from_private_bytes(scalar.view))
