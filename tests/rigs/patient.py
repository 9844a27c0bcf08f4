"""A server for ``unsealctl doctor``: healthy at first, in a directory; each fact can be made a bad one."""

import contextlib
import copy
import os
import socket
import ssl
import time
from pathlib import Path
from typing import Any, Self

from rigs.stub_daemon import StubDaemon
from unsealerd.cli.app import App
from unsealerd.cli.doctor import examine
from unsealerd.cli.doctor.finding import Finding
from unsealerd.cli.doctor.machine import Machine
from unsealerd.core.auditchain import GENESIS, link
from unsealerd.gateway import identity

DAY = 86400
SECURE_BOOT = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
UNIT = {"LoadState": "loaded", "UnitFileState": "enabled", "ActiveState": "active", "NeedDaemonReload": "no"}
SYSTEMCTL = """#!/bin/sh
shift 3
first=1
for unit in "$@"; do
    [ $first = 1 ] || echo
    first=0
    cat "{units}/$unit" 2>/dev/null || printf 'LoadState=not-found\\nActiveState=inactive\\n'
done
exit {code}
"""


def status(now: int) -> dict[str, Any]:
    return {
        "state": "unlocked",
        "lock_reason": None,
        "tpm": {
            "tcti": "device:/dev/tpmrm0",
            "error": None,
            "manufacturer": "IBM",
            "firmware": "1.2",
            "parent": "persistent",
            "in_lockout": False,
            "lockout_counter": 0,
            "counter": 12,
            "counter_behind": False,
            "pcr_values": {"7": "5a" * 32},
        },
        "operators": [{"name": "alice", "proven": now - DAY}, {"name": "bob", "proven": now - 2 * DAY}],
        "backup": {"path": "/x", "written": now - 100},
        "keyring": {
            "id": "5a" * 32,
            "file": "/etc/unsealerd/keyring.id",
            "pinned": "5a" * 32,
            "error": None,
            "foreign": None,
        },
        "secret_memory": "memfd_secret",
        "memory": {"kept": True, "why": None},
        "warnings": [],
        "pid": os.getpid(),
    }


def key(name: str = "web", **changes: object) -> dict[str, Any]:
    return {
        "name": name,
        "declared": True,
        "rotate_every": 30 * DAY,
        "overlap": 7 * DAY,
        "next_rotation": int(time.time()) + DAY,
        "allow": [{"unit": "web.service"}],
        "versions": [{"version": 1, "state": "primary"}],
        **changes,
    }


