"""Network messages as calls on the unlock socket, and back. Nothing is decided here.

What protobuf cannot parse is `BadMessage`; what it can parse is passed on as it is, and the daemon judges it. What of the
daemon's it cannot hold (a negative time) is `DaemonUnreachable`.
"""

import contextlib
from collections.abc import Iterator

from google.protobuf.message import DecodeError

from unsealerd.core.conversation import Answer, AnswerCall, Challenge, HelloCall, Result, Status
from unsealerd.errors import BadMessage, DaemonUnreachable
from unsealerd.model import Curve, Purpose, State
from unsealerd.proto import unlock_pb2 as pb

_CURVES = {Curve.P256: pb.CURVE_P256, Curve.X25519: pb.CURVE_X25519}
_PURPOSES: dict[int, Purpose] = {
    pb.PURPOSE_UNSPECIFIED: Purpose.UNLOCK,
    pb.PURPOSE_UNLOCK: Purpose.UNLOCK,
    pb.PURPOSE_DRILL: Purpose.DRILL,
}
_STATES = {
    State.UNINITIALISED: pb.STATE_UNINITIALISED,
    State.LOCKED: pb.STATE_LOCKED,
    State.UNLOCKED: pb.STATE_UNLOCKED,
}


def request(data: bytes, peer: str) -> HelloCall | AnswerCall:
    """The call that a message of the operator asks for. Raises `BadMessage`."""
    try:
        message = pb.SessionRequest.FromString(data)
    except DecodeError as err:
        raise BadMessage("not a SessionRequest") from err
    match message.WhichOneof("step"):
        case "hello":
            hello = message.hello
            purpose = _PURPOSES.get(hello.purpose)
            if purpose is None:
                raise BadMessage("a hello with an unknown purpose")
            return HelloCall(hello.version, hello.nonce, tuple(hello.tags), peer, purpose)
        case "answer":
            answer = message.answer
            shares = tuple(Answer(share.question, share.x) for share in answer.shares)
            return AnswerCall(answer.session, shares, answer.reason, answer.accept_rollback)
        case _:
            raise BadMessage("a SessionRequest without a step")


@contextlib.contextmanager
def _held() -> Iterator[None]:
    try:
        yield
    except ValueError as err:
        raise DaemonUnreachable("the daemon says what no message can hold") from err


@_held()
def challenge(value: Challenge, fingerprint: bytes) -> bytes:
    """``fingerprint``: of the TLS key, which is this gateway's to add."""
    questions = [
        pb.Question(tag=question.tag, curve=_CURVES[question.curve], point=question.point, kdf=question.kdf)
        for question in value.questions
    ]
    message = pb.Challenge(
        session=value.session,
        questions=questions,
        lock_reason=value.lock_reason,
        boot_id=value.boot_id,
        host_name=value.host_name,
        uptime=value.uptime,
        generation=value.generation,
        backup_time=value.backup_time,
        shares_present=value.shares_present,
        shares_needed=value.shares_needed,
        deadline=value.deadline,
        evidence=pb.Evidence(tls_pin=pb.TlsPin(fingerprint=fingerprint)),
    )
    return pb.SessionResponse(challenge=message).SerializeToString()


@_held()
def result(value: Result) -> bytes:
    message = pb.Result(
        state=_STATES[value.state],
        shares_present=value.shares_present,
        shares_needed=value.shares_needed,
        outcomes=[pb.Outcome(question=outcome.question, result=outcome.result) for outcome in value.outcomes],
        answered=value.answered,
        missing=value.missing,
        seconds_left=value.seconds_left,
    )
    return pb.SessionResponse(result=message).SerializeToString()


@_held()
def status(value: Status) -> bytes:
    return pb.GetStatusResponse(
        state=_STATES[value.state],
        lock_reason=value.lock_reason,
        shares_present=value.shares_present,
        shares_needed=value.shares_needed,
    ).SerializeToString()
