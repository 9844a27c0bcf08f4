"""The operator's key is no oracle: what a host asks is verified first, and only what was verified can be answered."""

import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs.hostile_host import HostileHost
from rigs.person import Person

from unsealerd.core.age import P256Identity, Recipient, X25519Identity
from unsealerd.core.blinding import X25519_PRIME
from unsealerd.core.conversation import Challenge, Question
from unsealerd.core.rules import passphrase_subject
from unsealerd.core.secret import SecretBuffer
from unsealerd.core.session import MAX_QUESTIONS, MAX_TAGS, recipient_tag
from unsealerd.core.words import session_words
from unsealerd.errors import (
    BadMessage,
    BadPoint,
    BadRequest,
    HostMismatch,
    LimitExceeded,
    UnsealerdError,
)
from unsealerd.gateway.identity import TlsIdentity, _generate
from unsealerd.model import Curve
from unsealerd.operator import evidence, network
from unsealerd.operator.events import ignore
from unsealerd.operator.evidence import (
    KnownHost,
    LocalSocket,
    NoEvidence,
    Offer,
    TlsPin,
    VerifiedChallenge,
    VerifiedQuestion,
    verify,
)
from unsealerd.operator.hosts import Host, Trust, make_host
from unsealerd.operator.identities.passphrase import PassphraseOperator
from unsealerd.operator.unlock import unlock
from unsealerd.proto import unlock_pb2 as pb

NONCE = bytes(range(32))
SESSION = bytes(range(16))
PIN = bytes(32)
HOST = KnownHost("server", PIN, Trust.TLS)

X_OWNER = X25519Identity.generate()
P_OWNER = P256Identity(ec.generate_private_key(ec.SECP256R1()))

X_POINT = X25519Identity.generate().recipient.public
P_POINT = P256Identity(ec.generate_private_key(ec.SECP256R1())).recipient.uncompressed


@dataclass
class Spy:
    """An identity that says when its private key is used."""

    recipient: Recipient
    asked: list[bytes] = field(default_factory=list)

    def exchange(self, point: bytes) -> SecretBuffer:
        self.asked.append(point)
        return SecretBuffer.copy_of(bytes(31) + b"\1")


def x_tag(nonce: bytes = NONCE) -> bytes:
    return recipient_tag(nonce, str(X_OWNER.recipient))


def p_tag(nonce: bytes = NONCE) -> bytes:
    return recipient_tag(nonce, str(P_OWNER.recipient))


def challenge(*questions: Question, **facts: object) -> Challenge:
    plain = Challenge(
        session=SESSION,
        questions=questions or (Question(x_tag(), Curve.X25519, X_POINT),),
        lock_reason="unexpected_reboot",
        boot_id="5a1b9d60-7d4e-4a3c-9a52-0c7f2b7f7a11",
        host_name="server-1",
        uptime=10,
        backup_time=1_750_000_000,
        shares_present=0,
        shares_needed=1,
        deadline=120,
        generation=3,
    )
    return msgspec.structs.replace(plain, **facts)


def offer() -> Offer:
    return Offer.make(NONCE, [Spy(X_OWNER.recipient), Spy(P_OWNER.recipient)])


# --- points and questions that no honest host sends

P = 2**256 - 2**224 + 2**192 + 2**96 - 1
# Curve25519 points of order 1, 2, 4 and 8, and their non-canonical twins: RFC 7748 section 7 and cr.yp.to/ecdh.html.
LOW_ORDER = [
    0,
    1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
    X25519_PRIME - 1,
    X25519_PRIME,
    X25519_PRIME + 1,
]

