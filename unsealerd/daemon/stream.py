"""Many answers to one call."""

from collections.abc import Callable
from typing import Protocol

from unsealerd.daemon.interface import Interface, Result
from unsealerd.errors import UnsealerdError


class StreamOwner(Protocol):
    """The connection, as a stream sees it."""

    def stream_reply(self, result: Result) -> None: ...
    def stream_end(self, result: Result) -> None: ...


class Stream:
    """The answers to one call with ``more``. `on_close` is called, once, when the peer is gone before `finish`."""

    __slots__ = ("_connection", "_interface", "on_close")

    def __init__(self, connection: StreamOwner, interface: Interface) -> None:
        self._connection: StreamOwner | None = connection
        self._interface = interface
        self.on_close: Callable[[], None] | None = None

    @property
    def closed(self) -> bool:
        return self._connection is None

    def send(self, result: Result) -> None:
        """Send one answer of several. Never waits: who does not read is dropped. Does nothing once closed."""
        if self._connection is not None:
            self._connection.stream_reply(result)

    def finish(self, result: Result = None) -> None:
        """Send the last answer; the connection takes up its next call."""
        if self._connection is not None:
            self._connection.stream_end(result)

    def fail(self, error: UnsealerdError) -> None:
        """End with an error instead."""
        if self._connection is not None:
            self._connection.stream_end(self._interface.error(error))

    def detach(self) -> Callable[[], None] | None:
        """No more answers. Returns `on_close`, for the connection to call if it was lost."""
        self._connection = None
        return self.on_close
