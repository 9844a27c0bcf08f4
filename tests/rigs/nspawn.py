"""A machine with a real systemd: a container that boots, reboots and loses power, with the package installed.

systemd-nspawn over an overlay of a cached tree. Everything it needs while it runs (mounts, processes, control group) ends
with the process, also if the test itself is killed. What is real there and what is not: units, sockets, credentials, the file
descriptor store, shutdown and most of the sandbox are; controllers of control groups and devices are not.
"""

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rigs.package import Layers, installed
from rigs.server import KEY_TABLE, PATIENCE, wait_for
from rigs.swtpm import RigError, SoftwareTpm
from unsealerd.core.age import X25519Identity

CONFIG = "/etc/unsealerd/unsealerd.toml"
GATEWAY_CONFIG = "/etc/unsealerd/gateway.toml"
_REBOOT = 133  # the exit code of nspawn when the machine inside reboots
_TPM_INSIDE = "/mnt/tpm"
_NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd")
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/root", "TERM": "dumb"}
# Runs in a mount namespace of its own: the overlay is gone when the last process in it is.
_START = """
set -e
echo $$ > "$CGROUP/cgroup.procs"
mount -t overlay overlay -o "$OVERLAY" "$ROOT"
exec systemd-nspawn --quiet --boot --directory="$ROOT" --machine="$NAME" --register=no --keep-unit --private-network \
    --notify-ready=yes --console=read-only --link-journal=no --resolv-conf=off --timezone=off \
    --system-call-filter="memfd_secret" "$@"
"""
# The mounts are the process's own, and it ends with the test.
_OWN_MOUNTS = ("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private")
_OFFLINE = 'set -e; mount -t overlay overlay -o "$OVERLAY" "$ROOT"; exec chroot "$ROOT" "$@"'


