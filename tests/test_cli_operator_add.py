"""unsealctl operator: public keys become configuration lines, and the operators are listed."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from rigs.ctl import Ctl, Result
from rigs.desk import Desk
from rigs.openpgpcard import SERIAL as OPENPGP_SERIAL
from rigs.openpgpcard import OpenPgpCard
from rigs.pivcard import ONCE, SERIAL, TOUCH_ALWAYS, PivCard, Vendor, recipient_of
from rigs.softhsm import SoftHsm
from rigs.stub_daemon import StubDaemon

from unsealerd import config
from unsealerd.cli import terminal
from unsealerd.cli.edge import Exit
from unsealerd.core.age import P256Identity, X25519Identity
from unsealerd.core.passphrase import Parameters, derive

LONG = "correct horse battery staple"


@pytest.fixture
def ctl(tmp_path: Path) -> Ctl:
    return Ctl(tmp_path)


def configured(result: Result) -> config.Operator:
    """What is on stdout is a whole configuration, with one operator."""
    assert result.code == 0, result.err
    (operator,) = config.parse(result.raw).operators
    return operator


# --- files


def test_a_key_file(ctl: Ctl, tmp_path: Path) -> None:
    identity = X25519Identity.generate()
    path = tmp_path / "key.txt"
    path.write_text(identity.encode())
    path.chmod(0o600)
    result = ctl.bare(
        "operator", "add", "alice", "--key-file", str(path), "--group", "security", "--group", "x"
    )
    operator = configured(result)
    assert operator == config.Operator("alice", str(identity.recipient), ("security", "x"))
    assert result.out.splitlines()[0] == "# key file key.txt"
    assert identity.encode() not in result.out + result.err
    facts = ctl.bare("operator", "add", "alice", "--key-file", str(path), "--json").json
    assert list(facts) == [
        *("name", "recipient", "groups", "device", "passphrase", "pin_policy", "touch_policy", "attestation"),
        "configuration",
    ]
    assert facts["recipient"] == str(identity.recipient)
    assert facts["pin_policy"] is None


def test_a_pem_file(ctl: Ctl, tmp_path: Path) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    path = tmp_path / "key.pem"
    path.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    operator = configured(ctl.bare("operator", "add", "bob", "--key-file", str(path)))
    assert operator.recipient == str(P256Identity(private).recipient)


@pytest.mark.parametrize(
    "arguments",
    [("a b",), ("",), ('a"b',), ("a\nb",), ("a\\",), ("bob", "--group", "bob"), ("bob", "--group", "x y")],
)
def test_what_the_configuration_would_refuse(ctl: Ctl, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    path = tmp_path / "key.txt"
    path.write_text(X25519Identity.generate().encode())
    path.chmod(0o600)
    name, *rest = arguments
    ctl.bare("operator", "add", *rest, "--key-file", str(path), "--json", "--", name).refused(
        Exit.USAGE, "BadRequest"
    )


def test_a_file_with_two_keys_is_ambiguous(ctl: Ctl, tmp_path: Path) -> None:
    path = tmp_path / "key.txt"
    path.write_text("\n".join(X25519Identity.generate().encode() for _ in range(2)))
    path.chmod(0o600)
    ctl.bare("operator", "add", "a", "--key-file", str(path), "--json").refused(Exit.USAGE, "BadRequest")


# --- a passphrase


class Typist:
    """Types these answers one after the other, and sees what is shown on the terminal alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
        self.asked: list[str] = []
        self.shown: list[str] = []
        self._answers = list(answers)
        monkeypatch.setattr(terminal, "ask_secret", self._ask)
        monkeypatch.setattr(terminal, "tell", self.shown.append)

    def _ask(self, question: str) -> str:
        self.asked.append(question)
        if not self._answers:  # what was shown is copied
            return self.shown[-1].split(": ", 1)[1].rstrip("\n")
        return self._answers.pop(0)


