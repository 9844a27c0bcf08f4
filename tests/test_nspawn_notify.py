"""Under a real systemd: a locked host is told of, a rotation reaches the units, and the doctor finds its way."""

import json
import re
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rigs.nspawn import Machine
from rigs.server import wait_for

pytestmark = pytest.mark.xdist_group("nspawn-notify")

TEXTFILE = "/var/lib/prometheus/node-exporter/unsealerd.prom"
WEB = """
[Service]
ExecStart=/bin/sleep infinity
"""
RELOADING = """
[Service]
ExecStart=/bin/sleep infinity
ExecReload=/bin/sh -c 'echo took up the key'
"""
DOWN = """
[Service]
ExecStart=/bin/sleep infinity
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with Machine() as machine:
        machine.keys["demo"] = 'on_rotate = ["web.service", "reloading.service", "down.service"]\n'
        machine.tables = f'[notify]\ncommand = ["/usr/bin/env"]\n[metrics]\ntextfile = "{TEXTFILE}"\n'
        machine.offline(["mkdir", "-p", "/var/lib/prometheus/node-exporter"])
        machine.boot()
        machine.unit(WEB, "web.service")
        machine.unit(RELOADING, "reloading.service")
        machine.unit(DOWN, "down.service")
        machine.initialise()
        machine.wait_unit("unsealerd-watch.service")
        wait_for(lambda: machine.show("unsealerd-watch.service", "StatusText") == "unlocked", "the watcher")
        yield machine


def metric(machine: Machine, name: str) -> float | None:
    text = machine.read(TEXTFILE).decode()
    found = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    ]
    return found[0] if found else None


def told(machine: Machine, event: str) -> list[str]:
    """The environment of the administrator's command, as it was run for the event."""
    return [
        line
        for line in machine.journal(f"unsealerd-notify@{event}-*.service").splitlines()
        if line.startswith("UNSEALERD_")
    ]


def test_a_locked_host_is_told_of_everywhere(machine: Machine) -> None:
    assert not machine.exists("/run/motd.d/unsealerd")
    machine.ctl("lock")
    wait_for(lambda: "UNSEALERD_REASON=locked_by_admin" in told(machine, "locked"), "the command")
    host = machine.text("uname", "-n")
    sentence = f"{host}: keys are locked (locked_by_admin); services wait for an operator: unsealctl unlock"
    assert machine.read("/run/issue.d/unsealerd.issue").decode() == f"{sentence}\n"
    assert machine.read("/run/motd.d/unsealerd").decode() == f"{sentence}\n"
    wait_for(lambda: f"unsealerd: {sentence}" in machine.console(), "the console, which nspawn passes on")
    wait_for(lambda: f"UNSEALERD_HOST={host}" in told(machine, "locked"), "all lines of the command")
    assert machine.show("unsealerd-watch.service", "StatusText") == "locked: locked_by_admin"
    wait_for(lambda: metric(machine, "unsealerd_locked") == 1, "the metrics")
    # The command had no rights, and what it was handed is for root.
    assert not any("CREDENTIALS" in line for line in told(machine, "locked"))
    assert machine.text("stat", "-c", "%U %a", "/run/unsealerd-watch/event-locked-1.json") == "root 600"
    assert machine.show("unsealerd-notify@locked-1.service", "Result") == "success"

    machine.unlock()
    wait_for(lambda: bool(told(machine, "unlocked")), "the command")
    assert not machine.exists("/run/issue.d/unsealerd.issue")
    assert not machine.exists("/run/motd.d/unsealerd")
    wait_for(lambda: metric(machine, "unsealerd_locked") == 0, "the metrics")


