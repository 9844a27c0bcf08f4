"""The real gateway as a process of its own, on ports that the kernel chooses."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Self

from unsealerd.gateway import identity
from unsealerd.operator.hosts import Host, make_host

PROGRAM = Path(__file__).resolve().with_name("gateway_program.py")
ROOT = PROGRAM.parents[2]
CONFIG = """
listen = {1}
state_dir = "{0}/state"
runtime_dir = "{0}/run"
"""


class GatewayProcess:
    """``directory`` gets ``state`` and ``run``; ``limits`` replace single figures of `Limits`."""

    def __init__(self, directory: Path, listen: tuple[str, ...] = ("[::1]:0",), **limits: float) -> None:
        self.directory = directory
        self.state_dir = directory / "state"
        self.runtime_dir = directory / "run"
        self.report_path = directory / "report.json"
        self.log: list[str] = []
        self.addresses: list[str] = []
        self._listen = listen
        self._limits = limits
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for path in (self.state_dir, self.runtime_dir):
            path.mkdir(exist_ok=True)
        if not (self.state_dir / "gateway" / identity.CERTIFICATE_NAME).exists():
            identity.create(self.state_dir / "gateway")
        self.certificate = identity.load_certificate(self.state_dir / "gateway").decode()

    def __enter__(self) -> Self:
        config = self.directory / "gateway.toml"
        config.write_text(CONFIG.format(self.directory, json.dumps(list(self._listen))))
        limits = [f"{name}={value}" for name, value in self._limits.items()]
        self.process = subprocess.Popen(
            [sys.executable, PROGRAM, config, self.report_path, *limits],
            env={**os.environ, "PYTHONPATH": os.fspath(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        while len(self.addresses) < len(self._listen):
            self.addresses.append(self.wait_for("listening on ").removeprefix("listening on "))
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGKILL)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def rss_kib(self) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))

    def host(self, name: str = "server", address: str | None = None) -> Host:
        """An operator's entry for this gateway."""
        return make_host(name, address or self.addresses[0], self.certificate, added=0)

    def wait_for(self, prefix: str, seconds: float = 60) -> str:
        """The next line of the log that begins so; those before it are dropped from the wait, not from `log`."""
        while True:
            line = self._lines.get(timeout=seconds)
            if line is None:
                raise AssertionError(f"the gateway ended: {self.log}")
            if line.startswith(prefix):
                return line

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal it, and wait for its end: the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(60)
        self._reader.join()
        if self.process.stderr is not None:
            self.process.stderr.close()
        return code

    def report(self) -> dict[str, list[str]]:
        """What the process saw of itself; after `stop`."""
        found: dict[str, list[str]] = json.loads(self.report_path.read_text())
        return found

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))
            self._lines.put(self.log[-1])
        self._lines.put(None)
