"""unsealctl on the admin socket: init, status, identity, key, seal, arm, disarm, lock, backup."""

import base64
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from rigs.ctl import Ctl
from rigs.stub_daemon import StubDaemon, error

from unsealerd import keyringid
from unsealerd.cli import terminal
from unsealerd.cli.edge import Exit
from unsealerd.cli.status import REASONS
from unsealerd.model import LockReason

KEY = {
    "name": "web",
    "owner": "team-web@example.com",
    "purpose": "session cookies",
    "size": 32,
    "declared": True,
    "rotate_every": 2592000,
    "overlap": 604800,
    "next_rotation": 1702592000,
    "allow": [{"unit": "web.service", "operations": ["read", "sign"]}],
    "versions": [
        {
            "version": 1,
            "state": "active",
            "created": 1690000000,
            "changed": 1700000000,
            "retires": 1700604800,
        },
        {"version": 2, "state": "primary", "created": 1700000000, "changed": None, "retires": None},
    ],
}
STATUS = {
    "state": "locked",
    "lock_reason": "pcr_mismatch",
    "since": 1700000000,
    "generation": 7,
    "keys": ["web"],
    "tpm": {"present": True, "tcti": "device:/dev/tpmrm0", "pcrs": [7], "error": None, "counter": 12},
    "seal": {"sealed": False, "kind": None, "created": None, "deadline": None, "on": ["reboot"]},
    "sessions": [
        {"operators": ["alice"], "peer": "192.0.2.1", "opened": 1700000001, "words": ["one", "two"]}
    ],
    "shares": {"present": 0, "needed": 1},
    "lock_detail": "PCR 7 differs",
    "warnings": ["something \x1b[31mred"],
}
BACKUP = b"age-encryption.org/v1\n-> X25519 ..."
ADMIN = [
    (("init",), "Init"),
    (("status",), "Status"),
    (("key", "list"), "ListKeys"),
    (("key", "show", "web"), "ShowKey"),
    (("key", "rotate", "web"), "RotateKey"),
    (("key", "revoke", "web"), "RevokeKey"),
    (("seal",), "Seal"),
    (("arm", "--for", "15m"), "Arm"),
    (("disarm",), "Disarm"),
    (("lock",), "Lock"),
    (("backup", "verify"), "VerifyBackup"),
    (("backup", "export", "copy.age"), "ExportBackup"),
    (("backup", "pin"), "Status"),
]
commands = pytest.mark.parametrize(("command", "method"), ADMIN, ids=[method for _, method in ADMIN])


@pytest.fixture
def ctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ctl:
    monkeypatch.chdir(tmp_path)
    return Ctl(tmp_path)


@pytest.fixture
def daemon(ctl: Ctl) -> Iterator[StubDaemon]:
    with StubDaemon(ctl.runtime_dir) as stub:
        yield stub


# --- every command


@commands
def test_no_daemon(ctl: Ctl, command: tuple[str, ...], method: str) -> None:
    result = ctl(*command, "--json").refused(Exit.DAEMON_UNREACHABLE, "DaemonUnreachable")
    assert result.err.endswith("hint: systemctl status unsealerd\n")


@commands
def test_no_permission(
    ctl: Ctl, daemon: StubDaemon, command: tuple[str, ...], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("socket.socket.connect", refuse)
    assert "sudo" in ctl(*command, "--json").refused(Exit.ACCESS_DENIED, "AccessDenied").err


@commands
def test_a_wrong_configuration(ctl: Ctl, command: tuple[str, ...], method: str) -> None:
    ctl.bare(*command, "--json", "--config", "/nonexistent").refused(Exit.CONFIGURATION, "ConfigInvalid")
    ctl.config.write_bytes(b"\xff")
    ctl(*command, "--json").refused(Exit.CONFIGURATION, "ConfigInvalid")


@commands
@pytest.mark.parametrize("name", ["Locked", "StorageFailed", "TpmMissing", "NotInitialised", "KeyNotFound"])
def test_the_daemons_errors(
    ctl: Ctl, daemon: StubDaemon, command: tuple[str, ...], method: str, name: str
) -> None:
    daemon.answers[f"Admin.{method}"] = error(f"io.unsealerd.Admin.{name}", detail="because\nof\x1b[2J")
    result = ctl(*command, "--json")
    assert result.json == {"error": name, "detail": r"because\nof\x1b[2J"}
    ctl(*command).refused(result.code)
    assert r"unsealctl: because\nof\x1b[2J" in result.err


@commands
@pytest.mark.promise(10)
@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0",
        b'{"parameters":[]}\0',
        {},
        {"status": 1, "key": [], "keys": {}, "generation": "1", "backup": 5, "seal": "x"},
        {"status": {}, "key": {}, "keys": [1], "generation": True, "backup": "!", "seal": None},
        {
            "status": {"state": 1},
            "key": {"name": 1},
            "keys": [{}],
            "generation": 1,
            "backup": "",
            "operators": 1,
        },
    ],
)
def test_a_broken_daemon(
    ctl: Ctl, daemon: StubDaemon, command: tuple[str, ...], method: str, answer: bytes | dict[str, object]
) -> None:
    if method in ("Disarm", "Lock") and isinstance(answer, dict):
        return  # their answer has no parameters to be wrong
    daemon.answers[f"Admin.{method}"] = answer
    result = ctl(*command)
    result.refused(Exit.DAEMON_UNREACHABLE if answer == b"" else Exit.PEER)
    assert not result.raw


