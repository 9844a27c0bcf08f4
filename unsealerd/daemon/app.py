"""The daemon put together: sockets, timers and signals around one `Host`."""

import asyncio
import contextlib
import fcntl
import gc
import grp
import logging
import os
import signal
import sys
import time
from collections.abc import Coroutine, Iterable, Iterator
from pathlib import Path

from unsealerd import __version__, keyringid, notify
from unsealerd.config import Config, load
from unsealerd.core.auditchain import Facts
from unsealerd.core.secret import SecretBuffer, SecretMemoryKind
from unsealerd.daemon import hygiene, journal
from unsealerd.daemon.access import Access
from unsealerd.daemon.audit import AuditLog, in_thread
from unsealerd.daemon.fdstore import FdStore, Received
from unsealerd.daemon.host import Host
from unsealerd.daemon.keptmemory import PREFIX
from unsealerd.daemon.keptsockets import LISTENER, READER, KeptSockets
from unsealerd.daemon.keyreader import KeyReader
from unsealerd.daemon.keysapi import KeysApi
from unsealerd.daemon.listener import Listener
from unsealerd.daemon.offices import ADMIN, LABELS, UNLOCK, Offices
from unsealerd.daemon.varlink import Info, VarlinkServer
from unsealerd.daemon.watch import Event
from unsealerd.errors import StorageFailed, UnsealerdError
from unsealerd.model import State

GATEWAY_GROUP = "unsealerd-gateway"
_EX_SOFTWARE = 70
SETTLING = 1.0  # seconds from ready to all loaded
_COUNT_INTERVAL = 60  # seconds after which the uses of keys are written down
_FIRST_PAUSE = 60  # seconds after a scheduled change that failed; doubled each time, up to...
_LONGEST_PAUSE = 3600
_LONGEST_NAP = 30  # seconds; the wall clock may jump
_STOP_PATIENCE = 60  # seconds: more than all that is waited for at the end
_URL = "https://github.com/unsealerd/unsealerd"

_log = logging.getLogger("unsealerd")


def serve(path: Path, config: Config, warnings: list[str]) -> None:
    """Run the daemon until SIGTERM or SIGINT. Raises the errors that keep it from starting."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    store, received = FdStore.of(os.environ)
    with _exclusive(config.daemon.state_dir), SecretBuffer(1) as probe:
        asyncio.run(_run(path, config, warnings, probe.kind, store, received))


async def _run(
    path: Path,
    config: Config,
    warnings: list[str],
    memory: SecretMemoryKind,
    store: FdStore,
    received: list[Received],
) -> None:
    known = [entry for entry in received if entry.name.startswith((PREFIX, LISTENER, READER))]
    for entry in received:
        if entry not in known:
            os.close(entry.fd)
            store.remove(entry.name)
    await Application(path, config, warnings, memory, store, known).run()


@contextlib.contextmanager
def _exclusive(state_dir: Path) -> Iterator[None]:
    """Make the state directory ours alone: two daemons on one backup would undo each other's writes."""
    try:
        # Others may pass through it (the gateway's key is below) but not look around.
        state_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        fd = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as err:
        raise StorageFailed(f"{state_dir}: {err.strerror}") from err
    try:
        os.fchmod(fd, 0o711)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as err:
        raise StorageFailed(f"{state_dir}: another unsealerd is running on it") from err
    except PermissionError as err:
        raise StorageFailed(f"{state_dir}: {err.strerror}") from err
    finally:
        os.close(fd)


