"""Sockets that hand out a key: connect, read to the end.

A reader takes end-of-file for the end of the key, and systemd takes an empty one for an empty credential. So a
connection is never ended before a whole key was sent, whatever happens:

* While the keys are locked nothing is accepted. The connections wait in the kernel's queue, and if the daemon stops or is
  killed then, the kernel resets them: the reader sees ECONNRESET (unix_release_sock() in net/unix/af_unix.c).
* Who is denied, or was cut off half-way, is held until it gives up.
* An accepted connection cannot be reset by the daemon (SO_LINGER means nothing on AF_UNIX; the kernel resets only if the
  reader sent something that was not read). So the service manager holds a copy of each (`KeptSockets`), before anything else
  is done with it: then not even the end of the daemon ends it. Where nobody holds one, a reader that was
  accepted and not served reads end-of-file when the daemon's process ends.
* The service manager holds the listening sockets, too: who waits in the kernel's queue then is not even reset by a restart.
* For the same reason nobody is turned away for there being too many connections. Beyond `KeyLimits.open` none is accepted until
  another one is given up: late, but never empty. Only a user with hundreds of readers that wait, all of them denied, is let go.
"""

import asyncio
import contextlib
import logging
import resource
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

import msgspec

from unsealerd.daemon.caller import Peer
from unsealerd.daemon.fdstore import FdStore
from unsealerd.daemon.hangup import HangUps
from unsealerd.daemon.keptsockets import KeptSockets
from unsealerd.daemon.listener import Listener, remove_stale
from unsealerd.errors import (
    AuditUnwritable,
    CallerChanged,
    LimitExceeded,
    Locked,
    StorageFailed,
    UnsealerdError,
)

_log = logging.getLogger(__name__)

_SOCKET_MODE = 0o666  # the policy decides
_DIRECTORY_MODE = 0o755
_PLAIN_SEND_BYTES = 64 * 1024  # fits every default send buffer
_DRAIN_BYTES = 65536


class KeyLimits(msgspec.Struct, frozen=True):
    """``open``: accepted connections at a time (never more than half of RLIMIT_NOFILE is used)."""

    open: int = 16384
    open_per_uid: int = 512  # of one user, root excepted; who has more is denied over and over, and is let go
    backlog: int = 512  # waiting for an unlock, for each key; who connects beyond that waits in connect(2)
    held: int = 4096  # denied readers that are not root, of all users together; who comes then is let go
    accepts_per_turn: int = 1  # so that who connects in a loop takes turns with everybody else
    retry_seconds: float = 1.0  # after running out of descriptors, or out of disk for the audit log


class KeyConnection:
    """One reader. `send_secret` ends it; otherwise it is held until the reader gives up."""

    __slots__ = ("_owner", "counted", "held", "name", "parked", "peer", "sock", "task", "told", "turn")

    def __init__(self, owner: "KeySockets", name: str, sock: socket.socket) -> None:
        self._owner = owner
        self.name = name
        self.sock = sock
        self.peer: Peer | None = None
        self.task: asyncio.Future[None] | None = None
        self.turn = 0
        self.told = False  # that it waits, to the log
        self.counted = False  # among the readers of its user
        self.held = False  # denied, and not root's
        self.parked = False  # waits for `KeySockets.resume`

    @property
    def gone(self) -> bool:
        """Whether it was served, or its reader gave up."""
        return self.sock.fileno() < 0

    def send_secret(self, secret: memoryview) -> None:
        """Send all of `secret`, then end-of-file. Does nothing if the reader is gone.

        It goes to the kernel in one call, straight from its own memory: between the look at the caller and the last byte
        nothing else runs, so the memory cannot be wiped half-way. Raises `CallerChanged`, or `LimitExceeded` if it
        did not fit; then the reader is held.
        """
        if self.gone:
            return
        if self.peer is None or secret.nbytes == 0:
            raise ValueError("no reader is given an empty key")
        self.peer.check()
        if secret.nbytes > _PLAIN_SEND_BYTES:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * secret.nbytes)
        try:
            sent = self.sock.send(secret)
        except BlockingIOError as err:
            raise LimitExceeded("the key did not fit the socket") from err
        except (BrokenPipeError, ConnectionResetError):
            self._owner.release(self)
            return
        if sent != secret.nbytes:
            raise LimitExceeded("the key did not fit the socket")
        # What the reader sent is read now, for the kernel would reset the connection otherwise, and it is shut first,
        # so that no more comes. The end also reaches a reader whose connection the service manager has a copy of.
        self.sock.shutdown(socket.SHUT_RDWR)
        rest = bytearray(_DRAIN_BYTES)
        with contextlib.suppress(ConnectionResetError):  # it closed without reading
            while self.sock.recv_into(rest):
                pass
        self._owner.release(self)


