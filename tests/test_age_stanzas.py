"""The stanzas that `age` of the distribution cannot make, or only at a terminal: p256tag and scrypt."""

import base64
import hashlib
from collections.abc import Sequence

import pytest
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from unsealerd.core.age import (
    Identity,
    P256Identity,
    P256TagRecipient,
    Recipient,
    ScryptIdentity,
    Stanza,
    X25519Identity,
    decrypt,
    encrypt,
    parse_header,
    parse_recipient,
    scrypt,
)
from unsealerd.core.age.header import write_header
from unsealerd.core.age.stream import encrypt_stream
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import (
    AgeHeaderInvalid,
    AgeNoMatch,
    LimitExceeded,
    UnsealerdError,
)

# From the specification.
SPEC_TAG_RECIPIENT = "age1tag1qt8lw0ual6avlwmwatk888yqnmdamm7xfd0wak53ut6elz5c4swx2yqdj4e"
SPEC_TAG_ENC = "BOqTylUtZFwkMTxd6UENg8kopiMhRJBOUXMv5w2xVOmJu7eezoALGXiNtq5Vka+UQvaYbQvAdwjIJEDaoBaq7So"
SPEC_TAG = "CXBuUw"

TEXT = b"attack at dawn"
P256_KEY = ec.derive_private_key(0x1234567, ec.SECP256R1())
P256 = P256Identity(P256_KEY)


def raw64(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


def unraw64(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4))


def age_file(stanzas: Sequence[Stanza], file_key: SecretBuffer) -> bytes:
    out = bytearray(write_header(stanzas, file_key).encode())
    encrypt_stream(memoryview(TEXT), file_key, out)
    return bytes(out)


def key_of_16() -> SecretBuffer:
    return SecretBuffer.copy_of(b"YELLOW SUBMARINE")


# --- p256tag


def test_the_tag_is_the_one_that_the_specification_defines() -> None:
    """With the specification's recipient and point. The tag printed beside them there is not theirs: it is left from an
    earlier formula, over the whole uncompressed recipient.
    """
    recipient = parse_recipient(SPEC_TAG_RECIPIENT)
    assert isinstance(recipient, P256TagRecipient)
    enc = unraw64(SPEC_TAG_ENC)
    short = hashlib.sha256(recipient.public).digest()[:4]
    tag = HKDF.extract(SHA256(), b"age-encryption.org/p256tag", enc + short)[:4]
    assert recipient.ephemeral(Stanza("p256tag", (raw64(tag), SPEC_TAG_ENC), bytes(32))) == enc
    assert recipient.ephemeral(Stanza("p256tag", (SPEC_TAG, SPEC_TAG_ENC), bytes(32))) is None
    assert HKDF.extract(SHA256(), b"age-encryption.org/p256tag", enc + recipient.uncompressed)[:4] == unraw64(
        SPEC_TAG
    )


SUITE = hpke.Suite(hpke.KEM.P256, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)
INFO = b"age-encryption.org/p256tag"


def test_the_librarys_hpke_opens_what_we_wrap() -> None:
    with key_of_16() as file_key:
        stanza = P256.recipient.wrap(file_key)
    enc = unraw64(stanza.args[1])
    assert SUITE.decrypt(enc + stanza.body, P256_KEY, info=INFO) == b"YELLOW SUBMARINE"


@pytest.mark.parametrize("_", range(20))
def test_we_open_what_the_librarys_hpke_seals(_: int) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    identity = P256Identity(key)
    sealed = SUITE.encrypt(b"YELLOW SUBMARINE", key.public_key(), info=INFO)
    enc, body = sealed[:65], sealed[65:]
    stanza = Stanza("p256tag", (raw64(identity.recipient.tag(enc)), raw64(enc)), body)
    assert identity.recipient.ephemeral(stanza) == enc
    with identity.exchange(enc) as shared, identity.recipient.unwrap(stanza, shared) as file_key:
        assert bytes(file_key.view) == b"YELLOW SUBMARINE"


def p256_stanza(**change: object) -> Stanza:
    """A good stanza with one part replaced."""
    with key_of_16() as file_key:
        good = P256.recipient.wrap(file_key)
    tag, enc = good.args
    parts = {"type": good.type, "tag": tag, "enc": enc, "body": good.body, "more": ()} | change
    args = tuple(a for a in (parts["tag"], parts["enc"]) if a is not None) + parts["more"]  # type: ignore[operator]
    return Stanza(parts["type"], args, parts["body"])  # type: ignore[arg-type]


