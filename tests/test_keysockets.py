"""Sockets that hand out a key: the whole key, or nothing and no end."""

import asyncio
import errno
import logging
import os
import secrets
import select
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from rigs.toyserver import PATIENCE, LoopThread

from unsealerd.core.secret import SecretBuffer
from unsealerd.daemon.caller import Peer
from unsealerd.daemon.fdstore import FdStore
from unsealerd.daemon.keptsockets import KeptSockets
from unsealerd.daemon.keysockets import KeyConnection, KeyLimits, KeySockets
from unsealerd.errors import AccessDenied, Locked, StorageFailed

KEY = bytes(range(32))
A_WHILE = 0.2  # seconds in which nothing is to happen


class _Keeping(KeptSockets):
    """A service manager that keeps readers, and tells the test which."""

    def __init__(self, keep: Callable[[str, socket.socket], None]) -> None:
        super().__init__(FdStore())
        self._keep = keep

    def keep(self, label: str, sock: socket.socket) -> None:
        self._keep(label.rpartition("/")[2], sock)


class Rig:
    """Key sockets in a thread, with a policy that the test sets."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.thread = LoopThread()
        self.served: list[Peer] = []
        self.kept: list[tuple[str, socket.socket]] = []
        self.secret = SecretBuffer.copy_of(KEY)
        self.decide: Callable[[KeyConnection], None] = self.give
        self.sockets = self.make()

    def make(self, limits: KeyLimits | None = None, *, keep: bool = False) -> KeySockets:
        async def inside() -> KeySockets:
            return KeySockets(
                self.directory, self._serve, limits, kept=_Keeping(self._keep) if keep else None
            )

        return self.thread.run(inside())

    def _keep(self, name: str, sock: socket.socket) -> None:
        self.kept.append((name, sock.dup()))

    async def _serve(self, name: str, peer: Peer, connection: KeyConnection) -> None:
        self.served.append(peer)
        await asyncio.sleep(0)
        self.decide(connection)

    def give(self, connection: KeyConnection) -> None:
        connection.send_secret(self.secret.view)

    def open(self, *names: str) -> None:
        self.thread.call(self.sockets.set_names, names)
        self.thread.call(self.sockets.resume)

    def reader(self, name: str = "web") -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        sock.connect(str(self.directory / name))
        return sock

    def until(self, condition: Callable[[], bool]) -> None:
        self.thread.until(condition)

    def close(self) -> None:
        self.thread.run(self.sockets.close(grace=0.1))
        self.thread.close()
        for _, sock in self.kept:
            sock.close()
        self.secret.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    found = Rig(tmp_path / "key")
    try:
        yield found
    finally:
        found.close()


def whole(sock: socket.socket) -> bytes:
    """Everything until end-of-file, as a service reads it."""
    found = b""
    while piece := sock.recv(4096):
        found += piece
    return found


def silent(sock: socket.socket) -> bool:
    """Whether neither a byte nor an end comes for a while."""
    readable, _, _ = select.select([sock], [], [], A_WHILE)
    return not readable


# --- who may have it


def test_a_reader_gets_the_key_and_then_the_end(rig: Rig) -> None:
    rig.open("web", "api")
    for name in ("web", "api", "web"):
        with rig.reader(name) as sock:
            assert whole(sock) == KEY
    rig.until(lambda: rig.sockets.open_connections == 0)
    assert rig.served[0].caller.pid == os.getpid()


def test_a_reader_that_sends_nothing_more_gets_it_too(rig: Rig) -> None:
    """As systemd does, which shuts its sending side at once."""
    rig.open("web")
    with rig.reader() as sock:
        sock.shutdown(socket.SHUT_WR)
        assert whole(sock) == KEY


@pytest.mark.parametrize("amount", [1, 150_000])
def test_a_reader_that_sent_something_gets_a_clean_end(rig: Rig, amount: int) -> None:
    rig.thread.call(rig.sockets.set_names, ["web"])
    with rig.reader() as sock:
        sock.sendall(b"x" * amount)
        rig.thread.call(rig.sockets.resume)
        assert whole(sock) == KEY


@pytest.mark.parametrize("size", [1, 4096, 300_000])
def test_keys_of_any_size_fit(rig: Rig, size: int) -> None:
    rig.secret.close()
    rig.secret = SecretBuffer.random(size)
    rig.open("web")
    with rig.reader() as sock:
        rig.until(lambda: rig.sockets.open_connections == 0 and len(rig.served) == 1)
        assert whole(sock) == bytes(rig.secret.view)  # it had not read a byte until now


def test_a_reader_that_goes_away_leaves_nothing(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    reader = Future[socket.socket]()  # the daemon may serve it before this thread has it

    def leave(connection: KeyConnection) -> None:
        reader.result(PATIENCE).close()
        connection.send_secret(rig.secret.view)

    rig.decide = leave
    rig.open("web")
    reader.set_result(rig.reader())
    rig.until(lambda: len(rig.served) == 1 and rig.sockets.open_connections == 0)
    assert caplog.records == []


# --- never an end without a key


@pytest.mark.promise(11)
@pytest.mark.parametrize("how", ["denied", "forgotten", "bug", "empty key", "does not fit"])
def test_who_gets_no_key_gets_no_end(rig: Rig, how: str, caplog: pytest.LogCaptureFixture) -> None:
    def decide(connection: KeyConnection) -> None:
        match how:
            case "denied":
                raise AccessDenied
            case "bug":
                raise ValueError("a text that must not be logged")
            case "empty key":
                connection.send_secret(rig.secret.view[:0])
            case "does not fit":
                connection.send_secret(memoryview(bytes(20_000_000)))

    rig.decide = decide
    with caplog.at_level(logging.DEBUG):
        rig.open("web")
        with rig.reader() as sock:
            rig.until(lambda: len(rig.served) == 1)
            if how == "does not fit":
                got = 0
                select.select([sock], [], [], PATIENCE)  # the first of it may take its time
                while select.select([sock], [], [], A_WHILE)[0]:
                    piece = sock.recv(1 << 20)
                    assert piece, "half a key must not look like a whole one"
                    got += len(piece)
                assert 0 < got < 20_000_000
            assert silent(sock)
            sock.shutdown(socket.SHUT_WR)  # is not yet giving up
            assert silent(sock)
            assert rig.sockets.open_connections == 1
        rig.until(lambda: rig.sockets.open_connections == 0)
    assert "must not be logged" not in caplog.text
    assert "key_reader_held key=web" in caplog.text
    # And the next one is served.
    rig.decide = rig.give
    with rig.reader() as sock:
        assert whole(sock) == KEY


@pytest.mark.promise(11)
def test_readers_wait_while_the_keys_are_locked(rig: Rig) -> None:
    rig.thread.call(rig.sockets.set_names, ["web"])
    with rig.reader() as first, rig.reader() as second:
        second.shutdown(socket.SHUT_WR)
        assert silent(first)
        assert silent(second)
        assert rig.served == []
        rig.thread.call(rig.sockets.resume)
        assert whole(first) == whole(second) == KEY
    rig.thread.call(rig.sockets.pause)
    with rig.reader() as third:
        assert silent(third)
        rig.thread.call(rig.sockets.resume)
        assert whole(third) == KEY


def test_a_lock_while_a_reader_is_being_served_makes_it_wait(rig: Rig) -> None:
    def lock(connection: KeyConnection) -> None:
        rig.sockets.pause()
        raise Locked

    rig.decide = lock
    rig.open("web")
    with rig.reader() as sock:
        rig.until(lambda: len(rig.served) == 1)
        assert silent(sock)
        rig.decide = rig.give
        rig.thread.call(rig.sockets.resume)
        assert whole(sock) == KEY


def test_an_unlock_in_the_same_moment_is_not_missed(rig: Rig) -> None:
    def lock_and_unlock(connection: KeyConnection) -> None:
        rig.decide = rig.give
        rig.sockets.pause()
        rig.sockets.resume()
        raise Locked

    rig.decide = lock_and_unlock
    rig.open("web")
    with rig.reader() as sock:
        assert whole(sock) == KEY


@pytest.mark.parametrize("when", ["before it is accepted", "while it is served"])
def test_a_caller_that_ended_leaves_its_child_no_key(rig: Rig, when: str) -> None:
    def end_and_give(connection: KeyConnection) -> None:
        os.close(life)
        os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)
        rig.give(connection)

    rig.decide = end_and_give
    rig.thread.call(rig.sockets.set_names, ["web"])
    heir = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
if os.fork():
    os.write(1, b"+")
    os.read(int(sys.argv[3]), 1)
    os._exit(0)
sock.settimeout(float(sys.argv[2]))
sys.stdin.read(1)
try:
    os.write(1, b"got %r" % sock.recv(100))
except TimeoutError:
    os.write(1, b"nothing")
"""
    end, life = os.pipe()
    arguments = [sys.executable, "-c", heir, str(rig.directory / "web"), str(A_WHILE), str(end)]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[end], bufsize=0
    ) as parent:
        os.close(end)
        assert parent.stdout is not None
        assert parent.stdout.read(1) == b"+"  # connected, and the child is there
        if when == "before it is accepted":
            os.close(life)
            assert parent.wait(PATIENCE) == 0
        rig.thread.call(rig.sockets.resume)
        rig.until(lambda: rig.sockets.open_connections == 1)
        assert parent.wait(PATIENCE) == 0
        assert parent.stdin is not None
        parent.stdin.write(b"x")
        parent.stdin.close()
        assert parent.stdout.read() == b"nothing"
    rig.until(lambda: rig.sockets.open_connections == 0)
    assert len(rig.served) == (when == "while it is served")


