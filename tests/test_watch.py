"""The watcher beside a real daemon: who is told what, once, and which units are reloaded."""

import contextlib
import json
import os
import queue
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rigs.server import Server, wait_for
from rigs.stub_daemon import StubDaemon
from rigs.swtpm import listens
from rigs.watch import Watch

from unsealerd.client.connection import Connection
from unsealerd.config import load
from unsealerd.errors import BadMessage, ConfigInvalid, DaemonUnreachable
from unsealerd.model import State
from unsealerd.watch import units
from unsealerd.watch.event import Event, Letter
from unsealerd.watch.feed import MONITOR, MOST_WAITING, Feed, Lost, Wake, heard
from unsealerd.watch.main import EX_CONFIG, main
from unsealerd.watch.memory import Memory, recall, remember
from unsealerd.watch.places import MAX_LETTERS, Places
from unsealerd.watch.settings import Settings
from unsealerd.watch.watcher import Watcher

WEBHOOK = "https://hooks.example/T000/secret-token"


@pytest.fixture
def server() -> Iterator[Server]:
    """Without a TPM: every start is locked. Initialised, with the daemon running."""
    with Server(tpm=False, keys=("web", "api")) as server:
        server.keys["web"] = 'on_rotate = ["web.service", "both.service"]\n'
        server.keys["api"] = 'on_rotate = ["both.service"]\n'
        server.tables = (
            f'[notify]\nwebhook = "{WEBHOOK}"\n[metrics]\ntextfile = "{server.base}/m/unsealerd.prom"\n'
        )
        server.configure()
        server.start()
        server.ctl("init")
        yield server


def samples(path: Path) -> dict[str, float]:
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
    }


def test_a_locked_host_tells_people_once(server: Server) -> None:
    with Watch(server.config, server.base) as watch:
        watch.hears("state")
        assert watch.said == []
        assert not watch.issue.exists()
        server.ctl("lock")
        watch.hears("locked")
        host = os.uname().nodename
        sentence = (
            f"{host}: keys are locked (locked_by_admin); services wait for an operator: unsealctl unlock"
        )
        assert watch.said == [f"unsealerd: {sentence}"]
        assert watch.issue.read_text() == watch.motd.read_text() == f"{sentence}\n"
        assert stat.S_IMODE(watch.issue.stat().st_mode) == 0o644
        wait_for(lambda: watch.calls == ["start unsealerd-notify@locked-1.service"], "the notification")

        server.unlock()
        watch.hears("unlocked")
        assert watch.said[1:] == [f"unsealerd: {host}: keys are unlocked"]
        assert not watch.issue.exists()
        assert not watch.motd.exists()
        assert watch.calls[1:] == ["start unsealerd-notify@unlocked-2.service"]


def test_a_host_that_is_locked_after_boot_is_told_once_not_at_each_start_of_the_watcher(
    server: Server,
) -> None:
    server.power_cut()
    with Watch(server.config, server.base) as watch:
        for start in (1, 2, 3):
            watch.hears("state", start)
            assert "(unexpected_reboot)" in watch.issue.read_text()
            assert len(watch.said) == 1
            assert watch.calls == ["start unsealerd-notify@locked-1.service"]
            watch.issue.unlink()  # as a clean-up of /run would: it is shown again
            assert watch.stop() == 0
            watch.start()
        server.unlock()
        watch.hears("unlocked")
        assert len(watch.said) == 2


def test_it_waits_for_the_daemon_and_connects_again(server: Server) -> None:
    server.stop()
    with Watch(server.config, server.base) as watch:
        wait_for(lambda: "daemon lost error=DaemonUnreachable" in watch.log_text(), "a try")
        metrics = server.base / "m" / "unsealerd.prom"
        wait_for(metrics.exists, "the metrics")
        assert samples(metrics)["unsealerd_up"] == 0
        assert "unsealerd_locked" not in samples(metrics)
        server.start()
        watch.hears("state")
        wait_for(lambda: samples(metrics)["unsealerd_up"] == 1, "the metrics")
        assert samples(metrics)["unsealerd_locked"] == 1
        server.stop(signal.SIGKILL)
        wait_for(lambda: samples(metrics)["unsealerd_up"] == 0, "the metrics")
        server.start()
        watch.hears("state", 2)
        # The daemon was gone, and is locked for the same reason as before: no news.
        assert len(watch.said) == 1


