"""The age format, one failure for each vector; `age` of the distribution is the second judge of every one of them.

Each file is authentic but for the one thing that is wrong: only the check that its name speaks of can refuse it.
"""

import base64
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from age_forge import (
    BODY,
    CHUNK,
    EPHEMERAL,
    FILE_KEY,
    IDENTITY,
    PRIME,
    PUBLIC,
    SECRET,
    SHARE,
    STRANGER,
    TEXT,
    armor,
    armored,
    b64,
    body,
    chunk,
    file,
    header,
    loose,
    loose_end,
    mac_of,
    padded_to,
    payload,
    stanza,
    wrapped,
)

from unsealerd.core.age import X25519Identity, decrypt, parse_header, stream
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import (
    AgeArmorInvalid,
    AgeHeaderInvalid,
    AgeMacInvalid,
    AgeNoMatch,
    AgePayloadInvalid,
    UnsealerdError,
)

# --- the vectors


@dataclass(frozen=True)
class Vector:
    name: str
    data: bytes
    expect: bytes | type[UnsealerdError] = TEXT
    age_differs: str = ""  # why the stock `age` does something else with it


GREASE = b"-> grease!~ some args\n" + b"A" * 64 + b"\n\n"
TWO = bytes(CHUNK) + b"\x01" * 100  # a payload of two chunks
FIRST, SECOND = chunk(0, False, TWO[:CHUNK]), chunk(1, True, TWO[CHUNK:])
HIGH = SHARE[:31] + bytes([SHARE[31] | 0x80])  # the bit that X25519 ignores
BASE = (PRIME + 9).to_bytes(32, "little")  # the base point, spelled above the prime


ACCEPTED = [
    Vector("one recipient", file()),
    Vector("empty payload", header(stanza()) + payload(b""), b""),
    Vector("one full chunk", header(stanza()) + payload(bytes(CHUNK)), bytes(CHUNK)),
    Vector("a full chunk and a byte", header(stanza()) + payload(bytes(CHUNK + 1)), bytes(CHUNK + 1)),
    Vector("two chunks", header(stanza()) + bytes(16) + FIRST + SECOND, TWO),
    Vector("unknown stanzas around", file(GREASE + stanza() + GREASE)),
    Vector("an unknown stanza with an empty body", file(b"-> x\n\n" + stanza())),
    Vector("the case of the type matters", file(b"-> x25519 whatever\n\n" + stanza())),
    Vector("the second recipient is ours", file(stanza(*wrapped(to=STRANGER)) + stanza())),
    Vector(
        "a share with its top bit set",
        file(stanza(HIGH, body(HIGH, SECRET.exchange(EPHEMERAL.public_key())))),
    ),
    Vector("a share above the prime", file(stanza(BASE, body(BASE, PUBLIC)))),
    Vector("armor", armor(file())),
    Vector("armor, CRLF", armor(file(), eol=b"\r\n")),
    Vector("armor without a last line end", armor(file())[:-1]),
    Vector(
        "armor within white space",
        b" \n\t\r\n\n" + armor(file()) + b"\n \t\r\n ",
        age_differs="its command looks for BEGIN at the first byte only; its library accepts this",
    ),
    Vector("armor whose last line is full", armor(padded_to(48, 0))),
    Vector("armor whose last line is full, with padding", armor(padded_to(48, 47))),
]

