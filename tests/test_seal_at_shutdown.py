"""What the service does while it is stopped: seal for a reboot, nothing for a restart, no sealed copy for anything else."""

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rigs.manager import ServiceManager
from rigs.server import Server
from rigs.tpmproxy import Command, TpmProxy, error

from unsealerd.cli import shutdown
from unsealerd.cli.main import run
from unsealerd.cli.shutdown import Shutdown, why

# As systemd 252 and 257 print it in a real shutdown, shortened.
REBOOT = """\
1001 reboot.target                start waiting
1100 unsealerd.service            stop  running
1062 systemd-reboot.service       start waiting
1064 final.target                 start waiting
"""
STOP = "1200 unsealerd.service stop running\n"
RESTART = "1201 unsealerd.service restart running\n"


@pytest.mark.parametrize(
    ("jobs", "reason"),
    [
        (REBOOT, Shutdown.REBOOT),
        (REBOOT.replace("reboot.target", "kexec.target"), Shutdown.KEXEC),
        (REBOOT.replace("reboot.target", "soft-reboot.target"), Shutdown.KEXEC),
        (REBOOT.replace("reboot.target", "poweroff.target"), Shutdown.STOP),
        (REBOOT.replace("reboot.target", "halt.target"), Shutdown.STOP),
        (REBOOT.replace("reboot.target", "exit.target"), Shutdown.STOP),
        (REBOOT.replace("reboot.target", "rescue.target"), Shutdown.STOP),
        (STOP, Shutdown.STOP),
        (RESTART, Shutdown.RESTART),
        (RESTART.replace("restart", "try-restart"), Shutdown.RESTART),
        (RESTART + REBOOT, Shutdown.REBOOT),
        ("", Shutdown.STOP),
        ("No jobs running.\n", Shutdown.STOP),
        # A reboot that is being taken back, another service that restarts, names that only look alike.
        ("1 reboot.target stop waiting\n", Shutdown.STOP),
        ("1 web.service restart running\n", Shutdown.STOP),
        ("1 my-reboot.target start waiting\n2 reboot.target.service start waiting\n", Shutdown.STOP),
        ("reboot.target start\n", Shutdown.STOP),
    ],
)
def test_the_reason_is_in_the_job_queue(jobs: str, reason: Shutdown) -> None:
    assert why(jobs) is reason


class Stage:
    """A server, a stub ``systemctl`` that prints the job queue, and a console to look at."""

    def __init__(self, server: Server, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.server = server
        self.console = place / "console"
        self._systemctl = place / "systemctl"
        self._capsys = capsys

    def jobs(self, text: str, code: str = "") -> None:
        self._systemctl.write_text(
            f"#!/bin/sh\ntest \"$1\" = list-jobs || exit 9\n{code}\ncat <<'END'\n{text}END\n"
        )
        self._systemctl.chmod(0o755)

    def stop(self, jobs: str, code: str = "") -> str:
        """ExecStop=; returns what it says."""
        self.jobs(jobs, code)
        self.console.write_text("")
        self._capsys.readouterr()
        assert run(["--config", str(self.server.config), "seal", "--at-shutdown"]) == 0
        return self._capsys.readouterr().err

    def next_boot(self) -> None:
        self.server.stop()
        if self.server.manager is not None:
            self.server.manager.empty()
        self.server.reset_tpm()
        self.server.start()


@pytest.fixture
def stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Stage]:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(shutdown, "_CONSOLE", str(tmp_path / "console"))
    # Long enough for a stub on a busy machine; where a test waits for the end of one, it sets it.
    monkeypatch.setattr(shutdown, "PATIENCE", 120.0)
    monkeypatch.setattr(shutdown, "_QUEUE_PATIENCE", 60.0)
    with Server() as server, ServiceManager(server.base) as manager:
        server.manager = manager
        server.start()
        server.ctl("init")
        yield Stage(server, tmp_path, capsys)


