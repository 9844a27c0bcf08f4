"""A bound on how fast anybody can make the daemon write audit records."""

import asyncio
from collections.abc import Callable, Hashable

_FORGET_ABOVE = 1024  # keys held before those that are through are forgotten


class Pace:
    """Turns at a minimum interval for each key. Nothing is dropped: who asks too often waits."""

    def __init__(self, interval: float, monotonic: Callable[[], float]) -> None:
        """``interval``: seconds."""
        self._interval = interval
        self._monotonic = monotonic
        self._next: dict[Hashable, float] = {}

    async def turn(self, key: Hashable) -> None:
        now = self._monotonic()
        if len(self._next) > _FORGET_ABOVE:
            self._next = {key: time for key, time in self._next.items() if time > now}
        at = max(now, self._next.get(key, now))
        self._next[key] = at + self._interval
        if at > now:
            await asyncio.sleep(at - now)
