"""Unlock sessions where several operators are needed, in memory with both ends real; and drills, which open nothing."""

import os
import random
from collections.abc import Sequence

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from unsealerd.core.age import Identity, P256Identity, X25519Identity, parse_header
from unsealerd.core.age.header import Header, write_header
from unsealerd.core.blinding import P256_POINT_SIZE
from unsealerd.core.rules import KnownOperator, Rules
from unsealerd.core.secret import SecretBuffer
from unsealerd.core.session import (
    Answer,
    Judgement,
    Question,
    UnlockSession,
    recipient_tag,
)
from unsealerd.core.sharing import Backup, wrap
from unsealerd.errors import BackupDamaged, NotAnOperator, SessionExpired
from unsealerd.model import Curve, Purpose

NOW = 5000
FILE_KEY = bytes.fromhex("c0ffee00112233445566778899aabbcc")
NONCE = bytes(range(32))
KDF = "argon2id$v=19$m=65536,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA"


def identity_on(curve: Curve) -> Identity:
    if curve is Curve.P256:
        return P256Identity(ec.generate_private_key(ec.SECP256R1()))
    return X25519Identity.generate()


POOL = [identity_on(curve) for curve in (Curve.X25519, Curve.P256) * 4]


def operators(*identities: Identity, groups: Sequence[tuple[str, ...]] = ()) -> tuple[KnownOperator, ...]:
    return tuple(
        KnownOperator(f"op{i}", identity.recipient, groups[i] if groups else ())
        for i, identity in enumerate(identities)
    )


def header_by(rules: Rules) -> Header:
    with SecretBuffer.copy_of(FILE_KEY) as file_key:
        return parse_header(write_header(wrap(rules, file_key), file_key).encode())


def opened(
    backup: Backup,
    current: Sequence[KnownOperator],
    *asked: Identity,
    purpose: Purpose = Purpose.UNLOCK,
    tags_for: Purpose | None = None,
) -> tuple[UnlockSession, tuple[Question, ...]]:
    session = UnlockSession(os.urandom(16), NOW)
    tags = [recipient_tag(NONCE, str(each.recipient), tags_for or purpose) for each in asked]
    questions = session.hello(
        version=1, nonce=NONCE, tags=tags, operators=current, backup=backup, now=NOW, purpose=purpose
    )
    return session, questions


def x_of(identity: Identity, question: Question) -> bytes:
    with identity.exchange(question.point) as x:
        return bytes(x.view)


def right(identities: Sequence[Identity], questions: Sequence[Question]) -> list[Answer]:
    """Each question answered by whose tag it carries."""
    by_tag = {
        recipient_tag(NONCE, str(identity.recipient), purpose): identity
        for identity in identities
        for purpose in Purpose
    }
    return [Answer(number, x_of(by_tag[q.tag], q)) for number, q in enumerate(questions)]


def wiped(judgement: Judgement) -> None:
    for share in judgement.shares.values():
        share.close()


# --- several are needed


def test_each_operator_is_asked_one_question_and_gives_one_share() -> None:
    """Also on X25519: the list says whose a stanza is."""
    rules = Rules(operators(*POOL[:5]), 3)
    backup = Backup.of(header_by(rules))
    session, questions = opened(backup, rules.operators, *POOL[:5])
    assert len(questions) == 5
    judgement = session.answer(session.id, right(POOL, questions), NOW)
    assert judgement.accepted == ("op0", "op1", "op2", "op3", "op4")
    assert judgement.file_key is None
    assert sorted(judgement.shares) == [0, 1, 2, 3, 4]
    assert backup.split is not None
    with backup.split.combine(judgement.shares) as file_key:
        assert bytes(file_key.view) == FILE_KEY
    wiped(judgement)


