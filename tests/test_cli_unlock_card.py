"""Operators with a card, a key file and a passphrase, two of whom are needed: what they type, and what they see."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from rigs.desk import Desk
from rigs.pivcard import PIN as CARD_PIN
from rigs.pivcard import SERIAL, TOUCH_ALWAYS, TRIES, PivCard, recipient_of
from rigs.server import PATIENCE, PROGRAMS, Server, wait_for
from rigs.terminal import Typed, at_terminal

from unsealerd.cli.edge import Exit
from unsealerd.core.age import X25519Identity
from unsealerd.core.passphrase import Parameters, derive

PIN = CARD_PIN.decode()
WRONG = "654321"
PASSPHRASE = "correct horse battery staple"
CHEAP = "argon2id$v=19$m=65536,t=2,p=1$AAECAwQFBgcICQoLDA0ODw"
ASKED = f"PIN of YubiKey 5 {SERIAL}, PIV slot 9D (3 tries left): "

pytestmark = pytest.mark.xdist_group("cli-unlock-card")


class Office:
    """A locked host with a gateway; alice has a card, bob a key file, carol a passphrase; two of them are needed."""

    def __init__(self, server: Server, card: PivCard) -> None:
        self.server = server
        self.card = card
        self.bob = server.identity_file

    def configure(self, *, groups: str = "", more: str = "") -> None:
        carol = derive(memoryview(PASSPHRASE.encode()), Parameters.parse(CHEAP)).recipient
        server = self.server
        server.operators = {"bob": str(server.identity.recipient)}
        server.tables = (
            f'[[operator]]\nname = "alice"\nrecipient = "{recipient_of(self.card)}"\n{groups}'
            f'[[operator]]\nname = "carol"\nrecipient = "{carol}"\npassphrase = "{CHEAP}"\n'
            f'[unlock]\nthreshold = 2\nwindow = "10m"\n{more}'
        )
        server.configure()

    @property
    def environment(self) -> dict[str, str]:
        return {"UNSEALERD_HOSTS": str(self.server.base / "hosts.json"), "NO_COLOR": "1"}

    def typed(self, *arguments: str | Path, answers: tuple[tuple[str, str], ...] = ()) -> Typed:
        command = (PROGRAMS / "unsealctl", "--config", self.server.config, *arguments)
        done = at_terminal(command, *answers, environment=self.environment)
        for _, secret in answers:
            assert secret not in done.all.replace(str(SERIAL), "")
            assert secret not in self.server.log_text().replace(str(SERIAL), "")
        assert "Traceback" not in done.err
        return done

    def unattended(self, *arguments: str | Path) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            [PROGRAMS / "unsealctl", "--config", self.server.config, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=PATIENCE,
            start_new_session=True,
            env={**os.environ, **self.environment},
        )


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    with Desk() as desk:
        yield desk


@pytest.fixture(scope="module")
def _office(desk: Desk) -> Iterator[Office]:
    with Server(tpm=False) as server:
        one = Office(server, PivCard())
        one.configure()
        server.start()
        server.ctl("init")
        server.start_gateway()
        server.ctl("host", "add", "web1", server.address, "--yes")
        yield one
        server.stop_gateway()


@pytest.fixture
def office(_office: Office, desk: Desk) -> Office:
    """Locked, with nobody's answer, and alice's card in the reader as it came."""
    card = _office.card
    card.tries, card.touched, card.remove_at = TRIES, True, None
    card.slots[0x9D].touch_policy = 1
    desk.place(card)
    server = _office.server
    status = server.status()
    if status["state"] == "locked" and status["shares"]["present"]:
        server.ctl("unlock", "--local", "-i", str(_office.bob))
        status = server.status()
    if status["state"] == "unlocked":
        server.ctl("lock")
    assert server.status()["shares"]["present"] == 0
    return _office


def ask(tries: int) -> str:
    return f"PIN of YubiKey 5 {SERIAL}, PIV slot 9D ({tries} tries left): "


def test_two_of_three_from_two_places(office: Office) -> None:
    """A card at the console, then a key file over the network; in between everybody can see how far it is."""
    server = office.server
    done = office.typed("unlock", "--local", "-i", "piv:", "--reason", "power cut", answers=((ASKED, PIN),))
    assert done.code == 0, done.err
    assert done.out.startswith(
        "this host has 1 of 2 shares (alice); it needs 1 more of bob, carol, within 9 minutes"
    )
    assert f"answering as {recipient_of(office.card)}" in done.err
    status = server.ctl("status").stdout.decode()
    assert "1 of 2, from alice; they count for 9 minutes more" in status
    assert "can still answer: bob, carol" in status
    shares = server.status()["shares"]
    assert (shares["answered"], shares["missing"]) == (["alice"], ["bob", "carol"])
    assert set(shares) == {"present", "needed", "answered", "missing", "require", "seconds_left"}
    server.assert_locked("locked_by_admin")
    done = office.typed("unlock", "web1", "-i", office.bob)
    assert (done.code, done.out) == (0, "web1 is unlocked\n")
    assert len(server.key()) == 32
    events = [record for record in server.audit() if record["event"].startswith("unlock")]
    assert "power cut" in json.dumps(events)


def test_without_naming_it_the_card_that_is_plugged_in_is_used(office: Office) -> None:
    done = office.typed("unlock", "web1", answers=((ASKED, PIN),))
    assert done.code == 0, done.err
    assert "1 of 2 shares (alice)" in done.out


def test_a_card_and_a_passphrase(office: Office) -> None:
    """Each is asked for after the host was verified and its challenge shown; both in one session."""
    command = ("unlock", "web1", "-i", "piv:", "-i", "passphrase:carol")
    questions = {"alice": (ASKED, PIN), "carol": ("Passphrase of operator carol: ", PASSPHRASE)}
    done = office.typed(*command, answers=(questions["alice"], questions["carol"]))
    assert (done.code, done.out) == (0, "web1 is unlocked\n"), done.err
    assert "answering as passphrase:carol" in done.err


def test_wrong_pins_until_the_last_try(office: Office) -> None:
    for tries in (3, 2):
        done = office.typed("unlock", "--local", "-i", f"piv:{SERIAL}", answers=((ask(tries), WRONG),))
        assert done.code == Exit.PIN
        message, hint = done.err.splitlines()[-2:]
        assert message.startswith("unsealctl: ")
        assert str(tries - 1) in message
        assert hint.startswith("hint: ")
    done = office.typed("unlock", "--local", "-i", "piv:")
    assert done.code == Exit.PIN
    assert "--last-try" in done.err
    assert office.card.tries == 1
    last = f"PIN of YubiKey 5 {SERIAL}, PIV slot 9D (this is the last try): "
    done = office.typed("unlock", "--local", "-i", "piv:", "--last-try", answers=((last, PIN),))
    assert done.code == 0
    assert office.card.tries == TRIES
    wait_for(lambda: office.server.status()["sessions"] == [], "the end of the session")


def test_a_blocked_pin(office: Office) -> None:
    office.card.tries, pins = 0, office.card.seen.pins
    done = office.typed("unlock", "--local", "-i", "piv:")
    assert done.code == Exit.PIN
    assert "PUK" in done.err
    assert office.card.seen.pins == pins


def test_the_card_is_pulled_out_in_the_middle(office: Office, desk: Desk) -> None:
    office.card.remove_at = 0x87  # at the key agreement
    done = office.typed("unlock", "web1", "-i", "piv:", answers=((ASKED, PIN),))
    assert done.code == Exit.CARD
    assert "pulled out" in done.err
    office.card.remove_at = None
    wait_for(lambda: office.server.status()["sessions"] == [], "the end of the session")
    assert office.server.status()["shares"]["present"] == 0
    desk.place(office.card)


def test_the_device_wants_to_be_touched(office: Office) -> None:
    office.card.slots[0x9D].touch_policy = TOUCH_ALWAYS
    done = office.typed("unlock", "--local", "-i", "piv:", answers=((ASKED, PIN),))
    assert done.code == 0
    assert f"touch the device if it blinks: YubiKey 5 {SERIAL}" in done.err
    office.card.touched = False
    done = office.typed("unlock", "--local", "-i", "piv:", answers=((ASKED, PIN),))
    assert done.code == Exit.CARD
    assert "touch" in done.err


def test_nobody_there_to_type(office: Office) -> None:
    done = office.unattended("unlock", "--local", "-i", "piv:", "--json")
    assert done.returncode == Exit.PIN
    assert json.loads(done.stdout)["error"] == "PinCancelled"
    assert office.card.tries == TRIES


def test_no_card_at_all(office: Office, desk: Desk) -> None:
    desk.remove()
    for arguments in ((), ("-i", "piv:"), ("-i", "openpgp:")):
        done = office.unattended("unlock", "--local", *arguments, "--json")
        assert done.returncode == Exit.CARD
        assert json.loads(done.stdout)["error"] == "CardMissing"
    desk.place(office.card)


def test_a_card_that_is_nobodys(office: Office, desk: Desk) -> None:
    other = desk.place(PivCard(serial=87654321))
    done = office.unattended("unlock", "web1", "--json")
    assert done.returncode == Exit.PEER
    assert json.loads(done.stdout)["error"] == "NotAnOperator"
    assert other.seen.points == []
    desk.place(office.card)


# --- drills


def test_a_drill_proves_and_changes_nothing(office: Office) -> None:
    server = office.server
    before = (server.state / "keyring.age").read_bytes()
    done = office.typed("drill", "web1", "-i", "piv:", answers=((ASKED, PIN),))
    assert done.code == 0, done.err
    assert done.out == (
        f"proven: {recipient_of(office.card)}\nweb1 would accept it; nothing was unlocked or changed\n"
    )
    server.assert_locked("locked_by_admin")
    assert (server.state / "keyring.age").read_bytes() == before
    proven = {each["name"]: each["proven"] for each in server.status()["operators"]}
    assert proven["alice"] is not None
    listed = server.ctl("operator", "list").stdout.decode()
    assert "2 of 3 needed" in listed
    line = next(each for each in listed.splitlines() if each.startswith("alice"))
    assert "ago" in line


def test_a_drill_while_it_is_unlocked(office: Office) -> None:
    server = office.server
    server.ctl("unlock", "--local", "-i", str(office.bob))
    office.typed("unlock", "--local", "-i", "piv:", answers=((ASKED, PIN),))
    server.assert_unlocked()
    key = server.key()
    done = office.typed("drill", "--local", "-i", "passphrase:carol", answers=(("carol: ", PASSPHRASE),))
    assert done.code == 0, done.err
    assert "proven: passphrase:carol" in done.out
    server.assert_unlocked()
    assert server.key() == key
    done = office.typed(
        "drill", "--local", "-i", "passphrase:carol", answers=(("carol: ", PASSPHRASE + "x"),)
    )
    assert done.code == Exit.PEER


# --- who leaves


@pytest.mark.promise(2)
def test_a_removed_operator_opens_no_later_backup(office: Office, tmp_path: Path) -> None:
    """And the earlier one still, which `reload` says, and `recover` shows."""
    server = office.server
    server.ctl("unlock", "--local", "-i", str(office.bob))
    office.typed("unlock", "--local", "-i", "piv:", answers=((ASKED, PIN),))
    mallory = X25519Identity.generate()
    mallory_file = tmp_path / "mallory.txt"
    mallory_file.write_text(mallory.encode())
    mallory_file.chmod(0o600)
    office.configure(more=f'[[operator]]\nname = "mallory"\nrecipient = "{mallory.recipient}"\n')
    done = server.ctl("reload")
    assert b"added: mallory" in done.stdout
    server.ctl("backup", "export", str(tmp_path / "early.age"))
    office.configure()
    done = server.ctl("reload")
    assert b"removed: mallory" in done.stdout
    assert b"still opens every earlier copy" in done.stderr
    server.ctl("backup", "export", str(tmp_path / "late.age"))
    server.ctl("lock")
    refused = office.unattended("unlock", "web1", "-i", mallory_file, "--json")
    assert json.loads(refused.stdout)["error"] == "NotAnOperator"
    recover = Path(__file__).resolve().parent.parent / "scripts" / "recover"

    def share(backup: str, name: str, key: Path) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            [recover, "share", tmp_path / backup, name, "--key", key, "-o", tmp_path / f"{backup}.{name}"],
            capture_output=True,
            check=False,
            timeout=PATIENCE,
        )

    assert share("late.age", "mallory", mallory_file).returncode == 1
    assert share("early.age", "mallory", mallory_file).returncode == 0
    assert share("early.age", "bob", office.bob).returncode == 0
    opened: list[str | Path] = [recover, "open", tmp_path / "early.age", tmp_path / "early.age.bob"]
    subprocess.run([*opened, tmp_path / "early.age.mallory", "-o", tmp_path / "keyring"], check=True)
    assert (tmp_path / "keyring").stat().st_size > 0
