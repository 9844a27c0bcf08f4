"""The unlock client against hosts that are there, are not there, or talk nonsense; and at the console."""

import base64
import socket
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from rigs.hostile_host import HostileHost, Script
from rigs.ports import deaf_port
from rigs.unlock_daemon import UnlockDaemon

from unsealerd.client.connection import Connection
from unsealerd.core.age import P256Identity, X25519Identity
from unsealerd.core.conversation import AnswerCall
from unsealerd.core.session import recipient_tag
from unsealerd.core.words import session_words
from unsealerd.errors import (
    BadAnswer,
    BadMessage,
    BadRequest,
    HostUnreachable,
    LimitExceeded,
    NotAnOperator,
    NotLocked,
    SessionExpired,
    UnsealerdError,
)
from unsealerd.gateway.identity import TlsIdentity, _generate
from unsealerd.model import State
from unsealerd.operator import network
from unsealerd.operator.conversation import VarlinkConversation
from unsealerd.operator.events import Challenged, Event, Exchanging, TlsOnly
from unsealerd.operator.hosts import make_host
from unsealerd.operator.network import Deadlines
from unsealerd.operator.unlock import unlock
from unsealerd.proto import unlock_pb2 as pb

ALICE = X25519Identity.generate()
BOB = P256Identity(ec.generate_private_key(ec.SECP256R1()))
EVE = X25519Identity.generate()
POINT = X25519Identity.generate().recipient.public


@pytest.fixture(scope="module")
def tls() -> TlsIdentity:
    return _generate()


def good_challenge(request: pb.SessionRequest, tls: TlsIdentity) -> bytes:
    question = pb.Question(
        tag=recipient_tag(request.hello.nonce, str(ALICE.recipient)), curve=pb.CURVE_X25519, point=POINT
    )
    pin = make_host("x", "[::1]:1", tls.certificate.decode(), 0).fingerprint
    challenge = pb.Challenge(
        session=bytes(16),
        questions=[question],
        deadline=120,
        evidence=pb.Evidence(tls_pin=pb.TlsPin(fingerprint=pin)),
    )
    return pb.SessionResponse(challenge=challenge).SerializeToString()


def after_challenge(tls: TlsIdentity, answer: bytes | None) -> Script:
    def script(request: pb.SessionRequest) -> bytes | None:
        return good_challenge(request, tls) if request.HasField("hello") else answer

    return script


# --- events and outcome


def test_the_operator_is_told_what_goes_on(tls: TlsIdentity) -> None:
    result = pb.Result(state=pb.STATE_UNLOCKED, outcomes=[pb.Outcome(question=0, result="accepted")])
    events: list[Event] = []
    answer = pb.SessionResponse(result=result).SerializeToString()
    with (
        HostileHost(tls, after_challenge(tls, answer)) as server,
        network.connect(server.host()) as conversation,
    ):
        outcome = unlock(conversation, [ALICE], on_event=events.append)
    hello = server.heard[0].hello
    words = session_words(bytes(16), hello.nonce, [POINT])
    assert [type(event) for event in events] == [TlsOnly, Challenged, Exchanging]
    assert events[0] == TlsOnly("hostile")
    assert isinstance(events[1], Challenged)
    assert events[1].words == outcome.words == words
    assert outcome.state is State.UNLOCKED
    assert len(hello.nonce) == 32


def test_the_nonce_is_new_in_each_session(tls: TlsIdentity) -> None:
    with HostileHost(tls, lambda _: b"") as server:
        for _ in range(2):
            with network.connect(server.host()) as conversation, pytest.raises(BadMessage):
                unlock(conversation, [ALICE])
    first, second = server.heard
    assert first.hello.nonce != second.hello.nonce
    assert not set(first.hello.tags) & set(second.hello.tags)


@pytest.mark.parametrize(
    ("outcomes", "error"),
    [
        ([], BadAnswer),
        ([pb.Outcome(question=0, result="BadAnswer")], BadAnswer),
        ([pb.Outcome(question=1, result="accepted")], BadMessage),
        ([pb.Outcome(question=0, result="\x1b[2J")], BadMessage),
    ],
)
def test_a_result_without_an_accepted_answer_is_an_error(
    tls: TlsIdentity, outcomes: list[pb.Outcome], error: type[UnsealerdError]
) -> None:
    answer = pb.SessionResponse(
        result=pb.Result(state=pb.STATE_LOCKED, outcomes=outcomes)
    ).SerializeToString()
    with (
        HostileHost(tls, after_challenge(tls, answer)) as server,
        network.connect(server.host()) as conversation,
        pytest.raises(error),
    ):
        unlock(conversation, [ALICE])


