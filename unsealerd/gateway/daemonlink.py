"""The way to the daemon: one Varlink connection to its unlock socket for each network stream.

The daemon ties a session to its connection, so a session ends with the stream it belongs to, whatever happens here.
Varlink frames are JSON objects ended by NUL (varlink.org, "Protocol").
"""

import asyncio
import socket
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from unsealerd.core.conversation import (
    INTERFACE,
    AnswerCall,
    Challenge,
    HelloCall,
    HelloReply,
    Result,
    Status,
)
from unsealerd.errors import DaemonUnreachable, LimitExceeded
from unsealerd.gateway.status import from_daemon

MAX_REPLY_BYTES = 64 << 10

_T = TypeVar("_T")


class _Call(msgspec.Struct, frozen=True):
    method: str
    parameters: msgspec.Struct | dict[str, object]


class _Reply(msgspec.Struct, frozen=True):
    parameters: msgspec.Raw = msgspec.Raw(b"{}")
    error: str | None = None


class DaemonLink:
    """One connection, one call at a time.

    The socket itself, and no stream around it: what the daemon is asked fits its buffer, and the answer is one frame.
    """

    def __init__(self, sock: socket.socket, seconds: float) -> None:
        self._sock = sock
        self._seconds = seconds

    @classmethod
    def connect(cls, path: Path, seconds: float) -> Self:
        """``seconds``: how long one call may take. Never waits. Raises `DaemonUnreachable`, `LimitExceeded`."""
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as err:
            raise LimitExceeded(f"no descriptor for the daemon: {err.strerror}") from err
        try:
            sock.setblocking(False)
            sock.connect(str(path))
        except BlockingIOError as err:  # EAGAIN: the daemon's queue of connections is full
            sock.close()
            raise LimitExceeded("the daemon is busy") from err
        except OSError as err:
            sock.close()
            raise DaemonUnreachable(f"{path}: {err}") from err
        return cls(sock, seconds)

    async def hello(self, call: HelloCall) -> Challenge:
        return (await self._call("Hello", call, HelloReply)).challenge

    async def answer(self, call: AnswerCall) -> Result:
        return await self._call("Answer", call, Result)

    async def status(self) -> Status:
        return await self._call("GetStatus", {}, Status)

    async def _call(self, method: str, parameters: msgspec.Struct | dict[str, object], reply: type[_T]) -> _T:
        """Raises the error that the daemon names, or `DaemonUnreachable`."""
        frame = msgspec.json.encode(_Call(f"{INTERFACE}.{method}", parameters)) + b"\0"
        try:
            async with asyncio.timeout(self._seconds):
                await asyncio.get_running_loop().sock_sendall(self._sock, frame)
                answer = await self._frame()
        except OSError as err:  # TimeoutError is one
            raise DaemonUnreachable(f"no answer to {method}: {err}") from err
        try:
            envelope = msgspec.json.decode(answer, type=_Reply)
            if envelope.error is not None:
                raise from_daemon(envelope.error)(envelope.error)
            return msgspec.json.decode(envelope.parameters, type=reply)
        # Bad UTF-8 and deep nesting are errors of their own in msgspec.
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
            raise DaemonUnreachable(f"an answer to {method} that is not io.unsealerd.Unlock's") from err

    async def _frame(self) -> bytes:
        """One answer, without its NUL. Raises `DaemonUnreachable`, ``OSError``."""
        loop = asyncio.get_running_loop()
        received = b""
        while b"\0" not in received:
            room = MAX_REPLY_BYTES - len(received)
            part = await loop.sock_recv(self._sock, room) if room else b""
            if not part:
                raise DaemonUnreachable("an answer without an end")
            received += part
        answer, _, more = received.partition(b"\0")
        if more:
            raise DaemonUnreachable("more than one answer")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()  # and the daemon's session with it
