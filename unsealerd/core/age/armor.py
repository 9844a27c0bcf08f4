"""ASCII armor: an age file as text. C2SP age.md, "ASCII armor"; RFC 7468 section 3, figure 3 (strict).

    -----BEGIN AGE ENCRYPTED FILE-----
    canonical, padded base64; every line 64 columns, the last one 4 to 64
    -----END AGE ENCRYPTED FILE-----

Lines end with LF or CRLF; white space before and after is allowed, nothing else.
"""

from unsealerd.core.age.base64 import decode_padded
from unsealerd.errors import AgeArmorInvalid

_BEGIN = b"-----BEGIN AGE ENCRYPTED FILE-----"
_END = b"-----END AGE ENCRYPTED FILE-----"
_COLUMNS = 64
_BINARY_START = b"age-encryption.org/"


def is_armored(data: bytes) -> bool:
    """Whether ``data`` means to be armor, right or wrong: it is not a binary file and has a PEM line's five dashes."""
    return not data.startswith(_BINARY_START) and b"-----" in data


def dearmor(data: bytes) -> bytes:
    """The binary file. Raises ``AgeArmorInvalid``, on any bytes."""
    lines = [line.removesuffix(b"\r") for line in data.split(b"\n")]
    first = next((i for i, line in enumerate(lines) if line.strip()), len(lines))
    if first == len(lines) or lines[first] != _BEGIN:
        raise AgeArmorInvalid("the armor does not begin with its BEGIN line")
    try:
        end = lines.index(_END, first)
    except ValueError as err:
        raise AgeArmorInvalid("the armor has no END line") from err
    if any(line.strip() for line in lines[end + 1 :]):
        raise AgeArmorInvalid("something follows the armor")
    *full, last = lines[first + 1 : end] or [b""]
    if any(len(line) != _COLUMNS for line in full) or not 0 < len(last) <= _COLUMNS:
        raise AgeArmorInvalid("the armor's lines are not 64 columns wide")
    try:
        # Joined first: a "=" anywhere but at the very end is not canonical.
        return decode_padded(b"".join((*full, last)))
    except ValueError as err:
        raise AgeArmorInvalid(str(err)) from err
