"""One unlock session in memory, both ends real: only the right answer, to this session, in time and once, opens."""

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from unsealerd.core.age import Header, Identity, P256Identity, Stanza, X25519Identity, encrypt, parse_header
from unsealerd.core.age.header import write_header
from unsealerd.core.rules import KnownOperator
from unsealerd.core.secret import SecretBuffer
from unsealerd.core.session import (
    LIFETIME,
    MAX_QUESTIONS,
    MAX_TAGS,
    Answer,
    Outcome,
    Question,
    UnlockSession,
    recipient_tag,
)
from unsealerd.core.sharing import Backup
from unsealerd.errors import BackupDamaged, BadMessage, NotAnOperator, SessionExpired
from unsealerd.model import Curve

NOW = 5000  # of a monotonic clock
FILE_KEY = bytes.fromhex("c0ffee00112233445566778899aabbcc")
NONCE = bytes(range(32))
CURVES = pytest.mark.parametrize("curve", Curve, ids=[curve.value for curve in Curve])


def identity_on(curve: Curve) -> Identity:
    match curve:
        case Curve.P256:
            return P256Identity(ec.generate_private_key(ec.SECP256R1()))
        case Curve.X25519:
            return X25519Identity.generate()


def backup_for(*identities: Identity) -> Header:
    with SecretBuffer.copy_of(FILE_KEY) as file_key:
        return parse_header(encrypt(memoryview(b"keyring"), file_key, [i.recipient for i in identities]))


def header_of(*stanzas: Stanza) -> Header:
    with SecretBuffer.copy_of(FILE_KEY) as file_key:
        return parse_header(write_header(stanzas, file_key).encode())


def known(*identities: Identity) -> list[KnownOperator]:
    return [KnownOperator(f"operator-{number}", i.recipient) for number, i in enumerate(identities)]


def tags_of(*identities: Identity, nonce: bytes = NONCE) -> list[bytes]:
    return [recipient_tag(nonce, str(identity.recipient)) for identity in identities]


@dataclass
class Server:
    """A host with these operators, whose backup opens to them."""

    identities: Sequence[Identity]
    header: Header | None = None

    def challenge(self, *asked: Identity) -> tuple[UnlockSession, tuple[Question, ...]]:
        session = UnlockSession(os.urandom(16), NOW)
        return session, self.hello(session, *asked)

    def hello(self, session: UnlockSession, *asked: Identity, now: int = NOW) -> tuple[Question, ...]:
        return session.hello(
            version=1,
            nonce=NONCE,
            tags=tags_of(*(asked or self.identities)),
            operators=known(*self.identities),
            backup=Backup.of(self.header or backup_for(*self.identities)),
            now=now,
        )


def x_of(identity: Identity, question: Question) -> bytes:
    with identity.exchange(question.point) as x:
        return bytes(x.view)


def answers_of(identity: Identity, questions: Sequence[Question]) -> list[Answer]:
    return [Answer(number, x_of(identity, q)) for number, q in enumerate(questions)]


def judged(
    session: UnlockSession, name: bytes, answers: Sequence[Answer], now: int
) -> tuple[SecretBuffer | None, tuple[Outcome, ...]]:
    judgement = session.answer(name, answers, now)
    assert judgement.shares == {}
    return judgement.file_key, judgement.outcomes


def taken(file_key: SecretBuffer | None) -> bytes:
    assert file_key is not None
    with file_key:
        return bytes(file_key.view)


# --- it opens


@CURVES
def test_the_operator_opens_the_backup(curve: Curve) -> None:
    alice = identity_on(curve)
    session, questions = Server([alice]).challenge()
    assert [(q.curve, q.tag) for q in questions] == [(curve, tags_of(alice)[0])]
    file_key, outcomes = judged(session, session.id, answers_of(alice, questions), NOW)
    assert taken(file_key) == FILE_KEY
    assert [(o.question, o.operator, o.result) for o in outcomes] == [(0, "operator-0", "accepted")]