def test_a_passphrase(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    typist = Typist(monkeypatch, LONG, LONG)
    result = ctl.bare("operator", "add", "alice", "--passphrase")
    operator = configured(result)
    assert operator.passphrase is not None
    expected = derive(memoryview(LONG.encode()), Parameters.parse(operator.passphrase)).recipient
    assert operator.recipient == str(expected)
    assert "can try passphrases" in result.err
    assert LONG not in result.out + result.err
    told = (result.out.split("argon2id")[0] + result.err).replace(operator.recipient, "")
    assert str(len(LONG)) not in told  # its length is a hint, too
    assert len(typist.asked) == 2


def test_a_passphrase_can_be_made(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    typist = Typist(monkeypatch, "")
    result = ctl.bare("operator", "add", "alice", "--passphrase", "--json")
    (shown,) = typist.shown
    words = shown.split(": ")[1].split()
    assert len(words) == 8
    facts = result.json
    parameters = Parameters.parse(str(facts["passphrase"]))
    assert facts["recipient"] == str(derive(memoryview(" ".join(words).encode()), parameters).recipient)
    assert " ".join(words) not in result.out + result.err


@pytest.mark.parametrize("answers", [("short", "short"), (LONG, LONG + "r")])
def test_a_passphrase_that_will_not_do(
    ctl: Ctl, monkeypatch: pytest.MonkeyPatch, answers: tuple[str, ...]
) -> None:
    Typist(monkeypatch, *answers)
    result = ctl.bare("operator", "add", "alice", "--passphrase", "--json")
    assert LONG not in result.refused(Exit.USAGE, "BadRequest").err


# --- hardware


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    with Desk() as desk:
        yield desk


@pytest.fixture
def card(desk: Desk) -> PivCard:
    return desk.place(PivCard(vendor=Vendor()))


@pytest.mark.xdist_group("pcscd-operator-add")
class TestPiv:
    def test_the_card_says_everything_without_a_pin(self, ctl: Ctl, card: PivCard) -> None:
        card.slots[0x9D] = card.made(0x9D, pin_policy=ONCE, touch_policy=TOUCH_ALWAYS)
        result = ctl.bare("operator", "add", "alice", "--piv")
        assert configured(result).recipient == recipient_of(card)
        for word in (str(SERIAL), "9D", "policy once", "policy always", "its own word only"):
            assert word in result.err
        assert str(SERIAL) in result.out.splitlines()[0]
        assert card.seen.pins == 0
        assert card.seen.points == []

    def test_attested_up_to_the_vendor(self, ctl: Ctl, card: PivCard, tmp_path: Path) -> None:
        ca = tmp_path / "ca.pem"
        ca.write_bytes(card.vendor.pem)
        arguments = ("operator", "add", "alice", "--piv", str(SERIAL), "--attestation-ca", str(ca))
        result = ctl.bare(*arguments)
        assert configured(result).recipient == recipient_of(card)
        assert f"verified up to CN={card.vendor.name}" in result.err
        facts = ctl.bare(*arguments, "--json").json
        assert facts["attestation"] is not None
        assert json.loads(json.dumps(facts["attestation"]))["anchor"] == "vendor"

    def test_another_vendor(self, ctl: Ctl, card: PivCard, tmp_path: Path) -> None:
        ca = tmp_path / "ca.pem"
        ca.write_bytes(Vendor("Another").pem)
        result = ctl.bare("operator", "add", "a", "--piv", "--attestation-ca", str(ca), "--json")
        result.refused(Exit.CARD, "AttestationInvalid")

    def test_a_key_that_was_brought_in(self, ctl: Ctl, card: PivCard, tmp_path: Path) -> None:
        card.slots[0x9D].generated = False
        result = ctl.bare("operator", "add", "alice", "--piv")
        assert configured(result).recipient == recipient_of(card)
        assert "attestation  none" in result.err
        ca = tmp_path / "ca.pem"
        ca.write_bytes(card.vendor.pem)
        result = ctl.bare("operator", "add", "a", "--piv", "--attestation-ca", str(ca), "--json")
        result.refused(Exit.CARD, "AttestationInvalid")

    def test_a_plain_card_does_not_say_much(self, ctl: Ctl, desk: Desk) -> None:
        plain = desk.place(PivCard(yubikey=False))
        result = ctl.bare("operator", "add", "alice", "--piv")
        assert configured(result).recipient == recipient_of(plain)
        assert result.err.count("does not say") == 2
        assert "none" in result.err

    def test_two_cards_are_ambiguous(self, ctl: Ctl, card: PivCard, desk: Desk) -> None:
        second = PivCard(serial=87654321)
        inserted = desk.service.insert(second, slot=1)
        try:
            result = ctl.bare("operator", "add", "a", "--piv", "--json")
            err = result.refused(Exit.USAGE, "BadRequest").err
            assert str(SERIAL) in err
            assert "87654321" in err
            operator = configured(ctl.bare("operator", "add", "a", "--piv", "87654321"))
            assert operator.recipient == recipient_of(second)
        finally:
            desk.service.pull(inserted, slot=1)

    def test_another_slot(self, ctl: Ctl, card: PivCard) -> None:
        operator = configured(ctl.bare("operator", "add", "a", "--piv", "--slot", "9A"))
        private = card.slots[0x9A].key
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert operator.recipient == str(P256Identity(private).recipient)
        ctl.bare("operator", "add", "a", "--piv", "--slot", "9E", "--json").refused(Exit.CARD, "WrongCard")

    def test_no_such_card(self, ctl: Ctl, card: PivCard) -> None:
        ctl.bare("operator", "add", "a", "--piv", "999", "--json").refused(Exit.CARD, "CardMissing")

    def test_a_bundle_that_cannot_be_read(self, ctl: Ctl, card: PivCard, tmp_path: Path) -> None:
        for path in (tmp_path / "missing", tmp_path / "odd"):
            (tmp_path / "odd").write_bytes(os.urandom(100))
            result = ctl.bare("operator", "add", "a", "--piv", "--attestation-ca", str(path), "--json")
            result.refused(Exit.STORED_DATA, "IdentityInvalid")

    def test_an_openpgp_card(self, ctl: Ctl, desk: Desk) -> None:
        desk.place(PivCard())
        emulated = OpenPgpCard()
        inserted = desk.service.insert(emulated, slot=1)
        try:
            result = ctl.bare("operator", "add", "bob", "--openpgp", OPENPGP_SERIAL)
            assert configured(result).recipient == str(P256Identity(emulated.key).recipient)
            assert "policy once" in result.err
            assert not any(command[1] == 0x20 for command in emulated.commands[1:] if command[3] == 0x82)
            facts = ctl.bare("operator", "add", "bob", "--openpgp", "--json").json
            assert facts["pin_policy"] == "once"
            ctl.bare("operator", "add", "b", "--openpgp", "1", "--json").refused(Exit.CARD, "CardMissing")
        finally:
            desk.service.pull(inserted, slot=1)
            emulated.close()

    def test_no_pcsc_service(self, ctl: Ctl, desk: Desk) -> None:
        with desk.service.away():
            ctl.bare("operator", "add", "a", "--piv", "--json").refused(Exit.CARD, "ReaderMissing")


@pytest.mark.xdist_group("softhsm-operator-add")
def test_a_token(ctl: Ctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    hsm = SoftHsm.make(tmp_path / "hsm")
    hsm.add_token("ops")
    hsm.add_key("ops", "unlock", b"\x03", private)
    monkeypatch.setenv("SOFTHSM2_CONF", str(hsm.config))
    uri = hsm.uri(token="ops", object="unlock")
    result = ctl.bare("operator", "add", "carol", "--pkcs11", uri)
    assert configured(result).recipient == str(P256Identity(private).recipient)
    result = ctl.bare("operator", "add", "carol", "--pkcs11", "pkcs11:pin-value=123456", "--json")
    assert "123456" not in result.refused(Exit.USAGE, "BadRequest").err


# --- list and reload


@pytest.fixture
def daemon(ctl: Ctl) -> Iterator[StubDaemon]:
    with StubDaemon(ctl.runtime_dir) as stub:
        yield stub


def add_operators(ctl: Ctl, *names: str) -> dict[str, str]:
    recipients = {name: str(X25519Identity.generate().recipient) for name in names}
    with ctl.config.open("a") as file:
        for name, recipient in recipients.items():
            file.write(f'[[operator]]\nname = "{name}"\nrecipient = "{recipient}"\ngroups = ["g-{name}"]\n')
    return recipients


def test_operators_are_listed(ctl: Ctl, daemon: StubDaemon) -> None:
    recipients = add_operators(ctl, "alice", "bob", "carol")
    proven = [{"name": "alice", "proven": 1700000000}, {"name": "bob", "proven": None}]
    daemon.answers["Admin.Status"] = {"status": {"operators": proven}}
    result = ctl("operator", "list")
    assert result.code == 0
    alice, bob, carol = result.out.splitlines()[1:4]
    assert "2023-11-14" in alice
    assert "never proven" in bob
    assert "not in use" in carol
    assert all(recipients[line.split()[0]] in line for line in (alice, bob, carol))
    facts = ctl("operator", "list", "--json").json
    assert list(facts) == ["operators", "threshold", "require"]
    listed = facts["operators"]
    assert isinstance(listed, list)
    assert listed[0] == {
        "name": "alice",
        "recipient": recipients["alice"],
        "groups": ["g-alice"],
        "passphrase": False,
        "in_use": True,
        "proven": 1700000000,
    }


def test_no_operators(ctl: Ctl, daemon: StubDaemon) -> None:
    daemon.answers["Admin.Status"] = {"status": {"operators": []}}
    assert "operator add" in ctl("operator", "list").out
