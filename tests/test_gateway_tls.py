"""The gateway's TLS: its key, its certificate, and that nothing older than TLS 1.3 is spoken."""

import errno
import hashlib
import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from hypothesis import given
from hypothesis import strategies as st
from rigs.gateway import ROOT, GatewayProcess
from rigs.unlock_daemon import UnlockDaemon

from unsealerd.core.age import X25519Identity
from unsealerd.core.tlskey import SERVER_NAME, fingerprint
from unsealerd.errors import (
    AlreadyInitialised,
    IdentityInvalid,
    NotInitialised,
    StorageFailed,
)
from unsealerd.gateway import identity
from unsealerd.operator import network
from unsealerd.operator.hosts import fetch_certificate, make_host
from unsealerd.operator.unlock import unlock

ALICE = X25519Identity.generate()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with GatewayProcess(tmp_path_factory.mktemp("tls")) as running:
        yield running


def handshake(address: str, version: ssl.TLSVersion, protocols: tuple[str, ...] = ("h2",)) -> ssl.SSLSocket:
    """A connection that offers this version alone, with every suite that the library has."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(list(protocols))
    plain = socket.create_connection(("::1", int(address.rpartition(":")[2])), 60)
    try:
        return context.wrap_socket(plain, server_hostname=SERVER_NAME)
    except OSError:
        plain.close()
        raise


def test_tls_1_3_is_spoken(gateway: GatewayProcess) -> None:
    with handshake(gateway.addresses[0], ssl.TLSVersion.TLSv1_3) as connection:
        assert (connection.version(), connection.selected_alpn_protocol()) == ("TLSv1.3", "h2")


@pytest.mark.filterwarnings("ignore:.*TLSv1:DeprecationWarning")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1])
def test_nothing_older_than_tls_1_3_is_spoken(gateway: GatewayProcess, version: ssl.TLSVersion) -> None:
    with pytest.raises(OSError, match=r"EOF|alert|reset|no protocols available"):
        handshake(gateway.addresses[0], version)


OPERATOR = """
import sys
from pathlib import Path
from unsealerd.core.age import X25519Identity
from unsealerd.errors import UnsealerdError
from unsealerd.operator import hosts, network
from unsealerd.operator.unlock import unlock
host = hosts.make_host("old", sys.argv[1], Path(sys.argv[2]).read_text(), added=0)
for attempt in (lambda: hosts.fetch_certificate(host.address), lambda: unlock(conversation, [X25519Identity.generate()])):
    with network.connect(host) as conversation:
        try:
            attempt()
        except UnsealerdError as err:
            print(err.name)
        else:
            print("done")