class Patient(StubDaemon):
    """`status`, `keys`, `units` and `audit` are what the daemon, systemd and the audit log say, until `examine`."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.state = directory / "state"
        self.run = directory / "run"
        self.bin = directory / "bin"
        self.config = directory / "unsealerd.toml"
        self.gateway_config = directory / "gateway.toml"
        for path in (self.root, self.state, self.run, self.bin):
            path.mkdir()
        super().__init__(self.run)
        self.state.chmod(0o711)
        self.port = 0
        self.status = status(int(time.time()))
        self.keys_listed: list[dict[str, Any]] = [key()]
        self.backup: Any = {"generation": 3}
        self.audit = ["start", "unseal", "unsealed"]
        self.reason = "pcr_mismatch"
        self.audit_size, self.audit_keep = "1M", 1
        self.tables = '[notify]\ncommand = ["/bin/true"]\n'
        self.systemctl_code = 0
        self.units: dict[str, dict[str, str]] = {
            "unsealerd.service": {
                **UNIT,
                "WatchdogUSec": "30s",
                "FileDescriptorStoreMax": "16",
                "ExecStop": "{ path=/usr/bin/unsealctl ; argv[]=/usr/bin/unsealctl seal --at-shutdown ; }",
            },
            "unsealerd-gateway.service": dict(UNIT),
            "unsealerd-watch.service": dict(UNIT),
            "unsealerd-unlocked.target": dict(UNIT),
            "unsealerd-notify@locked.service": {**UNIT, "ActiveState": "inactive"},
            "web.service": dict(UNIT),
        }
        self._files()

    def __enter__(self) -> Self:
        super().__enter__()
        self.listen("unlock")
        (self.run / "unlock").chmod(0o660)
        self.serve_tls(self.state / "gateway")
        return self

    def serve_tls(self, directory: Path) -> None:
        """Stand for the gateway, with the key of that directory, at a new port."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / identity.CERTIFICATE_NAME, directory / identity.KEY_NAME)
        context.set_alpn_protocols(["h2"])
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]

        def greet(peer: socket.socket) -> None:
            with contextlib.suppress(OSError), context.wrap_socket(peer, server_side=True) as connection:
                connection.recv(1)

        with self._lock:
            self._open.append(listener)
        self._spawn(self._accept, listener, greet)

    def _files(self) -> None:
        self.put("proc/swaps", "Filename Type Size Used Priority\n")
        self.put("proc/sys/kernel/core_pattern", "core\n")
        self.put(
            f"proc/{os.getpid()}/limits",
            "Max core file size        0                    0                    bytes\n",
        )
        self.put(SECURE_BOOT, b"\x06\0\0\0\x01")
        self.put("run/systemd/timesync/synchronized", "")
        self.put("run/systemd/system/x", "")
        for name in ("keyring.age", "tpm.json"):
            (self.state / name).touch(0o600)
        identity.create(self.state / "gateway")

    def put(self, name: str, content: str | bytes) -> None:
        """A file of the machine."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def write(self) -> None:
        """Put everything where it is looked for."""
        self.config.write_text(
            f'[daemon]\nstate_dir = "{self.state}"\nruntime_dir = "{self.run}"\n'
            '[[operator]]\nname = "alice"\nrecipient = "age1a"\ngroups = ["ops"]\n'
            '[[operator]]\nname = "bob"\nrecipient = "age1b"\n'
            '[key.web]\nowner = "a"\npurpose = "b"\non_rotate = ["web.service"]\n'
            f'[audit]\nmax_size = "{self.audit_size}"\nkeep = {self.audit_keep}\n' + self.tables
        )
        self.config.chmod(0o640)
        self.gateway_config.write_text(
            f'listen = ["0.0.0.0:{self.port}"]\nstate_dir = "{self.state}"\nruntime_dir = "{self.run}"\n'
        )
        self.gateway_config.chmod(0o644)
        id_file = self.config.with_name("keyring.id")
        id_file.write_text(f"unsealerd-keyring-id-v1 {'5a' * 32}\n")
        id_file.chmod(0o644)
        (self.run / "admin").chmod(0o600)
        previous, lines = GENESIS, []
        for number, event in enumerate(self.audit, 1):
            line, previous = link(
                {"event": event, "time": "2026-01-01T00:00:00.000Z", "reason": self.reason}, previous, number
            )
            lines.append(line)
        (self.state / "audit.jsonl").write_bytes(b"".join(lines))
        (self.state / "audit.jsonl").chmod(0o600)
        units = self.bin / "units"
        units.mkdir(exist_ok=True)
        for name, properties in self.units.items():
            (units / name).write_text("".join(f"{label}={value}\n" for label, value in properties.items()))
        (self.bin / "systemctl").write_text(SYSTEMCTL.format(units=units, code=self.systemctl_code))
        (self.bin / "systemctl").chmod(0o755)
        self.answers = {
            "Admin.Status": {"status": copy.deepcopy(self.status)},
            "Admin.ListKeys": {"keys": self.keys_listed},
            "Admin.VerifyBackup": self.backup,
        }

    def examine(self) -> list[Finding]:
        """With the facts as they are now. What is wrong of the files is for the caller to change between."""
        app = App()
        app.config_path = self.config
        return examine(app, Machine(self.root))