LONG = b"A" * 64
HEADER = [
    Vector("nothing at all", b""),
    Vector("something else", b"\x00" * 200),
    Vector("an unknown version", file(version=b"age-encryption.org/v2\n")),
    Vector("a version that only begins like ours", file(version=b"age-encryption.org/v11\n")),
    Vector("version line, CRLF", file(version=b"age-encryption.org/v1\r\n")),
    Vector("version line, trailing space", file(version=b"age-encryption.org/v1 \n")),
    Vector("a line before the version", file(version=b"\nage-encryption.org/v1\n")),
    Vector("a version line alone", b"age-encryption.org/v1\n"),
    Vector("a version line without an end", b"age-encryption.org/v1"),
    Vector("no stanza", file(b"")),
    Vector("cut in an argument line", file()[:40]),
    Vector("cut in a body", header(stanza())[: len(b"age-encryption.org/v1\n" + stanza()) - 9]),
    Vector("cut before the MAC", b"age-encryption.org/v1\n" + stanza()),
    Vector("cut in the MAC", header(stanza())[:-10]),
    Vector("a stanza without arguments", file(b"-> \n\n" + stanza())),
    Vector("a stanza without arguments or space", file(b"->\n\n" + stanza())),
    Vector("no space after the arrow", file(b"->x y\n\n" + stanza())),
    Vector("two spaces after the arrow", file(b"->  x\n\n" + stanza())),
    Vector("two spaces between arguments", file(b"-> x  y\n\n" + stanza())),
    Vector("a space after the arguments", file(b"-> x y \n\n" + stanza())),
    Vector("argument line, CRLF", file(b"-> x\r\n\n" + stanza())),
    Vector("a tab in an argument", file(b"-> x\ty\n\n" + stanza())),
    Vector("DEL in an argument", file(b"-> x\x7f\n\n" + stanza())),
    Vector("UTF-8 in an argument", file("-> é\n\n".encode() + stanza())),
    Vector("a full line is the last one", file(b"-> x\n" + LONG + b"\n" + stanza())),
    Vector("a full line is the last one before the MAC", file(stanza() + b"-> x\n" + LONG + b"\n")),
    Vector("no body", file(b"-> x\n" + stanza())),
    Vector("a body line of 65 columns", file(b"-> x\n" + LONG + b"A\n\n" + stanza())),
    Vector("a body line of 68 columns", file(b"-> x\n" + LONG + b"AAAA\n\n" + stanza())),
    Vector("a short line, and another", file(b"-> x\nAAAA\nAAAA\n" + stanza())),
    Vector("an empty line, and another", file(b"-> x\n\n\n" + stanza())),
    Vector("body line, CRLF", file(b"-> x\nAAAA\r\n" + stanza())),
    Vector("a padded body", file(b"-> x\nAA==\n" + stanza())),
    Vector("a body that is not canonical", file(b"-> x\nAB\n" + stanza())),
    Vector("a body that is cut in its base64", file(b"-> x\nAAAAA\n" + stanza())),
    Vector("a body in the other alphabet", file(b"-> x\nAA-_\n" + stanza())),
    Vector("a space in a body", file(b"-> x\nAA AA\n" + stanza())),
    Vector("a space after a body", file(b"-> x\nAAAA \n" + stanza())),
    Vector("MAC without a space", file(end=lambda mac: b64(mac) + b"\n")),
    Vector("MAC with two spaces", file(end=lambda mac: b"  " + b64(mac) + b"\n")),
    Vector("MAC with a space behind", file(end=lambda mac: b" " + b64(mac) + b" \n")),
    Vector("MAC line, CRLF", file(end=lambda mac: b" " + b64(mac) + b"\r\n")),
    Vector("no MAC", file(end=lambda mac: b"\n")),
    Vector("no MAC behind the space", file(end=lambda mac: b" \n")),
    Vector("a padded MAC", file(end=lambda mac: b" " + b64(mac) + b"=\n")),
    Vector("a MAC that is not canonical", file(end=lambda mac: b" " + loose(b64(mac)) + b"\n")),
    Vector("a short MAC", file(end=lambda mac: b" " + b64(mac[:31]) + b"\n")),
    Vector("a long MAC", file(end=lambda mac: b" " + b64(mac + b"\0") + b"\n")),
    Vector("a long MAC mark", file(end=lambda mac: b"- " + b64(mac) + b"\n")),
    Vector("X25519 without a share", file(b"-> X25519\n" + b64(BODY) + b"\n")),
    Vector("X25519 with two shares", file(b"-> X25519 " + b64(SHARE) + b" x\n" + b64(BODY) + b"\n")),
    Vector("X25519 with a short share", file(stanza(SHARE[:31]))),
    Vector("X25519 with a long share", file(stanza(SHARE + b"\0"))),
    Vector("X25519 with a padded share", file(stanza().replace(b64(SHARE), b64(SHARE) + b"="))),
    Vector("X25519 share that is not canonical", file(stanza().replace(b64(SHARE), loose(b64(SHARE))))),
    Vector("X25519 with a short body", file(stanza(wrapped_key=wrapped(FILE_KEY[:15])[1]))),
    Vector("X25519 with a long body", file(stanza(wrapped_key=wrapped(FILE_KEY + b"\0")[1]))),
    Vector("X25519 with an empty body", file(b"-> X25519 " + b64(SHARE) + b"\n\n")),
    Vector(
        "a malformed stanza after ours",
        file(stanza() + stanza(SHARE[:31])),
        age_differs="stops at the first match",
    ),
    Vector("a malformed stanza before ours", file(stanza(SHARE[:31]) + stanza())),
    Vector(
        "scrypt beside ours", file(stanza() + b"-> scrypt AAAA 10\n\n"), age_differs="checked by scrypt only"
    ),
    Vector("scrypt beside scrypt", file(b"-> scrypt AAAA 10\n\n" * 2)),
    Vector("too many stanzas", file(stanza() + b"-> x\n\n" * 1000), age_differs="has no such limit"),
    Vector(
        "too long a header",
        file(stanza() + b"-> " + b"x" * (1 << 20) + b"\n\n"),
        age_differs="has no such limit",
    ),
    Vector("no payload at all", header(stanza())),
    Vector("a payload that ends in its nonce", header(stanza()) + bytes(15)),
    *(
        Vector(f"X25519 share of small order: {name}", file(stanza(share, body(share, bytes(32)))))
        for name, number in {
            "0": 0,
            "1": 1,
            "p - 1": PRIME - 1,
            "order 8": 0x00B8495F16056286FDB1329CEB8D09DA6AC49FF1FAE35616AEB8413B7C7AEBE0,
            "order 8, the other": 0x57119FD0DD4E22D8868E1C58C45C44045BEF839C55B1D0B1248C50A3BC959C5F,
            "p": PRIME,
            "p + 1": PRIME + 1,
            "0 and the top bit": 1 << 255,
        }.items()
        for share in [number.to_bytes(32, "little")]
    ),
]