def test_a_reason_that_is_too_long_is_refused_before_anything_is_sent(tls: TlsIdentity) -> None:
    with (
        HostileHost(tls, lambda _: b"") as server,
        network.connect(server.host()) as conversation,
        pytest.raises(BadRequest),
    ):
        unlock(conversation, [ALICE], reason="x" * 257)
        assert server.heard == []


# --- hosts that talk nonsense


NONSENSE: dict[str, bytes] = {
    "garbage": b"\xff" * 50,
    "nothing": b"",
    "a result first": pb.SessionResponse(result=pb.Result(state=pb.STATE_UNLOCKED)).SerializeToString(),
    "text that is not UTF-8": b"\x0a\x03\x1a\x01\xff",
}


@pytest.mark.promise(10)
@pytest.mark.parametrize("data", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_instead_of_a_challenge_is_a_bad_message(tls: TlsIdentity, data: bytes) -> None:
    with (
        HostileHost(tls, lambda _: data) as server,
        network.connect(server.host()) as conversation,
        pytest.raises(BadMessage),
    ):
        unlock(conversation, [ALICE])


@pytest.mark.promise(10)
@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 50,
        b"",
        pb.SessionResponse(challenge=pb.Challenge()).SerializeToString(),
        pb.SessionResponse(result=pb.Result()).SerializeToString(),
    ],
)
def test_nonsense_instead_of_a_result_is_a_bad_message(tls: TlsIdentity, data: bytes) -> None:
    with (
        HostileHost(tls, after_challenge(tls, data)) as server,
        network.connect(server.host()) as conversation,
        pytest.raises(BadMessage),
    ):
        unlock(conversation, [ALICE])


def test_a_message_above_the_limit_is_refused(tls: TlsIdentity) -> None:
    with (
        HostileHost(tls, lambda _: bytes(17 << 10)) as server,
        network.connect(server.host()) as conversation,
        pytest.raises(LimitExceeded),
    ):
        unlock(conversation, [ALICE])


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("NotLocked", NotLocked),
        # Names that are not for the network, that need more than a name, or that are no errors.
        ("HostUnknown", BadMessage),
        ("SealRefused", BadMessage),
        ("UnsealerdError", BadMessage),
        ("Fault", BadMessage),
        ("x", BadMessage),
    ],
)
def test_a_host_can_name_only_the_errors_of_the_interface(
    tls: TlsIdentity, name: str, error: type[UnsealerdError]
) -> None:
    refuse_with = (("unsealerd-error", name),)
    with (
        HostileHost(tls, lambda _: b"", refuse_with=refuse_with) as server,
        network.connect(server.host()) as conversation,
        pytest.raises(error),
    ):
        unlock(conversation, [ALICE])


# --- hosts that are not there


def test_nothing_listening_is_unreachable(tls: TlsIdentity) -> None:
    with deaf_port("::1") as port:
        host = make_host("gone", f"[::1]:{port}", tls.certificate.decode(), 0)
        with network.connect(host) as conversation, pytest.raises(HostUnreachable):
            unlock(conversation, [ALICE])
        with pytest.raises(HostUnreachable):
            network.status(host)


def test_a_name_that_does_not_resolve_is_unreachable(tls: TlsIdentity) -> None:
    host = make_host("nowhere", "nowhere.invalid:8750", tls.certificate.decode(), 0)
    with network.connect(host) as conversation, pytest.raises(HostUnreachable):
        unlock(conversation, [ALICE])


@pytest.mark.promise(10)
def test_a_port_that_accepts_and_says_nothing_does_not_hold_the_operator(tls: TlsIdentity) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as mute:
        host = make_host("mute", f"[::1]:{mute.getsockname()[1]}", tls.certificate.decode(), 0)
        with network.connect(host, Deadlines(hello=0.3)) as conversation, pytest.raises(HostUnreachable):
            unlock(conversation, [ALICE])


