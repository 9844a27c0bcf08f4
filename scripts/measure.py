"""What `scripts/bench` measures: ratios of medians, against a peer whose turns alternate with ours in the same run.

Everything runs on one core: between two cores a loop of two processes measures the scheduler. Nothing is asserted.
"""

import base64
import hmac
import itertools
import json
import os
import platform
import queue
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import leanclient
from rigs.server import PATIENCE, Server, wait_for
from rigs.swtpm import SoftwareTpm

from unsealerd.client.connection import Connection
from unsealerd.core.auditchain import GENESIS, link
from unsealerd.daemon.app import SETTLING
from unsealerd.daemon.hygiene import ENVIRONMENT
from unsealerd.daemon.store import BACKUP, PREVIOUS, DurableDirectory
from unsealerd.model import Purpose

if TYPE_CHECKING:
    import grpc.aio

    from unsealerd.proto.unlock_pb2 import Challenge

MESSAGE = bytes(range(64))
IN_FLIGHT = 32
CLIENTS = 8
KEYS = 1000
CONNECTIONS = 250  # one user may have 256
RECORDS = 100_000
TANGD = "/usr/libexec/tangd"
GRPC_METHOD = "/bench.Mac/Sign"

Turn = Callable[[], float]
"""Does something, and gives the seconds that it took (for each request)."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A line of the table. Without a ratio there was nothing to compare with; `against` then says why."""

    what: str
    against: str
    reach: str
    ratio: float | None
    ours: str
    theirs: str


def figure(what: str, against: str, reach: str, ours: float, theirs: float | None) -> Figure:
    """Of seconds for each turn. With ``>=`` it is our throughput that is so many times the peer's."""

    def show(value: float | None) -> str:
        if value is None:
            return ""
        if reach.startswith(">="):
            return f"{1 / value:,.0f}/s"
        return f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} µs"

    ratio = None if theirs is None else theirs / ours if reach.startswith(">=") else ours / theirs
    return Figure(what, against, reach, ratio, show(ours), show(theirs))


def compare(rounds: int, ours: Turn, theirs: Turn) -> tuple[float, float]:
    """The medians of both, taken in turns, after one turn each that does not count."""
    seen = [(ours(), theirs()) for _ in range(rounds + 1)][1:]
    return statistics.median(a for a, _ in seen), statistics.median(b for _, b in seen)


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def run(*command: str, stdin: bytes = b"", **environment: str) -> bytes:
    done = subprocess.run(
        command, input=stdin, capture_output=True, env={**os.environ, **environment}, timeout=PATIENCE
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command}: exit {done.returncode}: {done.stderr.decode(errors='replace')}")
    return done.stdout


def absent(*programs: str) -> str:
    """Why a peer cannot be measured; empty if it can."""
    missing = [Path(program).name for program in programs if shutil.which(program) is None]
    return f"not measured: {', '.join(missing)} not installed" if missing else ""


def background(stack: ExitStack, *command: str) -> int:
    """A process until the end of the stack; its id."""
    process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.DEVNULL))
    stack.callback(process.kill)
    return process.pid


def initialised(stack: ExitStack, keys: Sequence[str] = ("demo",), **environment: str) -> Server:
    """A running server, unlocked, without a TPM."""
    server = stack.enter_context(Server(tpm=False, keys=keys))
    server.extra_environment.update(environment)
    server.start().ctl("init")
    return server


def rss(what: str, reach: str, pid: int) -> Figure:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Figure(what, "", reach, None, f"{pages * os.sysconf('SC_PAGE_SIZE') / 1e6:.1f} MB", "")


# --- starting


class Starts:
    """Times starts of a server's daemon by what it tells its manager; in the environment that its unit sets."""

    def __init__(self, server: Server, stack: ExitStack) -> None:
        self.server = server
        path = server.base / "notify"
        self._socket = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self._socket.bind(str(path))
        self._socket.settimeout(PATIENCE)
        server.extra_environment |= {"NOTIFY_SOCKET": str(path), **ENVIRONMENT}

    def start(self) -> None:
        self.server.launch()
        while b"READY=1" not in self._socket.recv(4096).split(b"\n"):
            pass

    def serve(self) -> None:
        self.start()
        self.server.key()

    def restart(self) -> float:
        self.server.stop()
        return timed(self.start)

    def reboot(self) -> float:
        """From exec to the key in a reader's hands."""
        self.server.ctl("seal")
        self.server.stop()
        self.server.reset_tpm()
        return timed(self.serve)


