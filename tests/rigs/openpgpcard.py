"""A third party's OpenPGP card (PyPI's smartcard-app-openpgp) for the virtual reader of `rigs.pcscd`.

Its package has the name of pyscard's, and its licence is the GPL: it runs in a process and an environment of its own.
UNSEALERD_OPENPGP_CARD_PYTHON is that environment's interpreter; else it is looked for in `.venv/openpgp-card*`, where
`scripts/environment test` makes it from `requirements/openpgp-card.lock`.
"""

import hashlib
import os
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography.hazmat.primitives.asymmetric import ec

SERIAL = "31415926"
PIN = b"123456"
ADMIN_PIN = b"12345678"
PROGRAM = Path(__file__).with_name("openpgpcard_program.py")
ECDH_P256 = bytes.fromhex("122A8648CE3D030107")
_SELECT = bytes.fromhex("00A4040006D27600012401")
_ROOT = Path(__file__).parents[2]


def interpreter() -> str:
    named = os.environ.get("UNSEALERD_OPENPGP_CARD_PYTHON")
    if named:
        return named
    found = sorted(_ROOT.glob(".venv/openpgp-card*/bin/python"))
    assert found, "no environment for the OpenPGP card: run `scripts/environment test`"
    return str(found[-1])


def tlv(tag: str, value: bytes) -> bytes:
    head = bytes.fromhex(tag)
    return head + (bytes([len(value)]) if len(value) < 0x80 else b"\x81" + bytes([len(value)])) + value


class OpenPgpCard:
    """With a decryption key on P-256. The switches may be changed between two commands, from any thread."""

    def __init__(self, key: ec.EllipticCurvePrivateKey | None = None, *, serial: str = SERIAL) -> None:
        self.key = key or ec.generate_private_key(ec.SECP256R1())
        self.commands: list[bytes] = []
        """Every command since the start, without what VERIFY carries."""
        self.resets = 0
        self.before: Callable[[bytes], None] | None = None
        """Called with each command before the card gets it."""
        self.mangle: Callable[[bytes, bytes], bytes | None] | None = None
        """Called with the header of a command and the answer; what it gives is sent. None: the card pulls itself out."""
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [interpreter(), "-I", str(PROGRAM), serial],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.atr = self._receive()
        self.import_key()

    # --- the reader's side

    def reset(self) -> None:
        self.resets += 1
        with self._lock:
            if self._open:
                self._send(b"")

    def process(self, apdu: bytes) -> bytes | None:
        if self.before is not None:
            self.before(apdu)
        self.commands.append(apdu[:4] if apdu[1] == 0x20 else apdu)
        # The third party left SELECT DATA out (section 7.2.5), without which OpenSC's PKCS#11 module takes no card.
        answer = b"\x90\x00" if apdu[1] == 0xA5 else self._exchange(apdu)
        if answer is None:
            return None
        return self.mangle(apdu[:4], answer) if self.mangle is not None else answer

    # --- the owner's side

    def restore(self) -> None:
        """As it was when it was new: the key, all tries of the PIN, no switch set."""
        self.before = self.mangle = None
        self.import_key()
        self._as_admin(bytes.fromhex("002C0281") + bytes([len(PIN)]) + PIN)
        self.commands.clear()

    def import_key(
        self, attributes: bytes = ECDH_P256, key: ec.EllipticCurvePrivateKey | None = None
    ) -> None:
        """As `gpg` does it: the attributes of the decryption key, then the key. Section 4.4.3.12 of the specification."""
        self._as_admin(bytes.fromhex("00DA00C2") + bytes([len(attributes)]) + attributes)
        secret = (key or self.key).private_numbers().private_value.to_bytes(32, "big")
        template = tlv("B8", b"") + tlv("7F48", bytes.fromhex("9220")) + tlv("5F48", secret)
        header_list = tlv("4D", template)
        self._as_admin(bytes.fromhex("00DB3FFF") + bytes([len(header_list)]) + header_list)
        # A fingerprint that is not zero is how other programs see that there is a key.
        self.put("00C8", hashlib.sha256(secret).digest()[:20])
        self.put("00CF", bytes.fromhex("60000000"))

    def forget_key(self) -> None:
        """Other attributes, and no key."""
        attributes = bytes.fromhex("122B060104019755010501")  # ECDH on Curve25519
        self._as_admin(bytes.fromhex("00DA00C2") + bytes([len(attributes)]) + attributes)

    def put(self, tag: str, value: bytes) -> None:
        """PUT DATA."""
        self._as_admin(bytes.fromhex("00DA") + bytes.fromhex(tag) + bytes([len(value)]) + value)

    def _as_admin(self, command: bytes) -> None:
        for each in (_SELECT, bytes.fromhex("00200083") + bytes([len(ADMIN_PIN)]) + ADMIN_PIN, command):
            answer = self._exchange(each)
            assert answer is not None
            assert answer[-2:] == b"\x90\x00", (each.hex(), answer.hex())
        self.reset()
        self.resets -= 1

    # --- the process

    @property
    def _open(self) -> bool:
        """A reader may still power a card off when its process has ended: it is out then."""
        assert self._process.stdin is not None
        return not self._process.stdin.closed

    def _exchange(self, apdu: bytes) -> bytes | None:
        """The answer; None after `close`."""
        with self._lock:
            if not self._open:
                return None
            self._send(apdu)
            return self._receive()

    def _send(self, message: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(struct.pack(">H", len(message)) + message)
        self._process.stdin.flush()

    def _receive(self) -> bytes:
        assert self._process.stdout is not None
        head = self._process.stdout.read(2)
        assert len(head) == 2, f"the card's process ended: {interpreter()}"
        return self._process.stdout.read(struct.unpack(">H", head)[0])

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
