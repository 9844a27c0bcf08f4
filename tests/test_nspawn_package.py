"""The package on a real systemd: what it installs, how the programs are shut in, upgrade, removal and purge."""

import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from rigs.nspawn import CONFIG, GATEWAY_CONFIG, Machine
from rigs.server import PROGRAMS, wait_for

pytestmark = pytest.mark.xdist_group("nspawn-package")

UNITS = Path(__file__).parents[1] / "systemd"
STATE = "/var/lib/unsealerd"
RUN = "/run/unsealerd"
DAEMONS = ("unsealerd.service", "unsealerd-gateway.service", "unsealerd-watch.service")

# Runs in place of a program, in the sandbox of its unit, and tries what an intruder would. Prints what it got away with.
PROBE = """
import ctypes, errno, mmap, os, socket, subprocess, sys

def attempt(what, action):
    try:
        action()
    except (OSError, ValueError, subprocess.SubprocessError):
        return
    print("allowed:", what)

def write(path):
    def action():
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    return action

def connect(family, address):
    def action():
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.settimeout(3)
            sock.connect(address)
    return action

def run_from(directory):
    def action():
        path = os.path.join(directory, "probe")
        with open(path, "w") as file:
            file.write("#!/bin/sh\\nexit 0\\n")
        os.chmod(path, 0o700)
        try:
            subprocess.run([path], check=True)
        finally:
            os.unlink(path)
    return action

def code_at_run_time():
    with mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC):
        pass

def new_namespace():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x10000000):  # CLONE_NEWUSER
        raise OSError(ctypes.get_errno(), "unshare")

def set_id():
    path = os.path.join(sys.argv[1] or "/tmp", "setid")
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        os.chmod(path, 0o4755)
    finally:
        if os.path.exists(path):
            os.unlink(path)

for place in "/etc /usr /opt/unsealerd /boot /home /root /var /var/log /dev/shm /run".split():
    attempt("write to " + place, write(place + "/x"))
attempt("look into /root", lambda: os.listdir("/root"))
attempt("read the shadow file", lambda: open("/etc/shadow").close())
if sys.argv[1]:
    attempt("run a program from " + sys.argv[1], run_from(sys.argv[1]))
attempt("run a program from /tmp", run_from("/tmp"))
attempt("code at run time", code_at_run_time)
attempt("a user namespace", new_namespace)
attempt("a set-id file", set_id)
attempt("a packet socket", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close())
attempt("a netlink socket", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close())
attempt("the kernel's log", lambda: os.close(os.open("/dev/kmsg", os.O_RDONLY)))
attempt("a kernel setting", write("/proc/sys/net/ipv4/ip_forward"))
attempt("another user's memory", lambda: os.close(os.open("/proc/1/mem", os.O_RDONLY)))
attempt("root", lambda: os.setuid(0))
attempt("its own limits", lambda: __import__("resource").setrlimit(__import__("resource").RLIMIT_CORE, (1, 1)))
if sys.argv[2] == "daemon":
    attempt("an internet socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).close())
else:
    attempt("the backup", lambda: os.stat("/var/lib/unsealerd/keyring.age"))
    attempt("the admin socket", connect(socket.AF_UNIX, "/run/unsealerd/admin"))
    attempt("the audit log", lambda: os.stat("/var/lib/unsealerd/audit.jsonl"))
    attempt("another process", lambda: os.stat("/proc/1"))
    attempt("who may unlock", lambda: os.stat("/etc/unsealerd/unsealerd.toml"))
    print("configuration:", os.listdir("/etc/unsealerd"))
print("tried everything")
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with Machine() as machine:
        yield machine.boot().initialise()


def owner_and_mode(machine: Machine, path: str) -> tuple[str, int]:
    owner, mode = machine.text("stat", "--format=%U:%G %f", path).split()
    return owner, stat.S_IMODE(int(mode, 16))


def test_verify_finds_nothing_wrong_with_the_installed_units(machine: Machine) -> None:
    units = machine.text("sh", "-c", "ls /usr/lib/systemd/system/unsealerd*").split()
    assert {unit.rpartition("/")[2] for unit in units} == {path.name for path in UNITS.iterdir()}
    verify = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=yes"]
    done = machine.run([*verify, *units], check=False)
    assert (done.returncode, done.stderr.decode()) == (0, "")
    machine.write("/run/wrong.service", "[Service]\nExecStart=/bin/true\nProtectSytem=strict\n")
    assert machine.run([*verify, "/run/wrong.service"], check=False).returncode != 0, (
        "it finds nothing at all"
    )


def test_the_units_run_as_their_users(machine: Machine) -> None:
    for unit in DAEMONS:
        machine.wait_unit(unit)
        assert machine.text("systemctl", "is-enabled", unit) == "enabled"
    for unit, user in (
        ("unsealerd.service", "unsealerd"),
        ("unsealerd-gateway.service", "unsealerd-gateway"),
    ):
        assert machine.text("ps", "-o", "user:32=", "-p", machine.show(unit, "MainPID")).strip() == user
        uid, _, shell = (machine.text("getent", "passwd", user).split(":")[at] for at in (2, 3, 6))
        assert int(uid) < 1000
        assert shell.endswith("nologin")
    assert machine.text("id", "--name", "--groups", "unsealerd-gateway") == "unsealerd-gateway"
    assert machine.show("unsealerd.service", "StatusText").startswith("unlocked")


@pytest.mark.parametrize(
    ("path", "owner", "mode"),
    [
        (CONFIG, "root:unsealerd", 0o640),
        (GATEWAY_CONFIG, "root:root", 0o644),
        (STATE, "unsealerd:unsealerd", 0o711),
        (f"{STATE}/keyring.age", "unsealerd:unsealerd", 0o600),
        (f"{STATE}/audit.jsonl", "unsealerd:unsealerd", 0o600),
        (f"{STATE}/gateway", "unsealerd-gateway:unsealerd-gateway", 0o700),
        (f"{STATE}/gateway/tls.key", "unsealerd-gateway:unsealerd-gateway", 0o600),
        (RUN, "unsealerd:unsealerd", 0o755),
        (f"{RUN}/keys", "unsealerd:unsealerd", 0o666),
        (f"{RUN}/admin", "unsealerd:unsealerd", 0o600),
        (f"{RUN}/unlock", "unsealerd:unsealerd-gateway", 0o660),
        ("/opt/unsealerd/bin/unsealerd", "root:root", 0o755),
    ],
)
def test_modes(machine: Machine, path: str, owner: str, mode: int) -> None:
    assert owner_and_mode(machine, path) == (owner, mode)


def test_nothing_of_the_package_can_be_written_by_anybody_but_root(machine: Machine) -> None:
    found = machine.text(
        "find", "/opt/unsealerd", "!", "-type", "l", "(", "-perm", "/022", "-o", "!", "-user", "root", ")"
    )
    assert found == ""
    assert machine.run(["cat", CONFIG], user="nobody", check=False).returncode != 0


@pytest.mark.parametrize(
    ("unit", "kind", "state"), [("unsealerd", "daemon", STATE), ("unsealerd-gateway", "gateway", "")]
)
def test_an_intruder_in_a_program_gets_out_of_nothing(
    machine: Machine, unit: str, kind: str, state: str
) -> None:
    text = machine.read(f"/usr/lib/systemd/system/{unit}.service").decode()
    left_out = re.compile(r"(Type|Exec(Start|Stop|Reload)|Restart|Watchdog|FileDesc|Cond|RuntimeD)")
    kept = [line for line in text.splitlines() if not left_out.match(line)]
    start = f"[Service]\nType=oneshot\nExecStart=/usr/bin/python3 /opt/probe.py '{state}' {kind}"
    machine.write("/opt/probe.py", PROBE)
    # /opt/probe.py is read, not executed.
    machine.unit("\n".join(kept).replace("[Service]", start), f"probe-{kind}.service")
    machine.run(["systemctl", "start", f"probe-{kind}.service"])

    def said() -> list[str]:
        return machine.text(
            "journalctl", "--quiet", "--output=cat", "--identifier=python3", f"--unit=probe-{kind}.service"
        ).splitlines()

    wait_for(lambda: "tried everything" in said(), "its last line in the journal")
    seen = [] if kind == "daemon" else ["configuration: ['gateway.toml']"]
    assert said() == [*seen, "tried everything"]


def test_the_daemon_is_alone_in_its_network_and_has_no_privilege(machine: Machine) -> None:
    pid = machine.show("unsealerd.service", "MainPID")
    status = dict(
        line.split(":\t", 1)
        for line in machine.text("cat", f"/proc/{pid}/status").splitlines()
        if ":\t" in line
    )
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    own, others = (machine.text("readlink", f"/proc/{number}/ns/net") for number in (pid, 1))
    assert own != others
    limits = machine.text("cat", f"/proc/{pid}/limits")
    assert re.search(r"Max core file size +0 +0", limits)
    # One execution: the environment was right at once.
    assert b"UNSEALERD_HYGIENE" not in machine.read(f"/proc/{pid}/environ")
    assert machine.status()["secret_memory"] == "memfd_secret"


def test_an_operator_reaches_the_gateway(machine: Machine) -> None:
    key = machine.key()
    machine.ctl("lock")
    words = machine.json("identity")["fingerprint"]
    environment = ["env", f"XDG_CONFIG_HOME={machine.base / 'alice'}", str(PROGRAMS / "unsealctl")]
    for arguments in (
        ["host", "add", "web1", "127.0.0.1:8750", "--fingerprint", words],
        ["unlock", "web1", "-i", str(machine.identity_file)],
    ):
        done = machine.outside([*environment, *arguments])
        assert done.returncode == 0, done.stderr.decode()
    assert machine.status()["state"] == "unlocked"
    assert machine.key() == key


def test_man_pages_and_completions_are_there(machine: Machine) -> None:
    for page in ("man1/unsealctl.1", "man8/unsealerd.8", "man5/unsealerd.toml.5"):
        text = subprocess.run(
            ["zcat"], input=machine.read(f"/usr/share/man/{page}.gz"), capture_output=True, check=True
        ).stdout
        assert b".TH" in text
        assert b"unsealerd" in text
    for path in (
        "bash-completion/completions/unsealctl",
        "zsh/vendor-completions/_unsealctl",
        "fish/vendor_completions.d/unsealctl.fish",
    ):
        assert b"_UNSEALCTL_COMPLETE" in machine.read(f"/usr/share/{path}")
    asked = "COMP_WORDS='unsealctl st' COMP_CWORD=1 _UNSEALCTL_COMPLETE=bash_complete unsealctl"
    assert machine.text("sh", "-c", asked) == "plain,status"


def test_an_upgrade_keeps_the_host_unlocked(machine: Machine) -> None:
    key, pid = machine.key(), machine.show("unsealerd.service", "MainPID")
    machine.run(["sh", "-c", f"echo '# a line of the administrator' >>{CONFIG}"])
    machine.install()
    machine.wait_unit("unsealerd.service")
    assert machine.show("unsealerd.service", "MainPID") != pid, "the old program still runs"
    assert machine.status()["state"] == "unlocked"
    assert machine.key() == key
    for unit in DAEMONS:
        machine.wait_unit(unit)
    assert machine.read(CONFIG).endswith(b"# a line of the administrator\n")
    assert owner_and_mode(machine, CONFIG) == ("root:unsealerd", 0o640)


def test_a_configuration_that_does_not_parse_is_named_and_costs_no_key(machine: Machine) -> None:
    key, right = machine.key(), machine.read(CONFIG)
    machine.write(CONFIG, right + b"\nwrong = \n", 0o640)
    assert machine.run(["systemctl", "reload", "unsealerd.service"], check=False).returncode != 0
    assert machine.show("unsealerd.service", "StatusText").startswith("unlocked"), (
        "a file that is refused changed something"
    )
    machine.run(["systemctl", "restart", "unsealerd.service"], check=False)
    wait_for(lambda: int(machine.show("unsealerd.service", "NRestarts")) > 0, "the daemon to be tried again")
    wait_for(lambda: f"unsealerd: {CONFIG}: not TOML" in machine.journal("unsealerd.service"), "the reason")
    machine.write(CONFIG, right, 0o640)
    machine.wait_unit("unsealerd.service")
    assert machine.status()["state"] == "unlocked"
    assert machine.key() == key


def test_zz_removal_keeps_the_state_and_purge_keeps_the_backup(machine: Machine) -> None:
    if machine.status()["state"] != "unlocked":
        machine.unlock()
    key = machine.key()
    machine.run(["dpkg", "--remove", "unsealerd"])
    for unit in DAEMONS:
        assert machine.show(unit, "ActiveState") in ("inactive", "failed")
    assert not machine.exists("/opt/unsealerd")
    assert not machine.exists("/usr/bin/unsealctl")
    assert machine.exists(CONFIG)
    assert machine.exists(f"{STATE}/keyring.age")
    machine.install()
    machine.wait_unit("unsealerd.service")
    machine.unlock()
    assert machine.key() == key
    done = machine.run(["dpkg", "--purge", "unsealerd"])
    assert b"/var/lib/unsealerd" in done.stdout
    assert machine.text("ls", "-A", "/etc/unsealerd") == "keyring.id"  # it belongs to the backup
    assert not machine.exists(RUN)
    assert machine.exists(f"{STATE}/keyring.age")
    left = machine.text("sh", "-c", "find /etc/systemd /opt /usr -name '*unsealerd*' || true")
    assert left == ""
    machine.run(["rm", "-r", STATE, "/etc/unsealerd"])
    machine.install()
    machine.wait_unit("unsealerd.service")
    assert machine.status()["state"] == "uninitialised"
    machine.run(["dpkg", "--purge", "unsealerd"])
    wait_for(lambda: not machine.exists(STATE), "nothing to be left where there was no keyring")