@pytest.mark.parametrize("at", range(4))
def test_any_operator_opens_it_among_many(at: int) -> None:
    """X25519 stanzas carry no name, so such an operator is asked for each; one of the answers opens one of them."""
    everybody = [identity_on(c) for c in (Curve.X25519, Curve.P256, Curve.X25519, Curve.P256)]
    session, questions = Server(everybody).challenge(everybody[at])
    x25519 = everybody[at].recipient.curve is Curve.X25519
    assert len(questions) == (2 if x25519 else 1)
    assert session.operators == (f"operator-{at}",)
    file_key, outcomes = judged(session, session.id, answers_of(everybody[at], questions), NOW)
    assert taken(file_key) == FILE_KEY
    assert sorted(o.result for o in outcomes) == (["BadAnswer"] if x25519 else []) + ["accepted"]


def test_two_operators_at_once_both_count() -> None:
    alice, bob = identity_on(Curve.P256), identity_on(Curve.X25519)
    session, questions = Server([alice, bob]).challenge()
    assert session.operators == ("operator-0", "operator-1")
    answers = [
        Answer(number, x_of(alice if q.curve is Curve.P256 else bob, q)) for number, q in enumerate(questions)
    ]
    file_key, outcomes = judged(session, session.id, answers, NOW)
    assert taken(file_key) == FILE_KEY
    assert {(o.operator, o.result) for o in outcomes} == {
        ("operator-0", "accepted"),
        ("operator-1", "accepted"),
    }


@CURVES
def test_a_wrong_answer_is_its_operators_and_the_others_stay_valid(curve: Curve) -> None:
    alice, mallory = identity_on(curve), identity_on(Curve.P256)
    session, questions = Server([mallory, alice]).challenge()
    answers = [
        Answer(n, x_of(alice if q.tag == tags_of(alice)[0] else identity_on(Curve.P256), q))
        for n, q in enumerate(questions)
    ]
    file_key, outcomes = judged(session, session.id, answers, NOW)
    assert taken(file_key) == FILE_KEY
    assert {o.operator for o in outcomes if o.result == "accepted"} == {"operator-1"}
    assert {o.operator for o in outcomes if o.result == "BadAnswer"} == {"operator-0"}


def test_not_every_question_need_be_answered() -> None:
    alice, bob = identity_on(Curve.P256), identity_on(Curve.P256)
    session, questions = Server([alice, bob]).challenge()
    file_key, outcomes = judged(session, session.id, [Answer(1, x_of(bob, questions[1]))], NOW)
    assert taken(file_key) == FILE_KEY
    assert [o.operator for o in outcomes] == ["operator-1"]


def test_only_who_offers_is_asked() -> None:
    alice, bob = identity_on(Curve.P256), identity_on(Curve.P256)
    session, questions = Server([alice, bob]).challenge(bob)
    assert [q.tag for q in questions] == tags_of(bob)
    assert session.operators == ("operator-1",)


def test_questions_are_bounded() -> None:
    everybody = [identity_on(Curve.X25519) for _ in range(9)]
    _, questions = Server(everybody).challenge()
    assert len(questions) == MAX_QUESTIONS < 81


# --- who is nobody


@CURVES
def test_a_stranger_is_not_asked(curve: Curve) -> None:
    server = Server([identity_on(Curve.P256), identity_on(Curve.X25519)])
    with pytest.raises(NotAnOperator):
        server.challenge(identity_on(curve))


def test_an_operator_whose_stanza_is_not_in_the_backup_yet_is_not_asked() -> None:
    old, new = identity_on(Curve.P256), identity_on(Curve.P256)
    with pytest.raises(NotAnOperator):
        Server([old, new], backup_for(old)).challenge(new)


def test_an_operator_who_was_removed_is_not_asked() -> None:
    removed, kept = identity_on(Curve.X25519), identity_on(Curve.P256)
    with pytest.raises(NotAnOperator):
        Server([kept], backup_for(removed, kept)).challenge(removed)


