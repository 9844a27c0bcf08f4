"""The proof that a key was made inside of the card, and everything that only looks like one."""

import contextlib
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs.desk import Desk
from rigs.pcscd import READER
from rigs.pivcard import SERIAL, VERSION, PivCard, point_of, tlv
from rigs.vendor import PrivateKey, Vendor, certificate, der

from unsealerd.errors import AttestationInvalid, CardFailed, IdentityInvalid, WrongCard
from unsealerd.operator.cards.attestation import Anchor, public_point, verify
from unsealerd.operator.cards.policies import PinPolicy, TouchPolicy

pytestmark = pytest.mark.xdist_group("attestation")


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    with Desk() as desk:
        yield desk


@pytest.fixture
def card(desk: Desk) -> PivCard:
    return desk.place(PivCard())


# --- of a card


def test_a_key_that_was_made_inside(desk: Desk, card: PivCard) -> None:
    found = desk.identity().attest(card.vendor.pem)
    assert found.anchor is Anchor.VENDOR
    assert found.issuer == "CN=Vendor PIV Root CA"
    assert (found.serial, found.firmware) == (str(SERIAL), VERSION)
    assert found.policies == (PinPolicy.ONCE, TouchPolicy.NEVER)
    assert card.seen.count(0x20) == 0


def test_without_the_vendors_certificates_it_is_only_the_devices_word(desk: Desk, card: PivCard) -> None:
    found = desk.identity().attest(None)
    assert (found.anchor, found.serial) == (Anchor.DEVICE, str(SERIAL))


def test_a_device_with_an_intermediate_ca(desk: Desk, card: PivCard) -> None:
    """As a YubiKey with firmware 5.7 has it: the caller's file has all of them."""
    root, middle = Vendor("Root"), Vendor("Intermediate")
    middle.certificate = certificate(middle.name, middle.key.public_key(), root.name, root.key, ca=True)
    desk.place(PivCard(vendor=middle))
    assert desk.identity().attest(root.pem + middle.pem).anchor is Anchor.VENDOR
    with pytest.raises(AttestationInvalid, match="not signed by a CA"):
        desk.identity().attest(root.pem)


def test_an_imported_key_is_not_attested(desk: Desk, card: PivCard) -> None:
    card.slots[0x9D].generated = False
    with pytest.raises(AttestationInvalid, match="does not attest"):
        desk.identity().attest(card.vendor.pem)


def test_a_card_that_cannot_attest(desk: Desk) -> None:
    desk.place(PivCard(yubikey=False))
    with pytest.raises(AttestationInvalid, match="does not attest"):
        desk.identity().attest(None)


def test_a_device_without_its_certificate(desk: Desk, card: PivCard) -> None:
    card.device_certificate = None
    with pytest.raises(AttestationInvalid, match="does not attest"):
        desk.identity().attest(card.vendor.pem)


def test_another_vendors_device(desk: Desk, card: PivCard) -> None:
    with pytest.raises(AttestationInvalid, match="not signed by a CA"):
        desk.identity().attest(Vendor().pem)


def test_a_statement_of_another_devices_serial_number(desk: Desk, card: PivCard) -> None:
    card.mangle = lambda head, answer: b"\0\0\0\x07\x90\0" if head[1] == 0xF8 else answer
    with pytest.raises(AttestationInvalid, match="another device's"):
        desk.identity().attest(card.vendor.pem)


def test_a_key_that_was_changed_since(desk: Desk, card: PivCard) -> None:
    identity = desk.identity()
    card.slots[0x9D] = card.made(0x9D)
    with pytest.raises(WrongCard):
        identity.attest(card.vendor.pem)


