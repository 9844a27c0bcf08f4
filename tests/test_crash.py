"""Promise 6: a crash at any instant, a full disk, a torn write. The keyring before or after the change is there, never neither.

strace kills the daemon, or fails the call, at each system call on the files of the store in turn. The points are not listed
here: a first run without a fault shows which there are.
"""

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rigs.faults import CALLS, Point, calls_by_thread, points_between, strace, strip, watched
from rigs.server import Server

pytestmark = pytest.mark.promise(6)

Act = Callable[[Server], int]


def _rotate(server: Server) -> int:
    return server.ctl("key", "rotate", "demo", expect=None).returncode


def _revoke(server: Server) -> int:
    return server.ctl("key", "revoke", "demo", "--version", "1", expect=None).returncode


def _seal(server: Server) -> int:
    return server.ctl("seal", expect=None).returncode


class Trial:
    """One server whose disk (and TPM) can be put back to the same moment, again and again."""

    def __init__(self, server: Server) -> None:
        self.server = server
        server.start()
        server.ctl("init")
        self.key = server.key()
        server.stop()
        if server.tpm is not None:
            server.tpm.stop()
        self._saved = server.base / "saved"
        self._saved.mkdir()
        shutil.copytree(server.state, self._saved / "state")
        if server.tpm is not None:
            shutil.copytree(server.tpm.directory, self._saved / "tpm")

    def begin(self, point: Point | None = None, fault: str = "") -> Path:
        """Back to the moment, and unlocked; the daemon runs under strace."""
        server = self.server
        shutil.rmtree(server.state)
        shutil.copytree(self._saved / "state", server.state)
        if server.tpm is not None:
            server.tpm.stop()
            shutil.rmtree(server.tpm.directory)
            shutil.copytree(self._saved / "tpm", server.tpm.directory)
        log = server.base / "strace.log"
        log.unlink(missing_ok=True)
        server.prefix = strace(server, log, point, fault)
        server.start()
        server.unlock()
        server.prefix = ()
        return log

    def points(self, act: Act) -> list[Point]:
        """The calls of the act."""
        log = self.begin()
        before = calls_by_thread(log)
        assert act(self.server) == 0
        after = calls_by_thread(log)
        self.server.stop()
        thread = max(after, key=lambda name: len(after[name]) - len(before.get(name, [])))
        points = points_between(before.get(thread, []), after[thread])
        seen = {point.name for point in points}
        # The dry run is worth something only if it saw the steps of a durable write.
        assert {"write", "fsync", "rename"} <= seen, seen
        return points


@pytest.fixture
def trial() -> Iterator[Trial]:
    with Server(tpm=False) as server:
        yield Trial(server)


@pytest.fixture
def tpm_trial() -> Iterator[Trial]:
    with Server() as server:
        yield Trial(server)


def _crash_everywhere(trial: Trial, act: Act, check: Callable[[Trial, int], None]) -> None:
    for point in trial.points(act):
        trial.begin(point, "signal=KILL")
        code = act(trial.server)
        # A kill on its way may come after the answer, but it comes.
        assert trial.server.ended() == -signal.SIGKILL, f"{point} was not reached"
        check(trial, code)


def _after_a_change(trial: Trial, code: int) -> None:
    server = trial.server
    server.start()
    server.assert_locked("unexpected_reboot")
    server.unlock()
    versions = dict(server.client.read_all("demo"))
    shown = server.json("key", "show", "demo")["versions"]
    assert [version["version"] for version in shown] in ([1], [1, 2])
    if code == 0:
        assert len(shown) == 2, "the change was reported, and is lost"
    if shown[0]["state"] != "revoked":
        assert versions.get(1, trial.key) == trial.key
    assert server.key() == versions[max(versions)]
    server.stop()


def test_killed_at_every_call_of_a_rotation(trial: Trial) -> None:
    _crash_everywhere(trial, _rotate, _after_a_change)


