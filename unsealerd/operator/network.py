"""The conversation over gRPC, with a host whose certificate is pinned."""

import contextlib
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import msgspec

from unsealerd import errors
from unsealerd.core.conversation import (
    ERROR_METADATA,
    NETWORK_ERRORS,
    AnswerCall,
    Challenge,
    HelloCall,
    Outcome,
    Question,
    Result,
    Status,
)
from unsealerd.core.tlskey import SERVER_NAME, fingerprint
from unsealerd.errors import (
    BadMessage,
    HostMismatch,
    HostUnreachable,
    LimitExceeded,
    NotInstalled,
    SessionExpired,
)
from unsealerd.model import Curve, Purpose, State
from unsealerd.operator.evidence import Evidence, Expectation, KnownHost, NoEvidence, TlsPin
from unsealerd.operator.hosts import Host, fetch_certificate

if TYPE_CHECKING:
    import grpc

    from unsealerd.proto import unlock_pb2

MAX_MESSAGE_BYTES = 16 << 10
MAX_METADATA_BYTES = 8 << 10


class _Stream(Protocol):
    """What gRPC gives for a stream; its stubs do not say it."""

    def __next__(self) -> bytes: ...

    def cancel(self) -> object: ...


class _Failed(Protocol):
    """What every ``grpc.RpcError`` of a call is, too."""

    def code(self) -> "grpc.StatusCode": ...

    def trailing_metadata(self) -> Sequence[tuple[str, str | bytes]] | None: ...


class Deadlines(msgspec.Struct, frozen=True):
    """Seconds."""

    hello: float = 15
    """From connecting to the challenge."""
    session: float = 130
    """All of it: a little more than the server allows, so that the server says so."""


_USUAL = Deadlines()


@contextlib.contextmanager
def connect(host: Host, deadlines: Deadlines = _USUAL) -> Iterator["GrpcConversation"]:
    """A conversation with a known host. Raises `NotInstalled`; the network is used at the hello."""
    with open_channel(host) as channel:
        conversation = GrpcConversation(host, channel, deadlines)
        try:
            yield conversation
        finally:
            conversation.close()


def status(host: Host, deadlines: Deadlines = _USUAL) -> Status:
    """What anybody may know of a host. Raises what `GrpcConversation.hello` raises."""
    import grpc

    with open_channel(host) as channel:
        from google.protobuf.message import DecodeError

        from unsealerd.proto import unlock_pb2

        method = channel.unary_unary(_method("GetStatus"), bytes, bytes)
        try:
            reply = unlock_pb2.GetStatusResponse.FromString(method(b"", timeout=deadlines.hello))
        except grpc.RpcError as err:
            raise _named(err, host, None) from err
        except DecodeError as err:
            raise BadMessage("not a GetStatusResponse") from err
        reason = reply.lock_reason if reply.HasField("lock_reason") else None
        return Status(_state(reply.state), reply.shares_present, reply.shares_needed, reason)


class GrpcConversation:
    """One stream of unsealerd.v1.Unlock/Session. Its messages are parsed here, so that a malformed one is `BadMessage`."""

    def __init__(self, host: Host, channel: "grpc.Channel", deadlines: Deadlines) -> None:
        self._host = host
        self._deadlines = deadlines
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._stream = channel.stream_stream(_method("Session"), bytes, bytes)
        self._call: _Stream | None = None

    @property
    def expected(self) -> Expectation:
        return KnownHost(self._host.name, self._host.fingerprint, self._host.trust)

    def hello(self, call: HelloCall) -> tuple[Challenge, Evidence]:
        """Raises `HostUnreachable`, `HostMismatch`, `BadMessage`, and what the host names."""
        from unsealerd.proto import unlock_pb2 as pb

        purposes = {Purpose.UNLOCK: pb.PURPOSE_UNLOCK, Purpose.DRILL: pb.PURPOSE_DRILL}
        hello = pb.Hello(
            version=call.version, nonce=call.nonce, tags=call.tags, purpose=purposes[call.purpose]
        )
        self._requests.put(pb.SessionRequest(hello=hello).SerializeToString())
        requests = iter(self._requests.get, None)
        self._call = cast(_Stream, self._stream(requests, timeout=self._deadlines.session))
        response = self._next(self._call, self._deadlines.hello)
        if response.WhichOneof("step") != "challenge":
            raise BadMessage("something else than a challenge")
        return _challenge(response.challenge), _evidence(response.challenge)

    def answer(self, call: AnswerCall) -> Result:
        """Raises `SessionExpired`, `HostUnreachable`, `BadMessage`, and what the host names."""
        from unsealerd.proto import unlock_pb2 as pb

        if self._call is None:
            raise SessionExpired("an answer before the hello")
        answer = pb.Answer(
            session=call.session,
            shares=[pb.Share(question=each.question, x=each.x) for each in call.answers],
            reason=call.reason,
            accept_rollback=call.accept_rollback,
        )
        self._requests.put(pb.SessionRequest(answer=answer).SerializeToString())
        response = self._next(self._call, self._deadlines.session)
        if response.WhichOneof("step") != "result":
            raise BadMessage("something else than a result")
        return _result(response.result)

    def close(self) -> None:
        self._requests.put(None)  # ends the thread that sends
        if self._call is not None:
            self._call.cancel()

    def _next(self, call: _Stream, seconds: float) -> "unlock_pb2.SessionResponse":
        import grpc
        from google.protobuf.message import DecodeError

        from unsealerd.proto import unlock_pb2

        # gRPC has a deadline for the stream, none for a message: who accepts and says nothing would hold us.
        timer = threading.Timer(seconds, call.cancel)
        timer.daemon = True
        timer.start()
        try:
            data = next(call)
        except StopIteration as err:
            raise BadMessage("the host ended the session without an answer") from err
        except grpc.RpcError as err:
            raise _named(err, self._host, seconds) from err
        finally:
            timer.cancel()
        try:
            return unlock_pb2.SessionResponse.FromString(data)
        except DecodeError as err:
            raise BadMessage("not a SessionResponse") from err