def test_true_is_no_number(ctl: Ctl, daemon: StubDaemon) -> None:
    daemon.answers["Admin.Init"] = {"generation": True, "keys": []}
    ctl("init").refused(Exit.PEER)


# --- status


def test_status_json_is_the_daemons_object(ctl: Ctl, daemon: StubDaemon) -> None:
    daemon.answers["Admin.Status"] = {"status": STATUS}
    result = ctl("status", "--json")
    assert result.code == 0
    assert result.json == STATUS
    assert list(result.json) == list(STATUS)
    assert ctl.bare("status", "--json", "--config", str(ctl.config)).raw == result.raw
    assert ctl("--json", "status").raw == result.raw


def test_status_says_what_happened_and_what_to_do(ctl: Ctl, daemon: StubDaemon) -> None:
    daemon.answers["Admin.Status"] = {"status": STATUS}
    rows = dict(line.split(maxsplit=1) for line in ctl("status").out.splitlines())
    assert rows["state"].startswith("locked: ")
    assert rows["reason"].startswith("pcr_mismatch: the boot was measured differently")
    assert rows["detail"] == "PCR 7 differs"
    assert rows["since"].startswith("2023-11-14 22:13:20 UTC")
    assert "unsealctl unlock" in rows["next"]
    assert rows["keys"] == "1: web"
    assert "counter 12" in rows["tpm"]
    assert rows["shares"] == "0 of 1"
    assert "alice from 192.0.2.1, words: one two" in rows["sessions"]
    assert rows["warnings"] == r"something \x1b[31mred"


@pytest.mark.parametrize("reason", [reason.value for reason in LockReason])
def test_every_reason_has_its_words(ctl: Ctl, daemon: StubDaemon, reason: str) -> None:
    happened, then = REASONS[reason]
    daemon.answers["Admin.Status"] = {"status": {**STATUS, "lock_reason": reason}}
    out = ctl("status").out
    assert f"{reason}: {happened}" in out
    assert then in out


def test_status_of_a_new_host_says_init(ctl: Ctl, daemon: StubDaemon) -> None:
    daemon.answers["Admin.Status"] = {
        "status": {
            **STATUS,
            "state": "uninitialised",
            "lock_reason": "first_boot",
            "keys": [],
            "sessions": [],
        }
    }
    rows = dict(line.split(maxsplit=1) for line in ctl("status").out.splitlines())
    assert rows["next"].endswith("sudo unsealctl init")


# --- init and identity


def test_init_makes_the_keyring_and_the_identity(ctl: Ctl, daemon: StubDaemon) -> None:
    certificate = ctl.state_dir / "gateway" / "tls.crt"
    identity_was_first: list[bool] = []

    def make(_: dict[str, object]) -> dict[str, object]:
        identity_was_first.append(certificate.exists())
        return {"generation": 1, "keys": ["web"], "keyring": "ab" * 32}

    daemon.answers["Admin.Init"] = make
    first = ctl("init", "--json").json
    assert identity_was_first == [True]  # else a failure in between would leave a host that cannot get one
    assert list(first) == ["generation", "keys", "keyring", "fingerprint", "words"]
    assert keyringid.read(ctl.config.with_name("keyring.id")) == first["keyring"] == "ab" * 32
    assert first["keys"] == ["web"]
    key = ctl.state_dir / "gateway" / "tls.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    identity = ctl("identity", "--json").json
    assert identity == {"fingerprint": first["fingerprint"], "words": first["words"]}
    words = first["words"]
    assert isinstance(words, list)
    assert " ".join(words) in ctl("identity").out
    assert str(first["fingerprint"]) in ctl("identity").out


