"""A TPM 2.0 in software: swtpm as a process of its own, behind Unix sockets."""

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

_START_SECONDS = 60.0
_STOP_SECONDS = 60.0
_SHUTDOWN_SECONDS = 2.0
_SOCKET_PATH_MAX = 100  # sun_path has 108 bytes, and ".ctrl" and a NUL have to fit


_ACCEPTS = 0x10000  # __SO_ACCEPTCON in the flags of /proc/net/unix


class RigError(RuntimeError):
    """The rig itself does not work: swtpm is missing, or does not start."""


class SoftwareTpm:
    """One software TPM. Its state lives in `directory` and outlives every process.

    The sockets are in a directory of their own under /tmp, because the path of a Unix socket is short; they
    keep their path over `reset`, as a device keeps its name. The directory is made if it is missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._sockets: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        """Where the TPM answers; the control socket is beside it, with ``.ctrl`` after the name."""
        if self._sockets is None:
            self._sockets = Path(tempfile.mkdtemp(prefix="utpm"))
        path = self._sockets / "tpm"
        if len(os.fsencode(path)) > _SOCKET_PATH_MAX:
            raise RigError(f"{path}: too long for a Unix socket; set TMPDIR to something shorter")
        return path

    @property
    def control(self) -> Path:
        return self.socket.with_name(self.socket.name + ".ctrl")

    @property
    def tcti(self) -> str:
        return f"swtpm:path={self.socket}"

    @property
    def log(self) -> Path:
        return self.directory / "swtpm.log"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RigError("the software TPM is not running")
        return self._process.pid

    def start(self) -> None:
        """Power on: TPM2_Startup(CLEAR). Returns when both sockets accept connections."""
        if self.running:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        self._unlink()
        # A piped stdout would keep whoever reads it waiting for as long as swtpm lives.
        with self.log.open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    [
                        "swtpm",
                        "socket",
                        "--tpm2",
                        "--tpmstate",
                        f"dir={self.directory}",
                        "--server",
                        f"type=unixio,path={self.socket}",
                        "--ctrl",
                        f"type=unixio,path={self.control}",
                        "--flags",
                        "not-need-init,startup-clear",
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,
                )
            except FileNotFoundError as err:
                raise RigError("swtpm is not installed") from err
        self._wait_until_it_listens()

    def _wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not (listens(self.socket) and listens(self.control)):
            if not self.running:
                raise RigError(f"swtpm did not start: {self.log.read_text(errors='replace')}")
            if time.monotonic() > deadline:
                raise RigError("swtpm does not listen")
            select.select([], [], [], 0.002)

    def stop(self) -> None:
        """Orderly: TPM2_Shutdown(CLEAR) as an operating system sends it, then the power goes."""
        if self.running:
            self._shutdown_command()
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Power cut."""
        self._end(signal.SIGKILL)

    def reset(self) -> None:
        """The machine reboots: PCRs start again, ``resetCount`` grows by one."""
        self.stop()
        self.start()

    def power_cut(self) -> None:
        """The power goes and comes back, without a word to the TPM."""
        self.kill()
        self.start()

    def _shutdown_command(self) -> None:
        """TPM 2.0 part 3, 9.4: without it the TPM counts an unorderly shutdown."""
        # Another client may hold the only connection; then the shutdown is not orderly, as in life.
        with contextlib.suppress(OSError):
            self.execute(bytes.fromhex("8001 0000000c 00000145 0000"), timeout=_SHUTDOWN_SECONDS)

    def execute(self, command: bytes, *, timeout: float = _STOP_SECONDS) -> bytes:
        """Send one command as it is, past every library; returns the response."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(timeout)
            client.connect(str(self.socket))
            client.sendall(command)
            response = client.recv(4096)
            while len(response) < 10 or len(response) < int.from_bytes(response[2:6], "big"):
                part = client.recv(4096)
                if not part:
                    raise RigError("swtpm closed the connection")
                response += part
            return response

    def _authorised(self, code: int, handles: str, parameters: str) -> None:
        """One command with an empty password for its first handle. Raises `RigError` if the TPM refuses."""
        body = bytes.fromhex(f"{code:08x} {handles} 00000009 40000009 0000 00 0000 {parameters}")
        response = self.execute(bytes.fromhex("8002") + (len(body) + 6).to_bytes(4, "big") + body)
        if response[6:10] != bytes(4):
            raise RigError(f"command 0x{code:x}: 0x{response[6:10].hex()}")

    def extend(self, pcr: int, digest: bytes = b"\x5a" * 32) -> None:
        """TPM2_PCR_Extend of the SHA-256 bank: something else was measured."""
        self._authorised(0x182, f"{pcr:08x}", f"00000001 000b {digest.hex()}")

    def undefine(self, handle: int) -> None:
        """TPM2_NV_UndefineSpace by the owner: the index is gone."""
        self._authorised(0x122, f"40000001 {handle:08x}", "")

    def define(self, handle: int, attributes: int) -> None:
        """TPM2_NV_DefineSpace by the owner: eight bytes, no authorisation value, no policy."""
        public = f"{handle:08x} 000b {attributes:08x} 0000 0008"
        self._authorised(0x12A, "40000001", f"0000 000e {public}")

    def increment(self, handle: int) -> None:
        """TPM2_NV_Increment of an index without authorisation value."""
        self._authorised(0x134, f"{handle:08x} {handle:08x}", "")

    def set_owner_password(self, password: bytes) -> None:
        """TPM2_HierarchyChangeAuth: what some distributions' tools do when they take ownership."""
        self._authorised(0x129, "40000001", f"{len(password):04x} {password.hex()}")

    def evict(self, handle: int) -> None:
        """TPM2_EvictControl by the owner: the persistent object is gone."""
        self._authorised(0x120, f"40000001 {handle:08x}", f"{handle:08x}")

    def tpm_property(self, number: int) -> int:
        """TPM2_GetCapability of one TPM property (TPM_PT)."""
        response = self.execute(bytes.fromhex(f"8001 00000016 0000017a 00000006 {number:08x} 00000001"))
        found = response[-8:]
        if int.from_bytes(found[:4], "big") != number:
            raise RigError(f"the TPM does not know property 0x{number:x}")
        return int.from_bytes(found[4:], "big")

    @property
    def lockout_counter(self) -> int:
        return self.tpm_property(0x20E)

    def loaded(self) -> list[int]:
        """The transient objects and the sessions that are loaded: what somebody forgot to flush."""
        found: list[int] = []
        for first in (0x80000000, 0x02000000):
            response = self.execute(bytes.fromhex(f"8001 00000016 0000017a 00000001 {first:08x} 00000020"))
            handles = response[19:]
            found += [int.from_bytes(handles[at : at + 4], "big") for at in range(0, len(handles), 4)]
        return found

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(how)
        self._process.wait(_STOP_SECONDS)
        self._process = None
        self._unlink()

    def _unlink(self) -> None:
        for path in (self.socket, self.control):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop, and remove the sockets. The state stays."""
        self._end(signal.SIGKILL)
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)
            self._sockets = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def listens(path: Path) -> bool:
    """Does a Unix socket of that path accept connections? Found without connecting: a TPM has one client."""
    with open("/proc/net/unix") as table:
        return any(
            fields[7] == str(path) and int(fields[3], 16) & _ACCEPTS
            for fields in (line.split(maxsplit=7) for line in table.read().splitlines()[1:])
            if len(fields) == 8
        )