def test_metrics_follow_the_state(server: Server) -> None:
    metrics = server.base / "m" / "unsealerd.prom"
    with Watch(server.config, server.base) as watch:
        watch.hears("state")
        wait_for(metrics.exists, "the metrics")
        assert stat.S_IMODE(metrics.stat().st_mode) == 0o644
        assert (samples(metrics)["unsealerd_locked"], samples(metrics)["unsealerd_generation"]) == (0, 1)
        server.ctl("key", "rotate", "web")
        wait_for(lambda: samples(metrics)["unsealerd_generation"] == 2, "the rotation")
        server.ctl("lock")
        wait_for(lambda: samples(metrics)["unsealerd_locked"] == 1, "the lock")
        assert sorted(path.name for path in metrics.parent.iterdir()) == ["unsealerd.prom"]


def test_a_rotation_reloads_the_units_of_the_key(server: Server) -> None:
    with Watch(server.config, server.base) as watch:
        watch.hears("state")
        server.ctl("key", "rotate", "web")
        reload = "try-reload-or-restart"
        wait_for(lambda: watch.calls == [f"{reload} web.service", f"{reload} both.service"], "the reload")
        server.ctl("key", "revoke", "api", "--version", "1", "--yes")
        wait_for(lambda: watch.calls[2:] == [f"{reload} both.service"], "the reload")


def test_a_rotation_that_nobody_heard_is_acted_upon_later(server: Server) -> None:
    with Watch(server.config, server.base) as watch:
        watch.hears("state")
        wait_for(lambda: recall(watch.memory).keys is not None, "the first look")
        watch.stop()
        server.ctl("key", "rotate", "api")
        watch.start()
        wait_for(lambda: watch.calls == ["try-reload-or-restart both.service"], "the reload")
        watch.stop()
        watch.start().hears("state", 3)
        server.ctl("lock")
        wait_for(lambda: len(watch.calls) == 2, "the lock")
        assert watch.calls[1] == "start unsealerd-notify@locked-1.service"


def test_a_unit_of_many_keys_is_reloaded_once(server: Server) -> None:
    with Watch(server.config, server.base) as watch:
        watch.hears("state")
        wait_for(lambda: recall(watch.memory).keys is not None, "the first look")
        watch.stop()
        for name in ("web", "api", "web"):
            server.ctl("key", "rotate", name)
        watch.start()
        reload = "try-reload-or-restart"
        wait_for(lambda: len(watch.calls) >= 2, "the reload")
        server.ctl("lock")
        watch.hears("locked")
        assert sorted(watch.calls[:2]) == [f"{reload} both.service", f"{reload} web.service"]
        assert watch.calls[2:] == ["start unsealerd-notify@locked-1.service"]


def test_a_unit_that_cannot_be_reloaded_stops_nothing(server: Server) -> None:
    with Watch(server.config, server.base) as watch:
        watch.systemctl(failing="*web.service")
        watch.hears("state")
        server.ctl("key", "rotate", "web")
        wait_for(lambda: len(watch.calls) == 2, "both units")
        assert "unit=web.service exit=1 error=Failed to do it" in watch.log_text()
        (watch.bin / "systemctl").unlink()
        (watch.bin / "systemctl").symlink_to("/nonexistent")
        server.ctl("lock")
        watch.hears("locked")
        server.unlock()
        watch.hears("unlocked")


def test_a_changed_configuration_counts_at_once(server: Server) -> None:
    with Watch(server.config, server.base) as watch:
        watch.hears("state")
        server.keys["api"] = 'on_rotate = ["other.service"]\n'
        server.configure()
        server.ctl("key", "rotate", "api")
        wait_for(lambda: watch.calls == ["try-reload-or-restart other.service"], "the reload")
        server.configure("nonsense")
        server.kill()
        wait_for(lambda: "configuration refused" in watch.log_text(), "that it says so")


def test_what_the_notification_is_handed_is_for_root_alone(server: Server) -> None:
    with Watch(server.config, server.base) as watch:
        watch.hears("state")
        server.ctl("lock")
        wait_for(lambda: len(watch.calls) == 1, "the notification")
        letter = watch.letter("locked")
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        assert letter == {
            "event": "locked",
            "host": os.uname().nodename,
            "reason": "locked_by_admin",
            "since": server.status()["since"],
            "boot_id": boot_id,
            "command": [],
            "webhook": WEBHOOK,
        }
        assert stat.S_IMODE((watch.memory / "event-locked-1.json").stat().st_mode) == 0o600
        assert stat.S_IMODE(watch.memory.stat().st_mode) == 0o700
        assert "secret-token" not in watch.log_text()
        assert "secret-token" not in "".join(watch.calls + watch.said)


