"""The service manager's store of our descriptors: what is in it outlives this process (sd_notify(3), FDSTORE=1).

systemd hands the content to the next process of the service as LISTEN_FDS (sd_listen_fds(3)), and empties the store when the
service is stopped for good.
"""

import logging
import os
import re
from collections.abc import MutableMapping

import msgspec

from unsealerd import notify

_FIRST = 3  # SD_LISTEN_FDS_START
_MAX_RECEIVED = 65536
ROOM = 1024  # FileDescriptorStoreMax= of our unit; systemd says it itself from version 254 on
_PATIENCE = 5.0  # seconds: on the thread of the changes
_NAME = re.compile(r"[!-9;-~]{1,255}")  # what systemd takes as FDNAME: printable, no colon

_log = logging.getLogger("unsealerd")


class Received(msgspec.Struct, frozen=True):
    """A descriptor from the store. Whoever takes it closes it."""

    name: str
    fd: int


class FdStore:
    """``available``: False where no service manager would keep anything. ``room``: how many descriptors it keeps at most."""

    def __init__(self, *, available: bool = False, room: int = ROOM) -> None:
        self.available = available
        self.room = room

    @classmethod
    def of(cls, environment: MutableMapping[str, str]) -> "tuple[FdStore, list[Received]]":
        """The store of this service, and what was in it. The variables are removed: children are not meant."""
        received = _received(environment)
        for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
            environment.pop(name, None)
        text = environment.get("FDSTORE", "")
        room = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else ROOM
        return cls(available=bool(environment.get("NOTIFY_SOCKET")) and room > 0, room=room), received

    def store(self, name: str, fd: int, *, until_hangup: bool = False, patience: float = _PATIENCE) -> bool:
        """Whether a copy of the descriptor was handed over, in ``patience`` seconds.

        ``until_hangup``: the service manager drops a dead connection.
        """
        if not self.available or _NAME.fullmatch(name) is None:
            return False
        if until_hangup:
            return notify.notify(fds=(fd,), patience=patience, FDSTORE=1, FDNAME=name)
        return notify.notify(fds=(fd,), patience=patience, FDSTORE=1, FDNAME=name, FDPOLL=0)

    def remove(self, name: str) -> None:
        """Have every descriptor of this name closed."""
        if self.available and not notify.notify(FDSTOREREMOVE=1, FDNAME=name):
            _log.error("the service manager does not take back name=%s", name)


def _received(environment: MutableMapping[str, str]) -> list[Received]:
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return []
    text = environment.get("LISTEN_FDS", "")
    count = int(text) if re.fullmatch(r"[0-9]{1,5}", text) else 0
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    found: list[Received] = []
    for number in range(min(count, _MAX_RECEIVED)):
        fd = _FIRST + number
        try:
            os.set_inheritable(fd, False)
        except OSError:
            continue  # not open: there is nothing to take over
        found.append(Received(names[number] if number < len(names) else "", fd))
    return found
