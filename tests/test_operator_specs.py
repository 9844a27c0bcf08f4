"""What a person types to name an identity, and what is found without a name."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rigs.person import Person

from unsealerd.core.age import X25519Identity
from unsealerd.errors import (
    BadRequest,
    CardBusy,
    CardFailed,
    CardMissing,
    IdentityInvalid,
    NotInstalled,
    ReaderMissing,
    UnsealerdError,
    WrongCard,
)
from unsealerd.operator.events import OnEvent, ignore
from unsealerd.operator.identities import open_identities, openpgp, piv, pkcs11, plugged_in
from unsealerd.operator.identities.passphrase import PassphraseOperator
from unsealerd.operator.prompts import Prompts

Asked = list[tuple[str, object, bool]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Every kind of hardware is there, and says what it was asked for."""
    seen: Asked = []

    def found(kind: str) -> Callable[..., list[X25519Identity]]:
        def find(
            which: str | None, *slot: int, prompts: Prompts, on_event: OnEvent, last_try: bool = False
        ) -> list[X25519Identity]:
            seen.append((kind, (which, *slot) if slot else which, last_try))
            return [X25519Identity.generate()]

        return find

    for module, kind in ((piv, "piv"), (openpgp, "openpgp"), (pkcs11, "pkcs11")):
        monkeypatch.setattr(module, "find", found(kind))
    return seen


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("piv:", ("piv", (None, 0x9D), False)),
        ("piv:12345678", ("piv", ("12345678", 0x9D), False)),
        ("piv:12345678/83", ("piv", ("12345678", 0x83), False)),
        ("openpgp:", ("openpgp", None, False)),
        ("openpgp:0006:12345678", ("openpgp", "0006:12345678", False)),
        (
            "pkcs11:token=a;object=b?module-path=/x",
            ("pkcs11", "pkcs11:token=a;object=b?module-path=/x", False),
        ),
    ],
)
def test_a_spec_leads_to_its_kind(asked: Asked, spec: str, expected: tuple[str, object, bool]) -> None:
    person = Person()
    assert len(open_identities(spec, prompts=person)) == 1
    assert asked == [expected]
    open_identities(spec, prompts=person, last_try=True)
    assert asked[1] == (*expected[:2], True)


def test_a_passphrase_is_not_asked_for_yet() -> None:
    person = Person()  # who fails when they are asked
    (operator,) = open_identities("passphrase:alice", prompts=person)
    assert isinstance(operator, PassphraseOperator)
    assert operator.name == "alice"
    with pytest.raises(BadRequest):
        open_identities("passphrase:", prompts=person)


@pytest.mark.parametrize("name", ["key.txt", "piv", "PIV:x", "a:b", "./piv:x", "C:key"])
def test_everything_else_is_a_file(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    identity = X25519Identity.generate()
    Path(name).write_text(identity.encode())
    (found,) = open_identities(name, prompts=Person(), on_event=ignore)
    assert not isinstance(found, PassphraseOperator)
    assert found.recipient == identity.recipient
    assert asked == []
    with pytest.raises(IdentityInvalid):
        open_identities("piv :", prompts=Person())


def test_without_a_name_all_cards_are_found(asked: Asked) -> None:
    assert len(plugged_in(prompts=Person(), last_try=True)) == 2
    assert asked == [("piv", (None, 0x9D), True), ("openpgp", None, True)]


def failing(error: UnsealerdError) -> Callable[..., list[X25519Identity]]:
    def find(*_: object, **__: object) -> list[X25519Identity]:
        raise error

    return find


def test_one_kind_is_enough(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piv, "find", failing(WrongCard("an empty slot")))
    assert len(plugged_in(prompts=Person())) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (CardBusy("x"), CardMissing("y")),
        (CardFailed("x"), ReaderMissing("y")),
        (WrongCard("x"), NotInstalled("y")),
        (CardMissing("x"), ReaderMissing("y")),
        (ReaderMissing("x"), NotInstalled("y")),
    ],
)
def test_the_error_that_says_most_is_told(
    monkeypatch: pytest.MonkeyPatch, first: UnsealerdError, second: UnsealerdError
) -> None:
    for one, other in ((first, second), (second, first)):
        monkeypatch.setattr(piv, "find", failing(one))
        monkeypatch.setattr(openpgp, "find", failing(other))
        with pytest.raises(type(first)):
            plugged_in(prompts=Person())


def test_naming_a_file_or_a_passphrase_loads_no_card_library(tmp_path: Path) -> None:
    path = tmp_path / "key.txt"
    path.write_text(X25519Identity.generate().encode())
    code = (
        "import sys\n"
        "from unsealerd.cli import main\n"
        "from unsealerd.operator.identities import open_identities\n"
        f"open_identities({str(path)!r}, prompts=None)\n"
        "open_identities('passphrase:alice', prompts=None)\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('smartcard', 'pkcs11', 'grpc')"
        " or m.startswith(('unsealerd.operator.cards', 'unsealerd.operator.identities.p')) and 'pem' not in m])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['unsealerd.operator.identities.passphrase']"
