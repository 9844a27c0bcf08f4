"""A PC/SC service of its own: pcscd on a private socket, with readers that only it has, and cards to put into them."""

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

LAUNCHER = Path(__file__).with_name("pcscd_launcher.py")
VPCD = Path("/usr/lib/pcsc/drivers/serial/libifdvpcd.so")
VPCD_PORT = 0x8C7B
"""Of its first slot; the second has the next. Nobody else is in this network."""
VPCD_CONF = f'FRIENDLYNAME "Virtual PCD"\nDEVICENAME /dev/null:{VPCD_PORT:#X}\nLIBPATH {VPCD}\nCHANNELID {VPCD_PORT:#X}\n'
READER = "Virtual PCD 00 00"
"""The name of the virtual reader's first slot."""
READER_2 = "Virtual PCD 00 01"
_PATIENCE = 60.0  # seconds
_SOCKET_NAME = "PCSCLITE_CSOCK_NAME"


class VirtualCard(Protocol):
    """A card as the virtual reader sees it."""

    @property
    def atr(self) -> bytes: ...

    def reset(self) -> None:
        """Power on, power off or reset: what was verified is forgotten."""

    def process(self, apdu: bytes) -> bytes | None:
        """The answer, or None: the card pulls itself out now."""


class Pcscd:
    """Runs from `__enter__` to `__exit__`. Clients: `client` for this process, `environment` or `run` for others.

    ``reader_conf``: the text of a reader.conf(5); by default a virtual reader with two slots.
    """

    def __init__(self, reader_conf: str = VPCD_CONF, *, arguments: tuple[str, ...] = ()) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="upc"))
        self.socket = self.base / "pcscd.comm"
        self.environment = {_SOCKET_NAME: str(self.socket)}
        self.log = self.base / "pcscd.log"
        self.pid = 0
        self._away = self.base / "away"
        self._arguments = arguments
        self._conf = self.base / "reader.conf.d"
        self._conf.mkdir()
        self._inserted: list[Inserted] = []
        self._launcher: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self.configure(reader_conf)

    def configure(self, reader_conf: str) -> None:
        """Takes effect at the next start."""
        (self._conf / "readers").write_text(reader_conf)

    def start(self) -> Self:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_PATIENCE)
        empty = self.base / "no-usb-drivers"  # the real readers of this machine are not ours
        empty.mkdir(exist_ok=True)
        with (
            theirs,
            self.log.open("ab") as log,
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
        ):
            listener.bind(str(self.socket))
            listener.listen(16)
            # The service may not sit on descriptor 3 in this process; the launcher puts it there.
            command = [
                *("unshare", "--net", *(() if os.geteuid() == 0 else ("--map-root-user",))),
                *(sys.executable, "-I", str(LAUNCHER), str(theirs.fileno()), str(listener.fileno())),
                *(
                    _program(),
                    "--foreground",
                    "--config",
                    str(self._conf),
                    *_without_polkit(),
                    *self._arguments,
                ),
            ]
            self._launcher = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(), listener.fileno()),
                env={**os.environ, "PCSCLITE_HP_DROPDIR": str(empty)},
            )
        self._control = ours
        self.pid = self._pid_of(ours)
        return self

    def _pid_of(self, control: socket.socket) -> int:
        answer = control.recv(64)
        assert answer, f"pcscd does not start: {self.log.read_text()}"
        return int(json.loads(answer)["pid"])

    def kill(self) -> None:
        """The service dies, and nobody answers on its socket any more."""
        self.socket.rename(self._away)
        os.kill(self.pid, signal.SIGKILL)

    def restart(self) -> None:
        """A new instance on the same socket; every card is out."""
        assert self._control is not None
        for each in self._inserted:
            each.remove()
        if self._away.exists():
            self._away.rename(self.socket)
        self._control.send(b"start")
        self.pid = self._pid_of(self._control)

    def card_socket(self, slot: int = 0) -> socket.socket:
        """The card's side of the virtual reader: what connects here is inserted until it closes."""
        assert self._control is not None
        # The driver listens from the moment on when pcscd has read its configuration.
        for _ in range(int(_PATIENCE * 100)):
            self._control.send(str(VPCD_PORT + slot).encode())
            data, descriptors, _, _ = socket.recv_fds(self._control, 64, 1)
            if data == b"ok":
                return socket.socket(fileno=descriptors[0])
            threading.Event().wait(0.01)
        raise AssertionError(f"the virtual reader does not listen: {self.log.read_text()}")

    def insert(self, card: VirtualCard, slot: int = 0) -> "Inserted":
        """Returns when the service knows that a card is there."""
        inserted = Inserted(card, self.card_socket(slot))
        self._inserted.append(inserted)
        inserted.powered.wait(_PATIENCE)
        self.await_card(READER_2 if slot else READER)
        return inserted

    def pull(self, inserted: "Inserted", slot: int = 0) -> None:
        """Returns when the service knows that the card is out."""
        inserted.remove()
        self.await_card(READER_2 if slot else READER, present=False)

    def await_card(self, reader: str, *, present: bool = True) -> None:
        """Until the service says that there is a card, or none, in a reader."""
        from smartcard import scard

        with self.client():
            code, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
        assert code == 0, hex(code)
        wanted = scard.SCARD_STATE_PRESENT if present else scard.SCARD_STATE_EMPTY
        state = scard.SCARD_STATE_UNAWARE
        deadline = time.monotonic() + _PATIENCE
        while not state & wanted or state & scard.SCARD_STATE_MUTE:
            assert time.monotonic() < deadline, f"{reader}: {state:#x}"
            _, ((_, state, _),) = scard.SCardGetStatusChange(
                context, 1000, [(reader, state & ~scard.SCARD_STATE_CHANGED)]
            )
        scard.SCardReleaseContext(context)

    @contextlib.contextmanager
    def client(self) -> Iterator[None]:
        """Contexts that this process and its children open meanwhile are with this service.

        libpcsclite reads its environment once in a process. So the name is the same for all services of this process, and
        it is a link to the one that is meant.
        """
        link = Path(tempfile.gettempdir()) / f"upc-{os.getpid()}.comm"
        before = (os.environ.get(_SOCKET_NAME), link.readlink() if link.is_symlink() else None)
        _point(link, self.socket)
        os.environ[_SOCKET_NAME] = str(link)
        try:
            yield
        finally:
            link.unlink()
            name, target = before
            if target is not None:
                _point(link, target)
            if name is not None:
                os.environ[_SOCKET_NAME] = name
            else:
                del os.environ[_SOCKET_NAME]

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Meanwhile nobody answers under its name, as if it had never been started."""
        self.socket.rename(self._away)
        try:
            yield
        finally:
            self._away.rename(self.socket)

    def run(self, *command: str | Path, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """A client of this service, as a process. Its output is one text, standard error included."""
        return subprocess.run(
            command,
            env={**os.environ, **self.environment, "OPENSC_CONF": os.devnull},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=check,
            timeout=_PATIENCE,
        )

    def stop(self) -> None:
        for inserted in self._inserted:
            inserted.remove()
        self._inserted.clear()
        if self._control is not None:
            self._control.close()  # the launcher sees it and ends pcscd
            self._control = None
        if self._launcher is not None:
            try:
                self._launcher.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._launcher.kill()  # and pcscd with it: PR_SET_PDEATHSIG
                self._launcher.wait()
            self._launcher = None
        self.socket.unlink(missing_ok=True)
        self._away.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self.base, ignore_errors=True)


class Inserted:
    """A card in a slot of the virtual reader, served by a thread."""

    def __init__(self, card: VirtualCard, connection: socket.socket) -> None:
        self.card = card
        self.powered = threading.Event()
        self._out = threading.Event()
        self._socket = connection
        self._socket.settimeout(None)
        self._thread = threading.Thread(target=self._serve, name="card", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """The card is in: false before the reader can see that it is not."""
        return not self._out.is_set()

    def remove(self) -> None:
        """Pull the card out."""
        self._out.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self.join()

    def join(self) -> None:
        """Wait until it is out."""
        self._thread.join(_PATIENCE)

    def _serve(self) -> None:
        """vpcd's protocol: a length of two bytes, then a control code of one byte, or a command."""
        with self._socket, self._until_out(), contextlib.suppress(OSError):
            while (message := self._receive()) is not None:
                match message:
                    case b"\x00" | b"\x01" | b"\x02":
                        self.card.reset()
                        continue
                    case b"\x04":
                        answer: bytes | None = self.card.atr
                        self.powered.set()
                    case _:
                        answer = self.card.process(message)
                if answer is None:
                    return
                self._socket.sendall(struct.pack(">H", len(answer)) + answer)

    @contextlib.contextmanager
    def _until_out(self) -> Iterator[None]:
        """It is out for `alive` before the connection is closed, and so before anybody else knows."""
        try:
            yield
        finally:
            self._out.set()

    def _receive(self) -> bytes | None:
        head = self._exactly(2)
        return self._exactly(struct.unpack(">H", head)[0]) if head is not None else None

    def _exactly(self, size: int) -> bytes | None:
        data = b""
        while len(data) < size:
            # Without it each command waits 40 ms for a delayed acknowledgement; the kernel forgets it again.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            more = self._socket.recv(size - len(data))
            if not more:
                return None
            data += more
        return data


def _point(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _program() -> str:
    """It is where users do not look."""
    return shutil.which("pcscd", path=f"{os.environ['PATH']}:/usr/sbin") or "pcscd"


def _without_polkit() -> tuple[str, ...]:
    """pcsc-lite 2 asks polkit who may use cards; nobody answers in a container."""
    text = subprocess.run([_program(), "--help"], capture_output=True, text=True, check=False).stdout
    return ("--disable-polkit",) if "--disable-polkit" in text else ()
