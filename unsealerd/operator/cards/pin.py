"""The rules for PINs, for every kind of card: which try may be used, who is asked, what the card's word means.

A PIN is asked for at the moment of use, sent once and wiped. Nothing keeps it, and it travels in no record that can be
printed. If the reader has a pin pad, the PIN is entered there and never enters this computer.

What cannot be wiped: `Prompts` gives ``bytes``, and pyscard wants a list and copies it to the C heap. They die within the
call. Who can read this process's memory then could as well have read the keyboard.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import CardFailed, PinBlocked, PinCancelled, PinLastTry, PinWrong
from unsealerd.operator.cards.apdu import OK, Answer, Card, Command, send
from unsealerd.operator.events import OnEvent, PinPadUsed
from unsealerd.operator.prompts import PinRequest, Prompts

_VERIFY = 0x20
_BLOCKED = 0x6983
_WRONG_WITHOUT_COUNT = (0x6300, 0x6982)


@dataclass(frozen=True, slots=True)
class PinFormat:
    """How a kind of card takes its PIN. PIV: reference 0x80, padded to 8. OpenPGP: 0x82, not padded."""

    reference: int
    """P2 of VERIFY."""
    minimum: int
    """Bytes."""
    maximum: int
    """Bytes."""
    padded: bool
    """Filled up to ``maximum`` with 0xFF."""


class PinPad(Protocol):
    """A reader that asks for the PIN itself."""

    def verify(self, card: Card, form: PinFormat) -> Answer:
        """Have the reader ask and send VERIFY; the card's own answer. Raises `PinCancelled` (cancelled, too late)."""


FindPinPad = Callable[[Card], PinPad | None]
"""Whether the reader of this card has a pin pad."""


@dataclass(frozen=True, slots=True)
class Asking:
    """Who is asked for a PIN, and what for."""

    device: str
    """For people: ``YubiKey 12345678, PIV slot 9D``."""
    prompts: Prompts
    on_event: OnEvent
    last_try: bool
    """The last try may be used."""
    find_pin_pad: FindPinPad


def read_tries(card: Card, form: PinFormat) -> int | None:
    """How many tries are left; None if the card does not say, 0 if it is blocked. An empty VERIFY costs no try."""
    answer = send(card, Command(0x00, _VERIFY, 0x00, form.reference))
    if answer.status == _BLOCKED:
        return 0
    if answer.status & 0xFFF0 == 0x63C0:
        return answer.status & 0x0F
    # 9000: verified before, so the counter is full. Anything else: the card does not know the question.
    return None


def verify(card: Card, form: PinFormat, tries_left: int | None, asking: Asking) -> None:
    """Have the card verify the PIN, which is entered at the reader's pin pad or asked for by `Prompts`.

    ``tries_left``: as `read_tries` says, or another question of the card's own kind. Raises `PinBlocked`, `PinLastTry`
    before anybody is asked; then `PinCancelled`, `PinWrong`, `PinBlocked`, `CardFailed`, and what the card raises.
    """
    if tries_left == 0:
        raise PinBlocked(f"{asking.device}: the PIN is blocked")
    if tries_left == 1 and not asking.last_try:
        raise PinLastTry(f"{asking.device}: one try is left")
    pad = asking.find_pin_pad(card)
    if pad is None:
        answer = _verify_typed(card, form, tries_left, asking)
    else:
        asking.on_event(PinPadUsed(asking.device, tries_left))
        answer = pad.verify(card, form)
    _judge(answer.status, asking.device)


def _verify_typed(card: Card, form: PinFormat, tries_left: int | None, asking: Asking) -> Answer:
    with SecretBuffer.copy_of(asking.prompts.pin(PinRequest(asking.device, tries_left))) as typed:
        # An empty VERIFY would be the question for the tries left.
        if not len(typed):
            raise PinCancelled("no PIN was entered")
        # A PIN that cannot be right is not worth a try, and 0xFF is what the padding is made of.
        if not form.minimum <= len(typed) <= form.maximum or (form.padded and 0xFF in typed.view):
            text = (
                f"a PIN of {asking.device} has {form.minimum} to {form.maximum} characters; no try was used"
            )
            raise PinWrong(text, tries_left)
        size = form.maximum if form.padded else len(typed)
        with SecretBuffer(size) as block:
            block.view[:] = b"\xff" * size
            block.view[: len(typed)] = typed.view
            return send(card, Command(0x00, _VERIFY, 0x00, form.reference, block.view))


def _judge(status: int, device: str) -> None:
    if status == OK:
        return
    if status in (_BLOCKED, 0x63C0):
        raise PinBlocked(f"{device}: the PIN is blocked")
    if status & 0xFFF0 == 0x63C0:
        left = status & 0x0F
        raise PinWrong(f"{device}: wrong PIN, {left} {'try' if left == 1 else 'tries'} left", left)
    if status in _WRONG_WITHOUT_COUNT:
        raise PinWrong(f"{device}: wrong PIN")
    raise CardFailed(f"{device}: the card answers {status:04X} to a PIN")
