"""Services on the local sockets of a running daemon: who gets what, what is recorded, and who cannot disturb whom."""

import contextlib
import json
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from rigs.server import PROGRAMS, Server, wait_for
from varlink import (
    Client as IndependentClient,  # the package varlink from PyPI, which shares no code with ours
)
from varlink import VarlinkError

from unsealerd.daemon.interface import load_description
from unsealerd.errors import (
    AccessDenied,
    AgeArmorInvalid,
    AgeHeaderInvalid,
    AgeMacInvalid,
    AgeNoMatch,
    AgePayloadInvalid,
    AttestationInvalid,
    AuditBroken,
    AuditUnwritable,
    CardBusy,
    CardFailed,
    CardMissing,
    CardRemoved,
    CardReset,
    DaemonUnreachable,
    Fault,
    HostMismatch,
    HostUnknown,
    HostUnreachable,
    IdentityInvalid,
    KeyNotFound,
    PinBlocked,
    PinCancelled,
    PinLastTry,
    PinWrong,
    ReaderMissing,
    TouchMissed,
    UnsealerdError,
    WrongCard,
    named,
)

CARDS = (
    AttestationInvalid,
    CardBusy,
    CardFailed,
    CardMissing,
    CardRemoved,
    CardReset,
    PinBlocked,
    PinCancelled,
    PinLastTry,
    PinWrong,
    ReaderMissing,
    TouchMissed,
    WrongCard,
)
# Raised by the command and by clients only, or turned into BackupDamaged and IdentityInvalid before they leave the daemon.
CLIENT_SIDE = (
    DaemonUnreachable,
    HostUnknown,
    HostMismatch,
    HostUnreachable,
    AuditBroken,
    IdentityInvalid,
    *CARDS,
)
INSIDE = (AgeArmorInvalid, AgeHeaderInvalid, AgeMacInvalid, AgeNoMatch, AgePayloadInvalid)
NOBODY = pwd.getpwnam("nobody").pw_uid

TABLES = """
[key.signed]
owner = "test@example.com"
purpose = "may be signed with, and not read"
overlap = "1h"
[[key.signed.allow]]
user = "{uid}"
operations = ["sign", "verify"]
[key.others]
owner = "test@example.com"
purpose = "somebody else's"
[[key.others.allow]]
user = "nobody"
operations = ["read", "sign", "verify"]
[key.nobodys]
owner = "test@example.com"
purpose = "granted to no one"
"""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(tpm=False) as server:
        server.base.chmod(0o755)
        server.tables = TABLES.format(uid=os.getuid())
        server.configure()
        server.start()
        server.ctl("init")
        yield server


def _as_nobody(server: Server, program: str) -> subprocess.CompletedProcess[str]:
    """Run Python as another user, with a client connected to the server."""
    prelude = (
        "import os, socket\n"
        "from unsealerd.client import Client\n"
        f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        f"client = Client({str(server.run_dir)!r}, timeout=60)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", prelude + program], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.promise(7)
def test_a_user_gets_what_the_policy_grants_and_nothing_else(server: Server) -> None:
    client = server.client
    assert [(key.name, sorted(o.value for o in key.operations)) for key in client.keys().keys] == [
        ("demo", ["read", "sign", "verify"]),
        ("signed", ["sign", "verify"]),
    ]
    client.sign("signed", b"x")
    for name in ("others", "nobodys", "missing"):
        with pytest.raises(AccessDenied):
            client.sign(name, b"x")
        with pytest.raises(AccessDenied):
            client.verify(name, b"x", bytes(32))
    denied = server.ctl("get", "signed", expect=None)
    assert denied.returncode == 4
    assert b"hint:" in denied.stderr
    mine = _as_nobody(server, "print(len(client.read('others')), [k.name for k in client.keys().keys])")
    assert mine.stdout.strip() == "32 ['others']", mine
    for name in ("demo", "signed"):
        refused = _as_nobody(server, f"client.sign({name!r}, b'x')")
        assert "AccessDenied" in refused.stderr
    denials = [record for record in server.audit() if record["event"] == "denied"]
    assert {"demo", "signed", "others", "nobodys", "missing"} <= {record["key"] for record in denials}
    assert {record["caller"]["uid"] for record in denials} == {os.getuid(), NOBODY}


