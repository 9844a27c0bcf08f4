"""Under a real systemd: who has broken into the gateway does not learn who may unlock, on no way that its user has."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from rigs.nspawn import CONFIG, GATEWAY_CONFIG, Machine
from rigs.server import wait_for

pytestmark = pytest.mark.xdist_group("nspawn-gateway")

GATEWAY = "unsealerd-gateway"
SALT = "c2FsdCBvZiBlcmlu"  # found anywhere, it is the passphrase operator's
TOKEN = "T0kenOfTheWebhook"
TABLES = f"""
[[operator]]
name = "erin"
recipient = "@ERIN@"
passphrase = "argon2id$v=19$m=65536,t=2,p=1${SALT}AAAAAA"
[notify]
webhook = "https://127.0.0.1:1/{TOKEN}"
[key.shared]
owner = "test@example.com"
purpose = "for a user without rights"
[[key.shared.allow]]
user = "daemon"
operations = ["read", "sign"]
"""
# Run by the gateway's user outside of every sandbox. Prints what it got hold of.
INTRUDER = """
import os, socket, subprocess, sys

CONFIG, SECRETS = "/etc/unsealerd/unsealerd.toml", sys.stdin.buffer.read().split()

def got(what, data):
    if any(secret in data for secret in SECRETS):
        print("learned from", what)

def read(path):
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            got(path, os.read(fd, 16 << 20))
        finally:
            os.close(fd)
    except OSError:
        return

def command(*argv):
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return
    got(" ".join(argv), done.stdout + done.stderr)

read(CONFIG)
# Another name for it.
for make in (os.link, os.symlink):
    try:
        make(CONFIG, "/tmp/name-of-the-gateway")
    except OSError:
        continue
    read("/tmp/name-of-the-gateway")
    os.unlink("/tmp/name-of-the-gateway")
# Other processes: their files, memory, environment, and their view of the disk.
for pid in filter(str.isdigit, os.listdir("/proc")):
    for name in ("environ", "cmdline", "mem", "root" + CONFIG, "cwd" + CONFIG, "cwd/etc/unsealerd/unsealerd.toml"):
        read(f"/proc/{pid}/{name}")
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            read(f"/proc/{pid}/fd/{fd}")
    except OSError:
        pass
# The service manager, its units and the programs that root runs.
command("systemctl", "--no-ask-password", "start", "unsealerd-notify@unlocked-1.service")
command("systemctl", "--no-ask-password", "reload", "unsealerd.service")
command("systemctl", "show", "unsealerd.service", "unsealerd-watch.service", "unsealerd-notify@unlocked-1.service")
command("systemd-run", "--no-ask-password", "--pipe", "--wait", "cat", CONFIG)
command("systemd-run", "--user", "--pipe", "--wait", "cat", CONFIG)
command("systemd-run", "--no-ask-password", "--pipe", "--wait", f"--property=LoadCredential=x:{CONFIG}", "cat", CONFIG)
command("journalctl", "--no-pager", "--output=verbose")
for words in (["status"], ["operator", "list"], ["doctor"], ["audit"], ["reload"], ["backup", "verify"], ["metrics"]):
    command("unsealctl", *words)
    command("unsealctl", "--json", "--config", CONFIG, *words)
command("unsealerd-gateway", "--config", CONFIG)
command("unsealerd", "--config", CONFIG)
# What the daemon answers to it.
for method in ("Unlock.GetStatus", "Admin.Status", "Admin.ListOperators"):
    try:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(5)
            peer.connect("/run/unsealerd/unlock")
            peer.sendall(b'{"method": "io.unsealerd.' + method.encode() + b'"}\\0')
            got(method, peer.recv(1 << 20))
    except OSError:
        pass
# Every file that it can read.
for top in ("/etc", "/run", "/var", "/tmp", "/root", "/home", "/dev/shm"):
    for directory, _, names in os.walk(top):
        for name in names:
            read(os.path.join(directory, name))
print("tried everything as", os.getuid())
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with Machine() as machine:
        machine.tables = TABLES.replace("@ERIN@", str(type(machine.identity).generate().recipient))
        machine.boot().initialise()
        for unit in ("unsealerd.service", "unsealerd-gateway.service", "unsealerd-watch.service"):
            machine.wait_unit(unit)
        yield machine


def doctor(machine: Machine) -> dict[str, dict[str, Any]]:
    """What it finds, by its checks; a container has not all that makes a server healthy."""
    answer = json.loads(machine.ctl("--json", "doctor", check=False).stdout)
    return {finding["check"]: finding for finding in answer["findings"]}


def attacked(machine: Machine, group: str) -> set[str]:
    """What the gateway's user says that it learned, with that group."""
    machine.write("/opt/intruder.py", INTRUDER)
    become = ["setpriv", f"--reuid={GATEWAY}", f"--regid={group}", "--clear-groups", "--"]
    # Not as arguments, which everybody can read.
    secrets = " ".join((machine.operators["alice"], SALT, TOKEN))
    done = machine.run([*become, "python3", "/opt/intruder.py"], stdin=secrets.encode())
    return set(done.stdout.decode().splitlines())


@pytest.mark.promise(8)
def test_the_gateways_user_learns_nothing_of_who_may_unlock(machine: Machine) -> None:
    end = f"tried everything as {machine.text('id', '--user', GATEWAY)}"
    assert attacked(machine, GATEWAY) == {end}
    # It looks in the right places: with the daemon's group it learns it at several.
    found = attacked(machine, "unsealerd")
    assert {end, f"learned from {CONFIG}", "learned from /tmp/name-of-the-gateway"} <= found
    assert any(line.startswith("learned from /proc/") for line in found)


