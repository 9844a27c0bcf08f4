"""What a slow or hostile client may cost, and that it costs nobody else anything."""

import errno
import gc
import os
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from rigs.limits import in_time
from rigs.toyserver import PATIENCE, Wire, frame, toy_server

from unsealerd.daemon.caller import Caller
from unsealerd.daemon.varlink import Connection, Limits

LIMIT = {"error": "org.example.toy.LimitExceeded", "parameters": {}}


def serve_the_victim(victim: Wire, calls: int = 100) -> None:
    for number in range(calls):
        assert victim.call("Echo", {"text": str(number)}) == {"parameters": {"text": str(number)}}


def fill(sock: socket.socket, data: bytes, most: int) -> int:
    """Send until the other side takes no more, or ends it; return how much went."""
    sock.settimeout(0.2)
    sent = 0
    try:
        while sent < most:
            sent += sock.send(data[sent % len(data) :])
    except (TimeoutError, BrokenPipeError, ConnectionResetError):
        pass
    sock.settimeout(PATIENCE)
    return sent


# --- size


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.promise(10)
def test_a_message_beyond_the_limit_is_refused(tmp_path: Path, ended: bool) -> None:
    with toy_server(tmp_path / "toy", Limits(message_bytes=6000)) as toy:
        with toy.wire() as wire:
            room = 6000 - len(frame("Echo", {"text": ""})) + 1
            assert "parameters" in wire.call("Echo", {"text": "x" * room})
            message = frame("Echo", {"text": "x" * (room + 1)})
            wire.sock.sendall(message if ended else message[:-1])
            assert wire.receive() == LIMIT
            assert wire.receive() is None
        with toy.wire() as wire:
            serve_the_victim(wire, 1)


def test_a_buffer_is_no_larger_than_a_message(tmp_path: Path) -> None:
    with toy_server(tmp_path / "toy", Limits(message_bytes=70_000)) as toy, toy.wire() as wire:
        wire.call("Note")
        wire.sock.sendall(b"x" * 70_000)

        def held() -> int:
            [connection] = toy.server.connections
            return connection._filled

        toy.thread.until(lambda: held() == 70_000)
        [connection] = toy.server.connections
        assert connection._held is not None
        assert len(connection._held) == 70_001


def test_an_endless_message_costs_no_memory(tmp_path: Path) -> None:
    with toy_server(tmp_path / "toy") as toy, toy.wire() as wire:
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(1000):
                wire.sock.sendall(b"x" * 65536)
        toy.thread.until(lambda: not toy.server.connections)


# --- time


@pytest.mark.parametrize("trickle", [False, True])
def test_half_a_message_is_not_waited_for_for_ever(tmp_path: Path, trickle: bool) -> None:
    with toy_server(tmp_path / "toy", Limits(message_seconds=0.3)) as toy, toy.wire() as slow:
        slow.sock.sendall(frame("Note") + b'{"method"')
        assert slow.receive() == {"parameters": {}}
        with toy.wire() as victim:
            serve_the_victim(victim)
        if trickle:  # each byte in time, the message not
            slow.sock.settimeout(0.05)
            answer = b""
            while not answer:
                try:
                    slow.sock.send(b" ")
                    answer = slow.sock.recv(4096)
                except TimeoutError:
                    continue
                except (BrokenPipeError, ConnectionResetError):
                    answer = slow.sock.recv(4096)
            assert b"LimitExceeded" in answer
        else:
            assert slow.receive() == LIMIT
            assert slow.receive() is None


def test_the_time_is_for_one_message_not_for_all(tmp_path: Path) -> None:
    """A client that always has begun its next message is fine, as long as each is complete in time."""

    def longer_than(seconds: float) -> None:
        limits = Limits(message_seconds=seconds)
        with toy_server(tmp_path / f"toy{seconds}", limits) as toy, toy.wire() as wire:
            message = frame("Echo", {"text": "x"})
            started = toy.thread.loop.time()
            wire.sock.sendall(message[:10])
            while toy.thread.loop.time() < started + 2.4 * seconds:
                wire.sock.sendall(message[10:] + message[:10])
                assert wire.receive() == {"parameters": {"text": "x"}}

    in_time(longer_than)