NO_MATCH = [
    Vector("somebody else's", file(stanza(*wrapped(to=STRANGER)))),
    Vector("only unknown stanzas", file(GREASE)),
    Vector("X25519 in lower case", file(stanza().replace(b"X25519", b"x25519"))),
    Vector("a body that was changed", file(stanza(wrapped_key=BODY[:-1] + bytes([BODY[-1] ^ 1])))),
    Vector("somebody else's, and the payload is wrong", header(stanza(*wrapped(to=STRANGER))) + b"x" * 50),
    Vector("a passphrase file", file(b"-> scrypt AAAAAAAAAAAAAAAAAAAAAA 10\n" + b64(BODY) + b"\n")),
]

MAC = [
    Vector("a MAC bit", file(end=lambda mac: b" " + b64(bytes([mac[0] ^ 1]) + mac[1:]) + b"\n")),
    Vector("a stanza was added", header(stanza()).replace(b"---", b"-> x\n\n---") + payload(TEXT)),
    Vector("a wrapped key of another file", file(stanza(wrapped_key=wrapped(b"SUBMARINE YELLOW")[1]))),
    Vector("the MAC covers a space too many", file(end=lambda mac: b" " + b64(mac_of(b"x")) + b"\n")),
    Vector(
        "the MAC comes before the payload",
        file(end=lambda mac: b" " + b64(bytes(32)) + b"\n")[:-30] + b"garbage",
    ),
    Vector("the MAC comes before the nonce", header(stanza(), end=lambda mac: b" " + b64(bytes(32)) + b"\n")),
]

