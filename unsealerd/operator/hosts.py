"""The hosts that an operator knows: one JSON file, and the way to see a new host's certificate."""

import enum
import os
import re
import stat
from pathlib import Path

import msgspec

from unsealerd.core.tlskey import SERVER_NAME, fingerprint
from unsealerd.errors import (
    AccessDenied,
    BadRequest,
    ConfigInvalid,
    HostUnknown,
    HostUnreachable,
    IdentityInvalid,
    LimitExceeded,
    StorageFailed,
)
from unsealerd.operator.events import HostsExposed, OnEvent, ignore

ENVIRONMENT = "UNSEALERD_HOSTS"
MAX_HOSTS = 4096
_WRITTEN_BY_OTHERS = 0o022  # permission bits of group and others
_MAX_FILE_BYTES = 16 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?\]|[A-Za-z0-9._-]{1,253}):([0-9]{1,5})")


class Trust(enum.Enum):
    """What must speak for a host before it is answered."""

    TLS = "tls"
    """Its TLS key alone: whoever copies the host's disk can pose as it."""
    TPM = "tpm"
    """A quote by its TPM."""


class Host(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    address: str
    """``HOST:PORT``, an IPv6 address in brackets."""
    tls_fingerprint: str
    """Hex of SHA-256 of the SubjectPublicKeyInfo."""
    certificate: str
    """PEM."""
    trust: Trust
    added: int
    """Unix time, seconds."""

    @property
    def fingerprint(self) -> bytes:
        return bytes.fromhex(self.tls_fingerprint)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    hosts: tuple[Host, ...]


def parse_address(text: str) -> tuple[str, int]:
    """Host, without brackets, and port. Raises `BadRequest`."""
    match = _ADDRESS.fullmatch(text)
    if match is None or not 0 < int(match[2]) < 65536:
        raise BadRequest(f"{text!r} is not HOST:PORT, or [IPV6]:PORT")
    return match[1].removeprefix("[").removesuffix("]"), int(match[2])


def make_host(name: str, address: str, certificate: str, added: int, trust: Trust = Trust.TLS) -> Host:
    """An entry for a certificate that the operator has compared. Raises `BadRequest`, `IdentityInvalid`."""
    host = Host(name, address, fingerprint(certificate.encode()).hex(), certificate, trust, added)
    _check(host)
    return host


def _check(host: Host) -> None:
    if not _NAME.fullmatch(host.name):
        raise BadRequest(f"{host.name!r} is not a name: letters, digits, '.', '_' and '-', 64 at most")
    parse_address(host.address)
    if fingerprint(host.certificate.encode()).hex() != host.tls_fingerprint:
        raise BadRequest(f"{host.name}: the fingerprint is not the certificate's")


def default_path() -> Path:
    """$UNSEALERD_HOSTS, or unsealerd/hosts.json in $XDG_CONFIG_HOME, or in ~/.config."""
    if chosen := os.environ.get(ENVIRONMENT):
        return Path(chosen)
    # XDG Base Directory Specification: a relative path is invalid and to be ignored.
    base = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".config") / "unsealerd" / "hosts.json"


class Hosts:
    """The file, read and written whole."""

    def __init__(self, path: Path, on_event: OnEvent = ignore) -> None:
        """``on_event``: told once if others may write the file."""
        self.path = path
        self._on_event = on_event

    def list(self) -> tuple[Host, ...]:
        """All entries by name. A missing file has none. Raises `ConfigInvalid`; `AccessDenied`, also for another user's file."""
        try:
            with self.path.open("rb") as file:
                self._check_owner(os.fstat(file.fileno()))
                data = file.read(_MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            return ()
        except PermissionError as err:
            raise AccessDenied(f"{self.path}: {err.strerror}") from err
        except OSError as err:
            raise ConfigInvalid(f"{self.path}: {err.strerror}") from err
        if len(data) > _MAX_FILE_BYTES:
            raise ConfigInvalid(f"{self.path}: too large")
        try:
            content = msgspec.json.decode(data, type=_File)
            for host in content.hosts:
                _check(host)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as err:
            raise ConfigInvalid(f"{self.path}: not a list of hosts: {err}") from err
        except (BadRequest, IdentityInvalid) as err:
            raise ConfigInvalid(f"{self.path}: {err.detail}") from err
        names = {host.name for host in content.hosts}
        if content.version != 1 or len(names) != len(content.hosts) or len(names) > MAX_HOSTS:
            raise ConfigInvalid(f"{self.path}: another version, or a name that is there twice")
        return tuple(sorted(content.hosts, key=lambda host: host.name))

    def _check_owner(self, status: os.stat_result) -> None:
        """Who may write a pin decides whom the operator answers. Raises `AccessDenied`."""
        if status.st_uid not in (0, os.geteuid()):
            raise AccessDenied(
                f"{self.path}: belongs to another user (uid {status.st_uid}), who could have put any host there"
            )
        if status.st_mode & _WRITTEN_BY_OTHERS:
            self._on_event(HostsExposed(self.path, stat.S_IMODE(status.st_mode)))
            self._on_event = ignore

    def find(self, name_or_address: str) -> Host:
        """The host of that name, or else of that address. Raises `HostUnknown`, and what `list` raises."""
        hosts = self.list()
        for host in hosts:
            if host.name == name_or_address:
                return host
        for host in hosts:
            if host.address == name_or_address:
                return host
        raise HostUnknown(f"{name_or_address} was not added")

    def add(self, host: Host) -> None:
        """Raises `BadRequest` if the name or the address is taken, `StorageFailed`, and what `list` raises."""
        hosts = self.list()
        for other in hosts:
            if other.name == host.name or other.address == host.address:
                raise BadRequest(f"{other.name} ({other.address}) is there already")
        if len(hosts) >= MAX_HOSTS:
            raise LimitExceeded(f"more than {MAX_HOSTS} hosts")
        self._write((*hosts, host))

    def remove(self, name: str) -> Host:
        """Raises `HostUnknown`, `StorageFailed`, and what `list` raises."""
        host = self.find(name)
        self._write(tuple(other for other in self.list() if other != host))
        return host

    def _write(self, hosts: tuple[Host, ...]) -> None:
        import tempfile

        data = msgspec.json.format(msgspec.json.encode(_File(1, hosts)), indent=2) + b"\n"
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # mkstemp makes the file 0600: see _check_owner.
            descriptor, temporary = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(descriptor)
                os.rename(temporary, self.path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as err:
            raise StorageFailed(f"{self.path}: {err.strerror}") from err


def fetch_certificate(address: str, seconds: float = 10) -> str:
    """The certificate (PEM) of whatever answers there with TLS 1.3 and HTTP/2, unverified: for a person to compare.

    The handshake shows that the key is there, too (RFC 8446 section 4.4.3). ``seconds``: for each step. Raises `BadRequest`,
    `HostUnreachable`.
    """
    import socket
    import ssl

    host, port = parse_address(address)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), seconds) as plain,
            context.wrap_socket(plain, server_hostname=SERVER_NAME) as connection,
        ):
            der = connection.getpeercert(binary_form=True)
            protocol = connection.selected_alpn_protocol()
    except (OSError, UnicodeError) as err:  # ssl.SSLError is an OSError
        raise HostUnreachable(f"{address}: {err}") from err
    if der is None or protocol != "h2":
        raise HostUnreachable(f"{address}: not a gRPC server")
    return ssl.DER_cert_to_PEM_cert(der)
