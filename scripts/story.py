"""The story that `scripts/demo` plays. Every step is checked; the exit code is 0 only if all of them held."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, NoReturn

from unsealerd.cli.edge import Exit

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = Path(sys.executable).parent
PATIENCE = 30  # seconds for anything to happen
MESSAGE = b"user=4711; expires=2027-01-01"

_tty = sys.stdout.isatty()


def _style(code: str, text: str) -> str:
    return f"\033[{code}m{text}\033[0m" if _tty else text


class Story:
    """Prints what happens and why, runs the programs, and stops at the first thing that is not as it should be."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.state = base / "state"
        self.config = base / "unsealerd.toml"
        self.gateway_config = base / "gateway.toml"
        self.hosts = base / "operator" / "hosts.json"
        self.tpm_socket = base / "tpm"
        self.chapter = 0
        self.running: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "UNSEALERD_HOSTS": str(self.hosts), "NO_COLOR": "1"}

    # --- telling

    def begin(self, title: str, why: str) -> None:
        self.chapter += 1
        print(f"\n{_style('1', f'{self.chapter}. {title}')}")
        print(textwrap.fill(why, 100, initial_indent="   ", subsequent_indent="   "))

    def check(self, holds: bool, what: str, seen: object = "") -> None:
        if not holds:
            self.fail(f"{what} — {seen}")
        print(f"   {_style('32', '✓')} {what}")

    def fail(self, what: str) -> NoReturn:
        print(f"   {_style('31', '✗')} {what}")
        for log in sorted(self.base.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}")
        raise SystemExit(1)

    # --- running

    def run(
        self, *command: str, stdin: bytes = b"", show: bool = True, expect: int = 0
    ) -> subprocess.CompletedProcess[bytes]:
        """One of our programs or of the distribution's; shown as it would be typed."""
        if show:
            shown = " ".join(command).replace(f"{self.base}/", "").replace(f"{ROOT}/", "")
            print(_style("36", f"   $ {shown}"))
        path = PROGRAMS / command[0]
        program = str(path) if path.exists() else command[0]
        done = subprocess.run(
            [program, *command[1:]],
            input=stdin,
            capture_output=True,
            env=self.environment,
            timeout=PATIENCE,
            check=False,
        )
        if done.returncode != expect:
            self.fail(
                f"{' '.join(command)}: exit {done.returncode}, expected {expect}\n"
                + done.stdout.decode(errors="replace")
                + done.stderr.decode(errors="replace")
            )
        return done

    def ctl(
        self, *arguments: str, stdin: bytes = b"", show: bool = True, expect: int = 0
    ) -> subprocess.CompletedProcess[bytes]:
        return self.run(
            "unsealctl", "--config", str(self.config), *arguments, stdin=stdin, show=show, expect=expect
        )

    def status(self) -> dict[str, object]:
        answer = json.loads(self.ctl("--json", "status", show=False).stdout)
        assert isinstance(answer, dict)
        return answer

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """A program that goes on running; its output is in NAME.log."""
        log: IO[bytes] = (self.base / f"{name}.log").open("ab")
        path = PROGRAMS / command[0]
        with log:
            process = subprocess.Popen(
                [str(path) if path.exists() else command[0], *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
            )
        self.running.append(process)
        return process

    def end(self, process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGTERM) -> None:
        process.send_signal(number)
        process.wait(PATIENCE)
        self.running.remove(process)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                self.fail(f"waited {PATIENCE} s for: {what}")
            time.sleep(0.02)

    # --- the parts

    def configure_gateway(self, port: int) -> None:
        """In a file of its own: who may unlock is none of its business."""
        self.gateway_config.write_text(
            f'listen = ["127.0.0.1:{port}"]\nstate_dir = "{self.state}"\nruntime_dir = "{self.base / "run"}"\n'
        )

    def power_on(self) -> subprocess.Popen[bytes]:
        """The TPM comes out of reset, with what it remembers."""
        for path in (self.tpm_socket, self.base / "tpm.ctrl"):
            path.unlink(missing_ok=True)
        tpm = self.start(
            "swtpm",
            *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.base / 'tpmstate'}"),
            *("--server", f"type=unixio,path={self.tpm_socket}"),
            *("--ctrl", f"type=unixio,path={self.tpm_socket}.ctrl"),
            *("--flags", "not-need-init,startup-clear"),
        )
        self.wait(lambda: self.tpm_socket.exists() and (self.base / "tpm.ctrl").exists(), "the software TPM")
        return tpm

    def daemon(self) -> subprocess.Popen[bytes]:
        log = self.base / "unsealerd.log"
        seen = log.read_text().count("ready state=") if log.exists() else 0
        process = self.start("unsealerd", "unsealerd", "--config", str(self.config))

        def ready() -> bool:
            if process.poll() is not None:
                self.fail(f"the daemon ended with {process.returncode}")
            return log.read_text().count("ready state=") > seen

        self.wait(ready, "the daemon")
        return process


