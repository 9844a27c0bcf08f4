"""A blocking Varlink connection over a Unix socket: NUL-framed JSON, bounded in size and in time.

Used by the client library and by ``unsealctl``. Standard library only, and nothing of it that is slow to
import.

    call   {"method": "INTERFACE.METHOD", "parameters": {…}, "more": true} NUL
    reply  {"parameters": {…}, "continues": true} NUL
           {"error": "INTERFACE.NAME", "parameters": {…}} NUL

The reader is strict: what the daemon would not send is `BadMessage`, whatever the bytes are.
"""

import errno
import json
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from time import monotonic
from typing import NamedTuple, NoReturn, Self, TypeGuard

from unsealerd import errors
from unsealerd.errors import (
    AccessDenied,
    BadMessage,
    BadRequest,
    DaemonUnreachable,
    LimitExceeded,
    SealRefused,
)
from unsealerd.model import LockReason

MAX_REPLY_BYTES = 4 << 20
"""More than the daemon says about as many keys as a configuration may declare."""
_CHUNK_BYTES = 65536
_OURS = "io.unsealerd."
_INVALID_PARAMETER = "org.varlink.service.InvalidParameter"


class Reply(NamedTuple):
    """One reply. (A named tuple, because dataclasses cost more to import than the rest of this module.)"""

    parameters: dict[str, object]
    continues: bool
    error: str | None


class FrameReader:
    """Cuts a byte stream into NUL-ended frames. Pure: bytes in, frames out."""

    __slots__ = ("_buffer", "_limit", "_searched")

    def __init__(self, limit: int = MAX_REPLY_BYTES) -> None:
        self._buffer = bytearray()
        self._limit = limit
        self._searched = 0  # no NUL before here, so that a frame in many pieces is searched once

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def frame(self) -> bytes | None:
        """The next whole frame without its NUL, or None.

        Raises `BadMessage` when one is longer than the limit.
        """
        end = self._buffer.find(0, self._searched)
        if (end if end >= 0 else len(self._buffer)) > self._limit:
            raise BadMessage(f"a message of more than {self._limit} bytes")
        if end < 0:
            self._searched = len(self._buffer)
            return None
        frame = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return frame

    @property
    def empty(self) -> bool:
        return not self._buffer


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def parse_reply(frame: bytes) -> Reply:
    """The reply in a frame. Raises `BadMessage`, on any bytes."""
    try:
        message = json.loads(frame.decode(), parse_constant=_refuse_constant)
        # RecursionError: the parser of the standard library recurses for each level of nesting.
    except (ValueError, RecursionError) as err:
        raise BadMessage("the answer is not JSON") from err
    if not isinstance(message, dict) or not message.keys() <= {"parameters", "continues", "error"}:
        raise BadMessage("the answer is not a Varlink reply")
    parameters = message.get("parameters")
    continues = message.get("continues")
    error = message.get("error")
    if (
        not (parameters is None or isinstance(parameters, dict))
        or not (continues is None or isinstance(continues, bool))
        or not (error is None or isinstance(error, str))
        or (error is not None and continues)
    ):
        raise BadMessage("the answer is not a Varlink reply")
    return Reply(parameters or {}, bool(continues), error)


def named_error(name: str, parameters: Mapping[str, object]) -> errors.UnsealerdError:
    """The error of a reply as an exception; one that is not in the vocabulary is a `BadMessage`."""
    given = parameters.get("detail")
    detail = given if isinstance(given, str) else ""
    if name == _INVALID_PARAMETER:
        return BadRequest(detail or f"parameter {parameters.get('parameter')!s}")
    kind = errors.named(name.rpartition(".")[2]) if name.startswith(_OURS) else None
    if kind is None:
        return BadMessage(f"the daemon answers with the error {name!r}")
    if kind is SealRefused:
        try:
            reason = LockReason(parameters.get("reason"))
        except ValueError:
            reason = LockReason.TPM_FAILED
        return SealRefused(reason, detail)
    return kind(detail)


