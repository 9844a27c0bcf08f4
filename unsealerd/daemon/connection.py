"""One Varlink connection: framing, order, back-pressure and time limits.

A message is a JSON object and a NUL. Answers go out in the order of the calls; whatever was answered in one turn of the
event loop goes out in one write, after one look whether the caller is still who it was.

Reading: the whole server shares one buffer, for a connection that waits for nothing costs no memory then. Only what is
left over (half a message, or messages that wait behind a slow one) moves to a buffer of the connection's own.
"""

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from unsealerd.daemon.bugguard import BugGuard
from unsealerd.daemon.caller import Peer
from unsealerd.daemon.interface import Interface, Result, bad_parameter, error_reply
from unsealerd.daemon.message import Call, append_reply, decode_call
from unsealerd.daemon.stream import Stream
from unsealerd.errors import CallerChanged, LimitExceeded, UnsealerdError

if TYPE_CHECKING:
    from unsealerd.daemon.varlink import Entry, VarlinkServer

_log = logging.getLogger(__name__)

# Why no message is taken up at the moment.
_BUSY = 1  # an answer is being prepared, or a stream is open
_UNSENT = 2  # too much waits to be sent
_TURN = 4  # the others have their turn
_CLOSED = 8

_SMALLEST_BUFFER = 4096


