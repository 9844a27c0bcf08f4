"""A passphrase as an operator's key: parameters that are read strictly, and a derivation that never changes."""

import base64
import os

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.kdf import argon2
from hypothesis import given
from hypothesis import strategies as st

from unsealerd.core.age import X25519Identity
from unsealerd.core.passphrase import (
    MAX_LANES,
    MAX_MEMORY,
    MAX_PASSES,
    MIN_MEMORY,
    MIN_PASSES,
    Parameters,
    derive,
)
from unsealerd.errors import BadMessage, BadRequest, LimitExceeded, NotInstalled, PinCancelled
from unsealerd.operator.identities.passphrase import PassphraseOperator
from unsealerd.operator.prompts import PinRequest

SALT = base64.urlsafe_b64encode(bytes(range(16))).rstrip(b"=").decode()
CHEAPEST = f"argon2id$v=19$m={MIN_MEMORY},t={MIN_PASSES},p=1${SALT}"

# Made with argon2-cffi 25, which is another library with another implementation (the reference one).
VECTORS = [
    (
        "correct horse bättery staple",
        CHEAPEST,
        "8cfd2ad631d50ed1dd6886509d130bb1af505469929fd866a098dcd852af6f8d",
    ),
    (
        "x",
        f"argon2id$v=19$m=70000,t=3,p=4${'A' * 22}",
        "3b153e79e55bf47132ff7e200033a5be700149800da1a28fbd9646059cddc881",
    ),
]


class Person:
    """Answers with what they know, and counts how often they are asked."""

    def __init__(self, passphrase: bytes) -> None:
        self.asked: list[str] = []
        self._passphrase = passphrase

    def pin(self, request: PinRequest) -> bytes:
        raise AssertionError(f"asked for the PIN of {request.device}")

    def passphrase(self, what: str) -> bytes:
        self.asked.append(what)
        return self._passphrase


def same(one: X25519Identity, scalar: bytes) -> bool:
    """Two keys are the same if their public parts are."""
    return one.recipient == X25519Identity(X25519PrivateKey.from_private_bytes(scalar)).recipient


@pytest.mark.parametrize(("passphrase", "parameters", "scalar"), VECTORS)
def test_the_key_of_a_passphrase_never_changes(passphrase: str, parameters: str, scalar: str) -> None:
    found = derive(memoryview(bytearray(passphrase.encode())), Parameters.parse(parameters))
    assert same(found, bytes.fromhex(scalar))
    assert not same(found, bytes(32))


def test_another_passphrase_salt_or_cost_is_another_key() -> None:
    first = derive(memoryview(b"correct horse"), Parameters.parse(CHEAPEST)).recipient
    others = [
        (b"correct horsf", CHEAPEST),
        (b"correct horse", CHEAPEST.replace("$AA", "$BA")),
        (b"correct horse", CHEAPEST.replace("t=2", "t=3")),
    ]
    found = {
        str(derive(memoryview(passphrase), Parameters.parse(text)).recipient) for passphrase, text in others
    }
    assert len(found | {str(first)}) == 4


# --- the text


@given(
    st.integers(MIN_MEMORY, MAX_MEMORY),
    st.integers(MIN_PASSES, MAX_PASSES),
    st.integers(1, MAX_LANES),
    st.binary(min_size=16, max_size=16),
)
def test_parameters_have_one_spelling(memory: int, passes: int, lanes: int, salt: bytes) -> None:
    parameters = Parameters(memory, passes, lanes, salt)
    assert Parameters.parse(str(parameters)) == parameters


