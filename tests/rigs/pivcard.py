"""A PIV card in software, for the virtual reader of `rigs.pcscd`: NIST SP 800-73-4, and Yubico's extensions on demand.

Written apart from the package's own code: it has its own TLV, and it is judged by OpenSC's and Yubico's tools.

As a program, ``python -m rigs.pivcard [--serial N] [--pin PIN]`` runs pcscd with such a card until its standard input
ends. It prints one line: ``PCSCLITE_CSOCK_NAME RECIPIENT``.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from rigs.vendor import PrivateKey, certificate, der
from rigs.vendor import Vendor as Vendor

PIN = b"123456"
TRIES = 3
SERIAL = 12345678
VERSION = (5, 4, 3)
GUID = bytes(range(0xA0, 0xB0))
AID = bytes.fromhex("A000000308000010000100")
OBJECTS = {0x9A: "5FC105", 0x9C: "5FC10A", 0x9D: "5FC10B", 0x9E: "5FC101", 0xF9: "5FFF01"}
ATR_YUBIKEY = bytes.fromhex("3BFD1300008131FE158073C021C057597562694B657940")
ATR_PLAIN = bytes.fromhex("3B80800101")

NEVER, ONCE, ALWAYS = 1, 2, 3
"""PIN policies, and the first a touch policy as well."""
TOUCH_ALWAYS, CACHED = 2, 3


def tlv(tag: str, value: bytes) -> bytes:
    size = len(value)
    head = bytes.fromhex(tag)
    if size < 0x80:
        return head + bytes([size]) + value
    return head + (b"\x81" + bytes([size]) if size < 0x100 else b"\x82" + size.to_bytes(2, "big")) + value


def untlv(data: bytes) -> list[tuple[int, bytes]]:
    """Tags of one byte."""
    found = []
    while data:
        tag, size, head = data[0], data[1], 2
        if size & 0x80:
            head = 2 + (size & 0x7F)
            size = int.from_bytes(data[2:head], "big")
        found.append((tag, data[head : head + size]))
        data = data[head + size :]
    return found


def point_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


@dataclass
class Slot:
    key: PrivateKey
    pin_policy: int = ONCE
    touch_policy: int = NEVER
    generated: bool = True
    """False: imported, which cannot be attested."""
    certificate: bytes | None = None
    """DER."""


@dataclass
class Seen:
    """What reached the card."""

    points: list[bytes] = field(default_factory=list)
    """Every point that a private key was to be applied to, valid or not."""
    commands: list[bytes] = field(default_factory=list)
    """Every command, without what VERIFY carries."""
    resets: int = 0
    pins: int = 0
    """VERIFY commands with a PIN in them."""

    def count(self, ins: int) -> int:
        return sum(command[1] == ins for command in self.commands)


class PivCard:
    """Keys in 9A and 9D. Switches are attributes; they may be changed between two commands, from any thread."""

    def __init__(
        self,
        *,
        yubikey: bool = True,
        serial: int = SERIAL,
        pin: bytes = PIN,
        vendor: Vendor | None = None,
        guid: bytes | None = GUID,
        version: tuple[int, int, int] = VERSION,
        has_metadata: bool = True,
    ) -> None:
        self.yubikey = yubikey
        self.atr = ATR_YUBIKEY if yubikey else ATR_PLAIN
        self.serial = serial
        self.version = version
        self.has_metadata = yubikey and has_metadata
        self.guid = guid
        self.pin = pin
        self.tries = TRIES
        self.slots = {0x9A: self.made(0x9A), 0x9D: self.made(0x9D)}
        self.vendor = vendor or Vendor()
        self.device_key = ec.generate_private_key(ec.SECP256R1())
        self.device_certificate: bytes | None = der(
            certificate(
                "Yubico PIV Attestation",
                self.device_key.public_key(),
                self.vendor.name,
                self.vendor.key,
                ca=True,
            )
        )
        self.seen = Seen()
        # --- switches for faults
        self.touched = True
        """False: nobody touches the card when it waits."""
        self.whole_point = False
        """The answer to a key agreement is 04 | x | y."""
        self.strip_zeros = False
        """The answer has no leading zeros."""
        self.blocks_with_63c0 = False
        """The last wrong PIN is answered 63C0, not 6983."""
        self.delay = 0.0
        """Seconds before each answer."""
        self.before: Callable[[bytes], None] | None = None
        """Called with each command, before it is looked at."""
        self.mangle: Callable[[bytes, bytes], bytes | None] | None = None
        """Called with the header of a command and the answer; what it gives is sent. None: the card pulls itself out."""
        self.compressed: bytes | None = None
        """In place of each certificate, and said to be compressed."""
        self.remove_at: int | None = None
        """INS at which the card pulls itself out."""
        self._lock = threading.Lock()
        self.reset()
        self.forget()

    def forget(self) -> None:
        """What was seen so far."""
        self.seen = Seen()

    @staticmethod
    def made(slot: int, key: PrivateKey | None = None, **options: object) -> Slot:
        """A slot with a key, and a certificate that the key has signed for itself."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        subject = f"PIV slot {slot:02x}"
        made = Slot(key, **options)  # type: ignore[arg-type]
        made.certificate = der(certificate(subject, key.public_key(), subject, key))
        return made

    @property
    def key(self) -> ec.EllipticCurvePrivateKey:
        """Of slot 9D."""
        key = self.slots[0x9D].key
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key

    @property
    def verified(self) -> bool:
        return self._verified

    # --- the reader's side

    def reset(self) -> None:
        with self._lock:
            self._selected = False
            self._verified = False
            self._chain = b""
            self._rest = b""
            self.seen.resets += 1

    def process(self, apdu: bytes) -> bytes | None:
        if self.before is not None:
            self.before(apdu)
        with self._lock:
            self.seen.commands.append(apdu[:4] if apdu[1] == 0x20 else apdu)
            if self.remove_at == apdu[1]:
                return None
            if self.delay:
                threading.Event().wait(self.delay)
            answer = self._answer(apdu)
        return self.mangle(apdu[:4], answer) if self.mangle is not None else answer

    def _answer(self, apdu: bytes) -> bytes:
        if len(apdu) < 4:
            return b"\x67\x00"
        cla, ins, p1, p2 = apdu[:4]
        data = apdu[5 : 5 + apdu[4]] if len(apdu) > 5 else b""
        if cla not in (0x00, 0x10):
            return b"\x6e\x00"
        if ins == 0xC0:
            return self._given(self._rest, apdu[4] if len(apdu) == 5 else 0)
        if cla == 0x10:
            self._chain += data
            return b"\x90\x00"
        data, self._chain = self._chain + data, b""
        answer = self._dispatch(ins, p1, p2, data)
        if answer[-2:] != b"\x90\x00" or len(answer) == 2:
            return answer
        return self._given(answer[:-2], 256)

    def _given(self, data: bytes, size: int) -> bytes:
        size = size or 256
        part, self._rest = data[:size], data[size:]
        if not self._rest:
            return part + b"\x90\x00"
        return part + bytes([0x61, min(len(self._rest), 256) & 0xFF])

    def _dispatch(self, ins: int, p1: int, p2: int, data: bytes) -> bytes:
        if ins == 0xA4:
            return self._select(p1, data)
        if not self._selected:
            return b"\x6d\x00"
        extension = {0xF7: self._metadata, 0xF9: self._attest}.get(ins) if self.yubikey else None
        match ins:
            case 0x20:
                return self._verify(p2, data)
            case 0xCB:
                return self._get_data(data)
            case 0x87:
                return self._authenticate(p1, p2, data)
            case 0xFD if self.yubikey:
                return bytes(self.version) + b"\x90\x00"
            case 0xF8 if self.yubikey:
                return self.serial.to_bytes(4, "big") + b"\x90\x00"
            case _ if extension is not None:
                return extension(p1, p2)
            case _:
                return b"\x6d\x00"

    def _select(self, p1: int, data: bytes) -> bytes:
        if p1 != 0x04 or not AID.startswith(data) or len(data) < 5:
            self._selected = False
            return b"\x6a\x82"
        self._selected = True
        self._verified = False
        body = tlv("4F", AID[5:]) + tlv("79", tlv("4F", AID[:5]))
        return tlv("61", body) + b"\x90\x00"

    # --- the PIN

    def _verify(self, reference: int, data: bytes) -> bytes:
        if reference != 0x80:
            return b"\x6a\x88"
        if not data:
            if self._verified:
                return b"\x90\x00"
            return bytes([0x63, 0xC0 | self.tries]) if self.tries else b"\x69\x83"
        self.seen.pins += 1
        if not self.tries:
            return b"\x69\x83"
        if len(data) != 8:
            return b"\x67\x00"
        if data != self.pin.ljust(8, b"\xff"):
            self.tries -= 1
            self._verified = False
            if self.tries or self.blocks_with_63c0:
                return bytes([0x63, 0xC0 | self.tries])
            return b"\x69\x83"
        self.tries = TRIES
        self._verified = True
        return b"\x90\x00"

    # --- data

    def _get_data(self, data: bytes) -> bytes:
        tags = [value for tag, value in untlv(data) if tag == 0x5C]
        if tags == [b"\x7e"]:
            return bytes.fromhex("7E124F0BA0000003080000100001005F2F024000") + b"\x90\x00"
        found = self._object(tags[0].hex().upper()) if tags else None
        return tlv("53", found) + b"\x90\x00" if found is not None else b"\x6a\x82"

    def _object(self, tag: str) -> bytes | None:
        if tag == "5FC102" and self.guid is not None:
            numbers = bytes.fromhex("D4E739DA739CED39CE739D836858210842108421C84210C3EB")
            return (
                tlv("30", numbers)
                + tlv("34", self.guid)
                + tlv("35", b"20500101")
                + tlv("3E", b"")
                + tlv("FE", b"")
            )
        if tag == "5FC107":
            return bytes.fromhex(
                "F015A000000116FF02" + "01" * 13 + "F10121F20121F300F40100F50110F600F700FA00FB00FC00FD00FE00"
            )
        for slot, each in (OBJECTS | {0x82 + n: f"{0x5FC10D + n:06X}" for n in range(20)}).items():
            if each == tag:
                held = self.slots.get(slot)
                found = (
                    self.device_certificate if slot == 0xF9 and self.yubikey else held and held.certificate
                )
                packed = self.compressed
                flag = b"\0" if packed is None else b"\1"
                return tlv("70", packed or found) + tlv("71", flag) + tlv("FE", b"") if found else None
        return None

    # --- Yubico's extensions

    def _metadata(self, _p1: int, slot: int) -> bytes:
        if not self.has_metadata:
            return b"\x6d\x00"
        held = self.slots.get(slot)
        if held is None:
            return b"\x6a\x88"
        if isinstance(held.key, rsa.RSAPrivateKey):
            numbers = held.key.public_key().public_numbers()
            public = tlv("81", numbers.n.to_bytes(256, "big")) + tlv("82", numbers.e.to_bytes(3, "big"))
        else:
            public = tlv("86", point_of(held.key))
        return (
            tlv("01", bytes([_algorithm(held.key)]))
            + tlv("02", bytes([held.pin_policy, held.touch_policy]))
            + tlv("03", b"\x01" if held.generated else b"\x02")
            + tlv("04", public)
            + b"\x90\x00"
        )

    def _attest(self, slot: int, _p2: int) -> bytes:
        held = self.slots.get(slot)
        if held is None or not held.generated:
            return b"\x6a\x80"
        serial = self.serial.to_bytes(4, "big")
        made = certificate(
            f"YubiKey PIV Attestation {slot:02x}",
            held.key.public_key(),
            "Yubico PIV Attestation",
            self.device_key,
            extensions={
                "1.3.6.1.4.1.41482.3.3": bytes(self.version),
                "1.3.6.1.4.1.41482.3.7": tlv(
                    "02", serial.lstrip(b"\0") if serial[0] < 0x80 else b"\0" + serial
                ),
                "1.3.6.1.4.1.41482.3.8": bytes([held.pin_policy, held.touch_policy]),
            },
        )
        return der(made) + b"\x90\x00"

    # --- private keys

    def _authenticate(self, algorithm: int, slot: int, data: bytes) -> bytes:
        held = self.slots.get(slot)
        try:
            template = dict(untlv(untlv(data)[0][1]))
        except IndexError:
            return b"\x6a\x80"
        if 0x85 in template:
            self.seen.points.append(template[0x85])
        if (
            held is None
            or algorithm != _algorithm(held.key)
            or not isinstance(held.key, ec.EllipticCurvePrivateKey)
        ):
            return b"\x6a\x80"
        if held.pin_policy != NEVER and not self._verified:
            return b"\x69\x82"
        if held.touch_policy in (TOUCH_ALWAYS, CACHED) and not self.touched:
            return b"\x69\x82"
        if held.pin_policy == ALWAYS:
            self._verified = False
        answer = self._agreed(held.key, template[0x85]) if 0x85 in template else _signed(held.key, template)
        return tlv("7C", tlv("82", answer)) + b"\x90\x00" if answer else b"\x6a\x80"

    def _agreed(self, key: ec.EllipticCurvePrivateKey, point: bytes) -> bytes | None:
        try:
            public = ec.EllipticCurvePublicKey.from_encoded_point(key.curve, point)
        except ValueError:
            return None
        x = key.exchange(ec.ECDH(), public)
        if self.whole_point:
            # Either of the two points will do: only x counts.
            lifted = ec.EllipticCurvePublicKey.from_encoded_point(key.curve, b"\x02" + x)
            return lifted.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        return x.lstrip(b"\0") if self.strip_zeros else x


def _signed(key: ec.EllipticCurvePrivateKey, template: dict[int, bytes]) -> bytes | None:
    digest = template.get(0x81, b"")
    return key.sign(digest, ec.ECDSA(utils.Prehashed(SHA256()))) if len(digest) == 32 else None


def _algorithm(key: PrivateKey) -> int:
    if isinstance(key, rsa.RSAPrivateKey):
        return 0x07
    return {"secp256r1": 0x11, "secp384r1": 0x14}[key.curve.name]


def recipient_of(card: PivCard) -> str:
    from unsealerd.core.age import P256Identity

    return str(P256Identity(card.key).recipient)


def main() -> None:
    import argparse
    import sys

    from rigs.pcscd import Pcscd

    parser = argparse.ArgumentParser(description="pcscd with a PIV card, until standard input ends")
    parser.add_argument("--serial", type=int, default=SERIAL)
    parser.add_argument("--pin", default=PIN.decode())
    options = parser.parse_args()
    card = PivCard(serial=options.serial, pin=options.pin.encode())
    with Pcscd() as service:
        service.insert(card)
        print(service.socket, recipient_of(card), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
