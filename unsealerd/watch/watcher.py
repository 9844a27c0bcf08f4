"""The watcher: what it does about what it hears.

What people are told follows each event; what units and the metrics follow is the state as it is when no event waits, so that
a rotation that happened while nobody listened is acted upon too, and a hundred at once reload a unit once.
"""

import logging
import queue
import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from unsealerd import __version__
from unsealerd.client.connection import Connection
from unsealerd.core.metrics import exposition, metrics
from unsealerd.errors import UnsealerdError
from unsealerd.model import State
from unsealerd.notify import notify
from unsealerd.watch import textfile, units
from unsealerd.watch.event import Event, Letter
from unsealerd.watch.feed import Heard, Lost, Wake
from unsealerd.watch.memory import Memory, recall, remember
from unsealerd.watch.places import Places, plain
from unsealerd.watch.settings import Settings

INTERVAL = 30.0  # seconds between two writings of the metrics
_ADMIN = "io.unsealerd.Admin"
_PATIENCE = 15.0  # seconds for one question to the daemon
_MAX_REPLY = 16 << 20  # bytes: the description of as many keys as a configuration may declare

_MAX_HOST_NAME = 64  # characters: HOST_NAME_MAX, gethostname(2)
_MAX_NUMBER = 1 << 53  # above it JSON programs lose digits
_BOOT_ID = re.compile(r"[0-9a-f-]{36}")
_TOLD_AT_MOST = 20  # times in...
_TOLD_WITHIN = 60.0  # ...so many seconds; what comes then is told when it has calmed down, as it is by then

_STATES = frozenset({"state", "locked", "unlocked"})

_log = logging.getLogger("unsealerd-watch")


class Watcher:
    def __init__(
        self,
        settings: Settings,
        places: Places,
        admin: Path,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._places = places
        self._admin = admin
        self._clock = clock
        self._monotonic = monotonic
        self._told: deque[float] = deque(maxlen=_TOLD_AT_MOST)
        self._untold: tuple[State, str | None] | None = None
        self._memory = Memory()

    def run(self, wakes: "queue.SimpleQueue[Wake]") -> None:
        """Until a None is in the queue."""
        self._places.prepare()
        self._memory = recall(self._places.memory)
        notify(READY=1, STATUS="connecting to the daemon")
        while True:
            try:
                wake = wakes.get(timeout=INTERVAL)
            except queue.Empty:
                if self._untold is not None:
                    self._tell(*self._untold)
                self._write_metrics()
                continue
            if wake is None:
                notify(STOPPING=1)
                return
            self._note(wake)
            if wakes.empty():
                self._settle(wake)

    def _note(self, wake: Heard | Lost) -> None:
        match wake:
            case Lost(error):
                notify(STATUS="the daemon does not answer")
                _log.warning("daemon lost error=%s detail=%s", error.name, plain(error.detail))
            case Heard(event, state, reason):
                notify(STATUS=f"{state.value}: {reason}" if reason else state.value)
                if event in _STATES:
                    self._tell(state, reason)
                _log.info("event=%s state=%s reason=%s", event, state.value, reason)

    # --- people

    def _tell(self, state: State, reason: str | None) -> None:
        """Tell them what they were not told yet. That a host is unlocked is news only to those who heard that it was locked."""
        before = self._memory.told
        now = (state.value, reason)
        event = self._event(state, reason)
        self._places.post(event)  # always: the files may be from before a soft reboot, or gone
        if now == before:
            self._untold = None
            return
        if state is State.LOCKED or (
            state is State.UNLOCKED and before is not None and before[0] == "locked"
        ):
            if not self._may_tell():
                self._untold = state, reason
                return
            self._places.say(event)
            self._send(event)
        self._untold = None
        self._keep(replace(self._memory, told=now))

    def _may_tell(self) -> bool:
        """Whether one more is not too many: each is a unit that is started, and a line on the console."""
        now = self._monotonic()
        if len(self._told) == _TOLD_AT_MOST and now - self._told[0] < _TOLD_WITHIN:
            return False
        self._told.append(now)
        return True

    def _event(self, state: State, reason: str | None) -> Event:
        status = self._ask("Status").get("status")
        facts = status if isinstance(status, dict) else {}
        host, boot_id, since = (facts.get(name) for name in ("host_name", "boot_id", "since"))
        return Event(
            event="locked" if state is State.LOCKED else "unlocked",
            host=plain(host)[:_MAX_HOST_NAME] if isinstance(host, str) and host else "this host",
            reason=reason,
            since=since if isinstance(since, int) and 0 <= since < _MAX_NUMBER else int(self._clock()),
            boot_id=boot_id if isinstance(boot_id, str) and _BOOT_ID.fullmatch(boot_id) else "",
        )

    def _send(self, event: Event) -> None:
        wanted = self._settings.current().notify
        if not wanted.command and wanted.webhook is None:
            return
        try:
            letter = self._places.hand_over(Letter(event, wanted.command, wanted.webhook))
        except UnsealerdError as err:
            _log.error("notification error=%s detail=%s", err.name, err.detail)
            return
        units.start_notification(letter)

    # --- units and metrics

    def _settle(self, wake: Heard | Lost) -> None:
        if isinstance(wake, Heard) and wake.state is State.UNLOCKED:
            self._follow_keys()
        self._write_metrics()

    def _follow_keys(self) -> None:
        """Reload the units of every key that is not as it was last seen."""
        listed = self._ask("ListKeys").get("keys")
        if not isinstance(listed, list):
            return
        seen = {str(key["name"]): _versions(key) for key in listed if isinstance(key, dict) and "name" in key}
        before = self._memory.keys
        if seen == before:
            return
        declared = self._settings.current().keys
        changed = [
            name
            for name, versions in seen.items()
            if before is not None and before.get(name, versions) != versions
        ]
        wanted = [unit for name in changed if name in declared for unit in declared[name].on_rotate]
        for unit in dict.fromkeys(wanted):
            units.reload_or_restart(unit)
        # Afterwards: a watcher that dies in between does it twice, and never not at all.
        self._keep(replace(self._memory, keys=seen))

    def _write_metrics(self) -> None:
        path = self._settings.current().metrics.textfile
        if path is None:
            return
        status = self._ask("Status").get("status")
        facts = status if isinstance(status, dict) else None
        try:
            textfile.replace(path, exposition(metrics(facts, __version__, self._clock())))
        except UnsealerdError as err:
            _log.error("metrics error=%s detail=%s", err.name, err.detail)

    # --- parts

    def _ask(self, method: str) -> Mapping[str, object]:
        """One question to the daemon; nothing, if it does not answer."""
        try:
            with Connection(self._admin, timeout=_PATIENCE, max_reply=_MAX_REPLY) as connection:
                return connection.call(f"{_ADMIN}.{method}")
        except UnsealerdError as err:
            _log.warning("%s error=%s detail=%s", method, err.name, plain(err.detail))
            return {}

    def _keep(self, memory: Memory) -> None:
        self._memory = memory
        remember(self._places.memory, memory)


def _versions(key: Mapping[str, object]) -> str:
    """What a service that uses the key must know of: its primary version, and what was revoked."""
    versions = key.get("versions")
    parts = [
        f"{version.get('version')}:{version.get('state')}"
        for version in (versions if isinstance(versions, list) else [])
        if isinstance(version, dict) and version.get("state") in ("primary", "revoked")
    ]
    return " ".join(parts)
