"""A key in a PIV card, through the true stack: what it answers, what it is asked, and what becomes of the PIN."""

import gc
import logging
import os
import time
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rigs.desk import Desk
from rigs.person import Person
from rigs.pivcard import ALWAYS, CACHED, GUID, NEVER, ONCE, PIN, SERIAL, TOUCH_ALWAYS, PivCard, Slot, point_of

from unsealerd.core.age import P256Identity
from unsealerd.errors import (
    AccessDenied,
    BadPoint,
    BadRequest,
    CardFailed,
    CardMissing,
    PinBlocked,
    PinCancelled,
    PinLastTry,
    PinWrong,
    TouchMissed,
    UnsealerdError,
    WrongCard,
)
from unsealerd.operator.cards.policies import PinPolicy, TouchPolicy
from unsealerd.operator.events import TouchNeeded
from unsealerd.operator.identities import open_identities, piv
from unsealerd.operator.prompts import PinRequest

pytestmark = pytest.mark.xdist_group("piv")

DEVICE = f"YubiKey 5 {SERIAL}, PIV slot 9D"
CARD_ERRORS = (
    CardFailed,
    TouchMissed,
    WrongCard,
    PinWrong,
    PinBlocked,
    PinLastTry,
    AccessDenied,
    CardMissing,
)


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    with Desk() as desk:
        yield desk


@pytest.fixture
def card(desk: Desk) -> PivCard:
    return desk.place(PivCard())


@pytest.fixture
def plain(desk: Desk) -> PivCard:
    """Not a YubiKey."""
    return desk.place(PivCard(yubikey=False))


def random_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def random_point() -> bytes:
    return point_of(random_key())


def find(serial: str | None = None, slot: int = 0x9D) -> list[piv.PivIdentity]:
    return piv.find(serial, slot, prompts=Person(PIN), on_event=lambda event: None)


# --- what is found


def test_a_yubikey_is_found_without_a_pin(desk: Desk, card: PivCard) -> None:
    (found,) = find()
    assert found.recipient == P256Identity(card.key).recipient
    assert found.device == DEVICE
    assert found.policies() == (PinPolicy.ONCE, TouchPolicy.NEVER)
    assert (card.seen.count(0x20), card.seen.points) == (0, [])


@pytest.mark.parametrize("serial", [str(SERIAL), f" {SERIAL}"])
@pytest.mark.usefixtures("card")
def test_it_is_found_by_its_serial_number(serial: str) -> None:
    assert len(find(serial)) == 1


@pytest.mark.parametrize("serial", ["1", "", GUID.hex(), "12345678 or another"])
@pytest.mark.usefixtures("card")
def test_another_serial_number_is_not_there(serial: str) -> None:
    with pytest.raises(CardMissing, match="no PIV card"):
        find(serial)


def test_two_cards_are_both_found(desk: Desk, card: PivCard) -> None:
    other = PivCard(serial=77)
    inserted = desk.service.insert(other, slot=1)
    try:
        assert {each.device for each in find()} == {DEVICE, "YubiKey 5 77, PIV slot 9D"}
        (found,) = find("77")
        at = random_point()
        assert found.exchange(at) == P256Identity(other.key).exchange(at)
        assert card.seen.points == []
    finally:
        desk.service.pull(inserted, slot=1)


def test_a_plain_card_is_known_by_its_certificate(desk: Desk, plain: PivCard) -> None:
    (found,) = find(str(GUID.hex()))
    assert found.recipient == P256Identity(plain.key).recipient
    assert found.device == f"PIV card {GUID.hex()}, PIV slot 9D"
    assert found.policies() is None
    at = random_point()
    assert found.exchange(at) == P256Identity(plain.key).exchange(at)


