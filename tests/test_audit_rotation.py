"""The audit log in several files: bounded, one chain, and written on whatever a rotation meets."""

import errno
import itertools
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rigs.auditlog import KEEP, NOW, SMALL, current, files, numbers, opened, records, rotations, written
from rigs.server import Server, wait_for

from unsealerd.config import parse
from unsealerd.core.auditchain import (
    AUDIT_LOG,
    GENESIS,
    MAX_LINE_BYTES,
    ROTATED,
    Record,
    closed_first,
    closed_name,
    link,
)
from unsealerd.daemon.audit import AuditLog, in_thread
from unsealerd.errors import AuditUnwritable, ConfigInvalid

# --- in order


def test_a_full_file_is_closed_and_the_chain_goes_on(tmp_path: Path) -> None:
    paths = written(tmp_path, 12, keep=9)
    assert len(paths) == 4
    assert paths[-1].name == AUDIT_LOG
    assert numbers(tmp_path) == list(range(12))
    for before, path in itertools.pairwise(paths):
        last = json.loads(before.read_bytes().splitlines()[-1])
        first = json.loads(path.read_bytes().splitlines()[0])
        assert (first["event"], first["prev"], first["seq"]) == (ROTATED, last["hash"], last["seq"] + 1)
        assert first["kept_from"] == 1
    for path in paths:
        assert path.stat().st_size <= SMALL
        assert path.stat().st_mode & 0o7777 == 0o600
        assert path.stat().st_nlink == 1
        if path.name != AUDIT_LOG:
            assert closed_first(path.name) == json.loads(path.read_bytes().splitlines()[0])["seq"]


def test_a_closed_file_never_changes(tmp_path: Path) -> None:
    log = opened(tmp_path)
    seen: dict[str, tuple[bytes, os.stat_result]] = {}
    for number in range(30):
        log.append("event", number=number)
        for path in files(tmp_path)[:-1]:
            data, found = seen.setdefault(path.name, (path.read_bytes(), path.stat()))
            assert path.read_bytes() == data
            assert (path.stat().st_ino, path.stat().st_mtime_ns) == (found.st_ino, found.st_mtime_ns)
    log.close()
    assert len(seen) > KEEP


def test_it_takes_no_more_room_than_was_said(tmp_path: Path) -> None:
    log = opened(tmp_path)
    for number in range(60):
        log.append("event", number=number)
        found = files(tmp_path)
        assert len(found) <= KEEP + 1
        assert sum(path.stat().st_size for path in found) <= (KEEP + 1) * SMALL
    log.close()
    first = records(tmp_path)[0]
    assert first["seq"] == rotations(tmp_path)[-1]["kept_from"]
    assert numbers(tmp_path)[-1] == 59
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files(tmp_path)}


def test_restarts_in_between_lose_and_double_nothing(tmp_path: Path) -> None:
    for begin in range(0, 40, 3):
        written(tmp_path, 3, begin=begin, keep=99)
    assert numbers(tmp_path) == list(range(42))
    assert len(rotations(tmp_path)) > 5


