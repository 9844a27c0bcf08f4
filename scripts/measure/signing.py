"""Signatures over the `keys` socket, against a gRPC server that does the same."""

import base64
import hmac
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from rigs.server import Server, wait_for

from measure.figure import (
    MESSAGE,
    Figure,
    background,
    compare,
    figure,
    initialised,
)

IN_FLIGHT = 32
GRPC_METHOD = "/bench.Mac/Sign"


class Signer:
    """The leanest client: one connection, requests that were encoded before."""

    count = 4096  # in a turn

    def __init__(self, server: Server, stack: ExitStack, key: str = "demo") -> None:
        self.pid = server.pid
        self._socket = stack.enter_context(socket.socket(socket.AF_UNIX))
        self._socket.connect(str(server.run_dir / "keys"))
        call = {"key": key, "message": base64.b64encode(MESSAGE).decode()}
        self._frame = json.dumps({"method": "io.unsealerd.Keys.Sign", "parameters": call}).encode() + b"\0"
        self._socket.sendall(self._frame)
        assert b'"mac"' in self._socket.recv(4096)

    def turn(self, in_flight: int) -> float:
        """Seconds for each request."""
        burst = self._frame * in_flight
        start = time.perf_counter()
        for _ in range(self.count // in_flight):
            self._socket.sendall(burst)
            answered = 0
            while answered < in_flight:
                answered += self._socket.recv(65536).count(0)
        return (time.perf_counter() - start) / self.count

    def pipelined(self) -> float:
        return self.turn(IN_FLIGHT)


class GrpcSigner:
    """The same with gRPC's own client, and `serve_grpc` in a process of its own."""

    count = 512

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        import grpc

        path = directory / "grpc"
        self.pid = background(stack, sys.executable, "-m", "measure", "--serve-grpc", str(path))
        wait_for(path.exists, "the gRPC server")
        channel = stack.enter_context(grpc.insecure_channel(f"unix:{path}"))
        self._call = channel.unary_unary(GRPC_METHOD, bytes, bytes)
        assert len(self._call(MESSAGE, wait_for_ready=True)) == 64

    def turn(self, in_flight: int) -> float:
        start = time.perf_counter()
        for _ in range(self.count // in_flight):
            if in_flight == 1:
                self._call(MESSAGE)
            else:
                for future in [self._call.future(MESSAGE) for _ in range(in_flight)]:
                    future.result()
        return (time.perf_counter() - start) / self.count


def serve_grpc(path: str) -> None:
    """The HMAC as the daemon computes it; nobody is authorised and nothing recorded. Until killed."""
    import grpc

    key = os.urandom(32)

    def sign(message: bytes, _: object) -> bytes:
        return hmac.digest(key, message, "sha256").hex().encode()

    server = grpc.server(ThreadPoolExecutor(IN_FLIGHT))
    service, method = GRPC_METHOD[1:].split("/")
    handlers = {method: grpc.unary_unary_rpc_method_handler(sign)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
    server.add_insecure_port(f"unix:{path}")
    server.start()
    server.wait_for_termination()


def cpu(signer: Signer | GrpcSigner, in_flight: int) -> float:
    """Seconds of the server's processor for each request: utime and stime of proc_pid_stat(5), in ticks of 10 ms."""

    def spent() -> float:
        fields = Path(f"/proc/{signer.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before, turns = spent(), 6
    for _ in range(turns):
        signer.turn(in_flight)
    return (spent() - before) / (turns * signer.count)


def signing(stack: ExitStack) -> Iterator[Figure]:
    server = initialised(stack)
    ours, theirs = Signer(server, stack), GrpcSigner(server.base, stack)
    peer = "grpcio sync server"
    for in_flight, name, reach in (
        (1, "closed loop", ">= 8"),
        (IN_FLIGHT, f"{IN_FLIGHT} in flight", ">= 12"),
    ):
        found = compare(9, lambda n=in_flight: ours.turn(n), lambda n=in_flight: theirs.turn(n))  # type: ignore[misc]
        yield figure(f"Sign, {name}", peer, reach, *found)
        spent = cpu(ours, in_flight), cpu(theirs, in_flight)
        yield figure(f"Sign, {name}: CPU of the server", peer, "<= 0.12", *spent)
    # As if it had executed itself for the environment already.
    without = Signer(initialised(stack, UNSEALERD_HYGIENE="1"), stack)
    found = compare(15, ours.pipelined, without.pipelined)
    yield figure("Sign with the hygiene environment", "without it", ">= 0.85", *found)
