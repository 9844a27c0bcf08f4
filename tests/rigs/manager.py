"""A stand-in for the service manager: its notification socket, and its store of descriptors, which outlives the daemon.

As systemd does it (sd_notify(3), sd_listen_fds(3)): what comes with FDSTORE=1 is kept under its FDNAME, FDSTOREREMOVE=1
drops all of that name, and the next start gets what is left on the descriptors 3 and up.
"""

import array
import os
import select
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Self

_MESSAGE_BYTES = 65536
_MAX_FDS = 64
_PATIENCE = 60.0  # seconds

# dup2 in two steps, so that no descriptor is overwritten before it was moved; then the variables, with the pid that exec keeps.
_LAUNCH = """
import os, sys
fds, names = [int(fd) for fd in sys.argv[1].split(',') if fd], sys.argv[2]
high = [os.dup(fd) for fd in fds]
top = max([*high, 3 + len(fds)]) + 1
moved = [os.dup2(fd, top + number) for number, fd in enumerate(high)]
for number, fd in enumerate(moved):
    os.dup2(fd, 3 + number)
os.closerange(3 + len(fds), top + len(fds) + 1)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=names)
os.execv(sys.argv[3], sys.argv[3:])
"""


class ServiceManager:
    """Give `prefix` and `environment` to the daemon; both as of the time of its start."""

    def __init__(self, directory: Path, *, most: int = 64) -> None:
        self._path = directory / "notify"
        self._most = most
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(os.fspath(self._path))
        self._end_read, self._end_write = os.pipe()
        self._mutex = threading.Lock()
        self._kept: list[tuple[str, int]] = []
        self.messages: list[dict[str, str]] = []
        self.deaf = False
        """To FDSTORE: as a unit without FileDescriptorStoreMax=."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        return {"NOTIFY_SOCKET": os.fspath(self._path)}

    def prefix(self) -> tuple[str, ...]:
        """To be put before the command of the daemon; with `pass_fds`."""
        self.settle()  # what the one before said last counts, too
        self._drop_hung_up()
        with self._mutex:
            fds, names = [fd for _, fd in self._kept], [name for name, _ in self._kept]
        numbers = ",".join(map(str, fds))
        return (sys.executable, "-S", "-c", _LAUNCH, numbers, ":".join(names))

    def pass_fds(self) -> tuple[int, ...]:
        with self._mutex:
            return tuple(fd for _, fd in self._kept)

    def _drop_hung_up(self) -> None:
        """As FDPOLL=1."""
        with self._mutex:
            for entry in tuple(self._kept):
                poll = select.poll()
                poll.register(entry[1], 0)
                if not entry[0].startswith("memory-") and poll.poll(0):
                    self._kept.remove(entry)
                    os.close(entry[1])

    def names(self) -> list[str]:
        self.settle()
        self._drop_hung_up()
        with self._mutex:
            return [name for name, _ in self._kept]

    def copies(self, prefix: str = "memory-") -> list[int]:
        """Duplicates of the descriptors whose names begin so; the caller closes them."""
        self.settle()
        with self._mutex:
            return [os.dup(fd) for name, fd in self._kept if name.startswith(prefix)]

    def put(self, name: str, fd: int) -> None:
        """Into the store, as if it had come from the daemon. Takes the descriptor over."""
        with self._mutex:
            os.set_inheritable(fd, False)
            self._kept.append((name, fd))

    def empty(self, prefix: str = "") -> None:
        """As when the unit is stopped."""
        self.settle()
        self._drop(prefix)

    def _drop(self, prefix: str) -> None:
        with self._mutex:
            for entry in [entry for entry in self._kept if entry[0].startswith(prefix)]:
                self._kept.remove(entry)
                os.close(entry[1])

    def said(self, field: str) -> list[str]:
        """Every value of a field so far."""
        with self._mutex:
            return [message[field] for message in self.messages if field in message]

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._socket.fileno(), self._end_read], [], [])
            if self._end_read in ready:
                return
            self._receive()

    def _receive(self) -> None:
        room = array.array("i", [0] * _MAX_FDS)
        data, ancillary, _, _ = self._socket.recvmsg(
            _MESSAGE_BYTES, socket.CMSG_SPACE(room.itemsize * _MAX_FDS), socket.MSG_CMSG_CLOEXEC
        )
        fds = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        message = dict(line.partition("=")[::2] for line in data.decode().splitlines())
        with self._mutex:
            self.messages.append(message)
            name = message.get("FDNAME", "stored")
            if message.get("FDSTORE") == "1" and not self.deaf and len(self._kept) < self._most:
                self._kept += [(name, fd) for fd in fds]
            else:
                for fd in fds:
                    os.close(fd)
            if message.get("FDSTOREREMOVE") == "1":
                for entry in [entry for entry in self._kept if entry[0] == name]:
                    self._kept.remove(entry)
                    os.close(entry[1])

    def settle(self) -> None:
        """Until every message that was sent before is dealt with."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            token = os.urandom(8).hex()
            channel.sendto(f"BARRIER={token}".encode(), os.fspath(self._path))
        deadline = time.monotonic() + _PATIENCE
        while token not in self.said("BARRIER"):
            assert time.monotonic() < deadline, "the service manager does not take its messages"
            select.select([], [], [], 0.005)

    def close(self) -> None:
        os.write(self._end_write, b"x")
        self._thread.join()
        self._drop("")
        self._socket.close()
        os.close(self._end_read)
        os.close(self._end_write)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
