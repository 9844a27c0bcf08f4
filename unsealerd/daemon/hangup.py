"""Notice that a peer is gone, without reading from it.

A reader that only shut down its sending side (``shutdown(SHUT_WR)``, which systemd does) still waits for an answer, and makes its
socket readable for ever. Only EPOLLHUP tells the two apart, and epoll(7) reports it for a descriptor that is
registered for no event at all. An event loop cannot register that; an epoll inside of its epoll can.
"""

import asyncio
import select
from collections.abc import Callable


class HangUps:
    """Calls back, once, when the peer of a watched socket has closed it entirely."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[], None]] = {}
        self._loop.add_reader(self._epoll.fileno(), self._report)

    def watch(self, fd: int, gone: Callable[[], None]) -> None:
        self._epoll.register(fd, 0)
        self._watched[fd] = gone

    def forget(self, fd: int) -> None:
        """To be called before `fd` is closed. Nothing happens if it is not watched."""
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _report(self) -> None:
        for fd, _ in self._epoll.poll(0):
            gone = self._watched.get(fd)
            if gone is not None:
                self.forget(fd)
                gone()

    def close(self) -> None:
        """A second call does nothing."""
        if self._epoll.closed:
            return
        self._watched.clear()
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