POINT = P256.recipient.uncompressed
P256_STANZAS: dict[str, tuple[Stanza, type[UnsealerdError]]] = {
    "type in upper case": (p256_stanza(type="P256TAG"), AgeNoMatch),
    "another tag": (p256_stanza(tag="AAAAAA"), AgeNoMatch),
    "a body for somebody else": (p256_stanza(body=bytes(32)), AgeNoMatch),
    "no point": (p256_stanza(enc=None), AgeHeaderInvalid),
    "an argument too many": (p256_stanza(more=("x",)), AgeHeaderInvalid),
    "a tag of 3 bytes": (p256_stanza(tag="AAAA"), AgeHeaderInvalid),
    "a tag of 5 bytes": (p256_stanza(tag="AAAAAAA"), AgeHeaderInvalid),
    "a tag with loose bits": (p256_stanza(tag="AAAAAB"), AgeHeaderInvalid),
    "a padded tag": (p256_stanza(tag="AAAAAA=="), AgeHeaderInvalid),
    "a compressed point": (p256_stanza(enc=raw64(P256.recipient.public)), AgeHeaderInvalid),
    "64 bytes": (p256_stanza(enc=raw64(POINT[:64])), AgeHeaderInvalid),
    "66 bytes": (p256_stanza(enc=raw64(POINT + b"\0")), AgeHeaderInvalid),
    "a hybrid form": (p256_stanza(enc=raw64(bytes([6 + POINT[64] % 2]) + POINT[1:])), AgeHeaderInvalid),
    "off the curve": (p256_stanza(enc=raw64(POINT[:64] + bytes([POINT[64] ^ 1]))), AgeHeaderInvalid),
    "a short body": (p256_stanza(body=bytes(31)), AgeHeaderInvalid),
    "a long body": (p256_stanza(body=bytes(33)), AgeHeaderInvalid),
}


@pytest.mark.promise(10)
@pytest.mark.parametrize(("stanza", "expect"), P256_STANZAS.values(), ids=P256_STANZAS)
def test_p256tag_stanzas_that_open_nothing(stanza: Stanza, expect: type[UnsealerdError]) -> None:
    with key_of_16() as file_key:
        data = age_file([stanza], file_key)
        # A malformed stanza refuses the file, also beside a good one; a foreign one does not.
        mixed = age_file([p256_stanza(), stanza], file_key)
    with pytest.raises(UnsealerdError) as caught:
        decrypt(data, [P256])
    assert caught.type is expect
    if expect is AgeNoMatch:
        with decrypt(mixed, [P256]) as plaintext:
            assert bytes(plaintext.view) == TEXT
    else:
        with pytest.raises(AgeHeaderInvalid):
            decrypt(mixed, [P256])


def test_identities_of_another_type_ignore_a_malformed_stanza() -> None:
    identity = X25519Identity.generate()
    with key_of_16() as file_key:
        data = age_file([p256_stanza(more=("x",)), identity.recipient.wrap(file_key)], file_key)
    with decrypt(data, [identity]) as plaintext:
        assert bytes(plaintext.view) == TEXT


def test_a_wrong_diffie_hellman_opens_nothing() -> None:
    identity: Identity
    for identity in (P256, X25519Identity.generate()):
        with key_of_16() as file_key, SecretBuffer.random(32) as wrong:
            stanza = identity.recipient.wrap(file_key)
            with pytest.raises(AgeNoMatch):
                identity.recipient.unwrap(stanza, wrong)


def test_every_operator_opens_a_file_for_all_of_them() -> None:
    identities: list[Identity] = [
        P256,
        X25519Identity.generate(),
        P256Identity(ec.generate_private_key(ec.SECP256R1())),
    ]
    recipients: list[Recipient] = [identity.recipient for identity in identities]
    with SecretBuffer.random(16) as file_key:
        data = encrypt(memoryview(TEXT), file_key, recipients)
    assert [s.type for s in parse_header(data).stanzas] == ["p256tag", "X25519", "p256tag"]
    for identity in identities:
        with decrypt(data, [identity]) as plaintext:
            assert bytes(plaintext.view) == TEXT


def test_no_two_files_share_a_nonce() -> None:
    with SecretBuffer.random(16) as file_key:
        files = [encrypt(memoryview(TEXT), file_key, [P256.recipient]) for _ in range(10)]
    assert len({data[parse_header(data).size :][:16] for data in files}) == 10


@pytest.mark.parametrize("count", [0, 1001])
def test_a_file_that_could_not_be_read_is_not_written(count: int) -> None:
    with SecretBuffer.random(16) as file_key, pytest.raises(ValueError, match="1 to 1000"):
        encrypt(memoryview(TEXT), file_key, [P256.recipient] * count)


