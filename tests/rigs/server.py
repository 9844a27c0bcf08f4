"""A whole server: a software TPM, the daemon, the gateway and the command, as processes in a directory of their own."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rigs.manager import ServiceManager
from rigs.swtpm import SoftwareTpm
from unsealerd.client import Client
from unsealerd.core.age import X25519Identity

PROGRAMS = Path(sys.executable).parent
PATIENCE = 60.0  # seconds, for a machine that is busy with other tests

KEY_TABLE = """
[key.{name}]
owner = "test@example.com"
purpose = "to be tested"
{extra}
[[key.{name}.allow]]
user = "{uid}"
operations = ["read", "sign", "verify"]
"""


def wait_for(
    condition: Callable[[], bool], what: str, seconds: float = PATIENCE, *, pause: float = 0.01
) -> None:
    """Until the condition holds; fails the test if it does not in time. ``pause``: seconds between two looks."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for: {what}"
        select.select([], [], [], pause)


class Server:
    """Off at first. `tpm`: with a software TPM of its own. Directories and sockets are in a short path under /tmp."""

    def __init__(self, *, tpm: bool = True, keys: Sequence[str] = ("demo",)) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="uns"))
        self.state = self.base / "state"
        self.run_dir = self.base / "run"
        self.config = self.base / "unsealerd.toml"
        self.gateway_config = self.base / "gateway.toml"
        self.identity_file = self.base / "alice.txt"
        self.identity = X25519Identity.generate()
        self.identity_file.write_text(f"# a test\n{self.identity.encode()}\n")
        self.identity_file.chmod(0o600)
        self.tpm = SoftwareTpm(self.base / "tpm") if tpm else None
        self.operators = {"alice": str(self.identity.recipient)}
        self.keys = dict.fromkeys(keys, "")
        self.tables = ""
        self.pcrs = (7,)
        self.extra_environment: dict[str, str] = {}
        self.remembered = b""  # for tests: the key at some moment
        self.prefix: tuple[str, ...] = ()
        self.manager: ServiceManager | None = None
        self._daemon: subprocess.Popen[bytes] | None = None
        self.client = Client(self.run_dir, timeout=PATIENCE)
        self.address = ""
        self._gateway: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self.configure()
        self.configure_gateway("127.0.0.1:0", "[::1]:0")

    def configure(self, text: str | None = None) -> None:
        """Write the configuration; without `text`, the one that the attributes make."""
        if text is None:
            tcti = self.tpm.tcti if self.tpm is not None else "none"
            text = (
                f'[daemon]\nstate_dir = "{self.state}"\nruntime_dir = "{self.run_dir}"\n'
                f'[tpm]\ntcti = "{tcti}"\npcrs = {list(self.pcrs)}\n'
                + "".join(
                    f'[[operator]]\nname = "{name}"\nrecipient = "{recipient}"\n'
                    for name, recipient in self.operators.items()
                )
                + "".join(
                    KEY_TABLE.format(name=name, extra=extra, uid=os.getuid())
                    for name, extra in self.keys.items()
                )
                + self.tables
            )
        self.config.write_text(text)

    def configure_gateway(self, *listen: str) -> None:
        """Write the gateway's file."""
        self.gateway_config.write_text(
            f'listen = {json.dumps(listen)}\nstate_dir = "{self.state}"\nruntime_dir = "{self.run_dir}"\n'
        )

    # --- the daemon

    @property
    def log(self) -> Path:
        return self.base / "unsealerd.log"

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def pid(self) -> int:
        assert self._daemon is not None
        return self._daemon.pid

    @property
    def alive(self) -> bool:
        return self._daemon is not None and self._daemon.poll() is None

    def start(self) -> Self:
        """Power on, as far as it is not, and start the daemon; returns when it is ready."""
        self.launch()
        assert self.await_ready(), f"the daemon ended: {self.log_text()}"
        return self

    def await_ready(self) -> bool:
        """Wait until the daemon is ready or has ended; whether it lives."""
        wait_for(lambda: self._ready() or not self.alive, "the daemon")
        return self.alive

    def ended(self) -> int:
        """Wait for the daemon's end; its exit code, negative for a signal."""
        assert self._daemon is not None
        return self._daemon.wait(PATIENCE)

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the daemon without waiting for it."""
        if self.tpm is not None:
            self.tpm.start()
        self._starts = self.log_text().count("ready state=")
        manager = self.manager
        with self.log.open("ab") as log:
            self._daemon = subprocess.Popen(
                [
                    *self.prefix,
                    *(manager.prefix() if manager else ()),
                    PROGRAMS / "unsealerd",
                    "--config",
                    str(self.config),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.extra_environment, **(manager.environment if manager else {})},
                pass_fds=manager.pass_fds() if manager else (),
            )
        return self._daemon

    def _ready(self) -> bool:
        return self.log_text().count("ready state=") > self._starts

    def send(self, number: signal.Signals) -> None:
        assert self._daemon is not None
        self._daemon.send_signal(number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the daemon; returns its exit code."""
        assert self._daemon is not None
        self._daemon.send_signal(number)
        return self._daemon.wait(PATIENCE)

    def reset_tpm(self) -> None:
        assert self.tpm is not None
        self.tpm.reset()

    def reboot(self) -> Self:
        """As planned: seal, stop, reset, start."""
        self.ctl("seal")
        self.stop()
        self.reset_tpm()
        return self.start()

    def power_cut(self) -> Self:
        self.stop(signal.SIGKILL)
        if self.tpm is not None:
            self.tpm.kill()
        return self.start()

    # --- the command

    def ctl(
        self, *arguments: str, stdin: bytes = b"", expect: int | None = 0
    ) -> subprocess.CompletedProcess[bytes]:
        """`unsealctl`, as a process."""
        done = subprocess.run(
            [PROGRAMS / "unsealctl", "--config", str(self.config), *arguments],
            input=stdin,
            capture_output=True,
            check=False,
            timeout=PATIENCE,
            env={**os.environ, "UNSEALERD_HOSTS": str(self.base / "hosts.json"), "NO_COLOR": "1"},
        )
        if expect is not None:
            assert done.returncode == expect, f"{arguments}: {done}\n{self.log_text()}"
        return done

    def json(self, *arguments: str, expect: int | None = 0, stdin: bytes = b"") -> dict[str, Any]:
        answer = json.loads(self.ctl("--json", *arguments, expect=expect, stdin=stdin).stdout)
        assert isinstance(answer, dict)
        return answer

    def status(self) -> dict[str, Any]:
        return self.json("status")

    def assert_locked(self, reason: str) -> None:
        status = self.status()
        assert (status["state"], status["lock_reason"]) == ("locked", reason), status

    def assert_unlocked(self) -> None:
        status = self.status()
        assert status["state"] == "unlocked", status

    def unlock(self, *arguments: str, expect: int | None = 0) -> subprocess.CompletedProcess[bytes]:
        """By the operator at the console."""
        return self.ctl("unlock", "--local", "-i", str(self.identity_file), *arguments, expect=expect)

    def key(self, name: str = "demo") -> bytes:
        return self.client.read(name)

    def audit(self) -> list[dict[str, Any]]:
        whole, _, _ = (
            (self.state / "audit.jsonl").read_text().rpartition("\n")
        )  # the last may be half written
        return [json.loads(line) for line in whole.splitlines()]

    def events(self) -> list[str]:
        return [str(record["event"]) for record in self.audit()]

    # --- the gateway

    def start_gateway(self) -> str:
        """Returns HOST:PORT of its first listener; it listens on all of them."""
        listeners = len(tomllib.loads(self.gateway_config.read_text())["listen"])
        log = self.base / "gateway.log"
        seen = log.stat().st_size if log.exists() else 0
        with log.open("ab") as out:
            self._gateway = subprocess.Popen(
                [PROGRAMS / "unsealerd-gateway", "--config", str(self.gateway_config)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        process = self._gateway

        def addresses() -> list[str]:
            text = log.read_bytes()[seen:].decode(errors="replace")
            return [
                line.partition("listening on ")[2].split()[0]
                for line in text.splitlines()
                if "listening on " in line
            ]

        wait_for(lambda: len(addresses()) == listeners or process.poll() is not None, "the gateway")
        assert process.poll() is None, log.read_text()
        self.address = addresses()[0]
        return self.address

    @property
    def gateway_pid(self) -> int:
        assert self._gateway is not None
        return self._gateway.pid

    def stop_gateway(self) -> None:
        if self._gateway is not None:
            self._gateway.terminate()
            self._gateway.wait(PATIENCE)
            self._gateway = None

    # --- the end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        for process in (self._daemon, self._gateway):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
        if self.tpm is not None:
            self.tpm.kill()
            self.tpm.close()
        shutil.rmtree(self.base, ignore_errors=True)
