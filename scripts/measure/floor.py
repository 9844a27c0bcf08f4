"""What a session cannot be faster than: an empty stream of the same gRPC, and the writes that must be durable."""

import os
import queue
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rigs.server import wait_for

from measure import leanclient
from measure.figure import MESSAGE, background
from measure.sessions import address
from unsealerd.daemon.store import BACKUP, PREVIOUS, DurableDirectory
from unsealerd.model import Purpose

if TYPE_CHECKING:
    import grpc.aio


class EmptyStream:
    """The floor: a gRPC server in Python with the gateway's TLS and limits that sends back what it gets, and does nothing."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        from unsealerd.gateway import identity
        from unsealerd.operator.hosts import make_host

        place = directory / "floor"
        identity.create(place)
        background(stack, sys.executable, "-m", "measure", "--serve-floor", str(place))
        port = place / "port"
        wait_for(port.exists, "the empty gRPC server")
        certificate = identity.load_certificate(place).decode()
        self._host = make_host("floor", f"127.0.0.1:{port.read_text()}", certificate, added=0)
        self._tls = leanclient.context(certificate)

    def session(self) -> None:
        """Two messages each way on a new connection, by the client that `unsealctl` has."""
        from unsealerd.operator.network import open_channel

        waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        with open_channel(self._host) as channel:
            call = channel.stream_stream(leanclient.METHOD, bytes, bytes)(iter(waiting.get, None))
            stream = cast(Iterator[bytes], call)  # the stubs do not say it
            for _ in range(2):
                waiting.put(MESSAGE)
                assert next(stream) == MESSAGE
            waiting.put(None)
            assert not list(stream)

    def connection(self) -> leanclient.LeanClient:
        return leanclient.LeanClient(address(self._host.address), self._tls)

    def ask(self, connection: leanclient.LeanClient) -> None:
        connection.hello(leanclient.hello(bytes(32), [bytes(16)], Purpose.UNLOCK))
        connection.leave()

    def ask_anew(self) -> None:
        with self.connection() as connection:
            self.ask(connection)


def serve_floor(place: str) -> None:
    """Until killed."""
    import asyncio

    import grpc.aio
    from grpc.aio import EOF  # type: ignore[attr-defined]  # the stubs lack it

    from unsealerd.gateway import identity
    from unsealerd.gateway.limits import Limits, channel_options

    tls = identity.load(Path(place))

    async def echo(_: object, context: "grpc.aio.ServicerContext[bytes, bytes]") -> None:
        while (message := await context.read()) is not EOF:
            await context.write(message)

    async def serve() -> None:
        server = grpc.aio.server(options=channel_options(Limits()))
        service, method = leanclient.METHOD[1:].split("/")
        handlers = {method: grpc.stream_stream_rpc_method_handler(echo)}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
        credentials = grpc.ssl_server_credentials([(tls.key, tls.certificate)])
        port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        fresh = Path(place) / "port.new"
        fresh.write_text(str(port))
        fresh.rename(Path(place) / "port")
        await server.wait_for_termination()

    asyncio.run(serve())


class DurableWrites:
    """The other floor: what of a session has to be on disk before the operator is told that the host is unlocked."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory = directory / "writes"
        self._directory.mkdir()
        self._log = stack.enter_context((self._directory / "audit.jsonl").open("ab", buffering=0))

    def session(self) -> None:
        """Its three audit records, and the backup."""
        for _ in range(3):
            self._log.write(bytes(256))
            os.fdatasync(self._log.fileno())
        DurableDirectory(self._directory).write(BACKUP, bytes(512), keep_previous=PREVIOUS)