def test_a_start_reads_no_closed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much there is of the log, the start and the first record cost the same."""
    written(tmp_path, 100, keep=99)
    touched: list[str] = []
    read: list[int] = []
    real_open, real_pread = os.open, os.pread

    def noted(path: Any, *rest: Any, **more: Any) -> int:
        touched.append(Path(path).name)
        return real_open(path, *rest, **more)

    def counted(fd: int, count: int, offset: int) -> bytes:
        data = real_pread(fd, count, offset)
        read.append(len(data))
        return data

    monkeypatch.setattr(os, "open", noted)
    monkeypatch.setattr(os, "pread", counted)
    monkeypatch.setattr(os, "read", None)
    log = opened(tmp_path, max_size=1 << 20, keep=99)
    log.append("start")
    log.close()
    assert set(touched) == {AUDIT_LOG, tmp_path.name}
    assert sum(read) <= 2 * MAX_LINE_BYTES


def test_a_rotation_reads_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, 100, keep=99)
    log = opened(tmp_path, keep=99)
    before = len(files(tmp_path))
    read: list[int] = []
    real = os.pread

    def counted(fd: int, count: int, offset: int) -> bytes:
        data = real(fd, count, offset)
        read.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", counted)
    while len(files(tmp_path)) == before:
        log.append("event")
    log.close()
    assert len(read) == 1
    assert read[0] <= MAX_LINE_BYTES + 1


def test_a_log_from_before_there_was_a_bound(tmp_path: Path) -> None:
    prev = GENESIS
    with current(tmp_path).open("wb") as file:
        for number in range(1, 101):
            line, prev = link({"event": "event", "number": number - 1}, prev, number)
            file.write(line)
    whole = current(tmp_path).read_bytes()
    written(tmp_path, 1, begin=100)
    assert (tmp_path / closed_name(1)).read_bytes() == whole
    assert numbers(tmp_path) == list(range(101))


def test_fewer_are_kept_from_the_next_record_on(tmp_path: Path) -> None:
    written(tmp_path, 60, keep=9)
    log = opened(tmp_path, keep=9)
    assert len(files(tmp_path)) == 10
    log.limit(SMALL, 2)
    log.append("event", number=60)
    assert len(files(tmp_path)) == 3
    log.close()
    assert numbers(tmp_path)[-1] == 60
    assert records(tmp_path)[0]["seq"] == rotations(tmp_path)[-1]["kept_from"]


def test_the_mirror_hears_of_a_rotation_in_its_place(tmp_path: Path) -> None:
    heard: list[Record] = []
    log = opened(tmp_path, heard.append, keep=99)
    for number in range(12):
        log.append("event", number=number)
    log.close()
    assert [(record["seq"], record["hash"]) for record in heard] == [
        (record["seq"], record["hash"]) for record in records(tmp_path)
    ]


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("audit-000000000001.jsonl", 1),
        ("audit-999999999999.jsonl", 999_999_999_999),
        ("audit-1000000000000.jsonl", 10**12),
        ("audit-000000000000.jsonl", None),
        ("audit-1.jsonl", None),
        ("audit-0000000000001.jsonl", None),
        ("audit-00000000000\u0661.jsonl", None),
        ("audit-00000000000a.jsonl", None),
        ("audit-000000000001.jsonl.gz", None),
        ("audit-" + "9" * 5000 + ".jsonl", None),
        ("audit.jsonl", None),
        ("audit.jsonl.new", None),
        ("000000000001.jsonl", None),
        ("audit-000000000001", None),
    ],
)
def test_names(name: str, first: int | None) -> None:
    assert closed_first(name) == first
    assert first is None or closed_name(first) == name


# --- a rotation that fails

CALLS = ("open", "write", "fsync", "fdatasync", "link", "rename", "unlink", "pread", "listdir", "lstat")


class Faults:
    """Makes the calls of `os` fail from the n-th on, so many times; counts them all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self._bad = range(0)
        self._code = 0
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def arm(self, first: int, times: int, code: int) -> None:
        self.names = []
        self._bad, self._code = range(first, first + times), code

    def disarm(self) -> list[str]:
        self._bad = range(0)
        return self.names

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.names.append(name)
            if len(self.names) - 1 in self._bad:
                raise OSError(self._code, os.strerror(self._code))
            return real(*arguments, **named)

        return call


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    found = Faults(monkeypatch)
    yield found
    found.disarm()


def _about_to_rotate(directory: Path) -> int:
    """A log with too many files after the next record; that record's number."""
    number = 0
    while len(files(directory)) < KEEP + 1 or current(directory).stat().st_size < SMALL - 200:
        written(directory, 1, begin=number)
        number += 1
    return number


