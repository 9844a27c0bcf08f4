"""unsealctl doctor: a healthy server has nothing to be told, and each bad fact is found, with a hint."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rigs.ctl import Ctl
from rigs.patient import DAY, SECURE_BOOT, Patient, key
from rigs.server import Server
from rigs.stub_daemon import error

from unsealerd.cli.doctor.finding import Finding, Verdict
from unsealerd.cli.doctor.gateway import near
from unsealerd.cli.doctor.machine import Account, Machine
from unsealerd.cli.edge import Exit
from unsealerd.gateway import identity

DOCUMENT = Path(__file__).parent.parent / "docs" / "monitoring.md"


@pytest.fixture
def patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Patient]:
    with Patient(tmp_path) as patient:
        monkeypatch.setenv("PATH", f"{patient.bin}:{os.environ['PATH']}")
        monkeypatch.setattr(Machine, "kernel_says_synchronised", lambda _: False)
        yield patient


def complaints(patient: Patient) -> list[Finding]:
    patient.write()
    found = [finding for finding in patient.examine() if finding.verdict is not Verdict.OK]
    assert all(finding.hint for finding in found)
    return found


def kexec_tools(patient: Patient, state: str, setting: str = "LOAD_KEXEC=true") -> None:
    """As Debian 12 installs them."""
    patient.put("etc/default/kexec", f"# Load a kexec kernel (true/false)\n{setting}\n")
    patient.units["kexec-load.service"] = {"LoadState": state}


@pytest.mark.parametrize(
    ("state", "setting"), [("masked", "LOAD_KEXEC=true"), ("loaded", "LOAD_KEXEC=false"), ("loaded", "")]
)
def test_kexec_tools_that_do_nothing_are_no_obstacle(patient: Patient, state: str, setting: str) -> None:
    kexec_tools(patient, state, setting)
    patient.write()
    assert [finding for finding in patient.examine() if finding.verdict is not Verdict.OK] == []


def test_a_healthy_server_has_nothing_to_be_told(patient: Patient) -> None:
    patient.write()
    found = patient.examine()
    assert [finding for finding in found if finding.verdict is not Verdict.OK] == []
    assert [finding.check for finding in found] == [
        "host",
        "operators",
        "backup",
        "keys",
        "keyring",
        "audit log",
        "tpm",
        "tpm lockout",
        "storage root key",
        "tpm counter",
        "pcrs",
        "secure boot",
        "secret memory",
        "swap",
        "restart",
        "core dumps",
        "clock",
        "time source",
        "configuration",
        "files",
        "way to the files",
        "sockets",
        "daemon's unit",
        "watchdog",
        "fd store",
        "gateway's unit",
        "notification",
        "gateway",
        "planned reboot",
    ]
    documented = DOCUMENT.read_text()
    for finding in found:
        assert f"\n| {finding.check} |" in documented, finding.check


def tpm(**facts: object) -> Callable[[Patient], None]:
    return lambda patient: patient.status["tpm"].update(facts)


def says(**facts: object) -> Callable[[Patient], None]:
    return lambda patient: patient.status.update(facts)


def keyring(**facts: object) -> Callable[[Patient], None]:
    return lambda patient: patient.status["keyring"].update(facts)


def keys(*listed: dict[str, Any]) -> Callable[[Patient], None]:
    return lambda patient: patient.keys_listed.__setitem__(slice(None), listed)


def unit(name: str, **properties: str) -> Callable[[Patient], None]:
    return lambda patient: patient.units.setdefault(name, {}).update(properties)


def without(name: str) -> Callable[[Patient], None]:
    return lambda patient: patient.units.__delitem__(name)


def holds(name: str, content: str | bytes) -> Callable[[Patient], None]:
    return lambda patient: patient.put(name, content)


def lacks(name: str) -> Callable[[Patient], None]:
    return lambda patient: (patient.root / name).unlink()


def configured(text: str) -> Callable[[Patient], None]:
    return lambda patient: setattr(patient, "tables", patient.tables + text)


def proven(**days: float | None) -> Callable[[Patient], None]:
    now = int(time.time())
    return lambda patient: patient.status.update(
        operators=[
            {"name": name, "proven": None if ago is None else int(now - ago * DAY)}
            for name, ago in days.items()
        ]
    )


def history(*events: str, reason: str = "pcr_mismatch") -> Callable[[Patient], None]:
    def change(patient: Patient) -> None:
        patient.audit, patient.reason = list(events), reason

    return change


def backup(answer: object) -> Callable[[Patient], None]:
    return lambda patient: setattr(patient, "backup", answer)


LIMITS = f"proc/{os.getpid()}/limits"
DUMPS = "Max core file size        unlimited            unlimited            bytes\n"
ILL: list[tuple[Callable[[Patient], None], str, str, str]] = [
    # --- host, operators, backup, keys, audit log
    (says(state="uninitialised"), "host", "fail", "no keyring"),
    (says(state="locked", lock_reason="rollback"), "host", "fail", "rollback"),
    (proven(), "operators", "fail", "0 named"),
    (proven(alice=None, bob=None), "operators", "fail", "0 of 2"),
    (proven(alice=91, bob=91), "operators", "fail", "0 of 2"),
    (proven(alice=1, bob=91), "operators", "warn", "just enough"),
    (proven(alice=1), "operators", "warn", "one identity is lost"),
    (backup(error("io.unsealerd.Admin.BackupDamaged", detail="torn")), "backup", "fail", "BackupDamaged: torn"),
    (backup(error("io.unsealerd.Admin.Locked")), "backup", "warn", "not checked"),
    (keys(key(declared=False)), "keys", "warn", "not declared"),
    (keys(key(versions=[{"version": 1, "state": "revoked"}])), "keys", "fail", "no version that signs"),
    (keys(key(allow=[])), "keys", "warn", "granted to nobody"),
    (keys(key(overlap=0)), "keys", "warn", "without overlap"),
    (keys(key(next_rotation=int(time.time()) - DAY)), "keys", "fail", "should have rotated 1 day"),
    (keys(*(key(f"k{number}", allow=[]) for number in range(9))), "keys", "warn", "and 4 more"),
    # --- which keyring is this host's
    (keyring(pinned=None), "keyring", "warn", "is missing"),
    (keyring(pinned="a5" * 32), "keyring", "fail", "another one than is open"),
    (keyring(pinned=None, error="keyring.id: not the id"), "keyring", "fail", "no backup will be opened"),
    # --- TPM
    (configured('[tpm]\ntcti = "none"\n'), "tpm", "warn", "none configured"),
    (tpm(error="TpmMissing"), "tpm", "fail", "TpmMissing"),
    (tpm(error="TpmChanged"), "tpm", "fail", "TpmChanged"),
    (tpm(in_lockout=True), "tpm lockout", "fail", "lockout"),
    (tpm(lockout_counter=2), "tpm lockout", "warn", "2 failures"),
    (tpm(counter=None), "storage root key", "warn", "not pinned"),
    (tpm(counter_behind=True), "tpm counter", "fail", "behind"),
    (tpm(pcr_values={}), "pcrs", "fail", "no SHA-256 bank"),
    (tpm(pcr_values={"7": "00" * 32}), "pcrs", "fail", "nothing was measured into 7"),
    (holds(SECURE_BOOT, b"\6\0\0\0\0"), "secure boot", "warn", "off"),
    (lacks(SECURE_BOOT), "secure boot", "warn", "not booted by UEFI"),
    # --- memory
    (says(secret_memory="mlock"), "secret memory", "warn", "root and the kernel"),
    (says(memory={"kept": False, "why": "no store"}), "restart", "warn", "no store"),
    (says(warnings=["core dumps could not be forbidden"]), "daemon", "warn", "core dumps"),
    (holds(LIMITS, DUMPS), "core dumps", "fail", "unlimited"),
    (lacks(LIMITS), "core dumps", "warn", "cannot be read"),
    # --- clock
    (says(backup={"written": int(time.time()) + DAY}), "clock", "fail", "behind"),
    (lacks("run/systemd/timesync/synchronized"), "time source", "warn", "not synchronised"),
    # --- units
    (unit("unsealerd.service", UnitFileState="disabled"), "units", "fail", "unsealerd.service is disabled"),
    (unit("unsealerd.service", ActiveState="failed"), "units", "fail", "unsealerd.service is failed"),
    (unit("unsealerd.service", NeedDaemonReload="yes"), "units", "warn", "changed on disk"),
    (without("unsealerd-gateway.service"), "units", "fail", "unsealerd-gateway.service is not-found"),
    (without("unsealerd-unlocked.target"), "units", "fail", "unsealerd-unlocked.target"),
    (without("unsealerd-watch.service"), "units", "fail", "unsealerd-watch.service"),
    (without("unsealerd-notify@locked.service"), "units", "fail", "nobody is told"),
    (without("web.service"), "on_rotate", "warn", "web.service"),
    (unit("unsealerd.service", WatchdogUSec="0"), "watchdog", "warn", "hangs"),
    (unit("unsealerd.service", FileDescriptorStoreMax="0"), "fd store", "warn", "locks the host"),
    (unit("unsealerd.service", ExecStop=""), "planned reboot", "fail", "does not seal when it is stopped"),
    (lambda patient: setattr(patient, "systemctl_code", 1), "units", "fail", "does not answer"),
    (lambda patient: setattr(patient, "tables", ""), "notification", "warn", "tells nobody"),
    # --- the next planned reboot
    (configured('[seal]\non = ["kexec"]\n'), "planned reboot", "warn", "does not name reboot"),
    (lambda patient: kexec_tools(patient, "loaded"), "planned reboot", "fail", "kexec-tools"),
    (tpm(in_lockout=True), "planned reboot", "fail", "lockout"),
    (tpm(counter_behind=True), "planned reboot", "fail", "counter"),
    (tpm(error="TpmFailed"), "planned reboot", "fail", "TpmFailed"),
    (says(state="locked"), "planned reboot", "fail", "locked"),
    (configured('[tpm]\ntcti = "none"\n'), "planned reboot", "warn", "no TPM"),
    (history("start"), "planned reboot", "warn", "never tried"),
    (history("start", "unseal", "locked"), "planned reboot", "warn", "pcr_mismatch"),
    (history("start", "unseal", "locked", reason="not_the_next_boot"), "planned reboot", "warn", "not_the_next_boot"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ILL)))
def test_a_bad_fact_is_found(patient: Patient, number: int) -> None:
    change, check, verdict, text = ILL[number]
    change(patient)
    found = complaints(patient)
    assert any(
        (finding.check, finding.verdict.value) == (check, verdict) and text in finding.text
        for finding in found
    ), found


@pytest.mark.parametrize(
    "change",
    [
        configured('[unlock]\nrequire = ["ops"]\n'),
        history("unseal", "unsealed", "start", "locked"),  # a crash says nothing about planned reboots
        tpm(parent="template"),
        keys(),
        keys(key(rotate_every=None, overlap=None, next_rotation=None)),
        unit("unsealerd.service", ActiveState="reloading"),
        says(memory=None),
        lacks("proc/swaps"),
    ],
)
def test_a_harmless_fact_is_no_complaint(patient: Patient, change: Callable[[Patient], None]) -> None:
    change(patient)
    assert complaints(patient) == []


def test_swap_matters_where_memory_is_not_secret(patient: Patient) -> None:
    patient.put("proc/swaps", "Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n")
    assert complaints(patient) == []
    patient.status["secret_memory"] = "mlock"
    assert [finding.check for finding in complaints(patient)] == ["secret memory", "swap"]


def test_one_pcr_of_two_without_measurements(patient: Patient) -> None:
    patient.tables += "[tpm]\npcrs = [7, 11]\n"
    patient.status["tpm"]["pcr_values"]["11"] = "00" * 32
    (found,) = complaints(patient)
    assert (found.verdict, found.text) == (Verdict.WARN, "nothing was measured into 11")


def test_whoever_is_required_is_proven(patient: Patient) -> None:
    patient.tables += '[unlock]\nrequire = ["ops"]\n'
    patient.status["operators"].append({"name": "carol", "proven": int(time.time())})
    patient.status["operators"][0]["proven"] = None
    (found,) = complaints(patient)
    assert found.verdict is Verdict.FAIL
    assert found.text.startswith("ops must be among")


@pytest.mark.parametrize(
    ("path", "mode", "check"),
    [
        ("unsealerd.toml", 0o660, "configuration"),
        ("unsealerd.toml", 0o642, "configuration"),
        ("unsealerd.toml", 0o644, "configuration"),
        ("gateway.toml", 0o664, "configuration"),
        ("gateway.toml", 0o646, "configuration"),
        ("keyring.id", 0o664, "configuration"),
        ("state", 0o755, "files"),
        ("state/keyring.age", 0o640, "files"),
        ("state/audit.jsonl", 0o644, "files"),
        ("state/tpm.json", 0o604, "files"),
        ("state/gateway", 0o711, "files"),
        ("state/gateway/tls.key", 0o640, "files"),
        ("state/gateway/tls.crt", 0o664, "files"),
        ("run/admin", 0o660, "sockets"),
        ("run/unlock", 0o666, "sockets"),
        ("run", 0o777, "sockets"),
        ("", 0o777, "way to the files"),
    ],
)
def test_a_mode_that_lets_others_in(
    patient: Patient, tmp_path: Path, path: str, mode: int, check: str
) -> None:
    patient.write()
    (tmp_path / path).chmod(mode)
    found = [finding for finding in patient.examine() if finding.verdict is not Verdict.OK]
    assert [finding.check for finding in found] == [check]
    assert found[0].hint.startswith("chmod ")
    os.system(found[0].hint)  # what the hint says puts it right
    assert [finding for finding in patient.examine() if finding.verdict is not Verdict.OK] == []
    tmp_path.chmod(0o700)


WEBHOOK = '[notify]\nwebhook = "https://example.org/token"\n'
PASSPHRASE = (
    '[[operator]]\nname = "carol"\nrecipient = "age1c"\npassphrase = "argon2id$v=19$m=65536,t=2,p=1$c2FsdA"\n'
)


@pytest.mark.parametrize(
    ("tables", "verdict", "what"),
    [
        ("", Verdict.WARN, "who may unlock"),
        (WEBHOOK, Verdict.FAIL, "webhook"),
        (PASSPHRASE, Verdict.FAIL, "passphrase can be guessed"),
    ],
)
@pytest.mark.parametrize(
    ("mode", "uid", "gids", "who"),
    [
        (0o644, 990, {990}, "everybody"),
        (0o640, 990, {990, 0}, "the gateway"),  # the file's group is root's
        (0o640, 0, {990}, "the gateway"),
    ],
)
def test_a_configuration_that_the_gateway_reads(
    patient: Patient,
    monkeypatch: pytest.MonkeyPatch,
    tables: str,
    verdict: Verdict,
    what: str,
    mode: int,
    uid: int,
    gids: set[int],
    who: str,
) -> None:
    asked = []

    def account(_: Machine, name: str) -> Account:
        asked.append(name)
        return Account(uid, frozenset(gids))

    monkeypatch.setattr(Machine, "account", account)
    patient.tables = tables
    patient.write()
    patient.config.chmod(mode)
    (found,) = (finding for finding in patient.examine() if finding.check == "configuration")
    assert found.verdict is verdict
    assert found.text.startswith(who)
    assert what in found.text
    assert "token" not in str(found)
    assert "c2FsdA" not in str(found)
    assert set(asked) == {"unsealerd-gateway"}


@pytest.mark.parametrize(("uid", "gids"), [(990, {990}), (990, {990, 991})])
def test_a_configuration_that_the_gateway_cannot_read(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, uid: int, gids: set[int]
) -> None:
    monkeypatch.setattr(Machine, "account", lambda *_: Account(uid, frozenset(gids)))
    patient.tables += PASSPHRASE
    patient.write()
    (found,) = (finding for finding in patient.examine() if finding.check == "configuration")
    assert found.verdict is Verdict.OK


def test_an_account_is_what_the_system_says() -> None:
    account = Machine().account("root")
    assert account is not None
    assert (account.uid, 0 in account.gids) == (0, True)
    assert Machine().account("nobody-of-that-name") is None


def test_the_two_files_that_do_not_agree(patient: Patient) -> None:
    patient.write()
    right = patient.gateway_config.read_text()
    patient.gateway_config.write_text(right.replace(f'"{patient.run}"', '"/run/elsewhere"'))
    (found,) = (finding for finding in patient.examine() if finding.verdict is not Verdict.OK)
    assert (found.check, found.verdict) == ("gateway", Verdict.FAIL)
    assert found.text.startswith("runtime_dir is /run/elsewhere in ")
    patient.gateway_config.write_text(right.replace(f'"{patient.state}"', '"/elsewhere"'))
    (found,) = (finding for finding in patient.examine() if finding.verdict is not Verdict.OK)
    assert found.text.startswith("state_dir is /elsewhere in ")


def test_a_gateways_file_that_is_wrong_or_gone(patient: Patient) -> None:
    patient.write()
    patient.gateway_config.write_text("[gateway]\n")
    (found,) = (finding for finding in patient.examine() if finding.verdict is not Verdict.OK)
    assert found.text.startswith(f"ConfigInvalid: {patient.gateway_config}: ")
    patient.gateway_config.unlink()
    (found,) = (finding for finding in patient.examine() if finding.verdict is not Verdict.OK)
    assert (found.check, found.verdict) == ("gateway", Verdict.FAIL)
    assert "No such file" in found.text


def test_a_file_that_is_missing_or_something_else(patient: Patient) -> None:
    (patient.state / "keyring.age").unlink()
    (patient.state / "gateway" / "tls.crt").rename(patient.state / "crt")
    (patient.state / "gateway" / "tls.crt").symlink_to(patient.state / "crt")
    (patient.state / "crt").chmod(0o644)
    texts = [finding.text for finding in complaints(patient) if finding.check == "files"]
    assert len(texts) == 2
    assert "backup" in texts[0]
    assert "something else" in texts[1]


def test_another_key_at_the_gateways_address(patient: Patient, tmp_path: Path) -> None:
    identity.create(tmp_path / "other")
    patient.serve_tls(tmp_path / "other")
    (found,) = complaints(patient)
    assert (found.check, found.verdict) == ("gateway", Verdict.FAIL)
    assert "another key" in found.text
    patient.port = 1
    (found,) = complaints(patient)
    assert found.text.startswith("HostUnreachable: 127.0.0.1:1: ")


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("[::]:8750", "[::1]:8750"),
        ("0.0.0.0:1", "127.0.0.1:1"),
        ("192.0.2.1:1", "192.0.2.1:1"),
        ("a.b:2", "a.b:2"),
    ],
)
def test_everywhere_is_reached_from_here(listen: str, address: str) -> None:
    assert near(listen) == address


def test_a_broken_chain(patient: Patient) -> None:
    patient.write()
    log = patient.state / "audit.jsonl"
    log.write_bytes(log.read_bytes().replace(b"unseal", b"unsaal", 1))
    found = [finding for finding in patient.examine() if finding.verdict is Verdict.FAIL]
    assert [finding.check for finding in found] == ["audit log"]
    assert found[0].text.startswith("AuditBroken: line 2")


def test_without_systemd(patient: Patient) -> None:
    (patient.root / "run/systemd/system/x").unlink()
    (patient.root / "run/systemd/system").rmdir()
    (found,) = complaints(patient)
    assert (found.check, found.verdict) == ("units", Verdict.WARN)


def test_a_daemon_that_does_not_answer(patient: Patient) -> None:
    patient.write()
    patient.stop()
    found = {finding.check: finding for finding in patient.examine()}
    assert found["daemon"].verdict is Verdict.FAIL
    assert found["daemon"].text.startswith("DaemonUnreachable")
    assert found["audit log"].verdict is Verdict.OK
    assert "tpm" not in found
    assert "planned reboot" not in found


# --- the command


def test_the_command_and_its_exit_codes(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("unsealerd.cli.doctor.Machine", lambda: Machine(patient.root))
    patient.tables = ""
    patient.write()
    (tmp_path / "ctl").mkdir()
    ctl = Ctl(tmp_path / "ctl")
    ctl.config = patient.config
    result = ctl("doctor")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0] == "ok    host              unlocked"
    assert lines[-1] == "28 ok, 1 warn, 0 fail"
    assert sum(line.lstrip().startswith("hint: ") for line in lines) == 1
    assert ctl("doctor", "--json").json["healthy"] is True

    patient.status["state"] = "locked\x1b[31m"
    patient.status["lock_reason"] = "rollback"
    patient.write()
    result = ctl("doctor")
    assert (result.code, result.err) == (Exit.UNFIT, "")
    assert "\x1b" not in result.out
    found = ctl("doctor", "--json")
    assert found.code == Exit.UNFIT
    assert found.json["healthy"] is False
    findings = found.json["findings"]
    assert isinstance(findings, list)
    assert {"check", "verdict", "text", "hint"} == set(findings[0])

    patient.config.write_text("[odd]\n")
    result = ctl("doctor")
    assert result.code == Exit.UNFIT
    assert result.out.startswith("fail  configuration  ConfigInvalid")


def test_a_real_server() -> None:
    """What a machine of tests cannot have is told, and nothing else."""
    with Server() as server:
        server.start()
        server.ctl("init")
        address = server.start_gateway()
        server.configure_gateway(address)
        server.config.chmod(0o600)
        answer = json.loads(server.ctl("--json", "doctor", expect=None).stdout)
        found = {finding["check"]: finding for finding in answer["findings"]}
        for check in (
            "host",
            "backup",
            "audit log",
            "tpm",
            "tpm lockout",
            "storage root key",
            "tpm counter",
            "gateway",
        ):
            assert found[check]["verdict"] == "ok", found[check]
        for check in ("core dumps", "clock", "files", "sockets", "configuration"):
            assert found[check]["verdict"] == "ok", found[check]
        assert found["pcrs"]["verdict"] == "fail"
        assert found["operators"]["verdict"] == "fail"
        server.ctl("lock")
        server.unlock()
        answer = json.loads(server.ctl("--json", "doctor", expect=None).stdout)
        found = {finding["check"]: finding for finding in answer["findings"]}
        assert found["operators"]["text"].startswith("1 of 1 proved")
