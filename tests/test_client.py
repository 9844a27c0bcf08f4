"""The client library against the daemon's sockets: what it gives, and what it never gives."""

import base64
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rigs.limits import in_time
from rigs.stub_daemon import StubDaemon, error

from unsealerd.client import Client, Event, Signature, Verification
from unsealerd.client.client import MAX_MESSAGE_BYTES, parse_keyset
from unsealerd.client.connection import Connection, FrameReader, Reply, connect, named_error, parse_reply
from unsealerd.errors import (
    AccessDenied,
    BadMessage,
    BadRequest,
    DaemonUnreachable,
    KeyNotFound,
    LimitExceeded,
    Locked,
    SealRefused,
    UnsealerdError,
)
from unsealerd.model import LockReason, Operation, State

KEY = bytes(range(32))
MAC = "5c" * 32
NOT_YET = 0.2  # seconds: long enough for a reader to wait, short enough for a test


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StubDaemon]:
    with StubDaemon(tmp_path) as stub:
        stub.answers["Keys.ListKeys"] = listing("unlocked")
        yield stub


@pytest.fixture
def client(daemon: StubDaemon) -> Iterator[Client]:
    with Client(daemon.directory, timeout=60) as one:
        yield one


def listing(state: str, operations: tuple[str, ...] = ("read", "sign")) -> dict[str, object]:
    key = {"name": "web", "operations": list(operations), "versions": []}
    return {"state": state, "keys": [key]}


# --- reading


def test_read_gives_the_bytes(daemon: StubDaemon, client: Client) -> None:
    daemon.give("key/web", KEY)
    assert client.read("web") == KEY


def test_read_all_gives_the_versions_primary_first(daemon: StubDaemon, client: Client) -> None:
    daemon.give("keyset/web", f"3 {'0a' * 32}\n1 {'0b' * 16}\n".encode())
    assert client.read_all("web") == [(3, b"\x0a" * 32), (1, b"\x0b" * 16)]


@pytest.mark.promise(11)
@pytest.mark.parametrize("path", ["key/web", "keyset/web"])
def test_no_bytes_are_an_error_and_never_a_key(daemon: StubDaemon, client: Client, path: str) -> None:
    daemon.give(path, b"")
    with pytest.raises(DaemonUnreachable, match="without giving the key"):
        client.read("web") if path.startswith("key/") else client.read_all("web")


@pytest.mark.promise(11)
@pytest.mark.parametrize("size", [1, 15, 1025, 100_000])
def test_what_has_no_size_of_a_key_is_no_key(daemon: StubDaemon, client: Client, size: int) -> None:
    daemon.give("key/web", b"k" * size)
    with pytest.raises(BadMessage):
        client.read("web")


@pytest.mark.promise(11)
@pytest.mark.parametrize(
    "data",
    [
        f"1 {'0a' * 32}".encode(),  # cut off
        f"1 {'0a' * 32}\n2 {'0b' * 7}\n".encode(),
        b"\n",
        f"1 {'0a' * 32}\n\n".encode(),
        f"1 {'0a' * 32}\n1 {'0b' * 32}\n".encode(),
        f"01 {'0a' * 32}\n".encode(),
        f"0 {'0a' * 32}\n".encode(),
        f"1 {'0A' * 32}\n".encode(),
        f"1  {'0a' * 32}\n".encode(),
        f"1 {'0a' * 32}\r\n".encode(),
        f"1 {'0a' * 31}0\n".encode(),
        f"1 {'0a' * 32}\0\n".encode(),
        f"1 {'0a' * 32}\r".encode(),
        b"1 \n",
    ],
)
def test_a_key_set_is_read_strictly(daemon: StubDaemon, client: Client, data: bytes) -> None:
    daemon.give("keyset/web", data)
    with pytest.raises(BadMessage) as caught:
        client.read_all("web")
    assert "0a0a" not in str(caught.value)  # no secret in an exception


@given(st.binary(max_size=200) | st.from_regex(rb"([0-9]{1,2} [0-9a-f]{30,34}\n){1,3}", fullmatch=True))
def test_a_key_set_parses_or_is_a_bad_message(data: bytes) -> None:
    try:
        found = parse_keyset(data)
    except BadMessage:
        return
    assert b"".join(b"%d %s\n" % (version, value.hex().encode()) for version, value in found) == data
    assert all(len(value) >= 16 for _, value in found)