@pytest.mark.parametrize("size", [0, 15, 17, 32])
@pytest.mark.parametrize(
    "recipient", [P256.recipient, X25519Identity.generate().recipient], ids=["p256", "x25519"]
)
def test_only_a_key_of_16_bytes_is_wrapped(recipient: Recipient, size: int) -> None:
    with SecretBuffer(size) as file_key, pytest.raises(ValueError, match="16 bytes"):
        recipient.wrap(file_key)


# --- scrypt

PASSPHRASE = b"correct horse battery staple"


def scrypt_stanza(*, file_key: bytes = b"YELLOW SUBMARINE", **change: str) -> Stanza:
    salt = b"0123456789abcdef"
    key = hashlib.scrypt(
        PASSPHRASE, salt=b"age-encryption.org/v1/scrypt" + salt, n=1 << 4, r=8, p=1, dklen=32
    )
    parts = {"salt": raw64(salt), "work": "4"} | change
    body = ChaCha20Poly1305(key).encrypt(bytes(12), file_key, None)
    return Stanza("scrypt", tuple(" ".join(parts.values()).split(" ")), body)


def passphrase_file(stanza: Stanza) -> bytes:
    with key_of_16() as file_key:
        return age_file([stanza], file_key)


def test_a_passphrase_opens_its_file() -> None:
    with decrypt(passphrase_file(scrypt_stanza()), [ScryptIdentity(PASSPHRASE)]) as plaintext:
        assert bytes(plaintext.view) == TEXT


@pytest.mark.parametrize("passphrase", [b"", b"correct horse battery stapl", PASSPHRASE + b"\n"])
def test_another_passphrase_does_not(passphrase: bytes) -> None:
    with pytest.raises(AgeNoMatch):
        decrypt(passphrase_file(scrypt_stanza()), [ScryptIdentity(passphrase)])


def test_a_passphrase_does_not_open_the_file_of_a_key() -> None:
    with SecretBuffer.random(16) as file_key:
        data = encrypt(memoryview(TEXT), file_key, [P256.recipient])
    with pytest.raises(AgeNoMatch):
        decrypt(data, [ScryptIdentity(PASSPHRASE)])


REFUSED_SCRYPT = {
    "no work factor": scrypt_stanza(salt="MDEyMzQ1Njc4OWFiY2RlZg", work="x").args[:1],
    "an argument too many": (*scrypt_stanza().args, "x"),
    "a salt of 15 bytes": (raw64(bytes(15)), "4"),
    "a salt of 17 bytes": (raw64(bytes(17)), "4"),
    "a padded salt": (raw64(bytes(16)) + "==", "4"),
    "a salt with loose bits": (raw64(bytes(16))[:-1] + "B", "4"),
    **{
        f"work factor {work[:8]}": (raw64(bytes(16)), work)
        for work in [
            "0",
            "00",
            "04",
            "+4",
            "-4",
            "4.",
            "4a",
            "a",
            "0x4",
            "1_0",
            "23",
            "99",
            "222",
            "9" * 5000,
        ]
    },
}


@pytest.mark.promise(10)
@pytest.mark.parametrize("args", REFUSED_SCRYPT.values(), ids=REFUSED_SCRYPT)
def test_scrypt_stanzas_that_are_refused(args: tuple[str, ...]) -> None:
    data = passphrase_file(Stanza("scrypt", args, bytes(32)))
    with pytest.raises(AgeHeaderInvalid):
        decrypt(data, [ScryptIdentity(PASSPHRASE)])


@pytest.mark.parametrize("file_key", [bytes(15), bytes(17), b""])
def test_scrypt_bodies_of_another_length_are_refused(file_key: bytes) -> None:
    with pytest.raises(AgeHeaderInvalid):
        decrypt(passphrase_file(scrypt_stanza(file_key=file_key)), [ScryptIdentity(PASSPHRASE)])


def test_scrypt_stands_alone() -> None:
    identity = X25519Identity.generate()
    with key_of_16() as file_key:
        data = age_file([scrypt_stanza(), identity.recipient.wrap(file_key)], file_key)
    with pytest.raises(AgeHeaderInvalid):
        decrypt(data, [identity])
    with pytest.raises(AgeHeaderInvalid):
        decrypt(data, [ScryptIdentity(PASSPHRASE)])


def test_a_work_factor_beyond_this_machines_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrypt, "MAX_LOG2_WORK", 60)  # 2^50 KiB: more than any address space
    data = passphrase_file(Stanza("scrypt", (raw64(bytes(16)), "50"), bytes(32)))
    with pytest.raises(LimitExceeded):
        decrypt(data, [ScryptIdentity(PASSPHRASE)])
