"""The operator, far away: the real command, over gRPC and TLS, through the real gateway, to the real daemon."""

import base64
import json
import os
import pty
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rigs.ports import deaf_port
from rigs.server import PROGRAMS, Server, wait_for
from rigs.taps import TlsTap, UnixTap
from test_gateway_wire import encodings, secrets_of

from unsealerd.core.age import P256Identity, X25519Identity, parse_header
from unsealerd.core.session import recipient_tag


@pytest.fixture
def server() -> Iterator[Server]:
    """Initialised, then cut off from power: locked, with its gateway up."""
    with Server() as server:
        server.start()
        server.ctl("init")
        server.remembered = server.key()
        server.power_cut()
        server.start_gateway()
        yield server


def _add(server: Server, address: str | None = None) -> None:
    server.ctl("host", "add", "web1", address or server.address, "--yes")


def _unlock(server: Server, *arguments: str, expect: int | None = 0) -> subprocess.CompletedProcess[bytes]:
    return server.ctl("unlock", "web1", "-i", str(server.identity_file), *arguments, expect=expect)


def test_the_operator_unlocks_from_far_away_and_is_told_what_and_why(server: Server) -> None:
    _add(server)
    answer = _unlock(server, "--reason", "power cut in row 7")
    assert server.key() == server.remembered
    told = answer.stderr + answer.stdout
    for fact in (b"unexpected_reboot", b"TLS key only", socket.gethostname().encode()):
        assert fact in told
    records = {record["event"]: record for record in server.audit()}
    assert records["unlock_answer"]["reason"] == "power cut in row 7"
    assert records["unlocked"]["operators"] == ["alice"]
    assert "127.0.0.1" in records["unlocked"]["peer"]
    assert _unlock(server, expect=None).returncode == 9


def test_over_ipv6(server: Server) -> None:
    text = (server.base / "gateway.log").read_text()
    addresses = [
        line.partition("listening on ")[2].split()[0] for line in text.splitlines() if "listening" in line
    ]
    six = next(address for address in addresses if address.startswith("[::1]"))
    _add(server, six)
    _unlock(server)
    server.assert_unlocked()


def test_both_sides_show_the_same_fingerprint(server: Server) -> None:
    here = server.json("identity")
    added = server.json("host", "add", "web1", server.address, "--yes")
    assert added["fingerprint"] == here["fingerprint"]
    assert added["words"] == here["words"]
    assert len(here["words"]) == 8


def test_a_host_that_was_not_added_is_refused_with_the_hint(server: Server) -> None:
    answer = server.ctl("unlock", server.address, "-i", str(server.identity_file), expect=None)
    assert answer.returncode == 11
    assert b"host add" in answer.stderr
    server.assert_locked("unexpected_reboot")


@pytest.mark.promise(5)
def test_a_host_with_another_tls_key_is_not_answered(server: Server) -> None:
    _add(server)
    server.stop_gateway()
    for name in ("tls.key", "tls.crt"):
        (server.state / "gateway" / name).unlink()
    from unsealerd.gateway import identity

    identity.create(server.state / "gateway")
    before = server.address
    server.start_gateway()
    # As if it had the port of the one before, which may be another process's by now.
    hosts = server.base / "hosts.json"
    hosts.write_text(hosts.read_text().replace(before, server.address))
    assert _unlock(server, expect=None).returncode == 12
    server.assert_locked("unexpected_reboot")
    assert "unlock_answer" not in server.events()


def test_a_stranger_and_a_wrong_answer(server: Server) -> None:
    _add(server)
    stranger = server.base / "mallory.txt"
    stranger.write_text(X25519Identity.generate().encode() + "\n")
    stranger.chmod(0o600)
    answer = server.ctl("unlock", "web1", "-i", str(stranger), expect=None)
    assert answer.returncode == 14
    assert b"hint:" in answer.stderr
    server.assert_locked("unexpected_reboot")
    _unlock(server)
    server.assert_unlocked()


def test_a_gateway_without_a_daemon_and_nothing_at_all(server: Server) -> None:
    _add(server)
    server.stop()
    assert _unlock(server, expect=None).returncode in (5, 13)
    server.stop_gateway()
    with deaf_port(port=int(server.address.rpartition(":")[2])):
        assert _unlock(server, expect=None).returncode == 13


def test_a_p256_operator_with_a_pem_file(tmp_path: Path) -> None:
    """The recipient of a smart card; here the key is in a file."""
    key = tmp_path / "bob.pem"
    subprocess.run(
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key], check=True
    )
    key.chmod(0o600)
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    private = load_pem_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    with Server() as server:
        server.operators["bob"] = str(P256Identity(private).recipient)
        server.operators["carol"] = str(X25519Identity.generate().recipient)
        server.configure()
        server.start()
        server.ctl("init")
        before = server.key()
        server.power_cut()
        server.start_gateway()
        _add(server)
        server.ctl("unlock", "web1", "-i", str(key))
        assert server.key() == before
        server.power_cut()
        _unlock(server)  # alice, who is one of two with X25519
        assert server.key() == before
        assert server.json("backup", "verify")["operators"] == ["alice", "bob", "carol"]


def test_a_key_file_with_a_passphrase(server: Server) -> None:
    """As `age -p` makes it; the passphrase is typed at the terminal."""
    encrypted = server.base / "alice.age"
    _type(
        ["age", "-p", "-o", str(encrypted), str(server.identity_file)],
        [b"correct horse\n", b"correct horse\n"],
    )
    encrypted.chmod(0o600)
    _add(server)
    _type(
        [
            *(str(PROGRAMS / "unsealctl"), "--config", str(server.config)),
            *("unlock", "web1", "-i", str(encrypted)),
        ],
        [b"correct horse\n", b"y\n"],
        {"UNSEALERD_HOSTS": str(server.base / "hosts.json")},
    )
    server.assert_unlocked()


