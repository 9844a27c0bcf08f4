"""The gateway's TLS key: made once, at initialisation, and pinned by the operators.

P-256, because the server's TLS offers no suite of TLS 1.2 that such a key could serve (see `unsealerd.gateway.main`).
"""

import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from unsealerd.core.tlskey import SERVER_NAME, fingerprint
from unsealerd.errors import AccessDenied, AlreadyInitialised, IdentityInvalid, NotInitialised, StorageFailed

KEY_NAME = "tls.key"
CERTIFICATE_NAME = "tls.crt"
_KEY_MODE = 0o600
_CERTIFICATE_MODE = 0o644
_MAX_FILE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """``key`` and ``certificate`` are PEM; ``key`` is the gateway's own secret and shown nowhere."""

    key: bytes = field(repr=False)
    certificate: bytes


def create(directory: Path, owner: tuple[int, int] | None = None) -> bytes:
    """Make the key and its certificate in ``directory`` (made with mode 0700 if missing), and give the fingerprint.

    ``owner``: the uid and gid of the gateway's user. Each file appears whole or not at all, the certificate last: with it
    the identity exists. Raises `AlreadyInitialised`, `StorageFailed`, `IdentityInvalid`.
    """
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        # What root does below goes through this descriptor: the directory above belongs to the daemon's user, this one to
        # the gateway's, and what lies under a name there may be a link of theirs to anywhere.
        place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as err:
        raise StorageFailed(f"{directory}: {err.strerror}") from err
    try:
        return _create(place, directory, owner)
    except OSError as err:
        raise StorageFailed(f"{directory}: {err.strerror}") from err
    finally:
        os.close(place)


def _create(place: int, directory: Path, owner: tuple[int, int] | None) -> bytes:
    if os.fstat(place).st_uid not in {os.geteuid(), owner[0] if owner else os.geteuid()}:
        raise StorageFailed(f"{directory}: belongs to another user; remove it and try again")
    if _exists(CERTIFICATE_NAME, place):
        raise AlreadyInitialised(f"{directory / CERTIFICATE_NAME} exists")
    # A key alone is what a creation that was cut off has left, or what every operator has pinned: it is kept.
    made = _generate(_read(directory / KEY_NAME, place) if _exists(KEY_NAME, place) else None)
    if owner is not None:
        os.fchown(place, *owner)
    _write(KEY_NAME, place, made.key, _KEY_MODE, owner)
    _write(CERTIFICATE_NAME, place, made.certificate, _CERTIFICATE_MODE, owner)
    os.fsync(place)
    return fingerprint(made.certificate)


def load(directory: Path) -> TlsIdentity:
    """Read what `create` made. Raises `NotInitialised`, `AccessDenied`, `StorageFailed`."""
    return TlsIdentity(_read(directory / KEY_NAME), load_certificate(directory))


def load_certificate(directory: Path) -> bytes:
    """The public half alone, PEM. Raises `NotInitialised`, `AccessDenied`, `StorageFailed`."""
    return _read(directory / CERTIFICATE_NAME)


def check(directory: Path) -> None:
    """Whether the two files belong together. Raises `IdentityInvalid`. For when TLS did not start, and says not why."""
    import ssl

    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / CERTIFICATE_NAME, directory / KEY_NAME)
    except OSError as err:  # ssl.SSLError is one
        raise IdentityInvalid(f"{directory}: {err.strerror}") from err


def _generate(pem: bytes | None = None) -> TlsIdentity:
    """A certificate for the key, or for a new one."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        load_pem_private_key,
    )
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    if pem is None:
        private = ec.generate_private_key(ec.SECP256R1())
    else:
        try:
            loaded = load_pem_private_key(pem, None)
        except (ValueError, TypeError) as err:
            raise IdentityInvalid(f"{KEY_NAME}: not a private key") from err
        if not isinstance(loaded, ec.EllipticCurvePrivateKey):
            raise IdentityInvalid(f"{KEY_NAME}: not a key on P-256")
        private = loaded
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "unsealerd")])
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        # The pin decides, not the calendar: a server's clock may stand anywhere when it boots.
        .not_valid_before(datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC))
        # RFC 5280 section 4.1.2.5: 99991231235959Z is "no well-defined expiration date".
        .not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(private, hashes.SHA256())
    )
    return TlsIdentity(
        private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        certificate.public_bytes(Encoding.PEM),
    )


def _exists(name: str, place: int) -> bool:
    try:
        os.stat(name, dir_fd=place, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _write(name: str, place: int, data: bytes, mode: int, owner: tuple[int, int] | None) -> None:
    """Replace the file atomically and durably (but for the directory's fsync). Raises ``OSError``."""
    temporary = f".{name}.{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(temporary, flags, _KEY_MODE, dir_fd=place)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            if owner is not None:
                os.fchown(descriptor, *owner)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.rename(temporary, name, src_dir_fd=place, dst_dir_fd=place)
    except BaseException:
        os.unlink(temporary, dir_fd=place)
        raise


def _read(path: Path, place: int | None = None) -> bytes:
    """The file's bytes; with ``place``, the descriptor of its directory, only what lies in that directory."""
    try:
        # No link: root would copy out what only root may read. No waiting for the other end of a FIFO.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path if place is None else path.name, flags, dir_fd=place)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise StorageFailed(f"{path}: not a regular file")
            return file.read(_MAX_FILE_BYTES)
    except FileNotFoundError as err:
        raise NotInitialised(f"{path}: no such file") from err
    except PermissionError as err:
        raise AccessDenied(f"{path}: {err.strerror}") from err
    except OSError as err:
        raise StorageFailed(f"{path}: {err.strerror}") from err