def test_one_that_is_still_being_told_does_not_swallow_the_next(server: Server) -> None:
    """A start of an instance that runs is no start: the same event again has another instance, and a letter of its own."""
    with Watch(server.config, server.base) as watch:
        watch.hears("state")
        for time in (1, 2):
            server.ctl("lock")
            watch.hears("locked", time)
            server.unlock()
            watch.hears("unlocked", time)
        watch.stop()
        watch.start().hears("state", 2)
        server.ctl("lock")
        watch.hears("locked", 3)
        names = ["locked-1", "unlocked-2", "locked-3", "unlocked-4", "locked-5"]
        wait_for(lambda: len(watch.calls) == len(names), "the notifications")
        assert watch.calls == [f"start unsealerd-notify@{name}.service" for name in names]
        assert {path.name for path in watch.memory.glob("event-*")} == {
            f"event-{name}.json" for name in names
        }


def test_old_letters_are_removed(tmp_path: Path) -> None:
    places = Places(memory=tmp_path / "memory")
    event = Event("locked", "web1", None, 1, "")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "state.json").touch()
    for number in range(1, MAX_LETTERS + 4):
        assert places.hand_over(Letter(event, ("a",), None)) == f"locked-{number}"
    left = {path.name for path in places.memory.iterdir()}
    wanted = {f"event-locked-{number}.json" for number in range(4, MAX_LETTERS + 4)}
    assert left == {"state.json", *wanted}


def test_nobody_is_told_where_nobody_is_named(server: Server) -> None:
    server.tables = ""
    server.configure()
    with Watch(server.config, server.base) as watch:
        watch.hears("state")
        server.ctl("lock")
        watch.hears("locked")
        assert len(watch.said) == 1
        assert watch.calls == []
        assert sorted(path.name for path in watch.memory.iterdir()) == ["state.json"]


def test_a_console_that_takes_nothing_delays_nobody(server: Server) -> None:
    with Watch(server.config, server.base) as watch:
        watch.console.unlink()
        os.mkfifo(watch.console)  # without a reader
        watch.hears("state")
        server.ctl("lock")
        watch.hears("locked")
        assert watch.issue.exists()
        assert "console=" in watch.log_text()


def test_a_wrong_configuration_is_an_error_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "unsealerd.toml"
    path.write_text("[daemon]\nodd = 1\n")
    with pytest.raises(ConfigInvalid):
        load(path)
    assert main(["--config", str(path)]) == EX_CONFIG
    message, hint = capsys.readouterr().err.splitlines()
    assert message.startswith("unsealerd-watch: ConfigInvalid: ")
    assert hint.startswith("hint: ")


# --- what it listens to


def test_the_administrators_view_has_the_reason(server: Server) -> None:
    with Connection(server.run_dir / "admin") as connection:
        events = connection.stream(MONITOR)
        unlocked = {"state": "unlocked", "key": None, "version": None, "reason": None, "detail": None}
        assert next(events) == {"event": "state", **unlocked}
        server.ctl("key", "rotate", "web")
        assert next(events) == {"event": "rotated", **unlocked, "key": "web", "version": 2}
        server.ctl("lock")
        assert next(events) == {
            "event": "locked",
            **unlocked,
            "state": "locked",
            "reason": "locked_by_admin",
            "detail": "locked by the administrator",
        }
    with Connection(server.run_dir / "admin") as connection, pytest.raises(BadMessage, match="ExpectedMore"):
        connection.call(MONITOR)


def test_a_start_that_is_not_through_is_no_lock() -> None:
    """At a planned reboot the sockets are there before the TPM answers: nobody is to be told of a lock then."""
    with Server() as server:
        server.start()
        server.ctl("init")
        with Watch(server.config, server.base) as watch:
            watch.hears("state")
            server.ctl("seal")
            server.stop()
            server.reset_tpm()
            assert server.tpm is not None
            os.kill(server.tpm.pid, signal.SIGSTOP)
            try:
                server.launch()
                wait_for(lambda: listens(server.run_dir / "admin"), "the socket")
                with (
                    Connection(server.run_dir / "admin", timeout=0.5) as connection,
                    pytest.raises(DaemonUnreachable, match="no answer in time"),
                ):
                    next(connection.stream(MONITOR))
            finally:
                os.kill(server.tpm.pid, signal.SIGCONT)
            assert server.await_ready()
            watch.hears("state", 2)
            server.assert_unlocked()
            assert watch.said == []
            assert not watch.issue.exists()