HOSTILE: dict[str, Question] = {
    "off the curve": Question(p_tag(), Curve.P256, P_POINT[:-1] + bytes([P_POINT[-1] ^ 1])),
    "identity": Question(p_tag(), Curve.P256, b"\0"),
    "identity, padded": Question(p_tag(), Curve.P256, bytes(65)),
    "zero coordinates": Question(p_tag(), Curve.P256, b"\4" + bytes(64)),
    "coordinate above the prime": Question(p_tag(), Curve.P256, b"\4" + P.to_bytes(32, "big") + P_POINT[33:]),
    "compressed": Question(p_tag(), Curve.P256, b"\2" + P_POINT[1:33]),
    "hybrid": Question(p_tag(), Curve.P256, bytes([6 + (P_POINT[-1] & 1)]) + P_POINT[1:]),
    "p256 too long": Question(p_tag(), Curve.P256, P_POINT + b"\0"),
    "p256 empty": Question(p_tag(), Curve.P256, b""),
    "x25519 too short": Question(x_tag(), Curve.X25519, X_POINT[:-1]),
    "x25519 too long": Question(x_tag(), Curve.X25519, X_POINT + b"\0"),
    "x25519 with the top bit": Question(x_tag(), Curve.X25519, X_POINT[:31] + bytes([X_POINT[31] | 0x80])),
    "p256 question for an x25519 identity": Question(x_tag(), Curve.P256, P_POINT),
    "x25519 question for a p256 identity": Question(p_tag(), Curve.X25519, X_POINT),
    "another's tag": Question(bytes(16), Curve.X25519, X_POINT),
    "tag of another session": Question(x_tag(bytes(32)), Curve.X25519, X_POINT),
    "empty tag": Question(b"", Curve.X25519, X_POINT),
} | {
    f"low order {n}": Question(x_tag(), Curve.X25519, point.to_bytes(32, "little"))
    for n, point in enumerate(LOW_ORDER)
}
GOOD = Question(x_tag(), Curve.X25519, X_POINT)


