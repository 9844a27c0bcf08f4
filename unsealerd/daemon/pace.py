"""Bounds on how fast anybody can make the daemon write audit records, and judge guesses."""

import asyncio
from collections import Counter
from collections.abc import Callable, Hashable

from unsealerd.errors import LimitExceeded

_FORGET_ABOVE = 1024  # keys held before those that are through are forgotten


class _Queue:
    """Who waits for one key, first come first served; ``next`` is when the first of them has its turn."""

    __slots__ = ("lock", "next", "waiting")

    def __init__(self, now: float) -> None:
        self.lock = asyncio.Lock()
        self.next = now
        self.waiting = 0


class Pace:
    """Turns at a minimum interval for each key. Nothing is dropped: who asks too often waits.

    Who gives up waiting takes no turn, so that hanging up again and again does not keep others of the same key waiting.
    """

    def __init__(
        self, interval: float, monotonic: Callable[[], float], most_waiting: int | None = None
    ) -> None:
        """``interval``: seconds. ``most_waiting``: for one key; None: any number."""
        self._most_waiting = most_waiting
        self._interval = interval
        self._monotonic = monotonic
        self._queues: dict[Hashable, _Queue] = {}

    async def turn(self, key: Hashable) -> None:
        """Raises `LimitExceeded` if too many wait already."""
        now = self._monotonic()
        if len(self._queues) > _FORGET_ABOVE:
            self._queues = {k: q for k, q in self._queues.items() if q.next > now or q.waiting}
        queue = self._queues.setdefault(key, _Queue(now))
        if self._most_waiting is not None and queue.waiting >= self._most_waiting:
            raise LimitExceeded("too many of this peer wait for their turn")
        queue.waiting += 1
        try:
            async with queue.lock:
                wait = queue.next - self._monotonic()
                if wait > 0:
                    await asyncio.sleep(wait)
                queue.next = self._monotonic() + self._interval
        finally:
            queue.waiting -= 1


class Refusals:
    """How many answers may be refused in one interval: a few of each key, and then so many of all keys together.

    Who has had none refused is not held up by those who have, as long as these come from few places.
    """

    def __init__(
        self, interval: float, monotonic: Callable[[], float], *, of_each: int, keys: int, of_all: int
    ) -> None:
        """``interval``: seconds. At most ``of_each`` * ``keys`` + ``of_all`` in each."""
        self._interval = interval
        self._monotonic = monotonic
        self._of_each = of_each
        self._keys = keys
        self._of_all = of_all
        self._ends = 0.0
        self._counts: Counter[Hashable] = Counter()
        self._beyond = 0

    def check(self, key: Hashable) -> None:
        """Before an answer is judged. Raises `LimitExceeded`."""
        now = self._monotonic()
        if now >= self._ends:
            self._ends = now + self._interval
            self._counts.clear()
            self._beyond = 0
        if not self._has_own(key) and self._beyond >= self._of_all:
            raise LimitExceeded("too many answers were refused")

    def count(self, key: Hashable) -> None:
        """One that was checked is refused."""
        if self._has_own(key):
            self._counts[key] += 1
        else:
            self._beyond += 1

    def _has_own(self, key: Hashable) -> bool:
        if key in self._counts:
            return self._counts[key] < self._of_each
        return len(self._counts) < self._keys
