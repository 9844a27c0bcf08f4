"""A server and its operator: what the scenarios ask of the machine, in the words of unsealerd."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rigs.server

from unsealerd.core.age import X25519Identity
from vm.errors import Broken
from vm.images import Image
from vm.machine import Machine

PROGRAMS = Path(sys.executable).parent
PATIENCE = 200.0  # seconds for anything to happen in a guest on a busy machine
_POLL = 0.3  # seconds between two looks into the guest


def check(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """As the other tests do. Raises `Broken`."""
    try:
        rigs.server.wait_for(condition, what, seconds, pause=_POLL)
    except AssertionError as err:
        raise Broken(str(err)) from err


class Server:
    """One server with its operator outside, who has the network and a private key, and nothing else."""

    def __init__(self, directory: Path, image: Image) -> None:
        self.directory = directory
        self.machine = Machine(directory / "m", image)
        self.release = image.release
        self.identity = directory / "alice.txt"
        self.key_of_operator = X25519Identity.generate()
        self.identity.touch(0o600)
        self.identity.write_text(f"{self.key_of_operator.encode()}\n")
        self.recipient = str(self.key_of_operator.recipient)
        self._hosts = directory / "hosts.json"

    # --- the server

    def run(self, shell: str, *, ok: bool = True) -> str:
        return self.machine.run(shell, ok=ok).out

    def ctl(self, arguments: str) -> dict[str, Any]:
        """unsealctl on the server, and the object that it prints."""
        found: dict[str, Any] = json.loads(self.run(f"unsealctl --json {arguments}"))
        return found

    def status(self) -> dict[str, Any]:
        return self.ctl("status")

    def state_text(self) -> str:
        """What the unit says about itself, once the daemon is ready."""
        wait_for(
            lambda: self.unit("unsealerd.service", "ActiveState") == "active", "unsealerd.service is active"
        )
        return self.unit("unsealerd.service", "StatusText")

    def unit(self, name: str, what: str) -> str:
        return self.run(f"systemctl show {name} -p {what} --value").strip()

    def unlocked(self) -> bool:
        return self.state_text().startswith("unlocked")

    def expect_locked(self, *reasons: str) -> str:
        """The reason. Fails if the host is not locked, or not for one of these reasons."""
        text = self.state_text()
        check(text.startswith("locked: "), f"the host should be locked, and says: {text}")
        reason = text.removeprefix("locked: ").split()[0].rstrip(":,")
        check(reason in reasons, f"locked for {reason} instead of {' or '.join(reasons)}")
        return reason

    def expect_unlocked(self) -> None:
        text = self.state_text()
        check(text.startswith("unlocked"), f"the host should be unlocked, and says: {text}")

    def sealed(self) -> bool:
        return self.run("test -e /var/lib/unsealerd/sealed.json && echo yes", ok=False) == "yes\n"

    def expect_no_sealed_copy(self) -> None:
        check(not self.sealed(), "a sealed copy is left on the disk")

    def keys(self) -> dict[int, str]:
        """A digest of each version that verifies."""
        lines = self.run("python3 /opt/vm/keys.py").splitlines()
        return {int(version): digest for version, _, digest in (line.partition(" ") for line in lines)}

    def expect_keys(self, before: dict[int, str]) -> None:
        now = self.keys()
        for version, digest in before.items():
            check(now.get(version) == digest, f"version {version} of the key is lost or another")

    def web_has(self, keys: dict[int, str]) -> None:
        """The service that waited for its key runs, and has the primary version."""
        wait_for(
            lambda: self.unit("web.service", "ActiveState") == "active", "web.service has its key and starts"
        )
        wait_for(lambda: self.run("cat /run/web/sum", ok=False) != "", "web.service has read its key", 30)
        check(self.run("cat /run/web/sum")[:16] in keys.values(), "web.service has another key")

    def kernel_to_served(self) -> float:
        """Seconds from the start of the kernel to the key in the hands of a service, by the guest's clock."""
        wait_for(
            lambda: self.unit("web.service", "ActiveState") == "active", "web.service has its key and starts"
        )
        return int(self.unit("web.service", "ActiveEnterTimestampMonotonic")) / 1e6

    def exec_to_ready(self) -> float:
        """Seconds from the exec of the daemon to its word that it is ready."""
        started = int(self.unit("unsealerd.service", "ExecMainStartTimestampMonotonic"))
        return (int(self.unit("unsealerd.service", "ActiveEnterTimestampMonotonic")) - started) / 1e6

    def resets(self) -> tuple[int, int]:
        """The TPM's count of its resets, and the counter of the backups."""
        tpm = self.status()["tpm"]
        check("reset_count" in tpm, f"the TPM says nothing of itself: {tpm}")
        return int(tpm["reset_count"]), int(tpm["counter"])

    # --- the operator

    def operator(self, *arguments: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        """unsealctl of this checkout, on the operator's machine, which is this one."""
        done = subprocess.run(
            [str(PROGRAMS / "unsealctl"), "--json", *arguments],
            env={**os.environ, "UNSEALERD_HOSTS": str(self._hosts), "NO_COLOR": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        if ok:
            check(
                done.returncode == 0,
                f"unsealctl {' '.join(arguments[:2])}: {done.returncode} {done.stderr[-600:]}",
            )
        return done

    def enrol(self) -> None:
        """Compare the fingerprint, as the operator does once."""
        words = " ".join(self.ctl("identity")["words"])
        self._hosts.unlink(missing_ok=True)
        self._reachable()
        self.operator("host", "add", "machine", f"127.0.0.1:{self.machine.port}", "--fingerprint", words)

    def _reachable(self) -> None:
        wait_for(
            lambda: self.unit("unsealerd-gateway.service", "ActiveState") == "active",
            "unsealerd-gateway.service is active",
        )

    def unlock(self, *options: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        """From outside, over the forwarded port."""
        self._reachable()
        known = json.loads(self.operator("host", "list").stdout)["hosts"]
        address = f"127.0.0.1:{self.machine.port}"
        if not known or known[0]["address"] != address:
            self.enrol()
        return self.operator(
            "unlock", "machine", "-i", str(self.identity), "--reason", "machine test", *options, ok=ok
        )

    def ready(self) -> None:
        """On, and unlocked: where each scenario begins, whatever the one before left behind."""
        if not self.machine.on:
            self.machine.start()
        self.run("systemctl start unsealerd unsealerd-gateway")
        if not self.unlocked():
            self.unlock("--accept-rollback")
        wait_for(self.unlocked, "the host is unlocked")
        self.run("systemctl reset-failed; systemctl start --no-block web ordered")
        wait_for(lambda: self.unit("web.service", "ActiveState") == "active", "web.service is active")