def test_read_waits_for_the_unlock(daemon: StubDaemon, client: Client) -> None:
    """The reader is connected and gets nothing; then the key comes."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(daemon.directory / "key/web"))
    listener.listen()
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(client.read("web")))
    with listener:
        reader.start()
        peer, _ = listener.accept()
        reader.join(NOT_YET)
        assert reader.is_alive()
        with peer:
            peer.sendall(KEY)
        reader.join(60)
    assert found == [KEY]


def test_a_reader_survives_a_restart_of_the_daemon(daemon: StubDaemon, client: Client) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(daemon.directory / "key/web"))
    listener.listen()
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(client.read("web")))
    with listener:
        reader.start()
        listener.accept()[0].close()  # this daemon ends while the reader waits
        peer, _ = listener.accept()
        with peer:
            peer.sendall(KEY)
        reader.join(60)
    assert found == [KEY]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (listing("locked"), Locked),
        (listing("unlocked", ("sign",)), AccessDenied),
        ({"state": "unlocked", "keys": []}, AccessDenied),
        (listing("unlocked"), DaemonUnreachable),
    ],
)
def test_a_held_reader_learns_why(
    daemon: StubDaemon, answer: dict[str, object], expected: type[UnsealerdError]
) -> None:
    daemon.give("key/web", None)
    daemon.answers["Keys.ListKeys"] = answer

    def ask(seconds: float) -> None:
        """The reason is asked for, and has to come, within the same time."""
        with Client(daemon.directory, timeout=seconds) as client, pytest.raises(expected):
            client.read("web")

    in_time(ask, (NOT_YET, 2, 20))


def test_a_key_without_a_socket_is_not_found(client: Client) -> None:
    with pytest.raises(KeyNotFound):
        client.read("nothing")


@pytest.mark.parametrize("name", ["../admin", "", ".", "a/b", "A", "a\0", "x" * 65, "a\n"])
def test_a_name_never_leaves_the_directory(daemon: StubDaemon, client: Client, name: str) -> None:
    with pytest.raises(BadRequest):
        client.read(name)
    with pytest.raises(BadRequest):
        client.sign(name, b"")
    assert daemon.accepted == 0


# --- signing and verifying


def test_sign(daemon: StubDaemon, client: Client) -> None:
    daemon.answers["Keys.Sign"] = {"mac": MAC, "version": 2}
    assert client.sign("web", b"m\0essage") == Signature(bytes.fromhex(MAC), 2)
    assert daemon.calls == [("Keys.Sign", {"key": "web", "message": base64.b64encode(b"m\0essage").decode()})]


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"mac": "", "version": 1},
        {"mac": MAC[:-2], "version": 1},
        {"mac": MAC.upper(), "version": 1},
        {"mac": MAC, "version": True},
        {"mac": MAC, "version": "1"},
        {"mac": MAC},
    ],
)
def test_a_signature_is_whole_or_an_error(
    daemon: StubDaemon, client: Client, answer: dict[str, object]
) -> None:
    daemon.answers["Keys.Sign"] = answer
    with pytest.raises(BadMessage):
        client.sign("web", b"m")


def test_verify(daemon: StubDaemon, client: Client) -> None:
    daemon.answers["Keys.Verify"] = {"valid": True, "version": 1, "stale": True}
    assert client.verify("web", b"m", bytes.fromhex(MAC)) == Verification(True, 1, True)
    assert daemon.calls[0][1]["mac"] == MAC
    daemon.answers["Keys.Verify"] = {"valid": False}
    assert client.verify("web", b"m", bytes.fromhex(MAC)) == Verification(False, None, None)


def test_a_verification_is_as_true_as_what_it_says() -> None:
    assert Verification(True, 1, False)
    assert not Verification(False, None, None)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"valid": 1, "version": 1, "stale": False},
        {"valid": "true", "version": 1, "stale": False},
        {"valid": True},
        {"valid": True, "version": 1},
        {"valid": False, "version": 1},
    ],
)
def test_no_odd_answer_is_a_success(daemon: StubDaemon, client: Client, answer: dict[str, object]) -> None:
    daemon.answers["Keys.Verify"] = answer
    with pytest.raises(BadMessage):
        client.verify("web", b"m", b"")


def test_a_long_message_is_not_sent(daemon: StubDaemon, client: Client) -> None:
    with pytest.raises(LimitExceeded):
        client.sign("web", bytes(MAX_MESSAGE_BYTES + 1))
    assert daemon.accepted == 0
    daemon.answers["Keys.Sign"] = {"mac": MAC, "version": 2}
    assert client.sign("web", bytes(MAX_MESSAGE_BYTES)).version == 2


def test_keys(daemon: StubDaemon, client: Client) -> None:
    version = {"version": 4, "state": "primary", "created": 1700000000}
    key = {"name": "web", "operations": ["read"], "primary": 4, "versions": [version]}
    daemon.answers["Keys.ListKeys"] = {"state": "unlocked", "keys": [key]}
    found = client.keys()
    assert found.state is State.UNLOCKED
    web = found.find("web")
    assert web is not None
    assert web.primary == 4
    assert web.operations == {Operation.READ}
    assert web.versions[0].created == 1700000000


def test_monitor_gives_each_change(daemon: StubDaemon, client: Client) -> None:
    daemon.streams["Keys.Monitor"] = [
        {"event": "state", "state": "locked"},
        {"event": "rotated", "state": "unlocked", "key": "web", "version": 2},
    ]
    events = client.monitor()
    assert next(events) == Event("state", State.LOCKED, None, None)
    assert next(events) == Event("rotated", State.UNLOCKED, "web", 2)
    daemon.stop()
    with pytest.raises(DaemonUnreachable):
        next(events)


def test_the_error_of_the_daemon_is_the_error_here(daemon: StubDaemon, client: Client) -> None:
    daemon.answers["Keys.Sign"] = error("io.unsealerd.Keys.Locked")
    with pytest.raises(Locked):
        client.sign("web", b"")


# --- the connection


def test_a_restarted_daemon_is_found_again(daemon: StubDaemon, client: Client) -> None:
    daemon.answers["Keys.Sign"] = {"mac": MAC, "version": 2}
    client.sign("web", b"")
    daemon.stop()
    daemon.listen("keys")
    assert client.sign("web", b"").version == 2


def test_another_caller_is_another_connection(daemon: StubDaemon, client: Client) -> None:
    """The daemon judges who connected: after CallerChanged only a new connection can be right."""
    answers = [error("io.unsealerd.Keys.CallerChanged"), b""]
    daemon.answers["Keys.Sign"] = lambda _: answers.pop(0) or {"mac": MAC, "version": 2}
    assert client.sign("web", b"").version == 2
    assert daemon.accepted == 2


def test_a_daemon_that_only_closes_is_tried_twice(daemon: StubDaemon, client: Client) -> None:
    daemon.answers["Keys.Sign"] = b""
    with pytest.raises(DaemonUnreachable):
        client.sign("web", b"")
    assert daemon.accepted == 2


def test_a_child_has_its_own_connection(
    daemon: StubDaemon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.answers["Keys.Sign"] = {"mac": MAC, "version": 2}
    client.sign("web", b"")
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as after fork(2)
    client.sign("web", b"")
    assert daemon.accepted == 2


def test_threads_take_turns(daemon: StubDaemon, client: Client) -> None:
    daemon.answers["Keys.Sign"] = lambda asked: {
        "mac": base64.b64decode(str(asked["message"])).hex() * 32,
        "version": 1,
    }
    wrong: list[int] = []

    def work(byte: int) -> None:
        macs = [client.sign("web", bytes([byte])).mac for _ in range(50)]
        wrong.extend(byte for mac in macs if mac != bytes([byte]) * 32)

    threads = [threading.Thread(target=work, args=(byte,)) for byte in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert daemon.accepted == 1


def test_no_answer_is_an_error_in_time(daemon: StubDaemon) -> None:
    silent = threading.Event()

    def wait(_: dict[str, object]) -> bytes:
        silent.wait(60)
        return b""

    daemon.answers["Keys.Sign"] = wait

    def ask(seconds: float) -> None:
        """The connection has to be there before the time is up."""
        with (
            Client(daemon.directory, timeout=seconds) as client,
            pytest.raises(DaemonUnreachable, match="in time"),
        ):
            client.sign("web", b"")

    in_time(ask, (NOT_YET, 2, 20))
    silent.set()


def test_no_socket_and_no_listener(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable):
        Client(tmp_path).keys()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "keys"))
    with pytest.raises(DaemonUnreachable):
        Client(tmp_path).keys()
    with pytest.raises(DaemonUnreachable):
        Client(tmp_path / ("x" * 120)).keys()


def test_a_closed_door_is_access_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(AccessDenied):
        connect(str(tmp_path / "admin"), 1)


def test_a_full_backlog_is_waited_for(tmp_path: Path) -> None:
    """A service that comes while the daemon is busy waits, and is not turned away."""
    path = str(tmp_path / "keys")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        first = connect(path, 60)  # fills the backlog
        with pytest.raises(DaemonUnreachable, match="busy"):
            connect(path, NOT_YET)
        second: list[socket.socket] = []
        thread = threading.Thread(target=lambda: second.append(connect(path, 60)))
        thread.start()
        thread.join(NOT_YET)
        assert thread.is_alive()
        accepted, _ = listener.accept()
        thread.join(60)
        for one in (first, accepted, *second):
            one.close()
    assert second


@pytest.mark.promise(10)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_reply_or_a_bad_message(data: bytes) -> None:
    try:
        reply = parse_reply(data)
    except BadMessage:
        return
    assert isinstance(reply, Reply)


_TEXT = st.text("aB.0\0é\ud800", max_size=8)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)
_FIELDS = st.sampled_from(
    ["parameters", "continues", "error", "state", "keys", "mac", "version", "valid", "stale"]
)


@pytest.mark.promise(10)
@given(st.dictionaries(_FIELDS, _JSON | st.dictionaries(_FIELDS, _JSON, max_size=4), max_size=4))
def test_any_json_is_a_reply_or_a_bad_message(message: dict[str, object]) -> None:
    try:
        reply = parse_reply(json.dumps(message).encode())
    except BadMessage:
        return
    assert message.keys() <= {"parameters", "continues", "error"}
    if reply.error is not None:
        assert isinstance(named_error(reply.error, reply.parameters), UnsealerdError)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"parameters":' * 50_000,
        b'{"parameters":{"a":NaN}}',
        b'{"parameters":{"a":' + b"9" * 10_000 + b"}}",
        b'{"parameters":[]}',
        b'{"continues":1}',
        b'{"error":7}',
        b'{"error":"a.B","continues":true}',
        b'{"extra":1}',
    ],
)
def test_what_is_no_reply(frame: bytes) -> None:
    with pytest.raises(BadMessage):
        parse_reply(frame)


@given(st.lists(st.binary(max_size=20).map(lambda data: data.replace(b"\0", b"")), max_size=6), st.data())
def test_frames_do_not_depend_on_the_pieces(frames: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(frame + b"\0" for frame in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    reader = FrameReader(20)
    found: list[bytes] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        reader.feed(stream[start:end])
        found += iter(reader.frame, None)
    assert found == frames
    assert reader.empty


@pytest.mark.parametrize("data", [b"x" * 21, b"x" * 21 + b"\0"])
def test_a_frame_has_a_bound(data: bytes) -> None:
    reader = FrameReader(20)
    reader.feed(data)
    with pytest.raises(BadMessage):
        reader.frame()


@pytest.mark.promise(10)
@pytest.mark.parametrize(
    "data", [b"\0", b"{}\0{}\0", b"\xff\xfe\0", b'{"parameters":{}', b'{"continues":true}\0']
)
def test_a_broken_daemon_gives_a_named_error(daemon: StubDaemon, client: Client, data: bytes) -> None:
    daemon.answers["Keys.ListKeys"] = data
    with pytest.raises((BadMessage, DaemonUnreachable)):
        client.keys()


def test_no_answer_belongs_to_a_later_question(daemon: StubDaemon) -> None:
    twice = json.dumps({"parameters": {"n": 1}}).encode() + b"\0"
    daemon.answers["Keys.ListKeys"] = twice + twice
    with Connection(daemon.directory / "keys") as connection:
        assert connection.call("io.unsealerd.Keys.ListKeys") == {"n": 1}
        with pytest.raises(BadMessage):
            connection.call("io.unsealerd.Keys.ListKeys")


def test_errors_travel_by_name() -> None:
    assert isinstance(named_error("io.unsealerd.Keys.Locked", {}), Locked)
    assert named_error("io.unsealerd.Admin.BadRequest", {"detail": "why"}).detail == "why"
    assert isinstance(named_error("org.varlink.service.InvalidParameter", {"parameter": "x"}), BadRequest)
    refused = named_error("io.unsealerd.Admin.SealRefused", {"reason": "pcr_mismatch"})
    assert isinstance(refused, SealRefused)
    assert refused.reason is LockReason.PCR_MISMATCH
    for odd in ("Locked", "com.example.Locked", "io.unsealerd.UnsealerdError", "io.unsealerd.Keys.Fault", ""):
        assert isinstance(named_error(odd, {}), BadMessage)


def test_the_library_is_cheap_to_import() -> None:
    code = "import sys, unsealerd.client; print(*sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {
        "msgspec",
        "click",
        "rich",
        "cryptography",
        "grpc",
        "asyncio",
        "dataclasses",
        "inspect",
        "logging",
    }
    assert not heavy & set(loaded)
    assert [name for name in loaded if name.startswith("unsealerd.")] == [
        "unsealerd.client",
        "unsealerd.client.client",
        "unsealerd.client.connection",
        "unsealerd.errors",
        "unsealerd.model",
    ]
