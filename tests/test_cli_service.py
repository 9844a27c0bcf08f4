"""unsealctl get, sign and verify: what a service's own user may do."""

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from rigs.ctl import Ctl
from rigs.stub_daemon import StubDaemon, error

from unsealerd.cli.edge import Exit

KEY = bytes(range(32))
MAC = "5c" * 32


@pytest.fixture
def ctl(tmp_path: Path) -> Ctl:
    return Ctl(tmp_path)


@pytest.fixture
def daemon(ctl: Ctl) -> Iterator[StubDaemon]:
    with StubDaemon(ctl.runtime_dir) as stub:
        state(stub, "unlocked")
        stub.give("key/web", KEY)
        stub.give("keyset/web", f"3 {KEY.hex()}\n1 {'0b' * 16}\n".encode())
        yield stub


def state(daemon: StubDaemon, name: str, *operations: str) -> None:
    key = {"name": "web", "operations": list(operations or ("read",)), "versions": []}
    daemon.answers["Keys.ListKeys"] = {"state": name, "keys": [key]}


# --- get


@pytest.mark.usefixtures("daemon")
def test_get_writes_exactly_the_bytes(ctl: Ctl) -> None:
    assert ctl("get", "web").raw == KEY
    assert ctl("get", "web", "--format", "raw").raw == KEY
    assert ctl("get", "web", "--format", "hex").out == KEY.hex() + "\n"
    assert ctl("get", "web", "--format", "base64").out == base64.b64encode(KEY).decode() + "\n"
    assert ctl("get", "web", "--json").json == {"name": "web", "format": "hex", "value": KEY.hex()}


@pytest.mark.usefixtures("daemon")
def test_get_all(ctl: Ctl) -> None:
    assert ctl("get", "web", "--all").out == f"3 {KEY.hex()}\n1 {'0b' * 16}\n"
    assert ctl("get", "web", "--all", "--format", "base64").out.startswith("3 AAEC")
    assert ctl("get", "web", "--all", "--json").json == {
        "name": "web",
        "format": "hex",
        "versions": [{"version": 3, "value": KEY.hex()}, {"version": 1, "value": "0b" * 16}],
    }
    ctl("get", "web", "--all", "--format", "raw").refused(Exit.USAGE)


@pytest.mark.usefixtures("daemon")
def test_raw_bytes_do_not_go_to_a_terminal(ctl: Ctl) -> None:
    result = ctl("get", "web", terminal=True).refused(Exit.USAGE)
    assert "--format hex" in result.err
    assert not result.raw
    assert ctl("get", "web", "--format", "hex", terminal=True).out == KEY.hex() + "\n"


@pytest.mark.promise(11)
@pytest.mark.parametrize("arguments", [("get", "web"), ("get", "web", "--all"), ("get", "web", "--json")])
def test_no_bytes_are_an_error(ctl: Ctl, daemon: StubDaemon, arguments: tuple[str, ...]) -> None:
    daemon.give("key/web", b"")
    daemon.give("keyset/web", b"")
    result = ctl(*arguments)
    assert result.code == Exit.DAEMON_UNREACHABLE
    assert not result.raw or "error" in result.json


def test_get_never_hangs(ctl: Ctl, daemon: StubDaemon) -> None:
    daemon.give("key/web", None)  # as the daemon does while it is locked, and to who may not read
    state(daemon, "locked")
    ctl("get", "web", "--json").refused(Exit.LOCKED, "Locked")
    state(daemon, "unlocked", "sign")
    ctl("get", "web", "--json").refused(Exit.ACCESS_DENIED, "AccessDenied")
    ctl("get", "other", "--json").refused(Exit.ACCESS_DENIED, "AccessDenied")
    daemon.answers["Keys.ListKeys"] = {"state": "uninitialised", "keys": []}
    ctl("get", "web", "--json").refused(Exit.NOT_INITIALISED, "NotInitialised")
    assert (
        daemon.accepted == len(daemon.calls) == 4
    )  # it asked each time, and never waited on the key's socket


def test_get_waits_when_it_is_told_to(ctl: Ctl, daemon: StubDaemon) -> None:
    state(daemon, "locked")
    assert ctl("get", "web", "--wait").raw == KEY


@pytest.mark.parametrize("name", ["../admin", "A", "-x", ""])
def test_an_odd_name(ctl: Ctl, daemon: StubDaemon, name: str) -> None:
    ctl("get", "--", name).refused(Exit.USAGE)


