"""unsealctl host and unlock: what an operator sees, and what is refused before a private key is used."""

import base64
import json
import socket
import ssl
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rigs.ctl import Ctl
from rigs.ports import deaf_port
from rigs.stub_daemon import StubDaemon, error

from unsealerd.cli import terminal
from unsealerd.cli.edge import Exit
from unsealerd.core.age import X25519Identity
from unsealerd.core.session import recipient_tag
from unsealerd.core.words import fingerprint_words
from unsealerd.gateway import identity as gateway_identity


class TlsServer:
    """Shows a gateway's certificate to whoever comes, and no more."""

    def __init__(self, directory: Path) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.renew(directory)
        self._context.set_alpn_protocols(["h2"])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def renew(self, directory: Path) -> None:
        self.fingerprint = gateway_identity.create(directory)
        self._context.load_cert_chain(directory / "tls.crt", directory / "tls.key")

    def close(self) -> None:
        if self._listener.fileno() >= 0:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._thread.join(60)  # or it might accept at what has the number of the listener next
            self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with peer:
                peer.settimeout(60)
                try:
                    with self._context.wrap_socket(peer, server_side=True) as stream:
                        stream.recv(1)
                except OSError:
                    continue


@pytest.fixture
def ctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ctl:
    monkeypatch.setenv("UNSEALERD_HOSTS", str(tmp_path / "operator" / "hosts.json"))
    return Ctl(tmp_path)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TlsServer]:
    one = TlsServer(tmp_path / "gateway")
    yield one
    one.close()


@pytest.fixture
def identity(tmp_path: Path) -> Path:
    path = tmp_path / "key.txt"
    path.write_text("# a comment\n" + X25519Identity.generate().encode() + "\n")
    path.chmod(0o600)
    return path


# --- host


def test_add_list_remove(ctl: Ctl, server: TlsServer, tmp_path: Path) -> None:
    """None of it needs a configuration."""
    words = " ".join(fingerprint_words(server.fingerprint))
    result = ctl.bare("host", "add", "web1", server.address, "--yes")
    assert result.code == 0
    assert words in result.err
    assert server.fingerprint.hex() in result.err
    assert "TLS key only" in result.out
    hosts = tmp_path / "operator" / "hosts.json"
    assert stat.S_IMODE(hosts.stat().st_mode) == 0o600
    assert words in ctl.bare("host", "list").out
    (listed,) = json.loads(ctl.bare("host", "list", "--json").raw)["hosts"]
    assert list(listed) == ["name", "address", "fingerprint", "words", "trust", "added"]
    assert listed["fingerprint"] == server.fingerprint.hex()
    assert ctl.bare("host", "remove", "web1", "--json").json == listed
    assert ctl.bare("host", "list", "--json").json == {"hosts": []}
    assert "host add" in ctl.bare("host", "list").out
    ctl.bare("host", "remove", "web1", "--json").refused(Exit.HOST_UNKNOWN, "HostUnknown")


def test_add_asks(ctl: Ctl, server: TlsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "confirm", lambda *_, **__: False)
    assert ctl.bare("host", "add", "web1", server.address).code == Exit.USAGE
    assert ctl.bare("host", "list", "--json").json == {"hosts": []}
    monkeypatch.setattr(terminal, "confirm", lambda *_, **__: True)
    assert ctl.bare("host", "add", "web1", server.address).code == 0


