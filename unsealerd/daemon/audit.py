"""The audit log: one durable, chained line for each use of authority, written before the use takes effect."""

import contextlib
import datetime
import errno
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from unsealerd.config import Audit
from unsealerd.core.auditchain import (
    AUDIT_LOG,
    GENESIS,
    MAX_LINE_BYTES,
    ROTATED,
    Record,
    kept_from,
    link,
    verify_alone,
)
from unsealerd.daemon.auditfiles import AuditFiles
from unsealerd.daemon.counters import Counters
from unsealerd.daemon.repeats import Repeats
from unsealerd.errors import AuditBroken, AuditUnwritable

_RETRY_SHARE = 64  # a rotation that failed is tried again when the file has grown by this part of its size

Mirror = Callable[[Record], None]
Background = Callable[[Callable[[], None]], object]

_log = logging.getLogger("unsealerd")


class AuditLog:
    """Appends to ``audit.jsonl``. Not thread-safe: used from the event loop only.

    Opening reads the last line only, so that a long log does not delay the start. A line that a crash cut off was never acted
    upon: it is removed, and the removal is recorded. A file that is full is closed, and the next one begun, before the record
    that has no room in it. That this fails keeps no record from being written: the file then grows.
    """

    def __init__(
        self,
        directory: Path,
        clock: Callable[[], float],
        mirror: Mirror | None = None,
        background: Background | None = None,
    ) -> None:
        """``background`` runs what may take a while: large files are removed. Without it, that is done at once."""
        self._files = AuditFiles(directory)
        self._path = self._files.current
        self._clock = clock
        self._mirror = mirror
        self._background = background or _at_once
        self.counters = Counters()
        self.repeats = Repeats(self.append, self.counters)
        self._fd = -1
        self._prev = GENESIS
        self._seq = 0
        self._size = 0
        self._broken = ""
        self._unsettled: Record | None = None  # the first record of a file whose name is not durable yet
        defaults = Audit()
        self.limit(defaults.max_size, defaults.keep)

    def limit(self, max_size: int, keep: int) -> None:
        """How large a file may become, in bytes, and how many closed ones are kept. Counts from the next record on."""
        self._max_size, self._keep = max_size, keep
        self._rotate_above = max_size
        self._recount = True  # there may be more closed files than are to be kept now

    # --- opening

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
        self._prev, self._seq = GENESIS, 0
        try:
            self._fd = self._files.open()
            found = os.fstat(self._fd)
            self._size = found.st_size
            tail, torn = self._tail(self._fd, self._size)
            if torn:
                self._size -= torn
                os.ftruncate(self._fd, self._size)
                os.fsync(self._fd)
            if found.st_nlink > 1:
                self._files.forget(self._fd)
            if not self._size and (closed := self._files.closed()):
                self._continue_after(closed)
            elif self._size <= 2 * MAX_LINE_BYTES:
                self._files.sync()  # it may have been begun just before a crash
        except OSError as err:
            raise AuditUnwritable(f"{self._path}: {err.strerror}") from err
        if tail:
            self._prev, self._seq = self._end(tail)
        return torn

    def _tail(self, fd: int, size: int) -> tuple[bytes, int]:
        """The last whole lines of a file, and how many bytes of a cut-off one follow."""
        start = max(0, size - 2 * MAX_LINE_BYTES)
        tail = os.pread(fd, size - start, start)
        end = tail.rfind(b"\n") + 1
        torn = len(tail) - end
        if torn > MAX_LINE_BYTES:
            # No crash leaves that much of a record: it is not ours to cut.
            raise AuditUnwritable(f"{self._path}: ends in a line that is longer than a record")
        return tail[:end], torn

    def _end(self, tail: bytes) -> tuple[str, int]:
        try:
            seq, record = verify_alone(tail[:-1].rpartition(b"\n")[2])
        except AuditBroken as err:
            raise AuditUnwritable(f"{self._path}: the last record is damaged: {err.detail}") from err
        return str(record["hash"]), seq

    def _continue_after(self, closed: list[int]) -> None:
        """The open file is gone, by no crash: go on after the last closed one, and say so."""
        fd = self._files.open_closed(closed[-1])
        try:
            tail, torn = self._tail(fd, os.fstat(fd).st_size)
            if torn or not tail:
                raise AuditUnwritable(f"{self._path} is missing, and the file before it was cut off")
            self._prev, self._seq = self._end(tail)
            _, kept = self._beginning(fd)
        except AuditBroken as err:
            raise AuditUnwritable(
                f"{self._path} is missing, and of the file before it: {err.detail}"
            ) from err
        finally:
            os.close(fd)
        self._begin(None, kept, AUDIT_LOG)

    # --- appending

    def append(self, event: str, **fields: object) -> None:
        """One durable record. Raises `AuditUnwritable`, and then what was to be recorded must not be done."""
        if self._fd < 0 or self._broken:
            raise AuditUnwritable(self._broken or f"{self._path} is not open")
        record = self._record(event, fields)
        line, digest = self._link(record)
        if self._recount or self._size + len(line) > self._rotate_above:
            self._rotate_if_due(len(line))
            line, digest = self._link(record)
        self._settle()
        try:
            written = os.write(self._fd, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, "the line was not written whole")
            os.fdatasync(self._fd)
        except OSError as err:
            self._undo()
            raise AuditUnwritable(f"{self._path}: {err.strerror}") from err
        self._prev, self._seq, self._size = digest, self._seq + 1, self._size + len(line)
        self._tell({**record, "seq": self._seq, "hash": digest})

    def _record(self, event: str, fields: Record) -> Record:
        now = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC)
        time = now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {"event": event, "time": time, **{k: v for k, v in fields.items() if v is not None}}

    def _link(self, record: Record) -> tuple[bytes, str]:
        try:
            return link(record, self._prev, self._seq + 1)
        except ValueError as err:
            raise AuditUnwritable(f"{record['event']}: {err}") from err

    def _tell(self, record: Record) -> None:
        self.counters.count(str(record["event"]))
        if self._mirror is not None:
            with contextlib.suppress(OSError):  # the record is durable; the journal is a copy
                self._mirror(record)

    def _undo(self) -> None:
        """Take back what was written of a line, so that the next one continues the chain."""
        try:
            os.ftruncate(self._fd, self._size)
        except OSError as err:
            # Appending after half a line would break the chain for good: refuse everything until a restart repairs it.
            self._broken = f"{self._path}: half a record could not be taken back: {err.strerror}"

    # --- rotating

    def _rotate_if_due(self, more: int) -> None:
        """Close the file if so many bytes ``more`` have no room in it, or if more files are there than are to be kept.

        Raises `AuditUnwritable` if the next one is begun and not durable. That none could be begun stops nothing.
        """
        try:
            closed = self._files.closed()
            recount, self._recount = self._recount, False
            if self._size and (
                self._size + more > self._rotate_above or (recount and len(closed) > self._keep)
            ):
                self._rotate(closed)
            self._rotate_above = self._max_size
        except (OSError, AuditBroken) as err:
            self._rotate_above = max(self._size + more, self._max_size) + self._max_size // _RETRY_SHARE
            why = err.strerror if isinstance(err, OSError) else str(err)
            _log.error("audit: the log could not be rotated, and grows: %s", why)

    def _rotate(self, closed: list[int]) -> None:
        """Raises ``OSError`` and `AuditBroken`, and then the file is written to as before, and as `_settle`."""
        first, kept = self._beginning(self._fd)
        numbers = sorted({*closed, first})
        missing = f"records {kept} to {numbers[0] - 1}" if numbers[0] > kept else None
        if len(numbers) > self._keep:
            kept = max(kept, numbers[-self._keep])
        self._begin(first, kept, missing)

    def _beginning(self, fd: int) -> tuple[int, int]:
        """The number of the first record of a file, and where the kept part began when it was written."""
        line, _, _ = os.pread(fd, MAX_LINE_BYTES + 1, 0).partition(b"\n")
        seq, record = verify_alone(line)
        return seq, kept_from(seq, record)

    def _begin(self, first: int | None, kept: int, missing: str | None) -> None:
        """Begin the next file; the one before it gets the name of its ``first`` record."""
        record = self._record(ROTATED, {"kept_from": kept, "missing": missing})
        line, digest = self._link(record)
        fd = self._files.begin(line, self._fd, first)
        os.close(self._fd)
        self._fd, self._prev, self._seq, self._size = fd, digest, self._seq + 1, len(line)
        self._unsettled = {**record, "seq": self._seq, "hash": digest}
        self._settle()

    def _settle(self) -> None:
        """Make a rotation durable, and only then remove what it says is not kept. Raises `AuditUnwritable`."""
        record = self._unsettled
        if record is None:
            return
        try:
            self._files.sync()
        except OSError as err:
            raise AuditUnwritable(f"{self._path}: {err.strerror}") from err
        self._unsettled = None
        self._tell(record)
        kept = int(str(record["kept_from"]))
        self._background(lambda: _remove_before(self._files, kept))

    def close(self) -> None:
        for _ in self.repeats.write():
            pass
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1


def in_thread(job: Callable[[], None]) -> None:
    """Run it beside the event loop. Nobody waits for it at the end: what it did not do is done next time."""
    try:
        threading.Thread(target=job, name="audit", daemon=True).start()
    except RuntimeError:  # no more threads
        job()


def _at_once(job: Callable[[], None]) -> None:
    job()


def _remove_before(files: AuditFiles, kept: int) -> None:
    """The log goes on meanwhile: none of these files is written to, or closed, again."""
    try:
        for first in files.closed():  # ascending: a crash in between leaves no hole
            if first < kept:
                files.remove(first)
    except OSError as err:
        _log.error("audit: a closed file could not be removed: %s", err.strerror)
