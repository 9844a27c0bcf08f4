"""The operator's end where several answer, where one has a passphrase, and in a drill: honest hosts, and others."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from rigs.hostile_host import HostileHost

from unsealerd.core.age import P256Identity, X25519Identity
from unsealerd.core.conversation import AnswerCall, Challenge, HelloCall, Outcome, Question, Result
from unsealerd.core.passphrase import Parameters, derive
from unsealerd.core.session import recipient_tag
from unsealerd.errors import BadAnswer, BadMessage, BadPoint, LimitExceeded, UnsealerdError
from unsealerd.gateway.identity import TlsIdentity, _generate
from unsealerd.model import Curve, Purpose, State
from unsealerd.operator import network
from unsealerd.operator.conversation import Conversation
from unsealerd.operator.events import Event, Exchanging
from unsealerd.operator.evidence import (
    Evidence,
    Expectation,
    LocalSocket,
    NoEvidence,
    Offer,
    Offered,
    verify,
)
from unsealerd.operator.identities.passphrase import PassphraseOperator
from unsealerd.operator.prompts import PinRequest
from unsealerd.operator.unlock import drill, unlock
from unsealerd.proto import unlock_pb2 as pb

ALICE = X25519Identity.generate()
BOB = P256Identity(ec.generate_private_key(ec.SECP256R1()))
POINT = X25519Identity.generate().recipient.public
P_POINT = P256Identity(ec.generate_private_key(ec.SECP256R1())).recipient.uncompressed
KDF = "argon2id$v=19$m=65536,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA"
PASSPHRASE = b"correct horse"


class Asked:
    """Somebody at the keyboard."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def pin(self, request: PinRequest) -> bytes:
        raise AssertionError("no PIN is asked for here")

    def passphrase(self, what: str) -> bytes:
        self.asked.append(what)
        return PASSPHRASE


@dataclass
class Fixed(Conversation):
    """A host at the console that asks these questions, and says this in the end."""

    questions: Sequence[tuple[str, Curve, bytes, str | None]]
    """Subject, curve, point, kdf."""
    result: Result = field(default_factory=lambda: Result(State.UNLOCKED, 1, 1, (Outcome(0, "accepted"),)))
    hellos: list[HelloCall] = field(default_factory=list)
    answers: list[AnswerCall] = field(default_factory=list)

    @property
    def expected(self) -> Expectation:
        return LocalSocket()

    def hello(self, call: HelloCall) -> tuple[Challenge, Evidence]:
        self.hellos.append(call)
        questions = tuple(
            Question(recipient_tag(call.nonce, subject, call.purpose), curve, point, kdf)
            for subject, curve, point, kdf in self.questions
        )
        return Challenge(bytes(16), questions, "", "", "host", 1, 1, 0, 2, 120), NoEvidence()

    def answer(self, call: AnswerCall) -> Result:
        self.answers.append(call)
        return self.result


# --- passphrases


def test_the_passphrase_is_asked_for_after_the_challenge_and_gives_the_answer() -> None:
    prompts, events = Asked(), list[Event]()
    host = Fixed([("passphrase:carol", Curve.X25519, POINT, KDF)])
    outcome = unlock(host, [PassphraseOperator("Carol", prompts)], on_event=events.append)
    assert host.hellos[0].tags == (recipient_tag(host.hellos[0].nonce, "passphrase:carol"),)
    assert prompts.asked == ["operator Carol"]
    assert outcome.accepted == ("passphrase:carol",)
    assert events[-1] == Exchanging("passphrase:carol")
    own = derive(memoryview(PASSPHRASE), Parameters.parse(KDF))
    with own.exchange(POINT) as x:
        assert host.answers[0].answers[0].x == bytes(x.view)


