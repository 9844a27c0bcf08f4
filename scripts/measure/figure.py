"""A figure: a ratio of medians, of ours and of a peer whose turns alternate with ours."""

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rigs.server import PATIENCE, Server

MESSAGE = bytes(range(64))


Turn = Callable[[], float]
"""Does something, and gives the seconds that it took (for each request)."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A line of the table. Without a ratio there was nothing to compare with; `against` then says why."""

    what: str
    against: str
    reach: str
    ratio: float | None
    ours: str
    theirs: str


def figure(what: str, against: str, reach: str, ours: float, theirs: float | None) -> Figure:
    """Of seconds for each turn. With ``>=`` it is our throughput that is so many times the peer's."""

    def show(value: float | None) -> str:
        if value is None:
            return ""
        if reach.startswith(">="):
            return f"{1 / value:,.0f}/s"
        return f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} µs"

    ratio = None if theirs is None else theirs / ours if reach.startswith(">=") else ours / theirs
    return Figure(what, against, reach, ratio, show(ours), show(theirs))


def compare(rounds: int, ours: Turn, theirs: Turn) -> tuple[float, float]:
    """The medians of both, taken in turns, after one turn each that does not count."""
    seen = [(ours(), theirs()) for _ in range(rounds + 1)][1:]
    return statistics.median(a for a, _ in seen), statistics.median(b for _, b in seen)


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def run(*command: str, stdin: bytes = b"", **environment: str) -> bytes:
    done = subprocess.run(
        command, input=stdin, capture_output=True, env={**os.environ, **environment}, timeout=PATIENCE
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command}: exit {done.returncode}: {done.stderr.decode(errors='replace')}")
    return done.stdout


def absent(*programs: str) -> str:
    """Why a peer cannot be measured; empty if it can."""
    missing = [Path(program).name for program in programs if shutil.which(program) is None]
    return f"not measured: {', '.join(missing)} not installed" if missing else ""


def background(stack: ExitStack, *command: str) -> int:
    """A process until the end of the stack; its id."""
    process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.DEVNULL))
    stack.callback(process.kill)
    return process.pid


def initialised(stack: ExitStack, keys: Sequence[str] = ("demo",), **environment: str) -> Server:
    """A running server, unlocked, without a TPM."""
    server = stack.enter_context(Server(tpm=False, keys=keys))
    server.extra_environment.update(environment)
    server.start().ctl("init")
    return server


def rss(what: str, reach: str, pid: int) -> Figure:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Figure(what, "", reach, None, f"{pages * os.sysconf('SC_PAGE_SIZE') / 1e6:.1f} MB", "")
