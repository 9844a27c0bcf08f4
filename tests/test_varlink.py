"""The Varlink server: protocol, order, streams and errors."""

import json
import logging
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import varlink
from rigs.toyserver import DESCRIPTION, PATIENCE, ToyServer, frame, toy_server

from unsealerd.daemon.caller import Peer
from unsealerd.daemon.interface import load_description
from unsealerd.daemon.listener import Listener
from unsealerd.daemon.varlink import Connection, Limits, Method
from unsealerd.errors import AccessDenied, CallerChanged, ConfigInvalid, StorageFailed


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[ToyServer]:
    with toy_server(tmp_path / "toy") as server:
        yield server


# --- an independent client


def test_the_varlink_package_introspects_and_calls(toy: ToyServer) -> None:
    with varlink.Client(f"unix:{toy.path}") as client:
        assert client.get_interfaces() == ["org.varlink.service", "org.example.toy"]
        assert client.info["vendor"] == "Example"
        assert client.info["url"] == "https://example.org"
        with client.open("org.example.toy") as connection:
            assert connection.Echo('häl"lo\n')["text"] == 'häl"lo\n'
            assert connection.Add({"left": 40, "right": 2})["sum"] == 42
            assert [one["number"] for one in connection.Count(3, _more=True)] == [0, 1, 2, 3]
            with pytest.raises(varlink.VarlinkError) as refused:
                connection.Refuse()
            assert refused.value.error() == "org.example.toy.AccessDenied"
            connection.Note(_oneway=True)
            assert connection.Echo("after")["text"] == "after"
            assert toy.toy.notes == 1


def test_descriptions_are_given(toy: ToyServer) -> None:
    with toy.wire() as wire:
        get = "org.varlink.service.GetInterfaceDescription"
        assert wire.call(get, {"interface": "org.example.toy"}) == {
            "parameters": {"description": DESCRIPTION}
        }
        own = wire.call(get, {"interface": "org.varlink.service"})["parameters"]["description"]
        assert "method GetInfo()" in own
        assert wire.call(get, {"interface": "org.example.none"}) == {
            "error": "org.varlink.service.InterfaceNotFound",
            "parameters": {"interface": "org.example.none"},
        }


@pytest.mark.parametrize(
    "name", ["io.unsealerd.Keys", "io.unsealerd.Admin", "io.unsealerd.Unlock", "org.varlink.service"]
)
def test_the_packages_own_descriptions_load_and_parse(name: str) -> None:
    text = load_description(name)
    assert varlink.Interface(text).name == name


# --- calls and answers


def test_answers_come_in_the_order_of_the_calls(toy: ToyServer) -> None:
    with toy.wire() as wire, toy.wire() as other:
        calls = [frame("Echo", {"text": str(n)}) for n in range(100)]
        wire.sock.sendall(b"".join(calls[:50]) + frame("Wait") + b"".join(calls[50:]))
        assert [wire.receive() for _ in range(50)] == [{"parameters": {"text": str(n)}} for n in range(50)]
        # What waits on one connection holds up no other.
        assert other.call("Echo", {"text": "other"}) == {"parameters": {"text": "other"}}
        toy.thread.call(toy.toy.release.set)
        assert wire.receive() == {"parameters": {"text": "waited"}}
        assert [wire.receive() for _ in range(50)] == [
            {"parameters": {"text": str(n)}} for n in range(50, 100)
        ]


def test_an_error_of_an_awaitable_is_answered(toy: ToyServer) -> None:
    with toy.wire() as wire:
        wire.send("WaitAndRefuse")
        wire.send("Echo", {"text": "next"})
        toy.thread.call(toy.toy.release.set)
        assert wire.receive() == {"error": "org.example.toy.Locked", "parameters": {}}
        assert wire.receive() == {"parameters": {"text": "next"}}


def test_oneway_is_never_answered(toy: ToyServer) -> None:
    with toy.wire() as wire:
        toy.thread.call(toy.toy.release.set)
        for method in ("Note", "Refuse", "NoSuch", "org.example.none.Note", "Wait", "WaitAndRefuse"):
            wire.send(method, oneway=True)
        wire.send("Note", {"unknown": 1}, oneway=True)
        assert wire.call("Echo", {"text": "first answer"}) == {"parameters": {"text": "first answer"}}
    assert toy.toy.notes == 1
    assert toy.toy.waiting == 2