@pytest.mark.promise(11)
def test_a_denied_reader_gets_no_byte_and_no_end(server: Server) -> None:
    for name in ("signed", "others", "nobodys"):
        with socket.socket(socket.AF_UNIX) as reader:
            reader.connect(str(server.run_dir / "key" / name))

            def recorded(name: str = name) -> bool:
                return any(
                    r["event"] == "denied" and r["key"] == name and r["operation"] == "read"
                    for r in server.audit()
                )

            wait_for(recorded, "the denial on record")
            reader.setblocking(False)
            with pytest.raises(BlockingIOError):
                reader.recv(1)


def test_the_admin_socket_is_roots(server: Server) -> None:
    assert (server.run_dir / "admin").stat().st_mode & 0o777 == 0o600
    assert (server.run_dir / "unlock").stat().st_mode & 0o007 == 0
    path = str(server.run_dir / "admin")
    refused = _as_nobody(server, f"socket.socket(socket.AF_UNIX).connect({path!r})")
    assert "PermissionError" in refused.stderr


@pytest.mark.promise(7)
def test_every_use_of_authority_is_on_record(server: Server) -> None:
    client = server.client
    client.read("demo")
    client.read_all("demo")
    for number in range(5):
        client.sign("demo", b"%d" % number)
    client.close()
    server.ctl("key", "rotate", "demo")
    server.ctl("backup", "export", str(server.base / "copy.age"))
    server.ctl("lock")
    wait_for(lambda: any(r["event"] == "key_used" for r in server.audit()), "the count")
    records = server.audit()
    events = [record["event"] for record in records]
    assert events.count("key_read") == 2
    assert events.count("key_sign") == 1
    assert next(record for record in records if record["event"] == "key_used")["count"] == 5
    for event in ("start", "initialise", "key_rotate", "key_rotated", "backup_export", "lock", "locked"):
        assert event in events
    assert all(record["caller"]["uid"] == os.getuid() for record in records if "caller" in record)
    assert b"verifies" in server.ctl("audit").stdout


@pytest.mark.promise(7)
def test_no_audit_no_effect(server: Server) -> None:
    """The audit log cannot be written: strace fails every write to it with ENOSPC."""
    before = server.key()
    server.stop()
    log = server.base / "strace.log"
    audit = server.state / "audit.jsonl"
    # The first two writes are those of the start and the lock.
    server.prefix = (
        *("strace", "-D", "-f", "-qq", "-o", str(log), "-e", "trace=write", "-P", str(audit)),
        *("-e", "inject=write:error=ENOSPC:when=6+"),
    )
    server.start()
    server.unlock()
    for command in (("key", "rotate", "demo"), ("backup", "export", str(server.base / "x.age"))):
        answer = server.ctl(*command, expect=None)
        assert answer.returncode == 15, (command, answer)
        assert b"hint:" in answer.stderr
    with pytest.raises(AuditUnwritable):
        server.client.sign("demo", b"x")
    assert not (server.base / "x.age").exists()
    server.assert_unlocked()
    assert [v["version"] for v in server.json("key", "show", "demo")["versions"]] == [1]
    with socket.socket(socket.AF_UNIX) as reader:
        reader.connect(str(server.run_dir / "key" / "demo"))
        wait_for(lambda: "key_reader_waits key=demo" in server.log_text(), "the reader waits")
        reader.setblocking(False)
        with pytest.raises(BlockingIOError):
            reader.recv(1)
    server.ctl("lock")  # giving up authority needs no permission
    server.assert_locked("locked_by_admin")
    server.stop()
    server.prefix = ()
    server.start()
    server.unlock()
    assert server.key() == before
    assert b"verifies" in server.ctl("audit").stdout


