"""Those who want to hear of lock, unlock and rotation."""

from collections.abc import Callable

import msgspec

from unsealerd.model import State


class Event(msgspec.Struct, frozen=True):
    """``event``: state, locked, unlocked, created, rotated or revoked."""

    event: str
    state: State
    key: str | None
    version: int | None


Listener = Callable[[Event], None]


class Watchers:
    def __init__(self) -> None:
        self._listeners: dict[int, Listener] = {}
        self._next = 0

    def add(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` for every event, until what this returns is called."""
        token = self._next
        self._next += 1
        self._listeners[token] = listener
        return lambda: self._listeners.pop(token, None) and None

    def tell(self, event: Event) -> None:
        for listener in list(self._listeners.values()):
            listener(event)
