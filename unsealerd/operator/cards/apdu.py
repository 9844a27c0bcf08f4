"""Commands to a card and its answers, ISO/IEC 7816-4, over any `Card`. No I/O of its own.

    command    CLA INS P1 P2 [Lc DATA] [Le]      short form: at most 255 bytes of data; more is sent as a chain
    answer     [DATA] SW1 SW2                    61xx: xx more bytes wait; 6Cxx: the same again with Le = xx

Data objects in answers are BER-TLV: tag (1 to 3 bytes), length (1 to 3 bytes), value.
"""

from dataclasses import dataclass, field
from typing import Protocol

from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import CardFailed

OK = 0x9000
MAX_DATA = 255
"""Bytes of data in one command of the short form."""
MAX_ANSWER = 1 << 16
"""Bytes of one answer, all its parts together: far above any certificate."""
_MAX_PARTS = 1024
_CHAINING = 0x10  # ISO/IEC 7816-4, 5.4.1: not the last command of a chain
_GET_RESPONSE = 0xC0
_HEADER_SIZE = 4  # bytes


class Card(Protocol):
    """A connection with one card in one reader: what `pcsc` gives, and what a test can play."""

    @property
    def reader(self) -> str:
        """The name of the reader."""

    @property
    def is_t0(self) -> bool:
        """The protocol is T=0, which knows no command with both data and Le."""

    def transmit(self, apdu: bytes | memoryview) -> bytes:
        """One command, one answer with its status word. Raises `CardRemoved`, `CardFailed` and the like."""

    def control(self, code: int, data: bytes | memoryview) -> bytes:
        """A command for the reader itself, SCardControl. ``code``: a whole control code (`control_code`)."""


@dataclass(frozen=True, slots=True)
class Command:
    """``data`` may be a view of secret memory. ``answers``: the card has data to give back (Le is sent)."""

    cla: int
    ins: int
    p1: int
    p2: int
    data: bytes | memoryview = field(default=b"", repr=False)
    answers: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    data: bytes = field(repr=False)
    status: int
    """The status word, SW1 SW2."""


def control_code(number: int) -> int:
    """SCARD_CTL_CODE of pcsc-lite's ``reader.h``."""
    return 0x42000000 + number


def send(card: Card, command: Command) -> Answer:
    """Send one command, as a chain if its data is long, and collect the whole answer.

    Raises `CardFailed` for an answer without a status word or without an end, and what the card's `transmit` raises.
    Every status word that is not about the transport is the caller's to judge.
    """
    view = memoryview(command.data)
    while len(view) > MAX_DATA:
        sent = _send_one(card, command.cla | _CHAINING, command, view[:MAX_DATA], answers=False)
        if sent.status != OK:
            return sent
        view = view[MAX_DATA:]
    return _collect(card, command, _send_one(card, command.cla, command, view, answers=command.answers))


def _send_one(card: Card, cla: int, command: Command, data: memoryview, *, answers: bool) -> Answer:
    # In secret memory, since the data may be a PIN.
    with_le = answers and not (card.is_t0 and len(data))
    size = _HEADER_SIZE + (1 + len(data) if len(data) else 0) + (1 if with_le else 0)
    with SecretBuffer(size) as apdu:
        apdu.view[:_HEADER_SIZE] = bytes((cla, command.ins, command.p1, command.p2))
        if len(data):
            apdu.view[_HEADER_SIZE] = len(data)
            apdu.view[_HEADER_SIZE + 1 : _HEADER_SIZE + 1 + len(data)] = data
        # Le = 00 is 256, and secret memory begins as zeros.
        answer = _parse(card.transmit(apdu.view))
        if answer.status >> 8 == 0x6C and with_le:
            apdu.view[size - 1] = answer.status & 0xFF
            answer = _parse(card.transmit(apdu.view))
        return answer


def _collect(card: Card, command: Command, first: Answer) -> Answer:
    """GET RESPONSE until nothing is left. ISO/IEC 7816-4, 5.3.4."""
    answer, parts, size = first, [first.data], len(first.data)
    while answer.status >> 8 == 0x61:
        if len(parts) > _MAX_PARTS or size > MAX_ANSWER:
            raise CardFailed("the card's answer has no end")
        # Of a chain, GET RESPONSE takes the class without the chaining bit.
        header = bytes((command.cla, _GET_RESPONSE, 0, 0))
        answer = _parse(card.transmit(header + bytes((answer.status & 0xFF,))))
        if answer.status >> 8 == 0x6C:
            answer = _parse(card.transmit(header + bytes((answer.status & 0xFF,))))
        parts.append(answer.data)
        size += len(answer.data)
    return Answer(b"".join(parts), answer.status)


def _parse(raw: bytes) -> Answer:
    if len(raw) < 2:
        raise CardFailed("the card answers without a status word")
    return Answer(raw[:-2], int.from_bytes(raw[-2:], "big"))


def require_ok(answer: Answer, what: str) -> bytes:
    """The data of a good answer. Raises `CardFailed` with the status word for any other. ``what``: what was asked."""
    if answer.status != OK:
        raise CardFailed(f"{what}: the card answers {answer.status:04X}")
    return answer.data


# --- data objects


def parse_objects(data: bytes | memoryview) -> dict[int, bytes]:
    """The data objects that stand one after the other in ``data``, by tag. Raises `CardFailed`.

    A tag that comes twice, a length that is not there, an indefinite length and bytes that are left over are refused.
    """
    found: dict[int, bytes] = {}
    view = memoryview(data)
    while len(view):
        tag, view = _tag(view)
        length, view = _length(view)
        if length > len(view) or tag in found:
            raise CardFailed("the card answers with a malformed data object")
        found[tag] = bytes(view[:length])
        view = view[length:]
    return found


def _tag(view: memoryview) -> tuple[int, memoryview]:
    # ISO/IEC 8825-1, 8.1.2: the low five bits all one, then more bytes follow, each but the last with its high bit.
    size = 1
    if view[0] & 0x1F == 0x1F:
        size = 2
        while size < 4 and len(view) >= size and view[size - 1] & 0x80:
            size += 1
    if size > 3 or len(view) < size:
        raise CardFailed("the card answers with a malformed tag")
    return int.from_bytes(view[:size], "big"), view[size:]


def _length(view: memoryview) -> tuple[int, memoryview]:
    # ISO/IEC 8825-1, 8.1.3, definite form only.
    if not len(view):
        raise CardFailed("the card answers with a data object without a length")
    first = view[0]
    if first < 0x80:
        return first, view[1:]
    size = first & 0x7F
    if not 1 <= size <= 2 or len(view) < 1 + size:
        raise CardFailed("the card answers with a malformed length")
    return int.from_bytes(view[1 : 1 + size], "big"), view[1 + size :]


def data_object(tag: int, value: bytes) -> bytes:
    """One data object with a short or long definite length."""
    head = tag.to_bytes((tag.bit_length() + 7) // 8, "big")
    size = len(value)
    if size < 0x80:
        return head + bytes((size,)) + value
    if size < 0x100:
        return head + bytes((0x81, size)) + value
    return head + b"\x82" + size.to_bytes(2, "big") + value