def test_killed_at_every_call_of_a_revocation(trial: Trial) -> None:
    _crash_everywhere(trial, _revoke, _after_a_change)


def test_killed_at_every_call_of_a_seal(tpm_trial: Trial) -> None:
    def check(trial: Trial, code: int) -> None:
        server = trial.server
        server.reset_tpm()
        server.start()
        status = server.status()
        if code == 0:
            assert status["state"] == "unlocked", status
        if status["state"] == "locked":
            assert status["lock_reason"] == "unexpected_reboot", status
            server.unlock()  # without accepting a rollback
        assert server.key() == trial.key
        server.stop()

    _crash_everywhere(tpm_trial, _seal, check)


def test_killed_at_every_call_of_the_unseal(tpm_trial: Trial) -> None:
    """The boot that uses the sealed copy is cut off: it may need an operator then, but nothing is lost or usable twice."""
    server = tpm_trial.server
    tpm_trial.begin()
    server.ctl("seal")
    server.stop()
    assert server.tpm is not None
    server.tpm.stop()
    sealed, tpm = server.base / "sealed-state", server.base / "sealed-tpm"
    shutil.copytree(server.state, sealed)
    shutil.copytree(server.tpm.directory, tpm)

    def boot(point: Point | None = None) -> Path:
        assert server.tpm is not None
        server.tpm.stop()
        for saved, place in ((sealed, server.state), (tpm, server.tpm.directory)):
            shutil.rmtree(place)
            shutil.copytree(saved, place)
        log = server.base / "strace.log"
        log.unlink(missing_ok=True)
        server.prefix = strace(server, log, point, "signal=KILL")
        server.launch()
        server.prefix = ()
        return log

    log = boot()
    server.await_ready()
    server.assert_unlocked()
    threads = calls_by_thread(log)  # what the end of the daemon does is no part of it
    server.stop()
    worker = next(calls for calls in threads.values() if any(strip(call) == "rename" for call in calls))
    points = points_between([], worker)
    assert {"write", "fsync", "rename", "unlink"} <= {point.name for point in points}
    for point in points:
        boot(point)
        assert server.ended() == -signal.SIGKILL, f"{point} was not reached"
        server.start()
        if server.status()["state"] == "locked":
            server.unlock()
        assert server.key() == tpm_trial.key
        assert not (server.state / "sealed.json").exists()
        server.stop()


def test_the_power_goes_between_a_write_after_the_seal_and_the_counter(tpm_trial: Trial) -> None:
    """Then the TPM still gives the sealed copy, which is of the backup before; and that is no damage."""
    server = tpm_trial.server
    tpm_trial.begin()
    assert server.tpm is not None
    server.ctl("arm", "--for", "1h")
    sealed = (server.state / "sealed.json").read_bytes()
    shutil.copytree(server.tpm.directory, server.base / "tpm-before")
    server.ctl("key", "rotate", "demo")
    key = server.key()
    server.stop(signal.SIGKILL)
    server.tpm.kill()
    (server.state / "sealed.json").write_bytes(sealed)
    shutil.rmtree(server.tpm.directory)
    shutil.copytree(server.base / "tpm-before", server.tpm.directory)
    server.start()
    server.assert_locked("unexpected_reboot")
    assert not (server.state / "sealed.json").exists()
    server.unlock()
    assert server.key() == key != tpm_trial.key
    server.stop()


def test_killed_at_every_call_of_init() -> None:
    with Server(tpm=False) as server:
        log = server.base / "strace.log"
        server.prefix = strace(server, log)
        server.start()
        before = calls_by_thread(log)
        server.ctl("init")
        after = calls_by_thread(log)
        server.stop()
        points = [
            point
            for thread, calls in after.items()
            for point in points_between(before.get(thread, []), calls)
        ]
        assert {"write", "fsync", "rename"} <= {point.name for point in points}
        for point in points:
            shutil.rmtree(server.state)
            (server.base / "keyring.id").unlink(missing_ok=True)
            server.prefix = strace(server, log, point, "signal=KILL")
            server.launch()
            server.prefix = ()
            if server.await_ready():
                server.ctl("init", expect=None)
            assert server.ended() == -signal.SIGKILL, f"{point} was not reached"
            server.start()
            status = server.status()
            if status["state"] == "uninitialised":
                server.ctl("init")
            else:
                assert status["lock_reason"] == "unexpected_reboot", status
                server.unlock()
            assert len(server.key()) == 32
            server.stop()


