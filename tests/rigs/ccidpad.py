"""A card reader with a PIN pad on a pseudo-terminal, for the CCID driver that real readers use (libccid's serial one).

What real readers of this family do: T=0 in TPDUs, the host's frames echoed, a card put in and pulled out, and the secure
command in which the reader itself asks for the PIN. Frames: 03 06 | CCID message | exclusive or of all before it.
"""

import contextlib
import os
import select
import struct
import threading
import tty
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from rigs.pcscd import VirtualCard

DRIVER = Path("/usr/lib/pcsc/drivers/serial/libccidtwin.so")
READER = "PIN pad 00 00"
ATR = bytes.fromhex("3B0550494E5041")  # T=0
_HEADER = struct.Struct("<BIBB3s")  # type, length, slot, sequence, three bytes of its own
_ABSENT = 2
_FAILED = 0x40
_MUTE, _CANCELLED, _TIMED_OUT = 0xFE, 0xEF, 0xF0  # CCID specification, table 6.2-2
_LONGEST_ECHO = 100
"""The driver has no room for the echo of the display's texts: what stands for it is empty."""


_NOISE = b"\x15"  # no beginning of a frame


class _Message(IntEnum):
    """CCID specification, table 6.1-1, and what is answered, 6.2-1."""

    PARAMETERS = 0x61
    POWER_ON = 0x62
    POWER_OFF = 0x63
    STATUS = 0x65
    SECURE = 0x69
    ESCAPE = 0x6B
    TRANSFER = 0x6F
    DATA_BLOCK = 0x80
    SLOT_STATUS = 0x81
    PARAMETERS_ARE = 0x82
    ESCAPE_ANSWER = 0x83


class Key(Enum):
    """What else a person may do at the pad."""

    CANCEL = "cancel"
    NOTHING = "nothing"
    """Until the reader's time is up."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One secure command, as it came from the host."""

    structure: bytes
    """PC_to_RDR_Secure's data: operation, formats, limits."""
    command: bytes
    """The command with room for a PIN."""