STREAM = [
    Vector("no chunk", bytes(16)),
    Vector("less than a tag", bytes(16) + chunk(0, True, b"")[:15]),
    Vector("cut by a byte", payload(TEXT)[:-1]),
    Vector("a byte too many", payload(TEXT) + b"\0"),
    Vector("a changed byte", payload(TEXT)[:16] + bytes([payload(TEXT)[16] ^ 1]) + payload(TEXT)[17:]),
    Vector("a changed tag", payload(TEXT)[:-1] + bytes([payload(TEXT)[-1] ^ 1])),
    Vector("another nonce", b"\x01" + payload(TEXT)[1:]),
    Vector("the last flag is missing", bytes(16) + chunk(0, False, TEXT)),
    Vector("the last flag is another number", bytes(16) + chunk(0, 2, TEXT)),  # type: ignore[arg-type]
    Vector("the count begins at one", bytes(16) + chunk(1, True, TEXT)),
    Vector("the last chunk is gone", bytes(16) + FIRST),
    Vector("the first chunk is gone", bytes(16) + SECOND),
    Vector("the same chunk twice", bytes(16) + FIRST + FIRST),
    Vector("chunks in another order", bytes(16) + chunk(1, False, bytes(CHUNK)) + chunk(0, True, b"x")),
    Vector("two last chunks", bytes(16) + chunk(0, True, bytes(CHUNK)) + SECOND),
    Vector("a last chunk after the last chunk", payload(bytes(CHUNK)) + payload(TEXT)[16:]),
    Vector("the count is not big endian", bytes(16) + FIRST + chunk(1 << 80, True, TWO[CHUNK:])),
    Vector("an empty last chunk", bytes(16) + FIRST + chunk(1, True, b"")),
    Vector("two empty chunks", bytes(16) + chunk(0, False, b"") + chunk(1, True, b"")),
    Vector("a chunk that is too long", bytes(16) + chunk(0, True, bytes(CHUNK + 1))),
    Vector("a first chunk that is short", bytes(16) + chunk(0, False, b"x") + chunk(1, True, b"y")),
    Vector("the second chunk is changed", bytes(16) + FIRST + SECOND[:-1] + bytes([SECOND[-1] ^ 1])),
]

