"""The OpenPGP application of a smart card: Functional Specification of the OpenPGP application, version 3.4.1.

SELECT          00 A4 04 00   D2 76 00 01 24 01
GET DATA        00 CA 00 6E   application related data:
                    6E { 4F AID, 73 { C0 capabilities, C2 algorithm of the decryption key, C4 PW status, D7 touch } }
public key      00 47 81 00   B8 00               ->  7F49 { 86 04 | x | y }
VERIFY          00 20 00 82   PW1, for all but signatures
DECIPHER        00 2A 80 86   A6 { 7F49 { 86 04 | x | y } }   ->  x, or 04 | x | y
"""

from dataclasses import dataclass

from unsealerd.core.blinding import validate_point
from unsealerd.errors import BadPoint, CardFailed, TouchMissed, WrongCard
from unsealerd.model import Curve
from unsealerd.operator.cards.apdu import OK, Card, Command, data_object, parse_objects, require_ok, send
from unsealerd.operator.cards.pin import PinFormat

PIN = PinFormat(0x82, 6, 127, padded=False)
"""PW1 for everything but signatures. Section 4.3.1: six bytes at least."""
_AID = bytes.fromhex("D27600012401")
_ECDH_P256 = bytes.fromhex("122A8648CE3D030107")
"""Section 4.4.3.9: the algorithm ECDH, then the OID of the curve; a byte for the import format may follow."""
_IMPORT_FORMATS = (b"", b"\xff")
_HAS_KDF = 0x01  # of the first byte of the extended capabilities, section 4.4.3.7
_SECURITY_NOT_SATISFIED = 0x6982
_CONDITIONS_NOT_SATISFIED = 0x6985
_TOUCH_TIMED_OUT = 0x6600  # as GnuPG knows it of OpenPGP cards with a button
_NOT_FOUND = (0x6A88, 0x6A80, 0x6A82)


@dataclass(frozen=True, slots=True)
class Applet:
    """What the card says of itself without a PIN."""

    manufacturer: int
    serial: str
    """8 hexadecimal digits; most vendors let them be read as a decimal number."""
    algorithm: bytes
    """Attributes of the decryption key."""
    tries_left: int | None
    """Of PW1."""
    touch: bool | None
    """The decryption key wants a touch; None if the card has no such word."""
    derives_pins: bool
    """The card takes the result of a key derivation in place of the PIN, section 4.3.2."""


def select(card: Card) -> Applet | None:
    """Select the application, and read what it says; None if the card has none. Raises `CardFailed`."""
    if send(card, Command(0x00, 0xA4, 0x04, 0x00, _AID, answers=True)).status != OK:
        return None
    data = require_ok(send(card, Command(0x00, 0xCA, 0x00, 0x6E, answers=True)), "application related data")
    objects = parse_objects(data)
    if 0x6E in objects:  # some cards leave the tag out
        objects = parse_objects(objects[0x6E])
    discretionary = parse_objects(objects.get(0x73, b""))
    facts = objects | discretionary  # version 3.4 puts D6 to D9 beside 73 or into it
    aid, algorithm, status = facts.get(0x4F, b""), facts.get(0xC2, b""), facts.get(0xC4, b"")
    if len(aid) != 16 or not aid.startswith(_AID):
        raise CardFailed("an OpenPGP card without an application identifier")
    touch, capabilities = facts.get(0xD7, b""), facts.get(0xC0) or b"\0"
    return Applet(
        manufacturer=int.from_bytes(aid[8:10], "big"),
        serial=aid[10:14].hex().upper(),
        algorithm=algorithm,
        tries_left=status[4] if len(status) == 7 else None,
        touch=touch[0] != 0 if touch else None,
        derives_pins=capabilities[0] & _HAS_KDF != 0 and _derives_pins(card),
    )


def read_tries(card: Card) -> int | None:
    """How many tries PW1 has left: PW status bytes, section 4.4.2; None if the card does not say."""
    answer = send(card, Command(0x00, 0xCA, 0x00, 0xC4, answers=True))
    return answer.data[4] if answer.status == OK and len(answer.data) == 7 else None


def _derives_pins(card: Card) -> bool:
    """KDF-DO, F9: 81 01 00 or nothing is the plain PIN."""
    answer = send(card, Command(0x00, 0xCA, 0x00, 0xF9, answers=True))
    if answer.status != OK or not answer.data:
        return False
    objects = parse_objects(answer.data)
    if 0xF9 in objects:
        objects = parse_objects(objects[0xF9])
    return objects.get(0x81, b"\0") != b"\0"


def read_public(card: Card, applet: Applet) -> bytes:
    """The decryption key, 65 bytes, a point of P-256. Raises `WrongCard` if there is none, or one of another kind."""
    if (
        not applet.algorithm.startswith(_ECDH_P256)
        or applet.algorithm[len(_ECDH_P256) :] not in _IMPORT_FORMATS
    ):
        raise WrongCard("the card's decryption key is not on P-256")
    answer = send(card, Command(0x00, 0x47, 0x81, 0x00, b"\xb8\x00", answers=True))
    if answer.status in _NOT_FOUND:
        raise WrongCard("the card has no decryption key")
    objects = parse_objects(require_ok(answer, "the public key"))
    point = parse_objects(objects.get(0x7F49, b"")).get(0x86, b"")
    try:
        validate_point(Curve.P256, point)
    except BadPoint as err:
        raise CardFailed("the card's public key is not a point of P-256") from err
    return point


def decipher(card: Card, point: bytes, *, may_want_touch: bool) -> bytes:
    """What the decryption key makes of ``point``. Raises `TouchMissed`, `CardFailed`."""
    data = data_object(0xA6, data_object(0x7F49, data_object(0x86, point)))
    answer = send(card, Command(0x00, 0x2A, 0x80, 0x86, data, answers=True))
    # VERIFY has just succeeded, so 6982 does not mean the PIN.
    refused = answer.status in (_SECURITY_NOT_SATISFIED, _CONDITIONS_NOT_SATISFIED)
    if answer.status == _TOUCH_TIMED_OUT or (refused and may_want_touch):
        raise TouchMissed("the card waited for a touch")
    return require_ok(answer, "the key agreement")