def play(story: Story) -> None:
    port = free_port()
    (story.base / "tpmstate").mkdir()
    story.hosts.parent.mkdir()

    story.begin(
        "An operator makes a key pair",
        "The private key stays with the operator, far from the server. Here it is an ordinary age key file; "
        "the server only ever learns the public part.",
    )
    identity = str(story.base / "operator" / "alice.txt")
    story.run("age-keygen", "-o", identity)
    public = story.run("age-keygen", "-y", identity, show=False).stdout.decode().strip()
    print(f"   alice is {public}")
    story.config.write_text(
        textwrap.dedent(f"""\
            [daemon]
            state_dir = "{story.state}"
            runtime_dir = "{story.base / "run"}"
            [tpm]
            tcti = "swtpm:path={story.tpm_socket}"
            [[operator]]
            name = "alice"
            recipient = "{public}"
            [key.demo]
            owner = "demo@example.com"
            purpose = "to show how it works"
            [[key.demo.allow]]
            user = "{os.getuid()}"
            operations = ["read", "sign", "verify"]
        """)
    )
    story.configure_gateway(port)

    story.begin(
        "The server is initialised, and the key `demo` is generated in its memory",
        "The key is drawn in memory that neither root nor a core dump can read, encrypted to alice, made durable on disk, and "
        "only then given out. Nobody has ever seen it.",
    )
    tpm = story.power_on()
    daemon = story.daemon()
    story.check(story.status()["state"] == "uninitialised", "a new server has no keys")
    words = story.ctl("init").stdout.decode()
    status = story.status()
    story.check(status["state"] == "unlocked" and status["keys"] == ["demo"], "unlocked, with the key `demo`")
    print(f"   secret memory here: {status['secret_memory']}")
    reachable = gateway(story, port)

    story.begin(
        "A service signs and verifies",
        "It asks over a Unix socket. The kernel says who it is, the policy says what it may do, the audit log says that it did.",
    )
    mac = story.ctl("sign", "demo", stdin=MESSAGE).stdout.decode().strip()
    print(f"   {mac}")
    story.ctl("verify", "demo", "--mac", mac, stdin=MESSAGE)
    story.check(True, "the MAC verifies")
    story.ctl("verify", "demo", "--mac", mac, stdin=MESSAGE + b"!", show=False, expect=1)
    story.check(True, "the MAC of another message does not")
    key = story.ctl("get", "demo", show=False).stdout
    traces = [path.name for path in story.base.rglob("*") if path.is_file() and key in path.read_bytes()]
    story.check(len(key) == 32 and not traces, "no file holds the key", traces)

    story.begin(
        "A planned reboot",
        "Just before, the daemon seals the backup's file key to the TPM: it opens on the very next boot, once, if the machine boots the "
        "same way. Then the daemon stops, the TPM is reset as a reboot does it, and the daemon starts again, with nobody there.",
    )
    story.ctl("seal", "--kind", "reboot")
    story.check((story.state / "sealed.json").exists(), "a sealed copy lies on the disk")
    story.end(reachable)
    story.end(daemon)
    stolen = story.base / "stolen-disk"
    shutil.copytree(story.state, stolen)
    story.end(tpm)
    print("   (a thief copies the disk now; see the next chapter)")
    tpm = story.power_on()
    daemon = story.daemon()
    story.check(story.status()["state"] == "unlocked", "unlocked, and nobody did anything")
    story.check(story.ctl("get", "demo", show=False).stdout == key, "it is the same key")
    story.check(not (story.state / "sealed.json").exists(), "the sealed copy is gone from the disk")
    proof = last_event(story, "unsealed")
    story.check(
        proof.get("destroyed") == "sealed_copy_used",
        "and the TPM, asked once more, refused to give it again",
        proof,
    )

    story.begin(
        "The thief puts the copied disk back",
        "It has the sealed copy and the backup, byte for byte. But the TPM counted on when the copy was used.",
    )
    story.end(daemon)
    current = story.base / "current-disk"
    story.state.rename(current)
    shutil.copytree(stolen, story.state)
    daemon = story.daemon()
    status = story.status()
    story.check(
        status["state"] == "locked" and status["lock_reason"] == "sealed_copy_used",
        f"refused on this boot: {status['lock_reason']}",
        status,
    )
    story.end(daemon)
    story.end(tpm)
    shutil.rmtree(story.state)
    shutil.copytree(stolen, story.state)
    tpm = story.power_on()
    daemon = story.daemon()
    status = story.status()
    story.check(
        status["state"] == "locked" and status["lock_reason"] in ("not_the_next_boot", "sealed_copy_used"),
        f"and on a later boot: {status['lock_reason']}",
        status,
    )
    story.end(daemon)
    shutil.rmtree(story.state)
    current.rename(story.state)
    print("   (the right disk is back)")

    story.begin(
        "A power cut",
        "Nothing was sealed, so nothing on the machine can open the backup. The daemon comes up locked, and a service that wants the "
        "key waits: it is never given an empty one.",
    )
    daemon = story.daemon()
    _unlock_locally_if_needed(story, identity)
    story.end(daemon, signal.SIGKILL)
    story.end(tpm, signal.SIGKILL)
    tpm = story.power_on()
    daemon = story.daemon()
    reachable = gateway(story, port)
    status = story.status()
    story.check(
        status["state"] == "locked" and status["lock_reason"] == "unexpected_reboot",
        f"locked: {status['lock_reason']}",
        status,
    )
    service = socket.socket(socket.AF_UNIX)
    service.connect(str(story.base / "run" / "key" / "demo"))
    service.setblocking(False)
    waiting = False
    try:
        service.recv(64)
    except BlockingIOError:
        waiting = True
    story.check(waiting, "a service that connects to run/key/demo waits")

    story.begin(
        "The operator, far away, unlocks",
        "Once, alice adds the host and compares eight words with the server's console. The server then sends a point that it has "
        "multiplied by a random number; alice's key answers it; the answer is useless to anybody but this server, now. Neither the "
        "key nor its ciphertext leaves the server.",
    )
    address = f"127.0.0.1:{port}"
    refused = Exit.HOST_UNKNOWN.value
    story.run("unsealctl", "unlock", address, "-i", identity, show=False, expect=refused)
    story.check(True, "a host that was never added is refused")
    added = story.run("unsealctl", "host", "add", "web1", address, "--yes")
    shown = " ".join((added.stdout + added.stderr).decode().split())
    fingerprint = next(line.split(None, 1)[1] for line in words.splitlines() if line.split()[:1] == ["words"])
    story.check(fingerprint in shown, f"both sides show the same words: {fingerprint}", shown)
    answer = story.run("unsealctl", "unlock", "web1", "-i", identity, "--reason", "power cut in row 7")
    print(textwrap.indent((answer.stderr + answer.stdout).decode().rstrip(), "     "))
    story.check(story.status()["state"] == "unlocked", "unlocked")
    service.settimeout(PATIENCE)
    received = bytearray()
    while data := service.recv(64):
        received += data
    service.close()
    story.check(bytes(received) == key, "the service that waited has got the same key")
    story.ctl("verify", "demo", "--mac", mac, stdin=MESSAGE, show=False)
    story.check(True, "the MAC from before the power cut still verifies")

    story.begin(
        "The last resort: without this program",
        "The backup is an ordinary age file. Should the machine and this program be gone, the distribution's own age and the operator's "
        "key file open it.",
    )
    story.ctl("backup", "export", str(story.base / "vault.age"))
    opened = story.run("age", "-d", "-i", identity, str(story.base / "vault.age")).stdout
    story.check(
        opened.startswith(b"unsealerd-keyring-v2\n") and opened.endswith(key),
        "age opens it; the key is in it",
    )
    story.ctl("audit", show=False)
    story.check(True, "the audit log's chain verifies")
    story.end(reachable)
    story.end(daemon)
    story.end(tpm)


