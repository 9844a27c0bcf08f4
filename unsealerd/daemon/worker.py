"""Where changes are made: one at a time, what blocks (disk, TPM) on one thread, and none half adopted."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from unsealerd.errors import TpmFailed

T = TypeVar("T")

_BUSY_PATIENCE = 60  # seconds that a change waits for the one before it
_READ_PATIENCE = 3  # seconds that a read waits for the change in hand, and for the TPM
_END_PATIENCE = 10  # seconds that the end waits for a change in hand


class Worker:
    """Used from the event loop."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "keeper")
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    def begin(self, change: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Start a change as a task of its own."""
        task = asyncio.get_running_loop().create_task(change)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def finish(self, change: Coroutine[Any, Any, T]) -> T:
        """Run a change to its end, even if the caller hangs up meanwhile."""
        return await asyncio.shield(self.begin(change))

    @contextlib.asynccontextmanager
    async def alone(self, patience: float = _BUSY_PATIENCE) -> AsyncIterator[None]:
        """No other change meanwhile. Raises `TpmFailed` if the one before does not come to an end in ``patience`` seconds."""
        try:
            await asyncio.wait_for(self._changing.acquire(), patience)
        except TimeoutError as err:
            raise TpmFailed("the change before this one waits for the TPM, which does not answer") from err
        try:
            yield
        finally:
            self._changing.release()

    async def blocking(self, function: Callable[[], T]) -> T:
        """Call what blocks, on the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def read(self, function: Callable[[], T]) -> T:
        """The same for what only reads. Raises `TpmFailed` if it takes too long."""
        return await self.within(_READ_PATIENCE, function)

    async def within(self, seconds: float, function: Callable[[], T]) -> T:
        """The same, but do not wait for longer: `TpmFailed`. The thread may still do it, when the TPM answers again."""
        try:
            return await asyncio.wait_for(self.blocking(function), seconds)
        except TimeoutError as err:
            raise TpmFailed("the TPM, or the disk, is busy and does not answer") from err

    async def close(self) -> bool:
        """Wait for the change in hand, within bounds. False if the thread hangs in the kernel, and cannot be ended."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_END_PATIENCE)
        try:
            await asyncio.wait_for(self.blocking(_nothing), _READ_PATIENCE)  # a read may hang in it, too
        except TimeoutError:
            self._thread.shutdown(wait=False, cancel_futures=True)
            return False
        self._thread.shutdown()
        return True


def _nothing() -> None:
    """What a thread that is free does at once."""