def hostile_answers(
    draw: random.Random, identity: Identity, question: Question, elsewhere: bytes
) -> list[bytes]:
    """What is no answer: off the curve, zero, another session's, cut, extended, echoed."""
    good = x_of(identity, question)
    size = len(good)
    wrong = [
        bytes(size),
        elsewhere,
        good[:-1],
        good + b"\0",
        b"",
        b"\xff" * 32,
        draw.randbytes(32),
        draw.randbytes(65),
        bytes([4]) + draw.randbytes(64),
        question.point[-32:],
        bytes([good[0] ^ 1]) + good[1:],
    ]
    if question.curve is Curve.P256:
        wrong += [b"\x05" + good, b"\0", bytes(P256_POINT_SIZE), _without_a_lift(draw)]
    return wrong


def _without_a_lift(draw: random.Random) -> bytes:
    """An x coordinate that no point of P-256 has."""
    while True:
        x = draw.randbytes(32)
        try:
            ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x02" + x)
        except ValueError:
            return x


@pytest.mark.promise(4)
@pytest.mark.promise(10)
def test_two_hundred_random_unlocks_among_hostile_answers() -> None:
    """Each operator in a session of their own, in any order, some after a hostile answer under their name."""
    draw = random.Random(20261122)
    for _ in range(200):
        count = draw.randint(2, 6)
        people = draw.sample(POOL, count)
        groups = [("g",) if draw.random() < 0.5 else () for _ in people]
        require = ("g",) if ("g",) in groups and draw.random() < 0.5 else ()
        rules = Rules(operators(*people, groups=groups), draw.randint(1, count), require)
        if not rules.split:
            continue
        backup = Backup.of(header_by(rules))
        shares: dict[int, SecretBuffer] = {}
        order = draw.sample(range(count), count)
        for index in order:
            if rules.satisfied({f"op{i}" for i in shares}):
                break
            identity = people[index]
            other, elsewhere = opened(backup, rules.operators, identity)
            session, questions = opened(backup, rules.operators, identity)
            bad = draw.choice(hostile_answers(draw, identity, questions[0], x_of(identity, elsewhere[0])))
            judgement = session.answer(session.id, [Answer(0, bad)], NOW)
            assert (judgement.accepted, judgement.refused) == ((), (f"op{index}",))
            assert judgement.shares == {}
            judgement = other.answer(other.id, right(people, elsewhere), NOW)
            assert judgement.accepted == (f"op{index}",)
            shares |= judgement.shares
        assert backup.split is not None
        with backup.split.combine(shares) as file_key:
            assert bytes(file_key.view) == FILE_KEY
        for share in shares.values():
            share.close()


@pytest.mark.parametrize("curve", Curve, ids=[curve.value for curve in Curve])
@pytest.mark.promise(10)
def test_every_kind_of_hostile_answer_is_its_operators_and_spoils_nothing(curve: Curve) -> None:
    draw = random.Random(7)
    mallory, alice = identity_on(curve), identity_on(Curve.P256)
    rules = Rules(operators(mallory, alice), 2)
    backup = Backup.of(header_by(rules))
    _, elsewhere = opened(backup, rules.operators, mallory)
    kinds = len(hostile_answers(draw, mallory, elsewhere[0], bytes(32)))
    for kind in range(kinds):
        session, questions = opened(backup, rules.operators, mallory, alice)
        bad = hostile_answers(draw, mallory, questions[0], x_of(mallory, elsewhere[0]))[kind]
        answers = [Answer(0, bad), Answer(1, x_of(alice, questions[1]))]
        judgement = session.answer(session.id, answers, NOW)
        assert (judgement.accepted, judgement.refused) == (("op1",), ("op0",)), kind
        assert [o.result for o in judgement.outcomes] == ["BadAnswer", "accepted"]
        assert list(judgement.shares) == [1]
        wiped(judgement)