def test_an_audit_log_that_was_tampered_with_is_named(server: Server) -> None:
    server.key()
    path = server.state / "audit.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for change in (lines[:2] + lines[3:], [lines[0], lines[1].replace(b'"uid":0', b'"uid":7'), *lines[2:]]):
        path.write_bytes(b"".join(change))
        answer = server.ctl("audit", expect=None)
        assert answer.returncode == 15
        assert b"hint:" in answer.stderr


def test_an_independent_varlink_client(server: Server) -> None:
    address = f"unix:{server.run_dir / 'keys'}"
    with IndependentClient(address) as client:
        with client.open("org.varlink.service") as service:
            info = service.GetInfo()
            assert info["product"] == "unsealerd"
            assert "io.unsealerd.Keys" in info["interfaces"]
        assert set(client.get_interface("io.unsealerd.Keys").members) >= {
            "Sign",
            "Verify",
            "ListKeys",
            "Monitor",
        }
        with client.open("io.unsealerd.Keys") as keys:
            signed = keys.Sign("demo", "bWVzc2FnZQ==")
            assert keys.Verify("demo", "bWVzc2FnZQ==", signed["mac"])["valid"] is True
            with pytest.raises(VarlinkError) as denied:
                keys.Sign("others", "eA==")
            assert denied.value.error() == "io.unsealerd.Keys.AccessDenied"
    for name, interfaces in (
        ("admin", ("io.unsealerd.Admin", "io.unsealerd.Unlock")),
        ("unlock", ("io.unsealerd.Unlock",)),
    ):
        with IndependentClient(f"unix:{server.run_dir / name}") as client:
            for interface in interfaces:
                assert client.get_interface(interface).members


def test_every_error_is_declared_where_it_can_come_from() -> None:
    """A client that is generated from the interface meets no error that it does not know."""
    everywhere = {"AuditUnwritable", "BadRequest", "CallerChanged", "LimitExceeded", "NotInitialised"}
    keys = {"AccessDenied", "KeyNotFound", "Locked", "VersionNotFound"}
    elsewhere = {error.__name__ for error in (*CLIENT_SIDE, *INSIDE)}
    every = {error.__name__ for error in UnsealerdError.__subclasses__()} - elsewhere
    expected = {
        "Keys": everywhere | keys,
        "Admin": {name for name in every if named(name).fault is not Fault.PEER} - {"NotLocked"},  # type: ignore[union-attr]
        "Unlock": every - keys - {"AlreadyInitialised", "NotArmed"},
    }
    for name, errors in expected.items():
        declared = set(re.findall(r"^error (\w+) ", load_description(f"io.unsealerd.{name}"), re.MULTILINE))
        assert declared == errors, name


def test_monitor_tells_of_lock_unlock_and_rotation(server: Server) -> None:
    events: list[tuple[str, str | None]] = []
    ready = threading.Event()

    def follow() -> None:
        with (
            IndependentClient(f"unix:{server.run_dir / 'keys'}") as client,
            client.open("io.unsealerd.Keys") as keys,
        ):
            for event in keys.Monitor(_more=True):
                events.append((event["event"], event.get("key")))
                ready.set()
                if event["event"] == "unlocked":
                    return

    thread = threading.Thread(target=follow)
    thread.start()
    assert ready.wait(60)
    server.ctl("key", "rotate", "demo")
    server.ctl("key", "rotate", "others")  # not the caller's
    server.ctl("lock")
    server.unlock()
    thread.join(60)
    assert not thread.is_alive()
    assert events == [("state", None), ("rotated", "demo"), ("locked", None), ("unlocked", None)]