def test_one_that_is_slow_to_be_told_swallows_no_other(machine: Machine) -> None:
    """Each lock and unlock is told, while the first are still being told, and however many there are."""
    before = len([line for line in told(machine, "locked") if line.startswith("UNSEALERD_EVENT=")])
    slow = '["/bin/sh", "-c", "env; sleep 15"]'
    tables = machine.tables
    assert '["/usr/bin/env"]' in tables
    machine.tables = tables.replace('["/usr/bin/env"]', slow)
    machine.configure()
    try:
        for _ in range(6):
            machine.ctl("lock")
            wait_for(
                lambda: machine.show("unsealerd-watch.service", "StatusText") == "locked: locked_by_admin",
                "the watcher",
            )
            machine.unlock()
            wait_for(
                lambda: machine.show("unsealerd-watch.service", "StatusText") == "unlocked", "the watcher"
            )
        wait_for(lambda: told(machine, "locked").count("UNSEALERD_EVENT=locked") == before + 6, "all of them")
    finally:
        machine.tables = tables
        machine.configure()


def test_a_rotation_reaches_the_units_that_run(machine: Machine) -> None:
    machine.run(["systemctl", "start", "web.service", "reloading.service"])
    before = {unit: machine.show(unit, "InvocationID") for unit in ("web.service", "reloading.service")}
    machine.ctl("key", "rotate", "demo")
    wait_for(
        lambda: machine.show("web.service", "InvocationID") not in ("", before["web.service"]), "the restart"
    )
    wait_for(lambda: "took up the key" in machine.journal("reloading.service"), "the reload")
    assert machine.show("reloading.service", "InvocationID") == before["reloading.service"]
    assert machine.show("down.service", "ActiveState") == "inactive"


def test_the_doctor_finds_the_units_in_order(machine: Machine) -> None:
    done = machine.ctl("--json", "doctor", check=False)
    found = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
    for check in (
        "host",
        "backup",
        "keys",
        "audit log",
        "tpm",
        "core dumps",
        "configuration",
        "files",
        "way to the files",
        "sockets",
        "daemon's unit",
        "watchdog",
        "fd store",
        "gateway's unit",
        "notification",
        "gateway",
    ):
        assert found[check]["verdict"] == "ok", found[check]
    # Nothing measures the boot of a container, and nobody was proven yet but by the unlock of this test.
    assert found["pcrs"]["verdict"] == "fail"


def test_after_a_planned_reboot_nobody_is_told_of_a_lock_that_is_none(machine: Machine) -> None:
    told_before = len(told(machine, "locked"))
    # Debian 12's kexec-tools would turn a reboot into a kexec; doctor says so, and the administrator masks them.
    machine.run(["systemctl", "mask", "kexec-load.service", "kexec.service"])
    machine.reboot()
    machine.wait_unit("unsealerd-watch.service")
    wait_for(lambda: machine.show("unsealerd-watch.service", "StatusText") == "unlocked", "the watcher")
    assert machine.status()["state"] == "unlocked"
    assert len(told(machine, "locked")) == told_before
    assert not machine.exists("/run/motd.d/unsealerd")
    doctor = json.loads(machine.ctl("--json", "doctor", check=False).stdout)
    (planned,) = (finding for finding in doctor["findings"] if finding["check"] == "planned reboot")
    assert planned["verdict"] == "ok", planned


def on_console(machine: Machine) -> int:
    """How often the watcher has told it there; a getty that starts later shows the same words, without the program's name."""
    return len(re.findall(r"unsealerd: \S+: keys are locked \(unexpected_reboot\)", machine.console()))


def test_after_a_power_cut_the_lock_is_told_once(machine: Machine) -> None:
    before = on_console(machine)
    machine.kill()
    machine.boot()
    wait_for(lambda: "UNSEALERD_REASON=unexpected_reboot" in told(machine, "locked"), "the command")
    machine.run(["systemctl", "restart", "unsealerd-watch.service"])
    machine.run(["systemctl", "restart", "unsealerd.service"])
    wait_for(
        lambda: machine.show("unsealerd-watch.service", "StatusText") == "locked: unexpected_reboot",
        "the watcher",
    )
    wait_for(lambda: metric(machine, "unsealerd_locked") == 1, "the metrics")
    wait_for(lambda: on_console(machine) > before, "the console")
    assert on_console(machine) == before + 1
    assert told(machine, "locked").count("UNSEALERD_REASON=unexpected_reboot") == 1
