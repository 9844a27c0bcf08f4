"""The way to the daemon: one Varlink connection to its unlock socket for each network stream.

The daemon ties a session to its connection, so a session ends with the stream it belongs to, whatever happens here.
Varlink frames are JSON objects ended by NUL (varlink.org, "Protocol").
"""

import asyncio
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
    """One connection, one call at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
        self._reader = reader
        self._writer = writer
        self._seconds = seconds

    @classmethod
    async def connect(cls, path: Path, seconds: float) -> Self:
        """``seconds``: how long one call may take. Raises `DaemonUnreachable`, `LimitExceeded`."""
        try:
            async with asyncio.timeout(seconds):
                reader, writer = await asyncio.open_unix_connection(path, limit=MAX_REPLY_BYTES)
        except BlockingIOError as err:  # EAGAIN: the daemon's queue of connections is full
            raise LimitExceeded("the daemon is busy") from err
        except OSError as err:  # TimeoutError is one
            raise DaemonUnreachable(f"{path}: {err}") from err
        return cls(reader, writer, seconds)

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
                self._writer.write(frame)
                await self._writer.drain()
                answer = await self._reader.readuntil(b"\0")
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as err:
            raise DaemonUnreachable(f"no answer to {method}: {err}") from err
        try:
            envelope = msgspec.json.decode(answer[:-1], type=_Reply)
            if envelope.error is not None:
                raise from_daemon(envelope.error)(envelope.error)
            return msgspec.json.decode(envelope.parameters, type=reply)
        # Bad UTF-8 and deep nesting are errors of their own in msgspec.
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
            raise DaemonUnreachable(f"an answer to {method} that is not io.unsealerd.Unlock's") from err

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        # Nothing is waiting to be written: abort closes at once, and the daemon's session with it.
        self._writer.transport.abort()
