"""Promises 6 and 7 over a rotation of the audit log: a crash at any instant loses no record and doubles none.

strace kills the writer at each call; for a power cut, a model of the disk forgets every set of changes of names that were not
made durable, and every content that was not.
"""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rigs.auditlog import KEEP, SMALL, current, files, opened, written
from rigs.faults import CALLS, Point, calls_by_thread, points_between

from unsealerd.cli.chainedlog import ChainedLog
from unsealerd.core.auditchain import AUDIT_LOG, closed_name
from unsealerd.errors import AuditUnwritable

pytestmark = [pytest.mark.promise(6), pytest.mark.promise(7)]

WRITER = """
import os, sys
from pathlib import Path
from unsealerd.daemon.audit import AuditLog
log = AuditLog(Path(sys.argv[1]), lambda: 1_800_000_000.25)
log.limit(int(sys.argv[2]), int(sys.argv[3]))
log.open()
for number in range(int(sys.argv[4]), int(sys.argv[5])):
    log.append("event", number=number)
    os.write(1, b"%d\\n" % number)
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return tmp_path / "saved"


def about_to_rotate(directory: Path) -> int:
    """A log that with the next record begins a file and removes one; that record's number."""
    directory.mkdir()
    number = 0
    while len(files(directory)) < KEEP + 1 or current(directory).stat().st_size < SMALL - 200:
        written(directory, 1, begin=number)
        number += 1
    return number


def check(directory: Path, acknowledged: list[int]) -> None:
    """Nothing is lost or doubled, now and after the next start, but for what the rotation removes from the beginning."""
    _check(directory, acknowledged)
    more = acknowledged[-1] + 2
    written(directory, 1, begin=more)
    _check(directory, acknowledged, more)
    assert len(files(directory)) <= KEEP + 2  # one that was to be removed goes with the next rotation


def _check(directory: Path, acknowledged: list[int], *more: int) -> None:
    log = ChainedLog(directory)
    try:
        found = [record["number"] for _, record in log.records() if record["event"] == "event"]
        if more:
            log.check_end()  # what was cut off is cleared away
        log.check_kept()
    finally:
        log.close()
    untold = acknowledged[-1] + 1  # this one may be whole, though nobody was told
    expected = [*acknowledged, *(untold for _ in range(untold in found)), *more]
    assert found == expected[-len(found) :]
    assert len(found) > KEEP


# --- killed


def run(directory: Path, begin: int, log: Path, point: Point | None = None) -> tuple[int, list[int]]:
    """Two records under strace, which kills the writer at the point; its exit code, and what it was told is durable."""
    names = ["", AUDIT_LOG, f"{AUDIT_LOG}.new", *(path.name for path in files(directory)), closing(directory)]
    done = subprocess.run(
        [
            *("strace", "-qq", "-f", "-o", str(log), "-e", f"trace={CALLS}"),
            *(("-e", f"inject={point.name}:signal=KILL:when={point.number}") if point else ()),
            *(argument for name in names for argument in ("-P", str(directory / name))),
            *(sys.executable, "-c", WRITER),
            *(str(argument) for argument in (directory, SMALL, KEEP, begin, begin + 2)),
        ],
        stdout=subprocess.PIPE,
        check=False,
        timeout=60,
    )
    return done.returncode, [int(line) for line in done.stdout.split()]


def closing(directory: Path) -> str:
    """The name that the file that is written to gets when it is closed."""
    first = json.loads(current(directory).read_bytes().splitlines()[0])
    return closed_name(first["seq"])


def test_killed_at_every_call_of_a_rotation(tmp_path: Path, saved: Path) -> None:
    place, log = tmp_path / "place", tmp_path / "strace.log"
    number = about_to_rotate(saved)
    shutil.copytree(saved, place)
    assert run(place, number, log) == (0, [number, number + 1])
    (calls,) = calls_by_thread(log).values()
    points = [point for point in points_between([], calls) if point.name != "openat"]
    assert {"write", "fsync", "fdatasync", "link", "rename", "unlink"} <= {point.name for point in points}
    for point in points:
        shutil.rmtree(place)
        shutil.copytree(saved, place)
        code, told = run(place, number, log, point)
        assert code in (-signal.SIGKILL, 128 + signal.SIGKILL), f"{point} was not reached"
        check(place, [*range(number), *told])


# --- the power goes


Outcome = tuple[tuple[tuple[str, ...], bytes], ...]
"""The files that are found, each with its names."""


@dataclass
class Inode:
    now: bytes = b""
    durable: bytes = b""


@dataclass
class Moment:
    """What a power cut at this instant finds: the names that are durable, the changes that may be, and what was told."""

    names: dict[str, Inode]
    pending: list[Callable[[dict[str, Inode]], None]]
    contents: dict[int, tuple[Inode, bytes, bytes]]
    told: int

    def outcomes(self) -> Iterator[Outcome]:
        """Every content of the directory that may be found."""
        for kept in itertools.product((False, True), repeat=len(self.pending)):
            names = dict(self.names)
            for change in itertools.compress(self.pending, kept):
                change(names)
            for reached in (0, 1):
                yield tuple(
                    (tuple(name for name in sorted(names) if names[name] is inode), (old, new)[reached])
                    for inode, old, new in self.contents.values()
                )


