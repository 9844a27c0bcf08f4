"""A PIN pad, through the CCID driver of real readers: the PIN goes from it to the card, and never enters this computer."""

import struct
from collections.abc import Iterator

import pytest
from rigs.ccidpad import READER, CcidPad, Key
from rigs.openpgpcard import PIN as OPENPGP_PIN
from rigs.openpgpcard import OpenPgpCard
from rigs.pcscd import Pcscd
from rigs.person import Person
from rigs.pivcard import PIN, PivCard
from rigs.points import HOSTILE, exchange_blinded, new_point, taken

from unsealerd.core.age import P256Identity
from unsealerd.errors import (
    BadPoint,
    CardFailed,
    CardMissing,
    CardRemoved,
    PinBlocked,
    PinCancelled,
    PinLastTry,
    PinWrong,
    ReaderMissing,
)
from unsealerd.operator.cards import pinpad
from unsealerd.operator.cards.pin import PinFormat
from unsealerd.operator.events import PinPadUsed
from unsealerd.operator.identities import openpgp, piv
from unsealerd.operator.identities.openpgp import OpenPgpIdentity
from unsealerd.operator.identities.piv import PivIdentity

pytestmark = pytest.mark.xdist_group("pinpad")

PIV = PinFormat(0x80, 6, 8, padded=True)
OPENPGP = PinFormat(0x82, 6, 127, padded=False)


class Desk:
    """A reader with a PIN pad, its service, and the person, who types at no keyboard of this computer."""

    def __init__(self, pad: CcidPad, service: Pcscd) -> None:
        self.pad = pad
        self.service = service
        self.person = Person(None)

    def put(self, card: PivCard | OpenPgpCard) -> None:
        self.pad.insert(card)
        self.service.await_card(READER)

    def empty(self) -> None:
        self.pad.remove()
        self.service.await_card(READER, present=False)

    def piv(self, *, last_try: bool = False) -> PivIdentity:
        person = self.person
        (found,) = piv.find(None, prompts=person, on_event=person.see, last_try=last_try)
        return found

    def openpgp(self) -> OpenPgpIdentity:
        (found,) = openpgp.find(None, prompts=self.person, on_event=self.person.see)
        return found


@pytest.fixture(scope="module")
def table() -> Iterator[Desk]:
    with CcidPad() as pad, Pcscd(pad.reader_conf) as service, service.client():
        yield Desk(pad, service)


@pytest.fixture
def desk(table: Desk) -> Desk:
    table.pad.forget()
    table.person = Person(None)
    return table


@pytest.fixture
def card(desk: Desk) -> PivCard:
    card = PivCard()
    desk.put(card)
    return card


# --- it is right


def test_200_exchanges_with_a_piv_card(desk: Desk, card: PivCard) -> None:
    identity = desk.piv()
    desk.pad.typed = [PIN] * 200
    exchange_blinded(identity, card.key, 200)
    assert desk.pad.typed == []
    assert desk.person.asked == []
    assert desk.person.seen == [PinPadUsed(identity.device, 3)] * 200


def test_exchanges_with_an_openpgp_card(desk: Desk) -> None:
    with OpenPgpCard() as card:
        desk.put(card)
        identity = desk.openpgp()
        desk.pad.typed = [OPENPGP_PIN] * 20
        exchange_blinded(identity, card.key, 20)
        assert desk.pad.typed == []
        assert desk.person.asked == []
        desk.pad.typed = [b"000000"]
        with pytest.raises(PinWrong) as caught:
            identity.exchange(new_point())
        assert caught.value.tries_left == 2
        desk.empty()


# --- the PIN is nowhere but in the reader


def test_the_pin_is_in_nothing_that_this_computer_sends_or_gets(desk: Desk, card: PivCard) -> None:
    identity = desk.piv()
    desk.pad.typed = [PIN]
    before = len(desk.pad.frames)
    taken(identity.exchange(new_point()))
    frames = desk.pad.frames[before:]
    assert len(frames) > 6
    (asked,) = desk.pad.asked
    # The command has room for a PIN, and none in it; the reader wrote it there.
    assert asked.command == bytes.fromhex("0020008008") + b"\xff" * 8
    assert card.seen.pins == 1
    for frame in frames:
        assert PIN not in frame
    # No VERIFY with data went to the card as an ordinary command.
    assert not [frame for frame in frames if frame[0] == 0x6F and frame[10:15] == bytes.fromhex("0020008008")]


def test_what_the_reader_is_told(desk: Desk, card: PivCard) -> None:
    identity = desk.piv()
    desk.pad.typed = [PIN]
    taken(identity.exchange(new_point()))
    (asked,) = desk.pad.asked
    operation, _seconds, form, block, length, most, least, condition, _messages, language = struct.unpack(
        "<BBBBBBBBBH", asked.structure[:11]
    )
    assert (operation, form, block, length) == (0, 0x82, 8, 0)
    assert (least, most, condition, language) == (6, 8, 2, 0x0409)


@pytest.mark.parametrize(
    ("form", "command", "block", "digits"),
    [(PIV, "0020008008" + "ff" * 8, 8, (6, 8)), (OPENPGP, "0020008200", 0, (6, 15))],
    ids=["PIV", "OpenPGP"],
)
def test_the_structure_of_part_10(form: PinFormat, command: str, block: int, digits: tuple[int, int]) -> None:
    data = pinpad.verify_structure(form)
    head, inside = data[:19], data[19:]
    assert inside == bytes.fromhex(command)
    assert int.from_bytes(head[15:19], "little") == len(inside)
    assert head[3] == block
    assert int.from_bytes(head[5:7], "little") == digits[0] << 8 | digits[1]


