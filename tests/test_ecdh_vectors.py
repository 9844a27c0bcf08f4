"""Every kind of identity against the same vectors: it answers what is right, and applies its key to nothing else."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from rigs import openpgpcard, pivcard, softhsm
from rigs.openpgpcard import OpenPgpCard
from rigs.pcscd import Pcscd
from rigs.person import Person
from rigs.pivcard import PivCard
from rigs.points import taken
from rigs.softhsm import SoftHsm

from unsealerd.core.age import Identity, P256Identity, X25519Identity
from unsealerd.core.blinding import Blinding, validate_point
from unsealerd.errors import BadPoint
from unsealerd.model import Curve
from unsealerd.operator.identities import openpgp, piv, pkcs11

pytestmark = pytest.mark.xdist_group("vectors")

FILE = Path(__file__).parent / "vectors" / "ecdh.json"


@dataclass(frozen=True, slots=True)
class Valid:
    name: str
    point: bytes
    shared: bytes


@dataclass(frozen=True, slots=True)
class Invalid:
    name: str
    point: bytes


@dataclass(frozen=True, slots=True)
class Vectors:
    private: bytes
    valid: list[Valid]
    invalid: list[Invalid]


def read(curve: str) -> Vectors:
    (found,) = (each for each in json.loads(FILE.read_text()) if each["curve"] == curve)
    return Vectors(
        bytes.fromhex(found["private"]),
        [
            Valid(each["name"], bytes.fromhex(each["point"]), bytes.fromhex(each["shared"]))
            for each in found["valid"]
        ],
        [Invalid(each["name"], bytes.fromhex(each["point"])) for each in found["invalid"]],
    )


P256 = read("P-256")
X25519 = read("X25519")
KEY = ec.derive_private_key(int.from_bytes(P256.private, "big"), ec.SECP256R1())


# --- the vectors themselves


def test_the_file_is_what_its_script_makes() -> None:
    script = FILE.parents[1] / "ecdh_vectors.py"
    done = subprocess.run([sys.executable, script], capture_output=True, check=True, text=True)
    assert done.stdout == FILE.read_text()


def derived(folder: Path, private: bytes, public: bytes) -> bytes | None:
    """By the command of OpenSSL; None if it refuses."""
    (folder / "private").write_bytes(private)
    (folder / "public").write_bytes(public)
    done = subprocess.run(
        ["openssl", "pkeyutl", "-derive", "-inkey", folder / "private", "-peerkey", folder / "public"],
        capture_output=True,
        check=False,
    )
    return done.stdout if done.returncode == 0 else None


SPKI_P256 = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d030107034200")
SPKI_X25519 = bytes.fromhex("302a300506032b656e032100")


def test_openssl_agrees_on_p256(tmp_path: Path) -> None:
    private = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for vector in P256.valid:
        assert derived(tmp_path, private, SPKI_P256 + vector.point) == vector.shared, vector.name
    # What has the right length and the right form is refused for what it is. (OpenSSL takes the hybrid form.)
    for wrong in P256.invalid:
        if len(wrong.point) == 65 and wrong.name != "hybrid":
            assert derived(tmp_path, private, SPKI_P256 + wrong.point) is None, wrong.name


def test_openssl_agrees_on_x25519(tmp_path: Path) -> None:
    key = x25519.X25519PrivateKey.from_private_bytes(X25519.private)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for vector in X25519.valid:
        assert derived(tmp_path, private, SPKI_X25519 + vector.point) == vector.shared, vector.name
    for wrong in X25519.invalid:
        if wrong.name.startswith("small order"):
            assert derived(tmp_path, private, SPKI_X25519 + wrong.point) is None, wrong.name


def test_each_thing_that_can_be_wrong_is_there() -> None:
    names = " ".join(each.name for each in (*P256.invalid, *X25519.invalid))
    for kind in (
        "off the curve",
        "twist",
        "identity",
        "not below the prime",
        "compressed",
        "hybrid",
        "short",
    ):
        assert kind in names
    assert any(each.shared[0] == 0 for each in P256.valid)
    assert any(each.shared[31] == 0 for each in X25519.valid)


# --- the identities


@dataclass(frozen=True, slots=True)
class Held:
    identity: Identity
    used: Callable[[], int]
    """How often the device was asked anything."""


@pytest.fixture(scope="module")
def software() -> Held:
    return Held(P256Identity(KEY), lambda: 0)


@pytest.fixture(scope="module")
def on_softhsm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    hsm = SoftHsm.make(tmp_path_factory.mktemp("softhsm") / "hsm")
    hsm.add_token("ops")
    hsm.add_key("ops", "unlock", b"\3", KEY)
    person = Person(softhsm.PIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(hsm.config))
        (identity,) = pkcs11.find(hsm.uri(token="ops"), prompts=person, on_event=person.see)
        yield Held(identity, lambda: len(person.asked))


@pytest.fixture(scope="module")
def on_a_piv_card() -> Iterator[Held]:
    card, person = PivCard(), Person(pivcard.PIN)
    card.slots[0x9D] = card.made(0x9D, KEY)
    with Pcscd() as service, service.client():
        service.insert(card)
        (identity,) = piv.find(None, prompts=person, on_event=person.see)
        yield Held(identity, lambda: len(card.seen.commands))


@pytest.fixture(scope="module")
def on_an_openpgp_card() -> Iterator[Held]:
    person = Person(openpgpcard.PIN)
    with OpenPgpCard(KEY) as card, Pcscd() as service, service.client():
        service.insert(card)
        (identity,) = openpgp.find(None, prompts=person, on_event=person.see)
        yield Held(identity, lambda: len(card.commands))


@pytest.fixture(scope="module", params=["software", "on_softhsm", "on_a_piv_card", "on_an_openpgp_card"])
def held(request: pytest.FixtureRequest) -> Held:
    held = request.getfixturevalue(request.param)
    assert isinstance(held, Held)
    return held


def test_p256_answers(held: Held) -> None:
    for vector in P256.valid:
        assert taken(held.identity.exchange(vector.point)) == vector.shared, vector.name


@pytest.mark.promise(5)
def test_p256_refusals(held: Held) -> None:
    before = held.used()
    for wrong in P256.invalid:
        with pytest.raises(BadPoint):
            held.identity.exchange(wrong.point)
            pytest.fail(wrong.name)
    assert held.used() == before, "the device was asked"


def test_x25519_answers_and_refusals() -> None:
    raw = x25519.X25519PrivateKey.from_private_bytes(X25519.private)
    identity = X25519Identity(raw)
    assert identity.recipient.public == raw.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    for vector in X25519.valid:
        assert taken(identity.exchange(vector.point)) == vector.shared, vector.name
    for wrong in X25519.invalid:
        with pytest.raises(BadPoint):
            identity.exchange(wrong.point)
            pytest.fail(wrong.name)


@pytest.mark.parametrize(
    ("curve", "vectors"), [(Curve.P256, P256), (Curve.X25519, X25519)], ids=["P-256", "X25519"]
)
def test_the_server_blinds_nothing_else(curve: Curve, vectors: Vectors) -> None:
    for vector in vectors.valid:
        validate_point(curve, vector.point)
        Blinding.draw(curve, vector.point).close()
    for wrong in vectors.invalid:
        with pytest.raises(BadPoint):
            Blinding.draw(curve, wrong.point)
            pytest.fail(wrong.name)