BAD_QUESTIONS: dict[str, list[tuple[str, Curve, bytes, str | None]]] = {
    "no parameters": [("passphrase:carol", Curve.X25519, POINT, None)],
    "empty": [("passphrase:carol", Curve.X25519, POINT, "")],
    "another function": [("passphrase:carol", Curve.X25519, POINT, KDF.replace("argon2id", "argon2i"))],
    "too cheap": [("passphrase:carol", Curve.X25519, POINT, KDF.replace("m=65536", "m=8"))],
    "one pass": [("passphrase:carol", Curve.X25519, POINT, KDF.replace("t=2", "t=1"))],
    "all the memory": [("passphrase:carol", Curve.X25519, POINT, KDF.replace("m=65536", "m=4294967295"))],
    "control characters": [("passphrase:carol", Curve.X25519, POINT, KDF + "\x1b[2J")],
    "another curve": [("passphrase:carol", Curve.P256, P_POINT, KDF)],
    "small order": [("passphrase:carol", Curve.X25519, bytes(32), KDF)],
    "asked twice": [("passphrase:carol", Curve.X25519, POINT, KDF)] * 2,
    "asked with two salts": [
        ("passphrase:carol", Curve.X25519, POINT, KDF),
        ("passphrase:carol", Curve.X25519, POINT, KDF[:-1] + "Q"),
    ],
    "somebody else's": [("passphrase:dave", Curve.X25519, POINT, KDF)],
    "a key asked for with parameters": [(str(ALICE.recipient), Curve.X25519, POINT, KDF)],
    "a good one and a bad one": [
        ("passphrase:carol", Curve.X25519, POINT, KDF),
        (str(BOB.recipient), Curve.P256, b"\4" + bytes(64), None),
    ],
}


@pytest.mark.promise(5)
@pytest.mark.parametrize("questions", BAD_QUESTIONS.values(), ids=BAD_QUESTIONS.keys())
def test_nobody_is_asked_for_a_passphrase_by_a_host_that_is_not_honest(
    questions: list[tuple[str, Curve, bytes, str | None]],
) -> None:
    prompts = Asked()
    host = Fixed(questions)
    identities: list[Offered] = [PassphraseOperator("carol", prompts), ALICE, BOB]
    with pytest.raises((BadMessage, BadPoint)):
        unlock(host, identities)
    assert prompts.asked == []
    assert host.answers == []


@pytest.mark.promise(10)
@given(st.text(max_size=80))
def test_any_text_as_parameters(text: str) -> None:
    offer = Offer.make(bytes(32), [PassphraseOperator("carol", Asked())])
    (tag,) = offer.identities
    challenge = Challenge(
        bytes(16), (Question(tag, Curve.X25519, POINT, text),), "", "", "host", 1, 1, 0, 2, 120
    )
    with pytest.raises(BadMessage):
        verify(LocalSocket(), offer, challenge, NoEvidence())


def test_two_passphrases_are_two_operators() -> None:
    prompts = Asked()
    host = Fixed([(f"passphrase:{name}", Curve.X25519, POINT, KDF) for name in ("carol", "dave")])
    unlock(host, [PassphraseOperator(name, prompts) for name in ("carol", "dave")])
    assert prompts.asked == ["operator carol", "operator dave"]


def test_too_many_identities() -> None:
    with pytest.raises(LimitExceeded):
        Offer.make(bytes(32), [PassphraseOperator(f"op{n}", Asked()) for n in range(33)])


# --- drills


def test_a_drill_says_so_and_is_bound_to_it() -> None:
    host = Fixed([(str(ALICE.recipient), Curve.X25519, POINT, None)])
    outcome = drill(host, [ALICE])
    assert outcome.accepted == (str(ALICE.recipient),)
    (hello,) = host.hellos
    assert hello.purpose is Purpose.DRILL
    assert hello.tags == (recipient_tag(hello.nonce, str(ALICE.recipient), Purpose.DRILL),)
    assert hello.tags != (recipient_tag(hello.nonce, str(ALICE.recipient)),)
    (answer,) = host.answers
    assert (answer.reason, answer.accept_rollback) == ("", False)


def test_a_drill_that_proves_nothing_is_an_error() -> None:
    host = Fixed(
        [(str(ALICE.recipient), Curve.X25519, POINT, None)],
        Result(State.LOCKED, 0, 1, (Outcome(0, "BadAnswer"),)),
    )
    with pytest.raises(BadAnswer):
        drill(host, [ALICE])