def test_an_x25519_operator_who_was_just_added_is_asked_and_cannot_answer() -> None:
    """Nothing says whose an X25519 stanza is; the unwrap does."""
    old, new = identity_on(Curve.X25519), identity_on(Curve.X25519)
    session, questions = Server([old, new], backup_for(old)).challenge(new)
    file_key, outcomes = judged(session, session.id, answers_of(new, questions), NOW)
    assert file_key is None
    assert [o.result for o in outcomes] == ["BadAnswer"]


@pytest.mark.promise(4)
def test_a_tag_is_bound_to_the_nonce_and_says_nothing_without_the_recipient() -> None:
    alice = identity_on(Curve.P256)
    first, second = tags_of(alice, nonce=bytes(32)), tags_of(alice, nonce=NONCE)
    assert first != second
    assert len(first[0]) == 16
    with pytest.raises(NotAnOperator):  # a tag seen in another session finds nobody
        UnlockSession(bytes(16), NOW).hello(
            version=1,
            nonce=NONCE,
            tags=first,
            operators=known(alice),
            backup=Backup.of(backup_for(alice)),
            now=NOW,
        )
    assert recipient_tag(NONCE, str(alice.recipient).upper()) == second[0]


# --- out of order, twice, late


@CURVES
def test_an_answer_before_the_hello(curve: Curve) -> None:
    session = UnlockSession(bytes(16), NOW)
    with pytest.raises(BadMessage):
        judged(session, session.id, [Answer(0, bytes(32))], NOW)
    alice = identity_on(curve)  # and the session is not spoiled by it
    questions = Server([alice]).hello(session)
    assert taken(judged(session, session.id, answers_of(alice, questions), NOW)[0]) == FILE_KEY


def test_a_second_hello() -> None:
    alice = identity_on(Curve.P256)
    server = Server([alice])
    session, questions = server.challenge()
    with pytest.raises(BadMessage):
        server.hello(session)
    assert taken(judged(session, session.id, answers_of(alice, questions), NOW)[0]) == FILE_KEY


@CURVES
@pytest.mark.parametrize("right", [True, False])
def test_a_second_answer(curve: Curve, right: bool) -> None:
    """Whatever came of the first: an answer that fails costs the session, so that nobody tries one after the other."""
    alice = identity_on(curve)
    session, questions = Server([alice]).challenge()
    answers = answers_of(alice, questions)
    first, _ = judged(session, session.id, answers if right else [Answer(0, os.urandom(32))], NOW)
    assert (first is not None) == right
    with pytest.raises(SessionExpired):
        judged(session, session.id, answers, NOW)
    with pytest.raises(SessionExpired):
        Server([alice]).hello(session)


@pytest.mark.parametrize(("late", "opens"), [(LIFETIME - 1, True), (LIFETIME, False), (LIFETIME + 1, False)])
def test_the_deadline(late: int, opens: bool) -> None:
    alice = identity_on(Curve.P256)
    server = Server([alice])
    session, questions = server.challenge()
    assert session.deadline == NOW + LIFETIME
    answers = answers_of(alice, questions)
    if opens:
        assert taken(judged(session, session.id, answers, NOW + late)[0]) == FILE_KEY
        return
    with pytest.raises(SessionExpired):
        judged(session, session.id, answers, NOW + late)
    with pytest.raises(SessionExpired):  # a clock that goes back does not bring it back
        judged(session, session.id, answers, NOW)
    with pytest.raises(SessionExpired):
        server.hello(UnlockSession(bytes(16), NOW), now=NOW + late)


@pytest.mark.promise(1)
def test_a_closed_session_holds_no_scalar() -> None:
    alice = identity_on(Curve.P256)
    session, questions = Server([alice]).challenge()
    pending = session._pending[0].blinding  # what it holds is the secret
    session.close()
    with pytest.raises(SessionExpired):
        pending.unblind(x_of(alice, questions[0]))
    with pytest.raises(SessionExpired):
        judged(session, session.id, answers_of(alice, questions), NOW)
    session.close()


# --- promise 4: an answer is for one session