# --- sign and verify


def test_sign_prints_the_mac(ctl: Ctl, daemon: StubDaemon) -> None:
    daemon.answers["Keys.Sign"] = {"mac": MAC, "version": 2}
    assert ctl("sign", "web", stdin=b"\xff\0").out == MAC + "\n"
    assert ctl("sign", "web", "--json", stdin=b"\xff\0").json == {"mac": MAC, "version": 2}
    assert daemon.calls[-1] == ("Keys.Sign", {"key": "web", "message": "/wA="})


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        ({"valid": True, "version": 3, "stale": False}, 0, "valid: version 3\n"),
        ({"valid": True, "version": 1, "stale": True}, 0, "valid: version 1 (stale: sign again)\n"),
        ({"valid": False}, 1, "not valid\n"),
    ],
)
def test_verify(ctl: Ctl, daemon: StubDaemon, answer: dict[str, object], code: int, said: str) -> None:
    daemon.answers["Keys.Verify"] = answer
    result = ctl("verify", "web", "--mac", MAC.upper(), stdin=b"m")
    assert (result.code, result.out, result.err) == (code, said, "")
    assert daemon.calls[-1][1]["mac"] == MAC
    result = ctl("verify", "web", "--mac", MAC, "--json", stdin=b"m")
    assert result.code == code
    assert result.json == {"valid": False, "version": None, "stale": None} | answer
    assert list(result.json) == ["valid", "version", "stale"]


@pytest.mark.parametrize("mac", ["", "zz" * 32, MAC[:-1], MAC + "00", "é" * 64])
def test_what_is_no_mac_is_not_a_verdict(ctl: Ctl, daemon: StubDaemon, mac: str) -> None:
    daemon.answers["Keys.Verify"] = {"valid": True, "version": 1, "stale": False}
    ctl("verify", "web", "--mac", mac, "--json").refused(Exit.USAGE, "BadRequest")


def test_a_long_message_is_refused(ctl: Ctl, daemon: StubDaemon) -> None:
    daemon.answers["Keys.Sign"] = {"mac": MAC, "version": 2}
    assert ctl("sign", "web", stdin=bytes(65536)).code == 0
    ctl("sign", "web", "--json", stdin=bytes(65537)).refused(Exit.LIMIT, "LimitExceeded")
    ctl("verify", "web", "--mac", MAC, "--json", stdin=bytes(65537)).refused(Exit.LIMIT, "LimitExceeded")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("Locked", Exit.LOCKED),
        ("AccessDenied", Exit.ACCESS_DENIED),
        ("KeyNotFound", Exit.NOT_FOUND),
        ("NotInitialised", Exit.NOT_INITIALISED),
        ("AuditUnwritable", Exit.STORED_DATA),
        ("Unheard", Exit.PEER),
    ],
)
def test_the_daemons_errors(ctl: Ctl, daemon: StubDaemon, name: str, code: int) -> None:
    daemon.answers["Keys.Sign"] = daemon.answers["Keys.Verify"] = error(f"io.unsealerd.Keys.{name}")
    expected = "BadMessage" if name == "Unheard" else name
    ctl("sign", "web", "--json").refused(code, expected)
    ctl("verify", "web", "--mac", MAC, "--json").refused(code, expected)
    ctl("sign", "web").refused(code)


@pytest.mark.parametrize("command", [("get", "web"), ("sign", "web"), ("verify", "web", "--mac", MAC)])
def test_no_daemon(ctl: Ctl, command: tuple[str, ...]) -> None:
    result = ctl(*command, "--json").refused(Exit.DAEMON_UNREACHABLE, "DaemonUnreachable")
    assert "systemctl status unsealerd" in result.err


def test_a_service_needs_no_configuration(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --config the default directory is used when the file cannot be read; a named file must be
    there.
    """
    monkeypatch.setattr("unsealerd.config.DEFAULT_PATH", ctl.config.with_name("none.toml"))
    result = ctl.bare("sign", "web").refused(Exit.DAEMON_UNREACHABLE)
    assert "/run/unsealerd/keys" in result.err
    ctl.bare("sign", "web", "--config", "/nonexistent", "--json").refused(Exit.CONFIGURATION, "ConfigInvalid")
    ctl.config.write_text("[daemon")
    monkeypatch.setattr("unsealerd.config.DEFAULT_PATH", ctl.config)
    ctl.bare("sign", "web").refused(Exit.CONFIGURATION)
