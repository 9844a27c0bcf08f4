"""The gateway between an operator on the network and the daemon's unlock socket: whole sessions, and every way to spoil one."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs.gateway import GatewayProcess
from rigs.raw_operator import GET_STATUS, RawOperator, Refusal, hello, refusal_of
from rigs.unlock_daemon import FACTS, UnlockDaemon

from unsealerd import errors
from unsealerd.core.age import Identity, P256Identity, X25519Identity
from unsealerd.core.conversation import NETWORK_ERRORS, AnswerCall, HelloCall
from unsealerd.core.session import recipient_tag
from unsealerd.errors import BadMessage, named
from unsealerd.gateway import status, translate
from unsealerd.model import State
from unsealerd.operator import network
from unsealerd.operator.unlock import unlock
from unsealerd.proto import unlock_pb2 as pb

ALICE = X25519Identity.generate()
BOB = P256Identity(ec.generate_private_key(ec.SECP256R1()))
EVE = X25519Identity.generate()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with GatewayProcess(tmp_path_factory.mktemp("gateway"), ("[::1]:0", "127.0.0.1:0")) as running:
        yield running


@pytest.fixture
def daemon(gateway: GatewayProcess) -> Iterator[UnlockDaemon]:
    with UnlockDaemon(gateway.runtime_dir, [ALICE.recipient, BOB.recipient]) as running:
        yield running


def refused(gateway: GatewayProcess, *messages: bytes | pb.Hello | pb.Answer) -> Refusal:
    """How a stream with these messages ends; each but the last is answered."""
    with RawOperator(gateway.host()) as operator:
        for message in messages[:-1]:
            operator.send(message).receive()
        return operator.send(messages[-1]).refusal()


def is_named(refusal: Refusal, error: type[errors.UnsealerdError]) -> bool:
    """The name in both places, and nothing else."""
    return refusal == Refusal(status.code(error), error.__name__, error.__name__)


def alices_hello() -> pb.Hello:
    return hello(recipient_tag(bytes(32), str(ALICE.recipient)))


# --- what works


@pytest.mark.parametrize("identity", [ALICE, BOB], ids=["x25519", "p256"])
@pytest.mark.parametrize("family", [0, 1], ids=["ipv6", "ipv4"])
def test_an_operator_unlocks_over_the_network(
    gateway: GatewayProcess, daemon: UnlockDaemon, identity: Identity, family: int
) -> None:
    host = gateway.host(address=gateway.addresses[family])
    with network.connect(host) as conversation:
        outcome = unlock(conversation, [identity], reason="power cut", accept_rollback=True)
    assert daemon.opened == [daemon.file_key]
    assert outcome.state is State.UNLOCKED
    assert outcome.accepted == (str(identity.recipient),)
    assert daemon.peers == [("::1", "127.0.0.1")[family]]
    assert daemon.answers[0]["reason"] == "power cut"
    assert daemon.answers[0]["accept_rollback"] is True


def test_the_challenge_carries_what_the_daemon_says(gateway: GatewayProcess, daemon: UnlockDaemon) -> None:
    with RawOperator(gateway.host()) as operator:
        challenge = operator.send(alices_hello()).receive().challenge
    assert {name: getattr(challenge, name) for name in FACTS} == FACTS
    assert challenge.evidence.tls_pin.fingerprint == gateway.host().fingerprint
    assert len(challenge.session) == 16


def test_an_unknown_generation_is_absent_and_not_zero(gateway: GatewayProcess, daemon: UnlockDaemon) -> None:
    daemon.tamper = lambda challenge: challenge.update(generation=None)
    with RawOperator(gateway.host()) as operator:
        challenge = operator.send(alices_hello()).receive().challenge
    assert not challenge.HasField("generation")


def test_the_stream_ends_after_the_result(gateway: GatewayProcess, daemon: UnlockDaemon) -> None:
    with RawOperator(gateway.host()) as operator:
        challenge = operator.send(alices_hello()).receive().challenge
        share = pb.Share(question=0, x=bytes(31) + b"\1")
        result = operator.send(pb.Answer(session=challenge.session, shares=[share])).receive().result
        assert [outcome.result for outcome in result.outcomes] == ["BadAnswer"]
        assert operator.refusal().code is grpc.StatusCode.OK
    assert daemon.wait_for_connections(0)


def test_status_says_what_anybody_may_know(gateway: GatewayProcess, daemon: UnlockDaemon) -> None:
    before = network.status(gateway.host())
    assert (before.state, before.lock_reason) == (State.LOCKED, "unexpected_reboot")
    with network.connect(gateway.host()) as conversation:
        unlock(conversation, [ALICE])
    after = network.status(gateway.host())
    assert (after.state, after.lock_reason) == (State.UNLOCKED, None)


# --- a session ends with its stream


def test_the_daemons_connection_ends_when_the_operator_leaves(
    gateway: GatewayProcess, daemon: UnlockDaemon
) -> None:
    with RawOperator(gateway.host()) as operator:
        operator.send(alices_hello()).receive()
        assert daemon.connections == 1
    assert daemon.wait_for_connections(0)


def test_the_daemons_connection_ends_when_the_operator_says_no_more(
    gateway: GatewayProcess, daemon: UnlockDaemon
) -> None:
    with RawOperator(gateway.host()) as operator:
        operator.send(alices_hello()).receive()
        operator.end()
        assert operator.refusal().code is grpc.StatusCode.OK
        assert daemon.wait_for_connections(0)


def test_one_operator_does_not_disturb_another(gateway: GatewayProcess, daemon: UnlockDaemon) -> None:
    with RawOperator(gateway.host()) as waiting, RawOperator(gateway.host()) as rude:
        first = waiting.send(alices_hello()).receive().challenge
        rude.send(alices_hello()).receive()
        rude.send(pb.Answer(session=first.session, shares=[pb.Share(x=bytes(32))]))
        assert is_named(rude.refusal(), BadMessage)
        x = ALICE.exchange(first.questions[0].point)
        result = waiting.send(
            pb.Answer(session=first.session, shares=[pb.Share(question=0, x=bytes(x.view))])
        ).receive()
    assert result.result.state == pb.STATE_UNLOCKED


# --- hostile operators


BAD_HELLOS: dict[str, bytes | pb.Hello | pb.Answer] = {
    "answer first": pb.Answer(session=bytes(16), shares=[pb.Share(x=bytes(32))]),
    "garbage": b"\xff" * 100,
    "nothing": b"",
    "text that is not UTF-8": b"\x12\x03\x1a\x01\xff",
    "another version": hello(bytes(16), version=2),
    "short nonce": hello(bytes(16), nonce=bytes(31)),
    "no tags": hello(),
    "too many tags": hello(*(bytes([n]) * 16 for n in range(33))),
    "short tag": hello(bytes(15)),
}


@pytest.mark.promise(10)
@pytest.mark.parametrize("message", BAD_HELLOS.values(), ids=BAD_HELLOS.keys())
def test_a_bad_first_message_is_a_bad_message(
    gateway: GatewayProcess, daemon: UnlockDaemon, message: bytes | pb.Hello | pb.Answer
) -> None:
    assert is_named(refused(gateway, message), BadMessage)
    assert daemon.wait_for_connections(0)


def test_two_hellos_are_a_bad_message(gateway: GatewayProcess, daemon: UnlockDaemon) -> None:
    assert is_named(refused(gateway, alices_hello(), alices_hello()), BadMessage)


def test_garbage_instead_of_an_answer_is_a_bad_message(gateway: GatewayProcess, daemon: UnlockDaemon) -> None:
    assert is_named(refused(gateway, alices_hello(), b"\xff" * 100), BadMessage)
    assert daemon.wait_for_connections(0)


def test_a_strangers_hello_is_not_an_operators(gateway: GatewayProcess, daemon: UnlockDaemon) -> None:
    stranger = hello(recipient_tag(bytes(32), str(EVE.recipient)))
    assert is_named(refused(gateway, stranger), errors.NotAnOperator)


def test_a_message_above_the_limit_is_refused(gateway: GatewayProcess, daemon: UnlockDaemon) -> None:
    assert refused(gateway, bytes(17 << 10)).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert daemon.connections == 0


def test_metadata_above_the_limit_is_refused(gateway: GatewayProcess, daemon: UnlockDaemon) -> None:
    with RawOperator(gateway.host(), metadata=(("padding", "x" * (9 << 10)),)) as operator:
        assert operator.send(alices_hello()).refusal().code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert daemon.peers == []


def test_a_method_that_is_not_there_is_refused(gateway: GatewayProcess) -> None:
    with RawOperator(gateway.host()) as operator, pytest.raises(grpc.RpcError) as caught:
        operator.channel.unary_unary("/unsealerd.v1.Unlock/Export", bytes, bytes)(b"", timeout=60)
    assert refusal_of(caught.value).code is grpc.StatusCode.UNIMPLEMENTED


# --- errors of the daemon, by name and no more


@pytest.mark.parametrize("name", sorted(kind.__name__ for kind in NETWORK_ERRORS))
def test_every_error_of_the_daemon_travels_by_name(
    gateway: GatewayProcess, daemon: UnlockDaemon, name: str
) -> None:
    daemon.error = f"io.unsealerd.Unlock.{name}"
    kind = named(name)
    assert kind is not None
    assert is_named(refused(gateway, alices_hello()), kind)
    with network.connect(gateway.host()) as conversation, pytest.raises(kind):
        unlock(conversation, [ALICE])


@pytest.mark.parametrize(
    "name",
    [
        "io.unsealerd.Unlock.KeyNotFound",
        "io.unsealerd.Unlock.UnsealerdError",
        "io.unsealerd.Admin.BadRequest",
        "x",
        "",
    ],
)
def test_an_error_that_the_interface_does_not_have_stays_here(
    gateway: GatewayProcess, daemon: UnlockDaemon, name: str
) -> None:
    daemon.error = name
    assert is_named(refused(gateway, alices_hello()), errors.DaemonUnreachable)


def test_a_refusal_to_unseal_is_a_tpm_that_failed(gateway: GatewayProcess, daemon: UnlockDaemon) -> None:
    daemon.error = "io.unsealerd.Unlock.SealRefused"
    assert is_named(refused(gateway, alices_hello()), errors.TpmFailed)


def test_a_parameter_that_the_daemon_refuses_is_a_bad_message(
    gateway: GatewayProcess, daemon: UnlockDaemon
) -> None:
    daemon.error = "org.varlink.service.InvalidParameter"
    assert is_named(refused(gateway, alices_hello()), BadMessage)


def test_the_error_table_is_complete() -> None:
    assert {kind for kind in NETWORK_ERRORS if status.code(kind)} == NETWORK_ERRORS
    interface = Path(status.__file__).parents[1] / "daemon" / "interfaces" / "io.unsealerd.Unlock.varlink"
    names = {line.split()[1] for line in interface.read_text().splitlines() if line.startswith("error ")}
    assert {kind.__name__ for kind in NETWORK_ERRORS} == names - {"SealRefused"} | {"DaemonUnreachable"}


BAD_REPLIES: dict[str, bytes] = {
    "not JSON": b"no\0",
    "not an object": b"[]\0",
    "another reply": b'{"parameters": {"challenge": 1}}\0',
    "another curve": b'{"parameters": {"challenge": {"questions": [{"tag": "", "curve": "p384", "point": ""}]}}}\0',
    "not UTF-8": b'{"error": "\xff"}\0',
    "deep": b'{"parameters": {"x": ' + b"[" * 30_000 + b"]" * 30_000 + b"}}\0",
    "without end": b"[" * (65 << 10),
}


@pytest.mark.promise(10)
@pytest.mark.parametrize("reply", BAD_REPLIES.values(), ids=BAD_REPLIES.keys())
def test_a_daemon_that_talks_nonsense_is_unreachable(
    gateway: GatewayProcess, daemon: UnlockDaemon, reply: bytes
) -> None:
    daemon.raw_reply = reply
    assert is_named(refused(gateway, alices_hello()), errors.DaemonUnreachable)
    with RawOperator(gateway.host()) as operator, pytest.raises(grpc.RpcError) as caught:
        operator.channel.unary_unary(GET_STATUS, bytes, bytes)(b"", timeout=60)
    assert is_named(refusal_of(caught.value), errors.DaemonUnreachable)


@pytest.mark.parametrize("facts", [{"uptime": -1}, {"backup_time": 2**64}, {"deadline": 2**32}])
def test_a_daemon_that_says_what_no_message_holds_is_unreachable(
    gateway: GatewayProcess, daemon: UnlockDaemon, facts: dict[str, int]
) -> None:
    daemon.tamper = lambda challenge: challenge.update(facts)
    assert is_named(refused(gateway, alices_hello()), errors.DaemonUnreachable)


def test_without_a_daemon_the_gateway_says_so(gateway: GatewayProcess) -> None:
    assert is_named(refused(gateway, alices_hello()), errors.DaemonUnreachable)
    with network.connect(gateway.host()) as conversation, pytest.raises(errors.DaemonUnreachable):
        unlock(conversation, [ALICE])


# --- any bytes


@pytest.mark.promise(10)
@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_call_or_a_bad_message(data: bytes) -> None:
    try:
        call = translate.request(data, "peer")
    except BadMessage:
        return
    assert isinstance(call, HelloCall | AnswerCall)


@settings(max_examples=100)
@given(st.binary(max_size=64), st.lists(st.binary(max_size=40), max_size=40), st.integers(0, 2**32 - 1))
def test_a_hello_is_passed_on_as_it_is(nonce: bytes, tags: list[bytes], version: int) -> None:
    message = pb.SessionRequest(hello=pb.Hello(version=version, nonce=nonce, tags=tags))
    assert translate.request(message.SerializeToString(), "192.0.2.1") == HelloCall(
        version, nonce, tuple(tags), "192.0.2.1"
    )
