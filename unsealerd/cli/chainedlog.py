"""Reads the audit log forward, over all files that are kept, and verifies as it goes; in constant memory."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unsealerd.errors import AccessDenied, AuditBroken, NotInitialised, UnsealerdError

if TYPE_CHECKING:
    from unsealerd.core.auditchain import Record

_CHUNK_BYTES = 1 << 20
_SNAPSHOTS = 100  # tries: the daemon would have to rotate during each


@dataclass(frozen=True, slots=True)
class _File:
    """``named``: the number of its first record that a closed file has in its name; None for the one that is written to."""

    fd: int
    path: Path
    named: int | None


class ChainedLog:
    """The log as it was at some instant, and with `follow` what came since.

    Raises `NotInitialised`, `AccessDenied`, `AuditBroken`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = _snapshot(directory)
        self.rewind()

    def rewind(self) -> None:
        """Begin again, in the same files."""
        from unsealerd.core.auditchain import Chain

        self._chain = Chain()
        self._at = 0  # of the files
        self._line = 1  # of the file: the first that is not verified, and...
        self._offset = 0  # ...where it begins

    @property
    def first(self) -> int:
        """The number of the first record that is kept."""
        return self._chain.first

    @property
    def count(self) -> int:
        return self._chain.count

    @property
    def head(self) -> str:
        return self._chain.head

    def records(self) -> Iterator[tuple[bytes, "Record"]]:
        """Every whole line from where the last call ended; what a line lacks may still be on its way."""
        while True:
            yield from self._lines()
            if self._at == len(self._files) - 1:
                return
            self._end_file()
            self._at, self._line, self._offset = self._at + 1, 1, 0

    def follow(self) -> Iterator[tuple[bytes, "Record"]]:
        """What was written since, also where the daemon has begun another file. There is no way back then."""
        yield from self.records()
        last = self._files[-1]
        if _is_at(last.path, last.fd):
            return
        # The last may have grown before it was closed: it is read on. What was read before it is let go.
        _close(self._files[:-1])
        self._files, self._at = [last], 0
        due = self.first + self.count
        for file in _snapshot(self._directory):
            if _same(file.fd, last.fd) or (file.named is not None and file.named < due):
                os.close(file.fd)
            else:
                self._files.append(file)
        yield from self.records()

    def _lines(self) -> Iterator[tuple[bytes, "Record"]]:
        file = self._files[self._at]
        if os.fstat(file.fd).st_size < self._offset:
            raise AuditBroken(f"{file.path}: got shorter while it was read")
        rest = b""
        while chunk := self._read(self._offset + len(rest)):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                try:
                    record = (
                        self._chain.continue_file(line)
                        if self._line > 1
                        else self._chain.begin_file(line, file.named)
                    )
                except AuditBroken as err:
                    raise AuditBroken(f"{self._place()}: {err.detail}") from err
                self._line += 1
                self._offset += len(line) + 1
                yield line, record
            if len(rest) > _CHUNK_BYTES:
                raise AuditBroken(f"{self._place()}: longer than any record")

    def check_end(self) -> None:
        """After the last record. Raises `AuditBroken` when bytes follow it."""
        if self._read(self._offset):
            raise AuditBroken(
                f"{self._place()}: cut off, as a crash does; the daemon removes it when it starts"
            )

    def check_kept(self) -> None:
        """After the last record. Raises `AuditBroken` when something is missing that the daemon has not removed."""
        if self._line == 1 and self._at:
            raise AuditBroken(f"{self._files[self._at].path}: empty, and there are files before it")
        self._chain.check_beginning()

    def _end_file(self) -> None:
        """A closed file is whole: the daemon has made sure before it closed it."""
        if self._line == 1 or self._read(self._offset):
            raise AuditBroken(f"{self._place()}: cut off, in a file that was closed")

    def _place(self) -> str:
        return f"line {self._line} of {self._files[self._at].path.name}"

    def _read(self, offset: int) -> bytes:
        file = self._files[self._at]
        try:
            return os.pread(file.fd, _CHUNK_BYTES, offset)
        except OSError as err:
            raise AuditBroken(f"{file.path}: {err.strerror}") from err

    def sizes(self) -> tuple[int, ...]:
        """The files' bytes, oldest first; the last is the one that is written to."""
        return tuple(os.fstat(file.fd).st_size for file in self._files)

    def close(self) -> None:
        _close(self._files)
        self._files = []


def _snapshot(directory: Path) -> list[_File]:
    """The files, oldest first, at an instant at which the daemon did not begin another."""
    for _ in range(_SNAPSHOTS):
        files: list[_File] = []
        try:
            if _open_all(directory, files):
                return files
        except UnsealerdError:
            _close(files)
            raise
        _close(files)
    raise AuditBroken(f"{directory}: files come and go faster than they can be opened")


def _open_all(directory: Path, files: list[_File]) -> bool:
    """Into ``files``, oldest first. False if the daemon was faster."""
    from unsealerd.core.auditchain import AUDIT_LOG, closed_name

    path = directory / AUDIT_LOG
    try:
        try:
            current = _File(_open(path), path, None)
        except FileNotFoundError:
            if _closed(directory):
                raise AuditBroken(f"{path}: missing, and there are files before it") from None
            raise
        files.append(current)
        for first in _closed(directory):
            path = directory / closed_name(first)
            try:
                file = _File(_open(path), path, first)
            except FileNotFoundError:
                continue  # the chain shows whether it was the daemon that removed it
            if _same(file.fd, current.fd):
                # In the middle of a rotation, and after one that was cut off, this one has two names.
                os.close(file.fd)
            else:
                files.insert(-1, file)
    except FileNotFoundError as err:
        raise NotInitialised(f"{path}: there is no audit log") from err
    except PermissionError as err:
        raise AccessDenied(f"{path}: {err.strerror}") from err
    except OSError as err:
        raise AuditBroken(f"{path}: {err.strerror}") from err
    return _is_at(current.path, current.fd)


def _closed(directory: Path) -> list[int]:
    """The closed files by the numbers of their first records, ascending."""
    from unsealerd.core.auditchain import closed_first

    return sorted(first for name in os.listdir(directory) if (first := closed_first(name)) is not None)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _close(files: list[_File]) -> None:
    for file in files:
        os.close(file.fd)


def _same(one: int, other: int) -> bool:
    return os.path.samestat(os.fstat(one), os.fstat(other))


def _is_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(fd))
    except OSError:
        return False
