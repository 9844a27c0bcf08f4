"""A restart of the daemon is not a reboot: the keyring's memory outlives it, and is taken back only if it is the one on disk."""

import contextlib
import fcntl
import hashlib
import mmap
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rigs.forger import before_lineages, without_lineage
from rigs.manager import ServiceManager
from rigs.memory import copies
from rigs.server import Server, wait_for
from rigs.tpmproxy import Command, TpmProxy

from unsealerd.core import secret
from unsealerd.core.keyring import Key, Metadata, Version, compose
from unsealerd.core.secret import SecretBuffer, SecretMemoryKind
from unsealerd.core.sharedsecret import SharedSecret
from unsealerd.daemon.fdstore import FdStore, Received
from unsealerd.daemon.keptmemory import KeptMemory, has_swap
from unsealerd.errors import KeyringInvalid, SealRefused
from unsealerd.model import LockReason, VersionState


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server, ServiceManager(server.base) as manager:
        server.manager = manager
        server.start()
        server.ctl("init")
        yield server


@pytest.fixture
def plain() -> Iterator[Server]:
    """Without a TPM."""
    with Server(tpm=False) as server, ServiceManager(server.base) as manager:
        server.manager = manager
        server.start()
        server.ctl("init")
        yield server


def manager_of(server: Server) -> ServiceManager:
    assert server.manager is not None
    server.manager.settle()
    return server.manager


def images(server: Server) -> list[str]:
    return [name for name in manager_of(server).names() if name.startswith("memory-")]


def digest(server: Server) -> str:
    return hashlib.sha256((server.state / "keyring.age").read_bytes()).hexdigest()


def content(fd: int) -> bytes:
    """What another process sees through the descriptor."""
    with mmap.mmap(fd, os.fstat(fd).st_size) as mapping:
        return bytes(mapping)


# --- restarts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGABRT])
def test_a_restart_ends_unlocked_without_an_operator(server: Server, number: signal.Signals) -> None:
    server.ctl("key", "rotate", "demo")
    key = server.key()
    server.stop(number)
    server.start()
    server.assert_unlocked()
    assert server.key() == key
    assert server.status()["memory"] == {"kept": True, "why": None}
    assert server.events().count("restored") == 1
    wait_for(lambda: images(server) == [f"memory-{digest(server)}"], "one image, of the backup on disk")


def test_the_tpm_gives_nothing_and_no_sealed_copy_is_there(server: Server) -> None:
    """A restart needs the counter, and nothing else of the TPM."""
    key = server.key()
    server.stop()
    assert server.tpm is not None
    with TpmProxy(server.tpm) as proxy:
        server.configure(server.config.read_text().replace(server.tpm.tcti, proxy.tcti))
        server.start()
        server.assert_unlocked()
        assert server.key() == key
        assert proxy.codes
        assert not {Command.UNSEAL, Command.LOAD} & set(proxy.codes)


def test_many_restarts_in_a_row(plain: Server) -> None:
    key = plain.key()
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        plain.stop(number)
        plain.start()
        assert plain.key() == key
    wait_for(lambda: len(images(plain)) == 1, "one image")


def test_rotations_that_fell_due_meanwhile_are_done_and_told(plain: Server) -> None:
    plain.stop()
    plain.keys["demo"] = 'rotate_every = "1s"\noverlap = "1s"'
    plain.configure()
    plain.start()
    wait_for(lambda: "key_rotated" in plain.events(), "the rotation")


def test_a_stop_is_remembered_as_one(server: Server) -> None:
    """systemd empties the store when the unit is stopped for good."""
    server.stop()
    manager_of(server).empty()
    server.start()
    server.assert_locked("daemon_stopped")
    server.unlock()
    server.kill()
    server.ended()
    manager_of(server).empty()
    server.start()
    server.assert_locked("unexpected_reboot")  # killed, not stopped


def test_without_a_service_manager_nothing_is_kept_and_status_says_so() -> None:
    with Server(tpm=False) as server:
        server.start()
        server.ctl("init")
        assert server.status()["memory"] == {"kept": False, "why": "no service manager that would keep it"}