ONE_LINE = base64.b64encode(file())[:64]
LAST_LINE = base64.b64encode(file())[len(file()) // 48 * 64 :]
ARMOR = [
    Vector("BEGIN in lower case", armored(b"BEGIN AGE", b"begin age")),
    Vector("another label", armored(b"BEGIN AGE ENCRYPTED FILE", b"BEGIN AGE FILE")),
    Vector("END in lower case", armored(b"END AGE", b"end age")),
    Vector("four dashes", armored(b"-----BEGIN", b"----BEGIN")),
    Vector("six dashes", armored(b"-----BEGIN", b"------BEGIN")),
    Vector("no BEGIN", armored(b"-----BEGIN AGE ENCRYPTED FILE-----\n", b"")),
    Vector("no END", armored(b"-----END AGE ENCRYPTED FILE-----\n", b"")),
    Vector("BEGIN alone", b"-----BEGIN AGE ENCRYPTED FILE-----\n"),
    Vector("END is cut", armor(file())[:-4]),
    Vector("nothing between", b"-----BEGIN AGE ENCRYPTED FILE-----\n-----END AGE ENCRYPTED FILE-----\n"),
    Vector(
        "an empty line between", b"-----BEGIN AGE ENCRYPTED FILE-----\n\n-----END AGE ENCRYPTED FILE-----\n"
    ),
    Vector("something before", b"garbage\n" + armor(file())),
    Vector("something after", armor(file()) + b"garbage\n"),
    Vector("a second block", armor(file()) * 2),
    Vector("a space before BEGIN", b" " + armor(file())),
    Vector("a space after BEGIN", armored(b"FILE-----\n", b"FILE----- \n")),
    Vector("a space after END", armor(file())[:-1] + b" \n"),
    Vector("PEM headers", armored(b"FILE-----\n", b"FILE-----\nProc-Type: 4\n\n")),
    Vector("an empty line after BEGIN", armored(b"FILE-----\n", b"FILE-----\n\n")),
    Vector("an empty line in the middle", armored(ONE_LINE + b"\n", ONE_LINE + b"\n\n")),
    Vector("an empty line before END", armored(b"\n-----END", b"\n\n-----END")),
    Vector("a space at a line's end", armored(ONE_LINE, ONE_LINE + b" ")),
    Vector("a space at a line's beginning", armored(ONE_LINE, b" " + ONE_LINE)),
    Vector("a space in the last line", armored(LAST_LINE, LAST_LINE + b" ")),
    Vector("a line of 65 columns", armor(file(), columns=65)),
    Vector("lines of 60 columns", armor(file(), columns=60)),
    Vector("lines of 76 columns", armor(file(), columns=76)),
    Vector("one long line", armor(file(), columns=10_000)),
    Vector("a short line in the middle", armored(ONE_LINE, ONE_LINE[:60] + b"\n" + ONE_LINE[60:])),
    Vector("CR alone", armor(file(), eol=b"\r")),
    Vector("two CRs", armor(file(), eol=b"\r\r\n")),
    Vector("padding is missing", armor(padded_to(3, 2)).replace(b"=\n", b"\n")),
    Vector("padding on what needs none", armor(padded_to(3, 0)).replace(b"\n-----END", b"====\n-----END")),
    Vector("padding in the middle", armored(ONE_LINE, ONE_LINE[:62] + b"==")),
    Vector("not canonical", armor(padded_to(3, 2), spelling=loose_end)),
    Vector("the other alphabet", armored(ONE_LINE[:8], b"____----")),
    Vector("not base64", armored(ONE_LINE[:8], b"!!!!!!!!")),
]


def expecting(error: type[UnsealerdError], vectors: list[Vector], before: bytes = b"") -> list[Vector]:
    return [Vector(v.name, before + v.data, error, v.age_differs) for v in vectors]


VECTORS = [
    *ACCEPTED,
    *expecting(AgeHeaderInvalid, HEADER),
    *expecting(AgeNoMatch, NO_MATCH),
    *expecting(AgeMacInvalid, MAC),
    *expecting(AgePayloadInvalid, STREAM, header(stanza())),
    *expecting(AgeArmorInvalid, ARMOR),
]


def name_of(vector: Vector) -> str:
    expect = "opens" if isinstance(vector.expect, bytes) else vector.expect.__name__
    return f"{expect}: {vector.name}"


@pytest.mark.promise(10)
@pytest.mark.parametrize("vector", VECTORS, ids=name_of)
def test_each_file_opens_or_gives_the_error_of_its_stage(vector: Vector) -> None:
    identity = X25519Identity.parse(IDENTITY)
    if isinstance(vector.expect, bytes):
        with decrypt(vector.data, [identity]) as plaintext:
            assert bytes(plaintext.view) == vector.expect
        return
    with pytest.raises(UnsealerdError) as caught:
        decrypt(vector.data, [identity])
    assert caught.type is vector.expect


@pytest.mark.parametrize("vector", [v for v in VECTORS if not v.age_differs], ids=name_of)
def test_age_of_the_distribution_agrees(vector: Vector, tmp_path: Path) -> None:
    (tmp_path / "key.txt").write_text(IDENTITY + "\n")
    (tmp_path / "file.age").write_bytes(vector.data)
    done = subprocess.run(
        ["age", "-d", "-i", tmp_path / "key.txt", tmp_path / "file.age"], capture_output=True, check=False
    )
    if isinstance(vector.expect, bytes):
        assert (done.returncode, done.stdout) == (0, vector.expect), done.stderr
    else:
        assert done.returncode == 1


def test_no_identity_opens_nothing() -> None:
    with pytest.raises(AgeNoMatch):
        decrypt(file(), [])


@pytest.mark.parametrize("data", [v.data for v in ACCEPTED if v.data.startswith(b"age")])
def test_a_header_has_one_spelling(data: bytes) -> None:
    parsed = parse_header(data)
    assert parsed.encode() == data[: parsed.size]


@pytest.mark.promise(1)
def test_a_failure_in_the_middle_leaves_no_plaintext_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SecretBuffer] = []

    class Recorded(SecretBuffer):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            made.append(self)

    monkeypatch.setattr(stream, "SecretBuffer", Recorded)
    data = header(stanza()) + bytes(16) + FIRST + SECOND[:-1] + b"\0"
    with pytest.raises(AgePayloadInvalid):
        decrypt(data, [X25519Identity.parse(IDENTITY)])
    assert [(len(buffer), buffer.closed) for buffer in made] == [(len(TWO), True)]
