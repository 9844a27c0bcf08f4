"""Recipients and identities: their texts, and the points they refuse."""

import base64
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from unsealerd.core.age import (
    Identity,
    P256Identity,
    P256TagRecipient,
    Stanza,
    X25519Identity,
    X25519Recipient,
    bech32,
    parse_recipient,
)
from unsealerd.errors import (
    BadPoint,
    IdentityInvalid,
)
from unsealerd.model import Curve

# From the specification.
SPEC_IDENTITY = "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX"
SPEC_RECIPIENT = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj"
SPEC_TAG_RECIPIENT = "age1tag1qt8lw0ual6avlwmwatk888yqnmdamm7xfd0wak53ut6elz5c4swx2yqdj4e"

P256_KEY = ec.derive_private_key(0x1234567, ec.SECP256R1())
P256 = P256Identity(P256_KEY)


def unraw64(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4))


# --- the texts of the specification


def test_the_recipient_of_the_specifications_identity() -> None:
    identity = X25519Identity.parse(SPEC_IDENTITY)
    assert str(identity.recipient) == SPEC_RECIPIENT
    assert identity.encode() == SPEC_IDENTITY


@pytest.mark.parametrize(
    ("text", "kind", "curve"),
    [(SPEC_RECIPIENT, X25519Recipient, Curve.X25519), (SPEC_TAG_RECIPIENT, P256TagRecipient, Curve.P256)],
)
def test_a_recipient_reads_back_as_it_was_written(text: str, kind: type, curve: Curve) -> None:
    recipient = parse_recipient(text)
    assert isinstance(recipient, kind)
    assert (str(recipient), recipient.curve) == (text, curve)


def test_the_specifications_stanza_opens() -> None:
    identity = X25519Identity.parse(SPEC_IDENTITY)
    share = "O6DLx/wDIawpUC978NSPjYvrfDtJVnZApXKp4FMPHCY"
    stanza = Stanza("X25519", (share,), unraw64("3aKjozt9agh7jGmvOKvR4iax41Wl4zj95MKK4X9JuWc"))
    with identity.exchange(unraw64(share)) as shared, identity.recipient.unwrap(stanza, shared) as file_key:
        assert len(file_key) == 16


def test_generated_identities_differ_and_read_back() -> None:
    one, two = X25519Identity.generate(), X25519Identity.generate()
    assert one.encode() != two.encode()
    assert X25519Identity.parse(one.encode()).recipient == one.recipient


def corrupt(text: str) -> str:
    return text[:-1] + ("q" if text[-1] != "q" else "p")


REFUSED_RECIPIENTS = {
    "empty": "",
    "no separator": "age",
    "no data": "age1",
    "upper case": SPEC_RECIPIENT.upper(),
    "mixed case": SPEC_RECIPIENT[:-1] + SPEC_RECIPIENT[-1].upper(),
    "checksum": corrupt(SPEC_RECIPIENT),
    "foreign character": SPEC_RECIPIENT.replace("z", "b", 1),
    "white space": SPEC_RECIPIENT + "\n",
    "not ASCII": SPEC_RECIPIENT[:-1] + "\u0131",
    "padding bits": bech32.encode("age", b"x" * 32)[:-7] + "l" + "qqqqqq",
    "31 bytes": bech32.encode("age", b"x" * 31),
    "33 bytes": bech32.encode("age", b"x" * 33),
    "X25519 of small order": bech32.encode("age", bytes(32)),
    "X25519 above the prime": bech32.encode("age", b"\xff" * 32),
    "P-256, 32 bytes": bech32.encode("age1tag", b"\x02" * 32),
    "P-256, uncompressed": bech32.encode("age1tag", P256.recipient.uncompressed),
    "P-256, x without a point": bech32.encode("age1tag", b"\x02" + (1).to_bytes(32, "big")),
    "P-256, x above the prime": bech32.encode("age1tag", b"\x02" + b"\xff" * 32),
    "P-256, the identity": bech32.encode("age1tag", b"\x00"),
    "a plugin": bech32.encode("age1yubikey", b"\x02" * 33),
    "a secret key": SPEC_IDENTITY,
}


