"""Secret memory: the only place where plain key bytes live.

A `SecretBuffer` is an anonymous mapping made by memfd_secret(2): the kernel takes its pages out of its own
direct map, so neither /proc/PID/mem, nor a core dump, nor swap, nor a hibernation image, nor a kernel read primitive
shows them. It is no wall against root, who can have the process give them: by ptrace(2), or by pidfd_getfd(2), since
the module mmap keeps a descriptor of its mapping, and what is kept for a restart is a descriptor in PID 1.

Where the kernel lacks it (before 5.14, or 6.1 without ``secretmem.enable=1``), the mapping is ordinary memory with
mlock(2), MADV_DONTDUMP and MADV_WIPEONFORK.
"""

import contextlib
import ctypes
import enum
import errno
import functools
import hmac
import mmap
import os
from typing import NoReturn, Self

from unsealerd.errors import LimitExceeded

_SYS_MEMFD_SECRET = 447  # the same number on every architecture (asm-generic/unistd.h)
_FD_CLOEXEC = 0x80000  # O_CLOEXEC, the only flag memfd_secret(2) takes


class SecretMemoryKind(enum.Enum):
    MEMFD_SECRET = "memfd_secret"  # noqa: S105 - the name of a system call
    MLOCK = "mlock"


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def memfd_secret() -> int | None:
    """A new memfd_secret descriptor, or None where the kernel does not offer it."""
    fd = int(_libc().syscall(_SYS_MEMFD_SECRET, _FD_CLOEXEC))
    if fd >= 0:
        return fd
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EPERM, errno.EINVAL):
        return None
    raise OSError(code, os.strerror(code))


class SecretBuffer:
    """A fixed number of secret bytes, wiped when closed.

    Raises `LimitExceeded` if the memory cannot be had or locked (RLIMIT_MEMLOCK, descriptors): a secret is never put
    into memory that could be swapped out.
    """

    __slots__ = ("_closed", "_map", "_size", "_view", "kind")

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ValueError("a size is not negative")
        self._size = size
        mapped = max(size, 1)  # an empty mapping is not allowed; an empty payload is
        try:
            self._allocate(mapped)
        except OSError as err:
            raise LimitExceeded(f"no secret memory could be had: {err.strerror}") from err
        self._view = memoryview(self._map)[:size]
        self._closed = False

    def _allocate(self, mapped: int) -> None:
        fd = memfd_secret()
        if fd is not None:
            try:
                os.ftruncate(fd, mapped)
                self._map = mmap.mmap(fd, mapped)
            finally:
                os.close(fd)
            self.kind = SecretMemoryKind.MEMFD_SECRET
        else:
            self._map = mmap.mmap(-1, mapped, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._lock()
            self.kind = SecretMemoryKind.MLOCK
        # Touching every page now makes a lack of memory an error here, not a SIGBUS later.
        self._map[:] = bytes(mapped)

    def _lock(self) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        if _libc().mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(self._map))) != 0:
            code = ctypes.get_errno()
            self._map.close()
            raise OSError(code, f"mlock: {os.strerror(code)}")
        self._map.madvise(mmap.MADV_DONTDUMP)
        self._map.madvise(getattr(mmap, "MADV_WIPEONFORK", 18))

    @classmethod
    def random(cls, size: int) -> Self:
        """``size`` bytes from the kernel's generator, drawn straight into the mapping."""
        buffer = cls(size)
        fill_random(buffer.view)
        return buffer

    @classmethod
    def copy_of(cls, source: bytes | bytearray | memoryview) -> Self:
        buffer = cls(len(source))
        buffer.view[:] = source
        return buffer

    @property
    def view(self) -> memoryview:
        """The bytes, writable. Raises ``ValueError`` after `close`."""
        self._view.nbytes  # noqa: B018 - raises ValueError once released
        return self._view

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Wipe and unmap. A second call does nothing.

        A view that somebody still holds keeps the mapping alive, but not its content.
        """
        if self._closed:
            return
        self._closed = True
        self._view[:] = bytes(self._size)
        self._view.release()
        # An exported slice keeps the (wiped) mapping until it goes away itself.
        with contextlib.suppress(BufferError):
            self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def __len__(self) -> int:
        return self._size

    def __eq__(self, other: object) -> bool:
        """Constant time in the content."""
        if isinstance(other, SecretBuffer):
            return hmac.compare_digest(self.view, other.view)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<SecretBuffer of {self._size} bytes>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SecretBuffer does not leave its process")


def fill_random(view: memoryview) -> None:
    """Fill from getrandom(2), straight into the memory: no ``bytes`` object is made."""
    length = view.nbytes
    anchor = (ctypes.c_char * length).from_buffer(view)
    libc = _libc()
    libc.getrandom.restype = ctypes.c_ssize_t
    done = 0
    while done < length:
        got = int(
            libc.getrandom(
                ctypes.c_void_p(ctypes.addressof(anchor) + done),
                ctypes.c_size_t(length - done),
                ctypes.c_uint(0),
            )
        )
        if got < 0:
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            raise OSError(code, f"getrandom: {os.strerror(code)}")
        done += got
    del anchor
