"""The gateway as a process: what it starts with, what it never touches, how it ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
from rigs.gateway import ROOT, GatewayProcess
from rigs.raw_operator import RawOperator, hello
from rigs.server import wait_for
from rigs.unlock_daemon import UnlockDaemon

from unsealerd.core.age import X25519Identity
from unsealerd.core.session import recipient_tag
from unsealerd.gateway import identity
from unsealerd.notify import notify
from unsealerd.operator import network
from unsealerd.operator.unlock import unlock

ALICE = X25519Identity.generate()
HELLO = hello(recipient_tag(bytes(32), str(ALICE.recipient)))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command, with whatever it says."""
    return subprocess.run(
        [sys.executable, "-m", "unsealerd.gateway.main", *arguments],
        env={**os.environ, "PYTHONPATH": os.fspath(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def config(directory: Path, listen: str = "[::1]:0") -> Path:
    path = directory / "gateway.toml"
    path.write_text(f'listen = ["{listen}"]\nstate_dir = "{directory}"\nruntime_dir = "{directory}"\n')
    return path


# --- what it never touches


@pytest.mark.promise(8)
def test_the_gateway_has_no_tpm_no_key_and_no_backup(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path) as gateway:
        for name in ("keyring.age", "sealed.json", "tpm.json", "audit.jsonl"):
            (gateway.state_dir / name).write_text("must not be read")
        with UnlockDaemon(gateway.runtime_dir, [ALICE.recipient]) as daemon:
            with network.connect(gateway.host()) as conversation:
                unlock(conversation, [ALICE])
            assert daemon.opened == [daemon.file_key]
        assert gateway.stop() == 0
    report = gateway.report()
    modules = set(report["modules"])
    assert "grpc" in modules, "the report is of the gateway"
    own = {name for name in modules if name.startswith("unsealerd.")}
    forbidden = (
        "unsealerd.daemon",
        "unsealerd.tpm",
        "unsealerd.operator",
        "unsealerd.client",
        "unsealerd.cli",
    )
    assert not [name for name in own if name.startswith(forbidden)]
    # No code that could hold a key: no secret memory, no age, no keyring, no session, and no cryptography at all.
    core = {"unsealerd.core", "unsealerd.core.conversation", "unsealerd.core.tlskey"}
    assert {name for name in own if name.startswith("unsealerd.core")} == core
    assert not [
        name for name in modules if name.partition(".")[0] in ("tpm2_pytss", "cryptography", "smartcard")
    ]
    assert not [line for line in report["maps"] if "tss2" in line or "tpm" in line.rpartition("/")[2]]
    # Nor what may know who can unlock.
    assert "unsealerd.config" not in modules
    assert not [path for path in report["opened"] if path.endswith("unsealerd.toml")]
    state = os.fspath(gateway.state_dir)
    opened = {path for path in report["opened"] if path.startswith(state)}
    assert opened == {f"{state}/gateway/tls.key", f"{state}/gateway/tls.crt"}


@pytest.mark.promise(8)
def test_the_gateway_has_no_core_dump_and_no_way_to_privilege(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path, ("127.0.0.1:0",)) as gateway:
        status = Path(f"/proc/{gateway.pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status
        assert gateway.stop() == 0
    assert gateway.report()["dumpable"] == ["0"]


def test_an_idle_gateway_is_small(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path) as gateway:
        assert gateway.rss_kib <= 50 << 10


# --- start and end


def test_the_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(os.fspath(tmp_path / "notify"))
        manager.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", os.fspath(tmp_path / "notify"))
        with GatewayProcess(tmp_path) as gateway:
            assert manager.recv(4096) == b"READY=1"
            assert gateway.stop() == 0
            assert manager.recv(4096) == b"STOPPING=1"


def test_a_running_session_may_end_before_the_gateway_does(tmp_path: Path) -> None:
    with (
        GatewayProcess(tmp_path, stop_seconds=600) as gateway,
        UnlockDaemon(gateway.runtime_dir, [ALICE.recipient]) as daemon,
        RawOperator(gateway.host()) as operator,
    ):
        operator.send(HELLO).receive()
        gateway.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not listens(gateway.addresses[0]), "the end of the listener")
        # It takes no one else from now on; who is there may go on.
        with RawOperator(gateway.host()) as late:
            assert late.send(HELLO).refusal().code is grpc.StatusCode.UNAVAILABLE
        operator.end()
        assert operator.refusal().code is grpc.StatusCode.OK
        assert gateway.process.wait(60) == 0  # and not in ten minutes
        assert daemon.wait_for_connections(0)


def listens(address: str) -> bool:
    """Whether anything listens at a port of [::1]: state 0A in proc_net_tcp."""
    local = f":{int(address.rpartition(':')[2]):04X}"
    table = [line.split() for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    return any(fields[1].endswith(local) and fields[3] == "0A" for fields in table)


def test_a_session_that_goes_on_does_not_hold_the_gateway(tmp_path: Path) -> None:
    with (
        GatewayProcess(tmp_path, stop_seconds=0.5) as gateway,
        UnlockDaemon(gateway.runtime_dir, [ALICE.recipient]) as daemon,
        RawOperator(gateway.host()) as operator,
    ):
        operator.send(HELLO).receive()
        begun = time.monotonic()
        assert gateway.stop() == 0
        assert time.monotonic() - begun < 60  # a session may last for two minutes
        assert operator.refusal().code is not grpc.StatusCode.OK
        assert daemon.wait_for_connections(0)


def test_the_daemon_may_come_and_go(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path) as gateway:
        for _ in range(2):
            with UnlockDaemon(gateway.runtime_dir, [ALICE.recipient]) as daemon:
                with network.connect(gateway.host()) as conversation:
                    unlock(conversation, [ALICE])
                assert daemon.opened == [daemon.file_key]
            with RawOperator(gateway.host()) as operator:
                assert operator.send(HELLO).refusal().name == "DaemonUnreachable"


# --- one line, a hint and an exit code


def assert_says(result: subprocess.CompletedProcess[str], code: int, name: str) -> None:
    lines = result.stderr.splitlines()
    assert (result.returncode, len(lines), result.stdout) == (code, 2, ""), result.stderr
    assert lines[0].startswith(f"unsealerd-gateway: {name}")
    assert lines[1].startswith("hint: ")


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    assert_says(run("--config", tmp_path / "none.toml"), 78, "ConfigInvalid")


def test_a_wrong_configuration_is_named(tmp_path: Path) -> None:
    assert_says(run("--config", config(tmp_path, "nonsense")), 78, "ConfigInvalid")


def test_a_host_that_was_not_initialised_is_named(tmp_path: Path) -> None:
    assert_says(run("--config", config(tmp_path)), 69, "NotInitialised")


def test_a_damaged_certificate_is_named(tmp_path: Path) -> None:
    identity.create(tmp_path / "gateway")
    (tmp_path / "gateway" / "tls.crt").write_text("-----BEGIN NOTHING-----")
    assert_says(run("--config", config(tmp_path)), 69, "IdentityInvalid")


def test_a_key_of_another_certificate_is_named(tmp_path: Path) -> None:
    identity.create(tmp_path / "gateway")
    identity.create(tmp_path / "other")
    (tmp_path / "other" / "tls.crt").rename(tmp_path / "gateway" / "tls.crt")
    assert_says(run("--config", config(tmp_path)), 69, "IdentityInvalid")


def test_an_address_in_use_is_named(tmp_path: Path) -> None:
    identity.create(tmp_path / "gateway")
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        result = run("--config", config(tmp_path, f"[::1]:{taken.getsockname()[1]}"))
    assert_says(result, 78, "ConfigInvalid")


def test_wrong_usage_is_named() -> None:
    assert_says(run("--nonsense"), 2, "unrecognized arguments")


# --- sd_notify


def test_notify_says_fields_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in (os.fspath(tmp_path / "notify"), f"@unsealerd-test-{os.getpid()}"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(address.replace("@", "\0"))
            monkeypatch.setenv("NOTIFY_SOCKET", address)
            assert notify(READY=1, STATUS="two\nlines")
            assert manager.recv(4096) == b"READY=1\nSTATUS=two lines"


def test_notify_without_a_service_manager_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify(READY=1)
    for address in (os.fspath(tmp_path / "nobody"), "relative", "/" + "x" * 200):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert not notify(READY=1)
