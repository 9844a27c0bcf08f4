"""An OpenPGP card, a third party's, through pyscard and pcscd; judged by GnuPG and OpenSC."""

import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from rigs.card_client import other_program
from rigs.openpgpcard import PIN, SERIAL, OpenPgpCard
from rigs.pcscd import READER, Inserted, Pcscd, VirtualCard
from rigs.person import Person
from rigs.pivcard import PivCard
from rigs.points import HOSTILE, exchange_blinded, new_key, new_point, point_with_leading_zero, taken
from rigs.server import wait_for

from unsealerd.cli.edge import ANSWERS
from unsealerd.core.age import P256Identity
from unsealerd.errors import (
    BadPoint,
    CardBusy,
    CardFailed,
    CardMissing,
    CardRemoved,
    PinBlocked,
    PinCancelled,
    PinLastTry,
    PinWrong,
    TouchMissed,
    WrongCard,
)
from unsealerd.operator.events import TouchNeeded
from unsealerd.operator.identities import openpgp
from unsealerd.operator.identities.openpgp import OpenPgpIdentity

pytestmark = pytest.mark.xdist_group("openpgp")

DEVICE = f"OpenPGP card FFFE:{SERIAL}, OpenPGP decryption key"
VERIFY, DECIPHER = 0x20, 0x2A
KEY = new_key()


class Slot:
    """The slot of a reader in a private pcscd."""

    def __init__(self, service: Pcscd) -> None:
        self.service = service
        self._inserted: Inserted | None = None

    def put(self, card: VirtualCard) -> None:
        """In place of another card at once, as if it had been there all the time."""
        if self._inserted is not None and self._inserted.alive:
            self._inserted.card = card
        else:
            self._inserted = self.service.insert(card)

    def empty(self) -> None:
        if self._inserted is not None:
            self._inserted.remove()
            self.service.await_card(READER, present=False)


@pytest.fixture(scope="module")
def slot() -> Iterator[Slot]:
    with Pcscd() as service, service.client():
        yield Slot(service)


@pytest.fixture
def service(slot: Slot) -> Pcscd:
    return slot.service


@pytest.fixture(scope="module")
def device() -> Iterator[OpenPgpCard]:
    with OpenPgpCard(KEY) as card:
        yield card


@pytest.fixture
def card(slot: Slot, device: OpenPgpCard) -> OpenPgpCard:
    """In the reader, as if it were new."""
    device.restore()
    slot.put(device)
    device.commands.clear()
    return device


@pytest.fixture
def person() -> Person:
    return Person(PIN)


def find(person: Person, serial: str | None = None, *, last_try: bool = False) -> OpenPgpIdentity:
    (identity,) = openpgp.find(serial, prompts=person, on_event=person.see, last_try=last_try)
    return identity


def instructions(card: OpenPgpCard) -> set[int]:
    return {command[1] for command in card.commands}


# --- it is right


def test_200_exchanges_agree_with_software(card: OpenPgpCard, person: Person) -> None:
    identity = find(person)
    assert (identity.device, identity.touch) == (DEVICE, None)
    assert identity.recipient == P256Identity(KEY).recipient
    assert person.asked == []
    exchange_blinded(identity, KEY, 200)
    assert len(person.asked) == 200
    assert {(each.device, each.tries_left) for each in person.asked} == {(DEVICE, 3)}


def test_leading_zeros_of_x_are_kept_and_put_back(card: OpenPgpCard, person: Person) -> None:
    point = point_with_leading_zero(KEY)
    x = taken(P256Identity(KEY).exchange(point))
    identity = find(person)
    assert taken(identity.exchange(point)) == x
    card.mangle = lambda header, answer: (
        answer.lstrip(b"\0") if header[1] == DECIPHER and len(answer) > 2 else answer
    )
    assert taken(identity.exchange(point)) == x


