"""Restarts and shutdowns under a real systemd: what keeps the keys, what seals them, and what leaves nothing."""

import hashlib
import re
import threading
from collections.abc import Iterator

import pytest
from rigs.nspawn import Machine
from rigs.server import wait_for

pytestmark = pytest.mark.xdist_group("nspawn-restart")

UNIT = "unsealerd.service"
SEALED = "/var/lib/unsealerd/sealed.json"


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with Machine() as machine:
        machine.boot()
        machine.initialise()
        yield machine


@pytest.fixture
def unlocked(machine: Machine) -> Machine:
    """On, and unlocked, whatever the test before left."""
    if not machine.alive:
        machine.boot()
    machine.run(["systemctl", "reset-failed"], check=False)
    machine.run(["systemctl", "start", UNIT])
    if machine.status()["state"] == "locked":
        machine.unlock()
    return machine


def pid(machine: Machine) -> int:
    return int(machine.show(UNIT, "MainPID"))


def reason(machine: Machine) -> str | None:
    status = machine.status()
    return None if status["state"] == "unlocked" else str(status["lock_reason"])


def events(machine: Machine) -> list[str]:
    text = machine.read("/var/lib/unsealerd/audit.jsonl").decode()
    return re.findall(r'"event":"([a-z_]+)"', text)


def await_another(machine: Machine, before: int) -> None:
    wait_for(lambda: pid(machine) not in (0, before), "another main process")
    machine.wait_unit(UNIT)


def test_a_restart_keeps_the_keys(unlocked: Machine) -> None:
    key = unlocked.key()
    unlocked.run(["systemctl", "restart", UNIT])
    assert reason(unlocked) is None
    assert unlocked.key() == key
    assert unlocked.status()["memory"] == {"kept": True, "why": None}
    assert "restored" in events(unlocked)
    assert not unlocked.exists(SEALED)
    text = unlocked.show(UNIT, "StatusText")
    assert text.startswith("unlocked, generation ")


@pytest.mark.parametrize("number", ["KILL", "ABRT"])
def test_a_crash_keeps_the_keys(unlocked: Machine, number: str) -> None:
    key = unlocked.key()
    before = pid(unlocked)
    unlocked.run(["systemctl", "kill", "--kill-whom=main", f"--signal={number}", UNIT])
    await_another(unlocked, before)
    assert reason(unlocked) is None
    assert unlocked.key() == key


def test_a_daemon_that_hangs_is_killed_by_the_watchdog_and_keeps_the_keys(unlocked: Machine) -> None:
    key = unlocked.key()
    unlocked.write(
        f"/etc/systemd/system/{UNIT}.d/watchdog.conf", "[Service]\nWatchdogSec=8\nTimeoutAbortSec=1\n"
    )
    unlocked.run(["systemctl", "daemon-reload"])
    unlocked.run(["systemctl", "restart", UNIT])
    before = pid(unlocked)
    told = unlocked.show(UNIT, "WatchdogTimestampMonotonic")
    wait_for(lambda: unlocked.show(UNIT, "WatchdogTimestampMonotonic") != told, "it telling that it lives")
    assert pid(unlocked) == before
    unlocked.run(["kill", "-STOP", str(before)])
    await_another(unlocked, before)
    assert reason(unlocked) is None
    assert unlocked.key() == key
    wait_for(lambda: "watchdog" in unlocked.journal(UNIT).lower(), "the reason in the journal")
    unlocked.run(["rm", "-r", f"/etc/systemd/system/{UNIT}.d"])
    unlocked.run(["systemctl", "daemon-reload"])
    unlocked.run(["systemctl", "restart", UNIT])


def test_a_stop_is_not_a_restart(unlocked: Machine) -> None:
    unlocked.ctl("arm", "--for", "1h")
    unlocked.run(["systemctl", "stop", UNIT])
    assert not unlocked.exists(SEALED)
    unlocked.run(["systemctl", "start", UNIT])
    assert reason(unlocked) == "daemon_stopped"
    assert unlocked.show(UNIT, "StatusText") == "locked: daemon_stopped"


@pytest.mark.promise(9)
def test_a_backup_that_is_put_back_between_two_daemons(unlocked: Machine) -> None:
    state = "/var/lib/unsealerd/keyring.age"
    unlocked.run(["cp", "-p", state, "/run/old.age"])
    unlocked.ctl("key", "rotate", "demo")
    unlocked.write(
        f"/etc/systemd/system/{UNIT}.d/old.conf", f"[Service]\nExecStartPre=+cp -p /run/old.age {state}\n"
    )
    unlocked.run(["cp", "-p", state, "/run/new.age"])
    unlocked.run(["systemctl", "daemon-reload"])
    unlocked.run(["systemctl", "restart", UNIT])
    assert reason(unlocked) == "memory_refused"
    unlocked.run(["rm", "-r", f"/etc/systemd/system/{UNIT}.d"])
    unlocked.run(["systemctl", "daemon-reload"])
    unlocked.run(["cp", "-p", "/run/new.age", state])
    unlocked.unlock()