def test_an_idle_connection_stays(tmp_path: Path) -> None:
    limits = Limits(message_seconds=0.05, stall_seconds=0.05)
    with toy_server(tmp_path / "toy", limits) as toy, toy.wire() as idle, toy.wire() as slow:
        assert idle.call("Note") == {"parameters": {}}
        slow.sock.sendall(b"x")
        assert slow.receive() == LIMIT  # so the time has passed
        assert idle.call("Note") == {"parameters": {}}


# --- clients that do not read


def test_a_client_that_does_not_read_is_read_no_more_and_then_closed(tmp_path: Path) -> None:
    limits = Limits(outgoing_bytes=10_000, stall_seconds=1.0)
    with toy_server(tmp_path / "toy", limits) as toy, toy.wire() as greedy, toy.wire() as victim:
        call = frame("Big", {"size": 5000})
        sent = fill(greedy.sock, call * 100, 100_000_000)
        assert sent < 2_000_000, "its calls back up"
        # Answers stop at the limit, above what the kernel takes.
        answered = toy.toy.notes * 5000
        assert answered < 10_000 + 3 * 5000 + 2 * greedy.sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        serve_the_victim(victim)
        toy.thread.until(lambda: len(toy.server.connections) == 1)
        serve_the_victim(victim, 1)