def open_channel(host: Host) -> "grpc.Channel":
    """To a known host, and to no other. Raises `NotInstalled`; the network is used by the first call."""
    # As the gateway does: the pinned key is on P-256, and no suite is left that could use it in TLS 1.2.
    os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES256-GCM-SHA384"
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        import grpc
    except ImportError as err:
        raise NotInstalled("grpcio, which speaks with a host over the network") from err
    # The pinned certificate is the only root there is, and it is no CA: nothing else verifies.
    credentials = grpc.ssl_channel_credentials(root_certificates=host.certificate.encode())
    options = [
        ("grpc.ssl_target_name_override", SERVER_NAME),
        ("grpc.default_authority", SERVER_NAME),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        # No proxy of the environment, no service configuration from DNS, no second attempt behind our back.
        ("grpc.enable_http_proxy", 0),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.enable_retries", 0),
    ]
    return grpc.secure_channel(f"dns:///{host.address}", credentials, options=options)


def _method(name: str) -> str:
    from unsealerd.proto import unlock_pb2

    return f"/{unlock_pb2.DESCRIPTOR.services_by_name['Unlock'].full_name}/{name}"


def _named(err: "grpc.RpcError", host: Host, seconds: float | None) -> errors.UnsealerdError:
    """The error that a failed call means: the host's own word, or else what became of the connection."""
    import grpc

    call = cast(_Failed, err)
    for key, value in call.trailing_metadata() or ():
        if key == ERROR_METADATA:
            kind = errors.named(value) if isinstance(value, str) else None
            return kind() if kind in NETWORK_ERRORS else BadMessage("an error without a known name")
    match call.code():
        case grpc.StatusCode.UNAVAILABLE:
            return _connection_lost(host)
        case grpc.StatusCode.CANCELLED | grpc.StatusCode.DEADLINE_EXCEEDED:
            return HostUnreachable(f"{host.address}: no answer" + (f" in {seconds:g} s" if seconds else ""))
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return LimitExceeded("a message that is too large")
        case code:
            return BadMessage(f"the call ended with {code.name}")


def _connection_lost(host: Host) -> errors.UnsealerdError:
    """Why there is no connection. gRPC says it in prose only, so the host's certificate is fetched and compared."""
    try:
        certificate = fetch_certificate(host.address)
        if fingerprint(certificate.encode()) != host.fingerprint:
            return HostMismatch(f"{host.address} has another TLS key than {host.name} when it was added")
    except HostUnreachable as err:
        return err
    except errors.IdentityInvalid:
        return HostMismatch(f"{host.address} has a certificate that cannot be read")
    return HostUnreachable(f"{host.address}: the connection was lost")


# --- messages as values


def _challenge(message: "unlock_pb2.Challenge") -> Challenge:
    from unsealerd.proto import unlock_pb2 as pb

    curves: dict[int, Curve] = {pb.CURVE_P256: Curve.P256, pb.CURVE_X25519: Curve.X25519}
    questions = []
    for question in message.questions:
        curve = curves.get(question.curve)
        if curve is None:
            raise BadMessage("a question on an unknown curve")
        kdf = question.kdf if question.HasField("kdf") else None
        questions.append(Question(question.tag, curve, question.point, kdf))
    return Challenge(
        session=message.session,
        questions=tuple(questions),
        lock_reason=message.lock_reason,
        boot_id=message.boot_id,
        host_name=message.host_name,
        uptime=message.uptime,
        backup_time=message.backup_time,
        shares_present=message.shares_present,
        shares_needed=message.shares_needed,
        deadline=message.deadline,
        generation=message.generation if message.HasField("generation") else None,
    )


def _evidence(message: "unlock_pb2.Challenge") -> Evidence:
    if message.evidence.WhichOneof("kind") == "tls_pin":
        return TlsPin(message.evidence.tls_pin.fingerprint)
    return NoEvidence()


def _result(message: "unlock_pb2.Result") -> Result:
    outcomes = tuple(Outcome(each.question, each.result) for each in message.outcomes)
    return Result(
        _state(message.state),
        message.shares_present,
        message.shares_needed,
        outcomes,
        tuple(message.answered),
        tuple(message.missing),
        message.seconds_left if message.HasField("seconds_left") else None,
    )


def _state(value: int) -> State:
    from unsealerd.proto import unlock_pb2 as pb

    states: dict[int, State] = {
        pb.STATE_UNINITIALISED: State.UNINITIALISED,
        pb.STATE_LOCKED: State.LOCKED,
        pb.STATE_UNLOCKED: State.UNLOCKED,
    }
    if value not in states:
        raise BadMessage("an unknown state")
    return states[value]