def test_a_reboot_comes_back_unlocked(stage: Stage) -> None:
    key = stage.server.key()
    assert "sealed for the next boot (reboot)" in stage.stop(REBOOT)
    assert stage.console.read_text() == ""
    stage.next_boot()
    stage.server.assert_unlocked()
    assert stage.server.key() == key
    # A kexec does not reset the TPM.
    assert "sealed for the next boot (kexec)" in stage.stop(REBOOT.replace("reboot.target", "kexec.target"))
    stage.server.stop()
    assert stage.server.manager is not None
    stage.server.manager.empty()
    stage.server.start()
    stage.server.assert_unlocked()
    assert stage.server.key() == key


@pytest.mark.promise(3)
@pytest.mark.parametrize("jobs", [STOP, REBOOT.replace("reboot.target", "poweroff.target")])
@pytest.mark.parametrize("armed", [False, True])
def test_a_stop_leaves_no_sealed_copy_that_works(stage: Stage, jobs: str, armed: bool) -> None:
    server = stage.server
    if armed:
        server.ctl("arm", "--for", "1h")
    image = server.base / "image"
    shutil.copytree(server.state, image)
    said = stage.stop(jobs)
    assert ("destroyed" if armed else "nothing is sealed") in said
    assert not (server.state / "sealed.json").exists()
    stage.next_boot()
    server.assert_locked("unexpected_reboot")
    if armed:
        # Nor does a copy of the disk from before the stop.
        server.stop()
        assert server.manager is not None
        server.manager.empty()
        shutil.rmtree(server.state)
        shutil.copytree(image, server.state)
        server.reset_tpm()
        server.start()
        assert server.status()["state"] == "locked"


def test_a_restart_seals_nothing_and_keeps_a_lease(stage: Stage) -> None:
    server = stage.server
    stage.stop(RESTART)
    assert not (server.state / "sealed.json").exists()
    server.ctl("arm", "--for", "1h")
    stage.stop(RESTART)
    assert (server.state / "sealed.json").exists()
    server.stop()
    server.start()
    server.assert_unlocked()
    assert server.status()["seal"]["deadline"]


@pytest.mark.promise(3)
def test_a_shutdown_that_is_cancelled(stage: Stage) -> None:
    """The daemon is started again in the same boot: the sealed copy is refused, destroyed, and dead."""
    server = stage.server
    stage.stop(REBOOT)
    server.stop()
    assert server.manager is not None
    server.manager.empty()
    server.start()
    server.assert_locked("not_the_next_boot")
    assert not (server.state / "sealed.json").exists()
    server.unlock()
    stage.next_boot()
    server.assert_locked("unexpected_reboot")


def test_what_the_configuration_does_not_name_is_not_sealed(stage: Stage) -> None:
    server = stage.server
    server.tables = '[seal]\non = ["kexec"]\n'
    server.configure()
    assert "[seal] on does not name reboot" in stage.stop(REBOOT)
    assert not (server.state / "sealed.json").exists()
    assert "sealed" in stage.stop(REBOOT.replace("reboot.target", "kexec.target"))
    assert (server.state / "sealed.json").exists()


def _told(stage: Stage, said: str, what: str) -> None:
    """To the journal, and on the console."""
    assert what in said
    assert what in stage.console.read_text()
    assert "the next boot will need an operator" in said


def test_a_tpm_that_fails_is_told_and_stops_nothing(stage: Stage) -> None:
    server = stage.server
    server.stop()
    assert server.tpm is not None
    with TpmProxy(server.tpm) as proxy:
        server.configure(server.config.read_text().replace(server.tpm.tcti, proxy.tcti))
        server.start()
        proxy.answer(Command.CREATE, 0x101, times=None)
        _told(stage, stage.stop(REBOOT), "nothing was sealed")
        assert "seal_failed" in server.events()
        server.stop()
    server.configure()
    assert server.manager is not None
    server.manager.empty()
    server.reset_tpm()
    server.start()
    server.assert_locked("unexpected_reboot")