def test_a_whole_point_is_accepted_as_some_cards_give_it() -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    alice, bob = P256Identity(private), POOL[0]
    rules = Rules(operators(alice, bob), 2)
    backup = Backup.of(header_by(rules))
    session, questions = opened(backup, rules.operators, alice)
    x = x_of(alice, questions[0])
    # Either sign will do: the server lifts x itself.
    judgement = session.answer(session.id, [Answer(0, b"\x03" + x)], NOW)
    assert judgement.accepted == ("op0",)
    wiped(judgement)


@pytest.mark.promise(10)
@given(st.binary(max_size=70) | st.binary(min_size=32, max_size=32), st.sampled_from([0, 1]))
def test_any_answer(x: bytes, who: int) -> None:
    session, _ = opened(SHARED, SHARED_RULES.operators, POOL[who])
    judgement = session.answer(session.id, [Answer(0, x)], NOW)
    assert (judgement.accepted, judgement.shares, judgement.file_key) == ((), {}, None)


SHARED_RULES = Rules(operators(*POOL[:3]), 2)
SHARED = Backup.of(header_by(SHARED_RULES))


def test_one_share_is_not_the_file_key() -> None:
    session, questions = opened(SHARED, SHARED_RULES.operators, POOL[0])
    judgement = session.answer(session.id, right(POOL, questions), NOW)
    assert [len(share) for share in judgement.shares.values()] == [16]
    assert bytes(judgement.shares[0].view) != FILE_KEY
    wiped(judgement)


def test_who_was_removed_from_the_configuration_is_not_asked() -> None:
    with pytest.raises(NotAnOperator):
        opened(SHARED, SHARED_RULES.operators[1:], POOL[0])


def test_who_was_added_is_asked_when_the_backup_knows_them() -> None:
    added = operators(*POOL[:4])
    with pytest.raises(NotAnOperator):
        opened(SHARED, added, POOL[3])
    _, questions = opened(SHARED, added, POOL[3], POOL[2])
    assert len(questions) == 1


def test_an_operator_is_who_the_backup_says_even_if_the_configuration_has_another_name() -> None:
    renamed = tuple(KnownOperator(f"new{i}", POOL[i].recipient) for i in range(3))
    session, questions = opened(SHARED, renamed, POOL[0])
    judgement = session.answer(session.id, right(POOL, questions), NOW)
    assert judgement.accepted == ("op0",)
    wiped(judgement)


# --- operators with a passphrase


def test_a_passphrase_is_found_by_name_and_gets_its_parameters() -> None:
    carol = POOL[2]
    rules = Rules((*operators(*POOL[:2]), KnownOperator("Carol", carol.recipient, (), KDF)), 1)
    backup = Backup.of(header_by(rules))
    with pytest.raises(NotAnOperator):  # not by the recipient, which only who knows the passphrase knows
        opened(backup, rules.operators, carol)
    session = UnlockSession(os.urandom(16), NOW)
    tag = recipient_tag(NONCE, "passphrase:carol")
    questions = session.hello(
        version=1, nonce=NONCE, tags=[tag], operators=rules.operators, backup=backup, now=NOW
    )
    assert [(q.tag, q.curve, q.kdf) for q in questions] == [(tag, Curve.X25519, KDF)]
    judgement = session.answer(session.id, [Answer(0, x_of(carol, questions[0]))], NOW)
    assert judgement.accepted == ("Carol",)
    assert judgement.file_key is not None
    with judgement.file_key as file_key:
        assert bytes(file_key.view) == FILE_KEY


def test_others_are_asked_without_parameters() -> None:
    rules = Rules((*operators(*POOL[:2]), KnownOperator("carol", POOL[2].recipient, (), KDF)), 1)
    _, questions = opened(Backup.of(header_by(rules)), rules.operators, POOL[0], POOL[1])
    assert [q.kdf for q in questions] == [None, None]