@pytest.mark.parametrize("number", [1, 200, 1000])
def test_oneway_calls_of_a_client_that_is_gone_are_done(toy: ToyServer, number: int) -> None:
    with toy.wire() as wire:
        wire.sock.sendall(frame("Note", oneway=True) * number)
    toy.thread.until(lambda: toy.toy.notes == number)


def test_a_call_that_nobody_waits_for_is_given_up(toy: ToyServer) -> None:
    """The connection is free at once; what is ``oneway``, before and after it, is done."""
    with toy.wire() as wire:
        wire.send("Wait", oneway=True)
        toy.thread.until(lambda: toy.toy.waiting == 1)
        wire.sock.sendall(frame("Wait") + frame("Note", oneway=True))
    assert len(toy.server.connections) == 1  # the first waits on
    toy.thread.call(toy.toy.release.set)
    toy.thread.call(toy.toy.release.clear)
    toy.thread.until(lambda: toy.toy.notes == 1 and not toy.server.connections)
    with toy.wire() as wire:
        wire.send("Wait")
        toy.thread.until(lambda: toy.toy.waiting == 3)
    toy.thread.until(lambda: not toy.server.connections)


def test_a_client_that_stops_sending_gets_its_answers(toy: ToyServer) -> None:
    with toy.wire() as wire:
        wire.sock.sendall(frame("Echo", {"text": "x"}) * 100 + frame("Wait") + frame("Echo", {"text": "y"}))
        wire.sock.shutdown(socket.SHUT_WR)
        assert [wire.receive() for _ in range(100)] == [{"parameters": {"text": "x"}}] * 100
        toy.thread.call(toy.toy.release.set)
        assert wire.receive() == {"parameters": {"text": "waited"}}
        assert wire.receive() == {"parameters": {"text": "y"}}
        assert wire.receive() is None


def test_half_a_message_at_the_end_is_no_message(toy: ToyServer) -> None:
    with toy.wire() as wire:
        wire.sock.sendall(frame("Echo", {"text": "whole"}) + frame("Note")[:-1])
        wire.sock.shutdown(socket.SHUT_WR)
        assert wire.receive() == {"parameters": {"text": "whole"}}
        assert wire.receive() is None
    assert toy.toy.notes == 0


def test_an_awaitables_answer_is_given_at_shutdown(tmp_path: Path) -> None:
    with toy_server(tmp_path / "toy") as toy, toy.wire() as wire:
        wire.send("Wait")
        toy.thread.until(lambda: toy.toy.waiting == 1)

        async def close() -> None:
            toy.thread.loop.call_later(0.05, toy.toy.release.set)
            await toy.server.close(grace=PATIENCE)

        toy.thread.run(close())
        assert wire.receive() == {"parameters": {"text": "waited"}}
        assert wire.receive() is None
        assert not toy.path.exists()


# --- refusals


@pytest.mark.parametrize(
    ("method", "parameters", "flags", "error", "facts"),
    [
        ("org.example.none.X", {}, {}, "InterfaceNotFound", {"interface": "org.example.none"}),
        ("org.example.toy.X", {}, {}, "MethodNotFound", {"method": "org.example.toy.X"}),
        ("org.example.toy.Absent", {}, {}, "MethodNotImplemented", {"method": "org.example.toy.Absent"}),
        ("org.example.toy.", {}, {}, "MethodNotFound", {"method": "org.example.toy."}),
        ("org.varlink.service.X", {}, {}, "MethodNotFound", {"method": "org.varlink.service.X"}),
        ("Echo", {}, {}, "InvalidParameter", {"parameter": "text"}),
        ("Echo", {"text": 1}, {}, "InvalidParameter", {"parameter": "text"}),
        ("Echo", {"text": "x", "extra": 1}, {}, "InvalidParameter", {"parameter": "extra"}),
        ("Add", {"pair": {"left": 1, "right": "x"}}, {}, "InvalidParameter", {"parameter": "pair"}),
        ("Add", {"pair": {"left": 1}}, {}, "InvalidParameter", {"parameter": "pair"}),
        ("Add", {"pair": {"left": 10**5000, "right": 1}}, {}, "InvalidParameter", {"parameter": "pair"}),
        ("Sign", {"message": "?"}, {}, "InvalidParameter", {"parameter": "message"}),
        ("Note", {"x": 1}, {}, "InvalidParameter", {"parameter": "x"}),
        ("Note", {}, {"upgrade": True}, "InvalidParameter", {"parameter": "upgrade"}),
        ("Count", {"upto": 1}, {}, "ExpectedMore", {}),
        ("Count", {"upto": "x"}, {"more": True}, "InvalidParameter", {"parameter": "upto"}),
    ],
)
def test_a_refusal_says_what_is_wrong(
    toy: ToyServer,
    method: str,
    parameters: dict[str, Any],
    flags: dict[str, bool],
    error: str,
    facts: dict[str, Any],
) -> None:
    sys.set_int_max_str_digits(0)  # for the sender of the test
    with toy.wire() as wire:
        assert wire.call(method, parameters, **flags) == {
            "error": f"org.varlink.service.{error}",
            "parameters": facts,
        }
        # A refused call is no reason to close.
        assert wire.call("Echo", {"text": "still here"}) == {"parameters": {"text": "still here"}}
    assert toy.toy.notes == 0