class Machine:
    """Off at first. `tpm`: with a software TPM of its own. `package`: install it (the one of this tree), or not."""

    def __init__(self, *, tpm: bool = True, package: bool = True, keys: Sequence[str] = ("demo",)) -> None:
        if os.getuid() != 0:
            raise RigError("machines need root: run the tests as root")
        self.base = Path(tempfile.mkdtemp(prefix="unsm"))
        try:
            self._layers: Layers = installed(package=package)
            for name in ("upper", "work", "root"):
                (self.base / name).mkdir()
            self.tpm = SoftwareTpm(self.base / "tpm") if tpm else None
            self.identity = X25519Identity.generate()
            self.identity_file = self.base / "alice.txt"
            self.identity_file.write_text(f"# a test\n{self.identity.encode()}\n")
            self.identity_file.chmod(0o600)
            self._cgroup = _cgroup_root() / f"unsealerd-{self.base.name}"
            self._cgroup.mkdir()
        except BaseException:
            shutil.rmtree(self.base, ignore_errors=True)
            raise
        self.operators = {"alice": str(self.identity.recipient)}
        self.keys = dict.fromkeys(keys, "")
        """Key name: more lines for its table. Readable by root of the machine until `configure` says otherwise."""
        self.tables = ""
        """TOML that goes to the end of the configuration."""
        self._process: subprocess.Popen[bytes] | None = None
        self._notify: socket.socket | None = None
        self._leader = 0

    # --- power

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def leader(self) -> int:
        """The process number of the machine's PID 1, outside."""
        assert self.alive, f"the machine is off; its console:\n{self.console()[-4000:]}"
        return self._leader

    def boot(self, until: str = "basic.target") -> Self:
        """Power on; returns when the unit `until` is active. (multi-user.target waits for services that wait for keys.)"""
        self._require_off()
        arguments: list[str] = []
        if self.tpm is not None:
            self.tpm.start()
            self._open_tpm()
            arguments.append(f"--bind={self.tpm.socket.parent}:{_TPM_INSIDE}")
        self._notify = _notify_socket(self.base / "notify")
        with (self.base / "console.log").open("ab") as console:
            self._process = subprocess.Popen(
                [*_OWN_MOUNTS, "sh", "-c", _START, "machine", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env=self._environment(),
            )
        self._leader = self._await_leader()
        wait_for(lambda: self._is_active(until) or not self.alive, f"{until} of the machine")
        assert self.alive, f"the machine ended:\n{self.console()[-4000:]}"
        return self

    def reboot(self, command: Sequence[str] = ("systemctl", "reboot"), until: str = "basic.target") -> Self:
        """A planned reboot, as `command` starts it: returns when the machine is up again, its TPM reset."""
        self.run(command, check=False)  # the connection may end with the machine
        code = self.ended()
        assert code == _REBOOT, f"the machine did not reboot, it ended with {code}:\n{self.console()[-4000:]}"
        return self.boot(until)

    def power_off(self, command: Sequence[str] = ("systemctl", "poweroff")) -> None:
        """An orderly end, and no boot after it."""
        self.run(command, check=False)
        code = self.ended()
        assert code == 0, f"the machine ended with {code}:\n{self.console()[-4000:]}"

    def ended(self) -> int:
        """Wait for the machine's end; then the TPM has seen an orderly shutdown. Gives the exit code: 133 is a reboot."""
        assert self._process is not None
        code = self._process.wait(PATIENCE)
        if self.tpm is not None:
            self.tpm.stop()
        self._forget()
        return code

    def kill(self) -> None:
        """Power cut: nothing in the machine runs any more, and the TPM lost its power too. `boot` may follow."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE)
        if self.tpm is not None:
            self.tpm.kill()
        self._forget()

    def close(self) -> None:
        """Power off without a word, and leave nothing behind."""
        self.kill()
        if self.tpm is not None:
            self.tpm.close()
        _remove_cgroup(self._cgroup)
        self._layers.close()
        shutil.rmtree(self.base, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(f"the end of the machine's console:\n{self.console()[-4000:]}")
            with contextlib.suppress(Exception):
                error.add_note(f"the end of its journal:\n{self.journal()[-6000:]}")
        self.close()

    # --- inside

    def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", check: bool = True, user: str | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program in the machine as root (or `user`), outside of every unit. `check`: fail unless it exits with 0."""
        prefix = (
            [] if user is None else ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--"]
        )
        done = subprocess.run(
            ["nsenter", f"--target={self.leader}", *_NAMESPACES, *prefix, *argv],
            input=stdin,
            capture_output=True,
            timeout=2 * PATIENCE,
            env=_ENVIRONMENT,
        )
        if check and done.returncode != 0:
            raise AssertionError(
                f"{shlex.join(argv)} ended with {done.returncode}\n"
                f"stdout: {done.stdout.decode(errors='replace')}\nstderr: {done.stderr.decode(errors='replace')}"
            )
        return done

    def text(self, *argv: str) -> str:
        """What a program in the machine prints, without the last newline."""
        return self.run(argv).stdout.decode(errors="replace").rstrip("\n")

    def offline(self, argv: Sequence[str], *, stdin: bytes = b"") -> bytes:
        """Run a program on the file system of the machine while it is off: no service manager, no /proc."""
        self._require_off()
        return subprocess.run(
            [*_OWN_MOUNTS, "sh", "-c", _OFFLINE, "offline", *argv],
            input=stdin,
            capture_output=True,
            check=True,
            timeout=2 * PATIENCE,
            env=self._environment(),
        ).stdout

    def write(self, path: str, content: str | bytes, mode: int = 0o644) -> None:
        """Make a file in the machine, on or off, and the directories on its way. It belongs to root."""
        data = content.encode() if isinstance(content, str) else content
        script = f'mkdir -p "$(dirname "$1")" && cat > "$1" && chmod {mode:o} "$1"'
        argv = ["sh", "-c", script, "write", path]
        if self.alive:
            self.run(argv, stdin=data)
        else:
            self.offline(argv, stdin=data)

    def read(self, path: str) -> bytes:
        """A file of the machine, on or off."""
        return self.run(["cat", path]).stdout if self.alive else self.offline(["cat", path])

    def install(self, *options: str) -> str:
        """Install the package again, as an upgrade to a newer one would; what dpkg says."""
        assert self._layers.package is not None
        self.write("/run/package.deb", self._layers.package.read_bytes())
        # The disk of a test may be slow, and loses nothing.
        return self.text("dpkg", "--force-unsafe-io", *options, "--install", "/run/package.deb")

    def exists(self, path: str) -> bool:
        return self.run(["test", "-e", path], check=False).returncode == 0

    def outside(self, argv: Sequence[str], *, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run a program of this host in the machine's network: an operator's, for whom 127.0.0.1:8750 is the gateway."""
        return subprocess.run(
            ["nsenter", f"--target={self.leader}", "--net", *argv],
            input=stdin,
            capture_output=True,
            timeout=2 * PATIENCE,
        )

    # --- the service manager

    def unit(self, text: str, name: str) -> None:
        """Write a unit file, and have the service manager read it."""
        self.write(f"/etc/systemd/system/{name}", text)
        if self.alive:
            self.run(["systemctl", "daemon-reload"])

    def show(self, unit: str, field: str) -> str:
        """One property of a unit, as `systemctl show` has it."""
        return self.text("systemctl", "show", "--value", f"--property={field}", unit)

    def wait_unit(self, unit: str, state: str = "active", seconds: float = PATIENCE) -> None:
        """Until the unit's ActiveState is `state`; fails with its status and journal."""
        try:
            wait_for(lambda: self.show(unit, "ActiveState") == state, f"{unit} to be {state}", seconds)
        except AssertionError as err:
            status = self.run(["systemctl", "status", "--no-pager", "--full", unit], check=False).stdout
            err.add_note(status.decode(errors="replace"))
            err.add_note(self.journal(unit)[-4000:])
            raise

    def journal(self, unit: str | None = None) -> str:
        """The messages of a unit, or of all, in all boots."""
        argv = ["journalctl", "--no-pager", "--quiet", "--output=cat"]
        return self.run(argv + ([] if unit is None else [f"--unit={unit}"]), check=False).stdout.decode(
            errors="replace"
        )

    def console(self) -> str:
        """What the machine has printed on its console, in all boots."""
        path = self.base / "console.log"
        return path.read_text(errors="replace") if path.exists() else ""

    # --- unsealerd in it

    @property
    def tcti(self) -> str:
        return "none" if self.tpm is None else f"swtpm:path={_TPM_INSIDE}/{self.tpm.socket.name}"

    def configure(self, text: str | None = None) -> None:
        """Write the configuration; without `text`, the one that `operators`, `keys` and `tables` make. No reload."""
        if text is None:
            text = (
                f'[tpm]\ntcti = "{self.tcti}"\n'
                + "".join(
                    f'[[operator]]\nname = "{name}"\nrecipient = "{recipient}"\n'
                    for name, recipient in self.operators.items()
                )
                + "".join(
                    KEY_TABLE.format(name=name, extra=extra, uid=0) for name, extra in self.keys.items()
                )
                + self.tables
            )
        self.write(CONFIG, text, 0o640)  # the group is the one that the package has given it

    def initialise(self) -> Self:
        """Configure, restart the daemon and initialise: unlocked, and the gateway runs."""
        self.configure()
        self.run(["systemctl", "restart", "unsealerd.service"])
        self.ctl("init")
        self.run(["systemctl", "restart", "unsealerd-gateway.service"])
        return self

    def ctl(
        self, *arguments: str, stdin: bytes = b"", check: bool = True
    ) -> subprocess.CompletedProcess[bytes]:
        """unsealctl in the machine, as root."""
        return self.run(["unsealctl", *arguments], stdin=stdin, check=check)

    def json(self, *arguments: str) -> dict[str, Any]:
        answer = json.loads(self.ctl("--json", *arguments).stdout)
        assert isinstance(answer, dict)
        return answer

    def status(self) -> dict[str, Any]:
        return self.json("status")

    def unlock(self) -> None:
        """Unlock at the console, with the identity of alice."""
        self.write("/run/alice.txt", self.identity_file.read_bytes(), 0o600)
        self.ctl("unlock", "--local", "-i", "/run/alice.txt")

    def key(self, name: str = "demo") -> bytes:
        return self.ctl("get", name).stdout

    # --- below

    def _environment(self) -> dict[str, str]:
        lower = ":".join(str(layer) for layer in self._layers.paths)
        return {
            "PATH": os.environ.get("PATH", _ENVIRONMENT["PATH"]),
            "ROOT": str(self.base / "root"),
            "OVERLAY": f"lowerdir={lower},upperdir={self.base / 'upper'},workdir={self.base / 'work'}",
            "NAME": self.base.name.replace("_", "x"),
            "CGROUP": str(self._cgroup),
            "NOTIFY_SOCKET": str(self.base / "notify"),
            "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",  # systemd 257 refuses the older ones
        }

    def _require_off(self) -> None:
        assert not self.alive, "the machine is on"

    def _open_tpm(self) -> None:
        """Let the machine's users have what the group tss has of a device: here everybody."""
        assert self.tpm is not None
        self.tpm.socket.parent.chmod(0o755)
        self.tpm.socket.chmod(0o666)
        self.tpm.control.chmod(0o666)

    def _await_leader(self) -> int:
        assert self._notify is not None
        deadline = time.monotonic() + PATIENCE
        while self.alive and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                for line in self._notify.recv(4096).decode().splitlines():
                    if line.startswith("X_NSPAWN_LEADER_PID="):
                        return int(line.partition("=")[2])
        raise RigError(f"the machine did not start:\n{self.console()[-4000:]}")

    def _is_active(self, unit: str) -> bool:
        if not self.alive:
            return False
        return self.run(["systemctl", "is-active", "--quiet", unit], check=False).returncode == 0

    def _forget(self) -> None:
        self._process = None
        if self._notify is not None:
            self._notify.close()
            self._notify = None
        _empty_cgroup(self._cgroup)
        with contextlib.suppress(OSError):  # nspawn leaves it where /run is not a tmpfs
            (Path("/run/systemd/nspawn/propagate") / self.base.name.replace("_", "x")).rmdir()


def _notify_socket(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    channel.bind(str(path))
    channel.settimeout(0.2)
    return channel


def _cgroup_root() -> Path:
    """Where the unified hierarchy is mounted."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if right.startswith("cgroup2 "):
            return Path(left.split()[4])
    raise RigError("no unified control group hierarchy is mounted")


def _empty_cgroup(path: Path) -> None:
    """Kill what is left in it, and remove what the machine made in it: it is itself there for the next boot."""
    if not path.exists():
        return
    with contextlib.suppress(OSError):
        (path / "cgroup.kill").write_text("1")

    def emptied() -> bool:
        for directory, _, _ in os.walk(path, topdown=False):
            if directory != str(path):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
        return not any(entry.is_dir() for entry in path.iterdir())

    wait_for(emptied, f"the processes in {path} to end")


def _remove_cgroup(path: Path) -> None:
    def removed() -> bool:
        with contextlib.suppress(FileNotFoundError):
            try:
                path.rmdir()
            except OSError:
                return False
        return True

    _empty_cgroup(path)
    wait_for(removed, f"{path} to be empty")
