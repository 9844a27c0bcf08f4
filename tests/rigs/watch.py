"""The watcher as a process, beside a server: with a console, login messages and a systemctl that only takes notes."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from rigs.server import PATIENCE, wait_for

PROGRAM = Path(__file__).parent / "watch_program.py"
SYSTEMCTL = """#!/bin/sh
printf '%s\\n' "$*" >> "{calls}"
case "$*" in {failing}) echo "Failed to do it" >&2; exit 1;; esac
{extra}
"""


class Watch:
    """`environment`: more variables for the watcher and for what it starts."""

    def __init__(self, config: Path, base: Path, environment: Mapping[str, str] | None = None) -> None:
        self.base = base / "watched"
        self.bin = self.base / "bin"
        self.bin.mkdir(parents=True)
        self.console = self.base / "console"
        self.console.touch()
        self.issue = self.base / "issue"
        self.motd = self.base / "motd"
        self.memory = self.base / "memory"
        self.log = self.base / "log"
        self.calls_file = self.base / "calls"
        self._config = config
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        self.systemctl()

    def systemctl(self, *, failing: str = "nothing", extra: str = "") -> None:
        """`failing`: a shell pattern of the arguments that it refuses. `extra`: what else it does, a line of shell."""
        path = self.bin / "systemctl"
        path.write_text(SYSTEMCTL.format(calls=self.calls_file, failing=failing, extra=extra))
        path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        """What systemctl was asked for, without the options that every call has."""
        if not self.calls_file.exists():
            return []
        lines = self.calls_file.read_text().splitlines()
        assert all(line.startswith("--no-block ") for line in lines)
        return [line.removeprefix("--no-block ").replace("-- ", "") for line in lines]

    @property
    def said(self) -> list[str]:
        return self.console.read_text().splitlines()

    def letter(self, event: str) -> dict[str, Any]:
        """The one of that event; there must be no more."""
        [path] = self.memory.glob(f"event-{event}-*.json")
        found = json.loads(path.read_text())
        assert isinstance(found, dict)
        return found

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def start(self) -> Self:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, PROGRAM, str(self._config), str(self.base)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", **self._environment},
            )
        return self

    def hears(self, event: str, times: int = 1) -> None:
        """Wait until it has heard of the event so often, in all, and done what it does about it."""
        wait_for(lambda: self.log_text().count(f"event={event} ") >= times, f"{event}: {self.log_text()}")

    def stop(self) -> int:
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(PATIENCE)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
