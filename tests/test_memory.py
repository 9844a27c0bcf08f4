"""Promise 1: plain key bytes and the file key are in secret memory only, and after `lock` nowhere."""

import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from rigs.memory import copies
from rigs.server import PROGRAMS, Server

from unsealerd.core.age import decrypt
from unsealerd.core.keyring import parse

pytestmark = pytest.mark.promise(1)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        server.start()
        server.ctl("init")
        yield server


def _use_everything(server: Server) -> None:
    """Every operation that touches key bytes, a few times over."""
    for _ in range(3):
        mac = server.ctl("sign", "demo", stdin=b"message").stdout.decode().strip()
        server.ctl("verify", "demo", "--mac", mac, stdin=b"message")
        server.ctl("get", "demo", "--format", "hex")
        server.ctl("get", "demo", "--all")
        server.ctl("get", "demo", "--all", "--format", "base64")
    client = server.client
    for number in range(200):
        client.sign("demo", b"message %d" % number)


def test_the_search_finds_a_key_that_lies_about() -> None:
    """The control: the same search, on a process that holds a key in ordinary memory."""
    program = (
        "import sys; key = bytes.fromhex(sys.stdin.readline()); print('ready', flush=True); sys.stdin.read()"
    )
    key = os.urandom(32)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(key.hex().encode() + b"\n")
        process.stdin.flush()
        process.stdout.readline()
        found = copies(process.pid, key)
        process.stdin.close()
    assert any(entry.endswith(": raw") for entry in found)
    assert any(entry.endswith(": hex") for entry in found)


def test_no_copy_of_a_key_outside_secret_memory_while_it_is_used(server: Server) -> None:
    key = server.key()
    _use_everything(server)
    assert copies(server.pid, key) == []


def test_no_copy_after_rotation_revocation_seal_and_lock(server: Server) -> None:
    first = server.key()
    server.ctl("key", "rotate", "demo")
    second = server.key()
    _use_everything(server)
    server.ctl("seal")
    server.ctl("key", "revoke", "demo", "--version", "1")
    for key in (first, second):
        assert copies(server.pid, key) == []
    server.ctl("lock")
    for key in (first, second):
        assert copies(server.pid, key) == []


def test_no_copy_after_unseal_and_unlock(server: Server) -> None:
    key = server.key()
    server.reboot()
    server.assert_unlocked()
    assert copies(server.pid, key) == []
    server.power_cut()
    server.unlock()
    _use_everything(server)
    assert copies(server.pid, key) == []
    server.ctl("lock")
    assert copies(server.pid, key) == []


def test_no_copy_of_the_file_key(server: Server) -> None:
    """The file key of a written backup is wiped with the write, and that of an opened one with the opening."""
    first = _file_key(server)
    assert copies(server.pid, first) == []
    server.power_cut()
    server.unlock()
    for key in (first, _file_key(server)):
        assert copies(server.pid, key) == []


def test_no_copy_of_the_lineage(server: Server) -> None:
    """It is compared at each opening, and its digest told: whoever had it could make a backup that this host believes."""
    server.reboot()
    server.power_cut()
    server.unlock()
    server.status()
    with (
        decrypt((server.state / "keyring.age").read_bytes(), [server.identity]) as plaintext,
        contextlib.closing(parse(plaintext)) as keyring,
    ):
        assert keyring.lineage is not None
        lineage = bytes(keyring.lineage)
        assert keyring.id == server.status()["keyring"]["id"]
    assert copies(server.pid, lineage) == []


def _file_key(server: Server) -> bytes:
    """As the operator can have it, from the file and the identity."""
    from unsealerd.core.age import parse_header
    from unsealerd.core.secret import SecretBuffer

    header = parse_header((server.state / "keyring.age").read_bytes())
    recipient = server.identity.recipient
    point = recipient.ephemeral(header.stanzas[0])
    assert point is not None
    with server.identity.exchange(point) as shared, recipient.unwrap(header.stanzas[0], shared) as file_key:
        assert isinstance(file_key, SecretBuffer)
        return bytes(file_key.view)


def test_no_copy_where_the_kernel_has_no_memfd_secret() -> None:
    """The fallback is ordinary memory, locked: the key is there once, in that one mapping, and after `lock` not at all."""
    with Server(tpm=False) as server:
        blocked = textwrap.dedent("""\
            import unsealerd.core.secret as secret
            secret.memfd_secret = lambda: None
        """)
        site = server.base / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(blocked)
        server.extra_environment["PYTHONPATH"] = str(site)
        server.start()
        server.ctl("init")
        status = server.status()
        assert status["secret_memory"] == "mlock"
        assert any("memfd_secret" in warning for warning in status["warnings"])
        key = server.key()
        _use_everything(server)
        places = {entry.partition(": ")[0] for entry in copies(server.pid, key)}
        assert len(places) == 1, places
        server.ctl("lock")
        assert copies(server.pid, key) == []


def test_the_process_cannot_be_dumped_or_read_by_its_own_user(server: Server) -> None:
    status = Path(f"/proc/{server.pid}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    limits = Path(f"/proc/{server.pid}/limits").read_text()
    core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
    assert core.split()[4:6] == ["0", "0"]
    # Not dumpable: the files under /proc/PID belong to root even for a daemon that runs as somebody else.
    probe = subprocess.run(
        [sys.executable, "-c", _DUMPABLE_PROBE], capture_output=True, text=True, check=True
    )
    assert probe.stdout.strip() == "0"


_DUMPABLE_PROBE = """
import ctypes
from unsealerd.daemon import hygiene
hygiene.harden()
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
"""


def test_the_daemon_runs_in_the_environment_that_overwrites_freed_memory(server: Server) -> None:
    environment = Path(f"/proc/{server.pid}/environ").read_bytes().split(b"\0")
    for setting in (b"PYTHONMALLOC=malloc", b"LD_BIND_NOW=1"):
        assert setting in environment
    assert any(b"glibc.malloc.perturb=165" in setting for setting in environment)


def test_no_secret_in_log_audit_arguments_or_environment(server: Server) -> None:
    key = server.key()
    _use_everything(server)
    server.reboot()
    places = [
        server.log,
        server.state / "audit.jsonl",
        server.state / "sealed.json",
        server.state / "tpm.json",
    ]
    texts = [place.read_bytes() for place in places if place.exists()]
    texts += [Path(f"/proc/{server.pid}/{name}").read_bytes() for name in ("cmdline", "environ")]
    for text in texts:
        for form in (key, key.hex().encode()):
            assert form not in text


def test_errors_and_representations_show_nothing() -> None:
    import pickle

    from unsealerd.core.secret import SecretBuffer

    with SecretBuffer.random(32) as secret:
        raw = bytes(secret.view)
        assert raw.hex() not in repr(secret)
        assert repr(raw)[2:-1] not in repr(secret)
        with pytest.raises(TypeError):
            pickle.dumps(secret)
        view = secret.view
    assert secret.closed
    with pytest.raises(ValueError, match="released"):
        bytes(view)
    with pytest.raises(ValueError, match="released"):
        _ = secret.view


def test_the_programs_are_the_installed_ones() -> None:
    """What the tests start is what a user starts."""
    assert (PROGRAMS / "unsealerd").exists()