def starting(stack: ExitStack) -> Iterator[Figure]:
    starts = Starts(server := stack.enter_context(Server()), stack)
    starts.start()
    server.ctl("init")
    if why := absent("clevis", "clevis-decrypt-tpm2", "tpm2_unseal"):
        yield figure("exec to keys served, unsealed by TPM", why, "<= 1.0", starts.reboot(), None)
    else:
        tpm = stack.enter_context(SoftwareTpm(server.base / "clevis"))
        where = {"TPM2TOOLS_TCTI": tpm.tcti}
        sealed = run("clevis", "encrypt", "tpm2", '{"pcr_ids":"7"}', stdin=MESSAGE, **where)

        def clevis() -> float:
            tpm.reset()  # without a resource manager its tools leave objects behind
            return timed(lambda: run("clevis", "decrypt", stdin=sealed, **where))

        found = compare(9, starts.reboot, clevis)
        yield figure("exec to keys served, unsealed by TPM", "clevis decrypt (tpm2)", "<= 1.0", *found)
    server.assert_unlocked()
    time.sleep(2 * SETTLING)  # the rest of it is loaded
    yield rss("memory of the daemon, unsealed, idle", "<= 40 MB", server.pid)
    bare = (sys.executable, "-I", "-c", "pass")
    found = compare(9, starts.restart, lambda: timed(lambda: run(*bare)))
    server.assert_locked("daemon_stopped")
    yield figure("exec to ready, locked", "bare interpreter", "<= 6", *found)


# --- signing


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
        self.pid = background(stack, sys.executable, __file__, "--serve-grpc", str(path))
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


# --- unlocking


class Tang:
    """tangd behind socat: a process for each connection, as its unit has it, without the service manager's share."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        keys = directory / "tang"
        keys.mkdir()
        run(f"{TANGD}-keygen", str(keys))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._address: tuple[str, int] = probe.getsockname()
        listen = f"TCP-LISTEN:{self._address[1]},bind=127.0.0.1,reuseaddr,fork,backlog=64"
        background(stack, "socat", listen, f"EXEC:{TANGD} {keys}")
        exchange = next(path for path in keys.iterdir() if json.loads(path.read_text())["alg"] == "ECMR")
        point = run("jose", "jwk", "pub", "-i-", stdin=exchange.read_bytes()).strip()
        head = f"POST /rec/{exchange.stem} HTTP/1.1\r\nHost: tang\r\nContent-Type: application/jwk+json\r\n"
        self._request = f"{head}Content-Length: {len(point)}\r\n\r\n".encode() + point
        wait_for(self._listens, "tangd")
        options = json.dumps({"url": f"http://127.0.0.1:{self._address[1]}"})
        self._sealed = run("clevis", "encrypt", "tang", options, "-y", stdin=MESSAGE)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(self._address) == 0

    def post(self) -> None:
        """One recovery, on a new connection."""
        with socket.create_connection(self._address) as connection:
            connection.sendall(self._request)
            answer = b""
            while b'"x"' not in answer:
                part = connection.recv(4096)
                assert part, answer
                answer += part

    def decrypt(self) -> None:
        run("clevis", "decrypt", stdin=self._sealed)


class Unlocks:
    """Sessions with a server through its gateway."""

    def __init__(self, server: Server) -> None:
        from unsealerd.operator.hosts import make_host

        self._server = server
        server.ctl("host", "add", "server", server.start_gateway(), "--yes")
        certificate = (server.state / "gateway" / "tls.crt").read_text()
        self._host = make_host("server", server.address, certificate, added=0)
        self._tls = leanclient.context(certificate)
        self._peers = itertools.count(1)

    def lock(self) -> None:
        with Connection(str(self._server.run_dir / "admin"), timeout=PATIENCE) as admin:
            admin.call("io.unsealerd.Admin.Lock", {})
        time.sleep(0.5)  # the daemon takes one answer of a peer in that time

    def command(self) -> float:
        self.lock()
        return timed(lambda: self._server.ctl("unlock", "server", "-i", str(self._server.identity_file)))

    def session(self) -> float:
        """All of it by a client that lives: audit records, the backup opened, the state changed."""
        from unsealerd.operator.network import connect
        from unsealerd.operator.unlock import unlock

        self.lock()
        with connect(self._host) as conversation:
            return timed(lambda: unlock(conversation, [self._server.identity]))

    def challenge(self) -> None:
        """A new connection, hello, the challenge verified."""
        from unsealerd.core.conversation import HelloCall
        from unsealerd.operator.evidence import Offer, verify
        from unsealerd.operator.network import connect

        offer = Offer.make(os.urandom(32), [self._server.identity])
        with connect(self._host) as conversation:
            hello = HelloCall(1, offer.nonce, tuple(offer.identities), peer="")
            verify(conversation.expected, offer, *conversation.hello(hello))

    # --- by the leanest client, so that the server is what is measured

    def connection(self, source: str = "") -> leanclient.LeanClient:
        return leanclient.LeanClient(address(self._host.address), self._tls, source)

    def ask(self, connection: leanclient.LeanClient) -> None:
        """A session up to its challenge, and its end. Not answered: answers are paced, two a second for a peer."""
        self._ask(connection, Purpose.UNLOCK)
        connection.leave()

    def ask_anew(self) -> None:
        with self.connection() as connection:
            self.ask(connection)

    def drill(self) -> None:
        """A whole session on a new connection, judged and recorded, of a peer that was never there: so no pace is met."""
        from unsealerd.proto.unlock_pb2 import Share

        number = next(self._peers)
        with self.connection(f"127.{1 + (number >> 16)}.{number >> 8 & 255}.{number & 255}") as connection:
            challenge = self._ask(connection, Purpose.DRILL)
            with self._server.identity.exchange(challenge.questions[0].point) as x:
                share = Share(question=0, x=bytes(x.view))
            result = leanclient.result(connection.answer(leanclient.answer(challenge.session, [share])))
            assert [outcome.result for outcome in result.outcomes] == ["accepted"], result
            connection.leave()

    def _ask(self, connection: leanclient.LeanClient, purpose: Purpose) -> "Challenge":
        from unsealerd.core.session import recipient_tag

        nonce = os.urandom(32)
        tag = recipient_tag(nonce, str(self._server.identity.recipient), purpose)
        challenge = leanclient.challenge(connection.hello(leanclient.hello(nonce, [tag], purpose)))
        assert len(challenge.questions) == 1, challenge
        return challenge


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


class EmptyStream:
    """The floor: a gRPC server in Python with the gateway's TLS and limits that sends back what it gets, and does nothing."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        from unsealerd.gateway import identity
        from unsealerd.operator.hosts import make_host

        place = directory / "floor"
        identity.create(place)
        background(stack, sys.executable, __file__, "--serve-floor", str(place))
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