def test_a_whole_point_is_taken_for_its_x(card: OpenPgpCard, person: Person) -> None:
    """As Gnuk answers."""

    def whole(header: bytes, answer: bytes) -> bytes:
        if header[1] != DECIPHER or len(answer) != 34:
            return answer
        lifted = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x02" + answer[:-2])
        numbers = lifted.public_numbers()
        return b"\x04" + answer[:-2] + numbers.y.to_bytes(32, "big") + answer[-2:]

    card.mangle = whole
    exchange_blinded(find(person), KEY, 3)


@pytest.mark.parametrize(
    "wrong",
    [b"", b"\0" * 32, b"\x04" + b"\1" * 64, b"\1" * 33, b"\1" * 64, b"\1" * 66],
    ids=["nothing", "zero", "off the curve", "33", "64", "66"],
)
def test_an_answer_that_is_no_coordinate_is_named(card: OpenPgpCard, person: Person, wrong: bytes) -> None:
    identity = find(person)
    card.mangle = lambda header, answer: wrong + b"\x90\x00" if header[1] == DECIPHER else answer
    with pytest.raises(CardFailed):
        identity.exchange(new_point())


@pytest.mark.parametrize("point", HOSTILE.values(), ids=list(HOSTILE))
def test_the_card_never_sees_a_hostile_point(card: OpenPgpCard, person: Person, point: bytes) -> None:
    identity = find(person)
    card.commands.clear()
    with pytest.raises(BadPoint):
        identity.exchange(point)
    assert card.commands == []
    assert person.asked == []


def test_the_pin_does_not_outlive_the_exchange(card: OpenPgpCard, person: Person) -> None:
    """The next program finds the card locked, and may not use the key."""
    identity = find(person)
    taken(identity.exchange(new_point()))
    again = bytes.fromhex("002a808648a6467f49438641") + new_point() + b"\0"
    select = bytes.fromhex("00a4040006d2760001240100")
    with other_program(READER, "shared", select, again) as answers:
        assert answers[-1] == "6982"


# --- which card


@pytest.mark.parametrize("serial", [SERIAL, f"FFFE:{SERIAL}", f"fffe:{SERIAL} "])
def test_a_card_is_found_by_its_serial_number(card: OpenPgpCard, person: Person, serial: str) -> None:
    assert find(person, serial).device == DEVICE


@pytest.mark.parametrize("serial", [SERIAL[:-1], f"0006:{SERIAL}", "", "\x1b[2J"])
def test_another_serial_number_is_another_card(card: OpenPgpCard, person: Person, serial: str) -> None:
    with pytest.raises(CardMissing) as caught:
        find(person, serial)
    assert "\x1b" not in str(caught.value)


def test_a_card_of_another_kind_is_none(slot: Slot, person: Person) -> None:
    slot.put(PivCard())
    with pytest.raises(CardMissing, match="no OpenPGP card"):
        find(person)


def test_no_card_is_named(slot: Slot, person: Person) -> None:
    slot.empty()
    with pytest.raises(CardMissing):
        find(person)


def test_a_key_on_another_curve_is_named(card: OpenPgpCard, person: Person) -> None:
    identity = find(person)
    card.forget_key()
    with pytest.raises(WrongCard, match="not on P-256"):
        find(person)
    with pytest.raises(WrongCard):
        identity.exchange(new_point())
    assert person.asked == []


def test_an_empty_slot_is_named(card: OpenPgpCard, person: Person) -> None:
    card.forget_key()
    card.put("00C2", bytes.fromhex("122A8648CE3D030107"))
    with pytest.raises(WrongCard, match="no decryption key"):
        find(person)


def test_another_key_than_before_is_not_used(card: OpenPgpCard, person: Person) -> None:
    identity = find(person)
    card.import_key(key=new_key())
    card.commands.clear()
    with pytest.raises(WrongCard, match="another key"):
        identity.exchange(new_point())
    assert not {VERIFY, DECIPHER} & instructions(card)


