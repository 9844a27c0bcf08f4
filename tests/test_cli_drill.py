"""unsealctl drill: proves an identity, and asks for no unlock. With cards and real hosts: test_cli_unlock_card.py."""

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from rigs.ctl import Ctl
from rigs.stub_daemon import StubDaemon, error

from unsealerd.cli.edge import Exit
from unsealerd.core.age import X25519Identity
from unsealerd.core.session import recipient_tag
from unsealerd.model import Purpose

POINT = base64.b64encode(b"\x09" + bytes(31)).decode()  # RFC 7748 section 6.1: the base point


@pytest.fixture
def ctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ctl:
    monkeypatch.setenv("UNSEALERD_HOSTS", str(tmp_path / "hosts.json"))
    return Ctl(tmp_path)


@pytest.fixture
def daemon(ctl: Ctl) -> Iterator[StubDaemon]:
    with StubDaemon(ctl.runtime_dir) as stub:
        yield stub


@pytest.fixture
def identity() -> X25519Identity:
    return X25519Identity.generate()


@pytest.fixture
def key_file(tmp_path: Path, identity: X25519Identity) -> str:
    path = tmp_path / "key.txt"
    path.write_text(identity.encode())
    path.chmod(0o600)
    return str(path)


@pytest.fixture
def hellos(daemon: StubDaemon, identity: X25519Identity) -> list[dict[str, object]]:
    """An unlocked host that accepts."""
    seen: list[dict[str, object]] = []

    def hello(asked: dict[str, object]) -> dict[str, object]:
        seen.append(asked)
        tag = recipient_tag(base64.b64decode(str(asked["nonce"])), str(identity.recipient), Purpose.DRILL)
        challenge: dict[str, object] = {
            "session": base64.b64encode(bytes(16)).decode(),
            "questions": [{"tag": base64.b64encode(tag).decode(), "curve": "x25519", "point": POINT}],
            "lock_reason": "",
            "boot_id": "0f8fad5b-d9cb-469f-a165-70867728950e",
            "host_name": "web1",
            "uptime": 125,
            "generation": 7,
            "backup_time": 1700000000,
            "shares_present": 1,
            "shares_needed": 1,
            "deadline": 120,
        }
        return {"challenge": challenge}

    daemon.answers["Unlock.Hello"] = hello
    daemon.answers["Unlock.Answer"] = {
        "state": "unlocked",
        "shares_present": 1,
        "shares_needed": 1,
        "outcomes": [{"question": 0, "result": "accepted"}],
    }
    return seen


def test_a_drill_says_that_it_is_one(
    ctl: Ctl, hellos: list[dict[str, object]], identity: X25519Identity, key_file: str
) -> None:
    result = ctl("drill", "--local", "-i", key_file)
    assert result.code == 0, result.err
    assert result.out == (
        f"proven: {identity.recipient}\nthis host would accept it; nothing was unlocked or changed\n"
    )
    assert "locked  no" in result.err
    assert [call["purpose"] for call in hellos] == ["drill"]
    facts = ctl("drill", "--local", "-i", key_file, "--json").json
    assert facts["accepted"] == [str(identity.recipient)]
    assert facts["state"] == "unlocked"


def test_an_identity_that_does_not_open_the_backup(
    ctl: Ctl, daemon: StubDaemon, hellos: list[dict[str, object]], key_file: str
) -> None:
    answer = daemon.answers["Unlock.Answer"]
    assert isinstance(answer, dict)
    answer["outcomes"] = [{"question": 0, "result": "BadAnswer"}]
    result = ctl("drill", "--local", "-i", key_file, "--json")
    assert result.code == Exit.PEER
    assert result.json["error"] == "BadAnswer"


@pytest.mark.parametrize("name", ["NotAnOperator", "BackupDamaged", "NotInitialised", "LimitExceeded"])
def test_the_hosts_errors(ctl: Ctl, daemon: StubDaemon, key_file: str, name: str) -> None:
    daemon.answers["Unlock.Hello"] = error(f"io.unsealerd.Unlock.{name}")
    result = ctl("drill", "--local", "-i", key_file, "--json")
    assert result.json["error"] == name


def test_a_host_that_was_not_added(ctl: Ctl, key_file: str) -> None:
    ctl("drill", "web1", "-i", key_file, "--json").refused(Exit.HOST_UNKNOWN, "HostUnknown")
