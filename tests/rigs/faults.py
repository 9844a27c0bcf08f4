"""Faults at the system call boundary: strace stops, or fails, the daemon at one call on one of the files of the store."""

from dataclasses import dataclass
from pathlib import Path

from rigs.server import Server

# What changes the disk, or makes a change durable.
CALLS = "openat,write,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat,ftruncate"


def watched(server: Server) -> list[Path]:
    """The files of the backup store, under the names that they have during a write, and their directory."""
    names = ("keyring.age", "keyring.age.new", "keyring.age.previous", "sealed.json", "sealed.json.new")
    return [server.state, *(server.state / name for name in names)]


@dataclass(frozen=True, slots=True)
class Point:
    """One call: the `number`-th (from 1) of this name in its thread, as strace counts."""

    name: str
    number: int


def strace(server: Server, log: Path, point: Point | None = None, fault: str = "") -> tuple[str, ...]:
    """The command to put before the daemon; strace is its child, so that signals reach the daemon.

    `fault` happens at the `point`: ``signal=KILL`` or ``error=ENOSPC`` as in strace(1).
    """
    paths = [argument for path in watched(server) for argument in ("-P", str(path))]
    inject = ("-e", f"inject={point.name}:{fault}:when={point.number}") if point is not None else ()
    return ("strace", "-D", "-f", "-qq", "-o", str(log), "-e", f"trace={CALLS}", *inject, *paths)


def calls_by_thread(log: Path) -> dict[str, list[str]]:
    """The calls that strace saw, by thread, in their order."""
    found: dict[str, list[str]] = {}
    for line in log.read_text(errors="replace").splitlines():
        thread, _, call = line.partition(" ")
        call = call.strip()
        # A call that another thread interrupted is in the log twice: begun, and resumed.
        if "(" in call and not call.startswith(("<...", "+++", "---")):
            found.setdefault(thread, []).append(call)
    return found


def strip(call: str) -> str:
    """The name of the system call."""
    return call.partition("(")[0]


def points_between(before: list[str], after: list[str]) -> list[Point]:
    """The points of the calls by which `after` is longer than `before`, a thread's log at two times."""
    counts: dict[str, int] = {}
    points: list[Point] = []
    for number, call in enumerate(after):
        name = strip(call)
        counts[name] = counts.get(name, 0) + 1
        if number >= len(before):
            points.append(Point(name, counts[name]))
    return points