@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EROFS"])
def test_a_disk_that_fails_refuses_the_change_and_loses_nothing(trial: Trial, error: str) -> None:
    server = trial.server
    for point in trial.points(_rotate):
        log = trial.begin(point, f"error={error}")
        code = _rotate(server)
        hit = [call for calls in calls_by_thread(log).values() for call in calls if "(INJECTED)" in call]
        assert hit, f"{point} was not reached"
        assert server.status()["state"] == "unlocked"
        versions = dict(server.client.read_all("demo"))
        assert versions.get(1, trial.key) == trial.key
        assert code in (0, 15), code
        assert (code == 0) == (len(server.json("key", "show", "demo")["versions"]) == 2)
        # The disk works again: the next change goes through, and a restart finds it.
        assert _rotate(server) == 0
        primary = server.key()
        server.stop(signal.SIGKILL)
        server.start()
        server.unlock()
        assert server.key() == primary
        server.stop()


def test_a_full_disk_refuses_and_serves_on(trial: Trial) -> None:
    """A real full file system, as far as root is needed to make one."""
    server = trial.server
    small = server.base / "small"
    small.mkdir()
    assert os.system(f"mount -t tmpfs -o size=256k,mode=711 tmpfs {small}") == 0
    try:
        shutil.copytree(server.state, small, dirs_exist_ok=True)
        server.state = small
        server.configure()
        server.start()
        server.unlock()
        with (small / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
        refused = server.ctl("key", "rotate", "demo", expect=None)
        assert refused.returncode == 15
        assert b"hint:" in refused.stderr
        server.assert_unlocked()
        (small / "filler").unlink()
        assert server.key() == trial.key
        server.ctl("key", "rotate", "demo")
        server.stop()
    finally:
        if server.alive:
            server.stop(signal.SIGKILL)
        os.system(f"umount {small}")


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "extend"])
def test_a_torn_backup_is_named_and_the_previous_one_is_there(trial: Trial, damage: str) -> None:
    server = trial.server
    trial.begin()
    server.ctl("key", "rotate", "demo")
    server.stop()
    backup = server.state / "keyring.age"
    data = bytearray(backup.read_bytes())
    match damage:
        case "cut":
            del data[-40:]
        case "flip":
            data[-20] ^= 1
        case "empty":
            data.clear()
        case "extend":
            data += b"x"
    backup.write_bytes(data)
    server.start()
    assert server.unlock(expect=None).returncode != 0
    server.assert_locked("backup_damaged")
    (server.state / "keyring.age.previous").replace(backup)
    server.unlock()
    assert server.key() == trial.key


def test_the_watched_calls_are_all_that_writes(trial: Trial) -> None:
    """The list of calls at which faults are tried is complete: nothing else that the daemon does changes the store."""
    server = trial.server
    log = server.base / "all.log"
    server.prefix = (
        *("strace", "-D", "-f", "-qq", "-o", str(log)),
        *(argument for path in watched(server) for argument in ("-P", str(path))),
    )
    server.start()
    server.unlock()
    server.ctl("key", "rotate", "demo")
    server.stop()
    harmless = {
        "stat",
        "lstat",
        "fstat",
        "newfstatat",
        "statx",
        "read",
        "lseek",
        "close",
        "flock",
        "ioctl",
        "mkdir",
    }
    harmless |= {"fchmod", "chmod", "fcntl", "readlink", "getdents64"}
    seen = {strip(call) for calls in calls_by_thread(log).values() for call in calls}
    assert seen <= harmless | set(CALLS.split(",")), seen