@dataclass
class CcidPad:
    """`insert` and `remove` from any thread. ``typed``: what is entered next, one after the other."""

    typed: list[bytes | Key] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    frames: list[bytes] = field(default_factory=list)
    """Every CCID message, of the host and to it, whole."""
    waiting: Callable[[], None] | None = None
    """Called while the pad waits for a person, before what was typed counts."""

    def __post_init__(self) -> None:
        self._master, slave = os.openpty()
        tty.setraw(slave)
        self.device = os.ttyname(slave)
        self._slave = slave  # open, so that the master sees no end before the driver comes
        self._woken, self._wake = os.pipe()
        self._unplugged = False
        self._card: _T0 | None = None
        self._polls = 0
        """Since the card was pulled out."""
        self._seen_empty = threading.Event()
        self._seen_empty.set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="reader", daemon=True)

    @property
    def reader_conf(self) -> str:
        return (
            f'FRIENDLYNAME "PIN pad"\nDEVICENAME {self.device}:GemPCPinPad\nLIBPATH {DRIVER}\nCHANNELID 1\n'
        )

    def forget(self) -> None:
        """As if nothing had happened here yet."""
        self.typed, self.asked, self.frames, self.waiting = [], [], [], None

    def insert(self, card: VirtualCard) -> None:
        """In place of another card at once; into an empty slot when the host has seen that it is empty.

        pcscd takes a card out of its list when a command fails, and never finds the next one if its poll sees no gap.
        """
        assert self._seen_empty.wait(60)
        card.reset()
        with self._lock:
            self._card = _T0(card)
            self._polls = 0

    def remove(self) -> None:
        with self._lock:
            self._card = None
            self._seen_empty.clear()

    def unplug(self) -> None:
        """The reader itself. On the line there is noise from now on."""
        self._unplugged = True

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The driver is gone, or else it would take the end of the line for an answer without end.
        os.write(self._wake, b"x")
        self._thread.join(60)
        for each in (self._master, self._slave, self._wake, self._woken):
            os.close(each)

    # --- frames

    def _serve(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                head = self._read(2 + _HEADER.size)
                kind, size, slot, sequence, own = _HEADER.unpack(head[2:])
                data = self._read(size)
                frame = head + data + self._read(1)
                self.frames.append(frame[2:-1])
                try:
                    answer = self._answer(kind, slot, sequence, data)
                except (AssertionError, IndexError):
                    os.write(self._master, _NOISE)  # the host would wait for minutes
                    raise
                self.frames.append(answer)
                if self._unplugged:
                    os.write(self._master, _NOISE)
                    continue
                echo = frame if size < _LONGEST_ECHO else _framed(_HEADER.pack(kind, 0, slot, sequence, own))
                os.write(self._master, echo)
                os.write(self._master, _framed(answer))

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            if self._woken in select.select([self._master, self._woken], [], [])[0]:
                raise EOFError
            more = os.read(self._master, size - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def _answer(self, kind: int, slot: int, sequence: int, data: bytes) -> bytes:
        with self._lock:
            card = self._card

        def message(reply: int, content: bytes = b"", *, error: int = 0, last: int = 0) -> bytes:
            status = (0 if card is not None and self._card is card else _ABSENT) | (_FAILED if error else 0)
            return _HEADER.pack(reply, len(content), slot, sequence, bytes((status, error, last))) + content

        match kind:
            case _Message.POWER_ON:
                if card is None:
                    return message(_Message.DATA_BLOCK, error=_MUTE)
                card.reset()
                return message(_Message.DATA_BLOCK, ATR)
            case _Message.POWER_OFF:
                if card is not None:
                    card.reset()
                return message(_Message.SLOT_STATUS)
            case _Message.STATUS:
                if card is None:
                    self._polls += 1
                    if self._polls > 1:  # the first may be of somebody else than the poll
                        self._seen_empty.set()
                return message(_Message.SLOT_STATUS)
            case _Message.PARAMETERS:
                return message(_Message.PARAMETERS_ARE, data)
            case _Message.ESCAPE:
                return message(_Message.ESCAPE_ANSWER, b"PINPAD-1.00" if data == b"\x02" else b"\0")
            case _Message.TRANSFER | _Message.SECURE:
                answer = self._of_card(card, kind, data)
                if isinstance(answer, int):
                    return message(_Message.DATA_BLOCK, error=answer)
                return message(_Message.DATA_BLOCK, answer)
            case _:
                raise AssertionError(f"a CCID message that no driver sends: {kind:02X}")

    def _of_card(self, card: "_T0 | None", kind: int, data: bytes) -> bytes | int:
        if card is None:
            return _MUTE
        answer = card.process(data) if kind == _Message.TRANSFER else self._secure(card, data)
        if answer is None:  # it pulled itself out
            self.remove()
            return _MUTE
        return answer

    def _secure(self, card: "_T0", data: bytes) -> bytes | int | None:
        """PC_to_RDR_Secure, section 6.1.11: the PIN is written into the command here, and nowhere else."""
        structure, command = data[:15], data[15:]
        self.asked.append(Asked(structure, command))
        assert structure[0] == 0, "not a verification"
        if self.waiting is not None:
            self.waiting()
        if self._card is not card or self._unplugged:
            return _MUTE
        typed = self.typed.pop(0)
        match typed:
            case Key.CANCEL:
                return _CANCELLED
            case Key.NOTHING:
                return _TIMED_OUT
        most, least = structure[5], structure[6]
        assert least <= len(typed) <= most, "the pad itself takes no such PIN"
        block = structure[3] & 0x0F
        room = command[5:]
        assert set(room) <= {0xFF}, "there is something where the PIN belongs"
        pin = typed + room[len(typed) :] if block else typed
        return card.process(command[:4] + bytes((len(pin),)) + pin)


def _framed(message: bytes) -> bytes:
    total = 0x03 ^ 0x06
    for byte in message:
        total ^= byte
    return b"\x03\x06" + message + bytes((total,))


class _T0:
    """A card that knows T=0: an answer to a command with data waits for GET RESPONSE. ISO/IEC 7816-3, section 12.2."""

    def __init__(self, card: VirtualCard) -> None:
        self._card = card
        self._rest = b""

    def reset(self) -> None:
        self._rest = b""
        self._card.reset()

    def process(self, tpdu: bytes) -> bytes | None:
        if len(tpdu) == 5 and tpdu[1] == 0xC0:
            return self._given(tpdu[4] or 256)
        has_data = len(tpdu) > 5
        # The fifth byte is Lc, or Le of a command without data; a command with data has no Le.
        answer = self._whole(tpdu + b"\0" if has_data else tpdu)
        if answer is None or len(answer) == 2:
            return answer
        self._rest = answer[:-2]
        if has_data:
            return bytes((0x61, min(len(self._rest), 256) & 0xFF))
        size = tpdu[4] or 256
        if size > len(self._rest) and tpdu[4]:
            return bytes((0x6C, len(self._rest)))
        return self._given(size)

    def _whole(self, apdu: bytes) -> bytes | None:
        answer = self._card.process(apdu)
        data = b""
        while answer is not None and answer[-2] == 0x61:
            data += answer[:-2]
            answer = self._card.process(bytes((apdu[0], 0xC0, 0, 0, answer[-1])))
        return None if answer is None else data + answer

    def _given(self, size: int) -> bytes:
        part, self._rest = self._rest[:size], self._rest[size:]
        return part + (bytes((0x61, min(len(self._rest), 256) & 0xFF)) if self._rest else b"\x90\x00")