def at_once(clients: Sequence[Callable[[], object]], each: int = 8) -> float:
    """Seconds for each of the runs, of which every client does so many."""

    def loop(client: Callable[[], object]) -> None:
        for _ in range(each):
            client()

    with ThreadPoolExecutor(len(clients)) as pool:
        return timed(lambda: list(pool.map(loop, clients))) / (len(clients) * each)


def unlocking(stack: ExitStack) -> Iterator[Figure]:
    server = initialised(stack)
    unlocks = Unlocks(server)
    yield rss("memory of the gateway", "<= 50 MB", server.gateway_pid)
    if why := absent("clevis", "curl", "jose", "socat", TANGD):
        yield figure("unsealctl unlock, whole process", why, "<= 1.5", unlocks.command(), None)
        return
    tang = Tang(server.base, stack)
    found = compare(6, unlocks.command, lambda: timed(tang.decrypt))
    yield figure("unsealctl unlock, whole process", "clevis decrypt (tang)", "<= 1.5", *found)
    post = "POST to tangd"
    found = compare(9, unlocks.session, lambda: timed(tang.post))
    yield figure("unlock session, live client", post, "<= 1.0", *found)
    writes = DurableWrites(server.base, stack)
    found = compare(9, lambda: timed(writes.session), lambda: timed(tang.post))
    yield figure("floor: the durable writes of that", post, "<= 1.0", *found)
    unlocks.lock()
    found = compare(9, lambda: timed(unlocks.challenge), lambda: timed(tang.post))
    yield figure("a session up to its challenge", post, "<= 1.0", *found)
    floor = EmptyStream(server.base, stack)
    found = compare(9, lambda: timed(floor.session), lambda: timed(tang.post))
    yield figure("floor: an empty gRPC stream", post, "<= 1.0", *found)
    yield from unlocking_at_once(unlocks, floor, tang)