class Disk:
    """Follows what a writer does to the files of one directory, in this process."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        self._inodes: dict[int, Inode] = {}
        self._all: list[Inode] = []
        self._names: dict[str, Inode] = {}
        self._pending: list[Callable[[dict[str, Inode]], None]] = []
        self.moments: list[Moment] = []
        self.told = 0
        self.fails = False  # the next `fdatasync`, and what it leaves is on the disk all the same
        for path in directory.iterdir():
            data = path.read_bytes()
            self._names[path.name] = self._new(path.stat().st_ino, data)
        self._real = {
            name: getattr(os, name) for name in ("open", "write", "ftruncate", "fsync", "fdatasync")
        }
        for name in self._real:
            monkeypatch.setattr(os, name, getattr(self, f"_{name}"))
        for name in ("link", "rename", "unlink"):
            monkeypatch.setattr(os, name, self._changing(name, getattr(os, name)))

    def _new(self, number: int, data: bytes = b"") -> Inode:
        inode = Inode(data, data)
        self._inodes[number] = inode
        self._all.append(inode)
        return inode

    def _moment(self) -> None:
        contents = {id(inode): (inode, inode.durable, inode.now) for inode in self._all}
        self.moments.append(Moment(dict(self._names), list(self._pending), contents, self.told))

    def _change(self, change: Callable[[dict[str, Inode]], None]) -> None:
        self._pending.append(change)
        self._moment()

    def _open(self, path: Any, flags: int, *rest: Any, **more: Any) -> int:
        fd: int = self._real["open"](path, flags, *rest, **more)
        if flags & os.O_EXCL:
            inode, name = self._new(os.fstat(fd).st_ino), Path(path).name
            self._change(lambda names: names.__setitem__(name, inode))
        return fd

    def _write(self, fd: int, data: bytes) -> int:
        count: int = self._real["write"](fd, data)
        self._inodes[os.fstat(fd).st_ino].now += data[:count]
        self._moment()
        return count

    def _fsync(self, fd: int) -> None:
        self._real["fsync"](fd)
        inode = self._inodes.get(os.fstat(fd).st_ino)
        if inode is None:
            assert os.path.samestat(os.fstat(fd), self._directory.stat())
            for change in self._pending:
                change(self._names)
            self._pending = []
        else:
            inode.durable = inode.now
        self._moment()

    def _fdatasync(self, fd: int) -> None:
        self._fsync(fd)
        if self.fails:
            self.fails = False
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _ftruncate(self, fd: int, size: int) -> None:
        self._real["ftruncate"](fd, size)
        inode = self._inodes[os.fstat(fd).st_ino]
        inode.now = inode.now[:size]
        self._moment()

    def _changing(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*paths: Any, **more: Any) -> None:
            real(*paths, **more)
            first, *second = (Path(path).name for path in paths)

            def change(names: dict[str, Inode]) -> None:
                inode = names.get(first)
                if inode is None:
                    return  # what made this name was itself forgotten
                if name != "link":
                    del names[first]
                if second:
                    names[second[0]] = inode

            self._change(change)

        return call


def _power_goes(disk: Disk, directory: Path, number: int) -> int:
    """At each instant, with each outcome; how many there are. ``number``: of the first record that was written."""
    seen = {(moment.told, outcome) for moment in disk.moments for outcome in moment.outcomes()}
    for at, (told, outcome) in enumerate(seen):
        place = directory / str(at)
        place.mkdir()
        for names, data in outcome:
            for name in names[:1]:
                (place / name).write_bytes(data)
            for name in names[1:]:
                (place / name).hardlink_to(place / names[0])
        check(place, list(range(number + told)))
    return len(seen)


def test_the_power_goes_at_any_instant_of_a_rotation(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = about_to_rotate(saved)
    log = opened(saved)
    with monkeypatch.context() as patch:
        disk = Disk(saved, patch)
        for more in range(9):  # three rotations
            log.append("event", number=number + more)
            disk.told += 1
    log.close()
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "fdatasync", lambda _: None)
    assert _power_goes(disk, tmp_path, number) > 40


def test_a_record_that_was_taken_back_is_not_in_the_closed_file(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be on the disk; what is closed is made durable without it."""
    number = about_to_rotate(saved)
    log = opened(saved)
    log.append("event", number=number)
    with monkeypatch.context() as patch:
        disk = Disk(saved, patch)
        disk.fails = True
        with pytest.raises(AuditUnwritable):
            log.append("event", number=number + 1)
        log.append("event", number=number + 1, pad="x" * (SMALL // 2))
        disk.told += 1
    log.close()
    assert len(files(saved)) == KEEP + 1
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "fdatasync", lambda _: None)
    assert _power_goes(disk, tmp_path, number + 1) > 10