@pytest.mark.promise(5)
@pytest.mark.parametrize("purpose", Purpose)
def test_a_question_with_the_tag_of_the_other_purpose_is_not_answered(purpose: Purpose) -> None:
    """A host that takes a drill for an unlock (or the gateway before it, on the way back) asks for somebody else."""

    class Confused(Fixed):
        def hello(self, call: HelloCall) -> tuple[Challenge, Evidence]:
            other = Purpose.UNLOCK if call.purpose is Purpose.DRILL else Purpose.DRILL
            return super().hello(HelloCall(call.version, call.nonce, call.tags, call.peer, other))

    host = Confused([(str(ALICE.recipient), Curve.X25519, POINT, None)])
    with pytest.raises(BadMessage):
        (unlock if purpose is Purpose.UNLOCK else drill)(host, [ALICE])
    assert host.answers == []


# --- results


def test_who_has_answered_and_who_is_missing_is_told() -> None:
    result = Result(State.LOCKED, 1, 2, (Outcome(0, "accepted"),), ("alice",), ("bob", "carol"), 1799)
    outcome = unlock(Fixed([(str(ALICE.recipient), Curve.X25519, POINT, None)], result), [ALICE])
    assert (outcome.operators_answered, outcome.operators_missing) == (("alice",), ("bob", "carol"))
    assert outcome.seconds_left == 1799


@pytest.mark.promise(10)
@pytest.mark.parametrize(
    ("answered", "missing", "seconds"),
    [
        (("alice\x1b[2J",), (), 1),
        (("",), (), 1),
        ((), ("a b",), 1),
        ((), ("a\n",), 1),
        ((), ("x" * 65,), 1),
        (("a",) * 256, (), 1),
        ((), (), -1),
        ((), (), 2**40),
    ],
)
def test_a_result_that_is_not_fit_to_be_shown(
    answered: tuple[str, ...], missing: tuple[str, ...], seconds: int
) -> None:
    result = Result(State.LOCKED, 1, 2, (Outcome(0, "accepted"),), answered, missing, seconds)
    with pytest.raises(BadMessage):
        unlock(Fixed([(str(ALICE.recipient), Curve.X25519, POINT, None)], result), [ALICE])


@pytest.fixture(scope="module")
def tls() -> TlsIdentity:
    return _generate()


def over_the_network(
    tls: TlsIdentity, identities: Sequence[Offered], question: pb.Question, result: pb.Result, subject: str
) -> tuple[list[pb.SessionRequest], object]:
    def script(request: pb.SessionRequest) -> bytes:
        if not request.HasField("hello"):
            return pb.SessionResponse(result=result).SerializeToString()
        question.tag = recipient_tag(request.hello.nonce, subject, Purpose.DRILL)
        pin = pb.Evidence(tls_pin=pb.TlsPin(fingerprint=server.host().fingerprint))
        challenge = pb.Challenge(session=bytes(16), questions=[question], deadline=120, evidence=pin)
        return pb.SessionResponse(challenge=challenge).SerializeToString()

    with HostileHost(tls, script) as server, network.connect(server.host()) as conversation:
        try:
            outcome: object = drill(conversation, identities)
        except UnsealerdError as err:
            outcome = err
        return server.heard, outcome


def test_parameters_names_and_purpose_pass_the_network(tls: TlsIdentity) -> None:
    prompts = Asked()
    result = pb.Result(
        state=pb.STATE_LOCKED,
        shares_present=1,
        shares_needed=2,
        outcomes=[pb.Outcome(question=0, result="accepted")],
        answered=["carol"],
        missing=["bob"],
        seconds_left=7,
    )
    question = pb.Question(curve=pb.CURVE_X25519, point=POINT, kdf=KDF)
    carol = PassphraseOperator("carol", prompts)
    heard, outcome = over_the_network(tls, [carol], question, result, "passphrase:carol")
    assert heard[0].hello.purpose == pb.PURPOSE_DRILL
    assert prompts.asked == ["operator carol"]
    assert getattr(outcome, "operators_missing", None) == ("bob",)
    assert getattr(outcome, "seconds_left", None) == 7


@pytest.mark.promise(5)
def test_parameters_for_a_key_are_refused_over_the_network(tls: TlsIdentity) -> None:
    question = pb.Question(curve=pb.CURVE_X25519, point=POINT, kdf="")
    heard, outcome = over_the_network(tls, [ALICE], question, pb.Result(), str(ALICE.recipient))
    assert isinstance(outcome, BadMessage)
    assert len(heard) == 1
