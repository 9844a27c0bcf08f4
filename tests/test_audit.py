"""The audit log: chained, durable before anything takes effect, repaired after a crash, and never written past a fault."""

import contextlib
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from unsealerd.core.auditchain import AUDIT_LOG, GENESIS, MAX_LINE_BYTES, Record, link, verify_line
from unsealerd.daemon.audit import AuditLog
from unsealerd.errors import AuditBroken, AuditUnwritable

NOW = 1_800_000_000.25


def opened(directory: Path, mirror: Callable[[Record], None] | None = None) -> AuditLog:
    log = AuditLog(directory, lambda: NOW, mirror)
    log.open()
    return log


def written(directory: Path, count: int = 3) -> Path:
    """A log of so many records, closed."""
    log = opened(directory)
    for number in range(count):
        log.append("event", number=number)
    log.close()
    return directory / AUDIT_LOG


def verify(path: Path) -> list[Record]:
    """Every record, if the chain holds."""
    data = path.read_bytes()
    assert data.endswith(b"\n")
    records: list[Record] = []
    prev = GENESIS
    for number, line in enumerate(data[:-1].split(b"\n"), 1):
        record = verify_line(line, prev, number)
        prev = str(record["hash"])
        records.append(record)
    return records


# --- the chain


def test_each_line_is_a_canonical_object_that_continues_the_chain(tmp_path: Path) -> None:
    path = written(tmp_path)
    for line in path.read_bytes().splitlines():
        assert json.dumps(json.loads(line), separators=(",", ":"), sort_keys=True).encode() == line
    records = verify(path)
    assert [(r["seq"], r["event"], r["number"]) for r in records] == [(n + 1, "event", n) for n in range(3)]
    assert records[0]["prev"] == GENESIS
    assert [r["prev"] for r in records[1:]] == [r["hash"] for r in records[:-1]]
    assert {r["time"] for r in records} == {"2027-01-15T08:00:00.250Z"}


def test_the_chain_goes_on_after_a_restart(tmp_path: Path) -> None:
    path = written(tmp_path, 2)
    written(tmp_path, 2)
    assert [r["seq"] for r in verify(path)] == [1, 2, 3, 4]


def test_facts_that_are_not_known_are_left_out(tmp_path: Path) -> None:
    log = opened(tmp_path)
    log.append("event", key=None, count=0, text="")
    (record,) = verify(tmp_path / AUDIT_LOG)
    assert "key" not in record
    assert (record["count"], record["text"]) == (0, "")
    log.close()


@pytest.mark.promise(7)
def test_every_change_of_every_line_is_found(tmp_path: Path) -> None:
    path = written(tmp_path, 4)
    lines = path.read_bytes().splitlines(keepends=True)
    changes = 0
    for at, line in enumerate(lines):
        for changed in (
            [b""],  # removed
            [line, line],  # twice
            [line.replace(b'"number":%d' % at, b'"number":9')],
            [line.replace(b'"event"', b'"evil"', 1)],
            [line.replace(b'"seq":%d' % (at + 1), b'"seq":%d' % (at + 2))],
            [line.replace(b"{", b"{ ", 1)],
            [line.replace(b'"number":', b'"extra":1,"number":')],
            [link({"event": "forged"}, GENESIS, at + 1)[0]],
            [b"\n", line],
        ):
            copy = [*lines[:at], *changed, *lines[at + 1 :]]
            if at == len(lines) - 1 and changed == [b""]:
                continue  # a log that lost its end is one that ended earlier: only who knows the head can tell
            if at == 0 and b"forged" in changed[0]:
                assert verify_line(
                    changed[0][:-1], GENESIS, 1
                )  # a first line can be anything, the second betrays it
            path.write_bytes(b"".join(copy))
            with pytest.raises(AuditBroken):
                verify(path)
            changes += 1
    assert changes == 35


@pytest.mark.promise(7)
def test_every_other_bit_of_a_line_is_found() -> None:
    line, _ = link({"event": "key_read", "caller": {"uid": 7}}, GENESIS, 1)
    verify_line(line[:-1], GENESIS, 1)
    for bit in range((len(line) - 1) * 8):
        changed = bytearray(line[:-1])
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(AuditBroken):
            verify_line(bytes(changed), GENESIS, 1)


@pytest.mark.promise(7)
def test_a_line_with_the_right_past_and_the_wrong_number_is_found() -> None:
    line, _ = link({"event": "event"}, GENESIS, 2)
    verify_line(line[:-1], GENESIS, 2)
    with pytest.raises(AuditBroken, match="its number is 2"):
        verify_line(line[:-1], GENESIS, 1)