def test_a_daemon_that_says_nonsense_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    config = tmp_path / "unsealerd.toml"
    config.write_text(
        f'[daemon]\nstate_dir = "{tmp_path}/state"\nruntime_dir = "{tmp_path}/run"\n[tpm]\ntcti = "none"\n'
    )
    with StubDaemon(tmp_path / "run") as daemon, Watch(config, tmp_path) as watch:
        daemon.streams["Admin.Monitor"] = [{"event": 1, "state": "locked"}]
        wait_for(lambda: "daemon lost error=BadMessage" in watch.log_text(), "the answer")
        daemon.answers["Admin.Status"] = {
            "status": {"host_name": "a\\b\x1b[31m", "since": 1 << 200, "boot_id": "a\0b"}
        }
        daemon.streams["Admin.Monitor"] = [{"event": "state", "state": "locked", "reason": "rollback"}]
        watch.hears("state")
        assert watch.said == [
            "unsealerd: a?b?[31m: keys are locked (rollback); services wait for an operator: unsealctl unlock"
        ]


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"event": "state"},
        {"event": "state", "state": "asleep"},
        {"event": 1, "state": "locked"},
        {"event": "state", "state": "locked", "reason": 1},
        {"event": "state", "state": "locked", "reason": "an_invention"},
        {"event": "state", "state": "locked", "reason": "rollback\nx"},
        {"event": "state\nx", "state": "locked"},
        {"event": "x" * 100, "state": "locked"},
    ],
)
def test_only_an_event_is_one(answer: dict[str, object]) -> None:
    with pytest.raises(BadMessage):
        heard(answer)


def test_a_watcher_that_hears_nothing_any_more_ends(tmp_path: Path) -> None:
    """It is started again then; it must not stay, and seem to watch."""

    def broken(_: float) -> None:
        raise MemoryError

    wakes: queue.SimpleQueue[Wake] = queue.SimpleQueue()
    with pytest.raises(MemoryError):
        Feed(tmp_path / "admin", wakes, broken).run()
    assert isinstance(wakes.get_nowait(), Lost)
    assert wakes.get_nowait() is None


class Chatter:
    """A daemon that was broken into, and never stops."""

    def __init__(self, directory: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(directory / "admin"))
        self._socket.listen(8)
        self.sent = 0
        threading.Thread(target=self._talk, daemon=True).start()

    def _talk(self) -> None:
        with self._socket.accept()[0] as peer:
            peer.recv(4096)
            answer = {"event": "locked", "state": "locked", "reason": "rollback"}
            message = json.dumps({"parameters": answer, "continues": True}).encode() + b"\0"
            with contextlib.suppress(OSError):
                while True:
                    peer.sendall(message)
                    self.sent += 1

    def close(self) -> None:
        self._socket.close()


def test_what_waits_for_the_watcher_is_bounded(tmp_path: Path) -> None:
    chatter = Chatter(tmp_path)
    wakes: queue.SimpleQueue[Wake] = queue.SimpleQueue()
    waited = threading.Event()
    rest = threading.Event()

    def pause(_: float) -> None:
        waited.set()
        rest.wait(60)
        raise MemoryError  # the end of this thread

    def listen() -> None:
        with contextlib.suppress(MemoryError):
            Feed(tmp_path / "admin", wakes, pause).run()

    listening = threading.Thread(target=listen, daemon=True)
    listening.start()
    assert waited.wait(60)
    assert wakes.qsize() == MOST_WAITING
    rest.set()
    listening.join(60)
    chatter.close()


def test_a_daemon_that_flaps_does_not_start_a_unit_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def start(letter: str) -> bool:
        started.append(letter)
        return True

    monkeypatch.setattr(units, "start_notification", start)
    config = tmp_path / "unsealerd.toml"
    config.write_text(
        f'[daemon]\nstate_dir = "{tmp_path}/state"\nruntime_dir = "{tmp_path}"\n[tpm]\ntcti = "none"\n'
        '[notify]\ncommand = ["/bin/true"]\n'
    )
    places = Places(tmp_path / "console", tmp_path / "issue", tmp_path / "motd", tmp_path / "memory")
    places.prepare()
    places.console.touch()
    now = 1000.0
    watcher = Watcher(Settings(config), places, tmp_path / "admin", lambda: 1.8e9, lambda: now)
    for _ in range(50):
        watcher._tell(State.LOCKED, "rollback")
        watcher._tell(State.UNLOCKED, None)
    watcher._tell(State.LOCKED, "tpm_missing")
    assert len(started) == len(places.console.read_text().splitlines()) == 20
    assert watcher._untold == (State.LOCKED, "tpm_missing")
    now += 60
    watcher._tell(*watcher._untold)  # nothing was heard for a while
    assert len(started) == 21
    assert "tpm_missing" in places.console.read_text().splitlines()[-1]
    assert watcher._untold is None


# --- what is remembered


@pytest.mark.parametrize(
    "memory",
    [Memory(), Memory(("locked", "rollback"), {"web": "1:primary"}), Memory(("unlocked", None), {})],
)
def test_memory_round_trip(memory: Memory, tmp_path: Path) -> None:
    remember(tmp_path, memory)
    assert recall(tmp_path) == memory


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"told": ["locked"], "keys": {}}',
        b'{"told": null, "keys": {"a": 1}}',
        b"[" * 9999,
    ],
)
def test_a_memory_that_is_none_is_forgotten(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(data)
    assert recall(tmp_path) == Memory()
