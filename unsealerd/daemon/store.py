"""The backup on disk: atomic, durable, the previous generation beside it.

A write goes through these steps; a crash between any two leaves the old backup or the new one under its name::

    create keyring.age.new (0600, O_EXCL, O_NOFOLLOW) → write → fsync
    link keyring.age to keyring.age.previous          (keyring.age never goes away)
    rename keyring.age.new to keyring.age → fsync the directory
"""

import contextlib
import hashlib
import os
import stat
from pathlib import Path

from unsealerd.errors import BackupDamaged, NotInitialised, StorageFailed

BACKUP = "keyring.age"
PREVIOUS = "keyring.age.previous"
SMALL_FILE = 64 << 10  # bytes: more than any other file of the state directory has
MAX_BACKUP_BYTES = 20 << 20


class DurableDirectory:
    """Files that are whole or absent, whatever happens. Every failure is `StorageFailed`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, data: bytes, *, keep_previous: str | None = None) -> None:
        """Replace a file durably; with ``keep_previous`` the old content gets that name."""
        temporary = self.path / f"{name}.new"
        target = self.path / name
        try:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()  # what a crash left
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(temporary, flags, 0o600)
            try:
                with os.fdopen(fd, "wb", buffering=0) as file:
                    view = memoryview(data)
                    while view:
                        view = view[file.write(view) :]
                    os.fsync(fd)
                if keep_previous is not None and target.exists():
                    previous = self.path / keep_previous
                    with contextlib.suppress(FileNotFoundError):
                        previous.unlink()
                    os.link(target, previous)
                temporary.rename(target)
            except OSError:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
            self._sync()
        except OSError as err:
            raise StorageFailed(f"{target}: {err.strerror}") from err

    def remove(self, name: str) -> None:
        """Unlink durably; a file that is not there is fine."""
        try:
            (self.path / name).unlink(missing_ok=True)
            self._sync()
        except OSError as err:
            raise StorageFailed(f"{self.path / name}: {err.strerror}") from err

    def read(self, name: str, limit: int) -> bytes | None:
        """The content, or None if there is no such file. A link is not followed, a pipe is not waited for."""
        try:
            fd = os.open(self.path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as err:
            raise StorageFailed(f"{self.path / name}: {err.strerror}") from err
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise StorageFailed(f"{self.path / name}: not a regular file")
            with os.fdopen(fd, "rb", closefd=False) as file:
                # Not the limit at once: Python would allocate that, and the malloc of the daemon fills what it allocates.
                data = file.read(min(found.st_size, limit) + 1)
        except OSError as err:
            raise StorageFailed(f"{self.path / name}: {err.strerror}") from err
        finally:
            os.close(fd)
        if len(data) > limit:
            raise StorageFailed(f"{self.path / name}: larger than {limit} bytes")
        if len(data) > found.st_size:
            raise StorageFailed(f"{self.path / name}: grows while it is read")
        return data

    def modified(self, name: str) -> int | None:
        """Unix seconds of the last write, or None if there is no such file."""
        try:
            return int((self.path / name).stat().st_mtime)
        except OSError:
            return None

    def _sync(self) -> None:
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class BackupStore:
    """``keyring.age``, and the digest of what this process last wrote or opened."""

    def __init__(self, directory: DurableDirectory) -> None:
        self._directory = directory
        self._known: bytes | None = None

    def present(self) -> bool:
        return (self._directory.path / BACKUP).exists() or (self._directory.path / PREVIOUS).exists()

    def read(self) -> bytes:
        """Raises `NotInitialised` if there never was one, `BackupDamaged` if it cannot be read."""
        try:
            data = self._directory.read(BACKUP, MAX_BACKUP_BYTES)
        except StorageFailed as err:
            raise BackupDamaged(err.detail) from err
        if data is None:
            if self.present():
                raise BackupDamaged(f"{BACKUP} is missing; {PREVIOUS} is there")
            raise NotInitialised("there is no backup")
        return data

    def previous(self) -> bytes | None:
        """The generation before, if it is there and can be read."""
        with contextlib.suppress(StorageFailed):
            return self._directory.read(PREVIOUS, MAX_BACKUP_BYTES)
        return None

    def write(self, data: bytes, *, forget_previous: bool) -> None:
        """Raises `StorageFailed`; the backup is then the old one or the new one, whole.

        ``forget_previous``: the generation before held bytes that are to be destroyed.
        """
        if forget_previous:
            self._directory.remove(PREVIOUS)  # first: a crash after this loses a spare, not a secret
        self._directory.write(BACKUP, data, keep_previous=None if forget_previous else PREVIOUS)
        self.opened(data)

    def opened(self, data: bytes) -> None:
        """Remember these bytes as the backup that this process knows to be good."""
        self._known = hashlib.sha256(data).digest()

    def verify(self) -> bytes:
        """The backup on disk, if it is byte for byte the one that this process knows. Raises `BackupDamaged`."""
        data = self.read()
        if hashlib.sha256(data).digest() != self._known:
            raise BackupDamaged(f"{BACKUP} is not what this daemon wrote")
        return data

    def signature(self) -> tuple[int, int, int] | None:
        """Changes whenever the file is replaced: inode, size and time in nanoseconds. None if there is none."""
        try:
            found = (self._directory.path / BACKUP).stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    @property
    def written_at(self) -> int | None:
        return self._directory.modified(BACKUP)