def _type(command: list[str], lines: list[bytes], extra: dict[str, str] | None = None) -> None:
    """Run a command at a terminal, and answer each question for a passphrase, or for yes or no."""
    child, fd = pty.fork()
    if child == 0:
        os.environ.update(extra or {})
        os.execvp(command[0], command)
    seen = b""
    answers = list(lines)
    while True:
        try:
            chunk = os.read(fd, 4096)
        except OSError:  # EIO: the other side is closed
            break
        if not chunk:
            break
        seen += chunk
        if answers and (b"passphrase" in seen.lower() or b"[y/N]" in seen):
            os.write(fd, answers.pop(0))
            seen = b""
    os.close(fd)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, seen


@pytest.mark.promise(4)
def test_what_the_two_sockets_carry_says_nothing_of_the_backup() -> None:
    """Taps within TLS and on the unlock socket, while the real programs hold two sessions on one backup."""
    with Server(tpm=False) as server:
        server.start()
        server.ctl("init")
        image = (server.state / "keyring.age").read_bytes()
        recipient = str(server.identity.recipient).encode()
        other = server.base / "gateway-run"
        other.mkdir()
        with UnixTap(other / "unlock", server.run_dir / "unlock") as local:
            text = server.gateway_config.read_text()
            server.gateway_config.write_text(text.replace(str(server.run_dir), str(other)))
            server.start_gateway()
            with TlsTap(server.state / "gateway", server.address) as wire:
                _add(server, wire.address)
                for _ in range(2):
                    server.stop(signal.SIGKILL)
                    (server.state / "keyring.age").write_bytes(image)
                    server.start()
                    _unlock(server)
                    server.assert_unlocked()
            server.stop_gateway()
        streams = [bytes(a + b) for a, b in zip(wire.sent, wire.received, strict=True) if b"Unlock" in a]
        plain = [bytes(a + b) for a, b in zip(local.sent, local.received, strict=True) if b"Answer" in a]
        assert len(streams) == len(plain) == 2
        for name, secret in (secrets_of(server.identity, image) | {"recipient": recipient}).items():
            for form in encodings(secret):
                for stream in (*streams, *plain):
                    assert form not in stream, name
        points = [_points(stream) for stream in plain]
        assert points[0]
        assert points[1]
        assert not points[0] & points[1]


def _points(stream: bytes) -> set[str]:
    found: set[str] = set()
    for message in stream.split(b"\0"):
        if b'"challenge"' in message:
            questions = json.loads(message)["parameters"]["challenge"]["questions"]
            found |= {question["point"] for question in questions} | {
                question["tag"] for question in questions
            }
    return found


def test_the_stanza_is_what_the_taps_look_for(server: Server) -> None:
    """The control of the test before: the values that are searched for are those of the file."""
    image = (server.state / "keyring.age").read_bytes()
    point = secrets_of(server.identity, image)["ephemeral point"]
    assert any(form in image for form in encodings(point))
    assert len(parse_header(image).stanzas) == 1


def test_only_tls_1_3(server: Server) -> None:
    host, _, port = server.address.rpartition(":")

    def connect(version: ssl.TLSVersion) -> str | None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = version
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((host, int(port)), timeout=60) as plain,
            context.wrap_socket(plain) as secure,
        ):
            return secure.version()

    assert connect(ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        connect(ssl.TLSVersion.TLSv1_2)


@pytest.mark.promise(8)
def test_the_gateway_has_no_key_no_tpm_and_no_backup(server: Server) -> None:
    _add(server)
    _unlock(server)
    maps = Path(f"/proc/{server.gateway_pid}/maps").read_text()
    assert "cygrpc" in maps  # the search works
    for library in ("tpm2_pytss", "libtss2"):
        assert library not in maps
    opened = {
        Path(f"/proc/{server.gateway_pid}/fd/{fd.name}")
        for fd in Path(f"/proc/{server.gateway_pid}/fd").iterdir()
    }
    names = {str(path.readlink()) for path in opened if path.is_symlink()}
    assert not any("keyring.age" in name for name in names)


def test_a_session_that_hangs_does_not_keep_others_out(server: Server) -> None:
    """One operator has said hello and waits; another unlocks meanwhile, and `status` shows the one who waits."""
    nonce = os.urandom(32)
    tag = recipient_tag(nonce, str(server.identity.recipient))
    hello = {
        "method": "io.unsealerd.Unlock.Hello",
        "parameters": {
            "version": 1,
            "nonce": base64.b64encode(nonce).decode(),
            "tags": [base64.b64encode(tag).decode()],
            "peer": "elsewhere",
        },
    }
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(str(server.run_dir / "unlock"))
        waiting.sendall(json.dumps(hello).encode() + b"\0")
        waiting.settimeout(60)
        challenge = json.loads(waiting.recv(65536).rstrip(b"\0"))["parameters"]["challenge"]
        (session,) = server.status()["sessions"]
        assert session["words"] == challenge["words"]
        assert (session["peer"], session["operators"]) == ("elsewhere", ["alice"])
        _add(server)
        _unlock(server)
        server.assert_unlocked()
    wait_for(lambda: server.status()["sessions"] == [], "the end of the session")


def test_many_operators_at_once(server: Server) -> None:
    _add(server)
    codes: list[int] = []

    def one() -> None:
        codes.append(_unlock(server, expect=None).returncode)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 in codes
    assert set(codes) <= {0, 9}, codes  # whoever came late is told that it is unlocked
    assert server.key() == server.remembered