def test_a_tpm_that_hangs_is_in_the_audit_log_too(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutdown, "PATIENCE", 1.0)
    server = stage.server
    server.stop()
    assert server.tpm is not None
    released = threading.Event()

    def hang(_: bytes) -> bytes:
        released.wait(60)
        return error(0x101)

    with TpmProxy(server.tpm) as proxy:
        server.configure(server.config.read_text().replace(server.tpm.tcti, proxy.tcti))
        server.start()
        proxy.replace(Command.CREATE, hang, times=None)
        try:
            _told(stage, stage.stop(REBOOT), "nothing was sealed")
            assert server.stop() != 0  # in bounded time
        finally:
            released.set()
    assert "seal_failed" in server.events()


def test_a_locked_host_has_nothing_to_seal(stage: Stage) -> None:
    stage.server.ctl("lock")
    said = stage.stop(REBOOT)
    assert "nothing was sealed" in said
    assert stage.console.read_text() == ""


def test_a_daemon_that_is_gone(stage: Stage) -> None:
    stage.server.kill()
    stage.server.ended()
    assert stage.server.manager is not None
    stage.server.manager.empty()
    _told(stage, stage.stop(REBOOT), "nothing was sealed")
    assert "ended already" in stage.stop(STOP)


@pytest.mark.parametrize("main_pid", [None, "dead"])
def test_a_daemon_that_has_ended_by_itself_is_not_waited_for(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, main_pid: str | None
) -> None:
    """The service manager still holds its sockets open: whoever connects would wait."""
    stage.server.kill()
    stage.server.ended()
    path = stage.server.run_dir / "admin"
    path.unlink(missing_ok=True)
    monkeypatch.setenv("SERVICE_RESULT", "success")
    if main_pid is not None:
        monkeypatch.setenv("MAINPID", str(stage.server.pid))
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(os.fspath(path))
        held.listen()
        begun = time.monotonic()
        _told(stage, stage.stop(REBOOT), "nothing was sealed: the daemon has ended")
        assert "ended already" in stage.stop(STOP)
        assert time.monotonic() - begun < shutdown.PATIENCE / 2
        held.settimeout(0)
        with pytest.raises(BlockingIOError):
            held.accept()


def test_a_daemon_that_lives_is_asked(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_RESULT", "success")
    monkeypatch.setenv("MAINPID", str(stage.server.pid))
    assert "sealed for the next boot (reboot)" in stage.stop(REBOOT)


def test_a_daemon_that_hangs_does_not_hold_up_the_shutdown(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutdown, "PATIENCE", 1.0)
    stage.server.stop()
    assert stage.server.manager is not None
    stage.server.manager.empty()
    path = stage.server.run_dir / "admin"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(os.fspath(path))
        deaf.listen()
        begun = time.monotonic()
        _told(stage, stage.stop(REBOOT), "nothing was sealed")
        _told(stage, stage.stop(STOP), "a sealed copy may be left")
        assert time.monotonic() - begun < 20


@pytest.mark.parametrize("code", ["exit 1", "kill -9 $$", "sleep 60"])
def test_a_job_queue_that_cannot_be_read(stage: Stage, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Nobody knows that it is a planned reboot, so it is taken for a stop: no sealed copy is left, and none that works."""
    monkeypatch.setattr(shutdown, "_QUEUE_PATIENCE", 0.5)
    server = stage.server
    server.ctl("arm", "--for", "1h")
    said = stage.stop(REBOOT, code)
    _told(stage, said, "jobs could not be read")
    _told(stage, said, "taken for a stop")
    assert "the sealed copy is destroyed" in said
    assert not (server.state / "sealed.json").exists()
    assert "disarm" in server.events()
    assert "nothing is sealed" in stage.stop(REBOOT, code)


def _remove(config: Path) -> None:
    config.unlink()


@pytest.mark.parametrize("damage", [_remove, lambda config: config.write_text("[nonsense")])
def test_a_configuration_that_cannot_be_read(stage: Stage, damage: Callable[[Path], object]) -> None:
    damage(stage.server.config)
    _told(stage, stage.stop(REBOOT), "nothing was sealed")


def test_no_systemctl_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(shutdown, "_CONSOLE", str(tmp_path / "nowhere" / "console"))
    assert run(["seal", "--at-shutdown"]) == 0
    assert "jobs could not be read" in capsys.readouterr().err