@pytest.mark.promise(8)
def test_the_running_gateway_sees_one_file_of_the_configuration(machine: Machine) -> None:
    pid = machine.show("unsealerd-gateway.service", "MainPID")
    assert machine.text("ls", "-A", f"/proc/{pid}/root/etc/unsealerd") == "gateway.toml"
    assert machine.run(["test", "-e", f"/proc/{pid}/root{CONFIG}"], check=False).returncode != 0
    # An editor replaces a file; the gateway does not see the new one either.
    machine.run(["sh", "-c", f"cp -p {CONFIG} {CONFIG}.new && mv {CONFIG}.new {CONFIG}"])
    assert machine.text("ls", "-A", f"/proc/{pid}/root/etc/unsealerd") == "gateway.toml"


def test_everybody_else_works_on(machine: Machine) -> None:
    machine.run(["systemctl", "reload", "unsealerd.service"])
    machine.run(["unsealctl", "wait"], user="daemon")
    assert len(machine.run(["unsealctl", "get", "shared"], user="daemon").stdout) == 32
    assert machine.run(["unsealctl", "sign", "shared"], stdin=b"x", user="daemon").stdout
    machine.run(["systemctl", "start", "unsealerd-unlocked.target"])
    found = doctor(machine)
    for check in ("configuration", "gateway", "gateway's unit"):
        assert found[check]["verdict"] == "ok", found[check]


def test_the_doctor_sees_who_may_read_it(machine: Machine) -> None:
    for group, mode, who in ((GATEWAY, "0640", "the gateway"), ("unsealerd", "0644", "everybody")):
        machine.run(["chgrp", group, CONFIG])
        machine.run(["chmod", mode, CONFIG])
        found = doctor(machine)["configuration"]
        assert found["verdict"] == "fail"
        assert found["text"].startswith(who)
        machine.run(["sh", "-c", found["hint"]])
        assert machine.text("stat", "-c", "%U:%G %a", CONFIG) == "root:unsealerd 640"


def test_a_gateway_without_its_file_says_so_and_is_not_tried_again(machine: Machine) -> None:
    machine.run(["mv", GATEWAY_CONFIG, "/root/gateway.toml"])
    machine.run(["systemctl", "restart", "unsealerd-gateway.service"], check=False)
    machine.wait_unit("unsealerd-gateway.service", "failed")
    assert f"ConfigInvalid: {GATEWAY_CONFIG}: No such file" in machine.journal("unsealerd-gateway.service")
    machine.run(["mv", "/root/gateway.toml", GATEWAY_CONFIG])
    machine.run(["systemctl", "restart", "unsealerd-gateway.service"])
    machine.wait_unit("unsealerd-gateway.service")


# --- from a package that had one file for both


def as_earlier(machine: Machine, gateway: str) -> str:
    """What an earlier package left: one file, which both read, and dpkg knows of no other. The daemon runs on."""
    text = machine.read(CONFIG).decode() + gateway
    machine.write(CONFIG, text, 0o644)
    machine.run(["chgrp", GATEWAY, CONFIG])
    machine.run(["rm", "-f", GATEWAY_CONFIG])
    status = "/var/lib/dpkg/status"
    known = machine.read(status).decode()
    entry = re.sub(
        rf" {GATEWAY_CONFIG} \w+\n| {CONFIG} \w+\n",
        lambda match: f" {CONFIG} {'0' * 32}\n" if CONFIG in match[0] else "",
        known,
    )
    assert entry.count("gateway.toml") == 0
    machine.write(status, entry)
    machine.write("/var/lib/dpkg/info/unsealerd.conffiles", f"{CONFIG}\n")
    return text


def test_zy_an_upgrade_that_cannot_move_the_settings_changes_nothing(machine: Machine) -> None:
    pid = machine.show("unsealerd.service", "MainPID")
    right = machine.read(CONFIG)
    text = as_earlier(machine, "")
    machine.write(CONFIG, f'gateway.listen = ["127.0.0.1:8751"]\n{text}', 0o640)
    with pytest.raises(AssertionError, match=r"hint: write them to /etc/unsealerd/gateway\.toml"):
        machine.install("--force-confold")
    # The old program runs on, with its keys.
    assert machine.show("unsealerd.service", "MainPID") == pid
    assert len(machine.run(["unsealctl", "get", "shared"], user="daemon").stdout) == 32
    machine.write(CONFIG, right, 0o640)
    machine.run(["dpkg", "--configure", "-a"])
    machine.wait_unit("unsealerd.service")
    assert machine.status()["state"] == "unlocked"


def test_zz_an_upgrade_moves_the_gateways_settings(machine: Machine) -> None:
    pid = machine.show("unsealerd.service", "MainPID")
    key = machine.key()
    text = as_earlier(machine, '[gateway]\n# the inner net\nlisten = ["127.0.0.1:8751"]\n')
    said = machine.install("--force-confold")
    assert f"removed [gateway] from {CONFIG}" in said
    machine.wait_unit("unsealerd.service")
    wait_for(lambda: machine.show("unsealerd.service", "MainPID") != pid, "the new program")
    assert machine.status()["state"] == "unlocked"
    assert machine.key() == key
    assert machine.read(CONFIG).decode() == text.partition("[gateway]")[0]
    assert b'\n# the inner net\nlisten = ["127.0.0.1:8751"]\n' in machine.read(GATEWAY_CONFIG)
    for path, owner in ((CONFIG, "root:unsealerd 640"), (GATEWAY_CONFIG, "root:root 644")):
        assert machine.text("stat", "-c", "%U:%G %a", path) == owner
    machine.wait_unit("unsealerd-gateway.service")
    wait_for(
        lambda: "listening on 127.0.0.1:8751" in machine.journal("unsealerd-gateway.service"),
        "the gateway where it listened before",
    )