@pytest.mark.promise(5)
@pytest.mark.parametrize("question", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_question_spoils_the_whole_challenge(question: Question) -> None:
    for questions in ((question,), (GOOD, question), (question, GOOD)):
        with pytest.raises((BadPoint, BadMessage)):
            verify(HOST, offer(), challenge(*questions), TlsPin(PIN))


@pytest.mark.promise(5)
@pytest.mark.parametrize("size", [0, 1, 15, 17, 32])
def test_a_session_id_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(BadMessage):
        verify(HOST, offer(), challenge(session=bytes(size)), TlsPin(PIN))


@pytest.mark.promise(5)
@pytest.mark.promise(5)
def test_a_key_that_stanzas_name_is_asked_once() -> None:
    """The second point would be from the backup of another host, of which somebody has a copy."""
    spies = [Spy(X_OWNER.recipient), Spy(P_OWNER.recipient)]
    other = P256Identity(ec.generate_private_key(ec.SECP256R1())).recipient.uncompressed
    one, two = (Question(p_tag(), Curve.P256, point) for point in (P_POINT, other))
    with pytest.raises(BadMessage, match="asked 2 times"):
        verify(HOST, Offer.make(NONCE, spies), challenge(one, GOOD, two), TlsPin(PIN))
    assert [spy.asked for spy in spies] == [[], []]
    # A stanza of X25519 does not say whose it is.
    assert len(verify(HOST, offer(), challenge(one, GOOD, GOOD), TlsPin(PIN)).questions) == 3


@pytest.mark.promise(5)
def test_a_passphrase_is_asked_for_once() -> None:
    operator = PassphraseOperator("alice", Person(b"never typed"))
    kdfs = (f"argon2id$v=19$m=65536,t=2,p=1${salt * 21}A" for salt in "AB")
    tag = recipient_tag(NONCE, passphrase_subject("alice"))
    one, two = (Question(tag, Curve.X25519, X_POINT, kdf) for kdf in kdfs)
    asked = Offer.make(NONCE, [operator])
    assert verify(HOST, asked, challenge(one), TlsPin(PIN)).questions
    for second in (one, two):
        with pytest.raises(BadMessage, match="asked 2 times"):
            verify(HOST, asked, challenge(one, second), TlsPin(PIN))


def test_too_many_questions_are_refused() -> None:
    assert (
        len(verify(HOST, offer(), challenge(*[GOOD] * MAX_QUESTIONS), TlsPin(PIN)).questions) == MAX_QUESTIONS
    )
    with pytest.raises(BadMessage):
        verify(HOST, offer(), challenge(*[GOOD] * (MAX_QUESTIONS + 1)), TlsPin(PIN))
    with pytest.raises(BadMessage):
        verify(HOST, offer(), challenge(questions=()), TlsPin(PIN))


@pytest.mark.parametrize(
    "facts",
    [
        {"host_name": "evil\x1b[2J"},
        {"host_name": "two words"},
        {"host_name": "x" * 65},
        {"host_name": "hоst"},  # noqa: RUF001 - a Cyrillic letter
        {"lock_reason": "Unexpected\n"},
        {"lock_reason": "unexpected_reboot\n"},
        {"boot_id": "g"},
        {"deadline": 0},
        {"deadline": 121},
        {"uptime": -1},
        {"uptime": 2**60},
        {"generation": -1},
        {"backup_time": 2**63},
        {"shares_present": -1},
        {"shares_needed": 2**53},
    ],
    ids=repr,
)
def test_facts_that_are_not_fit_to_be_shown_are_refused(facts: dict[str, object]) -> None:
    with pytest.raises(BadMessage):
        verify(HOST, offer(), challenge(**facts), TlsPin(PIN))


# --- who asks


def test_the_pinned_host_is_verified() -> None:
    verified = verify(HOST, offer(), challenge(), TlsPin(PIN))
    assert verified.facts == challenge()
    assert [question.recipient for question in verified.questions] == [str(X_OWNER.recipient)]
    assert verified.words == session_words(SESSION, NONCE, [X_POINT])


@pytest.mark.promise(5)
@pytest.mark.parametrize("shown", [TlsPin(b"\1" * 32), TlsPin(b""), NoEvidence()])
def test_a_host_that_shows_another_key_is_not_answered(shown: evidence.Evidence) -> None:
    with pytest.raises(HostMismatch):
        verify(HOST, offer(), challenge(), shown)


@pytest.mark.promise(5)
def test_a_host_that_must_show_a_tpm_quote_is_not_answered_for_its_tls_key() -> None:
    with pytest.raises(HostMismatch):
        verify(KnownHost("server", PIN, Trust.TPM), offer(), challenge(), TlsPin(PIN))


def test_the_local_socket_needs_no_evidence() -> None:
    assert verify(LocalSocket(), offer(), challenge(), NoEvidence()).questions


# --- only verify() makes what can be answered


@pytest.mark.promise(5)
def test_nothing_but_verify_makes_a_question_that_can_be_answered() -> None:
    spy = Spy(X_OWNER.recipient)
    with pytest.raises(TypeError):
        VerifiedQuestion(object(), 0, spy, X_POINT, None)
    with pytest.raises(TypeError):
        VerifiedChallenge(object(), challenge(), (), ())
    verified = verify(HOST, offer(), challenge(), TlsPin(PIN))
    for value in (verified, verified.questions[0]):
        for smuggle in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError):
                smuggle(value)
        with pytest.raises(AttributeError):
            value.more = 1  # type: ignore[union-attr]


@pytest.mark.promise(5)
def test_a_verified_question_uses_the_identity_it_names_once() -> None:
    spies = [Spy(X_OWNER.recipient), Spy(P_OWNER.recipient)]
    questions = (GOOD, Question(p_tag(), Curve.P256, P_POINT))
    verified = verify(HOST, Offer.make(NONCE, spies), challenge(*questions), TlsPin(PIN))
    assert not any(spy.asked for spy in spies), "verification uses no private key"
    answers = [question.answer(ignore) for question in verified.questions]
    assert [answer.question for answer in answers] == [0, 1]
    assert [spy.asked for spy in spies] == [[X_POINT], [P_POINT]]


@settings(max_examples=200)
@given(
    st.sampled_from(list(Curve)),
    st.binary(max_size=70) | st.sampled_from([X_POINT, P_POINT, P_POINT[:33]]),
    st.sampled_from([x_tag(), p_tag(), bytes(16)]),
    st.binary(min_size=15, max_size=17),
)
@pytest.mark.promise(5)
@pytest.mark.promise(10)
def test_any_question_is_verified_or_refused_by_name(
    curve: Curve, point: bytes, tag: bytes, session: bytes
) -> None:
    asked = challenge(Question(tag, curve, point), session=session)
    try:
        verified = verify(HOST, offer(), asked, TlsPin(PIN))
    except (BadPoint, BadMessage):
        return
    assert len(session) == 16
    (question,) = verified.questions
    assert (question.recipient, curve) in [
        (str(X_OWNER.recipient), Curve.X25519),
        (str(P_OWNER.recipient), Curve.P256),
    ]