# --- what a person does


def test_tries_the_last_one_and_the_block(desk: Desk, card: PivCard) -> None:
    identity = desk.piv()
    desk.pad.typed = [b"000000", b"111111"]
    for left in (2, 1):
        with pytest.raises(PinWrong) as caught:
            identity.exchange(new_point())
        assert caught.value.tries_left == left
    asked = len(desk.pad.asked)
    with pytest.raises(PinLastTry):
        identity.exchange(new_point())
    assert len(desk.pad.asked) == asked
    desk.pad.typed = [b"222222"]
    desperate = desk.piv(last_try=True)
    for _ in range(2):
        with pytest.raises(PinBlocked):
            desperate.exchange(new_point())
    assert len(desk.pad.asked) == asked + 1
    assert desk.person.seen[-1] == PinPadUsed(identity.device, 1)


@pytest.mark.parametrize(("key", "said"), [(Key.CANCEL, "cancelled"), (Key.NOTHING, "in time")])
def test_cancelled_and_too_late(desk: Desk, card: PivCard, key: Key, said: str) -> None:
    identity = desk.piv()
    desk.pad.typed = [key, PIN]
    with pytest.raises(PinCancelled, match=said):
        identity.exchange(new_point())
    assert card.tries == 3
    # Nothing is left behind: the next time it works.
    taken(identity.exchange(new_point()))


@pytest.mark.parametrize("point", HOSTILE.values(), ids=list(HOSTILE))
def test_nobody_is_asked_for_a_hostile_point(desk: Desk, card: PivCard, point: bytes) -> None:
    identity = desk.piv()
    with pytest.raises(BadPoint):
        identity.exchange(point)
    assert desk.pad.asked == []
    assert card.seen.points == []
    assert desk.person.seen == []


# --- what happens to card and reader


def test_the_card_is_pulled_out_while_the_pad_waits(desk: Desk, card: PivCard) -> None:
    identity = desk.piv()
    desk.pad.typed = [PIN]
    desk.pad.waiting = desk.pad.remove
    with pytest.raises(CardRemoved):
        identity.exchange(new_point())
    assert card.seen.pins == 0
    desk.service.await_card(READER, present=False)
    with pytest.raises(CardMissing):
        identity.exchange(new_point())


def test_the_card_is_pulled_out_after_the_pin(desk: Desk, card: PivCard) -> None:
    identity = desk.piv()
    desk.pad.typed = [PIN]
    card.remove_at = 0x87
    with pytest.raises(CardRemoved):
        identity.exchange(new_point())
    assert not card.verified or card.seen.points == []


def test_the_pin_dies_with_the_connection(desk: Desk, card: PivCard) -> None:
    identity = desk.piv()
    desk.pad.typed = [PIN]
    taken(identity.exchange(new_point()))
    assert not card.verified


def test_the_reader_is_unplugged_while_the_pad_waits() -> None:
    """A desk of its own: nothing plugs this reader in again."""
    with CcidPad() as pad, Pcscd(pad.reader_conf) as service, service.client():
        desk = Desk(pad, service)
        desk.put(PivCard())
        identity = desk.piv()
        pad.typed = [PIN]
        pad.waiting = pad.unplug
        with pytest.raises(ReaderMissing):
            identity.exchange(new_point())


# --- readers and what they answer, without a driver


class Reader:
    """A card's connection whose reader answers SCardControl with this."""

    reader = "a reader"
    is_t0 = False

    def __init__(self, features: bytes | None, answer: bytes = b"\x90\x00") -> None:
        self.features = features
        self.answer = answer
        self.sent: list[tuple[int, bytes]] = []

    def transmit(self, apdu: bytes | memoryview) -> bytes:
        raise AssertionError("a command of its own")

    def control(self, code: int, data: bytes | memoryview) -> bytes:
        self.sent.append((code, bytes(data)))
        if code == 0x42000000 + 3400:
            if self.features is None:
                raise CardFailed("no features")
            return self.features
        return self.answer


@pytest.mark.parametrize(
    "features",
    [
        None,
        b"",
        b"\x12\x04\x42\x00\x00\x01",
        b"\x06",
        b"\x06\x04\x42",
        b"\x06\x02\x42\x00\x00\x01",
        b"\0" * 5,
    ],
)
def test_readers_without_a_pad(features: bytes | None) -> None:
    assert pinpad.find(Reader(features)) is None


def test_the_feature_is_found_among_others() -> None:
    reader = Reader(bytes.fromhex("12044233001206044233000606044233FFFF"))
    pad = pinpad.find(reader)
    assert pad is not None
    assert pad.verify(reader, PIV).status == 0x9000
    assert reader.sent[-1] == (0x42330006, pinpad.verify_structure(PIV))


@pytest.mark.promise(10)
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("6400", PinCancelled),
        ("6401", PinCancelled),
        ("6403", PinCancelled),
        ("6402", CardFailed),
        ("6B80", CardFailed),
        ("", CardFailed),
        ("90", CardFailed),
        ("900000", CardFailed),
    ],
)
def test_what_a_pad_answers(answer: str, error: type[Exception]) -> None:
    reader = Reader(bytes.fromhex("060442330006"), bytes.fromhex(answer))
    pad = pinpad.find(reader)
    assert pad is not None
    with pytest.raises(error):
        pad.verify(reader, PIV)


def test_software_agrees(desk: Desk, card: PivCard) -> None:
    assert desk.piv().recipient == P256Identity(card.key).recipient