@pytest.mark.promise(4)
@CURVES
def test_an_answer_for_one_session_opens_nothing_in_another(curve: Curve) -> None:
    alice = identity_on(curve)
    server = Server([alice], backup_for(alice))
    (one, asked), (other, _) = server.challenge(), server.challenge()
    answers = answers_of(alice, asked)
    with pytest.raises(BadMessage):  # as it is: it carries the other's name
        judged(other, one.id, answers, NOW)
    file_key, outcomes = judged(other, other.id, answers, NOW)  # renamed: it does not open
    assert file_key is None
    assert [o.result for o in outcomes] == ["BadAnswer"]
    assert taken(judged(one, one.id, answers, NOW)[0]) == FILE_KEY  # where it belongs, it does


@pytest.mark.promise(4)
@CURVES
def test_two_sessions_on_one_backup_share_no_bytes(curve: Curve) -> None:
    alice = identity_on(curve)
    server = Server([alice], backup_for(alice))
    (one, first), (other, second) = server.challenge(), server.challenge()
    assert one.id != other.id
    assert first[0].point != second[0].point
    assert x_of(alice, first[0]) != x_of(alice, second[0])
    share = alice.recipient.ephemeral(server.header.stanzas[0]) if server.header else None
    assert share is not None
    assert share not in (first[0].point, second[0].point)


@pytest.mark.promise(4)
def test_two_questions_of_one_session_are_blinded_apart() -> None:
    """The same stanza, asked of two operators, is two points that do not look alike."""
    alice, bob = identity_on(Curve.X25519), identity_on(Curve.X25519)
    session, questions = Server([alice, bob]).challenge()
    assert len({q.point for q in questions}) == len(questions) == 4
    swapped = [Answer(n, x_of(alice, questions[(n + 1) % 4])) for n in range(4)]
    assert judged(session, session.id, swapped, NOW)[0] is None


@pytest.mark.parametrize("session_id", [b"", bytes(15), bytes(16), bytes(17), bytes(1000)])
def test_a_wrong_session_id_is_refused_and_costs_nothing(session_id: bytes) -> None:
    alice = identity_on(Curve.P256)
    session, questions = Server([alice]).challenge()
    answers = answers_of(alice, questions)
    with pytest.raises(BadMessage):
        judged(session, session_id, answers, NOW)
    assert taken(judged(session, session.id, answers, NOW)[0]) == FILE_KEY


# --- hostile messages


@pytest.mark.promise(10)
@pytest.mark.parametrize(
    ("version", "nonce", "tags"),
    [
        (0, NONCE, [bytes(16)]),
        (2, NONCE, [bytes(16)]),
        (-1, NONCE, [bytes(16)]),
        (2**70, NONCE, [bytes(16)]),
        (1, b"", [bytes(16)]),
        (1, bytes(31), [bytes(16)]),
        (1, bytes(33), [bytes(16)]),
        (1, NONCE, []),
        (1, NONCE, [b""]),
        (1, NONCE, [bytes(15)]),
        (1, NONCE, [bytes(17)]),
        (1, NONCE, [bytes(16)] * (MAX_TAGS + 1)),
    ],
)
def test_a_malformed_hello(version: int, nonce: bytes, tags: list[bytes]) -> None:
    alice = identity_on(Curve.P256)
    session = UnlockSession(bytes(16), NOW)
    with pytest.raises(BadMessage):
        session.hello(
            version=version,
            nonce=nonce,
            tags=tags,
            operators=known(alice),
            backup=Backup.of(backup_for(alice)),
            now=NOW,
        )


@pytest.mark.promise(10)
@pytest.mark.parametrize("questions", [[], [1], [-1], [0, 0], [0, 1], [2**70]])
def test_an_answer_to_what_was_not_asked(questions: list[int]) -> None:
    alice = identity_on(Curve.P256)
    session, asked = Server([alice]).challenge()
    x = x_of(alice, asked[0])
    with pytest.raises(BadMessage):
        judged(session, session.id, [Answer(number, x) for number in questions], NOW)