# --- what is offered


def test_an_offer_names_each_recipient_once() -> None:
    assert len(Offer.make(NONCE, [X_OWNER, X_OWNER, P_OWNER]).identities) == 2
    with pytest.raises(BadRequest):
        Offer.make(NONCE, [])
    with pytest.raises(LimitExceeded):
        Offer.make(NONCE, [X25519Identity.generate() for _ in range(MAX_TAGS + 1)])


# --- the same, from a hostile host over TLS, by the client as the command uses it


@pytest.fixture(scope="module")
def tls() -> TlsIdentity:
    return _generate()


def message(value: Challenge, pin: bytes) -> pb.Challenge:
    curves = {Curve.P256: pb.CURVE_P256, Curve.X25519: pb.CURVE_X25519}
    return pb.Challenge(
        session=value.session,
        questions=[pb.Question(tag=q.tag, curve=curves[q.curve], point=q.point) for q in value.questions],
        lock_reason=value.lock_reason,
        boot_id=value.boot_id,
        host_name=value.host_name,
        deadline=value.deadline,
        evidence=pb.Evidence(tls_pin=pb.TlsPin(fingerprint=pin)),
    )


def hostile_hosts(tls: TlsIdentity) -> Iterator[tuple[str, pb.Challenge]]:
    """Challenges for tags of the session itself; the question's tag is put in by the script."""
    pin = make_host("x", "[::1]:1", tls.certificate.decode(), 0).fingerprint
    for name, question in HOSTILE.items():
        yield name, message(challenge(question), pin)
    yield "too many", message(challenge(*[GOOD] * (MAX_QUESTIONS + 1)), pin)
    yield "no question", message(challenge(questions=()), pin)
    yield "session id", message(challenge(session=b"x" * 400), pin)
    yield "another pin", message(challenge(), bytes(32))
    unknown = message(challenge(), pin)
    unknown.questions[0].curve = pb.CURVE_UNSPECIFIED
    yield "unknown curve", unknown
    without = message(challenge(), pin)
    without.ClearField("evidence")
    yield "no evidence", without


@pytest.mark.promise(5)
def test_a_hostile_host_never_gets_the_private_key_used(tls: TlsIdentity) -> None:
    for name, prepared in hostile_hosts(tls):

        def script(request: pb.SessionRequest, prepared: pb.Challenge = prepared) -> bytes:
            # The tags depend on the nonce: where the hostile challenge has an offered one, so does this.
            for question in prepared.questions:
                if question.tag in (x_tag(), p_tag()):
                    owner = X_OWNER if question.tag == x_tag() else P_OWNER
                    question.tag = recipient_tag(request.hello.nonce, str(owner.recipient))
            return pb.SessionResponse(challenge=prepared).SerializeToString()

        spies = [Spy(X_OWNER.recipient), Spy(P_OWNER.recipient)]
        with HostileHost(tls, script) as hostile, network.connect(hostile.host()) as conversation:
            with pytest.raises(UnsealerdError) as caught:
                unlock(conversation, spies)
            assert caught.type in (BadPoint, BadMessage, HostMismatch), name
            assert not any(spy.asked for spy in spies), name
            assert [request.WhichOneof("step") for request in hostile.heard] == ["hello"], name


@pytest.mark.promise(5)
def test_another_server_key_gets_not_even_a_hello(tls: TlsIdentity) -> None:
    spy = Spy(X_OWNER.recipient)
    with HostileHost(tls, lambda _: b"") as hostile:
        other = _generate().certificate.decode()
        host = Host(
            "server",
            hostile.address,
            make_host("x", "[::1]:1", other, 0).tls_fingerprint,
            other,
            Trust.TLS,
            0,
        )
        with network.connect(host) as conversation, pytest.raises(HostMismatch):
            unlock(conversation, [spy])
        assert hostile.heard == []
    assert spy.asked == []
