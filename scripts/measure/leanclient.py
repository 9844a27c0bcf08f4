"""The leanest operator: one gRPC stream at a time over HTTP/2 and TLS 1.3, written out by hand.

For measuring: gRPC's own client in Python takes twice the time of the gateway, so that a loop of it measures itself. It reads
what the gateway says and no more. RFC 9113 (frames), RFC 7541 (header fields), gRPC's "PROTOCOL-HTTP2.md" (messages).
"""

import socket
import ssl
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from unsealerd.core.tlskey import SERVER_NAME
from unsealerd.model import Purpose
from unsealerd.proto import unlock_pb2

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM = ACK = 1
END_HEADERS = 4
_HEAD = 9  # bytes of a frame before its payload
_WINDOW = (1 << 30).to_bytes(4, "big")
METHOD = f"/{unlock_pb2.DESCRIPTOR.services_by_name['Unlock'].full_name}/Session"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def message(data: bytes) -> bytes:
    """As the body of a stream has it: not compressed, after its length."""
    return b"\0" + len(data).to_bytes(4, "big") + data


def _literal(name: bytes, text: str) -> bytes:
    """A header field that is not indexed; ``name``: its number or itself, encoded (RFC 7541 section 6.2.2)."""
    return name + bytes((len(text),)) + text.encode()


_FIELDS = b"".join(
    (
        b"\x83\x87",  # :method POST, :scheme https
        _literal(b"\x04", METHOD),
        _literal(b"\x01", SERVER_NAME),
        _literal(b"\x0f\x10", "application/grpc"),  # content-type
        _literal(b"\x00\x02te", "trailers"),
    )
)


def context(certificate: str) -> ssl.SSLContext:
    """For the one certificate that is pinned."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.load_verify_locations(cadata=certificate)
    made.set_alpn_protocols(["h2"])
    return made


class LeanClient:
    """A connection. Its streams are one after the other. Raises ``ConnectionError`` for whatever is not expected."""

    def __init__(self, address: tuple[str, int], tls: ssl.SSLContext, source: str = "") -> None:
        """``source``: the address to come from, another peer for the host."""
        plain = socket.create_connection(address, timeout=60, source_address=(source, 0) if source else None)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = tls.wrap_socket(plain, server_hostname=SERVER_NAME)
        self._unsent = PREFACE + frame(SETTINGS, 0, 0) + frame(WINDOW_UPDATE, 0, 0, _WINDOW)
        self._received = b""
        self._stream = -1
        self._body = b""

    def hello(self, request: bytes) -> bytes:
        """Open a stream with this message, and give the first one that comes back."""
        self._stream += 2
        self._body = b""
        self._send(
            frame(HEADERS, END_HEADERS, self._stream, _FIELDS), frame(DATA, 0, self._stream, message(request))
        )
        return self._response()

    def answer(self, request: bytes) -> bytes:
        self._send(frame(DATA, 0, self._stream, message(request)))
        return self._response()

    def leave(self) -> None:
        """End the stream, and wait for the host's end of it."""
        self._send(frame(DATA, END_STREAM, self._stream))
        while not self._take():
            pass

    def _send(self, *frames: bytes) -> None:
        self._socket.sendall(self._unsent + b"".join(frames))
        self._unsent = b""

    def _response(self) -> bytes:
        while len(self._body) < 5 or len(self._body) < 5 + int.from_bytes(self._body[1:5], "big"):
            if self._take():
                raise ConnectionError("the host ended the stream")
        data, self._body = self._body[5:], b""
        return data

    def _take(self) -> bool:
        """One frame; whether the stream has ended with it."""
        head = self._exactly(_HEAD)
        kind, flags = head[3], head[4]
        stream = int.from_bytes(head[5:9], "big")
        payload = self._exactly(int.from_bytes(head[:3], "big"))
        match kind:
            case 4 | 6 if not flags & ACK:  # SETTINGS, PING
                self._socket.sendall(frame(kind, ACK, 0, payload if kind == PING else b""))
            case 0 if stream == self._stream:  # DATA
                self._body += payload
            case 3 | 7:  # RST_STREAM, GOAWAY
                raise ConnectionError(f"a frame of type {kind}: {payload!r}")
        return stream == self._stream and kind in (DATA, HEADERS) and bool(flags & END_STREAM)

    def _exactly(self, count: int) -> bytes:
        while len(self._received) < count:
            part = self._socket.recv(65536)
            if not part:
                raise ConnectionError("the host closed the connection")
            self._received += part
        found, self._received = self._received[:count], self._received[count:]
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()


def hello(nonce: bytes, tags: Sequence[bytes], purpose: Purpose) -> bytes:
    purposes = {Purpose.UNLOCK: unlock_pb2.PURPOSE_UNLOCK, Purpose.DRILL: unlock_pb2.PURPOSE_DRILL}
    step = unlock_pb2.Hello(version=1, nonce=nonce, tags=tags, purpose=purposes[purpose])
    return unlock_pb2.SessionRequest(hello=step).SerializeToString()


def challenge(response: bytes) -> unlock_pb2.Challenge:
    return unlock_pb2.SessionResponse.FromString(response).challenge


def result(response: bytes) -> unlock_pb2.Result:
    return unlock_pb2.SessionResponse.FromString(response).result


def answer(session: bytes, shares: Sequence[unlock_pb2.Share]) -> bytes:
    step = unlock_pb2.Answer(session=session, shares=shares)
    return unlock_pb2.SessionRequest(answer=step).SerializeToString()
