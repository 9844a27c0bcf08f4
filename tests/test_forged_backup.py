"""A backup that opens is not for that reason this host's: one that somebody else made for its operators is not taken over."""

import base64
import os
import re
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rigs.forger import BACKUP, before_lineages, contents, forge, put, seal
from rigs.manager import ServiceManager
from rigs.server import PATIENCE, Server

from unsealerd import keyringid
from unsealerd.client.connection import Connection
from unsealerd.core.age import X25519Identity, decrypt
from unsealerd.core.keyring import LINEAGE_SIZE, parse
from unsealerd.errors import ConfigInvalid


@pytest.fixture
def server() -> Iterator[Server]:
    """With a TPM; initialised, so its keyring is pinned."""
    with Server() as server:
        yield initialised(server)


@pytest.fixture
def plain() -> Iterator[Server]:
    """Without a TPM."""
    with Server(tpm=False) as server:
        yield initialised(server)


def initialised(server: Server) -> Server:
    server.start()
    server.ctl("init")
    server.remembered = server.key()
    server.client.close()
    return server


def id_file(server: Server) -> Path:
    return server.base / "keyring.id"


def status(server: Server) -> dict[str, Any]:
    with Connection(server.run_dir / "admin", timeout=PATIENCE, max_reply=1 << 20) as admin:
        answer = admin.call("io.unsealerd.Admin.Status")["status"]
    assert isinstance(answer, dict)
    return answer


def counter(server: Server) -> int:
    return int(status(server)["tpm"]["counter"])


def power_off(server: Server) -> None:
    server.stop(signal.SIGKILL)
    if server.tpm is not None:
        server.tpm.kill()


def assert_foreign(server: Server) -> str:
    """Why, as the administrator sees it."""
    facts = status(server)
    assert (facts["state"], facts["lock_reason"]) == ("locked", "backup_foreign")
    return str(facts["lock_detail"])


def refused(server: Server, *arguments: str) -> str:
    """The operator is told the name, and no more."""
    answer = server.json("unlock", "--local", "-i", str(server.identity_file), *arguments, expect=15)
    assert answer["error"] == "BackupForeign"
    return assert_foreign(server)


def unpinned(server: Server) -> bool:
    return any(f"{id_file(server)} is missing" in warning for warning in status(server)["warnings"])


# --- what an attacker puts on the disk; at the end of each test the control: without the pin nothing else stands in the way


@pytest.mark.promise(2)
@pytest.mark.promise(9)
def test_a_forged_backup_is_not_adopted_when_an_operator_opens_it(server: Server) -> None:
    """The disk was away, and comes back with a backup for the same operators, at the counter's value or one ahead of it."""
    genuine, value = (server.state / BACKUP).read_bytes(), counter(server)
    power_off(server)
    server.start()
    for ahead in (0, 1):
        forged = forge(server, counter=value + ahead)
        put(server, forged)
        before = contents(server.state)
        assert forged.id in refused(server, *["--accept-rollback"] * ahead)
        assert contents(server.state) == before
        assert counter(server) == value
    (server.state / BACKUP).write_bytes(genuine)
    server.unlock()
    assert server.key() == server.remembered
    # What the audit log on the disk says of a backup that is not current is no help in making one that is.
    server.ctl("lock")
    (server.state / BACKUP).write_bytes(genuine)
    assert server.unlock(expect=None).returncode == 15
    (said,) = (record["detail"] for record in server.audit() if record.get("error") == "Rollback")
    assert "counter" in said
    assert not re.search(r"\d", said)

    id_file(server).unlink()
    assert unpinned(server)
    forged = forge(server, counter=counter(server))
    put(server, forged)
    server.unlock()
    assert server.key() == forged.key
    assert unpinned(server)


@pytest.mark.promise(2)
@pytest.mark.promise(3)
def test_a_forged_backup_with_a_sealed_copy_of_its_own(server: Server) -> None:
    """By who could also speak to the TPM: no operator is asked, so only the pin stands in the way."""
    value = counter(server)
    power_off(server)
    forged = forge(server, counter=value)
    put(server, forged)
    seal(server, forged, value)
    before = contents(server.state)
    server.reset_tpm()
    for _ in range(2):  # and again, for as long as it lies there
        server.start()
        assert forged.id in assert_foreign(server)
        assert contents(server.state) == before
        assert counter(server) == value
        server.stop()

    id_file(server).unlink()
    server.start()
    assert server.key() == forged.key
    assert unpinned(server)