def test_a_guid_may_be_written_with_dashes(plain: PivCard) -> None:
    text = GUID.hex().upper()
    assert len(find("-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])))) == 1


def test_a_card_without_a_name_is_named_by_its_reader(desk: Desk) -> None:
    desk.place(PivCard(yubikey=False, guid=None))
    (found,) = find()
    assert found.device == "PIV card in Virtual PCD 00 00, PIV slot 9D"


def test_an_old_yubikey_without_metadata(desk: Desk) -> None:
    card = desk.place(PivCard(has_metadata=False, version=(4, 3, 5)))
    (found,) = find()
    assert found.device == f"YubiKey 4 {SERIAL}, PIV slot 9D"
    assert found.recipient == P256Identity(card.key).recipient


def test_a_compressed_certificate_is_unpacked(desk: Desk) -> None:
    import gzip

    card = PivCard(yubikey=False)
    packed = gzip.compress(card.slots[0x9D].certificate or b"")
    card.compressed = packed
    desk.place(card)
    (found,) = find()
    assert found.recipient == P256Identity(card.key).recipient
    for bad in (packed[:40], b"no gzip", gzip.compress(bytes(1 << 20))):
        card.compressed = bad
        with pytest.raises(CardFailed, match="certificate"):
            find()


@pytest.mark.parametrize("slot", [0x82, 0x95, 0x9A, 0x9C, 0x9E])
@pytest.mark.parametrize("yubikey", [True, False])
def test_other_slots_can_be_used(desk: Desk, slot: int, yubikey: bool) -> None:
    card = PivCard(yubikey=yubikey)
    card.slots[slot] = card.made(slot)
    desk.place(card)
    (found,) = find(None, slot)
    key = card.slots[slot].key
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    at = random_point()
    assert found.exchange(at) == P256Identity(key).exchange(at)


@pytest.mark.parametrize("slot", [0x00, 0x9B, 0x9F, 0x81, 0x96, 0xF9, 0x19D])
def test_what_is_no_slot_for_keys_is_refused(slot: int) -> None:
    with pytest.raises(BadRequest):
        find(None, slot)


@pytest.mark.parametrize("yubikey", [True, False])
def test_an_empty_slot(desk: Desk, yubikey: bool) -> None:
    desk.place(PivCard(yubikey=yubikey))
    with pytest.raises(WrongCard, match="no key in PIV slot 9C"):
        find(None, 0x9C)


@pytest.mark.parametrize("yubikey", [True, False])
@pytest.mark.parametrize("kind", ["P-384", "RSA"])
def test_a_key_of_another_kind(desk: Desk, kind: str, yubikey: bool) -> None:
    other = (
        ec.generate_private_key(ec.SECP384R1()) if kind == "P-384" else rsa.generate_private_key(65537, 2048)
    )
    card = PivCard(yubikey=yubikey)
    card.slots[0x9D] = card.made(0x9D, other)
    desk.place(card)
    with pytest.raises(WrongCard, match="not on P-256"):
        find()


class OtherCard(PivCard):
    """A card without the PIV application, such as one for a bank."""

    def _select(self, p1: int, data: bytes) -> bytes:
        return b"\x6a\x82"


def test_a_card_of_another_kind(desk: Desk) -> None:
    desk.place(OtherCard())
    with pytest.raises(CardMissing, match="no PIV card"):
        find()


# --- what it answers


def test_two_hundred_exchanges_agree_with_the_library(desk: Desk, card: PivCard) -> None:
    identity = desk.identity()
    for _ in range(200):
        other = random_key()
        with identity.exchange(point_of(other)) as x:
            assert bytes(x.view) == other.exchange(ec.ECDH(), card.key.public_key())
    assert len(card.seen.points) == 200


def zero_led(card: PivCard, zeros: int = 1) -> tuple[bytes, bytes]:
    """A point for which the card's answer begins with zeros, and the answer."""
    while True:
        other = random_key()
        x = other.exchange(ec.ECDH(), card.key.public_key())
        if x[:zeros] == bytes(zeros):
            return point_of(other), x


@pytest.mark.parametrize("form", ["as it is", "whole point", "without its zeros"])
def test_leading_zeros_stay(desk: Desk, card: PivCard, form: str) -> None:
    card.whole_point = form == "whole point"
    card.strip_zeros = form == "without its zeros"
    identity = desk.identity()
    for _ in range(3):
        at, expected = zero_led(card)
        with identity.exchange(at) as x:
            assert bytes(x.view) == expected
            assert len(expected) == 32


def test_the_whole_point_is_taken_too(desk: Desk, card: PivCard) -> None:
    card.whole_point = True
    identity, at = desk.identity(), random_point()
    assert identity.exchange(at) == P256Identity(card.key).exchange(at)


# --- what it is asked: no unvalidated point reaches the card


def hostile_points() -> dict[str, bytes]:
    good = random_point()
    compressed = random_key().public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    p384 = ec.generate_private_key(ec.SECP384R1())
    p = 2**256 - 2**224 + 2**192 + 2**96 - 1
    return {
        "off the curve": good[:-1] + bytes([good[-1] ^ 1]),
        "the identity": b"\x00",
        "zeros": b"\x04" + bytes(64),
        "not below the prime": b"\x04" + p.to_bytes(32, "big") + good[33:],
        "too short": good[:-1],
        "too long": good + b"\0",
        "empty": b"",
        "compressed": compressed,
        "hybrid": b"\x06" + good[1:],
        "x only": good[1:33],
        "another curve": point_of(p384),
        "another curve, cut": point_of(p384)[:65],
        "the twist": b"\x04" + bytes(31) + b"\x02" + bytes(31) + b"\x01",
        "ones": b"\xff" * 65,
        "X25519": os.urandom(32),
    }


@pytest.mark.promise(5)
@pytest.mark.parametrize("kind", hostile_points())
def test_a_hostile_point_never_reaches_the_card(desk: Desk, card: PivCard, kind: str) -> None:
    person = Person(PIN)
    identity = desk.identity(person)
    card.forget()
    with pytest.raises(BadPoint):
        identity.exchange(hostile_points()[kind])
    assert (card.seen.commands, card.seen.points, card.seen.resets, person.asked) == ([], [], 0, [])


@pytest.mark.promise(5)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.binary(max_size=100) | st.binary(min_size=64, max_size=64).map(lambda xy: b"\x04" + xy))
def test_no_random_bytes_reach_the_card(desk: Desk, card: PivCard, at: bytes) -> None:
    identity = desk.identity()
    with pytest.raises(BadPoint):
        identity.exchange(at)
    assert card.seen.points == []


# --- the PIN


def test_the_pin_is_asked_for_at_each_use_and_sent_once(desk: Desk, card: PivCard) -> None:
    person = Person(PIN)
    identity = desk.identity(person)
    assert person.asked == []
    for count in (1, 2):
        identity.exchange(random_point()).close()
        assert person.asked == [PinRequest(DEVICE, 3)] * count
        assert card.seen.pins == count
    assert not card.verified


def test_a_wrong_pin_costs_one_try_and_says_how_many_are_left(desk: Desk, card: PivCard) -> None:
    identity = desk.identity(Person(b"654321"))
    with pytest.raises(PinWrong, match="2 tries left") as caught:
        identity.exchange(random_point())
    assert (caught.value.tries_left, card.tries, card.seen.points) == (2, 2, [])


def test_the_last_try_is_kept(desk: Desk, card: PivCard) -> None:
    card.tries = 1
    person = Person(PIN)
    with pytest.raises(PinLastTry):
        desk.identity(person).exchange(random_point())
    assert (card.tries, card.seen.pins, person.asked) == (1, 0, [])


def test_the_last_try_may_be_allowed(desk: Desk, card: PivCard) -> None:
    card.tries = 1
    person = Person(PIN)
    desk.identity(person, last_try=True).exchange(random_point()).close()
    assert person.asked == [PinRequest(DEVICE, 1)]
    assert card.tries == 3


@pytest.mark.parametrize("status_63c0", [False, True])
def test_a_wrong_last_try_blocks_the_pin(desk: Desk, card: PivCard, status_63c0: bool) -> None:
    card.tries = 1
    card.blocks_with_63c0 = status_63c0
    identity = desk.identity(Person(b"654321"), last_try=True)
    with pytest.raises(PinBlocked):
        identity.exchange(random_point())
    person = Person(PIN)
    with pytest.raises(PinBlocked):
        desk.identity(person, last_try=True).exchange(random_point())
    assert person.asked == []


def test_a_person_may_cancel(desk: Desk, card: PivCard) -> None:
    with pytest.raises(PinCancelled):
        desk.identity(Person(None)).exchange(random_point())
    assert (card.seen.pins, card.tries, card.seen.points) == (0, 3, [])


def test_a_key_that_wants_no_pin_asks_for_none(desk: Desk, card: PivCard) -> None:
    card.slots[0x9D].pin_policy = NEVER
    person = Person(None)
    desk.identity(person).exchange(random_point()).close()
    assert (person.asked, card.seen.count(0x20)) == ([], 0)


def test_a_key_that_wants_a_pin_each_time(desk: Desk, card: PivCard) -> None:
    card.slots[0x9D].pin_policy = ALWAYS
    identity = desk.identity()
    assert identity.policies() == (PinPolicy.ALWAYS, TouchPolicy.NEVER)
    for _ in range(2):
        identity.exchange(random_point()).close()
    assert card.seen.pins == 2


class Forgetful(Person):
    """Types a PIN that no object of the test holds."""

    def pin(self, request: PinRequest) -> bytes:
        self.asked.append(request)
        return bytes(reversed(b"936174"))


TYPED = b"471639"


@pytest.mark.promise(1)
@pytest.mark.parametrize("right", [True, False])
def test_the_pin_is_in_no_log_and_not_kept(
    desk: Desk,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    right: bool,
) -> None:
    card = desk.place(PivCard(pin=TYPED if right else PIN))
    person = Forgetful()
    caught: UnsealerdError | None = None
    with caplog.at_level(logging.DEBUG):
        identity = desk.identity(person)
        try:
            identity.exchange(random_point()).close()
        except PinWrong as err:
            caught = err
    assert (caught is None) == right
    assert card.seen.pins == 1
    out, err_text = capfd.readouterr()
    texts = [caplog.text, out, err_text, repr(identity), repr(person.asked), repr(person.seen), repr(caught)]
    if caught is not None and caught.__traceback__ is not None:
        caught.__traceback__ = None
    assert not any(
        form in text for text in texts for form in (TYPED.decode(), TYPED.hex(), repr(list(TYPED)))
    )
    assert not any(holds(each, TYPED) for each in reachable(identity))


def holds(thing: object, pin: bytes) -> bool:
    return (isinstance(thing, bytes | bytearray) and pin in thing) or (
        isinstance(thing, str) and pin.decode() in thing
    )


def reachable(root: object) -> list[object]:
    """What an object holds, and what that holds; not the code of modules and classes."""
    seen: dict[int, object] = {}
    waiting = [root]
    while waiting:
        thing = waiting.pop()
        if (
            id(thing) in seen
            or isinstance(thing, type)
            or hasattr(thing, "__code__")
            or hasattr(thing, "__spec__")
        ):
            continue
        seen[id(thing)] = thing
        waiting += gc.get_referents(thing)
    return list(seen.values())


# --- the touch


@pytest.mark.parametrize("policy", [TOUCH_ALWAYS, CACHED])
def test_who_must_touch_is_told(desk: Desk, card: PivCard, policy: int) -> None:
    card.slots[0x9D].touch_policy = policy
    person = Person(PIN)
    identity = desk.identity(person)
    assert person.seen == []
    identity.exchange(random_point()).close()
    assert person.seen == [TouchNeeded(DEVICE)]


@pytest.mark.usefixtures("card")
def test_nobody_is_told_to_touch_what_wants_no_touch(desk: Desk) -> None:
    person = Person(PIN)
    desk.identity(person).exchange(random_point()).close()
    assert person.seen == []


@pytest.mark.parametrize("has_metadata", [True, False])
@pytest.mark.parametrize("pin_policy", [NEVER, ONCE])
def test_a_missed_touch_is_named(desk: Desk, has_metadata: bool, pin_policy: int) -> None:
    card = desk.place(PivCard(has_metadata=has_metadata))
    card.slots[0x9D] = Slot(card.key, pin_policy, TOUCH_ALWAYS, certificate=card.slots[0x9D].certificate)
    card.touched = False
    identity = desk.identity()
    with pytest.raises(TouchMissed):
        identity.exchange(random_point())
    card.touched = True
    identity.exchange(random_point()).close()


def test_a_refusal_is_no_missed_touch_if_the_key_wants_none(desk: Desk, card: PivCard) -> None:
    card.mangle = lambda head, answer: b"\x69\x82" if head[1] == 0x87 else answer
    with pytest.raises(CardFailed, match="6982"):
        desk.identity().exchange(random_point())


# --- another card, and nonsense


def test_another_card_in_the_reader_is_not_used(desk: Desk, card: PivCard) -> None:
    person = Person(PIN)
    identity = desk.identity(person)
    other = desk.place(PivCard())
    with pytest.raises(WrongCard, match="another key"):
        identity.exchange(random_point())
    assert (person.asked, other.seen.pins, other.seen.points) == ([], 0, [])
    desk.place(OtherCard())
    with pytest.raises(WrongCard, match="not a PIV card"):
        identity.exchange(random_point())


def test_a_slot_that_was_emptied_or_filled_anew(desk: Desk, card: PivCard) -> None:
    identity = desk.identity()
    card.slots[0x9D] = card.made(0x9D)
    with pytest.raises(WrongCard, match="another key"):
        identity.exchange(random_point())
    del card.slots[0x9D]
    with pytest.raises(WrongCard, match="no key"):
        identity.exchange(random_point())


def test_a_key_that_vanishes_after_the_pin(desk: Desk, card: PivCard) -> None:
    card.mangle = lambda head, answer: b"\x6a\x88" if head[1] == 0x87 else answer
    with pytest.raises(WrongCard, match="6A88"):
        desk.identity().exchange(random_point())


@pytest.mark.parametrize(
    "answer",
    [
        "9000",
        "7c009000",
        "7c0282009000",
        "7c2282209000",
        "7c228220" + "00" * 32 + "9000",  # zero
        "7c23 8221" + "11" * 33 + "9000",  # too long
        "7c438241 04" + "22" * 64 + "9000",  # a whole point that is none
        "7c228120" + "11" * 32 + "9000",  # another object
        "7c208220" + "11" * 32 + "9000",  # lengths that do not fit
        "11" * 32 + "9000",
        "6f00",
        "90",
        "6100",
        "6c20",
    ],
)
def test_garbage_in_place_of_an_answer_is_named(desk: Desk, card: PivCard, answer: str) -> None:
    card.mangle = lambda head, real: bytes.fromhex(answer) if head[1] in (0x87, 0xC0) else real
    with pytest.raises(CardFailed):
        desk.identity().exchange(random_point())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ins=st.sampled_from([0xA4, 0xFD, 0xF8, 0xCB, 0xF7, 0x20, 0x87]),
    noise=st.binary(max_size=300),
    how=st.sampled_from(["replaced", "cut", "changed", "longer"]),
    yubikey=st.booleans(),
)
def test_whatever_the_card_says_there_is_a_result_or_a_named_error(
    desk: Desk, ins: int, noise: bytes, how: str, yubikey: bool
) -> None:
    card = desk.place(CARDS[yubikey])
    card.tries = 3

    def mangle(head: bytes, answer: bytes) -> bytes:
        if head[1] != ins:
            return answer
        body, status = answer[:-2], answer[-2:]
        match how:
            case "replaced":
                return noise or b"\0"
            case "cut":
                return body[: len(noise) % (len(body) + 1)] + status
            case "longer":
                return (body + noise)[:256] + status
            case _:
                at = len(noise) % (len(body) or 1)
                return (
                    body[:at]
                    + bytes(a ^ b for a, b in zip(body[at:], noise, strict=False))
                    + body[at + len(noise) :]
                    + status
                )

    card.mangle = mangle
    try:
        identity = desk.identity()
        identity.exchange(random_point()).close()
    except CARD_ERRORS:
        pass
    finally:
        card.mangle = None


