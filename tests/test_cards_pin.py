"""The rules for PINs: which try is used, who is asked, what the card's word means. The card is a script here."""

import pytest
from rigs.person import Person

from unsealerd.errors import CardFailed, PinBlocked, PinCancelled, PinLastTry, PinWrong, UnsealerdError
from unsealerd.operator.cards.apdu import Answer, Card
from unsealerd.operator.cards.pin import Asking, FindPinPad, PinFormat, PinPad, read_tries, verify
from unsealerd.operator.events import PinPadUsed
from unsealerd.operator.prompts import PinRequest

PIV = PinFormat(0x80, 6, 8, padded=True)
OPENPGP = PinFormat(0x82, 6, 127, padded=False)


class Says:
    """A card that answers VERIFY with one status word."""

    reader = "a reader"
    is_t0 = False

    def __init__(self, status: int) -> None:
        self.status = status
        self.sent: list[bytes] = []

    def transmit(self, apdu: bytes | memoryview) -> bytes:
        self.sent.append(bytes(apdu))
        return self.status.to_bytes(2, "big")

    def control(self, code: int, data: bytes | memoryview) -> bytes:
        raise CardFailed("no pin pad")


def no_pad(_card: Card) -> None:
    return None


def asking(person: Person, *, last_try: bool = False, pad: FindPinPad = no_pad) -> Asking:
    return Asking("a card", person, person.see, last_try, pad)


@pytest.mark.parametrize(
    ("status", "left"),
    [(0x63C3, 3), (0x63C1, 1), (0x63C0, 0), (0x6983, 0), (0x9000, None), (0x6A88, None), (0x6700, None)],
)
def test_the_tries_left_are_asked_without_using_one(status: int, left: int | None) -> None:
    card = Says(status)
    assert read_tries(card, PIV) == left
    assert card.sent == [bytes.fromhex("00200080")]


def test_the_pin_is_padded_and_sent_once() -> None:
    card, person = Says(0x9000), Person(b"123456")
    verify(card, PIV, 3, asking(person))
    assert card.sent == [bytes.fromhex("0020008008") + b"123456\xff\xff"]
    assert person.asked == [PinRequest("a card", 3)]


def test_an_openpgp_pin_is_not_padded() -> None:
    card = Says(0x9000)
    verify(card, OPENPGP, None, asking(Person(b"123456789")))
    assert card.sent == [bytes.fromhex("0020008209") + b"123456789"]


@pytest.mark.parametrize(
    ("status", "error", "left"),
    [
        (0x63C2, PinWrong, 2),
        (0x63C1, PinWrong, 1),
        (0x63C0, PinBlocked, None),
        (0x6983, PinBlocked, None),
        (0x6982, PinWrong, None),
        (0x6300, PinWrong, None),
        (0x6A80, CardFailed, None),
        (0x6F00, CardFailed, None),
    ],
)
def test_what_the_card_says_to_a_pin_has_a_name(
    status: int, error: type[UnsealerdError], left: int | None
) -> None:
    with pytest.raises(error) as caught:
        verify(Says(status), PIV, 3, asking(Person(b"123456")))
    assert getattr(caught.value, "tries_left", None) == left
    assert "123456" not in str(caught.value)


@pytest.mark.parametrize("tries", [0, 1])
def test_nobody_is_asked_for_what_must_not_be_tried(tries: int) -> None:
    card, person = Says(0x9000), Person(b"123456")
    with pytest.raises(PinBlocked if tries == 0 else PinLastTry):
        verify(card, PIV, tries, asking(person))
    assert (card.sent, person.asked) == ([], [])


def test_the_last_try_may_be_allowed_but_a_blocked_pin_not() -> None:
    card, person = Says(0x9000), Person(b"123456")
    verify(card, PIV, 1, asking(person, last_try=True))
    assert person.asked == [PinRequest("a card", 1)]
    with pytest.raises(PinBlocked):
        verify(card, PIV, 0, asking(person, last_try=True))
    assert len(card.sent) == 1


@pytest.mark.parametrize("typed", [b"12345", b"123456789", b"12345\xff"])
def test_what_cannot_be_a_pin_costs_no_try(typed: bytes) -> None:
    card = Says(0x9000)
    with pytest.raises(PinWrong, match="no try was used") as caught:
        verify(card, PIV, 3, asking(Person(typed)))
    assert (card.sent, caught.value.tries_left) == ([], 3)


@pytest.mark.parametrize("typed", [b"", None])
def test_no_pin_is_a_cancellation_and_never_an_empty_verify(typed: bytes | None) -> None:
    card = Says(0x9000)
    with pytest.raises(PinCancelled):
        verify(card, PIV, 3, asking(Person(typed)))
    assert card.sent == []


class Pad:
    def __init__(self, status: int) -> None:
        self.status = status
        self.forms: list[PinFormat] = []

    def verify(self, card: Card, form: PinFormat) -> Answer:
        self.forms.append(form)
        return Answer(b"", self.status)

    def find(self, _card: Card) -> PinPad:
        return self


def test_a_pin_pad_is_used_where_there_is_one() -> None:
    card, person, pad = Says(0x9000), Person(None), Pad(0x9000)
    verify(card, PIV, 3, asking(person, pad=pad.find))
    assert (pad.forms, card.sent, person.asked) == ([PIV], [], [])
    assert person.seen == [PinPadUsed("a card", 3)]


def test_the_last_try_is_refused_at_the_pin_pad_too() -> None:
    person, pad = Person(None), Pad(0x9000)
    with pytest.raises(PinLastTry):
        verify(Says(0x9000), PIV, 1, asking(person, pad=pad.find))
    assert (pad.forms, person.seen) == ([], [])


def test_a_wrong_pin_at_the_pin_pad_has_the_same_name() -> None:
    with pytest.raises(PinWrong) as caught:
        verify(Says(0x9000), PIV, 3, asking(Person(None), pad=Pad(0x63C2).find))
    assert caught.value.tries_left == 2
