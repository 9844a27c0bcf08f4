"""A machine boots, and somebody at its console unlocks it with a passphrase. The package is installed as it is shipped."""

from collections.abc import Iterator

import pytest
from rigs.nspawn import Machine
from rigs.server import wait_for

from unsealerd.core.passphrase import Parameters, derive

pytestmark = pytest.mark.xdist_group("nspawn-ask-password")

PASSPHRASE = "correct horse battery staple"
CHEAP = "argon2id$v=19$m=65536,t=2,p=1$AAECAwQFBgcICQoLDA0ODw"
UNIT = "unsealerd-ask-password@erin.service"

# What a password agent does. https://systemd.io/PASSWORD_AGENTS/
AGENT = """
import pathlib, socket, sys
for path in pathlib.Path("/run/systemd/ask-password").glob("ask.*"):
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:  # answered, or given up, in this moment
        continue
    facts = dict(line.split("=", 1) for line in lines if "=" in line)
    if facts.get("Id") == "unsealerd:erin":
        if len(sys.argv) > 1:
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"+" + sys.argv[1].encode(), facts["Socket"])
        print(facts["PID"])
"""


def ask(machine: Machine, passphrase: str = "") -> str:
    """The request that is open, by the process that made it; it is answered if there is a passphrase."""
    answer = [passphrase] if passphrase else []
    return machine.run(["python3", "-c", AGENT, *answer]).stdout.decode().strip()


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    recipient = derive(memoryview(PASSPHRASE.encode()), Parameters.parse(CHEAP)).recipient
    with Machine() as machine:
        machine.tables = f'[[operator]]\nname = "erin"\nrecipient = "{recipient}"\npassphrase = "{CHEAP}"\n'
        machine.boot().initialise()
        machine.run(["systemctl", "enable", UNIT])
        machine.kill()
        yield machine.boot()


def test_the_console_is_asked_again_after_a_mistake_and_then_unlocks(machine: Machine) -> None:
    machine.wait_unit("unsealerd.service")
    assert machine.status()["lock_reason"] == "unexpected_reboot"
    wait_for(lambda: ask(machine) != "", "the question at the console")
    first = ask(machine, PASSPHRASE + "x")
    wait_for(lambda: ask(machine) not in ("", first), "the question again")
    assert machine.status()["state"] == "locked"
    ask(machine, PASSPHRASE)
    wait_for(lambda: machine.status()["state"] == "unlocked", "the unlock")
    wait_for(lambda: machine.show(UNIT, "ActiveState") == "inactive", "the end of the unit")
    assert machine.show(UNIT, "Result") == "success"
    assert ask(machine) == ""
    assert PASSPHRASE not in machine.text("journalctl", "--quiet", "--output=cat")
    record = [
        line
        for line in machine.read("/var/lib/unsealerd/audit.jsonl").decode().splitlines()
        if "erin" in line
    ]
    assert any("at the console" in line for line in record)


def test_a_machine_that_somebody_else_unlocks_asks_no_more(machine: Machine) -> None:
    machine.kill()
    machine.boot()
    machine.wait_unit("unsealerd.service")
    wait_for(lambda: ask(machine) != "", "the question at the console")
    machine.unlock()
    wait_for(lambda: machine.show(UNIT, "ActiveState") == "inactive", "the end of the unit")
    assert ask(machine) == ""