def test_a_card_with_derived_pins_is_named_before_a_try_is_lost(card: OpenPgpCard, person: Person) -> None:
    identity = find(person)
    kdf = bytes.fromhex("8101038201088304000186a0")

    def derives(header: bytes, answer: bytes) -> bytes:
        asked_before = card.commands[-2][:4] if len(card.commands) > 1 else b""
        return kdf + b"\x90\x00" if header[1] == 0xC0 and asked_before == b"\0\xca\0\xf9" else answer

    card.mangle = derives
    with pytest.raises(CardFailed, match="derived PINs"):
        identity.exchange(new_point())
    assert person.asked == []
    assert VERIFY not in instructions(card)


# --- the PIN


def test_tries_are_shown_the_last_is_kept_and_then_it_is_blocked(card: OpenPgpCard, person: Person) -> None:
    identity = find(person)
    person.pins = b"000000"
    for left in (2, 1):
        with pytest.raises(PinWrong) as caught:
            identity.exchange(new_point())
        assert caught.value.tries_left == left
    card.commands.clear()
    with pytest.raises(PinLastTry):
        identity.exchange(new_point())
    assert VERIFY not in instructions(card)
    assert [each.tries_left for each in person.asked] == [3, 2]
    # With leave to use it, it is used; the right PIN gives all tries back.
    person.pins = [PIN, b"000000", b"000000", b"000000"]
    taken(find(person, last_try=True).exchange(new_point()))
    desperate = find(person, last_try=True)
    for error in (PinWrong, PinWrong, PinBlocked, PinBlocked):
        with pytest.raises(error):
            desperate.exchange(new_point())
    assert person.pins == []


@pytest.mark.parametrize(
    ("typed", "error"),
    [(None, PinCancelled), (b"", PinCancelled), (b"12345", PinWrong), (b"1" * 128, PinWrong)],
    ids=["cancelled", "empty", "short", "long"],
)
def test_what_cannot_be_the_pin_costs_no_try(
    card: OpenPgpCard, person: Person, typed: bytes | None, error: type[Exception]
) -> None:
    identity = find(person)
    person.pins = typed
    card.commands.clear()
    with pytest.raises(error):
        identity.exchange(new_point())
    assert VERIFY not in instructions(card)


def test_no_pin_is_in_logs_or_errors(
    card: OpenPgpCard,
    person: Person,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.NOTSET)
    identity = find(person)
    person.pins = [b"424242", PIN]
    with pytest.raises(PinWrong) as caught:
        identity.exchange(new_point())
    taken(identity.exchange(new_point()))
    written = caplog.text + "".join(capfd.readouterr()) + repr(caught.value) + repr(caught.value.__cause__)
    for secret in ("424242", PIN.decode(), b"424242".hex(), PIN.hex()):
        assert secret not in written


# --- touch


@pytest.mark.parametrize("status", ["6982", "6985", "6600"])
def test_a_missed_touch_is_named(card: OpenPgpCard, person: Person, status: str) -> None:
    identity = find(person)
    card.mangle = lambda header, answer: bytes.fromhex(status) if header[1] == DECIPHER else answer
    with pytest.raises(TouchMissed, match=DEVICE):
        identity.exchange(new_point())


def test_a_key_that_wants_a_touch_says_so(card: OpenPgpCard, person: Person) -> None:
    related = related_data(card)
    for setting, wants in (("D7020120", True), ("D7020220", True), ("D7020020", False)):
        answer_with(card, grown(related, bytes.fromhex(setting)))
        identity = find(person)
        assert identity.touch is wants
        person.seen.clear()
        taken(identity.exchange(new_point()))
        assert person.seen == ([TouchNeeded(DEVICE)] if wants else [])


def related_data(card: OpenPgpCard) -> bytes:
    """The application related data as the third party gives it: without the tag 6E around it."""
    card.process(bytes.fromhex("00a4040006d2760001240100"))
    answer = card.process(bytes.fromhex("00ca006e00")) or b""
    data = answer[:-2]
    while answer[-2] == 0x61:
        answer = card.process(bytes((0, 0xC0, 0, 0, answer[-1]))) or b""
        data += answer[:-2]
    return data


def grown(related: bytes, more: bytes) -> bytes:
    return b"\x6e\x82" + (len(related) + len(more)).to_bytes(2, "big") + related + more