def test_the_parameters_are_those_of_the_backup() -> None:
    """The configuration may be ahead of it: then they would give another key."""
    rules = Rules((KnownOperator("carol", POOL[2].recipient, (), KDF),), 1)
    newer = (KnownOperator("carol", POOL[2].recipient, (), KDF.replace("t=2", "t=3")),)
    session = UnlockSession(os.urandom(16), NOW)
    questions = session.hello(
        version=1,
        nonce=NONCE,
        tags=[recipient_tag(NONCE, "passphrase:carol")],
        operators=newer,
        backup=Backup.of(header_by(rules)),
        now=NOW,
    )
    assert questions[0].kdf == KDF
    session.close()


# --- drills

BOTH = pytest.mark.parametrize("rules", [Rules(operators(*POOL[:3]), 1), SHARED_RULES], ids=["1", "2"])


@BOTH
def test_a_drill_says_who_opens_and_gives_nothing(rules: Rules) -> None:
    backup = Backup.of(header_by(rules))
    session, questions = opened(backup, rules.operators, POOL[1], purpose=Purpose.DRILL)
    judgement = session.answer(session.id, right(POOL, questions), NOW)
    assert judgement.accepted == ("op1",)
    assert judgement.file_key is None
    assert judgement.shares == {}
    with pytest.raises(SessionExpired):
        session.answer(session.id, right(POOL, questions), NOW)


@BOTH
def test_a_drill_says_who_does_not_open(rules: Rules) -> None:
    session, questions = opened(Backup.of(header_by(rules)), rules.operators, POOL[1], purpose=Purpose.DRILL)
    judgement = session.answer(session.id, [Answer(0, x_of(POOL[3], questions[0]))], NOW)
    assert (judgement.accepted, judgement.refused) == ((), ("op1",))


@BOTH
@pytest.mark.promise(1)
def test_what_a_drill_opened_is_wiped_at_once(rules: Rules, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SecretBuffer] = []
    original = SecretBuffer.__init__

    def remembered(self: SecretBuffer, size: int) -> None:
        original(self, size)
        made.append(self)

    backup = Backup.of(header_by(rules))
    session, questions = opened(backup, rules.operators, *POOL[:3], purpose=Purpose.DRILL)
    answers = right(POOL, questions)
    monkeypatch.setattr(SecretBuffer, "__init__", remembered)
    session.answer(session.id, answers, NOW)
    assert len(made) > 3
    assert all(buffer.closed for buffer in made)


@BOTH
@pytest.mark.parametrize("purpose", Purpose)
def test_the_tags_of_one_purpose_find_nobody_for_the_other(rules: Rules, purpose: Purpose) -> None:
    """Whoever loses the purpose on the way, or an older server that never knew it, cannot unlock by a drill."""
    other = Purpose.UNLOCK if purpose is Purpose.DRILL else Purpose.DRILL
    with pytest.raises(NotAnOperator):
        opened(Backup.of(header_by(rules)), rules.operators, POOL[0], purpose=purpose, tags_for=other)


@BOTH
def test_an_answer_to_a_drill_opens_no_unlock_session_and_the_other_way_round(rules: Rules) -> None:
    backup = Backup.of(header_by(rules))
    drill, drilled = opened(backup, rules.operators, POOL[1], purpose=Purpose.DRILL)
    unlock, asked = opened(backup, rules.operators, POOL[1])
    for session, answers in ((unlock, right(POOL, drilled)), (drill, right(POOL, asked))):
        assert session.answer(session.id, answers, NOW).accepted == ()


def test_a_drill_on_a_header_that_was_changed_is_no_proof() -> None:
    rules = Rules(operators(*POOL[:2]), 1)
    good = header_by(rules)
    with SecretBuffer.copy_of(FILE_KEY) as file_key:
        more = POOL[1].recipient.wrap(file_key)
    bent = parse_header(good.encode().replace(b"---", more.encode() + b"---"))
    session, questions = opened(Backup.of(bent), rules.operators, POOL[0], purpose=Purpose.DRILL)
    with pytest.raises(BackupDamaged):
        session.answer(session.id, right(POOL, questions), NOW)