"""


@pytest.mark.parametrize(
    ("version", "said", "handshakes"),
    [
        (ssl.TLSVersion.TLSv1_2, ["HostUnreachable", "HostUnreachable"], []),
        (ssl.TLSVersion.TLSv1_3, ["done", "HostUnreachable"], ["TLSv1.3"]),
    ],
)
def test_the_operator_speaks_tls_1_3_only(
    tmp_path: Path, version: ssl.TLSVersion, said: list[str], handshakes: list[str]
) -> None:
    """With a server that has the pinned key and hangs up after the handshake. The operator is a process of its own, for
    gRPC reads its suites when it is loaded."""
    identity.create(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = version
    done: set[str | None] = set()
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:

        def serve() -> None:
            while True:
                try:
                    plain, _ = listener.accept()
                    with context.wrap_socket(plain, server_side=True) as connection:
                        done.add(connection.version())
                except ssl.SSLError:
                    continue
                except OSError as err:
                    if err.errno == errno.EINVAL:  # the listener was shut down
                        return

        thread = threading.Thread(target=serve)
        thread.start()
        address = f"[::1]:{listener.getsockname()[1]}"
        heard = subprocess.run(
            [sys.executable, "-c", OPERATOR, address, tmp_path / "tls.crt"],
            env={**os.environ, "PYTHONPATH": os.fspath(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout.split()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert heard == said
    assert sorted(done, key=str) == handshakes


def test_the_certificate_can_be_fetched_and_pinned(gateway: GatewayProcess) -> None:
    certificate = fetch_certificate(gateway.addresses[0])
    assert certificate.strip() == gateway.certificate.strip()
    host = make_host("fetched", gateway.addresses[0], certificate, added=0)
    with (
        UnlockDaemon(gateway.runtime_dir, [ALICE.recipient]) as daemon,
        network.connect(host) as conversation,
    ):
        unlock(conversation, [ALICE])
        assert daemon.opened == [daemon.file_key]


# --- the key and its certificate


def test_the_identity_is_a_p256_key_with_a_timeless_certificate(tmp_path: Path) -> None:
    digest = identity.create(tmp_path / "gateway")
    made = identity.load(tmp_path / "gateway")
    private = load_pem_private_key(made.key, None)
    certificate = x509.load_pem_x509_certificate(made.certificate)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.curve.name == "secp256r1"
    assert certificate.public_key() == private.public_key()
    assert certificate.not_valid_before_utc.year == 2000
    text = subprocess.run(
        ["openssl", "x509", "-noout", "-text"], input=made.certificate, stdout=subprocess.PIPE, check=True
    ).stdout.decode()
    assert "Not After : Dec 31 23:59:59 9999 GMT" in text
    assert "DNS:unsealerd.invalid" in text
    assert "CA:FALSE" in text
    info = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert digest == hashlib.sha256(info).digest()
    assert repr(made.key) not in repr(made)


def test_the_key_is_the_gateways_alone(tmp_path: Path) -> None:
    identity.create(tmp_path / "gateway", owner=(os.getuid(), os.getgid()))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "gateway").iterdir()}
    assert modes == {"tls.key": 0o600, "tls.crt": 0o644}
    assert stat.S_IMODE((tmp_path / "gateway").stat().st_mode) == 0o700


def test_an_identity_is_never_replaced(tmp_path: Path) -> None:
    identity.create(tmp_path)
    before = identity.load(tmp_path)
    with pytest.raises(AlreadyInitialised):
        identity.create(tmp_path)
    assert identity.load(tmp_path) == before


def test_a_key_whose_certificate_was_never_written_is_no_identity(tmp_path: Path) -> None:
    """A crash between the two files: the next try begins anew."""
    identity.create(tmp_path)
    (tmp_path / "tls.crt").unlink()
    with pytest.raises(NotInitialised):
        identity.load(tmp_path)
    identity.create(tmp_path)
    made = identity.load(tmp_path)
    private = load_pem_private_key(made.key, None)
    assert x509.load_pem_x509_certificate(made.certificate).public_key() == private.public_key()


@pytest.mark.promise(8)
def test_links_of_the_gateways_or_the_daemons_user_lead_root_nowhere(tmp_path: Path) -> None:
    """`unsealctl init` is root, and the directories above and below are not root's: nothing behind a link changes."""
    other = os.getuid() + 990, os.getgid() + 990  # root in these tests, so that an owner can be given
    roots = tmp_path / "roots"
    roots.mkdir(mode=0o755)
    secret = roots / "key.pem"
    key = identity.create(tmp_path / "donor")
    secret.write_bytes((tmp_path / "donor" / identity.KEY_NAME).read_bytes())
    before = roots.stat()

    (tmp_path / "gateway").symlink_to(roots)
    with pytest.raises(StorageFailed, match="Not a directory"):
        identity.create(tmp_path / "gateway", other)
    assert sorted(roots.iterdir()) == [secret]
    assert (roots.stat().st_uid, roots.stat().st_mode) == (before.st_uid, before.st_mode)

    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / identity.KEY_NAME).symlink_to(secret)
    with pytest.raises(StorageFailed, match="symbolic links"):
        identity.create(linked, other)
    assert linked.stat().st_uid == os.getuid()
    assert [path.name for path in linked.iterdir()] == [identity.KEY_NAME]
    assert key not in [fingerprint(path.read_bytes()) for path in linked.glob("*.crt")]

    fifo = tmp_path / "fifo"
    fifo.mkdir()
    os.mkfifo(fifo / identity.KEY_NAME)
    with pytest.raises(StorageFailed, match="not a regular file"):
        identity.create(fifo, other)

    stranger = tmp_path / "stranger"
    stranger.mkdir()
    os.chown(stranger, other[0] + 1, other[1])
    with pytest.raises(StorageFailed, match="belongs to another user"):
        identity.create(stranger, other)
    assert list(stranger.iterdir()) == []


def test_an_identity_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageFailed):
        identity.create(tmp_path / "file" / "gateway")


def _certificate() -> bytes:
    return identity._generate().certificate


CERTIFICATE = _certificate()


def test_a_fingerprint_is_of_the_key_in_pem_as_in_der() -> None:
    der = ssl.PEM_cert_to_DER_cert(CERTIFICATE.decode())
    assert fingerprint(der) == fingerprint(CERTIFICATE)


def test_a_fingerprint_agrees_with_openssl_on_other_certificates(tmp_path: Path) -> None:
    for kind in (["rsa:2048"], ["ed25519"], ["ec", "-pkeyopt", "ec_paramgen_curve:P-384"]):
        made = subprocess.run(
            ["openssl", "req", "-x509", "-nodes", "-subj", "/CN=x", "-keyout", "/dev/null", "-newkey", *kind],
            capture_output=True,
            check=True,
        ).stdout
        key = x509.load_pem_x509_certificate(made).public_key()
        info = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        assert fingerprint(made) == hashlib.sha256(info).digest()


@pytest.mark.promise(10)
@given(st.binary(max_size=300) | st.integers(0, len(CERTIFICATE)).map(lambda size: CERTIFICATE[:size]))
def test_a_fingerprint_of_any_bytes_is_refused(data: bytes) -> None:
    if data.strip() == CERTIFICATE.strip():
        return
    with pytest.raises(IdentityInvalid):
        fingerprint(data)


@given(st.data())
def test_a_damaged_certificate_has_a_fingerprint_or_is_refused(data: st.DataObject) -> None:
    der = bytearray(ssl.PEM_cert_to_DER_cert(CERTIFICATE.decode()))
    der[data.draw(st.integers(0, len(der) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert len(fingerprint(bytes(der))) == 32
    except IdentityInvalid:
        return
