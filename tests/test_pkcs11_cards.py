"""The PKCS#11 code on smart cards, through OpenSC's module: other flags, other errors, and a PIN pad."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import pytest
from rigs import ccidpad
from rigs.apart import Apart, IdentityApart
from rigs.ccidpad import CcidPad, Key
from rigs.openpgpcard import PIN as OPENPGP_PIN
from rigs.openpgpcard import OpenPgpCard
from rigs.pcscd import READER, Pcscd, VirtualCard
from rigs.person import Person
from rigs.pivcard import PIN, PivCard
from rigs.points import HOSTILE, exchange_blinded, new_point, point_with_leading_zero, taken

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
    TouchMissed,
    WrongCard,
)
from unsealerd.operator.events import PinPadUsed

pytestmark = pytest.mark.xdist_group("opensc")

OPENSC = "?module-name=opensc-pkcs11"
PIV_KEY = f"pkcs11:id=%03{OPENSC}"  # slot 9D
OPENPGP_KEY = f"pkcs11:id=%02{OPENSC}"


class Find(Protocol):
    def __call__(self, uri: str, person: Person, *, last_try: bool = False) -> IdentityApart: ...


class Slot:
    """The slot of a reader in a private pcscd, and the module that uses it."""

    def __init__(self, service: Pcscd, module: Apart) -> None:
        self.service = service
        self.module = module

    @contextmanager
    def holding(self, card: VirtualCard) -> Iterator[None]:
        """The module reads a card anew only if it was pulled out."""
        inserted = self.service.insert(card)
        try:
            yield
        finally:
            inserted.remove()
            self.service.await_card(READER, present=False)


@pytest.fixture(scope="module")
def slot() -> Iterator[Slot]:
    with Pcscd() as service, service.client(), module() as opensc:
        yield Slot(service, opensc)


@contextmanager
def module() -> Iterator[Apart]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENSC_CONF", "/dev/null")
        with Apart() as apart:
            yield apart


@pytest.fixture
def card(slot: Slot) -> Iterator[PivCard]:
    card = PivCard()
    with slot.holding(card):
        yield card


@pytest.fixture
def person() -> Person:
    return Person(PIN)


@pytest.fixture
def find(slot: Slot) -> Find:
    return finder(slot.module)


def finder(module: Apart) -> Find:
    def find(uri: str, person: Person, *, last_try: bool = False) -> IdentityApart:
        (identity,) = module.find(uri, person, last_try=last_try)
        return identity

    return find


def test_the_key_of_a_piv_card(slot: Slot, card: PivCard, find: Find, person: Person) -> None:
    identity = find(PIV_KEY, person)
    assert identity.recipient == P256Identity(card.key).recipient
    assert person.asked == []
    exchange_blinded(identity, card.key, 10)
    point = point_with_leading_zero(card.key)
    assert taken(identity.exchange(point)) == taken(P256Identity(card.key).exchange(point))
    assert len(person.asked) == 11
    # Without an id it is every key of the card.
    assert len(slot.module.find(f"pkcs11:{OPENSC}", person)) == 2


def test_the_key_of_an_openpgp_card(slot: Slot, find: Find) -> None:
    person = Person(OPENPGP_PIN)
    with OpenPgpCard() as card, slot.holding(card):
        identity = find(OPENPGP_KEY, person)
        assert identity.recipient == P256Identity(card.key).recipient
        exchange_blinded(identity, card.key, 5)
        person.pins = b"000000"
        # It says "not logged in" to a wrong PIN: which is not a missed touch.
        with pytest.raises(PinWrong):
            identity.exchange(new_point())


def test_wrong_last_and_blocked_as_the_token_says(card: PivCard, find: Find, person: Person) -> None:
    identity = find(PIV_KEY, person)
    person.pins = b"000000"
    with pytest.raises(PinWrong):
        identity.exchange(new_point())
    with pytest.raises(PinWrong) as caught:
        identity.exchange(new_point())
    assert caught.value.tries_left == 1
    pins = card.seen.pins
    with pytest.raises(PinLastTry):
        identity.exchange(new_point())
    assert card.seen.pins == pins
    assert len(person.asked) == 2
    desperate = find(PIV_KEY, person, last_try=True)
    for _ in range(2):
        with pytest.raises(PinBlocked):
            desperate.exchange(new_point())
    assert person.asked[-1].tries_left == 1
    assert len(person.asked) == 3


def test_the_last_try_with_the_right_pin(card: PivCard, find: Find, person: Person) -> None:
    card.tries = 1
    taken(find(PIV_KEY, person, last_try=True).exchange(new_point()))
    assert card.tries == 3


@pytest.mark.parametrize("point", HOSTILE.values(), ids=list(HOSTILE))
def test_the_card_never_sees_a_hostile_point(card: PivCard, find: Find, person: Person, point: bytes) -> None:
    identity = find(PIV_KEY, person)
    before = len(card.seen.commands)
    with pytest.raises(BadPoint):
        identity.exchange(point)
    assert len(card.seen.commands) == before


def test_the_pin_is_not_kept_by_the_module(card: PivCard, find: Find, person: Person) -> None:
    identity = find(PIV_KEY, person)
    taken(identity.exchange(new_point()))
    pins = card.seen.pins
    person.pins = None
    with pytest.raises(PinCancelled):
        identity.exchange(new_point())
    assert card.seen.pins == pins


def test_a_missed_touch_is_named(card: PivCard, find: Find, person: Person) -> None:
    card.slots[0x9D].touch_policy = 2
    card.touched = False
    with pytest.raises(TouchMissed):
        find(PIV_KEY, person).exchange(new_point())


def test_an_answer_that_is_no_coordinate_is_named(card: PivCard, find: Find, person: Person) -> None:
    identity = find(PIV_KEY, person)
    zero = bytes.fromhex("7c228220") + bytes(32) + b"\x90\x00"
    card.mangle = lambda header, answer: zero if header[1] == 0x87 else answer
    with pytest.raises(CardFailed):
        identity.exchange(new_point())


def test_a_card_that_is_pulled_out_in_the_middle_is_named(card: PivCard, find: Find, person: Person) -> None:
    identity = find(PIV_KEY, person)
    card.remove_at = 0x87
    with pytest.raises(CardRemoved):
        identity.exchange(new_point())


def test_a_card_that_is_gone_or_another_is_named(slot: Slot, find: Find, person: Person) -> None:
    first = PivCard()
    with slot.holding(first):
        identity = find(PIV_KEY, person)
    with pytest.raises(CardRemoved):
        identity.exchange(new_point())
    with pytest.raises(CardMissing):
        find(PIV_KEY, person)
    # The same name, another key.
    with slot.holding(PivCard()), pytest.raises(WrongCard, match="another key"):
        identity.exchange(new_point())
    assert len(person.asked) == 1


# --- the PIN pad


@pytest.fixture
def pad() -> Iterator[CcidPad]:
    with CcidPad() as pad, Pcscd(pad.reader_conf) as service, service.client():
        pad.insert(PivCard())
        service.await_card(ccidpad.READER)
        yield pad


def test_at_a_pin_pad_the_module_gets_no_pin(pad: CcidPad) -> None:
    with module() as opensc:
        use_the_pad(pad, finder(opensc))


def use_the_pad(pad: CcidPad, find: Find) -> None:
    person = Person(None)
    card = PivCard()
    pad.insert(card)
    identity = find(PIV_KEY, person)
    pad.typed = [PIN, PIN, PIN, b"000000", Key.CANCEL, Key.NOTHING]
    exchange_blinded(identity, card.key, 3)
    assert person.asked == []
    assert person.seen == [PinPadUsed(identity.device, None)] * 3
    assert not [frame for frame in pad.frames if PIN in frame]
    for error in (PinWrong, PinCancelled, PinCancelled):
        with pytest.raises(error):
            identity.exchange(new_point())
    assert pad.typed == []
    assert card.tries == 2
    pad.typed = [PIN]
    pad.waiting = pad.remove
    with pytest.raises(CardRemoved):
        identity.exchange(new_point())
