"""A listening Unix socket with the right mode from its first instant."""

import os
import socket
import stat
from pathlib import Path
from typing import Self

import msgspec

from unsealerd.errors import ConfigInvalid, StorageFailed

BACKLOG = 512
_SUN_PATH_BYTES = 107  # unix(7): 108 with the final NUL


class Listener(msgspec.Struct, frozen=True):
    """``sock`` listens at ``path``; ``inode`` (device, number) says whether the file there is still ours."""

    sock: socket.socket
    path: Path
    inode: tuple[int, int]

    @classmethod
    def bind(cls, path: Path, mode: int, gid: int | None = None, backlog: int = BACKLOG) -> Self:
        """Listen at `path`, in place of a stale socket that may be there.

        The file is born with mode 0600 and gets its group before its mode: at no time can connect who may not. Raises
        `ConfigInvalid` for a path that does not fit a socket address, `StorageFailed` if the directory cannot be
        written or something that is no socket is in the way. Whether another daemon runs is for the caller to know.
        """
        path = path.absolute()
        if len(os.fsencode(path)) > _SUN_PATH_BYTES:
            raise ConfigInvalid(f"{path}: longer than the path of a Unix socket may be")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            remove_stale(path)
            os.fchmod(sock.fileno(), 0o600)  # bind(2) gives the file the socket's own mode, less the umask
            sock.bind(os.fspath(path))
            if gid is not None:
                os.chown(path, -1, gid, follow_symlinks=False)
            os.chmod(path, mode)
            sock.listen(backlog)
            status = os.stat(path, follow_symlinks=False)
        except OSError as err:
            sock.close()
            raise StorageFailed(f"{path}: {err.strerror}") from err
        return cls(sock, path, (status.st_dev, status.st_ino))

    @classmethod
    def adopt(cls, sock: socket.socket, path: Path, mode: int, gid: int | None = None) -> Self | None:
        """A socket that listens at `path` already, with the mode and group of now; None if another file is there, or none.

        That the file is of this very socket is for the caller to know: by its `inode`.
        """
        try:
            if sock.getsockname() != os.fspath(path):
                return None
            status = os.stat(path, follow_symlinks=False)
            if not stat.S_ISSOCK(status.st_mode):
                return None
            if gid is not None:
                os.chown(path, -1, gid, follow_symlinks=False)
            os.chmod(path, mode)
        except OSError:
            return None
        return cls(sock, path, (status.st_dev, status.st_ino))

    def close(self) -> None:
        """Stop listening, and remove the file unless somebody else's is there. Whoever was not accepted gets ECONNRESET."""
        try:
            status = os.stat(self.path, follow_symlinks=False)
            if (status.st_dev, status.st_ino) == self.inode:
                os.unlink(self.path)
        except FileNotFoundError:
            pass
        self.sock.close()


def remove_stale(path: Path) -> None:
    """Unlink the socket at `path`, if there is one. Anything else stays, and will be in the way."""
    try:
        if stat.S_ISSOCK(os.stat(path, follow_symlinks=False).st_mode):
            os.unlink(path)
    except FileNotFoundError:
        pass