def test_parameters_must_be_an_object(toy: ToyServer) -> None:
    with toy.wire() as wire:
        for text in (b"null", b"[]", b"1", b'"x"'):
            wire.sock.sendall(b'{"method":"org.example.toy.Note","parameters":' + text + b"}\0")
            found = wire.receive()
            assert found is not None
            assert found["error"] == "org.varlink.service.InvalidParameter"
    assert toy.toy.notes == 0


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"x",
        b"null",
        b"[]",
        b"{}",
        b'{"method":1}',
        b'{"method":"org.example.toy.Note"',
        b'{"method":"org.example.toy.Note"} x',
        b'{"method":"org.example.toy.Note","unknown":1}',
        b'{"method":"org.example.toy.Note","oneway":1}',
        b'{"method":"\xff"}',
        b'{"method":"\\ud800"}',
        b'{"method":"a","parameters":' + b"[" * 100_000 + b"}",
    ],
)
@pytest.mark.promise(10)
def test_what_is_no_call_is_answered_and_ends_the_connection(toy: ToyServer, message: bytes) -> None:
    with toy.wire() as wire:
        wire.sock.sendall(frame("Echo", {"text": "before"}) + message + b"\0")
        assert wire.receive() == {"parameters": {"text": "before"}}
        assert wire.receive() == {"error": "org.example.toy.BadRequest", "parameters": {}}
        assert wire.receive() is None
    with toy.wire() as wire:
        assert wire.call("Echo", {"text": "lives"}) == {"parameters": {"text": "lives"}}


def test_a_peer_is_told_the_name_and_no_more(tmp_path: Path) -> None:
    with toy_server(tmp_path / "plain") as toy, toy.wire() as wire:
        assert wire.call("Refuse") == {"error": "org.example.toy.AccessDenied", "parameters": {}}
    with toy_server(tmp_path / "admin", details=True) as toy, toy.wire() as wire:
        assert wire.call("Refuse") == {
            "error": "org.example.toy.AccessDenied",
            "parameters": {"detail": "only for the administrator's eyes"},
        }