Serve = Callable[[str, Peer, KeyConnection], Awaitable[None]]


class KeySockets:
    """One listening socket for each key, ``DIRECTORY/NAME``. Starts paused: `resume` once the keys are there.

    `serve(name, peer, connection)` decides, audits, and calls ``connection.send_secret``. Whatever it raises, the reader is
    held; after `Locked` it is served anew by the next `resume`. To be made inside of a running event loop.
    """

    def __init__(
        self,
        directory: Path,
        serve: Serve,
        limits: KeyLimits | None = None,
        *,
        kept: KeptSockets | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._directory = directory
        self._serve = serve
        self._kept = kept if kept is not None else KeptSockets(FdStore())
        self._limits = limits if limits is not None else KeyLimits()
        # There are two of these, and a reader that waits takes up to three descriptors; the rest is for everybody else.
        self._most = min(self._limits.open, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8)
        self._hangups = HangUps()
        self._listeners: dict[str, Listener] = {}
        self._open: set[KeyConnection] = set()
        self._per_uid: Counter[int] = Counter()
        self._held = 0
        self._running = False
        self._accepting = False
        self._retry: asyncio.TimerHandle | None = None
        self._turn = 0  # how often it was resumed

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._listeners)

    @property
    def open_connections(self) -> int:
        """Accepted, and neither served nor given up."""
        return len(self._open)

    def set_names(self, names: Collection[str]) -> None:
        """Listen for exactly these keys. `names` are file names; the caller has validated them.

        Whoever waited for one of them over a restart is taken over. Readers that wait for a name that goes away are reset.
        Raises `StorageFailed` or `ConfigInvalid`.
        """
        try:
            self._directory.mkdir(mode=_DIRECTORY_MODE, exist_ok=True)
            self._directory.chmod(_DIRECTORY_MODE)
            for found in self._directory.iterdir():
                if found.name not in self._listeners and found.name not in names:
                    remove_stale(found)
        except OSError as err:
            raise StorageFailed(f"{self._directory}: {err.strerror}") from err
        for name in self._listeners.keys() - set(names):
            listener = self._listeners.pop(name)
            self._loop.remove_reader(listener.sock)
            self._kept.close(self._label(name), listener, ends=False)
        for name in sorted(set(names) - self._listeners.keys()):
            listener = self._kept.listener(
                self._label(name), self._directory / name, _SOCKET_MODE, backlog=self._limits.backlog
            )
            self._listeners[name] = listener
            if self._accepting:
                self._loop.add_reader(listener.sock, self._accept, name)
        for name, sock in self._kept.waiting(self._label("")):
            if name in self._listeners:
                self.adopt(name, sock)
            else:
                sock.close()

    def _label(self, name: str) -> str:
        return f"{self._directory.name}/{name}"

    def resume(self) -> None:
        """The keys are there: serve whoever waits."""
        self._running = True
        self._turn += 1
        self._update()
        for connection in tuple(self._open):
            if connection.parked:
                self._start(connection)

    def pause(self) -> None:
        """The keys are gone: from now on readers wait."""
        self._running = False
        self._update()

    def adopt(self, name: str, sock: socket.socket) -> None:
        """Take over a connection that a process before this one had accepted. Served by the next `resume`."""
        sock.setblocking(False)
        connection = self._add(name, sock)
        if self._running:
            self._start(connection)
        else:
            connection.parked = True

    async def close(self, grace: float = 5.0) -> None:
        """The process ends: give readers that are being served `grace` seconds, and let go of the rest.

        Whoever is not kept by the service manager and was not accepted is reset.
        """
        self._running = False
        self._update()
        if self._retry is not None:
            self._retry.cancel()
        while self._listeners:
            name, listener = self._listeners.popitem()
            self._kept.close(self._label(name), listener, ends=True)
        tasks = {connection.task for connection in self._open if connection.task is not None}
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        for connection in tuple(self._open):
            self.release(connection)
        self._hangups.close()

    # --- accepting

    def _update(self) -> None:
        """Listen on all sockets, or on none."""
        accepting = self._running and len(self._open) < self._most and self._retry is None
        if accepting == self._accepting:
            return
        self._accepting = accepting
        if self._running and not accepting:
            _log.warning("key_readers_wait open=%d", len(self._open))
        for name, listener in self._listeners.items():
            if accepting:
                self._loop.add_reader(listener.sock, self._accept, name)
            else:
                self._loop.remove_reader(listener.sock)

    def _accept(self, name: str) -> None:
        for _ in range(self._limits.accepts_per_turn):
            if not self._accepting or name not in self._listeners:
                return
            try:
                sock, _ = self._listeners[name].sock.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                return
            except OSError as err:  # the connection stays in the kernel's queue
                self._wait_for_resources(err)
                return
            sock.setblocking(False)
            self._kept.keep(self._label(name), sock)
            self._start(self._add(name, sock))
            self._update()

    def _wait_for_resources(self, err: OSError) -> None:
        """Out of descriptors or memory: an accept that fails would fail again at once."""
        _log.warning("key_readers_wait errno=%d", err.errno or 0)
        if self._retry is None:
            self._retry = self._loop.call_later(self._limits.retry_seconds, self._again)
        self._update()

    def _again(self) -> None:
        self._retry = None
        self._update()
        for connection in tuple(self._open):
            if self._running and connection.parked:
                self._start(connection)

    # --- connections

    def _add(self, name: str, sock: socket.socket) -> KeyConnection:
        connection = KeyConnection(self, name, sock)
        self._open.add(connection)
        self._hangups.watch(sock.fileno(), lambda: self.release(connection))
        return connection

    def _start(self, connection: KeyConnection) -> None:
        connection.parked = False
        connection.turn = self._turn
        try:
            if connection.peer is None:
                connection.peer = Peer.of(connection.sock, credentials=True)
                if not self._count(connection.peer.caller.uid):
                    self._let_go(connection, connection.peer.caller.uid)
                    return
                connection.counted = True
        except CallerChanged as error:
            self._hold(connection, error.name)
            return
        except OSError as err:
            connection.parked = True
            self._wait_for_resources(err)
            return
        connection.task = asyncio.ensure_future(self._serve(connection.name, connection.peer, connection))
        connection.task.add_done_callback(lambda task: self._served(connection, task))

    def _served(self, connection: KeyConnection, task: asyncio.Future[None]) -> None:
        connection.task = None
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, UnsealerdError):
            # A bug. Its text could quote anything, so only its type is told.
            _log.error("handler_bug type=%s", type(error).__name__)
        if connection.gone:
            return
        if isinstance(error, AuditUnwritable):
            # It may well be entitled: ask again when there is room for the record.
            if not connection.told:
                connection.told = True
                _log.warning("key_reader_waits key=%s why=%s", connection.name, error.name)
            connection.parked = True
            if self._retry is None:
                self._retry = self._loop.call_later(self._limits.retry_seconds, self._again)
        elif not isinstance(error, Locked):
            self._hold(connection, error.name if isinstance(error, UnsealerdError) else "not_served")
        elif self._running and connection.turn != self._turn:
            self._start(connection)  # unlocked again since it asked
        else:
            connection.parked = True

    def _count(self, uid: int) -> bool:
        """Whether one more reader of this user may wait.

        Without a bound, one user could keep all others from their keys. Who is let go reads an end without data; that is
        no danger, for a reader that is entitled waits here only while the audit log cannot be written.
        """
        if uid != 0 and self._per_uid[uid] >= self._limits.open_per_uid:
            return False
        self._per_uid[uid] += 1
        return True

    def _hold(self, connection: KeyConnection, why: str) -> None:
        """Neither a key nor an end, until the reader gives up."""
        pid = connection.peer.caller.pid if connection.peer is not None else 0
        _log.warning("key_reader_held key=%s pid=%d why=%s", connection.name, pid, why)
        if connection.peer is None:
            return
        connection.peer.close()
        uid = connection.peer.caller.uid
        if uid != 0 and self._held >= min(self._limits.held, self._most // 2):
            # One user may have many uids (user namespaces): all together hold no more than this from the others.
            self._let_go(connection, uid)
        elif uid != 0:
            connection.held = True
            self._held += 1

    def _let_go(self, connection: KeyConnection, uid: int) -> None:
        """It reads an end without data. Never for root: that may be the service manager, which starts a unit with it."""
        _log.warning("key_reader_let_go key=%s uid=%d", connection.name, uid)
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)  # for the service manager's copy, too, if there is one
        self.release(connection)

    def release(self, connection: KeyConnection) -> None:
        """Close our copy of the connection: it was served, or its reader gave up."""
        if connection.gone:
            return
        self._open.discard(connection)
        if connection.task is not None:
            connection.task.cancel()  # nobody waits for it any more, and it may wait for long
        if connection.counted and connection.peer is not None:
            self._per_uid[connection.peer.caller.uid] -= 1
        self._held -= connection.held
        self._hangups.forget(connection.sock.fileno())
        connection.sock.close()
        if connection.peer is not None:
            connection.peer.close()
        self._update()
