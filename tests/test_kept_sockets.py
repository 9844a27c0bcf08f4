"""Who waits for a key does not notice that the daemon was restarted: no end without data, no lost place in the queue."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from rigs.manager import ServiceManager
from rigs.server import PATIENCE, PROGRAMS, Server, wait_for

from unsealerd import notify
from unsealerd.client import Client
from unsealerd.daemon.fdstore import FdStore
from unsealerd.daemon.keptsockets import KeptSockets
from unsealerd.daemon.listener import Listener

pytestmark = pytest.mark.promise(11)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(tpm=False, keys=("demo", "other")) as server, ServiceManager(server.base) as manager:
        server.manager = manager
        server.start()
        server.ctl("init")
        yield server


def manager_of(server: Server) -> ServiceManager:
    assert server.manager is not None
    server.manager.settle()
    return server.manager


def kept_readers(server: Server) -> list[str]:
    return [name for name in manager_of(server).names() if name.startswith("reader.")]


def reader(server: Server, name: str = "demo", kind: str = "key") -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    sock.connect(os.fspath(server.run_dir / kind / name))
    return sock


def silent(sock: socket.socket) -> bool:
    sock.settimeout(0.3)
    try:
        sock.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(PATIENCE)
    return False


def whole(sock: socket.socket) -> bytes:
    found = b""
    while piece := sock.recv(4096):
        found += piece
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_who_waits_while_locked_goes_on_waiting_over_a_restart(
    server: Server, number: signal.Signals
) -> None:
    key = server.key()
    server.ctl("lock")
    with reader(server) as first, reader(server, kind="keyset") as second:
        server.stop(number)
        with reader(server) as between:  # nobody runs, and it does not matter
            server.start()
            server.assert_locked("locked_by_admin")
            assert all(silent(sock) for sock in (first, second, between))
            server.unlock()
            assert whole(first) == whole(between) == key
            assert whole(second) == f"1 {key.hex()}\n".encode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_who_was_denied_reads_no_end_when_the_daemon_is_restarted(
    server: Server, number: signal.Signals
) -> None:
    server.configure(server.config.read_text().replace(f'user = "{os.getuid()}"', 'user = "65533"'))
    server.send(signal.SIGHUP)
    wait_for(lambda: "reloaded" in server.log_text(), "the reload")
    with reader(server) as sock:
        wait_for(lambda: "denied" in server.events(), "the denial")
        wait_for(lambda: kept_readers(server) != [], "the reader being handed over")
        server.stop(number)
        assert silent(sock)
        server.start()
        assert silent(sock)
        wait_for(lambda: server.events().count("denied") >= 2, "it being asked for again")
        # Now it may.
        server.configure()
        server.stop(number)
        server.start()
        assert whole(sock) == server.key()
    assert kept_readers(server) == []


def test_the_keys_socket_does_not_go_away(server: Server) -> None:
    """A call that comes between two daemons is answered by the second."""
    server.stop(signal.SIGKILL)
    with Client(server.run_dir, timeout=PATIENCE) as client:
        asked = subprocess.Popen(
            [PROGRAMS / "unsealctl", "--config", server.config, "status", "--json"], stdout=subprocess.PIPE
        )
        server.start()
        assert client.sign("demo", b"message").version == 1
        out, _ = asked.communicate(timeout=PATIENCE)
        assert asked.returncode == 0
        assert b'"unlocked"' in out


def test_a_key_that_is_gone_takes_its_socket_along(server: Server) -> None:
    del server.keys["other"]
    server.configure()
    server.stop()
    server.start()
    assert not [name for name in manager_of(server).names() if "other" in name]
    assert not (server.run_dir / "key" / "other").exists()
    assert server.key("demo")


def test_a_file_that_was_replaced_is_not_taken_for_the_socket(server: Server) -> None:
    """Who waits at the old one is served all the same."""
    key = server.key()
    server.ctl("lock")
    path = server.run_dir / "key" / "demo"
    with reader(server) as waits:
        server.stop()
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(os.fspath(path))
            server.start()
        server.unlock()
        assert whole(waits) == key
        with reader(server) as sock:
            assert whole(sock) == key


def test_the_number_of_kept_readers_is_bounded(tmp_path: Path) -> None:
    with ServiceManager(tmp_path, most=1000) as manager, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOTIFY_SOCKET", manager.environment["NOTIFY_SOCKET"])
        # The queue to it is short, and the thread that empties it is of this process.
        patient = {**(notify.notify.__kwdefaults__ or {}), "patience": PATIENCE}
        patch.setattr(notify.notify, "__kwdefaults__", patient)
        kept = KeptSockets(FdStore(available=True))
        listener = kept.listener("key/demo", tmp_path / "demo", 0o600)
        ends: list[socket.socket] = []
        for _ in range(300):
            ours, theirs = socket.socketpair()
            ends += [ours, theirs]
            kept.keep("key/demo", ours)
        manager.settle()
        stored = [name for name in manager.names() if name.startswith("reader.")]
        assert len(stored) == (256 if os.getuid() == 0 else 16)
        for sock in ends:
            sock.close()
        assert [name for name in manager.names() if name.startswith("reader.")] == []
        kept.close("key/demo", listener, ends=False)
        manager.settle()
        assert manager.names() == []


def test_a_small_store_is_left_to_the_keys(tmp_path: Path) -> None:
    with ServiceManager(tmp_path) as manager, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOTIFY_SOCKET", manager.environment["NOTIFY_SOCKET"])
        kept = KeptSockets(FdStore(available=True, room=18))
        listeners = {f"key/k{n}": kept.listener(f"key/k{n}", tmp_path / f"k{n}", 0o600) for n in range(4)}
        manager.settle()
        assert len(manager.names()) == 2
        for label, listener in listeners.items():
            kept.close(label, listener, ends=False)


def test_without_a_store_the_file_goes_away_with_the_process(tmp_path: Path) -> None:
    kept = KeptSockets(FdStore())
    listener = kept.listener("keys", tmp_path / "keys", 0o600)
    assert isinstance(listener, Listener)
    kept.close("keys", listener, ends=True)
    assert not (tmp_path / "keys").exists()