@pytest.mark.promise(11)
def test_a_unit_that_waits_for_its_key_waits_over_a_restart(unlocked: Machine) -> None:
    unlocked.keys["demo"] = '\n[[key.demo.allow]]\nunit = "web.service"\noperations = ["read"]\n'
    unlocked.configure()
    unlocked.run(["systemctl", "reload", UNIT])
    key = unlocked.key()
    unlocked.ctl("lock")
    unlocked.unit(
        "[Service]\nType=oneshot\nDynamicUser=yes\nLoadCredential=demo:/run/unsealerd/key/demo\n"
        "ExecStart=sh -c 'sha256sum < $CREDENTIALS_DIRECTORY/demo'\n",
        "web.service",
    )
    unlocked.run(["systemctl", "start", "--no-block", "web.service"])
    wait_for(lambda: unlocked.show("web.service", "ActiveState") == "activating", "the service waiting")
    unlocked.run(["systemctl", "restart", UNIT])
    assert unlocked.show("web.service", "ActiveState") == "activating"
    before = pid(unlocked)
    unlocked.run(["kill", "-KILL", str(before)])
    await_another(unlocked, before)
    assert unlocked.show("web.service", "ActiveState") == "activating"
    assert reason(unlocked) == "locked_by_admin"
    unlocked.unlock()
    wait_for(lambda: unlocked.show("web.service", "ActiveState") == "inactive", "the service being done")
    assert unlocked.show("web.service", "Result") == "success"
    wait_for(lambda: hashlib.sha256(key).hexdigest() in unlocked.journal("web.service"), "what it printed")


def test_a_call_in_the_middle_of_a_restart_is_answered(unlocked: Machine) -> None:
    failed: list[str] = []
    done = threading.Event()

    def call() -> None:
        while not done.is_set():
            asked = unlocked.run(["unsealctl", "sign", "demo"], stdin=b"message", check=False)
            if asked.returncode != 0:
                failed.append(asked.stderr.decode(errors="replace"))

    thread = threading.Thread(target=call)
    thread.start()
    try:
        for _ in range(2):
            unlocked.run(["systemctl", "restart", UNIT])
    finally:
        done.set()
        thread.join()
    assert failed == []


def test_planned_reboots(unlocked: Machine) -> None:
    key = unlocked.key()
    for command in (["systemctl", "reboot"], ["shutdown", "-r", "now"]):
        unlocked.reboot(command)
        unlocked.wait_unit(UNIT)
        assert reason(unlocked) is None, command
        assert unlocked.key() == key
        assert not unlocked.exists(SEALED)
    assert "sealed for the next boot (reboot)" in unlocked.journal(UNIT)


@pytest.mark.promise(3)
def test_a_power_off_leaves_nothing_even_when_armed(unlocked: Machine) -> None:
    unlocked.ctl("arm", "--for", "1h")
    unlocked.power_off()
    unlocked.boot()
    unlocked.wait_unit(UNIT)
    assert reason(unlocked) == "unexpected_reboot"
    assert not unlocked.exists(SEALED)


def test_a_crash_of_the_machine(unlocked: Machine) -> None:
    unlocked.kill()
    unlocked.boot()
    unlocked.wait_unit(UNIT)
    assert reason(unlocked) == "unexpected_reboot"


@pytest.mark.promise(3)
def test_a_reboot_that_is_cancelled(unlocked: Machine) -> None:
    """Something holds the shutdown up; the administrator takes it back, and starts the daemon again."""
    unlocked.unit(
        "[Unit]\nBefore=unsealerd.service\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=true\n"
        "ExecStop=sh -c 'while test ! -e /run/go; do sleep 0.1; done'\nTimeoutStopSec=60\n",
        "slow.service",
    )
    unlocked.run(["systemctl", "start", "slow.service"])
    unlocked.run(["systemctl", "restart", UNIT])
    unlocked.run(["systemctl", "reboot", "--no-block"])
    wait_for(lambda: unlocked.show(UNIT, "ActiveState") == "inactive", "the daemon's end")
    assert unlocked.exists(SEALED)
    unlocked.run(["systemctl", "cancel"])
    unlocked.run(["touch", "/run/go"])
    unlocked.run(["systemctl", "start", UNIT])
    assert reason(unlocked) == "not_the_next_boot"
    assert not unlocked.exists(SEALED)
    unlocked.unlock()


def test_a_tpm_that_is_gone_does_not_hold_up_the_reboot(unlocked: Machine) -> None:
    """Sealing fails: the reboot goes on, and the reason is where a person looks."""
    assert unlocked.tpm is not None
    unlocked.tpm.stop()
    begun = len(unlocked.console())
    unlocked.run(["systemctl", "reboot"], check=False)
    assert unlocked.ended() == 133
    assert "nothing was sealed" in unlocked.console()[begun:]
    unlocked.boot()
    unlocked.wait_unit(UNIT)
    assert reason(unlocked) == "unexpected_reboot"
    assert "nothing was sealed" in unlocked.journal(UNIT)
    assert "seal_failed" in events(unlocked)