def test_a_service_manager_that_keeps_nothing(plain: Server) -> None:
    manager_of(plain).empty()
    manager_of(plain).deaf = True
    plain.ctl("key", "rotate", "demo")
    plain.kill()
    plain.ended()
    plain.start()
    plain.assert_locked("unexpected_reboot")
    plain.unlock()


@pytest.mark.promise(6)
def test_an_upgrade_finds_a_keyring_without_a_lineage_and_gives_it_one(plain: Server) -> None:
    """The daemon before wrote version 1 of the format. Nothing is pinned then."""
    key = plain.key()
    [fd] = manager_of(plain).copies()
    magic, boot_id, _, keyring = content(fd).split(b"\n", 3)
    os.close(fd)
    plain.stop(signal.SIGKILL)
    manager_of(plain).empty("memory-")
    before_lineages(plain)
    (plain.base / "keyring.id").unlink()
    image = b"\n".join((magic, boot_id, digest(plain).encode(), without_lineage(keyring)))
    manager_of(plain).put(f"memory-{digest(plain)}", _forge(image))
    plain.start()
    plain.assert_unlocked()
    assert plain.key() == key
    wait_for(lambda: plain.status()["keyring"]["id"] is not None, "the lineage")
    manager_of(plain).settle()
    plain.ctl("backup", "pin")
    plain.stop(signal.SIGKILL)
    plain.start()
    plain.assert_unlocked()
    assert plain.key() == key


# --- lock, revoke, end


@pytest.mark.promise(1)
def test_lock_zeroes_what_is_stored(plain: Server) -> None:
    key = plain.key()
    [fd] = manager_of(plain).copies()
    with contextlib.closing(os.fdopen(fd, "r+b", buffering=0)):
        assert key in content(fd)
        plain.ctl("lock")
        assert content(fd).strip(b"\0") == b""
    assert images(plain) == []
    assert plain.status()["memory"]["kept"] is False
    plain.stop(signal.SIGKILL)
    plain.start()
    plain.assert_locked("locked_by_admin")


@pytest.mark.promise(1)
def test_a_revoked_version_is_in_no_stored_memory(plain: Server) -> None:
    key = plain.key()
    [fd] = manager_of(plain).copies()
    with contextlib.closing(os.fdopen(fd, "r+b", buffering=0)):
        plain.ctl("key", "revoke", "demo", "--version", "1")
        assert content(fd).strip(b"\0") == b""
    [after] = manager_of(plain).copies()
    with contextlib.closing(os.fdopen(after, "r+b", buffering=0)):
        assert plain.key() in content(after)
        assert key not in content(after)


@pytest.mark.promise(1)
def test_no_copy_is_in_ordinary_memory(server: Server) -> None:
    key = server.key()
    assert copies(server.pid, key) == []
    server.stop(signal.SIGKILL)
    server.start()
    assert server.key() == key
    server.ctl("key", "rotate", "demo")
    assert copies(server.pid, key) == []
    server.ctl("lock")
    assert copies(server.pid, key) == []


# --- what is refused


@pytest.mark.promise(9)
def test_an_older_backup_put_back_while_it_is_stopped(server: Server) -> None:
    old = (server.state / "keyring.age").read_bytes()
    server.ctl("key", "rotate", "demo")
    server.stop(signal.SIGKILL)
    fds = manager_of(server).copies()
    (server.state / "keyring.age").write_bytes(old)
    server.start()
    server.assert_locked("memory_refused")
    for fd in fds:
        assert content(fd).strip(b"\0") == b""
        os.close(fd)
    assert server.unlock(expect=None).returncode == 15
    server.assert_locked("rollback")


