"""The audit log: one durable, chained line for each use of authority, written before the use takes effect."""

import contextlib
import datetime
import errno
import os
from collections.abc import Callable
from pathlib import Path

from unsealerd.core.auditchain import GENESIS, MAX_LINE_BYTES, Record, link, verify_line
from unsealerd.daemon.counters import Counters
from unsealerd.errors import AuditBroken, AuditUnwritable

AUDIT_LOG = "audit.jsonl"

Mirror = Callable[[Record], None]


class AuditLog:
    """Appends to ``audit.jsonl``. Not thread-safe: used from the event loop only.

    Opening reads the last line only, so that a long log does not delay the start. A line that a crash cut off was never acted
    upon: it is removed, and the removal is recorded.
    """

    def __init__(self, directory: Path, clock: Callable[[], float], mirror: Mirror | None = None) -> None:
        self._path = directory / AUDIT_LOG
        self._clock = clock
        self._mirror = mirror
        self.counters = Counters()
        self._fd = -1
        self._prev = GENESIS
        self._seq = 0
        self._size = 0
        self._broken = ""

    def open(self) -> None:
        """Raises `AuditUnwritable` if it cannot be opened, or does not end in a valid record; then nothing can be appended."""
        try:
            torn = self._open()
            if torn:
                self.append("audit_repaired", removed_bytes=torn)
        except AuditUnwritable:
            self.close()
            raise

    def _open(self) -> int:
        """Find the end of the chain. The number of bytes of a cut-off line that were removed."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._fd = os.open(self._path, flags, 0o600)
            self._size = os.fstat(self._fd).st_size
            start = max(0, self._size - 2 * MAX_LINE_BYTES)
            tail = os.pread(self._fd, self._size - start, start)
            end = tail.rfind(b"\n") + 1
            torn = len(tail) - end
            if torn > MAX_LINE_BYTES:
                # No crash leaves that much of a record: it is not ours to cut.
                raise AuditUnwritable(f"{self._path}: ends in a line that is longer than a record")
            if torn:
                self._size -= torn
                os.ftruncate(self._fd, self._size)
                os.fsync(self._fd)
            if not self._size:
                self._sync_directory()
        except OSError as err:
            raise AuditUnwritable(f"{self._path}: {err.strerror}") from err
        if end:
            self._continue_from(tail[: end - 1].rpartition(b"\n")[2])
        return torn

    def _sync_directory(self) -> None:
        """A record is not durable before the name of its file is."""
        fd = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _continue_from(self, line: bytes) -> None:
        import msgspec

        try:
            claimed = msgspec.json.decode(line, type=Record)
            seq, prev = claimed.get("seq"), claimed.get("prev")
            if not isinstance(seq, int) or not isinstance(prev, str):
                raise AuditBroken("the last record has no number")
            record = verify_line(line, prev, seq)
        except (ValueError, RecursionError, AuditBroken) as err:
            raise AuditUnwritable(f"{self._path}: the last record is damaged: {err}") from err
        self._prev, self._seq = str(record["hash"]), seq

    def append(self, event: str, **fields: object) -> None:
        """One durable record. Raises `AuditUnwritable`, and then what was to be recorded must not be done."""
        if self._fd < 0 or self._broken:
            raise AuditUnwritable(self._broken or f"{self._path} is not open")
        now = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC)
        time = now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        record: Record = {"event": event, "time": time, **{k: v for k, v in fields.items() if v is not None}}
        try:
            line, digest = link(record, self._prev, self._seq + 1)
        except ValueError as err:
            raise AuditUnwritable(f"{event}: {err}") from err
        try:
            written = os.write(self._fd, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, "the line was not written whole")
            os.fdatasync(self._fd)
        except OSError as err:
            self._undo()
            raise AuditUnwritable(f"{self._path}: {err.strerror}") from err
        self._prev, self._seq, self._size = digest, self._seq + 1, self._size + len(line)
        self.counters.count(event)
        if self._mirror is not None:
            with contextlib.suppress(OSError):  # the record is durable; the journal is a copy
                self._mirror({**record, "seq": self._seq, "hash": digest})

    def _undo(self) -> None:
        """Take back what was written of a line, so that the next one continues the chain."""
        try:
            os.ftruncate(self._fd, self._size)
        except OSError as err:
            # Appending after half a line would break the chain for good: refuse everything until a restart repairs it.
            self._broken = f"{self._path}: half a record could not be taken back: {err.strerror}"

    def close(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1
