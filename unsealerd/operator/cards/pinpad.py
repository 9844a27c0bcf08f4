"""A reader with a PIN pad: it asks for the PIN itself and sends VERIFY, so the PIN never enters this computer.

PC/SC Workgroup, part 10, revision 2.02: section 2.2 (CM_IOCTL_GET_FEATURE_REQUEST), 2.5.2 (PIN_VERIFY_STRUCTURE):

    bTimeOut bTimeOut2 bmFormatString bmPINBlockString bmPINLengthFormat     1 byte each
    wPINMaxExtraDigit                                                        2 bytes: least digits << 8 | most digits
    bEntryValidationCondition bNumberMessage                                 1 byte each
    wLangId bMsgIndex bTeoPrologue                                           2, 1 and 3 bytes
    ulDataLength abData                                                      4 bytes; the command, with room for the PIN
"""

import struct

from unsealerd.errors import CardFailed, PinCancelled
from unsealerd.operator.cards.apdu import Answer, Card, control_code
from unsealerd.operator.cards.pin import PinFormat

_GET_FEATURES = control_code(3400)
_VERIFY_PIN_DIRECT = 0x06
_FEATURE = struct.Struct(">BBI")  # tag, length, control code: big endian, whatever the machine is

_STRUCTURE = struct.Struct("=BBBBBHBBHB3sI")  # of the machine's own order, packed
_SECONDS = 60
"""For the whole entry; a host waits two minutes for an answer."""
_BYTES_ASCII_LEFT = 0x82  # bmFormatString: offsets in bytes, left justified, a digit is its ASCII code
_ENTER_KEY = 0x02  # bEntryValidationCondition: the person says when the PIN is complete
_ONE_MESSAGE = 0x01
_ENGLISH = 0x0409
_MOST_DIGITS = 15
"""What readers take where the card sets no lower limit: they have no keys for more, and refuse a larger number."""

_TIMED_OUT = 0x6400
_CANCELLED = 0x6401
_PIN_LENGTH = 0x6403
_NO_PAD_STATUS = (0x6B80, 0x6402)  # the structure is refused; two entries of a new PIN differ


def find(card: Card) -> "VerifyDirect | None":
    """The pin pad of the card's reader, or None if it has none. Raises what the card raises when it is gone."""
    try:
        features = card.control(_GET_FEATURES, b"")
    except CardFailed:  # a reader that does not know the question
        return None
    if len(features) % _FEATURE.size:
        return None
    for tag, size, code in _FEATURE.iter_unpack(features):
        if tag == _VERIFY_PIN_DIRECT and size == 4:
            return VerifyDirect(code)
    return None


class VerifyDirect:
    """FEATURE_VERIFY_PIN_DIRECT. ``code``: the control code that the reader gave for it."""

    __slots__ = ("_code",)

    def __init__(self, code: int) -> None:
        self._code = code

    def verify(self, card: Card, form: PinFormat) -> Answer:
        """The card's answer to VERIFY. Raises `PinCancelled`, `CardFailed`, and what the card raises."""
        raw = card.control(self._code, verify_structure(form))
        if len(raw) != 2:
            raise CardFailed(f"{card.reader}: the PIN pad answers without a status word")
        status = int.from_bytes(raw, "big")
        if status == _TIMED_OUT:
            raise PinCancelled(f"{card.reader}: no PIN was entered at the PIN pad in time")
        if status == _CANCELLED:
            raise PinCancelled(f"{card.reader}: cancelled at the PIN pad")
        if status == _PIN_LENGTH:
            raise PinCancelled(f"{card.reader}: a PIN of this length is not taken; no try was used")
        if status in _NO_PAD_STATUS:
            raise CardFailed(f"{card.reader}: the PIN pad refuses the request ({status:04X})")
        return Answer(b"", status)


def verify_structure(form: PinFormat) -> bytes:
    """PIN_VERIFY_STRUCTURE with a VERIFY in it that has no PIN yet."""
    most = min(form.maximum, _MOST_DIGITS)
    # Padded: the command is as long as it will be, and the reader writes over the padding. Else Lc is 0 and the reader sets it.
    size = form.maximum if form.padded else 0
    command = bytes((0x00, 0x20, 0x00, form.reference, size)) + b"\xff" * size
    head = _STRUCTURE.pack(
        _SECONDS,
        _SECONDS,
        _BYTES_ASCII_LEFT,
        size,  # bmPINBlockString: the size of the block; no length of the PIN is written into it
        0,  # bmPINLengthFormat
        form.minimum << 8 | most,
        _ENTER_KEY,
        _ONE_MESSAGE,
        _ENGLISH,
        0,
        bytes(3),
        len(command),
    )
    return head + command
