"""A P-256 private key in a file: PKCS#8 or SEC 1 in PEM, or OpenSSH's own format, with or without a passphrase."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from unsealerd.core.age import Identity, P256Identity
from unsealerd.errors import IdentityInvalid, NotInstalled

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

_BEGIN = b"-----BEGIN "
_OPENSSH = b"-----BEGIN OPENSSH PRIVATE KEY-----"


def is_pem(data: bytes) -> bool:
    return any(line.startswith(_BEGIN) for line in data.splitlines())


def parse(data: bytes, ask_passphrase: Callable[[], bytes]) -> Identity:
    """Ask only if the key is encrypted. Raises `IdentityInvalid`, `NotInstalled`."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    try:
        private = _load(data, None)
    except TypeError:  # the library's way to say that there is a passphrase
        try:
            private = _load(data, ask_passphrase())
        except TypeError as err:
            raise IdentityInvalid("a passphrase is needed") from err
    if not isinstance(private, EllipticCurvePrivateKey):
        raise IdentityInvalid(f"a private key of another kind ({type(private).__name__}); P-256 is needed")
    return P256Identity(private)


def _load(data: bytes, passphrase: bytes | None) -> "PrivateKeyTypes":
    """Raises ``TypeError`` if the passphrase is missing, `IdentityInvalid`, `NotInstalled`."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    try:
        if _OPENSSH in data:
            return load_ssh_private_key(data, passphrase)
        return load_pem_private_key(data, passphrase)
    except UnsupportedAlgorithm as err:
        if "bcrypt" in str(err):
            raise NotInstalled("bcrypt, which opens an encrypted OpenSSH key") from err
        raise IdentityInvalid("a private key of a kind or in a cipher that is not supported") from err
    except ValueError as err:
        wrong = "a wrong passphrase, or " if passphrase is not None else ""
        raise IdentityInvalid(f"{wrong}not a private key in PEM or OpenSSH format") from err
