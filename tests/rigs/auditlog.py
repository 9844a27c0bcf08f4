"""Audit logs of several small files, and what is in them, read without the code that verifies."""

import json
from collections.abc import Callable
from pathlib import Path

from unsealerd.core.auditchain import AUDIT_LOG, GENESIS, ROTATED, Record, verify_line
from unsealerd.daemon.audit import AuditLog

NOW = 1_800_000_000.25
SMALL = 1000  # bytes: four records of `written` and the first one
KEEP = 3


def opened(
    directory: Path,
    mirror: Callable[[Record], None] | None = None,
    *,
    max_size: int = SMALL,
    keep: int = KEEP,
) -> AuditLog:
    log = AuditLog(directory, lambda: NOW, mirror)
    log.limit(max_size, keep)
    log.open()
    return log


def written(directory: Path, count: int, *, begin: int = 0, keep: int = KEEP) -> list[Path]:
    """A log of so many numbered records, closed; its files, oldest first."""
    log = opened(directory, keep=keep)
    for number in range(begin, begin + count):
        log.append("event", number=number)
    log.close()
    return files(directory)


def files(directory: Path) -> list[Path]:
    """As `ls` sorts them: the one that is written to comes last; one with two names counts under that one."""
    found = sorted(directory.glob("audit*.jsonl"))
    return [path for path in found if path == found[-1] or not path.samefile(found[-1])]


def records(directory: Path) -> list[Record]:
    """Every record that is kept, if the chain holds from the first of them."""
    found: list[Record] = []
    for path in files(directory):
        data = path.read_bytes()
        assert data.endswith(b"\n"), path
        for line in data[:-1].split(b"\n"):
            claimed = json.loads(line)
            prev, seq = (found[-1]["hash"], claimed["seq"]) if found else (claimed["prev"], claimed["seq"])
            if found:
                assert seq == int(str(found[-1]["seq"])) + 1
            else:
                assert seq > 1 or prev == GENESIS
            found.append(verify_line(line, str(prev), seq))
    return found


def numbers(directory: Path) -> list[object]:
    """The numbers of the numbered records."""
    return [record["number"] for record in records(directory) if record["event"] == "event"]


def rotations(directory: Path) -> list[Record]:
    return [record for record in records(directory) if record["event"] == ROTATED]


def current(directory: Path) -> Path:
    return directory / AUDIT_LOG