def test_a_second_init_keeps_the_identity(ctl: Ctl, daemon: StubDaemon) -> None:
    daemon.answers["Admin.Init"] = {"generation": 1, "keys": ["web"], "keyring": "ab" * 32}
    said = ctl("init").out
    assert "web" in said
    assert "unsealctl host add" in said
    before = ctl("identity", "--json").raw
    daemon.answers["Admin.Init"] = error("io.unsealerd.Admin.AlreadyInitialised", detail="there is a backup")
    ctl("init", "--json").refused(Exit.ALREADY_INITIALISED, "AlreadyInitialised")
    assert ctl("identity", "--json").raw == before


def test_an_init_that_cannot_pin_has_still_made_a_keyring(ctl: Ctl, daemon: StubDaemon) -> None:
    """A file system that is read-only, or, as here, something in the way."""
    ctl.config.with_name("keyring.id").mkdir()
    daemon.answers["Admin.Init"] = {"generation": 1, "keys": ["web"], "keyring": "ab" * 32}
    result = ctl("init", "--json")
    assert result.code == 0
    assert result.json["keyring"] == "ab" * 32
    assert "keyring.id" in result.err
    assert "hint: when that is mended: unsealctl backup pin" in result.err


def test_identity_before_init(ctl: Ctl) -> None:
    ctl("identity", "--json").refused(Exit.NOT_INITIALISED, "NotInitialised")


def test_a_damaged_certificate(ctl: Ctl) -> None:
    (ctl.state_dir / "gateway").mkdir()
    (ctl.state_dir / "gateway" / "tls.crt").write_text("-----BEGIN CERTIFICATE-----\n")
    ctl("identity", "--json").refused(Exit.STORED_DATA, "IdentityInvalid")


# --- keys


def test_key_list(ctl: Ctl, daemon: StubDaemon) -> None:
    daemon.answers["Admin.ListKeys"] = {"keys": [KEY]}
    assert ctl("key", "list", "--json").json == {"keys": [KEY]}
    header, row = ctl("key", "list").out.splitlines()
    assert header.split()[:3] == ["NAME", "PRIMARY", "VERSIONS"]
    assert row.split()[:5] == ["web", "2", "2", "of", "2"]
    daemon.answers["Admin.ListKeys"] = {"keys": []}
    assert "no keys" in ctl("key", "list").out


@pytest.mark.parametrize(
    ("verb", "method"), [("show", "ShowKey"), ("rotate", "RotateKey"), ("revoke", "RevokeKey")]
)
def test_one_key(ctl: Ctl, daemon: StubDaemon, verb: str, method: str) -> None:
    daemon.answers[f"Admin.{method}"] = {"key": KEY}
    assert ctl("key", verb, "web", "--json").json == KEY
    assert daemon.calls == [(f"Admin.{method}", {"name": "web"})]
    out = ctl("key", verb, "web").out
    assert "unit web.service: read, sign" in out
    assert "primary, made 2023-11-14" in out
    assert "every 30 days" in out


def test_revoke_one_version(ctl: Ctl, daemon: StubDaemon) -> None:
    daemon.answers["Admin.RevokeKey"] = {"key": KEY}
    assert ctl("key", "revoke", "web", "--version", "1").code == 0
    assert daemon.calls == [("Admin.RevokeKey", {"name": "web", "version": 1})]
    ctl("key", "revoke", "web", "--version", "0").refused(Exit.USAGE)


