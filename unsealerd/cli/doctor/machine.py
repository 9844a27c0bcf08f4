"""What a check asks of the machine. Paths below `root`, so that a test can put another machine there."""

import ctypes
import os
import pwd
import stat
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SYSTEMCTL_SECONDS = 15
_TIMEX_BYTES = 512  # struct timex has 208 on 64-bit machines
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


@dataclass(frozen=True, slots=True)
class Account:
    """A user, as the kernel's checks of permissions see it."""

    uid: int
    gids: frozenset[int]

    def may_read(self, found: os.stat_result) -> bool:
        """The first class that fits decides: path_resolution(7)."""
        if found.st_uid == self.uid:
            return bool(found.st_mode & stat.S_IRUSR)
        if found.st_gid in self.gids:
            return bool(found.st_mode & stat.S_IRGRP)
        return bool(found.st_mode & stat.S_IROTH)


@dataclass(frozen=True, slots=True)
class Machine:
    root: Path = Path("/")

    def text(self, path: str) -> str | None:
        """The text of a file such as ``proc/swaps``, or None."""
        try:
            return (self.root / path).read_text(errors="replace")
        except OSError:
            return None

    def raw(self, path: str) -> bytes | None:
        try:
            return (self.root / path).read_bytes()
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        return (self.root / path).exists()

    def now(self) -> float:
        return time.time()

    def account(self, name: str) -> Account | None:
        """The user of that name, or None where there is none."""
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            return None
        return Account(user.pw_uid, frozenset(os.getgrouplist(name, user.pw_gid)))

    def kernel_says_synchronised(self) -> bool | None:
        """What adjtimex(2) says of the clock: whoever keeps the time, it is told; None if it cannot be asked."""
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
        return None if state < 0 else state != _TIME_ERROR

    def units(self, names: Sequence[str], properties: Sequence[str]) -> dict[str, Mapping[str, str]] | None:
        """The properties of units as systemd knows them, by name; None if it does not answer."""
        try:
            done = subprocess.run(
                ["systemctl", "show", f"--property=Id,{','.join(properties)}", "--", *names],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_SYSTEMCTL_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        blocks = [block for block in done.stdout.split("\n\n") if block.strip()]
        if done.returncode != 0 or len(blocks) != len(names):
            return None
        # One block for each name, in the order asked; Id may be another name, for an alias.
        return {
            name: dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
            for name, block in zip(names, blocks, strict=True)
        }
