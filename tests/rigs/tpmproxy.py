"""Something on the bus between the daemon and its TPM: it listens, and where told, it lies."""

import contextlib
import enum
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from .swtpm import SoftwareTpm

_HEADER = struct.Struct(">HII")  # tag, size, command or response code
_NO_SESSIONS = 0x8001
_IO_SECONDS = 60.0


class Command(enum.IntEnum):
    """TPM_CC (part 2, 6.5.2): the commands that the tests name."""

    NV_UNDEFINE = 0x122
    NV_DEFINE = 0x12A
    CREATE_PRIMARY = 0x131
    NV_INCREMENT = 0x134
    POLICY_NV = 0x149
    NV_READ = 0x14E
    CREATE = 0x153
    LOAD = 0x157
    UNSEAL = 0x15E
    FLUSH = 0x165
    NV_READ_PUBLIC = 0x169
    POLICY_COUNTER_TIMER = 0x16D
    READ_PUBLIC = 0x173
    START_SESSION = 0x176
    GET_CAPABILITY = 0x17A
    PCR_READ = 0x17E
    POLICY_PCR = 0x17F
    READ_CLOCK = 0x181


@dataclass(frozen=True, slots=True)
class Exchange:
    """One command and its answer, as they passed."""

    command: bytes
    response: bytes

    @property
    def code(self) -> int:
        """The command code (TPM_CC)."""
        return int(_HEADER.unpack_from(self.command)[2])


@dataclass(slots=True)
class _Rule:
    """What to do with the next `times` commands of that code (None: with all)."""

    code: int
    times: int | None
    act: Callable[[bytes, Callable[[bytes], bytes]], bytes | None]

    def applies(self, code: int) -> bool:
        if self.code != code or self.times == 0:
            return False
        if self.times is not None:
            self.times -= 1
        return True


def error(code: int) -> bytes:
    """A response that says `code`: no session, no HMAC, as the TPM itself answers errors."""
    return _HEADER.pack(_NO_SESSIONS, _HEADER.size, code)


class TpmProxy:
    """Stands before a `SoftwareTpm`; clients use its `tcti` instead."""

    def __init__(self, tpm: SoftwareTpm) -> None:
        self._tpm = tpm
        self._directory = Path(tempfile.mkdtemp(prefix="utpx"))
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self._exchanges: list[Exchange] = []
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closing = False

    @property
    def tcti(self) -> str:
        return f"swtpm:path={self._directory / 'tpm'}"

    # --- what was seen

    @property
    def exchanges(self) -> list[Exchange]:
        with self._lock:
            return list(self._exchanges)

    @property
    def codes(self) -> list[int]:
        """The command codes so far, in order."""
        return [exchange.code for exchange in self.exchanges]

    @property
    def capture(self) -> bytes:
        """All bytes of both directions."""
        return b"".join(exchange.command + exchange.response for exchange in self.exchanges)

    def forget(self) -> None:
        with self._lock:
            self._exchanges.clear()

    # --- what to do

    def answer(self, command: int, code: int, *, times: int | None = 1, executed: bool = False) -> None:
        """Answer with an error; `executed`: after the TPM has done what was asked, whose own answer is lost."""

        def act(request: bytes, forward: Callable[[bytes], bytes]) -> bytes:
            if executed:
                forward(request)
            return error(code)

        self._add(_Rule(command, times, act))

    def alter(self, command: int, change: Callable[[bytes], bytes], *, times: int | None = 1) -> None:
        """Change the TPM's answer."""
        self._add(_Rule(command, times, lambda request, forward: change(forward(request))))

    def replace(self, command: int, reply: Callable[[bytes], bytes], *, times: int | None = 1) -> None:
        """Answer in the TPM's place; it never sees the command."""
        self._add(_Rule(command, times, lambda request, forward: reply(request)))

    def drop(self, command: int, *, times: int | None = 1, executed: bool = False) -> None:
        """Cut the connection instead of answering."""

        def act(request: bytes, forward: Callable[[bytes], bytes]) -> None:
            if executed:
                forward(request)

        self._add(_Rule(command, times, act))

    def clear(self) -> None:
        with self._lock:
            self._rules.clear()

    def _add(self, rule: _Rule) -> None:
        with self._lock:
            self._rules.append(rule)

    # --- running

    def start(self) -> None:
        for name, serve in (("tpm", self._serve_commands), ("tpm.ctrl", self._serve_control)):
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._open.add(listener)
            listener.bind(str(self._directory / name))
            listener.listen(8)
            self._spawn(self._accept, listener, serve)

    def close(self) -> None:
        with self._lock:
            self._closing = True
            for end in self._open:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(_IO_SECONDS)
        for end in self._open:
            end.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _spawn(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                if self._closing:
                    client.close()
                    return
                self._open.add(client)
            self._spawn(self._serve, client, serve)

    def _serve(self, client: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        try:
            serve(client)
        except OSError:
            pass  # one of the two ends went away: the connection is over
        finally:
            with self._lock:
                self._open.discard(client)
            client.close()

    def _serve_control(self, client: socket.socket) -> None:
        with self._upstream(self._tpm.control) as upstream:
            while request := client.recv(4096):
                upstream.sendall(request)
                client.sendall(upstream.recv(4096))

    def _serve_commands(self, client: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            upstream: socket.socket | None = None

            def forward(request: bytes) -> bytes:
                nonlocal upstream
                if upstream is None:
                    upstream = stack.enter_context(self._upstream(self._tpm.socket))
                upstream.sendall(request)
                return _message(upstream) or b""

            while request := _message(client):
                act = self._act_for(int(_HEADER.unpack_from(request)[2]))
                response = forward(request) if act is None else act(request, forward)
                with self._lock:
                    self._exchanges.append(Exchange(request, response or b""))
                if not response:
                    return
                client.sendall(response)

    def _act_for(self, code: int) -> Callable[[bytes, Callable[[bytes], bytes]], bytes | None] | None:
        with self._lock:
            return next((rule.act for rule in self._rules if rule.applies(code)), None)

    def _upstream(self, path: Path) -> socket.socket:
        upstream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        upstream.settimeout(_IO_SECONDS)
        try:
            upstream.connect(str(path))
        except OSError:
            upstream.close()
            raise
        return upstream


def _message(source: socket.socket) -> bytes | None:
    """One whole command or response: its header says how long it is. None at the end."""
    data = b""
    size = _HEADER.size
    while len(data) < size:
        part = source.recv(size - len(data))
        if not part:
            return None
        data += part
        if len(data) == _HEADER.size:
            size = max(int(_HEADER.unpack(data)[1]), _HEADER.size)
    return data
