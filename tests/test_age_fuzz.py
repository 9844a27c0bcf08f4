"""Any bytes give one of the five errors of the age module, and no changed file opens."""

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unsealerd.core.age import (
    Identity,
    P256Identity,
    ScryptIdentity,
    Stanza,
    X25519Identity,
    bech32,
    dearmor,
    decrypt,
    encrypt,
    parse_header,
    parse_recipient,
)
from unsealerd.core.age.base64 import decode_padded, decode_unpadded, encode_unpadded
from unsealerd.core.age.header import write_header
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import (
    AgeArmorInvalid,
    AgeHeaderInvalid,
    AgeMacInvalid,
    AgeNoMatch,
    AgePayloadInvalid,
    IdentityInvalid,
)

pytestmark = pytest.mark.promise(10)

STAGES = (AgeArmorInvalid, AgeHeaderInvalid, AgeNoMatch, AgeMacInvalid, AgePayloadInvalid)

P256 = P256Identity(ec.derive_private_key(0x1234567, ec.SECP256R1()))
X25519 = X25519Identity.parse("AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX")
IDENTITIES: list[Identity] = [P256, X25519]
TEXT = b"attack at dawn"


def a_file() -> bytes:
    with SecretBuffer.copy_of(b"YELLOW SUBMARINE") as file_key:
        return encrypt(memoryview(TEXT), file_key, [P256.recipient, X25519.recipient])


GOOD = a_file()
VISIBLE = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=20)
STANZAS = st.builds(
    Stanza,
    VISIBLE | st.sampled_from(["X25519", "p256tag"]),
    st.lists(VISIBLE, max_size=4).map(tuple),
    st.binary(max_size=200) | st.sampled_from([bytes(32), bytes(48), bytes(96)]),
)


@given(st.binary(max_size=600))
@example(
    b"age-encryption.org/v1\n-> scrypt AAAAAAAAAAAAAAAAAAAAAA 1\n" + b"A" * 43 + b"\n--- " + b"A" * 43 + b"\n"
)
def test_any_bytes(data: bytes) -> None:
    for candidate in (
        data,
        b"age-encryption.org/v1\n" + data,
        b"-----BEGIN AGE ENCRYPTED FILE-----\n" + data,
    ):
        with pytest.raises(STAGES):
            decrypt(candidate, [*IDENTITIES, ScryptIdentity(b"x")])


@given(st.lists(st.sampled_from([*GOOD.splitlines(keepends=True), b"\n", b"-> x\n", b"---", b" ", b"-----"])))
def test_any_order_of_the_lines_of_a_file(lines: list[bytes]) -> None:
    data = b"".join(lines)
    try:
        decrypt(data, IDENTITIES).close()
    except STAGES:
        return
    assert data == GOOD


@settings(max_examples=400)
@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_changed_byte_never_opens(at: int, difference: int) -> None:
    data = GOOD[:at] + bytes([GOOD[at] ^ difference]) + GOOD[at + 1 :]
    with pytest.raises(STAGES):
        decrypt(data, IDENTITIES)


@given(st.integers(0, len(GOOD)), st.integers(0, 40), st.binary(max_size=40))
def test_a_replaced_part_never_opens(at: int, removed: int, inserted: bytes) -> None:
    data = GOOD[:at] + inserted + GOOD[at + removed :]
    if data == GOOD:
        return
    with pytest.raises(STAGES):
        decrypt(data, IDENTITIES)


@given(st.lists(STANZAS, min_size=1, max_size=5), st.binary(max_size=20))
def test_a_header_reads_back_as_it_was_written(stanzas: list[Stanza], payload: bytes) -> None:
    with SecretBuffer.copy_of(b"YELLOW SUBMARINE") as file_key:
        header = write_header(stanzas, file_key)
    data = header.encode()
    assert parse_header(data + payload) == header
    assert parse_header(data + payload).encode() == data


@given(st.binary(max_size=400))
def test_whatever_parses_has_one_spelling(data: bytes) -> None:
    data = b"age-encryption.org/v1\n-> x " + data + b"\n\n--- " + b"A" * 43 + b"\n"
    try:
        header = parse_header(data)
    except AgeHeaderInvalid:
        return
    assert header.encode() == data[: header.size]


@given(st.lists(STANZAS, min_size=1, max_size=5))
def test_any_stanzas_for_our_identities(stanzas: list[Stanza]) -> None:
    with SecretBuffer.copy_of(b"YELLOW SUBMARINE") as file_key:
        data = write_header(stanzas, file_key).encode() + bytes(40)
    with pytest.raises((AgeHeaderInvalid, AgeNoMatch)):
        decrypt(data, IDENTITIES)


@pytest.mark.parametrize("word", ["", "a b", "a\n", "\x7f", "\t"])
def test_a_stanza_that_could_not_be_read_is_not_written(word: str) -> None:
    with pytest.raises(ValueError, match="visible ASCII"):
        Stanza("x", (word,), b"").encode()


@given(st.binary(max_size=400))
def test_any_bytes_as_armor(data: bytes) -> None:
    with pytest.raises(AgeArmorInvalid):
        dearmor(data)
    with pytest.raises(AgeArmorInvalid):
        dearmor(b"-----BEGIN AGE ENCRYPTED FILE-----\n!" + data + b"\n-----END AGE ENCRYPTED FILE-----\n")


@given(st.binary(max_size=200))
def test_base64_reads_back(data: bytes) -> None:
    assert decode_unpadded(encode_unpadded(data)) == data


@given(st.binary(max_size=40) | st.text("AQgw=+/-_ \n", max_size=12).map(str.encode))
def test_base64_has_one_spelling(text: bytes) -> None:
    for decode, encode in ((decode_unpadded, encode_unpadded), (decode_padded, None)):
        try:
            data = decode(text)
        except ValueError:
            continue
        unpadded = encode_unpadded(data)
        assert text == (unpadded if encode else unpadded + b"=" * (-len(unpadded) % 4))


@given(st.text("abcdefghijklmnop-1", min_size=1, max_size=20).filter(str.islower), st.binary(max_size=80))
def test_bech32_reads_back(hrp: str, data: bytes) -> None:
    assert bech32.decode(bech32.encode(hrp, data)) == (hrp, bytearray(data))
    assert bech32.decode(bech32.encode(hrp.upper(), data)) == (hrp.upper(), bytearray(data))


@given(st.text(max_size=80) | st.text("qpzry9x8gf2tvdw0s3jn54khce6mua7l", max_size=70).map("age1".__add__))
@example("\u0130" * 70)  # its lower case is longer
def test_any_text_as_a_key(text: str) -> None:
    with pytest.raises(IdentityInvalid):
        parse_recipient(text)
    with pytest.raises(IdentityInvalid):
        X25519Identity.parse(text)


@given(st.integers(0, 61), st.sampled_from("qpzry9x8gf2tvdw0s3jn54khce6mua7l"))
def test_a_changed_character_is_noticed(at: int, character: str) -> None:
    text = str(X25519.recipient)
    changed = text[:at] + character + text[at + 1 :]
    if changed == text:
        return
    with pytest.raises(IdentityInvalid):
        parse_recipient(changed)