@pytest.mark.parametrize("method", ["Bug", "WaitAndFail"])
def test_a_bug_ends_the_connection_and_tells_nothing(
    toy: ToyServer, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    toy.thread.call(toy.toy.release.set)
    with caplog.at_level(logging.DEBUG), toy.wire() as wire:
        wire.sock.sendall(frame(method) + frame("Note"))
        assert wire.receive() is None
    assert "handler_bug type=ValueError" in caplog.text
    assert "must not be logged" not in caplog.text
    assert toy.toy.notes == 0
    toy.thread.until(lambda: not toy.server.connections)
    with toy.wire() as wire:
        assert wire.call("Echo", {"text": "lives"}) == {"parameters": {"text": "lives"}}


def test_a_method_must_refuse_unknown_fields() -> None:
    class Lax(msgspec.Struct):
        text: str

    with pytest.raises(TypeError, match="unknown fields"):
        Method(Lax, lambda connection, parameters: None)


# --- streams


def test_a_stream_ends_before_the_next_call_is_answered(toy: ToyServer) -> None:
    with toy.wire() as wire:
        wire.sock.sendall(frame("Count", {"upto": 2}, more=True) + frame("Echo", {"text": "next"}))
        assert [wire.receive() for _ in range(4)] == [
            {"parameters": {"number": 0}, "continues": True},
            {"parameters": {"number": 1}, "continues": True},
            {"parameters": {"number": 2}},
            {"parameters": {"text": "next"}},
        ]


def test_a_stream_may_be_refused(toy: ToyServer) -> None:
    with toy.wire() as wire:
        assert wire.call("Count", {"upto": -1}, more=True) == {
            "error": "org.example.toy.AccessDenied",
            "parameters": {},
        }
        assert wire.call("Echo", {"text": "next"}) == {"parameters": {"text": "next"}}


def test_more_on_a_method_of_one_answer_gives_one(toy: ToyServer) -> None:
    with toy.wire() as wire:
        assert wire.call("Echo", {"text": "x"}, more=True) == {"parameters": {"text": "x"}}


def test_a_stream_fails_with_an_error(toy: ToyServer) -> None:
    with toy.wire() as wire:
        assert wire.call("Watch", more=True) == {"parameters": {"event": "begin"}, "continues": True}
        wire.send("Echo", {"text": "queued"})
        toy.thread.call(toy.toy.publish, "something")
        toy.thread.call(toy.toy.streams[0].fail, AccessDenied("x"))
        assert wire.receive() == {"parameters": {"event": "something"}, "continues": True}
        assert wire.receive() == {"error": "org.example.toy.AccessDenied", "parameters": {}}
        assert wire.receive() == {"parameters": {"text": "queued"}}
    assert toy.toy.streams[0].closed
    toy.thread.call(toy.toy.publish, "to nobody")


@pytest.mark.parametrize("how", ["close", "stop sending, then close"])
def test_a_stream_is_told_when_its_client_is_gone(toy: ToyServer, how: str) -> None:
    with toy.wire() as wire:
        wire.call("Watch", more=True)
        if how != "close":
            wire.sock.shutdown(socket.SHUT_WR)
            toy.thread.call(toy.toy.publish, "still read")
            assert wire.receive() == {"parameters": {"event": "still read"}, "continues": True}
            assert toy.toy.streams_lost == 0
    toy.thread.until(lambda: toy.toy.streams_lost == 1)
    assert toy.toy.streams[0].closed
    toy.thread.until(lambda: not toy.server.connections)


# --- the caller


class FakePeer:
    """A peer that changes when it is told to."""

    def __init__(self, real: Peer) -> None:
        self.caller = real.caller
        self.changed = False
        self.checks = 0
        self.close = real.close

    def check(self) -> None:
        self.checks += 1
        if self.changed:
            raise CallerChanged


def test_the_caller_is_checked_before_each_answer(tmp_path: Path) -> None:
    peers: list[FakePeer] = []

    def peer_of(sock: socket.socket) -> Any:
        peers.append(FakePeer(Peer.of(sock)))
        return peers[-1]

    changed = {"error": "org.example.toy.CallerChanged", "parameters": {}}
    with toy_server(tmp_path / "toy", peer_of=peer_of) as toy:
        for provoke in ("Echo", "Wait", "Watch"):
            with toy.wire() as wire:
                assert wire.call("Echo", {"text": "me"}) == {"parameters": {"text": "me"}}
                if provoke == "Watch":
                    wire.call("Watch", more=True)
                peers[-1].changed = True
                if provoke == "Watch":
                    toy.thread.call(toy.toy.publish, "not for you")
                else:
                    wire.send(provoke, {"text": "not me"} if provoke == "Echo" else None)
                assert wire.receive() == changed
                assert wire.receive() is None
        assert toy.toy.waiting == 0  # an awaitable of a changed caller does not even begin
        with toy.wire() as wire:
            wire.send("Wait")
            toy.thread.until(lambda: toy.toy.waiting == 1)
            peers[-1].changed = True
            toy.thread.call(toy.toy.release.set)
            assert wire.receive() == changed
            assert wire.receive() is None


HEIR = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
message = bytes.fromhex(sys.argv[2])
sock.sendall(message)
assert sock.recv(4096), "the first call is answered"
if os.fork():
    os._exit(0)
sys.stdin.read()  # until the test saw the parent go
sock.sendall(message)
answer = b""
while piece := sock.recv(4096):
    answer += piece
os.write(1, answer)
"""


def test_a_child_does_not_inherit_its_parents_identity(toy: ToyServer) -> None:
    message = frame("Echo", {"text": "me"})
    arguments = [sys.executable, "-c", HEIR, str(toy.path), message.hex()]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.wait(PATIENCE) == 0
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdin.close()
        answer = parent.stdout.read()
    assert json.loads(answer.rstrip(b"\0"))["error"] == "org.example.toy.CallerChanged"


def test_hooks_see_each_connection(tmp_path: Path) -> None:
    seen: list[str] = []

    def connected(connection: Connection) -> None:
        connection.state = connection.peer.caller.pid
        seen.append(f"+{connection.state}")

    def disconnected(connection: Connection) -> None:
        connection.peer.check()  # still there
        seen.append(f"-{connection.state}")

    with toy_server(tmp_path / "toy", on_connect=connected, on_disconnect=disconnected) as toy:
        with toy.wire() as wire:
            wire.call("Note")
        toy.thread.until(lambda: len(seen) == 2)
    assert seen == [f"+{os.getpid()}", f"-{os.getpid()}"]


def test_a_connection_may_be_refused(tmp_path: Path) -> None:
    def connected(connection: Connection) -> None:
        raise AccessDenied

    gone: list[Connection] = []
    with toy_server(tmp_path / "toy", on_connect=connected, on_disconnect=gone.append) as toy:
        with toy.wire() as wire:
            assert wire.receive() == {"error": "org.example.toy.AccessDenied", "parameters": {}}
            assert wire.receive() is None
        toy.thread.until(lambda: not toy.server.connections)
    assert gone == []


# --- the socket


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_a_socket_has_its_mode_from_the_start(
    tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    born: list[int] = []
    groups: list[int] = []
    real = os.chmod

    def chmod(target: Path, wanted: int) -> None:
        born.append(stat.S_IMODE(os.stat(target).st_mode))
        real(target, wanted)

    def chown(target: Path, uid: int, gid: int, *, follow_symlinks: bool) -> None:
        born.append(stat.S_IMODE(os.stat(target).st_mode))
        groups.append(gid)

    before = os.umask(0)
    try:
        monkeypatch.setattr(os, "chmod", chmod)
        monkeypatch.setattr(os, "chown", chown)
        listener = Listener.bind(path, mode, 4242)
    finally:
        os.umask(before)
    assert born == [0o600, 0o600]
    assert groups == [4242]
    assert stat.S_IMODE(path.stat().st_mode) == mode
    listener.close()
    assert not path.exists()


def test_a_stale_socket_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    listener = Listener.bind(path, 0o600)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    other = Listener.bind(path, 0o600)  # in its place
    listener.close()
    assert path.exists(), "a socket that is not ours stays"
    other.close()
    path.write_text("a file")
    with pytest.raises(StorageFailed):
        Listener.bind(path, 0o600)
    assert path.read_text() == "a file"


def test_a_path_that_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="longer"):
        Listener.bind(tmp_path / ("x" * 108), 0o600)
    with pytest.raises(StorageFailed):
        Listener.bind(tmp_path / "no" / "s", 0o600)


def test_a_ready_socket_is_adopted(tmp_path: Path) -> None:
    with toy_server(tmp_path / "toy", listen=False) as toy, socket.socket(socket.AF_UNIX) as ready:
        ready.bind(str(toy.path))
        ready.listen()
        toy.thread.run(toy.server.adopt(ready.dup()))
        with toy.wire() as wire:
            assert wire.call("Echo", {"text": "x"}) == {"parameters": {"text": "x"}}


def test_a_limit_of_the_default_lets_a_whole_message_through(toy: ToyServer) -> None:
    with toy.wire() as wire:
        room = Limits().message_bytes - len(frame("Echo", {"text": ""})) + 1
        for size in (room, 5000, room, 1):
            assert wire.call("Echo", {"text": "x" * size}) == {"parameters": {"text": "x" * size}}