@pytest.mark.promise(2)
def test_a_forged_backup_that_one_operator_opens_where_two_are_needed() -> None:
    with Server(tpm=False) as server:
        for name in ("bob", "carol"):
            server.operators[name] = str(X25519Identity.generate().recipient)
        server.tables = "[unlock]\nthreshold = 2\n"
        server.configure()
        initialised(server)
        server.ctl("lock")
        forged = forge(server)
        put(server, forged)
        before = contents(server.state)
        refused(server)
        assert contents(server.state) == before

        id_file(server).unlink()
        server.unlock()
        assert server.key() == forged.key


@pytest.mark.promise(2)
def test_memory_that_is_not_of_the_pinned_keyring_waits() -> None:
    """Over a restart of the daemon, too; what was pinned by mistake is put right, and nothing is lost."""
    with Server(tpm=False) as server, ServiceManager(server.base) as manager:
        server.manager = manager
        initialised(server)
        right = id_file(server).read_bytes()
        server.stop()
        id_file(server).write_bytes(keyringid.line("0" * 64))
        server.start()
        assert_foreign(server)
        server.stop()
        id_file(server).write_bytes(right)
        server.start()
        assert server.key() == server.remembered


@pytest.mark.promise(9)
def test_a_backup_that_was_taken_away_does_not_make_a_new_host(plain: Server) -> None:
    """Whoever wipes the state directory would otherwise be asked for a new keyring."""
    plain.stop()
    for path in plain.state.iterdir():
        if path.is_file():
            path.unlink()
    plain.start()
    facts = status(plain)
    assert facts["lock_reason"] == "backup_damaged"
    assert str(id_file(plain)) in facts["lock_detail"]
    assert plain.json("init", expect=8)["error"] == "AlreadyInitialised"
    plain.stop()
    id_file(plain).unlink()
    plain.start()
    plain.ctl("init")
    assert plain.key() != plain.remembered


# --- the file


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


BENT: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "no newline": lambda path: path.write_bytes(keyringid.line("a" * 64)[:-1]),
    "two": lambda path: path.write_bytes(keyringid.line("a" * 64) * 2),
    "upper case": lambda path: path.write_bytes(keyringid.line("A" * 64)),
    "another version": lambda path: path.write_bytes(keyringid.line("a" * 64).replace(b"v1", b"v2")),
    "not text": lambda path: path.write_bytes(b"\xff" * 89),
    "a directory": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a link to nothing": _dangling,
}


@pytest.mark.promise(10)
@pytest.mark.parametrize("bend", BENT.values(), ids=BENT)
def test_what_cannot_be_read_does_not_count_as_nothing(
    tmp_path: Path, bend: Callable[[Path], object]
) -> None:
    path = tmp_path / "keyring.id"
    assert keyringid.read(path) is None
    path.write_bytes(keyringid.line("a" * 64))
    assert keyringid.read(path) == "a" * 64
    path.unlink()
    bend(path)
    with pytest.raises(ConfigInvalid, match=re.escape(str(path))):
        keyringid.read(path)


@pytest.mark.promise(2)
def test_a_file_that_cannot_be_read_opens_nothing_and_pin_mends_it(plain: Server) -> None:
    plain.ctl("lock")
    before = contents(plain.state)
    id_file(plain).write_bytes(b"something else\n")
    assert str(id_file(plain)) in refused(plain)
    assert contents(plain.state) == before
    assert any(str(id_file(plain)) in warning for warning in status(plain)["warnings"])
    assert "cannot be read" in plain.json("backup", "pin", expect=2)["detail"]
    plain.ctl("backup", "pin", "--replace")
    plain.unlock()
    assert plain.key() == plain.remembered
    assert not any(str(id_file(plain)) in warning for warning in status(plain)["warnings"])