@pytest.mark.promise(9)
def test_an_older_backup_together_with_its_own_memory(server: Server) -> None:
    """Somebody kept the memory of then, too: the counter tells."""
    old = (server.state / "keyring.age").read_bytes()
    [then] = manager_of(server).copies()
    copy = os.memfd_create("copy", os.MFD_ALLOW_SEALING)
    os.write(copy, content(then))
    os.close(then)
    fcntl.fcntl(copy, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    server.ctl("key", "rotate", "demo")
    server.stop(signal.SIGKILL)
    manager_of(server).empty("memory-")
    (server.state / "keyring.age").write_bytes(old)
    manager_of(server).put(f"memory-{hashlib.sha256(old).hexdigest()}", copy)
    [fd] = manager_of(server).copies()
    server.start()
    server.assert_locked("rollback")
    assert images(server) == []
    assert content(fd).strip(b"\0") == b""
    os.close(fd)


def _forge(data: bytes, *, seal: bool = True) -> int:
    fd = os.memfd_create("forged", os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    if seal:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


BACKUP = b"a backup"
BOOT_ID = "01234567-89ab-4cde-8f01-23456789abcd"
KEY_BYTES = bytes(range(1, 33))


def _image(boot_id: str = BOOT_ID) -> bytes:
    """As the daemon makes it, for `BACKUP`."""
    key = Key("demo", "o", "p", (Version(1, VersionState.PRIMARY, 32, 0, None, None),))
    keyring = compose(Metadata(1, 0, None, (key,)), None, [memoryview(KEY_BYTES)])
    head = f"unsealerd-memory-v1\n{boot_id}\n{hashlib.sha256(BACKUP).hexdigest()}\n"
    with keyring.buffer as buffer:
        return head.encode() + bytes(buffer.view)


def _kept(fd: int, name: str = f"memory-{hashlib.sha256(BACKUP).hexdigest()}") -> KeptMemory:
    return KeptMemory(FdStore(), [Received(name, fd)], lambda: BACKUP, lambda: BOOT_ID)


def test_an_image_is_taken_and_its_head_is_what_is_documented() -> None:
    keyring, backup = _kept(_forge(_image())).restore()
    assert bytes(keyring.view("demo", 1)) == KEY_BYTES
    assert backup == BACKUP
    keyring.close()


Forgery = Callable[[Path], int]
FORGERIES: dict[str, Forgery] = {
    "another boot": lambda _: _forge(_image(BOOT_ID.replace("0", "9"))),
    "no boot": lambda _: _forge(_image("x" * 36)),
    "cut off": lambda _: _forge(_image()[:-1]),
    "longer": lambda _: _forge(_image() + b"\0"),
    "head only": lambda _: _forge(_image()[:122]),
    "less than a head": lambda _: _forge(_image()[:50]),
    "zeroed keys": lambda _: _forge(_image()[:-32] + bytes(32)),
    "garbage": lambda _: _forge(_image()[:122] + os.urandom(300)),
    "another version": lambda _: _forge(_image().replace(b"memory-v1", b"memory-v2")),
    "another backup": lambda _: _forge(
        _image().replace(hashlib.sha256(BACKUP).hexdigest().encode(), b"0" * 64)
    ),
    "one that can shrink": lambda _: _forge(_image(), seal=False),
    "one that cannot be written": lambda _: _read_only(_image()),
    "empty": lambda _: _forge(b""),
    "a pipe": lambda _: os.pipe()[0],
    "a file": lambda place: os.open(place / "file", os.O_RDWR | os.O_CREAT),
    "a directory": lambda place: os.open(place, os.O_RDONLY),
    "a socket": lambda _: socket.socket().detach(),
    "the null device": lambda _: os.open("/dev/null", os.O_RDWR),
}


def _read_only(data: bytes) -> int:
    fd = _forge(data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    return fd


@pytest.mark.promise(10)
@pytest.mark.parametrize("what", FORGERIES)
def test_a_descriptor_that_is_not_ours_is_refused_by_name(what: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(_image())
    kept = _kept(FORGERIES[what](tmp_path))
    assert kept.found
    with pytest.raises(SealRefused) as refused:
        kept.restore()
    assert refused.value.reason is LockReason.MEMORY_REFUSED
    assert refused.value.detail
    assert not kept.found


def test_one_that_was_wiped_is_none_at_all() -> None:
    """Killed between the wipe and the word to the service manager: the lock reason of then stands."""
    assert not _kept(_forge(bytes(400))).found


@pytest.mark.promise(10)
def test_a_store_full_of_other_things(plain: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(_image())
    plain.stop(signal.SIGKILL)
    manager_of(plain).empty("memory-")
    for number, forge in enumerate(FORGERIES.values()):
        manager_of(plain).put(f"memory-{number}", forge(tmp_path))
        manager_of(plain).put(f"listen.1.{number}.key/demo", forge(tmp_path))
        manager_of(plain).put(f"reader.{number}.key/demo", forge(tmp_path))
        manager_of(plain).put(f"unknown{number}", forge(tmp_path))
    plain.start()
    plain.assert_locked("memory_refused")
    left = manager_of(plain).names()
    assert [name for name in left if name.startswith(("memory-", "unknown", "reader.", "listen.1."))] == []
    plain.unlock()
    assert len(plain.key()) == 32


@pytest.mark.promise(10)
def test_a_huge_one_and_two_of_one_name(plain: Server) -> None:
    plain.stop(signal.SIGKILL)
    [fd] = manager_of(plain).copies()
    manager_of(plain).put(f"memory-{digest(plain)}", fd)
    huge = os.memfd_create("huge", os.MFD_ALLOW_SEALING)
    os.ftruncate(huge, 1 << 40)
    manager_of(plain).put("memory-huge", huge)
    plain.start()
    plain.assert_locked("memory_refused")
    assert "one name" in plain.status()["lock_detail"]
    assert images(plain) == []


@pytest.mark.promise(10)
def test_two_of_one_name_are_wiped() -> None:
    """Whoever else holds them finds nothing."""
    name = f"memory-{hashlib.sha256(BACKUP).hexdigest()}"
    fds = [_forge(_image()), _forge(_image())]
    kept = KeptMemory(FdStore(), [Received(name, os.dup(fd)) for fd in fds], lambda: BACKUP, lambda: BOOT_ID)
    for fd in fds:
        assert content(fd).strip(b"\0") == b""
        os.close(fd)
    with pytest.raises(SealRefused, match="one name"):
        kept.restore()


def test_the_right_one_is_found_among_others(plain: Server) -> None:
    key = plain.key()
    plain.stop(signal.SIGKILL)
    [fd] = manager_of(plain).copies()
    image = content(fd)
    os.close(fd)
    other = hashlib.sha256(b"another").hexdigest()
    stranger = _forge(image.replace(digest(plain).encode(), other.encode()))
    kept = os.dup(stranger)
    manager_of(plain).put(f"memory-{other}", stranger)
    manager_of(plain).put("memory-garbage", _forge(os.urandom(4096)))
    plain.start()
    plain.assert_unlocked()
    assert plain.key() == key
    with contextlib.closing(os.fdopen(kept, "r+b", buffering=0)):
        assert content(kept).strip(b"\0") == b""
    wait_for(lambda: images(plain) == [f"memory-{digest(plain)}"], "one image")


def test_a_reset_of_variables_that_belong_to_another_process(plain: Server) -> None:
    """LISTEN_PID names another: nothing is taken (sd_listen_fds(3))."""
    plain.stop(signal.SIGKILL)
    plain.manager = None
    plain.extra_environment.update(LISTEN_PID="1", LISTEN_FDS="3", LISTEN_FDNAMES="memory-x:a:b")
    plain.start()
    plain.assert_locked("unexpected_reboot")


# --- the TPM, the disk and the audit log


def test_a_tpm_that_does_not_answer_keeps_it_locked_until_it_does(server: Server) -> None:
    key = server.key()
    server.stop()
    assert server.tpm is not None
    server.configure(server.config.read_text().replace(server.tpm.tcti, f"swtpm:path={server.base}/none"))
    server.start()
    server.assert_locked("tpm_missing")
    assert server.ctl("get", "demo", expect=None).returncode == 3
    server.stop()
    server.configure()
    server.start()
    server.assert_unlocked()
    assert server.key() == key


def test_a_host_that_waits_for_its_tpm_can_still_be_wiped(server: Server) -> None:
    server.stop()
    [fd] = manager_of(server).copies()
    assert server.tpm is not None
    server.configure(server.config.read_text().replace(server.tpm.tcti, f"swtpm:path={server.base}/none"))
    server.start()
    server.ctl("lock")
    server.assert_locked("locked_by_admin")
    assert images(server) == []
    assert content(fd).strip(b"\0") == b""
    os.close(fd)


def test_no_audit_no_restore(plain: Server) -> None:
    plain.stop()
    log = plain.state / "audit.jsonl"
    saved = log.read_bytes()
    log.write_bytes(saved + b"{damaged}\n")
    plain.start()
    plain.assert_locked("storage_failed")
    plain.stop()
    log.write_bytes(saved)
    plain.start()
    plain.assert_unlocked()


def test_a_backup_that_is_gone_wipes_the_memory(plain: Server) -> None:
    plain.stop()
    fds = manager_of(plain).copies()
    saved = (plain.state / "keyring.age").read_bytes()
    (plain.state / "keyring.age").unlink()
    (plain.state / "keyring.age.previous").unlink(missing_ok=True)
    plain.start()
    plain.assert_locked("backup_damaged")
    assert images(plain) == []
    for fd in fds:
        assert content(fd).strip(b"\0") == b""
        os.close(fd)
    (plain.state / "keyring.age").write_bytes(saved)
    plain.unlock()


@pytest.mark.promise(3)
def test_a_refused_unseal_leaves_nothing_to_restore(server: Server) -> None:
    """The backup is written, and the counter is not: what the unseal opened is given up, and not found by a restart."""
    server.ctl("seal")
    server.stop()
    manager_of(server).empty()
    server.reset_tpm()
    assert server.tpm is not None
    server.tpm.start()
    with TpmProxy(server.tpm) as proxy:
        server.configure(server.config.read_text().replace(server.tpm.tcti, proxy.tcti))
        proxy.answer(Command.NV_INCREMENT, 0x101, times=None)
        server.start()
        server.assert_locked("tpm_failed")
        assert images(server) == []
        proxy.clear()
        server.stop(signal.SIGKILL)
        server.start()
        assert server.status()["state"] == "locked"


# --- the sealed copy and a restart


def test_a_lease_goes_on_over_a_restart(server: Server) -> None:
    server.ctl("arm", "--for", "1h")
    deadline = server.status()["seal"]["deadline"]
    server.stop()
    server.start()
    server.assert_unlocked()
    wait_for(lambda: server.status()["generation"] > 2, "the backup being written anew")
    seal = server.status()["seal"]
    assert (seal["sealed"], seal["deadline"]) == (True, deadline)
    key = server.key()
    server.stop()
    manager_of(server).empty()
    server.reset_tpm()
    server.start()
    server.assert_unlocked()
    assert server.key() == key


@pytest.mark.promise(3)
def test_a_seal_for_a_reboot_that_did_not_happen_is_destroyed(server: Server) -> None:
    server.ctl("seal")
    image = server.base / "image"
    server.stop()
    shutil.copytree(server.state, image)
    server.start()
    server.assert_unlocked()
    wait_for(lambda: not (server.state / "sealed.json").exists(), "the end of the sealed copy")
    wait_for(lambda: "sealed_copy_destroyed" in server.events(), "the counter")
    assert "seal_cancelled" in server.events()
    # And a copy of the disk of then opens nothing on the next boot.
    server.stop()
    manager_of(server).empty()
    shutil.rmtree(server.state)
    shutil.copytree(image, server.state)
    server.reset_tpm()
    server.start()
    server.assert_locked("sealed_copy_used")


# --- the parts


def test_what_a_shared_secret_is_made_of() -> None:
    with SharedSecret(100) as made:
        made.view[:] = b"k" * 100
        again = SharedSecret.received(os.dup(made.fd), 4096)
        assert (len(again), bytes(again.view), again.kind) == (100, b"k" * 100, made.kind)
        again.leave()
        assert bytes(made.view) == b"k" * 100
        again = SharedSecret.received(os.dup(made.fd), 4096)
        again.close()
        assert bytes(made.view) == bytes(100)


def test_without_memfd_secret_the_size_is_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret, "memfd_secret", lambda: None)
    with SharedSecret(5000) as made:
        assert made.kind is SecretMemoryKind.MLOCK
        for size in (0, 4096, 10000):
            with pytest.raises(PermissionError):
                os.ftruncate(made.fd, size)
        made.view[:3] = b"abc"
        again = SharedSecret.received(os.dup(made.fd), 5000)
        assert bytes(again.view[:3]) == b"abc"
        again.leave()
        with pytest.raises(KeyringInvalid):
            SharedSecret.received(os.dup(made.fd), 4999)


def test_a_broken_process_does_not_wipe_what_is_stored() -> None:
    made = SharedSecret(10)
    made.view[:] = b"0123456789"
    fd = os.dup(made.fd)
    del made
    with SharedSecret.received(fd, 10) as again:
        assert bytes(again.view) == b"0123456789"


def test_swap_is_read_from_the_kernels_list(tmp_path: Path) -> None:
    swaps = tmp_path / "swaps"
    assert has_swap(swaps)  # in doubt
    swaps.write_text("Filename\tType\tSize\tUsed\tPriority\n")
    assert not has_swap(swaps)
    swaps.write_text("Filename\tType\n/dev/zram0 partition 1 0 100\n")
    assert has_swap(swaps)


@pytest.mark.parametrize("swap", [False, True])
def test_the_fallback_is_kept_only_without_swap(swap: bool) -> None:
    with Server(tpm=False) as server, ServiceManager(server.base) as manager:
        swaps = server.base / "swaps"
        swaps.write_text("Filename Type\n" + ("/swapfile file 1 0 -2\n" if swap else ""))
        site = server.base / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(
            "import pathlib\n"
            "import unsealerd.core.secret as secret\n"
            "import unsealerd.daemon.keptmemory as keptmemory\n"
            "secret.memfd_secret = lambda: None\n"
            f"keptmemory.has_swap.__defaults__ = (pathlib.Path({str(swaps)!r}),)\n"
        )
        server.extra_environment["PYTHONPATH"] = os.pathsep.join([str(site), *sys.path])
        server.manager = manager
        server.start()
        server.ctl("init")
        memory = server.status()["memory"]
        assert memory["kept"] is not swap
        assert ("swap" in (memory["why"] or "")) is swap
        key = server.key()
        server.stop()
        server.start()
        if swap:
            server.assert_locked("daemon_stopped")
        else:
            assert server.key() == key


def test_the_store_takes_the_variables_away() -> None:
    environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0", "LISTEN_FDNAMES": "", "FDSTORE": "0"}
    environment["NOTIFY_SOCKET"] = "/nowhere"
    store, received = FdStore.of(environment)
    assert (store.available, received) == (False, [])
    assert set(environment) == {"FDSTORE", "NOTIFY_SOCKET"}
    for text in ("x", "-1", "1" * 30, "99999"):
        assert FdStore.of({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": text})[1] == [] or text == "99999"


# --- the service manager is told


def test_ready_status_watchdog_and_stopping(plain: Server) -> None:
    manager = manager_of(plain)
    plain.stop()
    plain.extra_environment["WATCHDOG_USEC"] = "200000"
    plain.start()
    wait_for(lambda: len(manager.said("WATCHDOG")) > 3, "the watchdog")
    assert manager.said("READY")
    assert any(text.startswith("unlocked, generation") for text in manager.said("STATUS"))
    # Not while the loop hangs: a process that is stopped tells nothing.
    os.kill(plain.pid, signal.SIGSTOP)
    try:
        stat = Path(f"/proc/{plain.pid}/stat")
        wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "the process being stopped")
        manager.settle()
        before = len(manager.said("WATCHDOG"))
        threading.Event().wait(0.5)
        manager.settle()
        assert len(manager.said("WATCHDOG")) == before
    finally:
        os.kill(plain.pid, signal.SIGCONT)
    plain.send(signal.SIGHUP)
    wait_for(lambda: bool(manager.said("RELOADING")), "the reload")
    plain.stop()
    manager.settle()
    assert manager.said("STOPPING")
    assert manager.said("STATUS")[-1].startswith("unlocked")


def test_a_secret_buffer_is_still_wiped_when_it_is_dropped() -> None:
    """What is not shared is nobody else's."""
    buffer = SecretBuffer.copy_of(b"secret")
    view = buffer.view
    buffer.close()
    with pytest.raises(ValueError, match="released"):
        bytes(view)
