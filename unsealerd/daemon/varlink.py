"""A Varlink server on Unix sockets, without knowledge of keys.

Small and of our own because it is on the path of every password check. https://varlink.org/Method-Call
"""

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from unsealerd.daemon.caller import Caller, Peer
from unsealerd.daemon.connection import Connection
from unsealerd.daemon.hangup import HangUps
from unsealerd.daemon.interface import Empty, Handler, Interface, Method, Result, error_reply
from unsealerd.daemon.limits import Limits
from unsealerd.daemon.listener import Listener
from unsealerd.daemon.message import Call
from unsealerd.daemon.stream import Stream
from unsealerd.errors import LimitExceeded

__all__ = ["Connection", "Empty", "Info", "Interface", "Limits", "Method", "Stream", "VarlinkServer"]

_log = logging.getLogger(__name__)

_SERVICE = "org.varlink.service"


class Info(msgspec.Struct, frozen=True):
    """What GetInfo says."""

    vendor: str
    product: str
    version: str
    url: str


class Entry(msgspec.Struct, frozen=True):
    """A method, ready to be called."""

    interface: Interface
    decode: Callable[[msgspec.Raw], msgspec.Struct]
    handler: Handler
    streams: bool


class _Described(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    interface: str


class VarlinkServer:
    """Serves `interfaces` (the first one names the errors that belong to none) on any number of sockets.

    To be made inside of a running event loop. `on_connect` runs before the first message and may raise an `UnsealerdError`,
    which is sent before the connection is closed; `on_disconnect` runs once for each connection that was let in,
    while its ``peer`` still is there. The last ``limits.reserved`` places are for those of whom ``entitled`` says so.
    """

    def __init__(
        self,
        interfaces: Sequence[Interface],
        info: Info,
        limits: Limits | None = None,
        *,
        on_connect: Callable[[Connection], None] | None = None,
        on_disconnect: Callable[[Connection], None] | None = None,
        entitled: Callable[[Caller], bool] | None = None,
        peer_of: Callable[[Any], Peer] = Peer.of,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.limits = limits if limits is not None else Limits()
        self.interfaces = tuple(interfaces)
        self.hangups = HangUps()
        self.scratch = bytearray(self.limits.read_bytes)
        self.connections: set[Connection] = set()
        self._info = info
        self._per_uid: Counter[int] = Counter()
        self._on_connect = on_connect
        self._on_disconnect = on_disconnect
        self._entitled = entitled
        self._peer_of = peer_of
        self._listeners: list[Listener] = []
        self._socks: list[socket.socket] = []
        self._joining: set[asyncio.Task[Any]] = set()  # accepted, and not connections yet
        service = Interface(
            _SERVICE,
            {
                "GetInfo": Method(Empty, self._get_info),
                "GetInterfaceDescription": Method(_Described, self._describe),
            },
        )
        self._by_name = {interface.name: interface for interface in (service, *self.interfaces)}
        self.entries = {
            f"{interface.name}.{name}": Entry(
                interface, msgspec.json.Decoder(method.parameters).decode, method.handler, method.streams
            )
            for interface in self._by_name.values()
            for name, method in interface.methods.items()
        }

    # --- sockets

    async def listen(self, path: Path, mode: int, gid: int | None = None) -> None:
        """Listen at `path`, see `Listener.bind`. The file goes away with `close`."""
        listener = Listener.bind(path, mode, gid)
        self._listeners.append(listener)
        await self.adopt(listener.sock)

    async def adopt(self, sock: socket.socket) -> None:
        """Serve a socket that listens already (socket activation). It is closed by `close`."""
        sock.setblocking(False)
        self._socks.append(sock)
        self.loop.add_reader(sock, self._accept, sock)

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(self.limits.accepts_per_turn):
            try:
                accepted, _ = sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as err:
                # Out of descriptors or memory. It would fail again at once: the others in the queue have to wait.
                _log.warning("accept_failed errno=%d", err.errno or 0)
                self.loop.remove_reader(sock)
                self.loop.call_later(self.limits.retry_seconds, self._accept_again, sock)
                return
            joining = self.loop.create_task(
                self.loop.connect_accepted_socket(lambda: Connection(self), accepted)
            )
            self._joining.add(joining)
            joining.add_done_callback(self._joining.discard)

    def _accept_again(self, sock: socket.socket) -> None:
        if sock.fileno() >= 0:
            self.loop.add_reader(sock, self._accept, sock)

    async def close(self, grace: float = 5.0) -> None:
        """Stop listening, give answers that are being prepared `grace` seconds, then close all connections."""
        for sock in self._socks:
            if sock.fileno() >= 0:
                self.loop.remove_reader(sock)
                sock.close()
        for listener in self._listeners:
            listener.close()
        if self._joining:
            await asyncio.wait(self._joining)
        tasks = {connection.task for connection in self.connections if connection.task is not None}
        if tasks:
            await asyncio.wait(tasks, timeout=grace)
            await asyncio.sleep(0)  # their answers are written by callbacks, which run in this turn
        for connection in tuple(self.connections):
            connection.close()
        await asyncio.sleep(0)  # connection_lost runs in the next turn
        for connection in tuple(self.connections):
            connection.abort()
        while self.connections:
            await asyncio.sleep(0)
        self.hangups.close()

    # --- for connections

    def admit(self, connection: Connection, sock: Any) -> None:
        """Let a connection in. Raises `LimitExceeded`, `CallerChanged`, or what `on_connect` raises."""
        if len(self.connections) >= self.limits.connections:
            raise LimitExceeded("connections")
        try:
            peer = self._peer_of(sock)
        except OSError as err:  # out of descriptors
            raise LimitExceeded("connections") from err
        if self._per_uid[peer.caller.uid] >= self.limits.connections_per_uid:
            peer.close()
            raise LimitExceeded("connections of this user")
        last = len(self.connections) >= self.limits.connections - self.limits.reserved
        if last and self._entitled is not None and not self._entitled(peer.caller):
            peer.close()
            raise LimitExceeded("connections")
        connection.peer = peer
        connection.admitted = True
        self.connections.add(connection)
        self._per_uid[peer.caller.uid] += 1
        try:
            if self._on_connect is not None:
                self._on_connect(connection)
        except BaseException:
            self._release(connection)
            raise

    def forget(self, connection: Connection) -> None:
        """The connection is closed."""
        if not connection.admitted:
            return
        try:
            if self._on_disconnect is not None:
                self._on_disconnect(connection)
        finally:
            self._release(connection)

    def _release(self, connection: Connection) -> None:
        connection.admitted = False
        self.connections.discard(connection)
        uid = connection.peer.caller.uid
        self._per_uid[uid] -= 1
        if not self._per_uid[uid]:
            del self._per_uid[uid]
        connection.peer.close()

    def refusal(self, call: Call, entry: Entry | None) -> bytes | None:
        """The error for a call that no handler is to see, or None."""
        if entry is None:
            name, _, method = call.method.rpartition(".")
            interface = self._by_name.get(name)
            if interface is None:
                return error_reply(f"{_SERVICE}.InterfaceNotFound", {"interface": name})
            missing = "MethodNotImplemented" if interface.declares(method) else "MethodNotFound"
            return error_reply(f"{_SERVICE}.{missing}", {"method": call.method})
        if call.upgrade:
            return error_reply(f"{_SERVICE}.InvalidParameter", {"parameter": "upgrade"})
        if call.more and call.oneway:
            return error_reply(f"{_SERVICE}.InvalidParameter", {"parameter": "more"})
        if entry.streams and not call.more:
            return error_reply(f"{_SERVICE}.ExpectedMore", {})
        return None

    # --- org.varlink.service

    def _get_info(self, connection: Connection, parameters: Empty) -> Result:
        return {**msgspec.to_builtins(self._info), "interfaces": list(self._by_name)}

    def _describe(self, connection: Connection, parameters: _Described) -> Result:
        interface = self._by_name.get(parameters.interface)
        if interface is None:
            return error_reply(f"{_SERVICE}.InterfaceNotFound", {"interface": parameters.interface})
        return {"description": interface.text()}
