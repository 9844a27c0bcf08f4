"""unsealctl audit: the log, its chain, and every way in which it can be broken."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from rigs.auditlog import current, files, opened, records, written
from rigs.ctl import Ctl

from unsealerd.cli.chainedlog import ChainedLog
from unsealerd.cli.doctor.history import History
from unsealerd.cli.doctor.subject import history_of
from unsealerd.cli.edge import Exit
from unsealerd.cli.main import run
from unsealerd.core.auditchain import GENESIS, closed_name, link
from unsealerd.errors import AuditBroken, NotInitialised


@pytest.fixture
def ctl(tmp_path: Path) -> Ctl:
    return Ctl(tmp_path)


def chain(count: int) -> list[bytes]:
    lines: list[bytes] = []
    prev = GENESIS
    for seq in range(1, count + 1):
        fields: dict[str, object] = {
            "event": "key_read",
            "time": f"2026-01-31T12:00:{seq:02}.000Z",
            "key": "web",
            "caller": {"uid": seq},
        }
        line, prev = link(fields, prev, seq)
        lines.append(line)
    return lines


def write(ctl: Ctl, *lines: bytes) -> Path:
    log = ctl.state_dir / "audit.jsonl"
    log.write_bytes(b"".join(lines))
    return log


def test_a_whole_chain(ctl: Ctl) -> None:
    write(ctl, *chain(3))
    result = ctl("audit")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "     1  2026-01-31T12:00:01.000Z  key_read  caller.uid=1 key=web"
    assert len(lines) == 4
    assert lines[-1] == "chain of 3 records verifies"


def test_json_has_the_records_as_they_are(ctl: Ctl) -> None:
    lines = chain(3)
    write(ctl, *lines)
    found = ctl("audit", "--json").json
    assert list(found) == ["records", "first", "count", "head"]
    assert found["records"] == [json.loads(line) for line in lines]
    assert found["count"] == 3
    assert found["head"] == json.loads(lines[-1])["hash"]


def test_an_empty_log(ctl: Ctl) -> None:
    write(ctl)
    assert ctl("audit").out == "chain of 0 records verifies\n"
    assert ctl("audit", "--json").json == {"records": [], "first": 1, "count": 0, "head": GENESIS}


def test_a_log_longer_than_one_read(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unsealerd.cli.chainedlog._CHUNK_BYTES", 700)
    write(ctl, *chain(50))
    assert ctl("audit").out.splitlines()[-1] == "chain of 50 records verifies"


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda lines: [lines[0], lines[1].replace(b"web", b"wob"), lines[2]], 2),
        (lambda lines: [lines[0], lines[2]], 2),
        (lambda lines: lines[1:], 1),
        (lambda lines: [lines[0], lines[0], *lines[1:]], 2),
        (lambda lines: [*lines, b"\n"], 4),
        (lambda lines: [*lines, b"{}\n"], 4),
        (lambda lines: [*lines, b"\xff\n"], 4),
        (lambda lines: [lines[0], lines[1].replace(b":2", b": 2"), lines[2]], 2),
        (lambda lines: [*lines, lines[0][:-5]], 4),
        (lambda lines: [*lines, b"x" * 3_000_000], 4),
    ],
)
def test_a_broken_chain_names_the_line(ctl: Ctl, damage: object, line: int) -> None:
    assert callable(damage)
    write(ctl, *damage(chain(3)))
    result = ctl("audit", "--json").refused(Exit.STORED_DATA, "AuditBroken")
    assert f"line {line} of audit.jsonl: " in result.err
    result = ctl("audit")
    assert result.code == Exit.STORED_DATA
    assert f"line {line} of audit.jsonl: " in result.err
    assert "verifies" not in result.out


def test_no_log_and_no_permission(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    ctl("audit", "--json").refused(Exit.NOT_INITIALISED, "NotInitialised")
    log = write(ctl, *chain(1))
    real = os.open

    def refuse(path: object, *rest: int) -> int:
        if path == log:
            raise PermissionError(13, "Permission denied")
        return real(str(path), *rest)

    monkeypatch.setattr(os, "open", refuse)
    assert "sudo" in ctl("audit", "--json").refused(Exit.ACCESS_DENIED, "AccessDenied").err


def test_a_link_is_not_followed(ctl: Ctl, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"".join(chain(1)))
    (ctl.state_dir / "audit.jsonl").symlink_to(tmp_path / "other")
    ctl("audit", "--json").refused(Exit.STORED_DATA, "AuditBroken")


def test_records_cannot_steer_the_terminal(ctl: Ctl) -> None:
    line, _ = link({"event": "x", "time": "t", "reason": "\x1b[2J\nfake"}, GENESIS, 1)
    write(ctl, line)
    out = ctl("audit").out
    assert "\x1b" not in out
    assert len(out.splitlines()) == 2


def test_half_a_record_is_waited_for(ctl: Ctl) -> None:
    lines = chain(2)
    path = write(ctl, lines[0], lines[1][:10])
    log = ChainedLog(path.parent)
    try:
        assert [line + b"\n" for line, _ in log.records()] == lines[:1]
        assert list(log.records()) == []
        write(ctl, *lines)
        assert [line + b"\n" for line, _ in log.records()] == lines[1:]
        assert log.count == 2
        write(ctl, lines[0])
        with pytest.raises(AuditBroken, match="shorter"):
            list(log.records())
    finally:
        log.close()


def test_follow_prints_what_comes(ctl: Ctl) -> None:
    lines = chain(3)
    log = write(ctl, lines[0])
    command = ["--config", str(ctl.config), "audit", "--follow", "--json"]
    with subprocess.Popen(
        [sys.executable, "-c", "from unsealerd.cli.main import main; main()", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == lines[0]
        with log.open("ab", buffering=0) as file:
            file.write(lines[1])
            assert process.stdout.readline() == lines[1]
            file.write(lines[1])
        assert process.wait(60) == Exit.STORED_DATA
        assert b"line 3 of audit.jsonl: record 3: its number is 2" in process.stderr.read()


# --- several files

Attack = Callable[[list[Path]], object]


def several(ctl: Ctl, count: int = 30, keep: int = 99) -> list[Path]:
    """Files of four records each, oldest first."""
    return written(ctl.state_dir, count, keep=keep)


def test_all_files_are_shown_oldest_first(ctl: Ctl) -> None:
    paths = several(ctl)
    assert len(paths) > 5
    shown = ctl("audit").out.splitlines()
    assert [int(line.split()[0]) for line in shown[:-1]] == list(range(1, len(shown)))
    assert [line for line in shown if "number=" in line][7].endswith("number=7")
    assert shown[-1] == f"chain of {len(shown) - 1} records verifies"
    found = ctl("audit", "--json").json
    records = [json.loads(line) for path in paths for line in path.read_bytes().splitlines()]
    assert found == {
        "records": records,
        "first": 1,
        "count": len(records),
        "head": records[-1]["hash"],
    }


def test_where_the_kept_part_begins(ctl: Ctl) -> None:
    paths = several(ctl, keep=2)
    first = json.loads(paths[0].read_bytes().splitlines()[0])
    assert first["seq"] > 1
    shown = ctl("audit").out.splitlines()
    assert int(shown[0].split()[0]) == first["seq"]
    assert shown[-1] == (
        f"chain of {len(shown) - 1} records verifies; records 1 to {first['seq'] - 1} are no longer kept"
    )
    found = ctl("audit", "--json").json
    assert (found["first"], found["count"]) == (first["seq"], len(shown) - 1)


def _cut(path: Path, lines: int) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-lines]))


def _edit(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old)
    path.write_bytes(data.replace(old, new, 1))


def _swap(one: Path, other: Path) -> None:
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def _pipe(paths: list[Path]) -> None:
    paths[2].unlink()
    os.mkfifo(paths[2])


def _another_chain(paths: list[Path]) -> None:
    """Whoever writes anew all that follows is stopped by the file that follows that."""
    lines, prev = [], json.loads(paths[1].read_bytes().splitlines()[-1])["hash"]
    for line in paths[2].read_bytes().splitlines():
        record = json.loads(line)
        fields = {name: value for name, value in record.items() if name not in ("seq", "prev", "hash")}
        changed, prev = link({**fields, "forged": True}, prev, record["seq"])
        lines.append(changed)
    paths[2].write_bytes(b"".join(lines))


def _reborn(paths: list[Path]) -> None:
    """Everything before the last file is gone, and that it was kept is not said any more."""
    for path in paths[:-1]:
        path.unlink()
    line = paths[-1].read_bytes().splitlines()[0]
    _edit(paths[-1], b'"kept_from":1', b'"kept_from":%d' % (json.loads(line)["seq"] - 1))


@pytest.mark.promise(7)
@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (lambda paths: paths[2].unlink(), "are missing"),
        (lambda paths: paths[0].unlink(), "nothing in the log says that they were removed"),
        (lambda paths: [path.unlink() for path in paths[:3]], "nothing in the log says"),
        (lambda paths: [path.unlink() for path in paths[:-1]], "nothing in the log says"),
        (lambda paths: paths[-1].unlink(), "missing, and there are files before it"),
        (lambda paths: paths[-1].write_bytes(b""), "empty, and there are files before it"),
        (lambda paths: paths[-3].replace(paths[-1]), "are missing"),
        (lambda paths: _swap(paths[1], paths[2]), "line 1 of audit-000000000005.jsonl: record 9: "),
        (lambda paths: _swap(paths[0], paths[1]), "line 1 of audit-000000000001.jsonl: record 5: "),
        (lambda paths: _swap(paths[-1], paths[2]), "the first of a file that is named by record 9"),
        (lambda paths: shutil.copy(paths[1], paths[2]), "record 5: the first of a file that is named by"),
        (lambda paths: shutil.copy(paths[1], paths[1].parent / closed_name(999)), "record 5: the first of"),
        (lambda paths: _cut(paths[2], 1), "are missing"),
        (lambda paths: _cut(paths[2], 3), "are missing"),
        (lambda paths: _cut(paths[0], 1), "are missing"),
        (lambda paths: paths[2].write_bytes(b""), "line 1 of audit-000000000009.jsonl: cut off"),
        (
            lambda paths: paths[2].write_bytes(paths[2].read_bytes()[:-1]),
            "of audit-000000000009.jsonl: cut off",
        ),
        (
            lambda paths: paths[2].write_bytes(paths[2].read_bytes()[:-30]),
            "of audit-000000000009.jsonl: cut off",
        ),
        (
            lambda paths: paths[2].write_bytes(paths[2].read_bytes() + b"\n"),
            "line 5 of audit-000000000009.jsonl: record 13: ",
        ),
        (lambda paths: _edit(paths[2], b'"number":8', b'"number":9'), "line 3 of audit-000000000009.jsonl: "),
        (lambda paths: _edit(paths[0], b'"number":0', b'"number":8'), "line 1 of audit-000000000001.jsonl: "),
        (lambda paths: _edit(paths[-1], b'"kept_from":1', b'"kept_from":6'), "was changed"),
        (lambda paths: _edit(paths[2], b'"kept_from":1', b'"kept_from":6'), "was changed"),
        (_another_chain, "does not continue the record before it"),
        (_reborn, "was changed"),
        (lambda paths: [paths[2].unlink(), paths[2].symlink_to(paths[1])], "levels of symbolic links"),
        (lambda paths: [paths[2].unlink(), paths[2].mkdir()], "Is a directory"),
        (_pipe, "audit-000000000009.jsonl: "),
    ],
)
def test_what_was_done_to_a_file_is_found(ctl: Ctl, attack: Attack, said: str) -> None:
    paths = several(ctl)
    attack(paths)
    result = ctl("audit", "--json").refused(Exit.STORED_DATA, "AuditBroken")
    assert said in result.err
    result = ctl("audit")
    assert result.code == Exit.STORED_DATA
    assert said in result.err
    assert "verifies" not in result.out
    history = history_of(ctl.state_dir)
    assert isinstance(history, AuditBroken)


@pytest.mark.promise(7)
def test_an_oldest_file_that_the_log_keeps_is_not_taken_for_removed(ctl: Ctl) -> None:
    """Also where the log has removed others itself."""
    paths = several(ctl, keep=3)
    assert ctl("audit").code == 0
    paths[0].unlink()
    result = ctl("audit")
    assert result.code == Exit.STORED_DATA
    assert "are missing: nothing in the log says that they were removed" in result.err


@pytest.mark.promise(7)
@pytest.mark.parametrize(
    "fields", [{}, {"kept_from": 0}, {"kept_from": 6}, {"kept_from": "1"}, {"kept_from": True}]
)
def test_a_file_that_does_not_begin_as_the_daemon_begins_one(ctl: Ctl, fields: dict[str, object]) -> None:
    """However its hashes are."""
    line, head = link({"event": "audit_rotated", **fields}, "0" * 64, 6)
    write(ctl, line, link({"event": "x"}, head, 7)[0])
    assert "record 6: the first of a file" in ctl("audit", "--json").refused(Exit.STORED_DATA).err
    line, _ = link({"event": "start", "kept_from": 1}, "0" * 64, 6)
    write(ctl, line)
    assert "record 6: the first of a file" in ctl("audit", "--json").refused(Exit.STORED_DATA).err


def test_what_a_crash_leaves_is_no_damage(ctl: Ctl) -> None:
    """A file that was to be removed, one with two names, half a first record of the next."""
    oldest = several(ctl, keep=3)[0]
    data = oldest.read_bytes()
    log = opened(ctl.state_dir, keep=3)
    while oldest.exists():
        log.append("event", number=99)
    log.close()
    oldest.write_bytes(data)
    newest = files(ctl.state_dir)[-1]
    first = json.loads(newest.read_bytes().splitlines()[0])["seq"]
    os.link(newest, ctl.state_dir / closed_name(first))
    (ctl.state_dir / "audit.jsonl.new").write_bytes(b"half")
    found = ctl("audit", "--json").json
    assert found["first"] == json.loads(data.splitlines()[0])["seq"]
    assert isinstance(history_of(ctl.state_dir), History)


def test_what_has_another_name_is_no_part_of_the_log(ctl: Ctl) -> None:
    paths = several(ctl)
    for name in ("audit-000000000006.jsonl.gz", "audit-6.jsonl", "audit-000000000000.jsonl", "audit.jsonl.1"):
        shutil.copy(paths[1], ctl.state_dir / name)
    assert ctl("audit").code == 0


def test_following_goes_over_into_the_next_files(ctl: Ctl) -> None:
    written(ctl.state_dir, 2)
    log = ChainedLog(ctl.state_dir)
    writer = opened(ctl.state_dir, keep=99)
    try:
        found = [record["seq"] for _, record in log.records()]
        for more in (1, 3, 4, 30):  # the last begins several at once
            for _ in range(more):
                writer.append("event", number=0)
            found += [record["seq"] for _, record in log.follow()]
            assert found == [record["seq"] for record in records(ctl.state_dir)]
        log.check_end()
        log.check_kept()
        current(ctl.state_dir).write_bytes(b"")
        with pytest.raises(AuditBroken, match="shorter"):
            list(log.follow())
    finally:
        log.close()
        writer.close()


def test_following_a_log_from_its_beginning(ctl: Ctl) -> None:
    writer = opened(ctl.state_dir, keep=99)
    log = ChainedLog(ctl.state_dir)
    try:
        assert list(log.records()) == []
        for number in range(9):
            writer.append("event", number=number)
        assert [record["seq"] for _, record in log.follow()] == list(range(1, log.count + 1))
        assert log.head == records(ctl.state_dir)[-1]["hash"]
    finally:
        log.close()
        writer.close()


def test_following_a_file_that_is_gone(ctl: Ctl) -> None:
    written(ctl.state_dir, 2)
    log = ChainedLog(ctl.state_dir)
    try:
        assert len(list(log.records())) == 2
        current(ctl.state_dir).unlink()
        with pytest.raises(NotInitialised):
            list(log.follow())
    finally:
        log.close()


def test_reading_while_the_daemon_rotates_is_never_an_error(
    ctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "fdatasync", lambda _: None)
    writer = opened(ctl.state_dir, keep=2)
    end = threading.Event()

    def write_on() -> None:
        while not end.is_set():
            writer.append("event", number=0)

    thread = threading.Thread(target=write_on)
    thread.start()
    firsts: list[int] = []
    try:
        while len(set(firsts)) < 20 and thread.is_alive():
            log = ChainedLog(ctl.state_dir)
            try:
                for _ in log.records():
                    pass
                log.check_kept()
                firsts.append(log.first)
            finally:
                log.close()
    finally:
        end.set()
        thread.join()
        writer.close()
    assert firsts == sorted(firsts)
    assert len(set(firsts)) == 20


def test_however_long_it_is_little_of_it_is_in_memory(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three megabytes in a hundred records of the greatest length but one, and much less in use at any time."""

    class Nowhere(io.TextIOBase):
        written = 0

        def write(self, text: str) -> int:
            self.written += len(text)
            return len(text)

    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "fdatasync", lambda _: None)
    monkeypatch.setattr("unsealerd.cli.chainedlog._CHUNK_BYTES", 1 << 16)
    log = opened(ctl.state_dir, max_size=1 << 20, keep=99)
    for _ in range(200):
        log.append("event", text="x" * 15_000)
    log.close()
    assert ctl("audit").code == 0  # what is imported once
    nowhere = Nowhere()
    tracemalloc.start()
    try:
        with contextlib.redirect_stdout(nowhere):
            assert run(("--config", str(ctl.config), "audit", "--json")) == 0
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert nowhere.written > 3_000_000
    assert peak < 1_000_000


def test_a_file_that_may_not_be_read(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = several(ctl)
    real = os.open

    def refuse(path: object, *rest: int) -> int:
        if path == paths[1]:
            raise PermissionError(13, "Permission denied")
        return real(str(path), *rest)

    monkeypatch.setattr(os, "open", refuse)
    assert "sudo" in ctl("audit", "--json").refused(Exit.ACCESS_DENIED, "AccessDenied").err
