"""``unsealctl audit``: the audit log and its chain, read from the file itself, so that it works without the
daemon.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from unsealerd.cli.app import App
from unsealerd.cli.command import Command
from unsealerd.cli.output import print_line
from unsealerd.errors import AccessDenied, AuditBroken, NotInitialised

if TYPE_CHECKING:
    from unsealerd.core.auditchain import Record

AUDIT_LOG = "audit.jsonl"
_POLL_SECONDS = 0.2
_CHUNK_BYTES = 1 << 20
_CHAIN_FIELDS = frozenset({"seq", "time", "event", "prev", "hash"})


@click.command(cls=Command)
@click.option("--follow", is_flag=True, help="Keep on printing records as they are written.")
@click.pass_obj
def audit(app: App, follow: bool) -> None:
    """Show the audit log, and check its chain.

    With --json one object; with --json --follow one object for each record, on a line of its own.
    """
    log = ChainedLog(app.config().daemon.state_dir / AUDIT_LOG)
    if app.json and not follow:
        _print_whole(log)
        return
    try:
        for line, record in log.records():
            _print_record(app, line, record)
        while follow:
            sys.stdout.flush()
            time.sleep(_POLL_SECONDS)
            for line, record in log.records():
                _print_record(app, line, record)
        log.check_end()
    finally:
        log.close()
    print_line(f"chain of {log.count} records verifies")


class ChainedLog:
    """Reads the log forward and verifies as it goes.

    Raises `NotInitialised`, `AccessDenied`, `AuditBroken`.
    """

    def __init__(self, path: Path) -> None:
        from unsealerd.core.auditchain import GENESIS

        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as err:
            raise NotInitialised(f"{path}: there is no audit log") from err
        except PermissionError as err:
            raise AccessDenied(f"{path}: {err.strerror}") from err
        except OSError as err:
            raise AuditBroken(f"{path}: {err.strerror}") from err
        self._path = path
        self._offset = 0  # of the first byte that is not verified
        self.count = 0
        self.head = GENESIS

    def records(self) -> Iterator[tuple[bytes, "Record"]]:
        """Every whole line from where the last call ended; what a line lacks may still be on its way."""
        from unsealerd.core.auditchain import verify_line

        if os.fstat(self._fd).st_size < self._offset:
            raise AuditBroken(f"{self._path}: got shorter while it was read")
        rest = b""
        while chunk := self._read(self._offset + len(rest)):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                try:
                    record = verify_line(line, self.head, self.count + 1)
                except AuditBroken as err:
                    raise AuditBroken(f"line {self.count + 1}: {err.detail}") from err
                self.head = str(record["hash"])
                self.count += 1
                self._offset += len(line) + 1
                yield line, record
            if len(rest) > _CHUNK_BYTES:
                raise AuditBroken(f"line {self.count + 1}: longer than any record")

    def check_end(self) -> None:
        """Raises `AuditBroken` when bytes follow the last whole line."""
        if self._read(self._offset):
            raise AuditBroken(
                f"line {self.count + 1}: cut off, as a crash does; the daemon removes it when it starts"
            )

    def _read(self, offset: int) -> bytes:
        try:
            return os.pread(self._fd, _CHUNK_BYTES, offset)
        except OSError as err:
            raise AuditBroken(f"{self._path}: {err.strerror}") from err

    def close(self) -> None:
        os.close(self._fd)


def _print_whole(log: ChainedLog) -> None:
    # The lines are kept as they are: they were verified to be canonical JSON, and nothing is printed of a
    # broken chain.
    try:
        lines = [line.decode() for line, _ in log.records()]
        log.check_end()
    finally:
        log.close()
    records = ",".join(lines)
    sys.stdout.write(f'{{"records":[{records}],"count":{log.count},"head":"{log.head}"}}\n')


def _print_record(app: App, line: bytes, record: "Record") -> None:
    if app.json:
        sys.stdout.write(line.decode() + "\n")
        return
    facts = " ".join(_fact(name, value) for name, value in record.items() if name not in _CHAIN_FIELDS)
    print_line(f"{record['seq']:>6}  {record.get('time')}  {record.get('event')}  {facts}".rstrip())


def _fact(name: str, value: object) -> str:
    if isinstance(value, dict):
        return " ".join(_fact(f"{name}.{key}", item) for key, item in value.items())
    text = str(value)
    return f"{name}={text}" if text and text.isprintable() and " " not in text else f"{name}={text!r}"
