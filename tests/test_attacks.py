"""Ways in which the daemon was once broken, each played again against the real one."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rigs.server import Server, wait_for
from rigs.tpmproxy import Command, TpmProxy

from unsealerd.core.age import X25519Identity

NOBODY = 65534
RC_NV_RATE = 0x920
RC_FAILURE = 0x101


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        server.start()
        server.ctl("init")
        yield server


@pytest.fixture
def proxied(server: Server) -> Iterator[TpmProxy]:
    """The server, unlocked, with something between it and its TPM."""
    assert server.tpm is not None
    server.stop()
    with TpmProxy(server.tpm) as proxy:
        server.configure(server.config.read_text().replace(server.tpm.tcti, proxy.tcti))
        server.start()
        server.unlock()
        yield proxy


def _replace_disk(server: Server, image: Path) -> None:
    shutil.rmtree(server.state)
    shutil.copytree(image, server.state)


@pytest.mark.promise(3)
@pytest.mark.parametrize("command", [("disarm",), ("lock",), ("key", "revoke", "demo", "--version", "1")])
def test_nothing_is_called_destroyed_while_the_counter_is_stuck(
    server: Server, proxied: TpmProxy, command: tuple[str, ...]
) -> None:
    """The sealed copy on a copied disk is dead only when the counter has moved; until then the command says that it is not."""
    server.ctl("arm", "--for", "1h")
    proxied.answer(Command.NV_INCREMENT, RC_NV_RATE, times=None)
    answer = server.ctl(*command, expect=None)
    assert answer.returncode == 16, answer
    assert "sealed_copy_destroyed" not in server.events()
    assert not (server.state / "sealed.json").exists()
    if command == ("lock",):
        server.assert_locked("locked_by_admin")


@pytest.mark.promise(3)
def test_a_stuck_counter_is_tried_again_and_then_the_copy_is_dead(server: Server, proxied: TpmProxy) -> None:
    server.ctl("seal")
    image = server.base / "image"
    shutil.copytree(server.state, image)
    proxied.answer(Command.NV_INCREMENT, RC_NV_RATE, times=5)  # as often as one operation asks
    assert server.ctl("disarm", expect=None).returncode == 16
    wait_for(lambda: not server.status()["tpm"].get("counter_behind"), "the counter")
    server.stop()
    server.reset_tpm()
    _replace_disk(server, image)
    server.start()
    server.assert_locked("sealed_copy_used")


@pytest.mark.promise(3)
def test_lock_also_destroys_a_sealed_copy_that_was_not_used(server: Server) -> None:
    """Sealed; the TPM is away at the boot; an operator does without it; it comes back; lock; restart."""
    server.ctl("seal")
    server.stop()
    server.reset_tpm()
    text = server.config.read_text()
    assert server.tpm is not None
    server.configure(text.replace(server.tpm.tcti, f"swtpm:path={server.base}/none"))
    server.start()
    server.assert_locked("tpm_missing")
    server.unlock("--accept-rollback")
    assert (server.state / "sealed.json").exists()
    server.configure(text)
    server.send(signal.SIGHUP)
    wait_for(lambda: "reloaded" in server.log_text(), "the reload")
    server.ctl("lock")
    server.stop()
    server.start()
    assert server.status()["state"] == "locked"


@pytest.mark.promise(6)
def test_a_reload_that_could_not_write_is_made_good(server: Server, proxied: TpmProxy) -> None:
    """alice is replaced by bob while the TPM fails: the backup is written to bob as soon as it works."""
    bob = X25519Identity.generate()
    file = server.base / "bob.txt"
    file.write_text(bob.encode() + "\n")
    file.chmod(0o600)
    key = server.key()
    server.operators = {"bob": str(bob.recipient)}
    server.configure()
    server.config.write_text(server.config.read_text().replace(_tcti(server), proxied.tcti))
    proxied.answer(Command.NV_READ, RC_FAILURE, times=None)
    server.send(signal.SIGHUP)
    wait_for(lambda: "reload refused" in server.log_text(), "the refusal")
    assert server.ctl("backup", "verify", expect=None).returncode == 15
    proxied.clear()
    server.send(signal.SIGHUP)
    wait_for(lambda: "reloaded" in server.log_text(), "the reload")
    for path in server.state.glob("keyring.age*"):
        assert subprocess.run(["age", "-d", "-i", file, path], capture_output=True, check=True).stdout
        alice = subprocess.run(
            ["age", "-d", "-i", server.identity_file, path], capture_output=True, check=False
        )
        assert alice.returncode != 0, f"{path.name} still opens for who is no operator"
    server.stop(signal.SIGKILL)
    server.start()
    assert server.unlock(expect=None).returncode != 0
    server.ctl("unlock", "--local", "-i", str(file))
    assert server.key() == key


def _tcti(server: Server) -> str:
    assert server.tpm is not None
    return server.tpm.tcti


@pytest.mark.promise(6)
def test_an_operator_is_not_taken_away_without_another(server: Server) -> None:
    text = server.config.read_text()
    server.operators = {}
    server.configure()
    server.send(signal.SIGHUP)
    wait_for(lambda: "reload refused error=ConfigInvalid" in server.log_text(), "the refusal")
    assert [operator["name"] for operator in server.status()["operators"]] == ["alice"]
    server.ctl("key", "rotate", "demo")
    server.stop()
    assert server.launch().wait(60) == 78
    server.configure(text)
    server.start()
    server.unlock()


@pytest.mark.promise(9)
def test_no_line_of_the_configuration_turns_the_counter_off(server: Server) -> None:
    old = (server.state / "keyring.age").read_bytes()
    server.ctl("key", "revoke", "demo", "--version", "1")
    server.stop()
    (server.state / "keyring.age").write_bytes(old)
    server.configure(server.config.read_text().replace(_tcti(server), "none"))
    server.start()
    assert server.unlock(expect=None).returncode == 16
    assert server.status()["state"] == "locked"
    server.unlock("--accept-rollback")


@pytest.mark.promise(6)
def test_an_error_of_the_tpm_after_the_write_leaves_memory_and_disk_in_step(
    server: Server, proxied: TpmProxy
) -> None:
    proxied.answer(Command.CREATE, RC_FAILURE, times=None)
    proxied.answer(Command.NV_READ_PUBLIC, 0x18B, times=2)
    assert server.ctl("seal", expect=None).returncode == 16
    proxied.clear()
    server.ctl("key", "rotate", "demo")
    server.ctl("seal")
    key = server.key()
    server.stop()
    server.reset_tpm()
    server.start()
    server.assert_unlocked()
    assert server.key() == key


def test_a_damaged_backup_does_not_let_anybody_grow_the_log() -> None:
    with Server(tpm=False) as server:
        server.start()
        server.ctl("init")
        server.ctl("lock")
        (server.state / "keyring.age").write_bytes(b"damaged")
        for _ in range(5):
            assert server.unlock(expect=None).returncode == 15
        assert server.events().count("locked") == 2  # by the administrator, and once for the damage
        server.assert_locked("backup_damaged")


def test_the_network_does_not_keep_the_console_out() -> None:
    """As many sessions as there may be, held by who knows a recipient; root unlocks at the console all the same."""
    import base64
    import json

    from unsealerd.core.session import recipient_tag
    from unsealerd.daemon.unlocking import MAX_SESSIONS

    with Server(tpm=False) as server, contextlib.ExitStack() as held:
        server.start()
        server.ctl("init")
        server.ctl("lock")
        answers = []
        for _ in range(MAX_SESSIONS + 1):
            nonce = os.urandom(32)
            tag = recipient_tag(nonce, server.operators["alice"])
            peer = held.enter_context(socket.socket(socket.AF_UNIX))
            peer.settimeout(60)
            peer.connect(str(server.run_dir / "unlock"))
            parameters = {
                "version": 1,
                "nonce": base64.b64encode(nonce).decode(),
                "tags": [base64.b64encode(tag).decode()],
                "peer": "198.51.100.7",
            }
            call = {"method": "io.unsealerd.Unlock.Hello", "parameters": parameters}
            peer.sendall(json.dumps(call).encode() + b"\0")
            answers.append(peer.recv(65536))
        assert b"LimitExceeded" in answers[-1]
        assert b"challenge" in answers[-2]
        server.unlock()
        server.assert_unlocked()


_CROWD = """
import os, resource, socket, sys
path, count, hold = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "hold"
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
os.setgroups([]); os.setgid({nobody}); os.setuid({nobody})
held = []
for _ in range(count):
    reader = socket.socket(socket.AF_UNIX)
    reader.connect(path)
    if hold:
        held.append(reader)
    else:
        reader.close()