def answer_with(card: OpenPgpCard, data: bytes) -> None:
    """GET DATA 6E gives this, in two parts."""
    rest = data[200:]

    def mangle(header: bytes, answer: bytes) -> bytes:
        if header == bytes.fromhex("00ca006e"):
            return data[:200] + b"\x61\xff"  # so that the card itself has nothing left after it
        if header[1] == 0xC0 and card.commands[-2][:4] == bytes.fromhex("00ca006e"):
            return rest + b"\x90\x00"
        return answer

    card.mangle = mangle


# --- faults


def test_a_card_that_is_pulled_out_is_named(card: OpenPgpCard, person: Person) -> None:
    identity = find(person)
    card.mangle = lambda header, answer: None if header[1] == DECIPHER else answer
    with pytest.raises(CardRemoved):
        identity.exchange(new_point())


@pytest.mark.promise(10)
@pytest.mark.parametrize(
    "answer",
    [
        "9000",
        "6E009000",
        "6EFF9000",
        "6E80",
        "73009000",
        "6E0473024F009000",
        "6A82",
        "4F0100" + "9000",
        "00" * 300 + "9000",
    ],
)
def test_nonsense_from_a_card_is_named(card: OpenPgpCard, person: Person, answer: str) -> None:
    card.mangle = lambda header, told: bytes.fromhex(answer) if header == bytes.fromhex("00ca006e") else told
    with pytest.raises(CardFailed):
        find(person)


# --- other programs


@pytest.fixture
def gnupg(service: Pcscd) -> Iterator[Path]:
    """A GNUPGHOME of its own; its agent and scdaemon end with the test."""
    home = Path(tempfile.mkdtemp(prefix="ugh"))
    (home / "scdaemon.conf").write_text("disable-ccid\n")  # through pcscd, never to a real reader
    try:
        yield home
    finally:
        run_gnupg(home, "gpgconf", "--kill", "all")
        await_release()
        shutil.rmtree(home, ignore_errors=True)


def run_gnupg(home: Path, *command: str) -> str:
    environment = {**os.environ, "GNUPGHOME": str(home), "LC_ALL": "C"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout + done.stderr


def card_status(home: Path) -> str:
    """What gpg says of the card. Its agent and scdaemon are given all the time that they need to start."""
    said = ""

    def asked() -> bool:
        nonlocal said
        said = run_gnupg(home, "gpg", "--batch", "--card-status")
        return SERIAL in said

    wait_for(asked, "gpg to see the card")
    return said


def await_release() -> None:
    """scdaemon ends after it was told to, and then the card is free."""

    def free() -> bool:
        with other_program(READER, "exclusive") as answers:
            return answers == ["00000000"]

    wait_for(free, "scdaemon to let go of the card")


def test_gnupg_and_opensc_take_it_for_an_openpgp_card(card: OpenPgpCard, service: Pcscd, gnupg: Path) -> None:
    said = card_status(gnupg)
    assert f"Serial number ....: {SERIAL}" in said
    assert "Key attributes ...: rsa2048 nistp256 rsa2048" in said
    run_gnupg(gnupg, "gpgconf", "--kill", "scdaemon")
    await_release()
    told = service.run("openpgp-tool", "--card-info", "--key-info").stdout
    assert f"Serial number:   {SERIAL}" in told
    assert "Dec Algorithm:   ECDH" in told


def test_a_card_that_scdaemon_has_is_busy(card: OpenPgpCard, person: Person, gnupg: Path) -> None:
    identity = find(person)
    assert SERIAL in card_status(gnupg)
    with pytest.raises(CardBusy) as caught:
        find(person)
    assert "gpgconf --kill scdaemon" in ANSWERS[caught.value.name].hint
    with pytest.raises(CardBusy):
        identity.exchange(new_point())
    assert person.asked == []
    # What the hint says helps.
    run_gnupg(gnupg, "gpgconf", "--kill", "scdaemon")
    await_release()
    taken(identity.exchange(new_point()))