@pytest.mark.promise(10)
def test_a_host_that_never_sends_a_challenge_does_not_hold_the_operator(tls: TlsIdentity) -> None:
    with (
        HostileHost(tls, lambda _: None) as server,
        network.connect(server.host(), Deadlines(hello=0.5)) as conversation,
        pytest.raises(HostUnreachable),
    ):
        unlock(conversation, [ALICE])


@pytest.mark.promise(10)
def test_a_host_that_never_sends_a_result_does_not_hold_the_operator(tls: TlsIdentity) -> None:
    with (
        HostileHost(tls, after_challenge(tls, None)) as server,
        network.connect(server.host(), Deadlines(session=1)) as conversation,
        pytest.raises(HostUnreachable),
    ):
        unlock(conversation, [ALICE])


def test_an_answer_before_the_hello_is_refused_here(tls: TlsIdentity) -> None:
    host = make_host("any", "[::1]:1", tls.certificate.decode(), 0)
    with network.connect(host) as conversation, pytest.raises(SessionExpired):
        conversation.answer(AnswerCall(bytes(16), (), "", False))


# --- the console


def test_the_console_unlocks_over_the_daemons_socket(tmp_path: Path) -> None:
    events: list[Event] = []
    with (
        UnlockDaemon(tmp_path, [ALICE.recipient, BOB.recipient]) as daemon,
        Connection(daemon.path) as connection,
    ):
        outcome = unlock(VarlinkConversation(connection.call), [BOB], reason="drill", on_event=events.append)
        assert daemon.opened == [daemon.file_key]
    assert outcome.accepted == (str(BOB.recipient),)
    assert [type(event) for event in events] == [Challenged, Exchanging]


def test_all_x25519_stanzas_of_a_backup_are_tried(tmp_path: Path) -> None:
    """They carry no name, so their operator is asked about each, and one right answer is enough."""
    others = [X25519Identity.generate().recipient for _ in range(3)]
    with UnlockDaemon(tmp_path, [*others, ALICE.recipient]) as daemon, Connection(daemon.path) as connection:
        outcome = unlock(VarlinkConversation(connection.call), [ALICE, EVE])
        assert daemon.opened == [daemon.file_key]
        assert len(daemon.answers[0]["answers"]) == 4
    assert (outcome.accepted, outcome.refused) == ((str(ALICE.recipient),), ())


def test_a_stranger_at_the_console_is_no_operator(tmp_path: Path) -> None:
    with (
        UnlockDaemon(tmp_path, [ALICE.recipient]) as daemon,
        Connection(daemon.path) as connection,
        pytest.raises(NotAnOperator),
    ):
        unlock(VarlinkConversation(connection.call), [EVE])


@pytest.mark.promise(10)
@pytest.mark.parametrize(
    "reply",
    [{}, {"challenge": []}, {"challenge": {"session": "not base64!"}}, {"challenge": None}],
    ids=repr,
)
def test_nonsense_at_the_console_is_a_bad_message(reply: dict[str, object]) -> None:
    with pytest.raises(BadMessage):
        unlock(VarlinkConversation(lambda method, parameters: reply), [ALICE])


@pytest.mark.promise(4)
def test_the_answer_of_one_session_is_useless_in_another(tmp_path: Path) -> None:
    with UnlockDaemon(tmp_path, [ALICE.recipient]) as daemon:
        with Connection(daemon.path) as connection:
            unlock(VarlinkConversation(connection.call), [ALICE])
        old = daemon.answers[0]["answers"]
        nonce = bytes(32)
        hello: dict[str, Any] = {
            "version": 1,
            "nonce": base64.b64encode(nonce).decode(),
            "tags": [base64.b64encode(recipient_tag(nonce, str(ALICE.recipient))).decode()],
            "peer": "",
        }
        with Connection(daemon.path) as connection:
            challenge: Any = connection.call("io.unsealerd.Unlock.Hello", hello)["challenge"]
            answer = {"session": challenge["session"], "answers": old, "reason": "", "accept_rollback": False}
            result = connection.call("io.unsealerd.Unlock.Answer", answer)
        assert result["outcomes"] == [{"question": 0, "result": "BadAnswer"}]
        assert len(daemon.opened) == 1
