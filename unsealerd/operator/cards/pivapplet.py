"""The PIV application of a card: NIST SP 800-73-4 part 2, and Yubico's extensions where the card has them.

SELECT         00 A4 04 00  A0 00 00 03 08
GET DATA       00 CB 3F FF  5C 03 5F C1 0B            53 { 70 certificate, 71 compressed?, FE }
GET METADATA   00 F7 00 9D                            01 algorithm, 02 PIN and touch policy, 04 { 86 point }
key agreement  00 87 11 9D  7C { 82 "", 85 point }    7C { 82 x }, or the whole point
"""

import zlib
from dataclasses import dataclass
from typing import Final

from unsealerd.core.blinding import validate_point
from unsealerd.errors import BadPoint, CardFailed, TouchMissed, WrongCard
from unsealerd.model import Curve
from unsealerd.operator.cards.apdu import (
    OK,
    Card,
    Command,
    data_object,
    parse_objects,
    require_ok,
    send,
)
from unsealerd.operator.cards.attestation import public_point
from unsealerd.operator.cards.pin import PinFormat
from unsealerd.operator.cards.policies import Policies, parse_policies

KEY_MANAGEMENT: Final = 0x9D
ATTESTATION: Final = 0xF9
PIN: Final = PinFormat(reference=0x80, minimum=6, maximum=8, padded=True)  # SP 800-73-4 part 2, 2.4.3

_AID = bytes.fromhex("A000000308")
_CHUID = 0x5FC102
_CERTIFICATES = {0x9A: 0x5FC105, 0x9C: 0x5FC10A, 0x9D: 0x5FC10B, 0x9E: 0x5FC101, ATTESTATION: 0x5FFF01}
_RETIRED = range(0x82, 0x96)
_FIRST_RETIRED = 0x5FC10D
_MAX_CERTIFICATE = 1 << 15
"""Bytes, when it is unpacked."""
_ECC_P256 = 0x11
_DENIED = 0x6982
_NO_KEY = (0x6A80, 0x6A82, 0x6A88)


@dataclass(frozen=True, slots=True)
class SlotKey:
    """What the card says about the key in a slot."""

    public: bytes
    """65 bytes, uncompressed."""
    policies: Policies | None
    """None if the card does not say."""


def is_key_slot(slot: int) -> bool:
    """Whether a slot can hold a key for key agreement or signatures."""
    return slot in _RETIRED or slot in (0x9A, 0x9C, 0x9D, 0x9E)


def select(card: Card) -> bool:
    """Select the application. False if the card has none."""
    return send(card, Command(0x00, 0xA4, 0x04, 0x00, _AID, answers=True)).status == OK


def read_version(card: Card) -> tuple[int, ...] | None:
    """The version of a YubiKey's PIV application; None for any other card."""
    answer = send(card, Command(0x00, 0xFD, 0x00, 0x00, answers=True))
    return tuple(answer.data) if answer.status == OK and len(answer.data) == 3 else None


def read_serial(card: Card) -> str | None:
    """A YubiKey's serial number in decimal, else the GUID of the card's CHUID in hex, else None."""
    answer = send(card, Command(0x00, 0xF8, 0x00, 0x00, answers=True))
    if answer.status == OK and len(answer.data) == 4:
        return str(int.from_bytes(answer.data, "big"))
    holder = _read_object(card, _CHUID)
    if holder is None:
        return None
    guid = parse_objects(holder).get(0x34, b"")
    return guid.hex() if len(guid) == 16 and any(guid) else None


def read_key(card: Card, slot: int) -> SlotKey:
    """The key in a slot. Raises `WrongCard` if there is none, or one that is not on P-256; `CardFailed`."""
    answer = send(card, Command(0x00, 0xF7, 0x00, slot, answers=True))
    if answer.status == OK:
        return _from_metadata(parse_objects(answer.data), slot)
    certificate = read_certificate(card, slot)
    if certificate is None:
        raise WrongCard(f"there is no key in PIV slot {slot:02X}")
    return SlotKey(_public_of(certificate, slot), None)


def _from_metadata(metadata: dict[int, bytes], slot: int) -> SlotKey:
    if metadata.get(0x01) != bytes((_ECC_P256,)):
        raise WrongCard(f"the key in PIV slot {slot:02X} is not on P-256")
    point = parse_objects(metadata.get(0x04, b"")).get(0x86, b"")
    return SlotKey(_valid(point), parse_policies(metadata.get(0x02, b"")))


def read_certificate(card: Card, slot: int) -> bytes | None:
    """The certificate of a slot in DER; None if there is none. Raises `CardFailed`."""
    data = _read_object(card, _certificate_object(slot))
    if data is None:
        return None
    parts = parse_objects(data)
    certificate = parts.get(0x70, b"")
    if not certificate:
        return None
    if parts.get(0x71, b"\0") == b"\x01":  # SP 800-73-4 part 1, appendix A: compressed with gzip
        certificate = _unpacked(certificate)
    return certificate


def read_attestation(card: Card, slot: int) -> bytes | None:
    """The card's statement about the key in a slot, a certificate in DER; None if the card makes none."""
    answer = send(card, Command(0x00, 0xF9, slot, 0x00, answers=True))
    return answer.data if answer.status == OK and answer.data else None


def agree(card: Card, slot: int, point: bytes, *, may_want_touch: bool) -> bytes:
    """What the card gives for x(d·point). ``point``: validated; the PIN was verified, if the key wants one.

    Raises `TouchMissed`, `WrongCard` if the slot is empty now, `CardFailed`.
    """
    template = data_object(0x7C, data_object(0x82, b"") + data_object(0x85, point))
    answer = send(card, Command(0x00, 0x87, _ECC_P256, slot, template, answers=True))
    if answer.status == _DENIED and may_want_touch:
        raise TouchMissed("the card waited for a touch that did not come")
    if answer.status in _NO_KEY:
        raise WrongCard(f"the card has no key on P-256 in PIV slot {slot:02X} ({answer.status:04X})")
    return parse_objects(parse_objects(require_ok(answer, "key agreement")).get(0x7C, b"")).get(0x82, b"")


def _valid(point: bytes) -> bytes:
    try:
        validate_point(Curve.P256, point)
    except BadPoint as err:
        raise CardFailed("the card answers with something else than a point of P-256") from err
    return point


def _public_of(certificate: bytes, slot: int) -> bytes:
    point = public_point(certificate)
    if point is None:
        raise WrongCard(f"the key in PIV slot {slot:02X} is not on P-256")
    return point


def _certificate_object(slot: int) -> int:
    return _FIRST_RETIRED + slot - _RETIRED.start if slot in _RETIRED else _CERTIFICATES[slot]


def _read_object(card: Card, tag: int) -> bytes | None:
    """What is in the container (tag 53); None if the card has it not or does not give it."""
    answer = send(card, Command(0x00, 0xCB, 0x3F, 0xFF, data_object(0x5C, tag.to_bytes(3, "big")), True))
    if answer.status != OK:
        return None
    return parse_objects(answer.data).get(0x53) or None


def _unpacked(data: bytes) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)  # with gzip's header
    try:
        plain = unpacker.decompress(data, _MAX_CERTIFICATE)
    except zlib.error as err:
        raise CardFailed("the card has a certificate that cannot be unpacked") from err
    if not unpacker.eof:
        raise CardFailed("the card has a certificate that is too large")
    return plain