@given(st.text() | st.from_regex(r"argon2id\$v=19\$m=\d+,t=\d+,p=\d+\$[\w-]{20,24}", fullmatch=True))
def test_whatever_is_read_is_what_would_be_written(text: str) -> None:
    try:
        parameters = Parameters.parse(text)
    except BadRequest:
        return
    assert str(parameters) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        CHEAPEST + "\n",
        " " + CHEAPEST,
        CHEAPEST.replace("argon2id", "argon2i"),
        CHEAPEST.replace("argon2id", "ARGON2ID"),
        CHEAPEST.replace("v=19", "v=16"),
        CHEAPEST.replace("m=", "m=0"),
        CHEAPEST.replace(f"m={MIN_MEMORY}", f"m={MIN_MEMORY - 1}"),
        CHEAPEST.replace(f"m={MIN_MEMORY}", f"m={MAX_MEMORY + 1}"),
        CHEAPEST.replace(f"m={MIN_MEMORY}", "m=8"),
        CHEAPEST.replace("t=2", "t=1"),
        CHEAPEST.replace("t=2", f"t={MAX_PASSES + 1}"),
        CHEAPEST.replace("p=1", "p=0"),
        CHEAPEST.replace("p=1", f"p={MAX_LANES + 1}"),
        CHEAPEST.replace("t=2,p=1", "p=1,t=2"),
        CHEAPEST[:-1],
        CHEAPEST + "A",
        CHEAPEST + "==",
        CHEAPEST[:-1] + "x",  # base64 with bits behind its end
        CHEAPEST.replace("m=65536", "m=٦٥٥٣٦"),
        CHEAPEST.replace("m=65536", "m=" + "9" * 5000),
    ],
)
def test_odd_parameters_are_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        Parameters.parse(text)


def test_each_operator_has_a_salt_of_their_own() -> None:
    made = [Parameters.make() for _ in range(3)]
    assert len({parameters.salt for parameters in made}) == 3
    assert Parameters.parse(str(made[0])) == made[0]


# --- the machine


def test_too_little_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, **_: object) -> None: ...
        def derive_into(self, *_: object) -> None:
            raise MemoryError

    monkeypatch.setattr(argon2, "Argon2id", Full)
    with pytest.raises(LimitExceeded, match="65536 KiB"):
        derive(memoryview(b"x"), Parameters.parse(CHEAPEST))


def test_an_old_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def old(**_: object) -> None:
        raise UnsupportedAlgorithm("argon2")

    monkeypatch.setattr(argon2, "Argon2id", old)
    with pytest.raises(NotInstalled, match=r"OpenSSL 3\.2"):
        derive(memoryview(b"x"), Parameters.parse(CHEAPEST))


# --- the operator


def test_the_operator_is_asked_when_there_are_parameters() -> None:
    person = Person("correct horse bättery staple".encode())
    operator = PassphraseOperator("alice", person)
    assert operator.device == "passphrase of operator alice"
    assert person.asked == []
    identity = operator.identity(CHEAPEST)
    assert person.asked == ["operator alice"]
    expected = X25519Identity(X25519PrivateKey.from_private_bytes(bytes.fromhex(VECTORS[0][2])))
    assert identity.recipient == expected.recipient
    point = X25519Identity.generate().recipient.public
    assert identity.exchange(point) == expected.exchange(point)


@pytest.mark.promise(5)
@pytest.mark.parametrize(
    "text", [CHEAPEST.replace("t=2", "t=1"), CHEAPEST.replace("65536", "1024"), "", "\x1b"]
)
def test_a_host_that_asks_for_a_cheap_derivation_learns_nothing(text: str) -> None:
    person = Person(os.urandom(8))
    with pytest.raises(BadMessage, match="operator alice"):
        PassphraseOperator("alice", person).identity(text)
    assert person.asked == []


def test_nobody_to_ask() -> None:
    class Nobody(Person):
        def passphrase(self, what: str) -> bytes:
            raise PinCancelled("nobody")

    with pytest.raises(PinCancelled):
        PassphraseOperator("alice", Nobody(b"")).identity(CHEAPEST)
    with pytest.raises(BadRequest, match="passphrase:NAME"):
        PassphraseOperator("", Nobody(b""))


def test_a_passphrase_shows_nowhere() -> None:
    person = Person(b"correct horse battery")
    operator = PassphraseOperator("alice", person)
    identity = operator.identity(CHEAPEST)
    assert "horse" not in f"{operator!r}{identity!r}{operator.device}"