class Application:
    """One run of the daemon."""

    def __init__(
        self,
        path: Path,
        config: Config,
        warnings: list[str],
        memory: SecretMemoryKind,
        store: FdStore,
        received: list[Received],
    ) -> None:
        self._path = path
        self._runtime = config.daemon.runtime_dir
        audit = AuditLog(config.daemon.state_dir, time.time, journal.mirror(), in_thread)
        self._host = Host(config, keyringid.beside(path), time.time, audit, store, received)
        self._access = Access(self._host, time.monotonic)
        self._keys = KeysApi(self._host, self._access)
        self._info = Info("unsealerd", "unsealerd", __version__, _URL)
        self._offices = Offices(self._host, self._info, memory, warnings, time.monotonic, self._reload_now)
        self._kept = KeptSockets(store, [e for e in received if e.name.startswith((LISTENER, READER))])
        self._reader = KeyReader(self._host, self._access, self._runtime, self._kept)
        self._listeners: dict[str, Listener] = {}
        self._servers: dict[str, VarlinkServer] = {}
        self._stop = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        self._listen()
        reader = self._reader
        reload = asyncio.Event()
        loop.add_signal_handler(signal.SIGHUP, reload.set)
        background: list[asyncio.Task[None]] = []
        knocks = {label: asyncio.Event() for label in LABELS}
        try:
            reader.follow_configuration()
            self._kept.drop_unclaimed()
            await self._host.start()
            self._host.watchers.add(self._tell_manager)  # what it goes through until then is nobody's concern
            await self._serve(
                "keys",
                VarlinkServer(
                    [self._keys.interface()],
                    self._info,
                    on_disconnect=self._keys.forget,
                    entitled=lambda caller: bool(self._access.granted(caller)),
                ),
            )
            background = [
                *(loop.create_task(self._open_office(label, knock)) for label, knock in knocks.items()),
                loop.create_task(self._settle(knocks.values())),
                loop.create_task(_watchdog()),
                loop.create_task(self._tick()),
                loop.create_task(self._write_counts()),
                loop.create_task(self._reload(reload)),
            ]
            notify.notify(READY=1, STATUS=self._status_text())
            _log.info("ready state=%s reason=%s", self._host.state.value, self._reason())
            await self._stop.wait()
        finally:
            notify.notify(STOPPING=1, EXTEND_TIMEOUT_USEC=_STOP_PATIENCE * 1_000_000)
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            for server in self._servers.values():
                await server.close()
            for label, listener in self._listeners.items():
                self._kept.close(label, listener, ends=True)
            await reader.close()
            self._offices.close()
            ended = await self._host.close()
            self._host.audit.close()
            if not ended:
                # Python would wait for the thread for ever.
                _log.error("the TPM does not answer; ending without it")
                os._exit(_EX_SOFTWARE)

    def _listen(self) -> None:
        """Make the sockets. Who connects waits until the start is through: before, the state would be told wrongly."""
        try:
            self._runtime.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._runtime.chmod(0o755)
        except OSError as err:
            raise StorageFailed(f"{self._runtime}: {err.strerror}") from err
        gid = _group(GATEWAY_GROUP)
        for label, mode, group in (
            ("keys", 0o666, None),
            (ADMIN, 0o600, None),
            (UNLOCK, 0o600 if gid is None else 0o660, gid),
        ):
            self._listeners[label] = self._kept.listener(label, self._runtime / label, mode, group)

    async def _serve(self, label: str, server: VarlinkServer) -> None:
        self._servers[label] = server
        await server.adopt(self._listeners[label].sock)

    async def _open_office(self, label: str, knock: asyncio.Event) -> None:
        """Serve one of the offices' sockets from when somebody knocks."""
        loop = asyncio.get_running_loop()
        sock = self._listeners[label].sock
        loop.add_reader(sock, knock.set)
        try:
            await knock.wait()
        finally:
            loop.remove_reader(sock)
        await self._serve(label, self._offices.server(label))

    async def _settle(self, knocks: Iterable[asyncio.Event]) -> None:
        """What can wait until the daemon is ready, and is not to wait for long."""
        await asyncio.sleep(SETTLING)
        for knock in knocks:
            knock.set()
        with contextlib.suppress(UnsealerdError):
            await self._host.inspect(self._offices.load)
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection has to look at it again
        gc.enable()
        hygiene.trim()

    async def _tick(self) -> None:
        """Rotations, overlaps and leases, when they are due."""
        pause = _FIRST_PAUSE
        while True:
            due = self._host.due()
            nap = _LONGEST_NAP if due is None else min(_LONGEST_NAP, max(due - self._host.now, 1))
            self._host.rescheduled.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._host.rescheduled.wait(), nap)
            due = self._host.due()
            if due is None or due > self._host.now:
                continue
            if await _survive("scheduled change", self._host.tick()):
                pause = _FIRST_PAUSE
            else:
                # Not every second: each try is a record, and whatever is broken takes its time.
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def _write_counts(self) -> None:
        while True:
            await asyncio.sleep(_COUNT_INTERVAL)
            self._keys.flush()
            for _ in self._host.audit.repeats.write():
                await asyncio.sleep(0)  # each takes a sync: services are answered in between

    async def _reload(self, asked: asyncio.Event) -> None:
        while True:
            await asked.wait()
            asked.clear()
            await _survive("reload", self._reload_now({}))

    async def _reload_now(self, facts: Facts) -> None:
        """Take over the configuration file as it is now. ``facts``: who asked, if it was not a signal."""
        notify.notify(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)
        try:
            try:
                await self._host.reload(load(self._path), facts)
            finally:
                self._reader.follow_configuration()
            _log.info("reloaded")
        finally:
            notify.notify(READY=1, STATUS=self._status_text())

    def _tell_manager(self, event: Event) -> None:
        notify.notify(STATUS=self._status_text())

    def _status_text(self) -> str:
        if self._host.state is State.UNLOCKED:
            return f"unlocked, generation {self._host.last_generation}"
        return f"{self._host.state.value}: {self._reason()}"

    def _reason(self) -> str | None:
        return self._host.lock_reason.value if self._host.lock_reason is not None else None


async def _watchdog() -> None:
    """Tell the service manager that this loop turns. A loop that hangs tells nothing, and is killed and started anew."""
    interval = notify.watchdog_interval()
    while interval is not None:
        notify.notify(WATCHDOG=1)
        await asyncio.sleep(interval / 2)


async def _survive(what: str, step: Coroutine[object, object, None]) -> bool:
    """Whether the step went well. However it fails, the loop that it belongs to goes on: keys must rotate."""
    try:
        await step
    except UnsealerdError as err:
        _log.error("%s refused error=%s detail=%s", what, err.name, err.detail)
        return False
    except Exception as bug:  # noqa: BLE001 - a bug; its text could quote anything, so only its type is told
        _log.error("%s bug type=%s", what, type(bug).__name__)
        return False
    return True


def _group(name: str) -> int | None:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None