def test_rotation_verification_and_revocation(server: Server) -> None:
    client = server.client
    old = client.sign("signed", b"m")
    assert (old.version, client.verify("signed", b"m", old.mac).stale) == (1, False)
    server.ctl("key", "rotate", "signed")
    new = client.sign("signed", b"m")
    assert new.version == 2
    assert new.mac != old.mac
    stale = client.verify("signed", b"m", old.mac)
    assert (stale.valid, stale.version, stale.stale) == (True, 1, True)
    shown = server.ctl("verify", "signed", "--mac", old.mac.hex(), stdin=b"m")
    assert b"stale" in shown.stdout
    server.ctl("key", "revoke", "signed", "--version", "1")
    assert not client.verify("signed", b"m", old.mac).valid
    assert client.verify("signed", b"m", new.mac).valid
    server.ctl("key", "revoke", "signed")  # all: a declared key gets a new version at once
    assert not client.verify("signed", b"m", new.mac).valid
    assert client.sign("signed", b"m").version == 3
    states = [v["state"] for v in server.json("key", "show", "signed")["versions"]]
    assert states == ["revoked", "revoked", "primary"]


def test_revoked_bytes_are_in_no_backup_on_the_disk(server: Server) -> None:
    key = server.key()
    server.ctl("key", "revoke", "demo", "--version", "1")
    for path in server.state.glob("keyring.age*"):
        opened = subprocess.run(
            ["age", "-d", "-i", server.identity_file, path], capture_output=True, check=True
        )
        assert key not in opened.stdout, path


def test_reload_makes_declared_keys_keeps_undeclared_ones_and_refuses_nonsense(server: Server) -> None:
    demo = server.key()
    before = server.config.read_text()
    server.keys = {"fresh": ""}
    server.configure()
    server.send(signal.SIGHUP)
    wait_for(lambda: "reloaded" in server.log_text(), "the reload")
    assert len(server.key("fresh")) == 32
    names = [key["name"] for key in server.json("key", "list")["keys"]]
    assert names == ["demo", "fresh", "nobodys", "others", "signed"]
    with pytest.raises(AccessDenied):  # it is kept, and nobody is granted it
        server.client.sign("demo", b"x")
    server.configure("nonsense = [")
    server.send(signal.SIGHUP)
    wait_for(lambda: "reload refused error=ConfigInvalid" in server.log_text(), "the refusal")
    assert len(server.key("fresh")) == 32
    server.configure(before)
    server.send(signal.SIGHUP)
    wait_for(lambda: server.log_text().count("reloaded") == 2, "the reload")
    assert server.key() == demo


def test_a_policy_that_was_narrowed_counts_on_open_connections(server: Server) -> None:
    client = server.client
    client.sign("demo", b"x")
    server.keys = {}
    server.configure()
    server.send(signal.SIGHUP)
    wait_for(lambda: "reloaded" in server.log_text(), "the reload")
    with pytest.raises(AccessDenied):
        client.sign("demo", b"x")


def test_a_key_rotates_by_itself_and_its_overlap_ends() -> None:
    with Server(tpm=False, keys=()) as server:
        server.keys = {"quick": 'rotate_every = "2s"\noverlap = "1s"'}
        server.configure()
        server.start()
        server.ctl("init")

        def states() -> list[str]:
            return [v["state"] for v in server.json("key", "show", "quick")["versions"]]

        wait_for(lambda: states()[:2] == ["retired", "retired"] or states()[:1] == ["retired"], "a rotation")
        assert "scheduled_change" in server.events()
        server.ctl("lock")
        with_lock = server.json("status")
        assert with_lock["state"] == "locked"
        server.unlock()
        assert states()[-1] == "primary"


