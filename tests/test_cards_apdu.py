"""Commands and answers of cards, byte for byte, and every answer that a card should not give."""

import contextlib
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import CardFailed
from unsealerd.operator.cards.apdu import (
    MAX_ANSWER,
    Answer,
    Command,
    control_code,
    data_object,
    parse_objects,
    require_ok,
    send,
)


@dataclass
class Script:
    """A card that answers one thing after the other, the last one again and again."""

    answers: list[bytes]
    is_t0: bool = False
    reader: str = "a script"
    sent: list[bytes] = field(default_factory=list)

    def transmit(self, apdu: bytes | memoryview) -> bytes:
        self.sent.append(bytes(apdu))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def control(self, code: int, data: bytes | memoryview) -> bytes:
        raise AssertionError("no command for the reader is expected")


OK = b"\x90\x00"


@pytest.mark.parametrize(
    ("command", "is_t0", "expected"),
    [
        (Command(0, 0x20, 0, 0x80), False, "00200080"),
        (Command(0, 0xFD, 0, 0, answers=True), False, "00fd000000"),
        (Command(0, 0x20, 0, 0x80, b"abc"), False, "0020008003616263"),
        (Command(0, 0xA4, 4, 0, b"abc", answers=True), False, "00a404000361626300"),
        # T=0 has no command with data and Le: ISO/IEC 7816-3, 12.1.2
        (Command(0, 0xA4, 4, 0, b"abc", answers=True), True, "00a4040003616263"),
        (Command(0, 0xFD, 0, 0, answers=True), True, "00fd000000"),
    ],
)
def test_the_form_of_a_command(command: Command, is_t0: bool, expected: str) -> None:
    card = Script([OK], is_t0)
    assert send(card, command) == Answer(b"", 0x9000)
    assert card.sent == [bytes.fromhex(expected)]


def test_long_data_goes_as_a_chain() -> None:
    data = bytes(range(256)) * 2 + b"end"
    card = Script([OK, OK, b"x\x90\x00"])
    assert send(card, Command(0, 0x87, 0x11, 0x9D, data, answers=True)).data == b"x"
    assert [apdu[0] for apdu in card.sent] == [0x10, 0x10, 0x00]
    assert b"".join(apdu[5 : 5 + apdu[4]] for apdu in card.sent) == data
    assert [len(apdu) for apdu in card.sent] == [260, 260, 5 + 5 + 1]


def test_a_chain_ends_where_the_card_refuses_it() -> None:
    card = Script([b"\x68\x84"])
    assert send(card, Command(0, 0x87, 0, 0, bytes(600))).status == 0x6884
    assert len(card.sent) == 1


def test_a_long_answer_is_fetched() -> None:
    card = Script([b"one\x61\x03", b"two\x61\x00", b"\x6c\x05", b"three\x90\x00"])
    assert send(card, Command(0, 0xCB, 0x3F, 0xFF, b"t", answers=True)) == Answer(b"onetwothree", 0x9000)
    assert [apdu.hex() for apdu in card.sent[1:]] == ["00c0000003", "00c0000000", "00c0000005"]


def test_the_wrong_length_is_asked_again_with_the_right_one() -> None:
    card = Script([b"\x6c\x03", b"abc\x90\x00"])
    assert send(card, Command(0, 0xFD, 0, 0, answers=True)).data == b"abc"
    assert [apdu.hex() for apdu in card.sent] == ["00fd000000", "00fd000003"]


def test_the_right_length_is_asked_for_once() -> None:
    card = Script([b"\x6c\x03"])
    assert send(card, Command(0, 0xFD, 0, 0, answers=True)).status == 0x6C03
    assert len(card.sent) == 2


@pytest.mark.parametrize("endless", [b"\x61\x00", bytes(256) + b"\x61\x00"])
def test_an_answer_without_an_end_is_cut(endless: bytes) -> None:
    card = Script([endless])
    with pytest.raises(CardFailed, match="no end"):
        send(card, Command(0, 0xCB, 0, 0, answers=True))
    assert len(card.sent) <= max(MAX_ANSWER // 256, 1024) + 2


@pytest.mark.parametrize("short", [b"", b"\x90"])
def test_an_answer_without_a_status_word_is_refused(short: bytes) -> None:
    with pytest.raises(CardFailed, match="status word"):
        send(Script([short]), Command(0, 0xFD, 0, 0))
    with pytest.raises(CardFailed, match="status word"):
        send(Script([b"\x61\x10", short]), Command(0, 0xFD, 0, 0))


def test_what_is_sent_is_not_shown() -> None:
    with SecretBuffer.copy_of(b"123456") as pin:
        assert "1234" not in repr(Command(0, 0x20, 0, 0x80, pin.view))
    assert "1234" not in repr(Command(0, 0x20, 0, 0x80, b"123456"))
    assert "secret" not in repr(Answer(b"secret", 0x9000))


def test_a_bad_status_is_told() -> None:
    assert require_ok(Answer(b"data", 0x9000), "asking") == b"data"
    with pytest.raises(CardFailed, match="asking: the card answers 6A80"):
        require_ok(Answer(b"", 0x6A80), "asking")


def test_control_codes_are_those_of_pcsc_lite() -> None:
    from smartcard import scard

    assert [control_code(number) for number in (1, 3400)] == [
        scard.SCARD_CTL_CODE(1),
        scard.SCARD_CTL_CODE(3400),
    ]


# --- data objects

OBJECTS = st.dictionaries(
    st.sampled_from([0x01, 0x53, 0x70, 0x7C, 0x82, 0x85, 0x5F2F, 0x7F49, 0x5FC102]), st.binary(max_size=400)
)


@given(OBJECTS)
def test_data_objects_round_trip(objects: dict[int, bytes]) -> None:
    assert parse_objects(b"".join(data_object(tag, value) for tag, value in objects.items())) == objects


@given(st.binary(max_size=80))
def test_any_bytes_are_data_objects_or_a_named_error(data: bytes) -> None:
    try:
        found = parse_objects(data)
    except CardFailed:
        return
    assert sum(len(value) for value in found.values()) <= len(data)


@pytest.mark.parametrize(
    "data",
    [
        "53",  # no length
        "5302aa",  # too short
        "5380",  # indefinite
        "5384000000",  # a length of four bytes
        "53820001",  # a length that is not all there; as one: 1 byte that is missing
        "5f",  # half a tag
        "5fc1",
        "5fc1818201aa",  # a tag of four bytes
        "530053 00",  # twice
        "5301aaff",  # left over
    ],
)
def test_malformed_objects_are_refused(data: str) -> None:
    with pytest.raises(CardFailed):
        parse_objects(bytes.fromhex(data))


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=6), st.booleans(), st.binary(max_size=600))
def test_any_answers_end_in_an_answer_or_a_named_error(
    answers: list[bytes], is_t0: bool, data: bytes
) -> None:
    with contextlib.suppress(CardFailed):
        send(Script(answers, is_t0), Command(0, 0x87, 0x11, 0x9D, data, answers=True))
