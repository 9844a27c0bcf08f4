"""Unlocking, alone and by many at once."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

from measure.figure import Figure, absent, compare, figure, initialised, rss, timed
from measure.floor import DurableWrites, EmptyStream
from measure.sessions import Unlocks
from measure.tang import TANGD, Tang

CLIENTS = 8


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