CARDS = {True: PivCard(), False: PivCard(yubikey=False)}


def test_a_slow_card_is_waited_for(desk: Desk, card: PivCard) -> None:
    """As one that waits for a touch."""
    identity = desk.identity()

    def slow(apdu: bytes) -> None:
        if apdu[1] == 0x87:
            card.delay = 1.5

    card.before = slow
    began = time.monotonic()
    identity.exchange(random_point()).close()
    assert time.monotonic() - began >= 1.5


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", (None, 0x9D)),
        ("77", ("77", 0x9D)),
        ("77/82", ("77", 0x82)),
        ("/9c", (None, 0x9C)),
    ],
)
def test_a_spec_names_card_and_slot(text: str, found: tuple[str | None, int]) -> None:
    assert piv.which(text) == found


@pytest.mark.parametrize("text", ["/", "77/", "77/8", "77/829", "77/zz", "77/82/", "77/ 8"])
def test_what_is_no_slot_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        piv.which(text)


def test_a_key_in_a_retired_slot_by_its_spec(desk: Desk) -> None:
    card = PivCard()
    card.slots[0x82] = card.made(0x82)
    desk.place(card)
    (found,) = open_identities("piv:/82", prompts=Person(PIN))
    assert isinstance(found, piv.PivIdentity)
    assert found.device == f"YubiKey 5 {SERIAL}, PIV slot 82"
