"""Giving authority up needs no permission: an audit log that cannot be written stops neither `lock` nor `disarm`."""

import contextlib
import os
import resource
import subprocess
import threading
from collections.abc import Iterator

import pytest
from rigs.manager import ServiceManager
from rigs.server import PROGRAMS, Server, wait_for
from rigs.tpmproxy import Command, TpmProxy

_ENOUGH = 16 << 10  # bytes: more than any other file of the daemon has, and whole pages


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server, ServiceManager(server.base) as manager:
        server.manager = manager
        server.start()
        server.ctl("init")
        yield server


def audit_bytes(server: Server) -> int:
    return (server.state / "audit.jsonl").stat().st_size


@contextlib.contextmanager
def full(server: Server, limit: int) -> Iterator[None]:
    """No file of the daemon grows beyond the limit, in bytes, as if the disk were full."""
    soft, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        if server.alive:
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def full_audit_log(server: Server) -> Iterator[None]:
    """The audit log cannot grow, everything else can be written."""
    while audit_bytes(server) < _ENOUGH:
        server.key()
    with full(server, audit_bytes(server)):
        yield


@pytest.mark.promise(1)
def test_lock_locks_on_a_full_disk(server: Server) -> None:
    with full(server, 0):
        server.ctl("lock")
        server.assert_locked("locked_by_admin")
        assert server.ctl("get", "demo", expect=None).returncode != 0
        assert server.manager is not None
        server.manager.settle()
        assert [name for name in server.manager.names() if name.startswith("memory-")] == []
        # What takes authority still needs the log.
        assert server.unlock(expect=None).returncode != 0
        server.assert_locked("locked_by_admin")
    server.unlock()
    server.ctl("audit")


@pytest.mark.promise(1)
def test_lock_and_its_sealed_copy_without_an_audit_log(server: Server) -> None:
    server.ctl("arm", "--for", "1h")
    with full_audit_log(server):
        server.ctl("lock")
        server.assert_locked("locked_by_admin")
        assert not (server.state / "sealed.json").exists()
        assert "audit: lock could not be recorded" in server.log_text()


@pytest.mark.promise(3)
def test_disarm_destroys_without_an_audit_log(server: Server) -> None:
    server.ctl("arm", "--for", "1h")
    with full_audit_log(server):
        server.ctl("disarm")
        assert not (server.state / "sealed.json").exists()
        assert "audit: disarm could not be recorded" in server.log_text()
    # On a full disk the counter cannot be moved along; the copy on it is gone, and that it is not all is said.
    server.ctl("arm", "--for", "1h")
    with full(server, 0):
        assert server.ctl("disarm", expect=None).returncode != 0
        assert not (server.state / "sealed.json").exists()


@pytest.mark.promise(3)
def test_a_lease_ends_without_an_audit_log(server: Server) -> None:
    while audit_bytes(server) < _ENOUGH:
        server.key()

    def recorded() -> int:
        return server.events().count("lease_expired")

    for lease in ("3s", "30s", "300s"):
        before = recorded()
        server.ctl("arm", "--for", lease)
        with full(server, audit_bytes(server)):
            if recorded() != before:
                continue  # it ended while there still was room
            wait_for(lambda: not (server.state / "sealed.json").exists(), "the end of the lease", 360)
        break
    assert recorded() == before


@contextlib.contextmanager
def hanging_tpm(server: Server, *before: str) -> Iterator[threading.Event]:
    """From now on the TPM gets the command that moves the counter, and never answers; the event says that it got it.

    ``before``: an unsealctl command for the moment before.
    """
    assert server.tpm is not None
    server.stop()
    configured = server.config.read_text()
    hung, over = threading.Event(), threading.Event()

    def hang(_: bytes) -> bytes:
        hung.set()
        over.wait()
        return b""

    with TpmProxy(server.tpm) as proxy:
        server.configure(configured.replace(server.tpm.tcti, proxy.tcti))
        server.start()
        server.assert_unlocked()
        if before:
            server.ctl(*before)
        proxy.replace(Command.NV_INCREMENT, hang, times=None)
        try:
            yield hung
        finally:
            over.set()
            server.kill()
            server.ended()
            server.configure(configured)


def in_hand(server: Server, *arguments: str) -> subprocess.Popen[bytes]:
    """A command that is not waited for."""
    return subprocess.Popen(
        [PROGRAMS / "unsealctl", "--config", server.config, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.promise(1)
def test_lock_locks_while_a_change_hangs_in_the_tpm(server: Server) -> None:
    """The keyring is in use, and cannot be wiped: so the daemon ends, and nothing brings the keys back."""
    with hanging_tpm(server) as hung, in_hand(server, "key", "rotate", "demo"):
        assert hung.wait(60)
        asked = server.ctl("lock", expect=None)
        assert asked.returncode != 0
        assert server.ended() == os.EX_SOFTWARE
        assert server.manager is not None
        server.manager.settle()
        assert [name for name in server.manager.names() if name.startswith("memory-")] == []
    server.start()
    assert server.status()["state"] == "locked"
    server.unlock()


@pytest.mark.promise(1)
def test_a_daemon_that_is_killed_while_it_locks_comes_back_locked(server: Server) -> None:
    # It waits for the TPM, which is to make the sealed copy void.
    with hanging_tpm(server, "arm", "--for", "1h") as hung, in_hand(server, "lock"):
        assert hung.wait(60)
        assert "lock" in server.events()
        server.kill()
    server.start()
    assert server.status()["state"] == "locked"
    server.unlock()