def test_a_bundle_that_is_none(desk: Desk, card: PivCard) -> None:
    for bundle in (b"", b"not PEM", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        with pytest.raises(IdentityInvalid, match="bundle"):
            desk.identity().attest(bundle)


def test_other_tools_see_the_same_chain(desk: Desk, card: PivCard, tmp_path: Path) -> None:
    """The card's statement by Yubico's tool, verified by OpenSSL, so that the rig is one to be judged by."""
    run = desk.service.run
    statement, device, ca = tmp_path / "9d.pem", tmp_path / "f9.pem", tmp_path / "ca.pem"
    run("yubico-piv-tool", "-r", READER, "-a", "attest", "-s", "9d", "-o", statement)
    run("yubico-piv-tool", "-r", READER, "-a", "read-certificate", "-s", "f9", "-o", device)
    ca.write_bytes(card.vendor.pem)
    done = run("openssl", "verify", "-CAfile", ca, "-untrusted", device, statement)
    assert done.stdout.strip().endswith(": OK")
    loaded = [x509.load_pem_x509_certificate(path.read_bytes()) for path in (statement, device)]
    found = verify(der(loaded[0]), der(loaded[1]), point_of(card.key), card.vendor.pem)
    assert found.anchor is Anchor.VENDOR


# --- of certificates

KEY = ec.generate_private_key(ec.SECP256R1())
PUBLIC = point_of(KEY)
VENDOR = Vendor()
DEVICE = ec.generate_private_key(ec.SECP256R1())
F9 = "Yubico PIV Attestation"
DEVICE_CERTIFICATE = der(certificate(F9, DEVICE.public_key(), VENDOR.name, VENDOR.key, ca=True))
EXTENSIONS = {
    "1.3.6.1.4.1.41482.3.3": b"\x05\x04\x03",
    "1.3.6.1.4.1.41482.3.7": b"\x02\x03\x01\xe2\x40",
    "1.3.6.1.4.1.41482.3.8": b"\x03\x02",
}


def statement(
    key: ec.EllipticCurvePrivateKey = KEY,
    signer: PrivateKey = DEVICE,
    issuer: str = F9,
    extensions: dict[str, bytes] | None = None,
) -> bytes:
    subject = "YubiKey PIV Attestation 9d"
    return der(certificate(subject, key.public_key(), issuer, signer, extensions=extensions or EXTENSIONS))


STATEMENT = statement()


def test_a_statement_verifies() -> None:
    found = verify(STATEMENT, DEVICE_CERTIFICATE, PUBLIC, VENDOR.pem)
    assert (found.serial, found.policies) == ("123456", (PinPolicy.ALWAYS, TouchPolicy.ALWAYS))


def test_a_device_key_may_be_rsa() -> None:
    """As in YubiKeys before 5.7."""
    key, root = rsa.generate_private_key(65537, 2048), rsa.generate_private_key(65537, 2048)
    ca = certificate("Root", root.public_key(), "Root", root, ca=True)
    device = der(certificate(F9, key.public_key(), "Root", root, ca=True))
    found = verify(statement(signer=key), device, PUBLIC, ca.public_bytes(Encoding.PEM))
    assert found.anchor is Anchor.VENDOR


FORGED = {
    "signed by the key itself": statement(signer=KEY),
    "signed by the vendor, not by the device": statement(signer=VENDOR.key),
    "another issuer's name": statement(issuer="somebody"),
    "about another key": statement(key=ec.generate_private_key(ec.SECP256R1())),
    "another signature": STATEMENT[:-1] + bytes([STATEMENT[-1] ^ 1]),
    "the device's own": DEVICE_CERTIFICATE,
    "nothing": b"",
    "no certificate": b"no certificate",
    "half of it": STATEMENT[:100],
}


@pytest.mark.promise(5)
@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_statement(kind: str) -> None:
    for ca in (None, VENDOR.pem):
        with pytest.raises(AttestationInvalid):
            verify(FORGED[kind], DEVICE_CERTIFICATE, PUBLIC, ca)


@pytest.mark.promise(5)
def test_a_device_key_of_the_owners_own_making() -> None:
    """It verifies as what it is: the word of whoever has the device; and against the vendor's CA it does not."""
    own = der(certificate(F9, DEVICE.public_key(), F9, DEVICE, ca=True))
    posing = der(certificate(F9, DEVICE.public_key(), VENDOR.name, DEVICE, ca=True))
    for device in (own, posing):
        assert verify(STATEMENT, device, PUBLIC, None).anchor is Anchor.DEVICE
        with pytest.raises(AttestationInvalid):
            verify(STATEMENT, device, PUBLIC, VENDOR.pem)


@pytest.mark.promise(5)
def test_a_certificate_that_is_no_ca_vouches_for_nobody() -> None:
    """A statement about a slot is signed by the vendor's chain too; its key must not sign devices."""
    leaf = ec.generate_private_key(ec.SECP256R1())
    trusted = certificate("a leaf", leaf.public_key(), VENDOR.name, VENDOR.key)
    device = der(certificate(F9, DEVICE.public_key(), "a leaf", leaf, ca=True))
    with pytest.raises(AttestationInvalid, match="not signed by a CA"):
        verify(STATEMENT, device, PUBLIC, trusted.public_bytes(Encoding.PEM))


def test_the_devices_own_certificate_may_be_trusted() -> None:
    pem = x509.load_der_x509_certificate(DEVICE_CERTIFICATE).public_bytes(Encoding.PEM)
    assert verify(STATEMENT, DEVICE_CERTIFICATE, PUBLIC, pem).anchor is Anchor.VENDOR


@pytest.mark.parametrize(
    "serial", [b"\x02", b"\x02\x01", b"\x04\x01\x01", b"\x02\x02\x01", b"\x02\x01\x01\x01"]
)
def test_a_malformed_serial_number(serial: bytes) -> None:
    with pytest.raises(AttestationInvalid, match="serial"):
        verify(
            statement(extensions={**EXTENSIONS, "1.3.6.1.4.1.41482.3.7": serial}),
            DEVICE_CERTIFICATE,
            PUBLIC,
            None,
        )


@pytest.mark.parametrize("policies", [b"\x02", b"\xff\x01", b"\x01\xff", b"\x01\x01\x01"])
def test_policies_that_are_not_known_are_not_invented(policies: bytes) -> None:
    extensions = {"1.3.6.1.4.1.41482.3.8": policies}
    found = verify(statement(extensions=extensions), DEVICE_CERTIFICATE, PUBLIC, None)
    assert (found.policies, found.serial, found.firmware) == (None, None, None)


def test_an_issuer_cannot_write_on_the_terminal() -> None:
    device = der(certificate(F9, DEVICE.public_key(), "\x1b[2Jtrust me", VENDOR.key, ca=True))
    assert "\x1b" not in verify(STATEMENT, device, PUBLIC, None).issuer


@settings(max_examples=300, deadline=None)
@given(
    which=st.booleans(),
    at=st.integers(0, 2000),
    noise=st.binary(min_size=1, max_size=8),
    cut=st.booleans(),
)
def test_any_damage_is_named(which: bool, at: int, noise: bytes, cut: bool) -> None:
    original = STATEMENT if which else DEVICE_CERTIFICATE
    at %= len(original)
    damaged = original[:at] + noise + (b"" if cut else original[at + len(noise) :])
    if damaged == original:
        return
    pair = (damaged, DEVICE_CERTIFICATE) if which else (STATEMENT, damaged)
    with pytest.raises(AttestationInvalid):
        verify(*pair, PUBLIC, VENDOR.pem)
    with contextlib.suppress(CardFailed):
        public_point(damaged)


def test_old_habits_of_issuers_are_no_warning_here() -> None:
    """A serial number of zero, which the library warns of."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(KEY.public_key())
        .serial_number(1)
        .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2050, 1, 1, tzinfo=UTC))
    )
    data = der(builder.sign(KEY, SHA256())).replace(tlv("02", b"\x01"), tlv("02", b"\x00"), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert public_point(data) == PUBLIC