def test_a_script_must_say_that_it_compared(
    ctl: Ctl, server: TlsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_terminal(path: object, *_: object, **__: object) -> None:
        raise OSError(6, "No such device or address", path)

    monkeypatch.setattr("builtins.open", no_terminal)
    result = ctl.bare("host", "add", "web1", server.address)
    assert result.code == Exit.USAGE
    assert "--fingerprint or --yes" in result.err


def test_add_with_the_fingerprint(ctl: Ctl, server: TlsServer) -> None:
    words = fingerprint_words(server.fingerprint)
    digits = server.fingerprint.hex()
    for wrong in ("00" * 32, digits[:-2], " ".join(words[:-1]), " ".join([*words, "abandon"]), ""):
        result = ctl.bare("host", "add", "web1", server.address, f"--fingerprint={wrong}")
        assert result.code == Exit.HOST_MISMATCH, wrong
    assert ctl.bare("host", "list", "--json").json == {"hosts": []}
    for right in (digits, server.fingerprint.hex(":").upper(), " ".join(words), "-".join(words).upper()):
        assert ctl.bare("host", "add", "web1", server.address, "--fingerprint", right).code == 0
        ctl.bare("host", "remove", "web1")


def test_a_host_is_added_once(ctl: Ctl, server: TlsServer, tmp_path: Path) -> None:
    assert ctl.bare("host", "add", "web1", server.address, "--yes").code == 0
    for name in ("web1", "other"):
        result = ctl.bare("host", "add", name, server.address, "--yes", "--json")
        assert result.refused(Exit.USAGE, "BadRequest").err.splitlines()[0].endswith("with the same key")
    server.renew(tmp_path / "another")
    result = ctl.bare("host", "add", "web1", server.address, "--yes", "--json")
    assert "another key" in result.refused(Exit.HOST_MISMATCH, "HostMismatch").err


@pytest.mark.parametrize("address", ["", "host", "host:", "host:0", "host:70000", "ho st:1", ":1", "[::1:1"])
def test_an_odd_address(ctl: Ctl, address: str) -> None:
    ctl.bare("host", "add", "web1", "--yes", "--json", "--", address).refused(Exit.USAGE, "BadRequest")


def test_nobody_there(ctl: Ctl) -> None:
    with deaf_port() as port:
        ctl.bare("host", "add", "web1", f"127.0.0.1:{port}", "--yes", "--json").refused(
            Exit.HOST_UNREACHABLE, "HostUnreachable"
        )


def test_a_damaged_file_of_hosts(ctl: Ctl, tmp_path: Path) -> None:
    (tmp_path / "operator").mkdir()
    (tmp_path / "operator" / "hosts.json").write_bytes(b"\xff{")
    ctl.bare("host", "list", "--json").refused(Exit.CONFIGURATION, "ConfigInvalid")
    ctl.bare("host", "remove", "x", "--json").refused(Exit.CONFIGURATION, "ConfigInvalid")


# --- unlock


def test_a_host_that_was_not_added_is_refused(ctl: Ctl, identity: Path) -> None:
    result = ctl.bare("unlock", "web1:8750", "-i", str(identity), "--json")
    assert "unsealctl host add NAME HOST:PORT" in result.refused(Exit.HOST_UNKNOWN, "HostUnknown").err


def test_the_wrong_host_is_refused(ctl: Ctl, server: TlsServer, identity: Path, tmp_path: Path) -> None:
    assert ctl.bare("host", "add", "web1", server.address, "--yes").code == 0
    server.renew(tmp_path / "another")
    result = ctl.bare("unlock", "web1", "-i", str(identity), "--json")
    result.refused(Exit.HOST_MISMATCH, "HostMismatch")


def test_an_unreachable_host(ctl: Ctl, server: TlsServer, identity: Path) -> None:
    assert ctl.bare("host", "add", "web1", server.address, "--yes").code == 0
    server.close()
    with deaf_port(port=int(server.address.rpartition(":")[2])):
        ctl.bare("unlock", server.address, "-i", str(identity), "--json").refused(
            Exit.HOST_UNREACHABLE, "HostUnreachable"
        )


@pytest.mark.parametrize(
    "content", [None, b"", b"\xff", b"AGE-SECRET-KEY-1XXX\n", b"-----BEGIN PRIVATE KEY-----\n"]
)
def test_what_is_no_identity(ctl: Ctl, identity: Path, content: bytes | None) -> None:
    with StubDaemon(ctl.runtime_dir) as daemon:
        if content is None:
            identity.unlink()
        else:
            identity.write_bytes(content)
        result = ctl("unlock", "--local", "-i", str(identity), "--json")
        result.refused(Exit.STORED_DATA, "IdentityInvalid")
        assert not daemon.calls


def secret_of(path: Path) -> X25519Identity:
    return X25519Identity.parse(path.read_text().splitlines()[1])


class Host:
    """A locked host on the admin socket, which asks one question and remembers the answer."""

    def __init__(self, daemon: StubDaemon, recipient: str) -> None:
        self.recipient = recipient
        self.result: dict[str, object] = {
            "state": "unlocked",
            "shares_present": 1,
            "shares_needed": 1,
            "outcomes": [{"question": 0, "result": "accepted"}],
        }
        self.facts: dict[str, object] = {
            "lock_reason": "unexpected_reboot",
            "boot_id": "0f8fad5b-d9cb-469f-a165-70867728950e",
            "host_name": "web1",
            "uptime": 125,
            "generation": 7,
            "backup_time": 1700000000,
            "shares_present": 0,
            "shares_needed": 1,
            "deadline": 120,
        }
        self.answers: list[dict[str, object]] = []
        daemon.answers["Unlock.Hello"] = self.hello
        daemon.answers["Unlock.Answer"] = self.answer

    def hello(self, asked: dict[str, object]) -> dict[str, object]:
        tag = recipient_tag(base64.b64decode(str(asked["nonce"])), self.recipient)
        question = {
            "tag": base64.b64encode(tag).decode(),
            "curve": "x25519",
            "point": base64.b64encode(b"\x09" + bytes(31)).decode(),  # RFC 7748 section 6.1: the base point
        }
        session = base64.b64encode(bytes(16)).decode()
        words = ["one", "two", "three", "four"]
        return {"challenge": {**self.facts, "session": session, "questions": [question], "words": words}}

    def answer(self, asked: dict[str, object]) -> dict[str, object]:
        self.answers.append(asked)
        return self.result


@pytest.fixture
def daemon(ctl: Ctl) -> Iterator[StubDaemon]:
    with StubDaemon(ctl.runtime_dir) as stub:
        yield stub


@pytest.fixture
def host(daemon: StubDaemon, identity: Path) -> Host:
    return Host(daemon, str(secret_of(identity).recipient))


def test_unlock_at_the_console(ctl: Ctl, host: Host, identity: Path) -> None:
    result = ctl("unlock", "--local", "-i", str(identity), "--reason", "power cut", "--accept-rollback")
    assert result.code == 0
    assert result.out == "this host is unlocked\n"
    for fact in ("web1", "unexpected_reboot", "2 minutes", "generation 7", "2023-11-14", "0 of 1"):
        assert fact in result.err
    assert "TLS key only" not in result.err  # the socket is the host's own
    (answer,) = host.answers
    assert answer["reason"] == "power cut"
    assert answer["accept_rollback"] is True
    found = ctl("unlock", "--local", "-i", str(identity), "--json").json
    assert list(found) == [
        *("state", "shares_present", "shares_needed", "accepted", "refused", "words"),
        *("operators_answered", "operators_missing", "seconds_left"),
    ]
    assert found["state"] == "unlocked"
    assert found["accepted"] == [host.recipient]
    assert host.answers[1]["accept_rollback"] is False


def test_a_key_file_that_others_read_is_named(ctl: Ctl, host: Host, identity: Path) -> None:
    identity.chmod(0o644)
    result = ctl("unlock", "--local", "-i", str(identity))
    assert result.code == 0
    assert "can be read by others (mode 0644)" in result.err


def test_one_share_of_two(ctl: Ctl, host: Host, identity: Path) -> None:
    host.result |= {"state": "locked", "shares_needed": 2}
    result = ctl("unlock", "--local", "-i", str(identity))
    assert (result.code, result.out) == (0, "this host has 1 of 2 shares; it needs another operator\n")


def test_a_wrong_answer(ctl: Ctl, host: Host, identity: Path) -> None:
    host.result |= {"state": "locked", "outcomes": [{"question": 0, "result": "BadAnswer"}]}
    result = ctl("unlock", "--local", "-i", str(identity), "--json")
    assert result.code == Exit.PEER
    assert result.json["error"] == "BadAnswer"


@pytest.mark.promise(5)
def test_a_challenge_that_cannot_be_shown_is_not_answered(ctl: Ctl, host: Host, identity: Path) -> None:
    host.facts["host_name"] = "\x1b[2Jweb1"
    result = ctl("unlock", "--local", "-i", str(identity), "--json")
    result.refused(Exit.PEER, "BadMessage")
    assert not host.answers


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("NotAnOperator", Exit.PEER),
        ("SessionExpired", Exit.PEER),
        ("NotLocked", Exit.NOTHING_TO_DO),
        ("NotInitialised", Exit.NOT_INITIALISED),
        ("Rollback", Exit.STORED_DATA),
        ("LimitExceeded", Exit.LIMIT),
        ("TpmMissing", Exit.HARDWARE),
    ],
)
def test_the_hosts_errors(ctl: Ctl, daemon: StubDaemon, identity: Path, name: str, code: int) -> None:
    daemon.answers["Unlock.Hello"] = error(f"io.unsealerd.Unlock.{name}")
    ctl("unlock", "--local", "-i", str(identity), "--json").refused(code, name)


def test_no_daemon_at_the_console(ctl: Ctl, identity: Path) -> None:
    ctl("unlock", "--local", "-i", str(identity), "--json").refused(
        Exit.DAEMON_UNREACHABLE, "DaemonUnreachable"
    )


def test_a_passphrase_is_asked_on_the_terminal(
    ctl: Ctl, host: Host, identity: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

    secured = tmp_path / "key.pem"
    private = ec.generate_private_key(ec.SECP256R1())
    secured.write_bytes(
        private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"correct"))
    )
    secured.chmod(0o600)
    asked: list[str] = []

    def ask(question: str) -> str:
        asked.append(question)
        return ("wrong", "correct")[len(asked) - 1]

    monkeypatch.setattr(terminal, "ask_secret", ask)
    arguments = ("unlock", "--local", "-i", str(identity), "-i", str(secured))
    ctl(*arguments, "--json").refused(Exit.STORED_DATA, "IdentityInvalid")
    assert not host.answers
    assert ctl(*arguments).code == 0
    assert asked == [f"Passphrase of {secured}: "] * 2
