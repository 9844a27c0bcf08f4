"""Cards in readers, through the PC/SC service. The only importer of pyscard.

A card is used in one exclusive connection, from the first command to the last, and reset at its end: in a shared one
another program can use a PIN that was verified here, because the verified PIN belongs to the card and not to who sent it.
If this process dies, the service ends the connection and resets the card too.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar

from unsealerd.errors import (
    AccessDenied,
    CardBusy,
    CardFailed,
    CardMissing,
    CardRemoved,
    CardReset,
    NotInstalled,
    ReaderMissing,
    UnsealerdError,
)
from unsealerd.operator.cards.apdu import Card
from unsealerd.operator.cards.names import printable

_T = TypeVar("_T")

# pcsc-lite's pcsclite.h. The library gives them with or without their sign.
_SUCCESS = 0
_NO_READERS = 0x8010002E
_BUSY = 0x8010000B  # SCARD_E_SHARING_VIOLATION
_BUSY_SECONDS = 1.0
_BUSY_PAUSE = 0.05  # seconds
_LOST = (
    0x80100013,  # SCARD_F_COMM_ERROR
    0x80100016,  # SCARD_E_NOT_TRANSACTED
    0x80100015,  # SCARD_E_INVALID_VALUE, as a driver without its device may answer
    0x80100001,  # SCARD_F_INTERNAL_ERROR
)
"""The exchange failed, and the card, the reader or the service may be the cause."""
_MEANING: dict[int, tuple[type[UnsealerdError], str]] = {
    0x8010001D: (ReaderMissing, "the PC/SC service does not run"),
    0x8010001E: (ReaderMissing, "the PC/SC service ended"),
    0x80100003: (ReaderMissing, "the PC/SC service ended"),  # SCARD_E_INVALID_HANDLE: another instance of it
    _NO_READERS: (ReaderMissing, "there is no card reader"),
    0x80100009: (ReaderMissing, "the card reader is not there any more"),  # SCARD_E_UNKNOWN_READER
    0x80100017: (ReaderMissing, "the card reader is not there any more"),  # SCARD_E_READER_UNAVAILABLE
    0x8010000C: (CardMissing, "there is no card in the reader"),
    0x80100069: (CardRemoved, "the card was pulled out"),
    _BUSY: (CardBusy, "another program uses the card"),
    0x80100068: (CardReset, "another program reset the card"),
    0x80100066: (CardFailed, "the card does not answer"),  # SCARD_W_UNRESPONSIVE_CARD
    0x80100067: (CardFailed, "the card has no power"),
    0x8010000F: (CardFailed, "the card speaks neither T=0 nor T=1"),
    0x8010006A: (AccessDenied, "the PC/SC service does not let this user use cards (polkit)"),
}
_NO_CARD = 0x8010000C  # SCARD_E_NO_SMARTCARD
_REMOVAL_SECONDS = 2.0
"""How long a service may take to notice that a card is gone; pcscd looks every 0.4 s."""


def readers_with_cards() -> tuple[str, ...]:
    """The names of the readers with a card. Raises `CardMissing` if there is none, `ReaderMissing` if there is
    no reader, `AccessDenied`, `NotInstalled`.
    """
    with _context() as (scard, context):
        names = _list(scard, context)
        code, states = scard.SCardGetStatusChange(
            context, 0, [(name, scard.SCARD_STATE_UNAWARE) for name in names]
        )
        _check(code)
    found = tuple(name for name, state, _ in states if state & scard.SCARD_STATE_PRESENT)
    if not found:
        raise CardMissing("there is no card in any reader")
    return found


def use(reader: str, work: Callable[[Card], _T]) -> _T:
    """Do ``work`` with the card in one exclusive connection, and reset the card, so that a verified PIN dies.

    If the card is reset in the middle, all of ``work`` is done once more from its beginning: nothing that the card was
    told still holds. Raises `CardBusy`, `CardMissing`, `CardRemoved`, `CardReset`, `CardFailed`, `ReaderMissing`,
    `AccessDenied`, `NotInstalled`, and what ``work`` raises.
    """
    with _context() as (scard, context):
        connection = _Connection(scard, context, reader)
        try:
            try:
                return work(connection)
            except CardReset:
                connection.reconnect()
                return work(connection)
        finally:
            connection.close()


class _Connection:
    """The exclusive connection with the card in one reader."""

    __slots__ = ("_context", "_handle", "_protocol", "_reader", "_scard")

    def __init__(self, scard: ModuleType, context: int, reader: str) -> None:
        self._scard = scard
        self._context = context
        self._reader = reader
        protocols = scard.SCARD_PROTOCOL_T0 | scard.SCARD_PROTOCOL_T1
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            code, self._handle, self._protocol = scard.SCardConnect(
                context, reader, scard.SCARD_SHARE_EXCLUSIVE, protocols
            )
            if code & 0xFFFFFFFF != _BUSY or time.monotonic() > deadline:
                break
            time.sleep(_BUSY_PAUSE)  # whoever looks at a card that was just reset is soon through
        _check(code, reader)

    @property
    def reader(self) -> str:
        return self._reader

    @property
    def is_t0(self) -> bool:
        return bool(self._protocol == self._scard.SCARD_PROTOCOL_T0)

    def transmit(self, apdu: bytes | memoryview) -> bytes:
        header = self._scard.SCARD_PCI_T0 if self.is_t0 else self._scard.SCARD_PCI_T1
        command = list(apdu)
        try:
            code, answer = self._scard.SCardTransmit(self._handle, header, command)
        finally:
            command[:] = bytes(len(command))  # it may hold a PIN
        self._require(code)
        if not answer:  # what some drivers give when the card is gone
            raise self._lost()
        return bytes(answer)

    def control(self, code: int, data: bytes | memoryview) -> bytes:
        result, answer = self._scard.SCardControl(self._handle, code, list(data))
        self._require(result)
        return bytes(answer)

    def reconnect(self) -> None:
        """Raises `CardReset`, `CardRemoved` and the like."""
        scard = self._scard
        code, self._protocol = scard.SCardReconnect(
            self._handle,
            scard.SCARD_SHARE_EXCLUSIVE,
            scard.SCARD_PROTOCOL_T0 | scard.SCARD_PROTOCOL_T1,
            scard.SCARD_RESET_CARD,
        )
        self._require(code)

    def close(self) -> None:
        """The result does not matter: a card that is gone has forgotten the PIN."""
        self._scard.SCardDisconnect(self._handle, self._scard.SCARD_RESET_CARD)

    def _require(self, code: int) -> None:
        if code & 0xFFFFFFFF in _LOST:
            raise self._lost()
        if code & 0xFFFFFFFF == _NO_CARD:  # there was one when the connection was made
            raise CardRemoved(f"{printable(self._reader)}: the card was pulled out")
        _check(code, self._reader)

    def _lost(self) -> UnsealerdError:
        """What became of the card, when the driver only says that the exchange failed."""
        scard, state = self._scard, self._scard.SCARD_STATE_PRESENT
        deadline = time.monotonic() + _REMOVAL_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            code, states = scard.SCardGetStatusChange(
                self._context, int(left * 1000) + 1, [(self._reader, state)]
            )
            code &= 0xFFFFFFFF
            if code in _MEANING:
                return _error(code, self._reader)
            if code != _SUCCESS:
                break
            state = states[0][1]
            if state & (scard.SCARD_STATE_UNKNOWN | scard.SCARD_STATE_UNAVAILABLE):
                return ReaderMissing(f"{printable(self._reader)}: the card reader is not there any more")
            if state & scard.SCARD_STATE_EMPTY:
                return CardRemoved(f"{printable(self._reader)}: the card was pulled out")
            state &= ~scard.SCARD_STATE_CHANGED
        return CardFailed(f"{printable(self._reader)}: the card does not answer")


@contextmanager
def _context() -> Iterator[tuple[ModuleType, int]]:
    try:
        from smartcard import scard
    except ImportError as err:
        raise NotInstalled("pyscard, which speaks with cards: pip install 'unsealerd[piv]'") from err
    code, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
    _check(code)
    try:
        yield scard, context
    finally:
        scard.SCardReleaseContext(context)


def _list(scard: ModuleType, context: int) -> tuple[str, ...]:
    code, names = scard.SCardListReaders(context, [])
    _check(code)
    if not names:
        raise _error(_NO_READERS)
    return tuple(names)


def _check(code: int, reader: str = "") -> None:
    if code != _SUCCESS:
        raise _error(code & 0xFFFFFFFF, reader)


def _error(code: int, reader: str = "") -> UnsealerdError:
    kind, text = _MEANING.get(code, (CardFailed, f"the PC/SC service answers {code:08X}"))
    return kind(f"{printable(reader)}: {text}" if reader else text)