@pytest.mark.promise(10)
@given(st.binary(max_size=200))
@example(b"")
@example(b"[" * 5000)
@example(b'{"a":' * 3000)
@example(b"{}")
@example(b'{"seq":1,"prev":"' + GENESIS.encode() + b'","hash":null}')
@example(b'{"seq":1,"prev":"' + GENESIS.encode() + b'","x":%d}' % 2**70)
@example(b'{"seq":1,"prev":"' + GENESIS.encode() + b'","x":1e999}')
@example(b" " * (MAX_LINE_BYTES + 1))
def test_any_line(data: bytes) -> None:
    for line in (data, b'{"seq":1,"prev":"%b",%b}' % (GENESIS.encode(), data)):
        with pytest.raises(AuditBroken):
            verify_line(line, GENESIS, 1)


facts = st.dictionaries(
    st.text(max_size=8).filter(lambda name: name not in ("seq", "prev", "hash")),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=5,
    ),
    max_size=4,
)


@given(facts, st.integers(1, 2**40))
def test_what_is_linked_verifies(fields: Record, seq: int) -> None:
    line, digest = link(fields, "p" * 64, seq)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert verify_line(line[:-1], "p" * 64, seq)["hash"] == digest


# --- too long to be a record


@pytest.mark.promise(7)
@pytest.mark.parametrize("text", ["x" * MAX_LINE_BYTES, "\x01" * (MAX_LINE_BYTES // 4), "\ud800"])
def test_what_could_not_be_read_back_is_not_written(tmp_path: Path, text: str) -> None:
    """One such line, and the log could never be opened again."""
    log = opened(tmp_path)
    log.append("before")
    with pytest.raises(AuditUnwritable):
        log.append("event", text=text)
    log.append("after")
    log.close()
    assert [r["event"] for r in verify(tmp_path / AUDIT_LOG)] == ["before", "after"]


def test_the_longest_record_is_written_and_read_back(tmp_path: Path) -> None:
    log = opened(tmp_path)
    log.append("event", text="")
    room = MAX_LINE_BYTES - (tmp_path / AUDIT_LOG).stat().st_size + 1
    log.append("event", text="x" * room)
    with pytest.raises(AuditUnwritable):
        log.append("event", text="x" * (room + 1))
    log.close()
    written(tmp_path, 1)
    assert len(verify(tmp_path / AUDIT_LOG)) == 3


# --- what a crash leaves


@pytest.mark.promise(6)
def test_a_line_that_was_cut_off_anywhere_is_removed_and_that_is_recorded(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for end in range(last + 1, len(whole)):
        path.write_bytes(whole[:end])
        opened(tmp_path).close()
        *kept, repair = verify(path)
        assert [r["number"] for r in kept] == [0, 1]
        assert (repair["event"], repair["removed_bytes"]) == ("audit_repaired", end - last)


@pytest.mark.promise(6)
def test_a_first_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / AUDIT_LOG
    path.write_bytes(b'{"event":"sta')
    opened(tmp_path).close()
    (repair,) = verify(path)
    assert (repair["seq"], repair["event"], repair["removed_bytes"]) == (1, "audit_repaired", 13)


def test_a_whole_log_is_not_repaired(tmp_path: Path) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    opened(tmp_path).close()
    assert path.read_bytes() == before


@pytest.mark.promise(7)
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-10] + b"X" + data[-9:],
        lambda data: data.replace(b'"number":2', b'"number":3'),
        lambda data: data + b"\n",
        lambda data: data + b"{}\n",
        lambda data: data + b"null\n",
        lambda data: data + b"\xff\n",
        lambda data: data + b"x" * (3 * MAX_LINE_BYTES) + b"\n",
        lambda data: data + b"x" * (3 * MAX_LINE_BYTES),
        lambda data: b"\n",
        lambda data: b'{"event":"x","hash":"y","prev":7,"seq":1}\n',
        lambda data: b'{"event":"x","hash":"y","prev":"","seq":"1"}\n',
        lambda data: link({"event": "x"}, GENESIS, 1)[0].replace(b'"seq":1', b'"seq":1.0'),
    ],
)
def test_a_damaged_end_is_refused_and_nothing_is_appended(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    """What goes on after a damaged record would be a second chain."""
    path = written(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    log = AuditLog(tmp_path, lambda: NOW)
    with pytest.raises(AuditUnwritable):
        log.open()
    with pytest.raises(AuditUnwritable):
        log.append("event")
    log.close()
    assert path.read_bytes() == before


# --- opening


def test_opening_reads_the_end_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 000 records do not delay the start; a damaged early one is for `unsealctl audit` to find."""
    path = tmp_path / AUDIT_LOG
    prev = GENESIS
    with path.open("wb") as file:
        for number in range(1, 100_001):
            line, prev = link({"event": "event"}, prev, number)
            file.write(line)
    with path.open("r+b") as early:
        early.seek(30)
        early.write(b"X")
    read: list[int] = []
    pread = os.pread

    def counted(fd: int, count: int, offset: int) -> bytes:
        data = pread(fd, count, offset)
        read.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", counted)
    monkeypatch.setattr(os, "read", None)
    log = opened(tmp_path)
    assert sum(read) <= 2 * MAX_LINE_BYTES < path.stat().st_size // 100
    log.append("event")
    log.close()
    last = path.read_bytes()[:-1].rpartition(b"\n")[2]
    assert verify_line(last, prev, 100_001)


def test_the_file_is_the_daemons_alone(tmp_path: Path) -> None:
    assert written(tmp_path).stat().st_mode & 0o777 == 0o600


@pytest.mark.promise(6)
def test_the_name_of_a_new_log_is_durable_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    opened(tmp_path).close()
    assert synced == [str(tmp_path)]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_not_followed(tmp_path: Path, there: bool) -> None:
    other = tmp_path / "other"
    if there:
        other.write_bytes(b"")
    (tmp_path / AUDIT_LOG).symlink_to(other)
    with pytest.raises(AuditUnwritable):
        opened(tmp_path)
    assert other.exists() == there
    assert not there or other.read_bytes() == b""


@pytest.mark.promise(10)
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / AUDIT_LOG)
    with pytest.raises(AuditUnwritable):
        opened(tmp_path)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(AuditUnwritable, match="No such file"):
        opened(tmp_path / "nothing")


# --- a disk that fails


def failing(code: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.promise(7)
@pytest.mark.parametrize("call", ["write", "fdatasync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_write_that_fails_refuses_and_the_next_one_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    mirrored: list[Record] = []
    log = opened(tmp_path, mirrored.append)
    log.append("before")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(code))
        with pytest.raises(AuditUnwritable, match=os.strerror(code)):
            log.append("lost")
    log.append("after")
    log.close()
    assert [r["event"] for r in verify(tmp_path / AUDIT_LOG)] == ["before", "after"]
    assert [r["event"] for r in mirrored] == ["before", "after"]


@pytest.mark.promise(6)
@pytest.mark.parametrize("kept", [0, 1, 40, -1])
def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    log = opened(tmp_path)
    log.append("before")
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:kept]))
        with pytest.raises(AuditUnwritable):
            log.append("lost")
    assert [r["event"] for r in verify(tmp_path / AUDIT_LOG)] == ["before"]
    log.append("after")
    log.close()
    assert [r["event"] for r in verify(tmp_path / AUDIT_LOG)] == ["before", "after"]


@pytest.mark.promise(7)
def test_half_a_line_that_cannot_be_taken_back_refuses_everything_until_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = opened(tmp_path)
    log.append("before")
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:40]))
        patch.setattr(os, "ftruncate", failing(errno.EIO))
        with pytest.raises(AuditUnwritable):
            log.append("lost")
    with pytest.raises(AuditUnwritable, match="half a record"):
        log.append("refused")  # though the disk is well again
    log.close()
    written(tmp_path, 1)
    assert [r["event"] for r in verify(tmp_path / AUDIT_LOG)] == ["before", "audit_repaired", "event"]


@pytest.mark.promise(7)
def test_a_real_full_disk_refuses() -> None:
    """/dev/full takes no byte."""
    log = AuditLog(Path("/dev"), lambda: NOW)
    log._fd = os.open("/dev/full", os.O_WRONLY | os.O_APPEND)
    with pytest.raises(AuditUnwritable):
        log.append("event")
    log.close()


@pytest.mark.promise(7)
def test_a_log_that_is_not_open_refuses(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, lambda: NOW)
    with pytest.raises(AuditUnwritable):
        log.append("event")
    log.open()
    log.append("event")
    log.close()
    log.close()
    with pytest.raises(AuditUnwritable):
        log.append("event")


@pytest.mark.promise(7)
@pytest.mark.parametrize("call", ["open", "fstat", "pread", "ftruncate"])
def test_a_log_that_cannot_be_opened_stays_shut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    before = path.read_bytes()
    log = AuditLog(tmp_path, lambda: NOW)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(errno.EIO))
        with pytest.raises(AuditUnwritable):
            log.open()
    with pytest.raises(AuditUnwritable):
        log.append("event")
    assert path.read_bytes() == before


def test_the_mirror_hears_of_what_is_durable(tmp_path: Path) -> None:
    heard: list[Record] = []

    def mirror(record: Record) -> None:
        assert verify(tmp_path / AUDIT_LOG)[-1]["event"] == record["event"]
        heard.append(record)

    log = opened(tmp_path, mirror)
    log.append("one", key="web")
    assert [(r["event"], r["key"]) for r in heard] == [("one", "web")]
    with contextlib.closing(log):
        log.append("two", key="web")
    assert len(heard) == 2
