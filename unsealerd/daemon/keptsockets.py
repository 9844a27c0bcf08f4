"""Sockets in the service manager's descriptor store: who waits at them does not notice that the daemon was restarted.

Two kinds, told apart by their names in the store:

    listen.DEVICE.INODE.LABEL     a listening socket, with the connections that wait in the kernel's queue; device and inode are
                                  those of its file, so that it is taken for what it was only if its file is still there
    reader.TOKEN.LABEL            an accepted connection of somebody who waits for a key

A label is the path below the runtime directory: ``keys``, ``key/NAME``. The number of both is bounded, and leaves room for the
images of the keyring.
"""

import contextlib
import logging
import os
import socket
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from unsealerd.daemon.caller import peer_uid
from unsealerd.daemon.fdstore import FdStore, Received
from unsealerd.daemon.listener import BACKLOG, Listener

LISTENER = "listen."
READER = "reader."
_RESERVED = 16  # places in the store that are for the images
MAX_LISTENERS = 512
MAX_READERS = 256
MAX_READERS_PER_UID = 16  # root excepted: it is systemd that reads for units
_PATIENCE = 0.1  # seconds, on the event loop: for root only, or any user could stop the loop by connecting

_log = logging.getLogger("unsealerd")


class KeptSockets:
    """Used from the event loop. Without a store it only makes listening sockets."""

    def __init__(self, store: FdStore, received: Sequence[Received] = ()) -> None:
        self._store = store
        self._found: dict[
            str, socket.socket
        ] = {}  # listening, not asked for yet; by their names in the store
        self._kept: dict[str, str] = {}  # label: name in the store
        self._readers: dict[str, socket.socket] = {}
        self._waiting: list[tuple[str, socket.socket]] = []
        for entry in received:
            try:
                sock = _stream_socket(entry.fd)
            except OSError as err:
                _log.warning("kept_socket_refused name=%r errno=%d", entry.name, err.errno or 0)
                os.close(entry.fd)
                store.remove(entry.name)
                continue
            if entry.name.startswith(LISTENER) and _listens(sock):
                self._found[entry.name] = sock
            elif entry.name.startswith(READER) and not _listens(sock):
                self._readers[entry.name] = sock
                self._waiting.append((entry.name.split(".", 2)[-1], sock))
            else:
                sock.close()
                store.remove(entry.name)

    # --- listening sockets

    def listener(
        self, label: str, path: Path, mode: int, gid: int | None = None, backlog: int = BACKLOG
    ) -> Listener:
        """The one from before the restart, or a new one, see `Listener.bind`."""
        path = path.absolute()
        for name in [name for name in self._found if name.split(".", 3)[-1] == label]:
            sock = self._found.pop(name)
            adopted = Listener.adopt(sock, path, mode, gid)
            if adopted is not None and name == _name(label, adopted):
                self._kept[label] = name
                return adopted
            self._waiting += [(label, accepted) for accepted in _queue(sock)]
            sock.close()
            self._store.remove(name)
        listener = Listener.bind(path, mode, gid, backlog)
        name = _name(label, listener)
        if (
            len(self._kept) < MAX_LISTENERS
            and self._room()
            and self._store.store(name, listener.sock.fileno())
        ):
            self._kept[label] = name
        return listener

    def close(self, label: str, listener: Listener, *, ends: bool) -> None:
        """``ends``: the process does, and the next one goes on with the socket, if it is kept."""
        name = self._kept.pop(label, None)
        if name is not None and ends:
            listener.sock.close()
            return
        if name is not None:
            self._store.remove(name)
        listener.close()

    def drop_unclaimed(self) -> None:
        """The configuration is followed: nobody will ask for what is left."""
        while self._found:
            name, sock = self._found.popitem()
            sock.close()
            self._store.remove(name)
        while self._waiting:
            self._waiting.pop()[
                1
            ].close()  # for a key that is gone; the store's copy waits until its reader gives up

    # --- readers

    def keep(self, label: str, sock: socket.socket) -> None:
        """Have a copy of a reader's connection kept until it hangs up, within bounds."""
        if not self._store.available:
            return
        self._readers = {name: other for name, other in self._readers.items() if other.fileno() >= 0}
        with contextlib.suppress(OSError):  # gone already
            uid = peer_uid(sock)
            if len(self._readers) >= MAX_READERS or not self._room():
                return
            if uid != 0 and self._count(uid) >= MAX_READERS_PER_UID:
                return
            name = f"{READER}{os.urandom(8).hex()}.{label}"
            if self._store.store(name, sock.fileno(), until_hangup=True, patience=0 if uid else _PATIENCE):
                self._readers[name] = sock

    def _room(self) -> bool:
        return len(self._kept) + len(self._readers) < self._store.room - _RESERVED

    def _count(self, uid: int) -> int:
        found: Counter[int] = Counter()
        for sock in self._readers.values():
            with contextlib.suppress(OSError):
                found[peer_uid(sock)] += 1
        return found[uid]

    def waiting(self, prefix: str) -> list[tuple[str, socket.socket]]:
        """Connections from before the restart whose labels begin so, each once: (rest of the label, socket)."""
        found = [
            (label.removeprefix(prefix), sock) for label, sock in self._waiting if label.startswith(prefix)
        ]
        self._waiting = [entry for entry in self._waiting if not entry[0].startswith(prefix)]
        return found


def _name(label: str, listener: Listener) -> str:
    device, inode = listener.inode
    return f"{LISTENER}{device}.{inode}.{label}"


def _stream_socket(fd: int) -> socket.socket:
    """Raises ``OSError`` for what is none; the descriptor is then the caller's to close."""
    sock = socket.socket(fileno=fd)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise OSError("not a Unix stream socket")
    sock.setblocking(False)
    return sock


def _listens(sock: socket.socket) -> bool:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1


def _queue(sock: socket.socket) -> list[socket.socket]:
    """Who waits at a listening socket whose file is gone."""
    found: list[socket.socket] = []
    with contextlib.suppress(OSError):  # EAGAIN: there are no more
        while len(found) < MAX_READERS:
            found.append(sock.accept()[0])
    return found
