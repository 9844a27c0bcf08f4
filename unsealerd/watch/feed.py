"""What the daemon says, as it happens: a thread that listens on the admin socket, and connects again for ever.

The watcher is root, and the daemon is not: what it says is one of the words of the design or is refused, and no more of it
waits than `MOST_WAITING`.
"""

import queue
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from unsealerd.client.connection import Connection
from unsealerd.errors import BadMessage, UnsealerdError
from unsealerd.model import LockReason, State

_EVENT = re.compile(r"[a-z_]{1,32}")
MONITOR = "io.unsealerd.Admin.Monitor"
FIRST_PAUSE = 0.2  # seconds before the second try to connect; doubled before each further one, up to...
LONGEST_PAUSE = 10.0
MOST_WAITING = 64  # events; what comes then waits in the socket, and the daemon for it
_LONG_ENOUGH = 0.1  # seconds between two looks at whether there is room
_PATIENCE = 60.0  # seconds for the first answer: the daemon holds it back until its start is through


@dataclass(frozen=True, slots=True)
class Heard:
    """One event of ``io.unsealerd.Admin.Monitor``: ``state`` (as it is now), locked, unlocked, rotated, revoked or created."""

    event: str
    state: State
    reason: str | None
    """A `LockReason`."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The daemon does not answer, or not any more."""

    error: UnsealerdError


Wake = Heard | Lost | None
"""None: it is time to end."""


class Feed:
    """Puts what it hears into a queue; after a loss, once, that nothing is heard."""

    def __init__(self, admin: Path, wakes: "queue.SimpleQueue[Wake]", pause: Callable[[float], None]) -> None:
        self._admin = admin
        self._wakes = wakes
        self._pause = pause

    def start(self) -> None:
        # A daemon thread: whatever it waits for, the end of the process does not.
        threading.Thread(target=self.run, name="feed", daemon=True).start()

    def run(self) -> None:
        """Listen for ever."""
        try:
            self._listen()
        finally:
            self._wakes.put(
                None
            )  # a watcher that hears nothing any more must not seem to watch: it ends, and is restarted

    def _listen(self) -> None:
        pause = FIRST_PAUSE
        silent = False
        while True:
            try:
                with Connection(self._admin, timeout=_PATIENCE) as connection:
                    for answer in connection.stream(MONITOR):
                        event = heard(answer)
                        while self._wakes.qsize() >= MOST_WAITING:
                            self._pause(_LONG_ENOUGH)
                        self._wakes.put(event)
                        pause, silent = FIRST_PAUSE, False
                raise BadMessage("the daemon ended the stream")
            except UnsealerdError as err:
                if not silent:
                    self._wakes.put(Lost(err))
                silent = True
            self._pause(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def heard(answer: Mapping[str, object]) -> Heard:
    """Raises `BadMessage`."""
    match answer:
        case {"event": str(event), "state": str(state)} if _EVENT.fullmatch(event):
            reason = answer.get("reason")
            try:
                return Heard(event, State(state), None if reason is None else LockReason(reason).value)
            except ValueError as err:
                raise BadMessage("the daemon names a state, or a reason, that is none") from err
    raise BadMessage("the answer to Monitor is not one")
