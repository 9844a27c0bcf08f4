"""The key file of age-keygen: comments and ``AGE-SECRET-KEY-1...`` lines, plain or as `age -p` encrypts it."""

from collections.abc import Callable

from unsealerd.core.age import Identity, ScryptIdentity, X25519Identity
from unsealerd.core.age import decrypt as decrypt_age
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import (
    AgeArmorInvalid,
    AgeHeaderInvalid,
    AgeMacInvalid,
    AgeNoMatch,
    AgePayloadInvalid,
    IdentityInvalid,
)

_BINARY = b"age-encryption.org/"
_ARMOR = b"-----BEGIN AGE ENCRYPTED FILE-----"


def is_encrypted(data: bytes) -> bool:
    return data.startswith(_BINARY) or data.lstrip().startswith(_ARMOR)


def decrypt(data: bytes, ask_passphrase: Callable[[], bytes]) -> list[Identity]:
    """The identities of an encrypted key file. Raises `IdentityInvalid`, `LimitExceeded`."""
    with SecretBuffer.copy_of(ask_passphrase()) as passphrase:
        try:
            plain = decrypt_age(data, [ScryptIdentity(passphrase.view)])
        except AgeNoMatch as err:
            raise IdentityInvalid("wrong passphrase, or not encrypted with one") from err
        except (AgeArmorInvalid, AgeHeaderInvalid, AgeMacInvalid, AgePayloadInvalid) as err:
            raise IdentityInvalid(f"a damaged age file: {err.detail or err.name}") from err
    with plain:
        return parse(bytes(plain.view))


def parse(data: bytes) -> list[Identity]:
    """Every line is a comment, blank or an identity; at least one is an identity. Raises `IdentityInvalid`."""
    try:
        lines = data.decode().split("\n")  # comments may be in any language
    except UnicodeDecodeError as err:
        raise IdentityInvalid("neither an age key file nor a PEM private key") from err
    found: list[Identity] = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if text.startswith("AGE-PLUGIN-"):
            raise IdentityInvalid(f"line {number}: identities of age plugins are not supported")
        try:
            found.append(X25519Identity.parse(text))
        except IdentityInvalid as err:
            raise IdentityInvalid(f"line {number}: {err.detail}") from err
    if not found:
        raise IdentityInvalid("no private key in it")
    return found