def test_init_pins_for_everybody_to_read_and_says_the_id() -> None:
    with Server(tpm=False) as server:
        before = os.umask(0o077)
        try:
            said = server.start().json("init")
        finally:
            os.umask(before)
        assert id_file(server).read_bytes() == keyringid.line(said["keyring"])
        assert stat.S_IMODE(id_file(server).stat().st_mode) == 0o644
        facts = status(server)["keyring"]
        assert facts == {
            "id": said["keyring"],
            "file": str(id_file(server)),
            "pinned": said["keyring"],
            "error": None,
            "foreign": None,
        }
        export = server.json("backup", "export", str(server.base / "copy.age"))
        assert export["keyring"] == said["keyring"]

        id_file(server).unlink()
        assert unpinned(server)
        answer = server.json("backup", "pin")
        assert (answer["keyring"], answer["before"]) == (said["keyring"], None)
        assert id_file(server).read_bytes() == keyringid.line(said["keyring"])
        assert not unpinned(server)
        assert server.json("backup", "pin") == {**answer, "before": said["keyring"]}


# --- the deliberate way


def test_a_keyring_of_another_machine_is_opened_when_an_administrator_says_so(plain: Server) -> None:
    """Restored from the vault onto a machine that had a keyring of its own."""
    own = status(plain)["keyring"]["id"]
    plain.ctl("lock")
    other = forge(plain)
    put(plain, other)
    assert plain.json("backup", "pin", expect=3)["error"] == "Locked"  # nothing was opened yet
    refused(plain)
    said = plain.json("backup", "pin", expect=2)["detail"]
    assert own in said
    assert other.id in said
    assert id_file(plain).read_bytes() == keyringid.line(own)
    id_file(plain).unlink()
    assert plain.json("backup", "pin", "--replace", expect=3)["error"] == "Locked"  # it never was open
    id_file(plain).write_bytes(keyringid.line(own))
    answer = plain.json("backup", "pin", "--replace")
    assert (answer["keyring"], answer["before"]) == (other.id, own)
    plain.unlock()
    assert plain.key() == other.key


def test_the_pin_is_written_beside_the_configuration_that_the_daemon_reads(plain: Server) -> None:
    elsewhere = plain.base / "elsewhere" / "unsealerd.toml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(plain.config.read_text())
    assert plain.json("backup", "pin", "--config", str(elsewhere), expect=17)["error"] == "ConfigInvalid"
    assert not elsewhere.with_name("keyring.id").exists()


# --- a backup from before there were lineages


@pytest.mark.promise(6)
@pytest.mark.parametrize("pinned", [False, True], ids=["not pinned", "pinned"])
def test_a_backup_without_a_lineage_is_opened_where_nothing_is_pinned(plain: Server, pinned: bool) -> None:
    """An upgrade loses no key; and where a keyring is pinned nobody gets past that with the older format."""
    power_off(plain)
    before_lineages(plain)
    if not pinned:
        id_file(plain).unlink()
    plain.start()
    if pinned:
        assert "version 1" in refused(plain)
        return
    plain.unlock()
    assert plain.key() == plain.remembered
    assert unpinned(plain)
    plain.ctl("backup", "pin")
    plain.stop(signal.SIGKILL)
    plain.start()
    plain.unlock()
    assert plain.key() == plain.remembered
    assert not unpinned(plain)


# --- the lineage


@pytest.mark.promise(2)
def test_the_lineage_outlives_every_change_and_is_nowhere_in_plain(server: Server) -> None:
    before = status(server)["keyring"]["id"]
    server.ctl("key", "rotate", "demo")
    server.ctl("key", "revoke", "demo", "--version", "1")
    server.keys["more"] = ""
    server.configure()
    server.ctl("reload")
    server.reboot()
    server.power_cut()
    server.unlock()
    assert status(server)["keyring"]["id"] == before
    with decrypt((server.state / BACKUP).read_bytes(), [server.identity]) as plaintext:
        keyring = parse(plaintext)
        assert keyring.lineage is not None
        lineage = bytes(keyring.lineage)
        assert keyring.id == before
        keyring.close()
    assert len(lineage) == LINEAGE_SIZE
    forms = (lineage, lineage.hex().encode(), base64.b64encode(lineage)[:40])
    everything = [path for path in server.base.rglob("*") if path.is_file()]
    assert server.log in everything
    for path in everything:
        assert not any(form in path.read_bytes() for form in forms), path
