"""The decryption key of an OpenPGP card, version 3: a Nitrokey, a Gnuk token, the other side of a YubiKey."""

from functools import partial

from unsealerd.core.age import P256TagRecipient
from unsealerd.core.blinding import validate_point
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import (
    CardFailed,
    PinBlocked,
    PinWrong,
    TouchMissed,
    WrongCard,
)
from unsealerd.model import Curve
from unsealerd.operator.cards import openpgpapplet, pcsc, pin, pinpad
from unsealerd.operator.cards.apdu import Card
from unsealerd.operator.cards.names import printable
from unsealerd.operator.cards.openpgpapplet import PIN, Applet
from unsealerd.operator.cards.pin import Asking
from unsealerd.operator.cards.search import search
from unsealerd.operator.events import OnEvent, TouchNeeded
from unsealerd.operator.identities.coordinate import compressed, x_of
from unsealerd.operator.prompts import Prompts

_YUBICO = 0x0006


def find(
    serial: str | None, *, prompts: Prompts, on_event: OnEvent, last_try: bool = False
) -> list["OpenPgpIdentity"]:
    """The decryption keys on P-256 of the OpenPGP cards that are plugged in, or of the one with this serial number.

    ``serial``: as gpg shows it, with or without the manufacturer: ``12345678``, ``0006:12345678``. Asks for no PIN. Raises
    `ReaderMissing`, `CardMissing`, `WrongCard` if no card has such a key, and what kept the only one from being found:
    `CardBusy`, `CardFailed`, `CardRemoved`, `CardReset`; `AccessDenied`, `NotInstalled`.
    """
    which = "" if serial is None else f" {printable(serial)}"
    return [
        OpenPgpIdentity(reader, *seen, prompts=prompts, on_event=on_event, last_try=last_try)
        for reader, seen in search(partial(_look, serial=serial), f"no OpenPGP card{which} is plugged in")
    ]


def _look(card: Card, *, serial: str | None) -> tuple[Applet, bytes] | None:
    applet = openpgpapplet.select(card)
    if applet is None or (serial is not None and not _is_called(applet, serial)):
        return None
    return applet, openpgpapplet.read_public(card, applet)


def _is_called(applet: Applet, serial: str) -> bool:
    whole = f"{applet.manufacturer:04X}:{applet.serial}"
    return serial.strip().upper() in (applet.serial, whole)


def _name_of(applet: Applet) -> str:
    kind = "YubiKey" if applet.manufacturer == _YUBICO else "OpenPGP card"
    return f"{kind} {applet.manufacturer:04X}:{applet.serial}, OpenPGP decryption key"


class OpenPgpIdentity:
    """One key. It knows where the card is and what it said, and keeps no PIN."""

    __slots__ = ("_last_try", "_on_event", "_prompts", "_public", "_reader", "device", "recipient", "touch")

    def __init__(
        self,
        reader: str,
        applet: Applet,
        public: bytes,
        *,
        prompts: Prompts,
        on_event: OnEvent,
        last_try: bool,
    ) -> None:
        self.device = _name_of(applet)
        """For people."""
        self.recipient = P256TagRecipient(compressed(public))
        self.touch = applet.touch
        """The key wants a touch; None if the card does not say."""
        self._reader = reader
        self._public = public
        self._prompts = prompts
        self._on_event = on_event
        self._last_try = last_try

    def exchange(self, point: bytes) -> SecretBuffer:
        """x(d·point), 32 bytes. Asks for the PIN, and may wait for a touch.

        Raises `BadPoint` before the card is touched; then the errors of a PIN (`pin.verify`), `TouchMissed`, `WrongCard`
        if it is not the same key any more, and what `pcsc.use` raises.
        """
        validate_point(Curve.P256, point)
        return pcsc.use(self._reader, partial(self._agree, point=point))

    def _agree(self, card: Card, *, point: bytes) -> SecretBuffer:
        applet = openpgpapplet.select(card)
        if applet is None:
            raise WrongCard(f"{printable(self._reader)}: not an OpenPGP card any more")
        if openpgpapplet.read_public(card, applet) != self._public:
            raise WrongCard(f"{self.device}: another key than before")
        if applet.derives_pins:
            # The PIN itself would be a wrong one, and cost a try.
            raise CardFailed(
                f"{self.device}: the card wants derived PINs (kdf-setup), which are not supported"
            )
        self._verify(card, applet)
        if applet.touch:
            self._on_event(TouchNeeded(self.device))
        try:
            answer = openpgpapplet.decipher(card, point, may_want_touch=applet.touch is not False)
        except TouchMissed as err:
            raise TouchMissed(f"{self.device}: {err.detail}") from err
        return x_of(answer, self.device)

    def _verify(self, card: Card, applet: Applet) -> None:
        asking = Asking(self.device, self._prompts, self._on_event, self._last_try, pinpad.find)
        try:
            pin.verify(card, PIN, applet.tries_left, asking)
        except PinWrong as err:
            # These cards say 6982 to a wrong PIN, without a number; the counter is in another place.
            if err.tries_left is not None:
                raise
            left = openpgpapplet.read_tries(card)
            if left == 0:
                raise PinBlocked(f"{self.device}: wrong PIN, and now it is blocked") from err
            if left is None:
                raise
            tries = "one try is" if left == 1 else f"{left} tries are"
            raise PinWrong(f"{err.detail}, {tries} left", left) from err
