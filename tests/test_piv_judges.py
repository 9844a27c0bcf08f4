"""The emulated card, judged by programs that are not ours: what they take for a PIV card is one to test with.

Then the other way round: a Diffie-Hellman that OpenSC has the card do is the one that our own identity has it do.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from rigs.desk import Desk
from rigs.pcscd import READER
from rigs.pivcard import GUID, PIN, SERIAL, PivCard, point_of

pytestmark = pytest.mark.xdist_group("judges")

MODULE = "opensc-pkcs11.so"


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    with Desk() as desk:
        yield desk


@pytest.fixture(params=[True, False], ids=["yubikey", "plain"])
def card(request: pytest.FixtureRequest, desk: Desk) -> PivCard:
    desk.remove()  # the other kind has another ATR
    return desk.place(PivCard(yubikey=request.param))


def test_opensc_knows_it_for_a_piv_card(desk: Desk, card: PivCard) -> None:
    for tool in ("opensc-tool", "piv-tool"):
        assert "Personal Identity Verification Card" in desk.service.run(tool, "-n").stdout


def test_opensc_lists_its_keys_and_certificates(desk: Desk, card: PivCard) -> None:
    keys = desk.service.run("pkcs15-tool", "--list-keys").stdout
    assert "Private EC Key [PIV AUTH key]" in keys
    assert "Private EC Key [KEY MAN key]" in keys
    assert "derive" in keys
    certificates = desk.service.run("pkcs15-tool", "--read-certificate", "03").stdout
    assert "BEGIN CERTIFICATE" in certificates


@pytest.fixture
def yubikey(desk: Desk) -> PivCard:
    """OpenSC tries elliptic curves only with cards that it knows by their ATR."""
    desk.remove()
    return desk.place(PivCard())


def openssl_derive(
    private: ec.EllipticCurvePrivateKey, public: ec.EllipticCurvePublicKey, where: Path
) -> bytes:
    ours, theirs = where / "private.pem", where / "public.pem"
    ours.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    theirs.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    command = ("openssl", "pkeyutl", "-derive", "-inkey", ours, "-peerkey", theirs)
    return subprocess.run(command, check=True, capture_output=True).stdout


def test_opensc_openssl_and_the_identity_agree(desk: Desk, yubikey: PivCard, tmp_path: Path) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    peer, derived = tmp_path / "peer.der", tmp_path / "derived"
    peer.write_bytes(private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    desk.service.run(
        *(
            "pkcs11-tool",
            "--module",
            MODULE,
            "--login",
            "--pin",
            PIN.decode(),
            "--derive",
            "-m",
            "ECDH1-DERIVE",
        ),
        *("--id", "03", "--input-file", peer, "--output-file", derived),
    )
    expected = openssl_derive(private, yubikey.key.public_key(), tmp_path)
    assert derived.read_bytes() == expected
    assert len(yubikey.seen.points) == 1
    with desk.identity().exchange(point_of(private)) as x:
        assert bytes(x.view) == expected


def test_opensc_signs_with_it(desk: Desk, yubikey: PivCard, tmp_path: Path) -> None:
    message, signature = tmp_path / "message", tmp_path / "signature"
    message.write_bytes(b"message")
    desk.service.run(
        *(
            "pkcs11-tool",
            "--module",
            MODULE,
            "--login",
            "--pin",
            PIN.decode(),
            "--sign",
            "-m",
            "ECDSA-SHA256",
        ),
        *("--id", "01", "--signature-format", "openssl", "--input-file", message, "--output-file", signature),
    )
    key = yubikey.slots[0x9A].key
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    key.public_key().verify(signature.read_bytes(), b"message", ec.ECDSA(SHA256()))


def test_opensc_uses_up_the_tries_as_we_do(desk: Desk, yubikey: PivCard) -> None:
    wrong = ("pkcs15-tool", "--verify-pin", "--auth-id", "01", "--pin", "654321")
    desk.service.run(*wrong, check=False)
    assert yubikey.tries == 2


def test_yubicos_tool_reads_its_status(desk: Desk, yubikey: PivCard) -> None:
    status = desk.service.run("yubico-piv-tool", "-r", READER, "-a", "status").stdout
    assert f"Serial Number:\t{SERIAL}" in status
    assert "Version:\t5.4.3" in status
    assert "Slot 9d:\t\n\tAlgorithm:\tECCP256" in status
    assert GUID.hex() in status
    assert "PIN tries left:\t3" in status
    verify = desk.service.run("yubico-piv-tool", "-r", READER, "-a", "verify-pin", "-P", PIN.decode())
    assert "Successfully verified PIN" in verify.stdout
    assert yubikey.tries == 3
