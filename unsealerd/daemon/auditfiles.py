"""The files of the audit log on disk: the one that is written to, and those that are closed.

A rotation goes through these steps; a crash between any two leaves every record where `unsealctl audit` finds it, once::

    create audit.jsonl.new (0600, O_EXCL, O_NOFOLLOW) → write its first record → fsync
    fdatasync audit.jsonl                                            (nothing will ever change in it again)
    link audit.jsonl to audit-NUMBER.jsonl → fsync the directory     (audit.jsonl never goes away)
    rename audit.jsonl.new to audit.jsonl → fsync the directory
    unlink the closed files that are too many                        (the new first record says so)
"""

import contextlib
import errno
import os
from pathlib import Path

from unsealerd.core.auditchain import AUDIT_LOG, closed_first, closed_name

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC


class AuditFiles:
    """Every method raises ``OSError``."""

    def __init__(self, directory: Path) -> None:
        self.current = directory / AUDIT_LOG
        self._new = directory / f"{AUDIT_LOG}.new"
        self._directory = directory

    def open(self) -> int:
        """A descriptor of the file that is written to; an empty one if there was none."""
        return os.open(self.current, _FLAGS, 0o600)

    def closed(self) -> list[int]:
        """The closed files by the numbers of their first records, ascending."""
        return sorted(
            first for name in os.listdir(self._directory) if (first := closed_first(name)) is not None
        )

    def open_closed(self, first: int) -> int:
        return os.open(self._closed(first), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def sync(self) -> None:
        """A record is not durable before the name of its file is."""
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def begin(self, line: bytes, old: int, first: int | None) -> int:
        """Put a new file with this first record in the place of the ``old`` one. The caller has to `sync`.

        ``first``: the number of the old one's first record, by which it is named from then on; None if it has none, and goes.
        If it raises, the old one is in its place.
        """
        with contextlib.suppress(FileNotFoundError):
            self._new.unlink()  # what a crash left
        fd = os.open(self._new, _FLAGS | os.O_EXCL, 0o600)
        try:
            if os.write(fd, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(fd)
            if first is not None:
                self._close(old, first)
            self._new.rename(self.current)
        except OSError:
            os.close(fd)
            with contextlib.suppress(OSError):
                self._new.unlink()
            with contextlib.suppress(OSError):
                self.forget(old)
            raise
        return fd

    def _close(self, fd: int, first: int) -> None:
        """Give the file a name as a closed one, durably, beside the one that it has."""
        os.fdatasync(fd)
        closed = self._closed(first)
        self._check_same(self.current, fd)
        with contextlib.suppress(FileExistsError):  # what a crash left, or another's
            os.link(self.current, closed)
        self._check_same(closed, fd)
        self.sync()

    def _check_same(self, path: Path, fd: int) -> None:
        if not os.path.samestat(os.lstat(path), os.fstat(fd)):
            raise OSError(errno.EEXIST, f"{path.name} is another file than the one that is written to")

    def forget(self, fd: int) -> None:
        """Take back the names as a closed file of the one that is written to: a rotation was cut off."""
        for first in self.closed():
            if os.path.samestat(os.lstat(self._closed(first)), os.fstat(fd)):
                self._closed(first).unlink()

    def remove(self, first: int) -> None:
        self._closed(first).unlink(missing_ok=True)

    def _closed(self, first: int) -> Path:
        return self._directory / closed_name(first)
