"""A key in a PIV card, such as a YubiKey: key agreement in a slot, 9D by default."""

import re
from dataclasses import dataclass
from functools import partial

from unsealerd.core.age import P256TagRecipient
from unsealerd.core.blinding import validate_point
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import (
    AttestationInvalid,
    BadRequest,
    WrongCard,
)
from unsealerd.model import Curve
from unsealerd.operator.cards import attestation, pcsc, pin, pinpad, pivapplet
from unsealerd.operator.cards.apdu import Card
from unsealerd.operator.cards.attestation import Attestation
from unsealerd.operator.cards.names import printable
from unsealerd.operator.cards.pin import Asking
from unsealerd.operator.cards.pivapplet import ATTESTATION, KEY_MANAGEMENT, PIN, SlotKey
from unsealerd.operator.cards.policies import PinPolicy, Policies, TouchPolicy
from unsealerd.operator.cards.search import search
from unsealerd.operator.events import OnEvent, TouchNeeded
from unsealerd.operator.identities.coordinate import compressed, x_of
from unsealerd.operator.prompts import Prompts


@dataclass(frozen=True, slots=True)
class _Device:
    """A card with the PIV application."""

    reader: str
    version: tuple[int, ...] | None
    """Of a YubiKey."""
    serial: str | None

    def named(self, slot: int) -> str:
        """For people."""
        kind = "PIV card" if self.version is None else f"YubiKey {self.version[0]}"
        which = self.serial or f"in {printable(self.reader)}"
        return f"{kind} {which}, PIV slot {slot:02X}"


def which(text: str) -> tuple[str | None, int]:
    """The serial number, if any, and the slot of ``SERIAL``, ``SERIAL/SLOT`` or ``/SLOT``. Raises `BadRequest`."""
    serial, separator, slot = text.partition("/")
    if not separator:
        return serial or None, KEY_MANAGEMENT
    if not re.fullmatch(r"[0-9A-Fa-f]{2}", slot):
        raise BadRequest(f"{slot!r} is not a slot of a PIV card: 9D, or 82 to 95")
    return serial or None, int(slot, 16)


def find(
    serial: str | None,
    slot: int = KEY_MANAGEMENT,
    *,
    prompts: Prompts,
    on_event: OnEvent,
    last_try: bool = False,
) -> list["PivIdentity"]:
    """The keys on P-256 in this slot of the cards that are plugged in, or of the one with this serial number.

    ``serial``: a YubiKey's in decimal, or the GUID of a card's CHUID in hex. ``last_try``: the PIN's last try may be used.
    Asks for no PIN. Raises `ReaderMissing`, `CardMissing`, `WrongCard` if no card has such a key, and what kept the only
    one from being found: `CardBusy`, `CardFailed`, `CardRemoved`, `CardReset`; `AccessDenied`, `NotInstalled`, `BadRequest`.
    """
    if not pivapplet.is_key_slot(slot):
        raise BadRequest(f"a PIV card has no slot {slot:02X} for keys")
    look = partial(_look, slot=slot, serial=None if serial is None else _plain(serial))
    which = "" if serial is None else f" {serial}"
    return [
        PivIdentity(device, key, slot, prompts=prompts, on_event=on_event, last_try=last_try)
        for _, (device, key) in search(look, f"no PIV card{which} is plugged in")
    ]


def _look(card: Card, *, slot: int, serial: str | None) -> tuple[_Device, SlotKey] | None:
    if not pivapplet.select(card):
        return None
    device = _Device(card.reader, pivapplet.read_version(card), pivapplet.read_serial(card))
    if serial is not None and serial != _plain(device.serial or ""):
        return None
    return device, pivapplet.read_key(card, slot)


def _plain(serial: str) -> str:
    """As it is compared: a GUID may be written with dashes."""
    return serial.replace("-", "").strip().lower()


class PivIdentity:
    """One key. It knows where the card is and what it said, and keeps no PIN."""

    __slots__ = ("_device", "_key", "_last_try", "_on_event", "_prompts", "_slot", "device", "recipient")

    def __init__(
        self,
        device: _Device,
        key: SlotKey,
        slot: int,
        *,
        prompts: Prompts,
        on_event: OnEvent,
        last_try: bool,
    ) -> None:
        self.device = device.named(slot)
        """For people."""
        self.recipient = P256TagRecipient(compressed(key.public))
        self._device = device
        self._key = key
        self._slot = slot
        self._prompts = prompts
        self._on_event = on_event
        self._last_try = last_try

    def policies(self) -> Policies | None:
        """When the card wants the PIN and a touch; None if it does not say."""
        return self._key.policies

    def exchange(self, point: bytes) -> SecretBuffer:
        """x(d·point), 32 bytes. May ask for the PIN and wait for a touch.

        Raises `BadPoint` before the card is touched; then the errors of a PIN (`pin.verify`), `TouchMissed`, `WrongCard`
        if it is not the same key any more, and what `pcsc.use` raises.
        """
        validate_point(Curve.P256, point)
        return pcsc.use(self._device.reader, partial(self._agree, point=point))

    def attest(self, ca: bytes | None) -> Attestation:
        """Have the card prove that the key was made inside of it. ``ca``: the vendor's certificates in PEM, if at hand.

        Raises `AttestationInvalid`, also for a card that cannot do it or a key that was put in from outside;
        `IdentityInvalid` for a bundle that cannot be read, `WrongCard`, and what `pcsc.use` raises.
        """
        statement, device = pcsc.use(self._device.reader, self._read_attestation)
        if statement is None or device is None:
            raise AttestationInvalid(f"{self.device}: the card does not attest this key")
        found = attestation.verify(statement, device, self._key.public, ca)
        if None not in (found.serial, self._device.version) and found.serial != self._device.serial:
            raise AttestationInvalid("the statement is another device's")
        return found

    def _agree(self, card: Card, *, point: bytes) -> SecretBuffer:
        self._require_same(card)
        pin_policy, touch_policy = self._key.policies or (PinPolicy.DEFAULT, TouchPolicy.DEFAULT)
        if pin_policy is not PinPolicy.NEVER:
            asking = Asking(self.device, self._prompts, self._on_event, self._last_try, pinpad.find)
            pin.verify(card, PIN, pin.read_tries(card, PIN), asking)
        if touch_policy in (TouchPolicy.ALWAYS, TouchPolicy.CACHED):
            self._on_event(TouchNeeded(self.device))
        may_want_touch = touch_policy is not TouchPolicy.NEVER
        answer = pivapplet.agree(card, self._slot, point, may_want_touch=may_want_touch)
        return x_of(answer, self.device)

    def _read_attestation(self, card: Card) -> tuple[bytes | None, bytes | None]:
        self._require_same(card)
        return pivapplet.read_attestation(card, self._slot), pivapplet.read_certificate(card, ATTESTATION)

    def _require_same(self, card: Card) -> None:
        """Select the application, and see that the key is the one that was found."""
        if not pivapplet.select(card):
            raise WrongCard(f"{printable(self._device.reader)}: not a PIV card any more")
        if pivapplet.read_key(card, self._slot).public != self._key.public:
            raise WrongCard(f"{self.device}: another key than before")
