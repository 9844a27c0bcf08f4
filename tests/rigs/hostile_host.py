"""A gRPC server with any TLS key that answers each message with prepared bytes: what a hostile host can send."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc

from unsealerd.gateway.identity import TlsIdentity
from unsealerd.operator.hosts import Host, make_host
from unsealerd.proto import unlock_pb2 as pb

Script = Callable[[pb.SessionRequest], bytes | None]
"""What to answer to a message; None: nothing, until the peer gives up."""


class HostileHost:
    def __init__(
        self, identity: TlsIdentity, script: Script, *, refuse_with: tuple[tuple[str, str], ...] = ()
    ) -> None:
        self._identity = identity
        self._script = script
        self._refuse_with = refuse_with
        self.heard: list[pb.SessionRequest] = []

    def __enter__(self) -> Self:
        self._closing = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(4))
        handlers = {"Session": grpc.stream_stream_rpc_method_handler(self._session)}
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("unsealerd.v1.Unlock", handlers)]
        )
        credentials = grpc.ssl_server_credentials([(self._identity.key, self._identity.certificate)])
        port = self._server.add_secure_port("[::1]:0", credentials)
        self.address = f"[::1]:{port}"
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.stop(0).wait()

    def host(self) -> Host:
        return make_host("hostile", self.address, self._identity.certificate.decode(), added=0)

    def _session(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        if self._refuse_with:
            context.set_trailing_metadata(self._refuse_with)
            context.set_code(grpc.StatusCode.FAILED_PRECONDITION)
            return
        for data in requests:
            self.heard.append(pb.SessionRequest.FromString(data))
            answer = self._script(self.heard[-1])
            if answer is None:
                self._closing.wait()
                return
            yield answer