# --- when the daemon ends


@pytest.mark.promise(11)
@pytest.mark.parametrize("half_closed", [False, True])
def test_who_waits_is_reset_when_the_daemon_stops(rig: Rig, half_closed: bool) -> None:
    rig.thread.call(rig.sockets.set_names, ["web"])
    with rig.reader() as sock:
        if half_closed:
            sock.shutdown(socket.SHUT_WR)
        rig.thread.run(rig.sockets.close())
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    assert not (rig.directory / "web").exists()


DAEMON = """
import asyncio, sys
from pathlib import Path
from unsealerd.daemon.keysockets import KeySockets
async def main():
    sockets = KeySockets(Path(sys.argv[1]), None)
    sockets.set_names(["web"])
    print("ready", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.mark.promise(11)
def test_who_waits_is_reset_when_the_daemon_is_killed(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", DAEMON, str(tmp_path / "key")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == b"ready\n"
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(tmp_path / "key" / "web"))
            assert silent(sock)
            daemon.send_signal(signal.SIGKILL)
            with pytest.raises(ConnectionResetError):
                sock.recv(1)


def test_an_accepted_reader_that_sent_something_is_reset_as_well(rig: Rig) -> None:
    def deny(connection: KeyConnection) -> None:
        raise AccessDenied

    rig.decide = deny
    rig.open("web")
    with rig.reader() as sock:
        sock.sendall(b"\n")
        rig.until(lambda: len(rig.served) == 1)
        rig.thread.run(rig.sockets.close())
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


@pytest.mark.promise(11)
def test_a_kept_reader_outlives_the_daemon_and_is_served_by_the_next(rig: Rig) -> None:
    """What the service manager's descriptor store does, done by the test."""

    def deny(connection: KeyConnection) -> None:
        raise AccessDenied

    rig.thread.run(rig.sockets.close())
    rig.sockets = rig.make(keep=True)
    rig.decide = deny
    rig.open("web")
    with rig.reader() as sock:
        rig.until(lambda: len(rig.served) == 1)
        rig.thread.run(rig.sockets.close())
        assert silent(sock)
        [(name, kept)] = rig.kept
        rig.sockets = rig.make()
        rig.thread.call(rig.sockets.adopt, name, kept.dup())
        rig.decide = rig.give
        rig.open("web")
        assert whole(sock) == KEY  # although the store still has a copy
        # The store notices the end itself, and lets go (FDPOLL=1).
        hang_up = select.poll()
        hang_up.register(kept, 0)
        assert hang_up.poll(0)
    rig.until(lambda: rig.sockets.open_connections == 0)


