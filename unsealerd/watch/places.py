"""Where the watcher tells: the console, the login messages, and its own runtime directory."""

import contextlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from unsealerd.errors import StorageFailed, UnsealerdError
from unsealerd.watch.event import Event, Letter
from unsealerd.watch.textfile import PRIVATE, remove, replace

MAX_LETTERS = 64  # that are kept; one that was told is not told again, but its unit may still be waiting for the network
_LETTER = re.compile(r"event-[a-z]+-([0-9]{1,18})\.json")

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
        line = f"unsealerd: {plain(event.sentence())}\r\n"
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
                    replace(path, f"{plain(event.sentence())}\n")
                else:
                    remove(path)
            except UnsealerdError as err:
                _log.warning("message=%s error=%s", path, err.detail)

    def hand_over(self, letter: Letter) -> str:
        """Write the credential of ``unsealerd-notify@NAME.service``; returns NAME, as ``locked-7``.

        The oldest letters are removed: how many wait is bounded. Raises `AccessDenied`, `StorageFailed`.
        """
        there = self._letters()
        name = f"{letter.event.event}-{max(there, default=0) + 1}"
        replace(self.memory / f"event-{name}.json", letter.encode(), PRIVATE)
        for number in sorted(there)[: -(MAX_LETTERS - 1)]:
            remove(there[number])
        return name

    def _letters(self) -> dict[int, Path]:
        """By number. Raises `StorageFailed`."""
        try:
            found = {path: _LETTER.fullmatch(path.name) for path in self.memory.iterdir()}
        except FileNotFoundError:
            return {}  # it is made with the first letter
        except OSError as err:
            raise StorageFailed(f"{self.memory}: {err.strerror}") from err
        return {int(match[1]): path for path, match in found.items() if match}

    def prepare(self) -> None:
        """The runtime directory, for root alone; systemd makes it in a unit."""
        with contextlib.suppress(OSError):  # what is written there says so
            self.memory.mkdir(mode=0o700, parents=True, exist_ok=True)


def plain(text: str) -> str:
    """Fit for a log, a terminal, and for agetty, which reads a backslash as an order."""
    return "".join(c if c.isascii() and c.isprintable() and c != "\\" else "?" for c in text)