def test_a_client_that_reads_late_loses_nothing(tmp_path: Path) -> None:

    def catch_up(seconds: float) -> None:
        limits = Limits(outgoing_bytes=10_000, stall_seconds=seconds)
        with toy_server(tmp_path / f"toy{seconds}", limits) as toy, toy.wire() as late:
            call = frame("Big", {"size": 5000})
            sent = fill(late.sock, call * 100, 100_000_000)
            for _ in range(sent // len(call)):
                assert late.receive() == {"parameters": {"text": "x" * 5000}}
            half = sent % len(call)
            late.sock.sendall(call[half:])
            assert late.receive() == {"parameters": {"text": "x" * 5000}}
            caught_up = toy.thread.loop.time()
            while toy.thread.loop.time() < caught_up + seconds + 0.1:  # the time to catch up does not run on
                serve_the_victim(late)

    in_time(catch_up, (0.6, 5.0, 30.0))


def test_reading_goes_on_when_nothing_is_held(tmp_path: Path) -> None:
    """Calls that fill the buffer exactly, and answers of which each is too much to be sent at once."""
    limits = Limits(read_bytes=4096, outgoing_bytes=1000, stall_seconds=PATIENCE)
    with toy_server(tmp_path / "toy", limits) as toy, toy.wire() as wire:
        call = frame("Big", {"size": 300_000})
        wire.sock.sendall((call[:-1] + b" " * (4096 - len(call)) + b"\0") * 20)
        for _ in range(20):
            assert wire.receive() == {"parameters": {"text": "x" * 300_000}}


def test_a_closed_connection_does_not_linger_for_a_client_that_does_not_read(tmp_path: Path) -> None:
    limits = Limits(outgoing_bytes=10_000_000, stall_seconds=0.2)
    with toy_server(tmp_path / "toy", limits) as toy, toy.wire() as wire:
        wire.send("Big", {"size": 5_000_000})
        wire.sock.sendall(b"not a call\0")
        toy.thread.until(lambda: toy.toy.notes == 1 and not toy.server.connections)


def test_a_slow_monitor_is_dropped_and_the_others_are_not(tmp_path: Path) -> None:
    with (
        toy_server(tmp_path / "toy", Limits(outgoing_bytes=20_000)) as toy,
        toy.wire() as slow,
        toy.wire() as quick,
    ):
        slow.call("Watch", more=True)
        quick.call("Watch", more=True)
        event = "e" * 1000
        published = 0
        while toy.toy.streams_lost == 0:
            toy.thread.call(toy.toy.publish, event)
            published += 1
            assert quick.receive() == {"parameters": {"event": event}, "continues": True}
            assert published < 10_000
        assert toy.toy.streams[0].closed
        assert not toy.toy.streams[1].closed


def test_a_monitor_that_sends_on_without_end_is_closed(tmp_path: Path) -> None:
    with toy_server(tmp_path / "toy") as toy, toy.wire() as wire:
        wire.call("Watch", more=True)
        with suppress(BrokenPipeError, ConnectionResetError):
            wire.sock.sendall(frame("Note") * 10_000)
        toy.thread.until(lambda: toy.toy.streams_lost == 1)
        assert toy.toy.notes == 0


# --- many


def test_connections_are_limited_in_total(tmp_path: Path) -> None:
    with toy_server(tmp_path / "toy", Limits(connections=3)) as toy, ExitStack() as stack:
        wires = [stack.enter_context(toy.wire()) for _ in range(3)]
        for wire in wires:
            serve_the_victim(wire, 1)
        with toy.wire() as beyond:
            assert beyond.receive() == LIMIT
            assert beyond.receive() is None
        serve_the_victim(wires[0])
        wires[1].sock.close()
        toy.thread.until(lambda: len(toy.server.connections) == 2)
        serve_the_victim(stack.enter_context(toy.wire()))


def test_connections_are_limited_for_each_user(tmp_path: Path) -> None:
    seen: list[Connection] = []
    limits = Limits(connections_per_uid=2)
    with toy_server(tmp_path / "toy", limits, on_connect=seen.append) as toy, ExitStack() as stack:
        for _ in range(2):
            serve_the_victim(stack.enter_context(toy.wire()), 1)
        with toy.wire() as beyond:
            assert beyond.receive() == LIMIT
            assert beyond.receive() is None
        assert len(seen) == 2
        # Another user's connections count for that one only.
        uid = os.getuid()
        toy.thread.call(lambda: toy.server._per_uid.update({uid + 1: 2, uid: -1}))
        serve_the_victim(stack.enter_context(toy.wire()), 1)
        toy.thread.call(lambda: toy.server._per_uid.update({uid: 1}))


@pytest.mark.parametrize("entitled", [True, False])
def test_the_last_places_are_for_those_who_may_do_something(tmp_path: Path, entitled: bool) -> None:
    """Whoever may make user namespaces has thousands of uids, each with its own bound."""
    limits = Limits(connections=3, reserved=1)
    asked: list[Caller] = []

    def says(caller: Caller) -> bool:
        asked.append(caller)
        return entitled

    with toy_server(tmp_path / "toy", limits, entitled=says) as toy, ExitStack() as stack:
        for _ in range(2):
            serve_the_victim(stack.enter_context(toy.wire()), 1)
        assert asked == []
        with toy.wire() as last:
            if entitled:
                serve_the_victim(last, 1)
                with toy.wire() as beyond:
                    assert beyond.receive() == LIMIT
            else:
                assert last.receive() == LIMIT
        assert [caller.pid for caller in asked] == [os.getpid()]


def test_running_out_of_descriptors_ends_a_connection_not_the_server(tmp_path: Path) -> None:
    def no_more(sock: socket.socket) -> object:
        if shortage:
            raise OSError(errno.EMFILE, "too many open files")
        from unsealerd.daemon.caller import Peer

        return Peer.of(sock)

    shortage = True
    with toy_server(tmp_path / "toy", peer_of=no_more) as toy:
        with toy.wire() as wire:
            assert wire.receive() == LIMIT
            assert wire.receive() is None
        shortage = False
        with toy.wire() as wire:
            serve_the_victim(wire, 1)


# --- fairness


def test_a_pipeline_takes_turns_with_the_others(tmp_path: Path) -> None:
    """Two thousand calls that are there first do not stand before one that came a moment later."""
    with toy_server(tmp_path / "toy", listen=False) as toy, socket.socket(socket.AF_UNIX) as ready:
        ready.bind(str(toy.path))
        ready.listen()
        with toy.wire() as hostile, toy.wire() as victim:
            hostile.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            call = frame("Echo", {"text": ""})
            pipelined = fill(hostile.sock, call * 2000, 2000 * len(call)) // len(call)
            assert pipelined > 1000
            victim.send("Echo", {"text": "victim"})
            toy.thread.run(toy.server.adopt(ready.dup()))
            assert victim.receive() == {"parameters": {"text": "victim"}}
            toy.thread.until(lambda: len(toy.toy.order) >= pipelined)
            owner = {id(one): one for one in toy.toy.order}
            counts = {key: toy.toy.order.count(one) for key, one in owner.items()}
            lone = next(one for key, one in owner.items() if counts[key] == 1)
            assert toy.toy.order.index(lone) <= 3 * Limits().messages_per_turn


@pytest.mark.parametrize(
    "hostile",
    [
        lambda wire: wire.sock.sendall(b'{"method":"org.example.toy.Note"'),
        lambda wire: wire.sock.sendall(frame("Wait")),
        lambda wire: fill(wire.sock, frame("Big", {"size": 100_000}) * 100, 1_000_000),
        lambda wire: wire.call("Watch", more=True),
        lambda wire: wire.sock.sendall(b"\0" * 1000),
        lambda wire: wire.sock.shutdown(socket.SHUT_WR),
    ],
    ids=["half a message", "waits", "never reads", "monitor", "empty messages", "half closed"],
)
def test_nobody_else_is_delayed(tmp_path: Path, hostile: Callable[[Wire], object]) -> None:
    with toy_server(tmp_path / "toy") as toy, ExitStack() as stack:
        for _ in range(20):
            hostile(stack.enter_context(toy.wire()))
        with toy.wire() as victim:
            serve_the_victim(victim)


def test_two_hundred_hostile_connections_cost_constant_memory(tmp_path: Path) -> None:
    limits = Limits(message_seconds=600, stall_seconds=600)  # what is counted is not to end by itself
    with toy_server(tmp_path / "toy", limits) as toy, ExitStack() as stack:
        victim = stack.enter_context(toy.wire())
        serve_the_victim(victim, 10)

        def used() -> int:
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        def settle() -> None:
            toy.thread.until(lambda: len(toy.server.connections) == 201)
            serve_the_victim(victim, 10)

        tracemalloc.start()
        try:
            before = used()
            hostile = [stack.enter_context(toy.wire()) for _ in range(200)]
            settle()
            idle = used()
            assert idle - before < 200 * 8_000, "client, transport and connection together"
            for wire in hostile:
                wire.sock.sendall(b'{"method":"' + b"x" * 3000)
            settle()
            assert used() - idle < 200 * 6_000, "one small buffer each"
            for wire in hostile:
                wire.sock.sendall(b"y" * 30_000)
            settle()
            assert used() - idle < 200 * 70_000
            for wire in hostile:
                wire.sock.sendall(b"\0")  # not a call: all are closed, and nothing is left of them
            toy.thread.until(lambda: len(toy.server.connections) == 1)
            assert used() - before < 200 * 1_500
        finally:
            tracemalloc.stop()
        serve_the_victim(victim)


def test_connections_leave_no_descriptor_behind(tmp_path: Path) -> None:
    with toy_server(tmp_path / "toy") as toy:
        with toy.wire() as wire:
            serve_the_victim(wire, 1)
        toy.thread.until(lambda: not toy.server.connections)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            with toy.wire() as wire:
                serve_the_victim(wire, 1)
                wire.sock.shutdown(socket.SHUT_WR)
        toy.thread.until(lambda: not toy.server.connections)
        # Not one for each; other threads of this process have descriptors of their own.
        assert len(os.listdir("/proc/self/fd")) < before + 25


FLOOD = """
import socket, sys
message = bytes.fromhex(sys.argv[2])
print("ready", flush=True)
while True:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(sys.argv[1])
        try:
            sock.sendall(message)
        except OSError:
            pass
"""


def test_a_flood_of_connections_delays_nobody(tmp_path: Path) -> None:
    """Another process connects, sends garbage and goes away, as fast as it can."""
    with toy_server(tmp_path / "toy") as toy:
        arguments = [sys.executable, "-c", FLOOD, str(toy.path), (b"garbage\0" * 100).hex()]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE) as flood:
            try:
                assert flood.stdout is not None
                assert flood.stdout.readline() == b"ready\n"
                with toy.wire() as victim:
                    serve_the_victim(victim)
            finally:
                flood.kill()