@pytest.mark.promise(10)
def test_hostile_bytes_on_every_socket_change_nothing(server: Server) -> None:
    key = server.key()
    before = server.status()["generation"]
    junk = [
        *(b"\0", b"{}\0", b"[]\0", b"null\0", b"\xff\xfe\0", b'{"method":1}\0', b'{"method":"x"}\0'),
        b"{" * 5000 + b"\0",
        b'{"method":"io.unsealerd.Keys.Sign","parameters":{"key":"demo"}}\0',
        b'{"method":"io.unsealerd.Keys.Sign","parameters":{"key":"demo","message":"%%%"}}\0',
        b'{"method":"io.unsealerd.Keys.Sign","parameters":{"key":"../x","message":"eA=="}}\0',
        b'{"method":"io.unsealerd.Unlock.Answer","parameters":{"session":"","answers":[]}}\0',
        b'{"method":"io.unsealerd.Admin.RevokeKey","parameters":{"name":"demo","version":-1}}\0',
        b'{"method":"io.unsealerd.Admin.Arm","parameters":{"seconds":1e99}}\0',
        b"A" * 300_000,
    ]
    for name in ("keys", "admin", "unlock", "key/demo", "keyset/demo"):
        for data in junk:
            with socket.socket(socket.AF_UNIX) as peer:
                peer.settimeout(60)
                peer.connect(str(server.run_dir / name))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    peer.sendall(data)
                    peer.shutdown(socket.SHUT_WR)
                    while answer := peer.recv(65536):
                        if not name.startswith("key") or name == "keys":
                            for message in answer.split(b"\0"):
                                assert not message or "error" in json.loads(message), message
    assert server.status()["generation"] == before
    assert server.key() == key
    assert "Traceback" not in server.log_text()


def test_a_slow_client_delays_nobody(server: Server) -> None:
    held = []
    try:
        for data in (
            b"",
            b'{"method":"io.unsealerd.Keys.Si',
            b'{"method":"org.varlink.service.GetInfo"}\0' * 2000,
        ):
            for _ in range(20):
                peer = socket.socket(socket.AF_UNIX)
                held.append(peer)
                peer.connect(str(server.run_dir / "keys"))
                peer.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    peer.send(data)  # and never reads
        for number in range(200):
            server.client.sign("demo", b"%d" % number)
    finally:
        for peer in held:
            peer.close()


@pytest.mark.promise(8)
def test_the_daemon_loads_no_network_library_and_opens_no_network_socket(server: Server) -> None:
    from pathlib import Path

    server.client.sign("demo", b"x")
    server.ctl("lock")
    server.unlock()
    maps = Path(f"/proc/{server.pid}/maps").read_text()
    assert "cryptography" in maps  # the search works
    for library in ("grpc", "cygrpc", "libssl", "libcurl", "libgnutls", "libldap"):
        assert library not in maps
    inodes = set()
    for fd in Path(f"/proc/{server.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(fd)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    for table in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
        listed = {
            line.split()[9] for line in Path(f"/proc/{server.pid}/net/{table}").read_text().splitlines()[1:]
        }
        assert not inodes & listed, table


def test_key_not_found_is_the_administrators_to_know(server: Server) -> None:
    for command in (("key", "show", "none"), ("key", "rotate", "none"), ("key", "revoke", "none")):
        answer = server.ctl(*command, expect=None)
        assert answer.returncode == 6, command
        assert KeyNotFound.__name__ in json.loads(server.ctl("--json", *command, expect=None).stdout)["error"]


def test_the_programs_help_without_a_server() -> None:
    for program in ("unsealerd", "unsealerd-gateway", "unsealctl"):
        done = subprocess.run([PROGRAMS / program, "--help"], capture_output=True, check=True, timeout=60)
        assert b"--config" in done.stdout
        wrong = subprocess.run(
            [PROGRAMS / program, "--no-such"], capture_output=True, check=False, timeout=60
        )
        assert wrong.returncode == 2
        assert b"Traceback" not in wrong.stderr


def test_a_configuration_that_is_wrong_is_one_line_and_a_hint(server: Server) -> None:
    with Server(tpm=False) as other:
        other.configure("[daemon]\nstate_dir = 3\n")
        assert other.launch().wait(60) == 78
        lines = other.log_text().splitlines()
        assert len(lines) == 2
        assert lines[0].startswith("unsealerd: ")
        assert lines[1].startswith("hint: ")