@pytest.mark.promise(6)
@pytest.mark.promise(7)
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_each_step_of_a_rotation(
    tmp_path: Path, faults: Faults, code: int, times: int
) -> None:
    """No record is lost or doubled, what was refused is not there, and the rotation is made up for."""
    saved = tmp_path / "saved"
    saved.mkdir()
    number = _about_to_rotate(saved)
    kept = numbers(saved)
    dry = tmp_path / "dry"
    shutil.copytree(saved, dry)
    log = opened(dry)
    faults.arm(0, 0, code)
    log.append("event", number=number)
    steps = faults.disarm()
    log.close()
    assert set(steps) == set(CALLS)
    for at in range(len(steps)):
        place = tmp_path / str(at)
        shutil.copytree(saved, place)
        log = opened(place)
        faults.arm(at, times, code)
        done = True
        try:
            log.append("event", number=number)
        except AuditUnwritable:
            done = False
        assert faults.disarm()[at] == steps[at]
        assert times > 1 or all(path.stat().st_nlink == 1 for path in place.iterdir()), "half of it is undone"
        oldest = len(kept) - len(_of(numbers(place), kept))
        assert numbers(place) == kept[oldest:] + [number] * done
        for more in range(number + 1, number + 9):
            log.append("event", number=more)
        log.close()
        written(place, 1, begin=number + 9)
        assert numbers(place)[-9 - done :] == [number] * done + list(range(number + 1, number + 10))
        assert len(files(place)) == KEEP + 1
        assert {path.name for path in place.iterdir()} == {path.name for path in files(place)}
        assert all(path.stat().st_nlink == 1 for path in files(place))


def _of(found: list[object], among: list[object]) -> list[object]:
    return [number for number in found if number in among]


@pytest.mark.promise(7)
def test_a_rotation_whose_name_is_not_durable_lets_nothing_take_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut the name could be the old file's, and the new records would be in a file without one."""
    heard: list[Record] = []
    number = _about_to_rotate(tmp_path)
    before = len(files(tmp_path)[-1].read_bytes().splitlines())
    log = opened(tmp_path, heard.append)
    real = os.fsync
    moved = current(tmp_path).stat().st_ino

    def failing(fd: int) -> None:
        if current(tmp_path).stat().st_ino != moved and os.fstat(fd).st_ino == tmp_path.stat().st_ino:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        for _ in range(3):
            with pytest.raises(AuditUnwritable, match="Input/output"):
                log.append("event", number=number)
    assert [record["event"] for record in records(tmp_path)][-2:] == ["event", ROTATED]
    assert heard == []
    assert before > 1
    assert len(files(tmp_path)) == KEEP + 2, "nothing is removed before the record that says so is durable"
    log.append("event", number=number)
    assert [record["event"] for record in heard] == [ROTATED, "event"]
    assert len(files(tmp_path)) == KEEP + 1
    log.close()
    assert numbers(tmp_path)[-1] == number


def test_a_rotation_that_goes_on_failing_lets_the_file_grow_and_says_so_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = opened(tmp_path, max_size=64 * 1000)
    for number in range(7):
        log.append("event", number=number, pad="x" * 8900)
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, "unsealerd"):
        patch.setattr(os, "link", _failing(errno.EPERM))
        for number in range(7, 60):
            log.append("event", number=number)
    said = [record.getMessage() for record in caplog.records]
    assert 5 <= len(said) <= 15, said
    assert all("could not be rotated" in text and "not permitted" in text for text in said)
    assert [path.name for path in tmp_path.iterdir()] == [AUDIT_LOG]
    assert numbers(tmp_path) == list(range(60))
    log.append("event", number=60, pad="x" * 1000)
    log.close()
    assert len(files(tmp_path)) == 2
    assert numbers(tmp_path) == list(range(61))


