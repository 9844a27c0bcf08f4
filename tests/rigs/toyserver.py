"""A Varlink server with a toy interface, in a thread of its own, and a client that shows every byte."""

import asyncio
import hmac
import json
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from unsealerd.daemon.varlink import (
    Connection,
    Empty,
    Info,
    Interface,
    Limits,
    Method,
    Stream,
    VarlinkServer,
)
from unsealerd.errors import AccessDenied, Locked

T = TypeVar("T")
PATIENCE = 60.0  # seconds until a test gives up waiting for a condition

DESCRIPTION = """# A toy.
interface org.example.toy

type Pair (left: int, right: int)

method Sign(message: string) -> (mac: string, version: int)
method Echo(text: string) -> (text: string)
method Add(pair: Pair) -> (sum: int)
method Refuse() -> ()
method Bug() -> ()
method Wait() -> (text: string)
method WaitAndRefuse() -> ()
method WaitAndFail() -> ()
method Note() -> ()
method Big(size: int) -> (text: string)
method Count(upto: int) -> (number: int)
method Watch() -> (event: string)
method Absent() -> ()

error AccessDenied ()
error BadRequest ()
error Locked ()
error LimitExceeded ()
error CallerChanged ()
"""


class LoopThread:
    """An event loop that runs in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        async def inside() -> T:
            return function(*arguments)

        return self.run(inside())

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition that the loop brings about."""

        async def inside() -> None:
            while not condition():
                await asyncio.sleep(0.002)

        self.run(asyncio.wait_for(inside(), PATIENCE))

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE)
        self.loop.close()


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    message: bytes


class _Text(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str


class _Pair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    left: int
    right: int


class _Add(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pair: _Pair


class _Size(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: int


class _Upto(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    upto: int


class _Signed(msgspec.Struct):
    mac: str
    version: int


class Toy:
    """The handlers, and what they saw."""

    key = b"toy key"

    def __init__(self) -> None:
        self.notes = 0
        self.waiting = 0
        self.release = asyncio.Event()
        self.streams: list[Stream] = []
        self.streams_lost = 0
        self.order: list[object] = []

    def sign(self, connection: Connection, parameters: _Message) -> _Signed:
        return _Signed(hmac.digest(self.key, parameters.message, "sha256").hex(), 1)

    def echo(self, connection: Connection, parameters: _Text) -> dict[str, Any]:
        self.order.append(connection)
        return {"text": parameters.text}

    def add(self, connection: Connection, parameters: _Add) -> dict[str, Any]:
        return {"sum": parameters.pair.left + parameters.pair.right}

    def refuse(self, connection: Connection, parameters: Empty) -> None:
        raise AccessDenied("only for the administrator's eyes")

    def bug(self, connection: Connection, parameters: Empty) -> None:
        raise ValueError("a text that must not be logged")

    async def wait(self, connection: Connection, parameters: Empty) -> dict[str, Any]:
        self.waiting += 1
        await self.release.wait()
        return {"text": "waited"}

    async def wait_and_refuse(self, connection: Connection, parameters: Empty) -> None:
        self.waiting += 1
        await self.release.wait()
        raise Locked

    async def wait_and_fail(self, connection: Connection, parameters: Empty) -> None:
        self.waiting += 1
        await self.release.wait()
        raise ValueError("a text that must not be logged")

    def note(self, connection: Connection, parameters: Empty) -> None:
        self.notes += 1

    def big(self, connection: Connection, parameters: _Size) -> dict[str, Any]:
        self.notes += 1
        return {"text": "x" * parameters.size}

    def count(self, connection: Connection, parameters: _Upto) -> None:
        if parameters.upto < 0:
            raise AccessDenied
        stream = connection.stream()
        for number in range(parameters.upto):
            stream.send({"number": number})
        stream.finish({"number": parameters.upto})

    def watch(self, connection: Connection, parameters: Empty) -> None:
        stream = connection.stream()
        stream.send({"event": "begin"})
        stream.on_close = self._lost
        self.streams.append(stream)

    def _lost(self) -> None:
        self.streams_lost += 1

    def publish(self, event: str) -> None:
        for stream in self.streams:
            stream.send({"event": event})

    def methods(self) -> dict[str, Method]:
        return {
            "Sign": Method(_Message, self.sign),
            "Echo": Method(_Text, self.echo),
            "Add": Method(_Add, self.add),
            "Refuse": Method(Empty, self.refuse),
            "Bug": Method(Empty, self.bug),
            "Wait": Method(Empty, self.wait),
            "WaitAndRefuse": Method(Empty, self.wait_and_refuse),
            "WaitAndFail": Method(Empty, self.wait_and_fail),
            "Note": Method(Empty, self.note),
            "Big": Method(_Size, self.big),
            "Count": Method(_Upto, self.count, streams=True),
            "Watch": Method(Empty, self.watch, streams=True),
        }


class Wire:
    """A client that sends and receives whole messages."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(path))
        self._received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, method: str, parameters: dict[str, Any] | None = None, **flags: bool) -> None:
        self.sock.sendall(frame(method, parameters, **flags))

    def receive(self) -> dict[str, Any] | None:
        """The next message, or None at the end."""
        while b"\0" not in self._received:
            more = self.sock.recv(65536)
            if not more:
                assert self._received == b"", "the server sent half a message"
                return None
            self._received += more
        message, _, self._received = self._received.partition(b"\0")
        found = json.loads(message)
        assert isinstance(found, dict)
        return found

    def call(self, method: str, parameters: dict[str, Any] | None = None, **flags: bool) -> dict[str, Any]:
        self.send(method, parameters, **flags)
        found = self.receive()
        assert found is not None
        return found


def frame(method: str, parameters: dict[str, Any] | None = None, **flags: bool) -> bytes:
    name = method if "." in method else f"org.example.toy.{method}"
    call: dict[str, Any] = {"method": name, **flags}
    if parameters is not None:
        call["parameters"] = parameters
    return json.dumps(call).encode() + b"\0"


class ToyServer:
    """The server at `path`, and the way into its loop."""

    def __init__(self, thread: LoopThread, path: Path, server: VarlinkServer, toy: Toy) -> None:
        self.thread = thread
        self.path = path
        self.server = server
        self.toy = toy

    def wire(self) -> Wire:
        return Wire(self.path)


@contextmanager
def toy_server(
    path: Path, limits: Limits | None = None, *, details: bool = False, listen: bool = True, **options: Any
) -> Iterator[ToyServer]:
    thread = LoopThread()

    async def start() -> tuple[VarlinkServer, Toy]:
        toy = Toy()
        interface = Interface("org.example.toy", toy.methods(), details=details, description=DESCRIPTION)
        server = VarlinkServer(
            [interface], Info("Example", "toy", "1", "https://example.org"), limits, **options
        )
        if listen:
            await server.listen(path, 0o600)
        return server, toy

    try:
        server, toy = thread.run(start())
        try:
            yield ToyServer(thread, path, server, toy)
        finally:
            thread.call(toy.release.set)
            thread.run(server.close(grace=0.1))
    finally:
        thread.close()


__all__ = ["DESCRIPTION", "PATIENCE", "LoopThread", "Toy", "ToyServer", "Wire", "frame", "toy_server"]
