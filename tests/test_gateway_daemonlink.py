"""The gateway's connection to the daemon, with a daemon that is a socket of the test."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from unsealerd.errors import DaemonUnreachable, LimitExceeded
from unsealerd.gateway.daemonlink import MAX_REPLY_BYTES, DaemonLink
from unsealerd.model import State

STATUS = b'{"parameters":{"state":"locked","lock_reason":null,"shares_present":0,"shares_needed":1}}\0'
Daemon = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def ask(path: Path, daemon: Daemon, seconds: float = 60) -> State:
    """The state that the daemon gives."""

    served: asyncio.Queue[None] = asyncio.Queue()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\0")
        with contextlib.suppress(ConnectionError):
            await daemon(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        served.put_nowait(None)

    async def body() -> State:
        async with await asyncio.start_unix_server(connected, path):
            try:
                with DaemonLink.connect(path, seconds) as link:
                    return (await link.status()).state
            finally:
                await served.get()

    return asyncio.run(body())


def test_an_answer_may_come_in_pieces(tmp_path: Path) -> None:
    async def daemon(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in STATUS:
            writer.write(bytes((byte,)))
            await writer.drain()
            await asyncio.sleep(0)

    assert ask(tmp_path / "unlock", daemon) is State.LOCKED


@pytest.mark.promise(10)
@pytest.mark.parametrize(
    "answer", [STATUS[:-1], b"", STATUS + b"{", STATUS * 2, b"[" * (MAX_REPLY_BYTES + 1)]
)
def test_anything_but_one_whole_answer_is_none(tmp_path: Path, answer: bytes) -> None:
    async def daemon(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()

    with pytest.raises(DaemonUnreachable):
        ask(tmp_path / "unlock", daemon)


def test_a_daemon_that_says_nothing_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    async def daemon(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        assert not await reader.read()  # the gateway hangs up

    with pytest.raises(DaemonUnreachable):
        ask(tmp_path / "unlock", daemon, seconds=0.05)


def test_a_daemon_whose_queue_is_full_is_busy(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as waiting:
        listener.bind(str(tmp_path / "unlock"))
        listener.listen(0)

        def connect() -> None:
            for _ in range(8):
                waiting.enter_context(DaemonLink.connect(tmp_path / "unlock", 60))

        with pytest.raises(LimitExceeded):
            connect()


def test_without_a_daemon(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable):
        DaemonLink.connect(tmp_path / "unlock", 60)
    with pytest.raises(DaemonUnreachable):
        DaemonLink.connect(tmp_path / ("x" * 200), 60)