HOSTILE = [
    b"",
    b"\0",
    bytes(31),
    bytes(32),
    bytes(33),
    b"\x00" * 65,
    b"\x04" + bytes(64),
    b"\x01" + bytes(31),
    b"\xff" * 32,
    b"\xff" * 65,
    bytes([237]) + b"\xff" * 30 + b"\x7f",  # the prime of Curve25519
    bytes(4096),
    os.urandom(31),
    os.urandom(32),
    os.urandom(65),
]


@pytest.mark.promise(10)
@CURVES
@pytest.mark.parametrize("x", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_answer_is_a_bad_answer(curve: Curve, x: bytes) -> None:
    session, _ = Server([identity_on(curve)]).challenge()
    file_key, outcomes = judged(session, session.id, [Answer(0, x)], NOW)
    assert file_key is None
    assert [o.result for o in outcomes] == ["BadAnswer"]


SHARED = {curve: identity_on(curve) for curve in Curve}


@pytest.mark.promise(10)
@given(st.sampled_from(Curve), st.binary(max_size=70) | st.binary(min_size=32, max_size=32))
def test_any_answer(curve: Curve, x: bytes) -> None:
    session, _ = Server([SHARED[curve]]).challenge()
    file_key, outcomes = judged(session, session.id, [Answer(0, x)], NOW)
    assert file_key is None
    assert [o.result for o in outcomes] == ["BadAnswer"]


@pytest.mark.promise(10)
@CURVES
@given(bit=st.integers(0, 255))
def test_an_answer_with_one_other_bit(curve: Curve, bit: int) -> None:
    alice = SHARED[curve]
    session, questions = Server([alice]).challenge()
    x = bytearray(x_of(alice, questions[0]))
    x[bit // 8] ^= 1 << bit % 8
    assert judged(session, session.id, [Answer(0, bytes(x))], NOW)[0] is None


def test_the_point_that_was_sent_is_no_answer() -> None:
    for curve, alice in SHARED.items():
        session, questions = Server([alice]).challenge()
        echo = questions[0].point[1:33] if curve is Curve.P256 else questions[0].point
        assert judged(session, session.id, [Answer(0, echo)], NOW)[0] is None


# --- a hostile backup


@CURVES
def test_a_header_that_was_changed_is_damage_and_gives_no_file_key(curve: Curve) -> None:
    """Somebody who can write the disk added a stanza: it opens, and the MAC says that it is not the header that was written."""
    alice = identity_on(curve)
    good = backup_for(alice)
    with SecretBuffer.copy_of(FILE_KEY) as file_key:
        more = alice.recipient.wrap(file_key)
    text = good.encode().replace(b"---", more.encode() + b"---")
    session, questions = Server([alice], parse_header(text)).challenge()
    with pytest.raises(BackupDamaged):
        judged(session, session.id, answers_of(alice, questions), NOW)
    with pytest.raises(SessionExpired):
        judged(session, session.id, answers_of(alice, questions), NOW)


def test_a_malformed_stanza_is_damage() -> None:
    alice, bob = identity_on(Curve.P256), identity_on(Curve.X25519)
    with SecretBuffer.copy_of(FILE_KEY) as file_key:
        good = alice.recipient.wrap(file_key)
    header = header_of(good, Stanza("X25519", ("AAAA",), bytes(32)))
    with pytest.raises(BackupDamaged):
        Server([alice, bob], header).challenge(bob)
    session, _ = Server([alice, bob], header).challenge(
        alice
    )  # who has nothing to do with it is not kept out
    with closing(session):
        pass


def test_stanzas_of_other_kinds_are_passed_over() -> None:
    alice = identity_on(Curve.P256)
    with SecretBuffer.copy_of(FILE_KEY) as file_key:
        good = alice.recipient.wrap(file_key)
    header = header_of(Stanza("mlkem768x25519", ("AAAA",), b"x" * 32), good, Stanza("grease", (), b""))
    session, questions = Server([alice], header).challenge()
    assert len(questions) == 1
    assert taken(judged(session, session.id, answers_of(alice, questions), NOW)[0]) == FILE_KEY