def _failing(code: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_closed_file_that_cannot_be_removed_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    number = _about_to_rotate(tmp_path)
    log = opened(tmp_path)
    real = os.unlink

    def stuck(path: Any, **named: Any) -> None:
        if Path(path).name.startswith("audit-"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(path, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", stuck)
        log.append("event", number=number)
    assert len(files(tmp_path)) == KEEP + 2
    assert "could not be removed" in caplog.text
    for more in range(4):
        log.append("event", number=number + 1 + more)
    log.close()
    assert len(files(tmp_path)) == KEEP + 1
    records(tmp_path)


def test_closed_files_are_removed_in_the_background(tmp_path: Path) -> None:
    """The record does not wait for that; and a thread that there is no room for is no error."""
    written(tmp_path, 30, keep=9)
    jobs: list[Callable[[], None]] = []
    log = AuditLog(tmp_path, lambda: NOW, None, jobs.append)
    log.limit(SMALL, KEEP)
    log.open()
    before = len(files(tmp_path))
    for number in range(30, 40):
        log.append("event", number=number)
    assert len(jobs) > 2
    assert len(files(tmp_path)) > before
    for job in reversed(jobs):
        job()
    log.close()
    assert len(files(tmp_path)) == KEEP + 1
    assert numbers(tmp_path)[-1] == 39


def test_without_a_thread_it_is_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    done: list[str] = []
    monkeypatch.setattr(threading.Thread, "start", refuse)
    in_thread(lambda: done.append("yes"))
    assert done == ["yes"]


# --- what somebody else did to the files


def test_what_a_crash_left_is_cleared(tmp_path: Path) -> None:
    number = _about_to_rotate(tmp_path)
    first = json.loads(current(tmp_path).read_bytes().splitlines()[0])["seq"]
    os.link(current(tmp_path), tmp_path / closed_name(first))
    (tmp_path / f"{AUDIT_LOG}.new").write_bytes(b"half a li")
    log = opened(tmp_path)
    assert not (tmp_path / closed_name(first)).exists(), "what is named as closed never changes"
    log.append("event", number=number)
    log.close()
    assert numbers(tmp_path)[-1] == number
    assert not (tmp_path / f"{AUDIT_LOG}.new").exists()
    assert len(files(tmp_path)) == KEEP + 1


@pytest.mark.promise(7)
@pytest.mark.parametrize("how", ["removed", "emptied", "cut"])
def test_an_open_file_that_is_gone_is_said_and_the_chain_goes_on(tmp_path: Path, how: str) -> None:
    """Like an end that was cut off, that is not noticed from the files alone; but it is not a new chain either."""
    paths = written(tmp_path, 12)
    last = json.loads(paths[-2].read_bytes().splitlines()[-1])
    if how == "removed":
        current(tmp_path).unlink()
    else:
        current(tmp_path).write_bytes(b"" if how == "emptied" else b'{"event":"au')
    written(tmp_path, 1, begin=100)
    after = [record for record in records(tmp_path) if int(str(record["seq"])) > last["seq"]]
    assert (after[0]["event"], after[0]["missing"], after[0]["prev"]) == (ROTATED, AUDIT_LOG, last["hash"])
    assert [record["event"] for record in after[1:]] == [*["audit_repaired"] * (how == "cut"), "event"]


@pytest.mark.promise(7)
@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-5], lambda data: b"", lambda data: data + b"{}\n", lambda data: b"{}\n" + data],
)
def test_an_open_file_that_is_gone_after_a_damaged_one(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    paths = written(tmp_path, 12)
    current(tmp_path).unlink()
    paths[-2].write_bytes(damage(paths[-2].read_bytes()))
    log = AuditLog(tmp_path, lambda: NOW)
    for step in (log.open, lambda: log.append("event")):
        with pytest.raises(AuditUnwritable):
            step()
    assert current(tmp_path).read_bytes() == b""


@pytest.mark.promise(7)
def test_an_oldest_file_that_is_gone_is_said_and_not_taken_for_removed(tmp_path: Path) -> None:
    number = _about_to_rotate(tmp_path)
    kept = rotations(tmp_path)[-1]["kept_from"]
    oldest, after, *_ = files(tmp_path)
    oldest.unlink()
    written(tmp_path, 1, begin=number)
    found = rotations(tmp_path)[-1]
    assert found["kept_from"] == kept
    assert found["missing"] == f"records {kept} to {int(str(closed_first(after.name))) - 1}"


@pytest.mark.promise(7)
def test_another_file_under_the_name_that_a_closed_one_gets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    number = _about_to_rotate(tmp_path)
    first = json.loads(current(tmp_path).read_bytes().splitlines()[0])["seq"]
    squatter = tmp_path / closed_name(first)
    squatter.write_bytes(b"mine\n")
    log = opened(tmp_path)
    log.append("event", number=number)
    assert squatter.read_bytes() == b"mine\n"
    assert "is another file" in caplog.text
    squatter.unlink()
    assert numbers(tmp_path)[-1] == number
    log.close()
    written(tmp_path, 1, begin=number + 1)
    assert squatter.exists()
    assert numbers(tmp_path)[-2:] == [number, number + 1]


@pytest.mark.promise(7)
@pytest.mark.parametrize("how", ["moved", "replaced", "link"])
def test_an_open_file_that_was_moved_while_it_is_written_to(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What is under its name is not closed in its place."""
    number = _about_to_rotate(tmp_path)
    log = opened(tmp_path)
    moved = tmp_path / "moved"
    current(tmp_path).rename(moved)
    if how == "replaced":
        current(tmp_path).write_bytes(b"mine\n")
    elif how == "link":
        current(tmp_path).symlink_to(moved)
    before = sorted(tmp_path.iterdir())
    log.append("event", number=number)
    log.close()
    assert f'"number":{number}'.encode() in moved.read_bytes()
    assert "could not be rotated" in caplog.text
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.promise(7)
def test_a_first_record_that_was_changed_is_not_built_upon(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    number = _about_to_rotate(tmp_path)
    data = current(tmp_path).read_bytes()
    current(tmp_path).write_bytes(data.replace(b'"kept_from":', b'"kept_frim":', 1))
    log = opened(tmp_path)
    log.append("event", number=number)
    log.close()
    assert "was changed" in caplog.text
    assert f'"number":{number}'.encode() in current(tmp_path).read_bytes()


# --- the whole daemon


def test_the_daemon_rotates_as_it_is_configured() -> None:
    with Server(tpm=False) as server:
        server.tables = '[audit]\nmax_size = "1M"\nkeep = 1\n'
        server.configure()
        server.state.mkdir(mode=0o711)
        log = opened(server.state, max_size=600_000)
        while len(files(server.state)) < 2:
            log.append("event", text="x" * 15_000)
        log.limit(1 << 21, KEEP)
        for length in (15_000, 1_000):
            while current(server.state).stat().st_size < (1 << 20) - length - 500:
                log.append("event", text="x" * length)
        log.close()
        server.start()
        server.ctl("init")
        key = server.key()
        for _ in range(10):
            assert server.key() == key
        wait_for(lambda: len(files(server.state)) == 2, "the oldest file is removed")
        closed, open_file = files(server.state)
        assert closed.stat().st_mode & 0o777 == 0o600
        assert closed.name != closed_name(1)
        assert open_file.stat().st_mode & 0o777 == 0o600
        assert server.ctl("audit").stdout.endswith(b" are no longer kept\n")
        server.stop(signal.SIGKILL)
        server.start()
        server.unlock()
        shown = server.json("audit")
        numbered = [record["seq"] for record in shown["records"]]
        assert numbered == list(range(shown["first"], shown["first"] + shown["count"]))
        assert closed_name(shown["first"]) == closed.name


# --- the configuration


def test_the_settings() -> None:
    assert (parse(b"").audit.max_size, parse(b"").audit.keep) == (64 << 20, 15)
    found = parse(b'[audit]\nmax_size = "2G"\nkeep = 1').audit
    assert (found.max_size, found.keep) == (2 << 30, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_size = 67108864", "audit.max_size: a size is text"),
        ('max_size = "64"', "audit.max_size: '64' is not a size"),
        ('max_size = "64k"', "audit.max_size: '64k' is not a size"),
        ('max_size = "0M"', "audit.max_size: '0M' is not a size"),
        ('max_size = "\u0661M"', "is not a size"),
        ('max_size = "17G"', "audit.max_size: from 1M to 16G"),
        ('max_size = "9999999999G"', "audit.max_size: from 1M to 16G"),
        ("keep = 0", "audit.keep: "),
        ("keep = 101", "audit.keep: "),
        ('keep = "3"', "audit.keep: "),
        ("size = 1", "unknown field"),
    ],
)
def test_a_setting_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigInvalid) as refused:
        parse(f"[audit]\n{text}\n".encode())
    assert said in refused.value.detail
