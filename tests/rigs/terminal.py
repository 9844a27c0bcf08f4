"""A person in front of a terminal, who starts a program and types what it asks for."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 60.0  # seconds

# The child makes the pseudo-terminal its controlling one, which /dev/tty then is.
_CHILD = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@dataclass(frozen=True, slots=True)
class Typed:
    code: int
    out: str
    err: str
    screen: str
    """What the terminal showed: questions, and what was echoed."""
    command_line: str
    """As every user of the machine could see it, at the moment of the last question."""

    @property
    def all(self) -> str:
        return "".join((self.out, self.err, self.screen, self.command_line))


def at_terminal(
    command: Sequence[str | Path], *dialogue: tuple[str, str], environment: dict[str, str] | None = None
) -> Typed:
    """Run; wait for each question, and type its answer and Enter. Standard output and error are pipes."""
    screen, device = os.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, *command],
            stdin=device,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            return _converse(process, screen, dialogue)
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    finally:
        os.close(screen)
        os.close(device)


def _converse(process: "subprocess.Popen[bytes]", screen: int, dialogue: Sequence[tuple[str, str]]) -> Typed:
    seen, command_line = b"", ""
    for question, answer in dialogue:
        deadline = time.monotonic() + PATIENCE
        before = len(seen)
        while question.encode() not in seen[before:]:
            assert time.monotonic() < deadline, f"not asked {question!r}: {seen!r}"
            assert process.poll() is None, (question, seen, process.communicate())
            if select.select([screen], [], [], 0.1)[0]:
                seen += os.read(screen, 4096)
        command_line = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode()
        os.write(screen, answer.encode() + b"\n")
    out, err = process.communicate(timeout=PATIENCE)
    while select.select([screen], [], [], 0)[0]:
        seen += os.read(screen, 4096)
    return Typed(process.returncode, out.decode(), err.decode(), seen.decode(errors="replace"), command_line)
