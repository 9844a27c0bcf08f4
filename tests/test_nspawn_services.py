"""Services on a real systemd: credentials, the target, and who gets nothing. The package is installed as it is shipped."""

from collections.abc import Iterator

import pytest
from rigs.nspawn import Machine
from rigs.server import wait_for

pytestmark = pytest.mark.xdist_group("nspawn-services")

CREDENTIAL = """
[Unit]
Description={name}
{unit}
[Service]
# Type=simple would be active before it has its credentials.
Type=exec
{service}
LoadCredential=demo:/run/unsealerd/key/demo
ExecStart=/bin/sh -c 'sha256sum <"$CREDENTIALS_DIRECTORY/demo"; wc -c <"$CREDENTIALS_DIRECTORY/demo"; exec sleep infinity'
"""
RULE = """
[[key.demo.allow]]
unit = "{name}.service"
operations = ["read"]
"""
TARGET = "Requires=unsealerd-unlocked.target\nAfter=unsealerd-unlocked.target"


def service(machine: Machine, name: str, unit: str = "", options: str = "DynamicUser=yes") -> str:
    """A unit that prints the hash and the length of its credential, and stays."""
    machine.unit(CREDENTIAL.format(name=name, unit=unit, service=options), f"{name}.service")
    return f"{name}.service"


def printed(machine: Machine, unit: str) -> list[str]:
    """What the unit's own program has printed, in all boots."""
    lines = machine.text(
        "journalctl", "--quiet", "--output=cat", "--identifier=sh", f"--unit={unit}"
    ).splitlines()
    return [line.removesuffix("  -") for line in lines]


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with Machine() as machine:
        machine.tables = RULE.format(name="web") + RULE.format(name="early") + RULE.format(name="app@1")
        yield machine.boot().initialise()


@pytest.fixture
def unlocked(machine: Machine) -> Machine:
    if machine.status()["state"] != "unlocked":
        machine.unlock()
    return machine


def fingerprint(machine: Machine) -> str:
    """The hash of the key, as the console gets it."""
    return machine.run(["sh", "-c", "unsealctl get demo | sha256sum"]).stdout.decode().split()[0]


def test_a_unit_with_a_dynamic_user_gets_its_key_as_a_credential(unlocked: Machine) -> None:
    unit = service(unlocked, "web")
    unlocked.run(["systemctl", "start", unit])
    unlocked.wait_unit(unit)
    wait_for(lambda: fingerprint(unlocked) in printed(unlocked, unit), "the service's hash of its key")
    wait_for(lambda: "32" in printed(unlocked, unit), "the length of its key")
    assert unlocked.show(unit, "DynamicUser") == "yes"
    unlocked.run(["systemctl", "stop", unit])


def test_an_instance_of_a_template_is_a_unit_of_its_own(unlocked: Machine) -> None:
    service(unlocked, "app@")
    unlocked.run(["systemctl", "start", "app@1.service"])
    unlocked.run(["systemctl", "start", "--no-block", "app@2.service"])
    wait_for(lambda: fingerprint(unlocked) in printed(unlocked, "app@1.service"), "the hash")
    wait_for(lambda: "app@2.service" in unlocked.ctl("audit").stdout.decode(), "the denial on record")
    assert unlocked.show("app@2.service", "ActiveState") == "activating"
    unlocked.run(["systemctl", "stop", "app@1.service", "app@2.service"])


def test_a_unit_that_the_policy_does_not_name_never_starts_with_an_empty_key(unlocked: Machine) -> None:
    for seconds in (3, 30):
        unit = service(unlocked, "stranger", options=f"DynamicUser=yes\nTimeoutStartSec={seconds}")
        done = unlocked.run(["systemctl", "start", unit], check=False)
        assert done.returncode != 0
        unlocked.wait_unit(unit, "failed")
        assert printed(unlocked, unit) == [], "it ran without its key"
        if "stranger.service" in unlocked.ctl("audit").stdout.decode():
            return
    raise AssertionError("it was never denied its key")


@pytest.mark.promise(11)
def test_a_service_waits_while_locked_and_starts_by_itself_at_the_unlock(unlocked: Machine) -> None:
    before = fingerprint(unlocked)
    unlocked.ctl("lock")
    unit = service(unlocked, "early")
    unlocked.run(["systemctl", "start", "--no-block", unit])
    wait_for(lambda: unlocked.show(unit, "ActiveState") == "activating", "the service to be starting")
    assert printed(unlocked, unit) == []
    unlocked.unlock()
    unlocked.wait_unit(unit)
    wait_for(lambda: before in printed(unlocked, unit), "the service's hash of its key")
    unlocked.run(["systemctl", "stop", unit])


def test_the_target_waits_for_the_unlock_and_stays_when_the_host_is_locked_again(unlocked: Machine) -> None:
    unlocked.run(["systemctl", "stop", "unsealerd-unlocked.service", "unsealerd-unlocked.target"])
    unlocked.ctl("lock")
    unit = "after.service"
    unlocked.unit(f"[Unit]\n{TARGET}\n[Service]\nExecStart=/bin/sleep infinity\n", unit)
    unlocked.run(["systemctl", "start", "--no-block", unit])
    wait_for(lambda: unlocked.show("unsealerd-unlocked.service", "SubState") == "start", "the wait to begin")
    assert unlocked.show(unit, "ActiveState") == "inactive"
    unlocked.unlock()
    unlocked.wait_unit(unit)
    pid = unlocked.show(unit, "MainPID")
    unlocked.ctl("lock")
    assert unlocked.show("unsealerd-unlocked.target", "ActiveState") == "active"
    unlocked.run(["systemctl", "restart", "unsealerd.service"])
    unlocked.wait_unit("unsealerd.service")
    assert unlocked.show(unit, "MainPID") == pid, "a restart of the daemon restarted the service"
    unlocked.run(["systemctl", "stop", unit])


def test_a_boot_that_is_locked_reaches_everything_but_what_waits_for_keys(unlocked: Machine) -> None:
    machine = unlocked
    unit = service(machine, "web", TARGET + "\n[Install]\nWantedBy=multi-user.target")
    machine.run(["systemctl", "enable", unit])
    key = fingerprint(machine)
    ran = printed(machine, unit).count(key)
    machine.kill()
    machine.boot()
    machine.wait_unit("unsealerd.service")
    machine.wait_unit("unsealerd-gateway.service")
    assert machine.status()["lock_reason"] == "unexpected_reboot"
    assert "unexpected_reboot" in machine.show("unsealerd.service", "StatusText")
    assert machine.show(unit, "ActiveState") in ("inactive", "activating")
    machine.wait_unit("console-getty.service")  # or nobody can log in
    machine.unlock()
    machine.wait_unit(unit)
    wait_for(lambda: printed(machine, unit).count(key) == ran + 1, "the service's hash of its key")
    machine.wait_unit("multi-user.target")