# --- limits


@pytest.mark.promise(11)
def test_beyond_the_limit_readers_wait(rig: Rig) -> None:
    def deny(connection: KeyConnection) -> None:
        raise AccessDenied

    rig.thread.run(rig.sockets.close())
    rig.sockets = rig.make(KeyLimits(open=3))
    rig.decide = deny
    rig.open("web", "api")
    with ExitStack() as stack:
        held = [stack.enter_context(rig.reader()) for _ in range(3)]
        rig.until(lambda: len(rig.served) == 3)
        rig.decide = rig.give
        late = [stack.enter_context(rig.reader(name)) for name in ("web", "api")]
        assert all(silent(sock) for sock in (*held, *late))
        assert len(rig.served) == 3
        held[1].close()
        assert [whole(sock) for sock in late] == [KEY, KEY]
        assert silent(held[0])


def test_many_users_together_hold_no_more_than_their_part(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may make user namespaces has thousands of uids. Root is never let go: it reads for units."""

    def deny(connection: KeyConnection) -> None:
        raise AccessDenied

    uids = iter([1000, 1001, 1002, 0, 1003, 1004])
    of = Peer.of

    def claimed(sock: socket.socket, *, credentials: bool = False) -> Peer:
        peer = of(sock, credentials=credentials)
        peer.caller = msgspec.structs.replace(peer.caller, uid=next(uids))
        return peer

    monkeypatch.setattr(Peer, "of", claimed)
    rig.thread.run(rig.sockets.close())
    rig.sockets = rig.make(KeyLimits(held=2))
    rig.decide = deny
    rig.open("web")
    with ExitStack() as stack:

        def reader() -> socket.socket:
            before = len(rig.served)
            sock = stack.enter_context(rig.reader())
            rig.until(lambda: len(rig.served) == before + 1)
            return sock

        first, second = reader(), reader()
        assert reader().recv(1) == b""
        root = reader()
        assert all(silent(sock) for sock in (first, second, root))
        first.close()
        rig.until(lambda: rig.sockets.open_connections == 2)
        assert silent(reader())
        assert reader().recv(1) == b""


def test_held_readers_delay_nobody(rig: Rig) -> None:
    def deny(connection: KeyConnection) -> None:
        raise AccessDenied

    rig.decide = deny
    rig.open("web")
    with ExitStack() as stack:
        for _ in range(100):
            sock = stack.enter_context(rig.reader())
            sock.sendall(b"x" * 1000)
            sock.shutdown(socket.SHUT_WR)
        rig.until(lambda: len(rig.served) == 100)
        before = time_of(rig)
        rig.decide = rig.give
        for _ in range(20):
            with rig.reader() as sock:
                assert whole(sock) == KEY
        rig.until(lambda: rig.sockets.open_connections == 100)
        assert not select.select([], [], [], A_WHILE)[0]
        assert time_of(rig) - before < A_WHILE / 2 + 0.1, "nothing spins on what they sent"
    rig.until(lambda: rig.sockets.open_connections == 0)


def time_of(rig: Rig) -> float:
    """CPU seconds of the thread that serves."""
    import time

    return rig.thread.call(time.thread_time)


def test_running_out_of_descriptors_makes_readers_wait(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.thread.run(rig.sockets.close())
    rig.sockets = rig.make(KeyLimits(retry_seconds=0.05))
    shortage = [True, True, True]
    real = Peer.of

    def sometimes(sock: socket.socket, *, credentials: bool = False) -> Peer:
        if shortage:
            shortage.pop()
            raise OSError(errno.EMFILE, "too many open files")
        return real(sock, credentials=credentials)

    monkeypatch.setattr(Peer, "of", sometimes)
    rig.open("web")
    with rig.reader() as first, rig.reader() as second:
        assert whole(first) == whole(second) == KEY
    assert shortage == []


def test_no_descriptor_is_left_behind(rig: Rig) -> None:
    rig.open("web")
    with rig.reader() as sock:
        whole(sock)
    rig.until(lambda: rig.sockets.open_connections == 0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(40):
        with rig.reader() as sock:
            whole(sock)
        rig.until(lambda: rig.sockets.open_connections == 0)
    # Not one for each; other threads of this process have descriptors of their own.
    assert len(os.listdir("/proc/self/fd")) < before + 20


# --- names and files


def test_names_come_and_go(rig: Rig) -> None:
    rig.directory.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(rig.directory / "stale"))
    (rig.directory / "note").write_text("not a socket")
    before = os.umask(0o077)
    try:
        rig.open("web", "api")
    finally:
        os.umask(before)
    assert stat.S_IMODE(rig.directory.stat().st_mode) == 0o755
    assert stat.S_IMODE((rig.directory / "web").stat().st_mode) == 0o666
    assert {found.name for found in rig.directory.iterdir()} == {"web", "api", "note"}
    assert rig.sockets.names == {"web", "api"}
    inode = (rig.directory / "web").stat().st_ino
    rig.thread.call(rig.sockets.set_names, ["web", "new"])
    assert {found.name for found in rig.directory.iterdir()} == {"web", "new", "note"}
    assert (rig.directory / "web").stat().st_ino == inode
    for name in ("web", "new"):
        with rig.reader(name) as sock:
            assert whole(sock) == KEY
    rig.thread.call(rig.sockets.pause)
    with rig.reader("new") as sock:
        rig.thread.call(rig.sockets.set_names, ["web"])
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_a_directory_that_cannot_be_had_is_named(rig: Rig) -> None:
    rig.directory.write_text("a file")
    with pytest.raises(StorageFailed):
        rig.thread.call(rig.sockets.set_names, ["web"])


def test_systemd_reads_for_a_unit(rig: Rig) -> None:
    """As systemd.exec(5) describes it; believed from root only."""
    rig.open("web")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.bind(b"\0%x/unit/web.service/session-key" % secrets.randbits(64))
        sock.connect(str(rig.directory / "web"))
        sock.shutdown(socket.SHUT_WR)
        assert whole(sock) == KEY
    [peer] = rig.served
    assert peer.caller.via_systemd is (os.getuid() == 0)
    if os.getuid() == 0:
        assert (peer.caller.unit, peer.credential) == ("web.service", "session-key")
