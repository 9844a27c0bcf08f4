"""Where the watcher tells: the console, the login messages, and its own runtime directory."""

import contextlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from unsealerd.errors import UnsealerdError
from unsealerd.watch.event import Event, Letter
from unsealerd.watch.textfile import PRIVATE, remove, replace

_log = logging.getLogger("unsealerd-watch")


@dataclass(frozen=True, slots=True)
class Places:
    console: Path = Path("/dev/console")
    issue: Path = Path("/run/issue.d/unsealerd.issue")
    """agetty(8) shows it above the login prompt of every console."""
    motd: Path = Path("/run/motd.d/unsealerd")
    """pam_motd(8) shows it to whoever logs in."""
    memory: Path = Path("/run/unsealerd-watch")

    def say(self, event: Event) -> None:
        """One line on the console. Never waits: a serial console that nobody reads may take nothing."""
        line = f"unsealerd: {_plain(event.sentence())}\r\n"
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(self.console, flags)
        except OSError as err:
            _log.warning("console=%s error=%s", self.console, err.strerror)
            return
        try:
            os.write(descriptor, line.encode("ascii", "replace"))
        except OSError as err:
            _log.warning("console=%s error=%s", self.console, err.strerror)
        finally:
            os.close(descriptor)

    def post(self, event: Event) -> None:
        """The login messages of a locked host; none of another."""
        for path in (self.issue, self.motd):
            try:
                if event.event == "locked":
                    replace(path, f"{_plain(event.sentence())}\n")
                else:
                    remove(path)
            except UnsealerdError as err:
                _log.warning("message=%s error=%s", path, err.detail)

    def hand_over(self, letter: Letter) -> None:
        """Write the credential of ``unsealerd-notify@EVENT.service``. Raises `AccessDenied`, `StorageFailed`."""
        replace(self.memory / f"event-{letter.event.event}.json", letter.encode(), PRIVATE)

    def prepare(self) -> None:
        """The runtime directory, for root alone; systemd makes it in a unit."""
        with contextlib.suppress(OSError):  # what is written there says so
            self.memory.mkdir(mode=0o700, parents=True, exist_ok=True)


def _plain(text: str) -> str:
    """Fit for a terminal, and for agetty, which reads a backslash as an order."""
    return "".join(c if c.isascii() and c.isprintable() and c != "\\" else "?" for c in text)