class Connection(asyncio.BufferedProtocol):
    """A client. Handlers use `peer`, `state` (theirs alone), `stream`, `closed`."""

    peer: Peer

    def __init__(self, server: "VarlinkServer") -> None:
        self.state: Any = None
        self.admitted = False
        self._server = server
        self._limits = server.limits
        self._transport: asyncio.Transport
        self._blocked = 0
        self._guard = BugGuard(self.abort)
        self._out = bytearray()  # answers of this turn
        self._collecting = False
        self._stream: Stream | None = None
        self._opening: Interface | None = None  # set while a streaming method's handler runs
        self.task: asyncio.Future[Result] | None = None
        self._oneway = False  # the call that the task is for
        # The connection's own buffer; whole messages and a part of one are in held[:filled], without NUL before `scanned`.
        self._held: bytearray | None = None
        self._filled = 0
        self._scanned = 0
        self._reading = True
        self._ended = False  # the client sends nothing more
        self._gone = False  # nor does it read
        self._fd = -1
        self._message_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    # --- for handlers

    @property
    def closed(self) -> bool:
        return bool(self._blocked & _CLOSED)

    def stream(self) -> Stream:
        """Answer the call at hand with any number of messages. Only in the handler of a method with ``streams``."""
        if self._opening is None:
            raise RuntimeError("not in the handler of a streaming method")
        self._stream = Stream(self, self._opening)
        self._opening = None
        self._blocked |= _BUSY
        return self._stream

    def close(self) -> None:
        """Send what is waiting, then close."""
        if not self.closed:
            self._flush()
        if not self.closed:
            self._shut()

    def abort(self) -> None:
        """Close at once."""
        self._out.clear()
        self._blocked |= _CLOSED
        self._transport.abort()

    # --- asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=self._limits.outgoing_bytes)
        with self._guard:
            try:
                self._server.admit(self, transport.get_extra_info("socket"))
            except UnsealerdError as error:
                self._end_with(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._blocked |= _CLOSED
        self._held = None
        self._cancel_timers()
        if self._fd >= 0:
            self._server.hangups.forget(self._fd)
        if self.task is not None:
            self.task.cancel()  # what must not be cut off (a change of the host) shields itself
        stream, self._stream = self._stream, None
        with self._guard:
            if stream is not None:
                on_close = stream.detach()
                if on_close is not None:
                    on_close()
        with self._guard:
            self._server.forget(self)

    def get_buffer(self, sizehint: int) -> memoryview | bytearray:
        if self._held is None:
            return self._server.scratch
        return memoryview(self._held)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        with self._guard:
            if self._held is not None:
                self._filled += nbytes
                self._resume()
            else:
                scratch = self._server.scratch
                rest = self._take_up(scratch, 0, nbytes)  # 0 if something is in the way
                if rest != nbytes:
                    self._hold(scratch, rest, nbytes)

    def eof_received(self) -> bool:
        self._ended = True
        self._fd = self._transport.get_extra_info("socket").fileno()
        self._server.hangups.watch(self._fd, self._hung_up)
        if not self._blocked:
            self._shut()
        return True  # what was asked is answered first; `_resume` closes

    def _hung_up(self) -> None:
        """Nobody will read an answer. What was sent before is still taken up: it may be ``oneway``.

        A call whose answer was waited for is given up, so that what it holds is free at once; a change of the host shields
        itself.
        """
        self._gone = True
        if self.task is not None and not self._oneway:
            self.task.cancel()
        if self._stream is not None or self._blocked & _UNSENT:
            self.abort()

    def pause_writing(self) -> None:
        self._blocked |= _UNSENT
        self._start_stall()

    def resume_writing(self) -> None:
        self._blocked &= ~_UNSENT
        if self._stall_timer is not None and not self.closed:
            self._stall_timer.cancel()
            self._stall_timer = None
        with self._guard:
            self._resume()

    # --- messages

    def _take_up(self, data: bytearray, scan: int, end: int) -> int:
        """Handle whole messages in data[:end], as many as the turn allows; return where the rest begins."""
        view = memoryview(data)
        start = 0
        turns = self._limits.messages_per_turn
        largest = self._limits.message_bytes
        self._collecting = True
        try:
            while not self._blocked and start < end:
                nul = data.find(0, scan, end)
                if (end if nul < 0 else nul) - start > largest:
                    self._end_with(LimitExceeded())
                elif nul < 0:
                    break
                elif turns == 0:
                    self._blocked |= _TURN
                    self._server.loop.call_soon(self._next_turn)
                else:
                    turns -= 1
                    self._message(view[start:nul])
                    start = scan = nul + 1
                    if len(self._out) > self._limits.outgoing_bytes:
                        self._flush()
        finally:
            self._collecting = False
        if self._out:
            self._flush()
        return start

    def _message(self, raw: memoryview) -> None:
        server = self._server
        try:
            call = decode_call(raw)
        except (ValueError, RecursionError):  # what msgspec raises on any bytes
            self._end_with(server.interfaces[0].malformed())
            return
        entry = server.entries.get(call.method)
        if entry is None or call.upgrade or call.more or entry.streams:
            refusal = server.refusal(call, entry)
            if refusal is not None:
                self._reply(call, refusal)
                return
            assert entry is not None
        try:
            parameters = entry.decode(call.parameters)
        except (ValueError, RecursionError) as err:
            wrong = {"parameter": bad_parameter(err)}
            self._reply(call, error_reply("org.varlink.service.InvalidParameter", wrong))
            return
        self._opening = entry.interface if entry.streams else None
        try:
            result = entry.handler(self, parameters)
        except UnsealerdError as error:
            result = entry.interface.error(error)
        if entry.streams:
            self._opened(call, result)
        elif result is None or isinstance(result, (msgspec.Struct, dict, bytes)):
            if not call.oneway:
                append_reply(self._out, result)
        else:
            self._wait_for(asyncio.ensure_future(result), call, entry)

    def _opened(self, call: Call, result: object) -> None:
        """After the handler of a streaming method: it opened the stream (and may have finished it), or refused."""
        never = self._opening is not None
        self._opening = None
        if isinstance(result, bytes) and (never or self._stream is not None):
            self._out += result
            self._unstream()
        elif never or result is not None:
            raise TypeError("a streaming handler opens its stream and returns None")
        elif self._gone:
            self.abort()

    def _unstream(self) -> None:
        if self._stream is not None:
            self._stream.detach()
            self._stream = None
            self._blocked &= ~_BUSY

    def _wait_for(self, task: asyncio.Future[Result], call: Call, entry: "Entry") -> None:
        """Answer when the awaitable is done. Nothing of it ran yet, if it is a coroutine: look at the caller first."""
        self.task = task
        self._oneway = call.oneway
        try:
            self.peer.check()
        except CallerChanged as error:
            task.cancel()
            self._end_with(error)
            return
        self._blocked |= _BUSY
        self._time_message(False)
        task.add_done_callback(lambda done: self._answered(done, call, entry))
        if self._gone and not call.oneway:
            self._server.loop.call_soon(
                task.cancel
            )  # after its first step: it has begun whatever it begins at once

    def _answered(self, task: asyncio.Future[Result], call: Call, entry: "Entry") -> None:
        self.task = None
        self._blocked &= ~_BUSY
        with self._guard:
            if task.cancelled():
                if self._gone:
                    self._resume()
                else:
                    self.abort()
                return
            try:
                result = task.result()
            except UnsealerdError as error:
                self._reply(call, entry.interface.error(error))
            else:
                if not call.oneway:
                    append_reply(self._out, result)
            if not self.closed:
                self._flush()
                self._resume()

    def _reply(self, call: Call, reply: bytes) -> None:
        if not call.oneway:
            self._out += reply

    def _next_turn(self) -> None:
        self._blocked &= ~_TURN
        with self._guard:
            self._resume()

    def _resume(self) -> None:
        """Take up what is held, as far as nothing is in the way."""
        held = self._held
        if held is not None:
            if not self._blocked:
                rest = self._take_up(held, self._scanned, self._filled)
                self._hold(held, rest, self._filled)
            elif self._filled == len(held) and self._reading and not self.closed:
                self._full()
        if not self._blocked and not self._reading:
            self._reading = True
            self._transport.resume_reading()
        if not self._blocked and self._ended:
            self._shut()

    def _full(self) -> None:
        """No room for more behind a message that is being answered."""
        if self._stream is not None:
            self._end_with(LimitExceeded())  # it would go unnoticed when the client closes
        elif not self._ended:
            self._reading = False
            self._transport.pause_reading()

    def _hold(self, data: bytearray, start: int, end: int) -> None:
        """Keep data[start:end] in a buffer of our own that has room for at least one byte more."""
        rest = end - start
        if self.closed or rest == 0:
            self._held = None
            self._filled = self._scanned = 0
            self._time_message(False)
        else:
            size = _SMALLEST_BUFFER
            while size <= rest:
                size *= 2
            size = min(size, self._limits.message_bytes + 1)
            held = self._held
            if held is None or len(held) != size:
                held = bytearray(size)
            if held is not data or start:
                memoryview(held)[:rest] = memoryview(data)[start:end]  # they may overlap
            self._held, self._filled = held, rest
            self._scanned = 0 if self._blocked else rest
            if not self._blocked and (start or self._message_timer is None):
                self._time_message(True)

    # --- sending

    def _flush(self) -> None:
        """One look at the caller, one write."""
        if not self._out or self.closed:
            return
        try:
            self.peer.check()
        except CallerChanged as error:
            self._end_with(error)
            return
        out, self._out = self._out, bytearray()
        self._transport.write(out)

    def stream_reply(self, result: Result) -> None:
        with self._guard:
            append_reply(self._out, result, continues=True)
            waiting = self._transport.get_write_buffer_size() + len(self._out)
            if waiting > self._limits.outgoing_bytes:
                _log.warning("stream_dropped pid=%d unsent=%d", self.peer.caller.pid, waiting)
                self.abort()
            elif not self._collecting:
                self._flush()

    def stream_end(self, result: Result) -> None:
        self._unstream()
        with self._guard:
            append_reply(self._out, result)
            if not self._collecting:
                self._flush()
                self._resume()

    def _end_with(self, error: UnsealerdError) -> None:
        """The last words: answers that were ready and harmless, then this error."""
        if self.closed:
            return
        if isinstance(error, CallerChanged):
            self._out.clear()  # they were for somebody else
        self._transport.write(self._out + self._server.interfaces[0].error(error))
        self._out = bytearray()
        self._shut()

    def _shut(self) -> None:
        self._blocked |= _CLOSED
        self._held = None
        self._cancel_timers()
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self._start_stall()

    # --- time

    def _cancel_timers(self) -> None:
        self._time_message(False)
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _time_message(self, started: bool) -> None:
        if self._message_timer is not None:
            self._message_timer.cancel()
            self._message_timer = None
        if started:
            self._message_timer = self._server.loop.call_later(
                self._limits.message_seconds, self._end_with, LimitExceeded()
            )

    def _start_stall(self) -> None:
        if self._stall_timer is None:
            self._stall_timer = self._server.loop.call_later(self._limits.stall_seconds, self.abort)
