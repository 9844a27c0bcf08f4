"""A bound on how fast anybody can make the daemon write audit records."""

import asyncio
from collections.abc import Callable, Hashable

_FORGET_ABOVE = 1024  # keys held before those that are through are forgotten


class _Queue:
    """Who waits for one key, first come first served; ``next`` is when the first of them has its turn."""

    __slots__ = ("lock", "next")

    def __init__(self, now: float) -> None:
        self.lock = asyncio.Lock()
        self.next = now


class Pace:
    """Turns at a minimum interval for each key. Nothing is dropped: who asks too often waits.

    Who gives up waiting takes no turn, so that hanging up again and again does not keep others of the same key waiting.
    """

    def __init__(self, interval: float, monotonic: Callable[[], float]) -> None:
        """``interval``: seconds."""
        self._interval = interval
        self._monotonic = monotonic
        self._queues: dict[Hashable, _Queue] = {}

    async def turn(self, key: Hashable) -> None:
        now = self._monotonic()
        if len(self._queues) > _FORGET_ABOVE:
            self._queues = {k: q for k, q in self._queues.items() if q.next > now or q.lock.locked()}
        queue = self._queues.setdefault(key, _Queue(now))
        async with queue.lock:
            wait = queue.next - self._monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            queue.next = self._monotonic() + self._interval
