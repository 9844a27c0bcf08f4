"""What grows: keys, connections, the audit log. Nothing is to become slower with it."""

from collections.abc import Iterator
from contextlib import ExitStack

from rigs.server import Server

from measure.figure import Figure, compare, figure, initialised, timed
from measure.signing import Signer
from measure.starting import Starts
from unsealerd.core.auditchain import GENESIS, link

KEYS = 1000
CONNECTIONS = 250  # one user may have 256
RECORDS = 100_000


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