def unlocking_at_once(unlocks: Unlocks, floor: EmptyStream, tang: Tang) -> Iterator[Figure]:
    def row(name: str, clients: Sequence[Callable[[], object]]) -> Figure:
        found = compare(4, lambda: at_once(clients), lambda: at_once([tang.post] * CLIENTS))
        return figure(name, f"tangd, {CLIENTS} clients", ">= 6", *found)

    yield row("sessions up to the challenge, new connections", [unlocks.ask_anew] * CLIENTS)
    yield row("floor: empty streams, new connections", [floor.ask_anew] * CLIENTS)
    with ExitStack() as stack:  # just before they are used: an idle connection is cut
        live = [stack.enter_context(unlocks.connection()) for _ in range(CLIENTS)]
        yield row("the sessions, a connection for each client", [partial(unlocks.ask, each) for each in live])
    with ExitStack() as stack:
        bare = [stack.enter_context(floor.connection()) for _ in range(CLIENTS)]
        yield row("floor: the streams, a connection for each", [partial(floor.ask, each) for each in bare])
    yield row("whole drills, each of a new peer", [unlocks.drill] * CLIENTS)


# --- growth


def growing(stack: ExitStack) -> Iterator[Figure]:
    one = initialised(stack)
    many = initialised(stack, [f"k{number}" for number in range(KEYS)])
    last = f"k{KEYS - 1}"
    against = "1 key"
    small, large = Signer(one, stack), Signer(many, stack, last)
    yield figure(f"Sign with {KEYS} keys", against, "<= 1.5", *compare(9, large.pipelined, small.pipelined))
    found = compare(99, lambda: timed(lambda: many.key(last)), lambda: timed(one.key))
    yield figure(f"reading one of {KEYS} keys", against, "<= 1.5", *found)
    with ExitStack() as crowd:
        busy = initialised(stack)
        signer = Signer(busy, stack)
        for _ in range(CONNECTIONS - 1):
            Signer(busy, crowd)
        found = compare(9, signer.pipelined, small.pipelined)
        yield figure(f"Sign with {CONNECTIONS} connections", "1 connection", "<= 1.5", *found)
    empty, long = (Starts(stack.enter_context(Server(tpm=False)), stack) for _ in range(2))
    long.server.state.mkdir()
    with (long.server.state / "audit.jsonl").open("wb") as log:
        digest = GENESIS
        for number in range(1, RECORDS + 1):
            line, digest = link({"event": "start", "time": "2026-01-01T00:00:00.000Z"}, digest, number)
            log.write(line)
    long.start()
    empty.start()
    found = compare(7, long.restart, empty.restart)
    yield figure(f"exec to ready with {RECORDS} audit records", "an empty log", "<= 1.5", *found)


def show(figures: Sequence[Figure], facts: dict[str, object]) -> None:
    rows: list[tuple[str, ...]] = [("what", "against", "reach", "seen", "ours", "peer")]
    for each in figures:
        seen = "" if each.ratio is None else f"{each.ratio:.2f}"
        rows.append((each.what, each.against, each.reach, seen, each.ours, each.theirs))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, tuple("-" * width for width in widths))
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\nRatios of medians; absolute times are not to be compared between runs. " + json.dumps(facts))
    print("The gRPC peer is driven by its own client; the CPU lines are the servers alone.")
    print(
        "Sessions: `live client` is the one of unsealctl; many at once are by a lean one, as tangd's are. The daemon takes two\n"
        "answers a second of a peer, and no row meets that bound: a drill comes from an address that was never there.\n"
        "A floor is a part alone: what must be on disk; or gRPC in Python with the same TLS, and nothing behind it."
    )


def main(arguments: Sequence[str]) -> int:
    match arguments:
        case ["--serve-grpc", path]:
            serve_grpc(path)
            return 0
        case ["--serve-floor", path]:
            serve_floor(path)
            return 0
        case [] | ["--json"]:
            pass
        case _:
            print("usage: scripts/bench [--json]", file=sys.stderr)
            return 2
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    began = time.monotonic()
    figures: list[Figure] = []
    for part in (starting, signing, unlocking, growing):
        with ExitStack() as stack:
            for each in part(stack):
                figures.append(each)
                if not arguments:
                    print(f"\r\033[K{each.what}", end="", file=sys.stderr, flush=True)
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "core": core,
        "seconds": round(time.monotonic() - began, 1),
    }
    if arguments:
        print(json.dumps({"facts": facts, "figures": [asdict(each) for each in figures]}, indent=2))
    else:
        print(file=sys.stderr)
        show(figures, facts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