print("done", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def _crowd(server: Server, count: int, how: str) -> Iterator[None]:
    """Somebody without any grant, with many readers."""
    server.base.chmod(0o755)
    with subprocess.Popen(
        [
            *(sys.executable, "-c", _CROWD.format(nobody=NOBODY)),
            *(str(server.run_dir / "key" / "demo"), str(count), how),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        try:
            yield
        finally:
            assert process.stdin is not None
            process.stdin.close()


def test_a_crowd_of_denied_readers_keeps_nobody_from_a_key_or_from_lock() -> None:
    with Server(tpm=False) as server:
        server.start()
        server.ctl("init")
        key = server.key()
        with _crowd(server, 2000, "hold"):
            assert server.key() == key
            assert server.client.sign("demo", b"x").version == 1
            server.ctl("key", "rotate", "demo")
            server.ctl("lock")


def test_readers_that_hang_up_leave_nothing_behind() -> None:
    with Server(tpm=False) as server:
        server.start()
        server.ctl("init")
        server.key()

        def memory() -> int:
            status = Path(f"/proc/{server.pid}/status").read_text()
            return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])

        before, descriptors = memory(), len(os.listdir(f"/proc/{server.pid}/fd"))
        with _crowd(server, 10_000, "close"):
            wait_for(lambda: len(os.listdir(f"/proc/{server.pid}/fd")) <= descriptors + 5, "the descriptors")
        assert memory() < before + 10_000, "kB"  # each of 10 000 would have cost 5 kB


def test_an_entitled_reader_gets_its_key_when_there_is_room_for_the_record_again() -> None:
    import resource

    with Server(tpm=False) as server:
        server.start()
        server.ctl("init")
        key = server.key()
        size = (server.state / "audit.jsonl").stat().st_size
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
        with socket.socket(socket.AF_UNIX) as reader:
            reader.connect(str(server.run_dir / "key" / "demo"))
            wait_for(lambda: "key_reader_waits" in server.log_text(), "the reader waits")
            resource.prlimit(
                server.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
            reader.settimeout(60)
            received = b""
            while data := reader.recv(64):
                received += data
        assert received == key


def test_many_keys_that_are_due_at_once_rotate() -> None:
    with Server(tpm=False, keys=()) as server:
        server.keys = {f"key-{number:03}": 'rotate_every = "1s"' for number in range(400)}
        server.configure()
        server.start()
        server.ctl("init")
        wait_for(lambda: server.json("key", "show", "key-399")["versions"][-1]["version"] > 1, "the rotation")


def test_a_tpm_that_hangs_holds_up_neither_services_nor_status_nor_the_end(server: Server) -> None:
    assert server.tpm is not None
    os.kill(server.tpm.pid, signal.SIGSTOP)
    try:
        status = server.status()
        assert status["state"] == "unlocked"
        assert status["tpm"]["error"] == "TpmFailed"
        assert server.client.sign("demo", b"x").version == 1
        assert server.ctl("lock", expect=None).returncode == 0
        server.assert_locked("locked_by_admin")
        assert server.stop() == 70
    finally:
        os.kill(server.tpm.pid, signal.SIGCONT)


def test_init_keeps_a_tls_key_that_has_lost_its_certificate() -> None:
    with Server(tpm=False) as server:
        server.start()
        server.ctl("init")
        before = server.json("identity")["fingerprint"]
        (server.state / "gateway" / "tls.crt").unlink()
        assert server.ctl("init", expect=None).returncode == 8
        assert server.json("identity")["fingerprint"] == before
