"""Secret memory behind a descriptor, which the service manager can hold while no process of ours runs.

A descriptor that comes back is input. It is mapped only after the kernel has said what it is: whoever can still shrink the file
behind a mapping turns the next access into SIGBUS.
"""

import ctypes
import fcntl
import mmap
import os
import stat
from typing import Self

from unsealerd.core import secret
from unsealerd.core.secret import SecretBuffer, SecretMemoryKind
from unsealerd.errors import KeyringInvalid

_SECRETMEM_MAGIC = 0x5345434D  # linux/magic.h
_TMPFS_MAGIC = 0x01021994
_STATFS_BYTES = 256  # more than any struct statfs has; f_type is its first field, a long
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_MADV_DONTFORK = 10


class SharedSecret(SecretBuffer):
    """A `SecretBuffer` with its descriptor, ``fd``.

    Where the kernel lacks memfd_secret(2) it is a memfd_create(2) whose size is sealed, and whose pages are locked as long as
    this process maps them, not longer. Only `close` wipes. A process that ends in any other way leaves the content to whoever
    holds the descriptor.
    """

    __slots__ = ("fd",)

    def _allocate(self, mapped: int) -> None:
        fd = secret.memfd_secret()
        self.kind = SecretMemoryKind.MLOCK if fd is None else SecretMemoryKind.MEMFD_SECRET
        self.fd = os.memfd_create("unsealerd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) if fd is None else fd
        try:
            os.ftruncate(self.fd, mapped)
            if self.kind is SecretMemoryKind.MLOCK:
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
            self._map_descriptor(mapped)
        except BaseException:
            os.close(self.fd)
            raise
        self._map[:] = bytes(mapped)

    def _map_descriptor(self, mapped: int) -> None:
        self._map = mmap.mmap(self.fd, mapped)
        self._map.madvise(_MADV_DONTFORK)
        self._map.madvise(mmap.MADV_DONTDUMP)
        if self.kind is SecretMemoryKind.MLOCK:
            # Also brings every page in: a lack of memory is an error here, not a SIGBUS later.
            address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
            if ctypes.CDLL(None, use_errno=True).mlock(ctypes.c_void_p(address), ctypes.c_size_t(mapped)):
                code = ctypes.get_errno()
                self._map.close()
                raise OSError(code, f"mlock: {os.strerror(code)}")

    @classmethod
    def received(cls, fd: int, limit: int) -> Self:
        """Map what another process made, at most ``limit`` bytes. Takes the descriptor over, and closes it on an error.

        Raises `KeyringInvalid` if it is anything else than `SharedSecret` makes.
        """
        buffer = cls.__new__(cls)
        buffer.fd = fd
        try:
            buffer.kind, buffer._size = _inspect(fd, limit)
            buffer._map_descriptor(buffer._size)
        except OSError as err:
            os.close(fd)
            raise KeyringInvalid(f"the descriptor cannot be mapped: {err.strerror}") from err
        except KeyringInvalid:
            os.close(fd)
            raise
        buffer._view = memoryview(buffer._map)
        buffer._closed = False
        return buffer

    def close(self) -> None:
        """Wipe, for whoever else holds the descriptor too, and unmap. A second call does nothing."""
        if not self._closed:
            super().close()
            os.close(self.fd)

    def leave(self) -> None:
        """Unmap without wiping. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._view.release()
            self._map.close()
            os.close(self.fd)

    def __del__(self) -> None:
        """Not wiped: the next process is to find it if this one breaks."""


def _inspect(fd: int, limit: int) -> tuple[SecretMemoryKind, int]:
    """Kind and size of what a descriptor stands for. Raises `KeyringInvalid`, ``OSError``."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise KeyringInvalid("the descriptor is not memory")
    if not 1 <= found.st_size <= limit:
        raise KeyringInvalid(f"the memory has {found.st_size} bytes; from 1 to {limit} were expected")
    magic = _file_system(fd)
    if magic == _SECRETMEM_MAGIC:
        return SecretMemoryKind.MEMFD_SECRET, found.st_size  # once it has a size, that stays (mm/secretmem.c)
    if magic != _TMPFS_MAGIC:
        raise KeyringInvalid("the descriptor is a file, not memory")
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise KeyringInvalid("the memory could be cut off while it is read")
    return SecretMemoryKind.MLOCK, found.st_size


def _file_system(fd: int) -> int:
    """The f_type of fstatfs(2)."""
    room = ctypes.create_string_buffer(_STATFS_BYTES)
    if ctypes.CDLL(None, use_errno=True).fstatfs(fd, room) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return ctypes.c_long.from_buffer(room).value
