"""Unlocking with a PIV card: honest and hostile cards and hosts, and once with the whole daemon."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from rigs.desk import Desk
from rigs.memory_host import MemoryHost
from rigs.person import Person
from rigs.pivcard import PIN, PivCard, point_of
from rigs.server import Server

from unsealerd.client.connection import Connection
from unsealerd.core.age import P256Identity, X25519Identity
from unsealerd.errors import BadAnswer, BadPoint, CardFailed, PinBlocked, PinLastTry, PinWrong
from unsealerd.model import State
from unsealerd.operator.conversation import VarlinkConversation
from unsealerd.operator.unlock import unlock

pytestmark = pytest.mark.xdist_group("piv-unlock")


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    with Desk() as desk:
        yield desk


@pytest.fixture
def card(desk: Desk) -> PivCard:
    return desk.place(PivCard())


def decoys() -> list[P256Identity | X25519Identity]:
    return [P256Identity(ec.generate_private_key(ec.SECP256R1())), X25519Identity.generate()]


def says(x: bytes) -> bytes:
    """The answer of a card to a key agreement."""
    return b"\x7c" + bytes([len(x) + 2]) + b"\x82" + bytes([len(x)]) + x + b"\x90\x00"


def unliftable() -> bytes:
    while True:
        x = os.urandom(32)
        with suppress(ValueError):
            ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x02" + x)
            continue
        return x


def of_another_session() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    return key.exchange(ec.ECDH(), ec.generate_private_key(ec.SECP256R1()).public_key())


HOSTILE: dict[str, Callable[[], bytes]] = {
    "does not lift": unliftable,
    "zero": lambda: bytes(32),
    "another session's": of_another_session,
    "another whole point": lambda: point_of(ec.generate_private_key(ec.SECP256R1())),
    "too short": lambda: os.urandom(31),
    "empty": lambda: b"",
    "too long": lambda: os.urandom(33),
    "off the curve": lambda: b"\x04" + os.urandom(64),
}


@pytest.mark.promise(4)
def test_two_hundred_unlocks_with_honest_and_hostile_cards(desk: Desk, card: PivCard) -> None:
    """Every second answer is right, as x or as the whole point; the others open nothing and have a name."""
    identity = desk.identity()
    kinds = list(HOSTILE)
    for turn in range(200):
        host = MemoryHost(*(each.recipient for each in decoys()), identity.recipient)
        card.whole_point = bool(turn & 2)
        if turn % 2 == 0:
            outcome = unlock(host, [identity])
            assert (outcome.state, outcome.accepted) == (State.UNLOCKED, (str(identity.recipient),))
            assert host.opened == host.file_key
            continue
        bad = HOSTILE[kinds[turn // 2 % len(kinds)]]()
        card.mangle = lambda head, answer, bad=bad: says(bad) if head[1] == 0x87 else answer
        with pytest.raises((BadAnswer, CardFailed)):
            unlock(host, [identity])
        card.mangle = None
        assert host.opened is None
    assert len(card.seen.points) == 200
    assert len(set(card.seen.points)) == 200


def twist(point: bytes) -> bytes:
    return point[:-1] + bytes([point[-1] ^ 1])


@pytest.mark.promise(5)
@pytest.mark.parametrize(
    "disguise",
    [
        twist,
        lambda point: b"\x00",
        lambda point: b"\x04" + bytes(64),
        lambda point: point[:64],
        lambda point: point + b"\0",
        lambda point: b"\x02" + point[1:33],
        lambda point: os.urandom(32),
        lambda point: point_of(ec.generate_private_key(ec.SECP384R1())),
        lambda point: point_of(ec.generate_private_key(ec.SECP256K1())),
    ],
    ids=["off the curve", "identity", "zeros", "short", "long", "compressed", "X25519", "P-384", "secp256k1"],
)
def test_a_hostile_host_does_not_reach_the_card(
    desk: Desk, card: PivCard, disguise: Callable[[bytes], bytes]
) -> None:
    person = Person(PIN)
    identity = desk.identity(person)
    card.forget()
    for _ in range(10):
        with pytest.raises(BadPoint):
            unlock(MemoryHost(identity.recipient, disguise=disguise), [identity])
    assert (card.seen.points, card.seen.commands, person.asked) == ([], [], [])


def test_the_card_unlocks_a_real_daemon_and_its_mistakes_do_not(desk: Desk, card: PivCard) -> None:
    person = Person(b"000000")
    identity = desk.identity(person)
    with Server(tpm=False) as server:
        server.operators = {"alice": str(server.identity.recipient), "carol": str(identity.recipient)}
        server.configure()
        server.start()
        server.ctl("init")
        key = server.key()
        server.kill()
        server.ended()
        server.start()
        server.assert_locked("unexpected_reboot")

        def attempt() -> State:
            with Connection(server.run_dir / "admin") as connection:
                return unlock(VarlinkConversation(connection.call), [identity], reason="a card").state

        for error in (PinWrong, PinWrong, PinLastTry):
            with pytest.raises(error):
                attempt()
        card.tries = 0
        with pytest.raises(PinBlocked):
            attempt()
        server.assert_locked("unexpected_reboot")
        card.tries, person.pins = 3, PIN
        assert attempt() is State.UNLOCKED
        assert server.key() == key
        (record,) = (each for each in server.audit() if each["event"] == "unlocked")
        assert "carol" in str(record)
