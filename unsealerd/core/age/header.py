"""The textual header of an age v1 file: read strictly, written canonically.

    age-encryption.org/v1 LF
    -> TYPE SP ARG ... LF                      one or more stanzas
    base64 of the body, 64 columns LF          the last line is shorter than 64, and may be empty
    --- SP base64 of the MAC, 43 columns LF    HMAC-SHA-256 of everything before that space

C2SP age.md, "ABNF definition of file header". A header has one spelling: what `Header.encode` would not write is
refused, so `parse_header(b).encode()` is the beginning of ``b``.
"""

import hmac
from collections.abc import Sequence

import msgspec

from unsealerd.core.age.base64 import decode_unpadded, encode_unpadded
from unsealerd.core.age.primitives import derive
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import AgeHeaderInvalid, AgeMacInvalid

MAX_HEADER_SIZE = 1 << 20  # bytes
MAX_STANZAS = 1000
MAC_SIZE = 32  # bytes

_VERSION_LINE = b"age-encryption.org/v1\n"
_STANZA_MARK = b"-> "
_MAC_MARK = b"---"
_COLUMNS = 64
_VCHAR = frozenset(range(0x21, 0x7F))


class Stanza(msgspec.Struct, frozen=True):
    """One wrapped copy of the file key: for whom (type and arguments), and the ciphertext."""

    type: str
    args: tuple[str, ...]
    body: bytes

    def encode(self) -> bytes:
        """The stanza's lines. Raises ``ValueError`` for an argument that no file can hold."""
        words = [word.encode("ascii") for word in (self.type, *self.args)]
        if any(not word or not _VCHAR.issuperset(word) for word in words):
            raise ValueError("a stanza argument is one or more visible ASCII characters")
        text = encode_unpadded(self.body)
        # One step past the end: a body that fills its last line is followed by an empty one.
        lines = [text[i : i + _COLUMNS] for i in range(0, len(text) + 1, _COLUMNS)]
        return _STANZA_MARK + b" ".join(words) + b"\n" + b"".join(line + b"\n" for line in lines)


class Header(msgspec.Struct, frozen=True):
    """A header that is well formed. Nothing in it is authenticated before `verify_mac`."""

    stanzas: tuple[Stanza, ...]
    mac: bytes
    mac_input: bytes  # from the version line to the mark "---", without the space
    size: int  # bytes; the payload begins here

    def encode(self) -> bytes:
        return self.mac_input + b" " + encode_unpadded(self.mac) + b"\n"


def write_header(stanzas: Sequence[Stanza], file_key: SecretBuffer) -> Header:
    """The header of a new file."""
    mac_input = _VERSION_LINE + b"".join(stanza.encode() for stanza in stanzas) + _MAC_MARK
    mac = _mac(mac_input, file_key)
    # "---", a space, 43 characters and the line feed
    return Header(tuple(stanzas), mac, mac_input, len(mac_input) + 1 + 43 + 1)


def verify_mac(header: Header, file_key: SecretBuffer) -> None:
    """Raises ``AgeMacInvalid`` unless the header was made by somebody who knew the file key."""
    if not hmac.compare_digest(_mac(header.mac_input, file_key), header.mac):
        raise AgeMacInvalid("the header does not belong to this file key")


def _mac(mac_input: bytes, file_key: SecretBuffer) -> bytes:
    with derive(file_key.view, b"", b"header") as key:
        return hmac.digest(key.view, mac_input, "sha256")


def parse_header(data: bytes) -> Header:
    """The header at the beginning of ``data``. Raises ``AgeHeaderInvalid``, on any bytes."""
    lines = _Lines(data)
    if lines.next() != _VERSION_LINE[:-1]:
        raise AgeHeaderInvalid("not an age v1 file")
    stanzas: list[Stanza] = []
    while True:
        start = lines.position
        line = lines.next()
        if not line.startswith(_STANZA_MARK):
            break
        if len(stanzas) == MAX_STANZAS:
            raise AgeHeaderInvalid(f"more than {MAX_STANZAS} stanzas")
        stanzas.append(_stanza(line, lines))
    mac = _mac_line(line)
    if not stanzas:
        raise AgeHeaderInvalid("a header without a stanza")
    # "An scrypt stanza, if present, MUST be the only stanza": who knows a passphrase may rely on being the only one.
    if len(stanzas) > 1 and any(stanza.type == "scrypt" for stanza in stanzas):
        raise AgeHeaderInvalid("an scrypt stanza beside others")
    return Header(tuple(stanzas), mac, data[: start + len(_MAC_MARK)], lines.position)


def _stanza(line: bytes, lines: "_Lines") -> Stanza:
    words = line[len(_STANZA_MARK) :].split(b" ")
    # An empty word is a space too many.
    if any(not word or not _VCHAR.issuperset(word) for word in words):
        raise AgeHeaderInvalid("a stanza argument that is empty or not visible ASCII")
    name, *args = (word.decode("ascii") for word in words)
    text = bytearray()
    while True:
        line = lines.next()
        if len(line) > _COLUMNS:
            raise AgeHeaderInvalid("a body line of more than 64 columns")
        text += line
        if len(line) < _COLUMNS:
            break
    return Stanza(name, tuple(args), _decode(bytes(text)))


def _mac_line(line: bytes) -> bytes:
    mark = _MAC_MARK + b" "
    if not line.startswith(mark):
        raise AgeHeaderInvalid("neither a stanza nor the MAC")
    mac = _decode(line[len(mark) :])
    if len(mac) != MAC_SIZE:
        raise AgeHeaderInvalid("a MAC of another length than 32 bytes")
    return mac


def _decode(text: bytes) -> bytes:
    try:
        return decode_unpadded(text)
    except ValueError as err:
        raise AgeHeaderInvalid(str(err)) from err


class _Lines:
    """The lines of a header, each read once; a line ends with LF alone."""

    __slots__ = ("_data", "_end", "position")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._end = min(len(data), MAX_HEADER_SIZE)
        self.position = 0

    def next(self) -> bytes:
        end = self._data.find(b"\n", self.position, self._end)
        if end < 0:
            raise AgeHeaderInvalid("the header has no end")
        line = self._data[self.position : end]
        self.position = end + 1
        return line