def is_uint(value: object) -> TypeGuard[int]:
    """Whether a JSON value is a number that counts something. (True and False are ints in Python.)"""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def connect(path: str, timeout: float | None) -> socket.socket:
    """A stream socket connected to ``path``. Raises `AccessDenied`, `DaemonUnreachable`.

    While the listener's backlog is full a Unix socket's connect(2) waits only in blocking mode, bounded by
    SO_SNDTIMEO; in Python's time-out mode (non-blocking underneath) it fails at once, and at boot many
    services come together.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if timeout is not None:
            microseconds = max(1, int(timeout * 1e6))
            limit = struct.pack("@ll", *divmod(microseconds, 1_000_000))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        sock.connect(path)
    except OSError as err:
        sock.close()
        if err.errno in (errno.EACCES, errno.EPERM):
            raise AccessDenied(f"{path}: {err.strerror}") from err
        if err.errno == errno.EAGAIN:
            raise DaemonUnreachable(f"{path}: too busy to accept the connection") from err
        # No errno: Python itself says "AF_UNIX path too long", before any system call.
        raise DaemonUnreachable(f"{path}: {err.strerror or err}") from err
    return sock


class Deadline:
    """A point in time, or none. Seconds of the monotonic clock."""

    __slots__ = ("_at",)

    def __init__(self, timeout: float | None) -> None:
        self._at = None if timeout is None else monotonic() + timeout

    def left(self) -> float | None:
        """Seconds left, None for no limit. Raises `TimeoutError` when there are none."""
        if self._at is None:
            return None
        left = self._at - monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class Connection:
    """One connection; one call at a time, from one thread at a time."""

    __slots__ = ("_frames", "_path", "_socket", "_timeout", "lost")

    def __init__(
        self, path: str | os.PathLike[str], *, timeout: float | None = 10.0, max_reply: int = MAX_REPLY_BYTES
    ) -> None:
        """Connect. ``timeout``: seconds for connecting and for each call, None for no limit."""
        self._path = os.fspath(path)
        self._timeout = timeout
        self._frames = FrameReader(max_reply)
        self._socket = connect(self._path, timeout)
        self.lost = False
        """The other end closed: a new connection may do better."""

    def call(
        self, method: str, parameters: Mapping[str, object] | None = None, *, timeout: float | None = None
    ) -> dict[str, object]:
        """The parameters of the reply. ``timeout`` replaces the connection's own for this call.

        Raises the error that the daemon names; `DaemonUnreachable` when the connection ends or the time is
        up; `BadMessage`.
        """
        deadline = Deadline(self._timeout if timeout is None else timeout)
        self._send({"method": method, "parameters": parameters or {}}, deadline)
        reply = self._receive(deadline)
        if reply.continues:
            self.close()
            raise BadMessage("more than one answer to one call")
        return reply.parameters

    def stream(
        self,
        method: str,
        parameters: Mapping[str, object] | None = None,
        *,
        patience: float | None = None,
    ) -> Iterator[dict[str, object]]:
        """The replies to a call with ``more``: the first within the time-out, the others whenever they
        come, or each within ``patience`` seconds.
        """
        deadline = Deadline(self._timeout)
        self._send({"method": method, "parameters": parameters or {}, "more": True}, deadline)
        while True:
            reply = self._receive(deadline)
            yield reply.parameters
            if not reply.continues:
                return
            deadline = Deadline(patience)

    @property
    def closed(self) -> bool:
        return self._socket.fileno() < 0

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, message: Mapping[str, object], deadline: Deadline) -> None:
        if not self._frames.empty:
            self.close()
            raise BadMessage("an answer that nobody asked for")
        data = json.dumps(message, separators=(",", ":")).encode() + b"\0"
        try:
            self._socket.settimeout(deadline.left())
            self._socket.sendall(data)
        except TimeoutError as err:
            raise self._too_slow() from err
        except OSError as err:
            # The daemon may have said why before it closed (too many connections, a message too large).
            raise self._last_word(err) from err

    def _receive(self, deadline: Deadline) -> Reply:
        """The next reply. After any error but a named one the stream is out of step, so it is closed."""
        try:
            frame = self._frames.frame()
            while frame is None:
                self._socket.settimeout(deadline.left())
                data = self._socket.recv(_CHUNK_BYTES)
                if not data:
                    raise self._gone("closed the connection")
                self._frames.feed(data)
                frame = self._frames.frame()
            reply = parse_reply(frame)
        except TimeoutError as err:
            raise self._too_slow() from err
        except OSError as err:
            raise self._gone(err.strerror or str(err)) from err
        except BadMessage:
            self.close()
            raise
        if reply.error is not None:
            raise named_error(reply.error, reply.parameters)
        return reply

    def _last_word(self, err: OSError) -> errors.UnsealerdError:
        try:
            self._receive(Deadline(0.1))
        except LimitExceeded as said:
            return said
        except errors.UnsealerdError:
            pass
        return self._gone(err.strerror or str(err))

    def _gone(self, why: str) -> DaemonUnreachable:
        self.lost = True
        self.close()
        return DaemonUnreachable(f"{self._path}: {why}")

    def _too_slow(self) -> DaemonUnreachable:
        self.close()
        return DaemonUnreachable(f"{self._path}: no answer in time")