def test_revoke_asks_a_person(ctl: Ctl, daemon: StubDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.answers["Admin.RevokeKey"] = {"key": KEY}
    asked: list[str] = []

    def answer(question: str) -> bool:
        asked.append(question)
        return len(asked) > 1

    monkeypatch.setattr(terminal, "confirm", answer)
    ctl("key", "revoke", "web", terminal=True).refused(Exit.USAGE)
    assert not daemon.calls
    assert ctl("key", "revoke", "web", terminal=True).code == 0
    assert ctl("key", "revoke", "web", "--yes", terminal=True).code == 0
    assert len(asked) == 2
    assert len(daemon.calls) == 2


# --- seal


def test_seal_arm_disarm_lock(ctl: Ctl, daemon: StubDaemon) -> None:
    sealed = {
        "sealed": True,
        "kind": "reboot",
        "created": 1700000000,
        "deadline": 1700000900,
        "on": ["reboot"],
    }
    daemon.answers |= {
        "Admin.Seal": {"seal": sealed},
        "Admin.Arm": {"seal": sealed},
        "Admin.Disarm": {},
        "Admin.Lock": {},
    }
    assert ctl("seal", "--json").json == sealed
    assert ctl("seal", "--kind", "kexec").out.startswith("sealed for the next boot (kexec)")
    assert ctl("arm", "--for", "15m", "--json").json == sealed
    assert "2023-11-14 22:28:20" in ctl("arm", "--for", "2h").out
    assert ctl("disarm", "--json").json == {"disarmed": True}
    assert ctl("lock", "--json").json == {"state": "locked"}
    assert ctl("disarm").out
    assert ctl("lock").out
    assert daemon.calls[:4] == [
        ("Admin.Seal", {"kind": "reboot"}),
        ("Admin.Seal", {"kind": "kexec"}),
        ("Admin.Arm", {"seconds": 900}),
        ("Admin.Arm", {"seconds": 7200}),
    ]


@pytest.mark.parametrize("duration", ["", "15", "0m", "m", "-1m", "1.5h", "15 m", "99999999999d"])
def test_arm_wants_a_duration(ctl: Ctl, daemon: StubDaemon, duration: str) -> None:
    ctl("arm", f"--for={duration}", "--json").refused(Exit.USAGE, "BadRequest")
    assert not daemon.calls


def test_a_refused_seal_is_hardware(ctl: Ctl, daemon: StubDaemon) -> None:
    daemon.answers["Admin.Seal"] = error("io.unsealerd.Admin.SealRefused", detail="pcr_mismatch")
    ctl("seal", "--json").refused(Exit.HARDWARE, "SealRefused")


# --- backup


def test_backup_verify(ctl: Ctl, daemon: StubDaemon) -> None:
    facts = {"generation": 7, "bytes": 700, "sha256": "ab" * 32, "operators": ["alice", "bob"]}
    daemon.answers["Admin.VerifyBackup"] = facts
    assert ctl("backup", "verify", "--json").json == facts
    assert "alice, bob" in ctl("backup", "verify").out


def exported(daemon: StubDaemon, data: bytes) -> None:
    daemon.answers["Admin.ExportBackup"] = {
        "generation": 7,
        "keyring": "ab" * 32,
        "backup": base64.b64encode(data).decode(),
    }


def test_backup_export(ctl: Ctl, daemon: StubDaemon, tmp_path: Path) -> None:
    exported(daemon, BACKUP)
    target = tmp_path / "copy.age"
    facts = ctl("backup", "export", str(target), "--json").json
    assert list(facts) == ["file", "keyring", "generation", "bytes", "sha256"]
    assert target.read_bytes() == BACKUP
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    exported(daemon, BACKUP + b"2")
    ctl("backup", "export", str(target), "--json").refused(Exit.USAGE, "BadRequest")
    assert target.read_bytes() == BACKUP
    assert ctl("backup", "export", str(target), "--force").code == 0
    assert target.read_bytes() == BACKUP + b"2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.age", "run", "state", "unsealerd.toml"]


def test_an_export_that_fails_leaves_nothing(
    ctl: Ctl, daemon: StubDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(daemon, BACKUP)
    ctl("backup", "export", "/nonexistent/copy.age", "--json").refused(Exit.STORED_DATA, "StorageFailed")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    ctl("backup", "export", str(tmp_path / "copy.age"), "--json").refused(Exit.STORED_DATA, "StorageFailed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "state", "unsealerd.toml"]


def test_a_link_is_not_written_through(ctl: Ctl, daemon: StubDaemon, tmp_path: Path) -> None:
    exported(daemon, BACKUP)
    (tmp_path / "copy.age").symlink_to(tmp_path / "victim")
    ctl("backup", "export", str(tmp_path / "copy.age")).refused(Exit.USAGE)
    assert ctl("backup", "export", str(tmp_path / "copy.age"), "--force").code == 0
    assert not (tmp_path / "victim").exists()


@pytest.mark.promise(11)
@pytest.mark.parametrize("data", [b"", b"not an age file"])
def test_what_is_no_backup_is_not_exported(ctl: Ctl, daemon: StubDaemon, tmp_path: Path, data: bytes) -> None:
    exported(daemon, data)
    ctl("backup", "export", "copy.age", "--json").refused(Exit.PEER, "BadMessage")
    assert not (tmp_path / "copy.age").exists()


def test_json_is_one_line_of_ascii(ctl: Ctl, daemon: StubDaemon) -> None:
    daemon.answers["Admin.Status"] = {"status": {**STATUS, "host_name": "h\u00f6st\ud800"}}
    result = ctl("status", "--json")
    assert result.raw.isascii()
    assert json.loads(result.raw)["host_name"] == "h\u00f6st\ud800"
    assert ctl("status").code == 0
