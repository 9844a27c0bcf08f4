"""An operator's end of the stream that says whatever it is told to, and keeps what it hears as bytes."""

import queue
from dataclasses import dataclass
from typing import Any, Self

import grpc

from unsealerd.operator.hosts import Host
from unsealerd.proto import unlock_pb2 as pb

SESSION = "/unsealerd.v1.Unlock/Session"
GET_STATUS = "/unsealerd.v1.Unlock/GetStatus"


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a call ended."""

    code: grpc.StatusCode
    details: str
    name: str | None
    """Of the trailing metadata."""


class RawOperator:
    """One channel of its own, and at most one stream on it."""

    def __init__(self, host: Host, seconds: float = 60, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        options = [
            ("grpc.ssl_target_name_override", "unsealerd.invalid"),
            # Otherwise gRPC shares one connection between all channels to one address.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_send_message_length", -1),
        ]
        credentials = grpc.ssl_channel_credentials(root_certificates=host.certificate.encode())
        self.channel = grpc.secure_channel(f"dns:///{host.address}", credentials, options=options)
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._seconds = seconds
        self._metadata = metadata
        self.call: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.put(None)
        if self.call is not None:
            self.call.cancel()
        self.channel.close()

    def open(self) -> Self:
        """Begin the stream without a message."""
        stream = self.channel.stream_stream(SESSION, bytes, bytes)
        requests = iter(self._requests.get, None)
        self.call = stream(requests, timeout=self._seconds, metadata=self._metadata)
        return self

    def send(self, message: bytes | pb.Hello | pb.Answer) -> Self:
        if self.call is None:
            self.open()
        match message:
            case pb.Hello():
                data = pb.SessionRequest(hello=message).SerializeToString()
            case pb.Answer():
                data = pb.SessionRequest(answer=message).SerializeToString()
            case _:
                data = message
        self._requests.put(data)
        return self

    def end(self) -> None:
        """Half-close: nothing more will be said."""
        self._requests.put(None)

    def receive(self) -> pb.SessionResponse:
        data: bytes = next(self.call)
        return pb.SessionResponse.FromString(data)

    def refusal(self) -> Refusal:
        """How the stream ends; it must not be with an answer."""
        try:
            answer = next(self.call)
        except StopIteration:
            pass
        except grpc.RpcError:
            pass
        else:
            raise AssertionError(f"an answer instead of an end: {answer!r}")
        return refusal_of(self.call)


def refusal_of(call: Any) -> Refusal:
    names = [value for key, value in call.trailing_metadata() or () if key == "unsealerd-error"]
    return Refusal(call.code(), call.details(), names[0] if names else None)


def hello(*tags: bytes, nonce: bytes = bytes(32), version: int = 1) -> pb.Hello:
    return pb.Hello(version=version, nonce=nonce, tags=tags)