def gateway(story: Story, port: int) -> subprocess.Popen[bytes]:
    process = story.start("gateway", "unsealerd-gateway", "--config", str(story.gateway_config))

    def listening() -> bool:
        if process.poll() is not None:
            story.fail(f"the gateway ended with {process.returncode}")
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    story.wait(listening, "the gateway")
    return process


def _unlock_locally_if_needed(story: Story, identity: str) -> None:
    """The detour with the stolen disk ended in a locked host; someone at the console unlocks it."""
    if story.status()["state"] == "locked":
        story.ctl("unlock", "--local", "-i", identity)


def last_event(story: Story, event: str) -> dict[str, object]:
    records = [json.loads(line) for line in (story.state / "audit.jsonl").read_text().splitlines()]
    return next((record for record in reversed(records) if record["event"] == event), {})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def perform(introduction: str, story: Callable[[Story], None]) -> int:
    """Tell the story in a directory of its own, which is removed at the end, whatever happens."""
    started = time.monotonic()
    print(textwrap.fill(introduction, 100))
    base = Path(tempfile.mkdtemp(prefix="unsealerd-"))
    stage = Story(base)
    try:
        story(stage)
    finally:
        for process in stage.running:
            process.kill()
            process.wait()
        shutil.rmtree(base, ignore_errors=True)
    print(f"\n{_style('1;32', 'Every step held.')} {time.monotonic() - started:.1f} s")
    return 0


def main() -> int:
    return perform(
        "unsealerd keeps HMAC keys in memory only, and still survives reboots. This demo plays its whole life here, with the real "
        "programs, in a temporary directory that is removed at the end. The TPM is a software one, even where the machine has "
        "its own: a real one is reset only by a reboot.",
        play,
    )


if __name__ == "__main__":
    raise SystemExit(main())