@pytest.mark.parametrize("text", REFUSED_RECIPIENTS.values(), ids=REFUSED_RECIPIENTS)
def test_what_is_not_a_recipient_is_refused(text: str) -> None:
    with pytest.raises(IdentityInvalid):
        parse_recipient(text)


def test_bech32_refuses_padding_that_is_not_zero() -> None:
    # 32 bytes are 51 characters and a bit; the last four bits of the 52nd are padding.
    values = [*b"\x00" * 51, 1]
    hrp = "age"
    check = bech32._polymod((*bech32._expand(hrp), *values, *bytes(6))) ^ 1
    values += [check >> 5 * (5 - i) & 31 for i in range(6)]
    with pytest.raises(ValueError, match="padding"):
        bech32.decode(f"{hrp}1" + "".join("qpzry9x8gf2tvdw0s3jn54khce6mua7l"[v] for v in values))


@pytest.mark.parametrize("prefix", ["age1pq", "age1tagpq"])
def test_hybrid_recipients_are_refused_with_the_reason(prefix: str) -> None:
    with pytest.raises(IdentityInvalid, match="cannot be answered blindly"):
        parse_recipient(bech32.encode(prefix, bytes(1216)))


REFUSED_IDENTITIES = {
    "empty": "",
    "lower case": SPEC_IDENTITY.lower(),
    "checksum": SPEC_IDENTITY[:-1] + "Q",
    "a recipient": SPEC_RECIPIENT,
    "a comment": "# created: today",
    "31 bytes": bech32.encode("AGE-SECRET-KEY-", b"x" * 31),
    "hybrid": "AGE-SECRET-KEY-PQ-1XX76JRALNLXDMEW0CRK45QMCCH4X06SE84UN3VPM33W6HWDX0H3SK3ZQFR",
    # its lower case is an ASCII k, so that the checksum would be right
    "the Kelvin sign": bech32.encode("AGE-SECRET-KEY-", bytes([0xB5]) * 32).replace("1KK", "1\u212aK"),
}


@pytest.mark.parametrize("text", REFUSED_IDENTITIES.values(), ids=REFUSED_IDENTITIES)
def test_what_is_not_an_identity_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(IdentityInvalid) as caught:
        X25519Identity.parse(text)
    assert not text or text not in str(caught.value)


def test_a_key_on_another_curve_is_refused() -> None:
    with pytest.raises(IdentityInvalid, match="P-256 is needed"):
        P256Identity(ec.generate_private_key(ec.SECP384R1()))


@pytest.mark.promise(5)
@pytest.mark.parametrize(
    ("identity", "point"),
    [
        (X25519Identity.parse(SPEC_IDENTITY), bytes(32)),
        (X25519Identity.parse(SPEC_IDENTITY), b"\xff" * 32),
        (X25519Identity.parse(SPEC_IDENTITY), P256.recipient.uncompressed),
        (P256, P256.recipient.public),
        (P256, b"\x04" + bytes(63) + b"\x01"),
        (P256, b"\x00"),
    ],
)
def test_no_private_key_is_applied_to_a_bad_point(identity: Identity, point: bytes) -> None:
    with pytest.raises(BadPoint):
        identity.exchange(point)


def test_the_compressed_point_is_the_recipient() -> None:
    public = P256_KEY.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    assert P256.recipient.public == public
    assert len(P256.recipient.uncompressed) == 65


def test_importing_the_format_stays_cheap() -> None:
    """What only one type of key needs is imported with the first such key."""
    code = "import sys, unsealerd.core.age, unsealerd.core.blinding; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    ).stdout.split()
    for late in ("asymmetric.ec", "asymmetric.x25519", "hpke", "serialization", "kdf.scrypt"):
        assert f"cryptography.hazmat.primitives.{late}" not in loaded
    assert "cryptography.x509" not in loaded
