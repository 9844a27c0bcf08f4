"""Giving authority up needs no permission: an audit log that cannot be written stops neither `lock` nor `disarm`."""

import contextlib
import resource
from collections.abc import Iterator

import pytest
from rigs.manager import ServiceManager
from rigs.server import Server, wait_for

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
    server.ctl("arm", "--for", "3s")
    with full(server, audit_bytes(server)):
        wait_for(lambda: not (server.state / "sealed.json").exists(), "the end of the lease")
    assert "lease_expired" not in server.events()
