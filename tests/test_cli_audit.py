"""unsealctl audit: the log, its chain, and every way in which it can be broken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rigs.ctl import Ctl

from unsealerd.cli.audit import ChainedLog
from unsealerd.cli.edge import Exit
from unsealerd.core.auditchain import GENESIS, link
from unsealerd.errors import AuditBroken


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
    assert list(found) == ["records", "count", "head"]
    assert found["records"] == [json.loads(line) for line in lines]
    assert found["count"] == 3
    assert found["head"] == json.loads(lines[-1])["hash"]


def test_an_empty_log(ctl: Ctl) -> None:
    write(ctl)
    assert ctl("audit").out == "chain of 0 records verifies\n"
    assert ctl("audit", "--json").json == {"records": [], "count": 0, "head": GENESIS}


def test_a_log_longer_than_one_read(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unsealerd.cli.audit._CHUNK_BYTES", 700)
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
    assert f"line {line}:" in result.err
    result = ctl("audit")
    assert result.code == Exit.STORED_DATA
    assert f"line {line}:" in result.err
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
    log = ChainedLog(path)
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
        assert b"line 3: record 3: its number is 2" in process.stderr.read()
