"""Killed at any instant of a change, the daemon that is started again is unlocked, with a keyring that is durable on disk."""

import shutil
import signal
from pathlib import Path

import pytest
from rigs.faults import Point, calls_by_thread, points_between, strace
from rigs.manager import ServiceManager
from rigs.server import Server
from rigs.tpmproxy import Command, TpmProxy, error

from unsealerd.core.age import decrypt_payload, parse_header

pytestmark = pytest.mark.promise(6)

# At every call that changes the store; for the other change where the two differ.
_STEPS = {"rotate": ("write", "fsync", "rename", "link", "unlink"), "revoke": ("rename", "unlink")}


class Trial:
    """A server whose disk can be put back; its service manager keeps the memory."""

    def __init__(self, server: Server, manager: ServiceManager) -> None:
        self.server = server
        self.manager = manager
        server.manager = manager
        server.start()
        server.ctl("init")
        self.key = server.key()
        server.stop()
        self._saved = server.base / "saved"
        shutil.copytree(server.state, self._saved)

    def begin(self, point: Point | None = None) -> Path:
        """Back to the moment, unlocked by an operator; the daemon runs under strace and dies at the point."""
        server = self.server
        shutil.rmtree(server.state)
        shutil.copytree(self._saved, server.state)
        self.manager.settle()
        self.manager.empty("memory-")
        log = server.base / "strace.log"
        log.unlink(missing_ok=True)
        server.prefix = strace(server, log, point, "signal=KILL")
        server.start()
        server.unlock()
        server.prefix = ()
        return log


def _change(server: Server, act: str) -> int:
    arguments = ("key", "rotate", "demo") if act == "rotate" else ("key", "revoke", "demo", "--version", "1")
    return server.ctl(*arguments, expect=None).returncode


@pytest.mark.parametrize("act", ["rotate", "revoke"])
def test_killed_at_every_call_of_a_change(act: str) -> None:
    with Server(tpm=False) as server, ServiceManager(server.base) as manager:
        trial = Trial(server, manager)
        log = trial.begin()
        before = calls_by_thread(log)
        assert _change(server, act) == 0
        after = calls_by_thread(log)
        server.stop()
        thread = max(after, key=lambda name: len(after[name]) - len(before.get(name, [])))
        points = points_between(before.get(thread, []), after[thread])
        assert {"write", "fsync", "rename"} <= {point.name for point in points}
        for point in [point for point in points if point.name in _STEPS[act]]:
            trial.begin(point)
            code = _change(server, act)
            assert server.ended() == -signal.SIGKILL, f"{point} was not reached"
            manager.settle()
            assert len([name for name in manager.names() if name.startswith("memory-")]) in (1, 2)
            server.start()
            status = server.status()
            assert status["state"] == "unlocked", (point, status)
            held = server.key()
            shown = server.json("key", "show", "demo")["versions"]
            assert [version["version"] for version in shown] in ([1], [1, 2])
            if code == 0:
                assert len(shown) == 2, "the change was reported, and is lost"
            if shown[0]["state"] == "primary":
                assert held == trial.key
            assert held in _backup(server), "what is served is not on disk"
            server.stop(signal.SIGKILL)


def _backup(server: Server) -> bytes:
    """The plaintext of the backup, as an operator can have it."""
    data = (server.state / "keyring.age").read_bytes()
    header = parse_header(data)
    recipient = server.identity.recipient
    point = recipient.ephemeral(header.stanzas[0])
    assert point is not None
    with (
        server.identity.exchange(point) as shared,
        recipient.unwrap(header.stanzas[0], shared) as file_key,
        decrypt_payload(data, header, file_key) as plain,
    ):
        return bytes(plain.view)


def test_killed_between_the_write_and_the_counter() -> None:
    """The backup is one ahead of the counter then: the restart completes the step, without an operator."""
    with Server() as server, ServiceManager(server.base) as manager:
        server.manager = manager
        server.start()
        server.ctl("init")
        server.stop()
        assert server.tpm is not None
        with TpmProxy(server.tpm) as proxy:
            server.configure(server.config.read_text().replace(server.tpm.tcti, proxy.tcti))
            server.start()

            def kill(_: bytes) -> bytes:
                server.kill()
                return error(0x101)

            proxy.replace(Command.NV_INCREMENT, kill, times=1)
            server.ctl("key", "rotate", "demo", expect=None)
            server.ended()
        server.configure()
        server.start()
        server.assert_unlocked()
        versions = server.json("key", "show", "demo")["versions"]
        assert [version["version"] for version in versions] == [1, 2]
        assert not server.status()["tpm"]["counter_behind"]


def test_a_disk_that_fails_leaves_one_image_of_what_is_on_it() -> None:
    with Server(tpm=False) as server, ServiceManager(server.base) as manager:
        trial = Trial(server, manager)
        log = trial.begin()
        before = calls_by_thread(log)
        assert _change(server, "rotate") == 0
        after = calls_by_thread(log)
        server.stop(signal.SIGKILL)
        thread = max(after, key=lambda name: len(after[name]) - len(before.get(name, [])))
        for point in points_between(before.get(thread, []), after[thread]):
            if point.name not in ("fsync", "rename"):
                continue
            shutil.rmtree(server.state)
            shutil.copytree(server.base / "saved", server.state)
            manager.empty("memory-")
            server.prefix = strace(server, log, point, "error=EIO")
            server.start()
            server.unlock()
            server.prefix = ()
            _change(server, "rotate")
            key = server.key()
            manager.settle()
            assert len([name for name in manager.names() if name.startswith("memory-")]) == 1, point
            server.kill()
            server.ended()
            server.start()
            server.assert_unlocked()
            # What is on disk and what was served differ only where the disk took the change, and said that it did not.
            if point.name != "fsync":
                assert server.key() == key
            server.stop()
