"""The processes of a machine: QEMU and the software TPM that is soldered to it."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
from pathlib import Path

from rigs.server import wait_for

from vm.errors import RigError
from vm.programs import program

_PATIENCE = 60.0  # seconds for a process to start or to end
_MEMORY_MB = 512
_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")  # nothing is left running, however this process ends
_COMMAND_LINE = (
    # Room for a memory that the kernel itself cannot read, also where it is not on by default.
    "secretmem.enable=1 root=/dev/nvme0n1 rw console=ttyS0 panic=1 mitigations=off nokaslr"
    " systemd.show_status=no systemd.firstboot=no loglevel=4"
)


def version() -> str:
    """QEMU's version, as it says it."""
    said = subprocess.run(
        [program("qemu-system-x86_64"), "--version"], capture_output=True, text=True, check=True
    )
    return said.stdout.split("(")[0].removeprefix("QEMU emulator version").strip()


class Processes:
    """One run of QEMU with its TPM: from power on until both have ended."""

    def __init__(self, directory: Path, kernel: Path, *disks: list[str]) -> None:
        """``directory``: of this run, short, for sockets and the console. ``disks``: QEMU's arguments for each."""
        self.directory = directory
        self.console = directory / "console"
        self._qmp: socket.socket | None = None
        self._tpm = self._start_tpm()
        try:
            self._qemu = self._start_qemu(kernel, disks)
            self.agent = self._connect("agent")
            self._qmp = self._connect("qmp")
            self._qmp_file = self._qmp.makefile("rw", encoding="utf-8")
            self._qmp_file.readline()
            self.monitor("qmp_capabilities")
        except BaseException:
            self.cut()
            raise

    def _start_tpm(self) -> subprocess.Popen[bytes]:
        state = self.directory.parent / "tpm"
        if not state.exists():
            state.mkdir(mode=0o700)
            made = subprocess.run(
                [
                    program("swtpm_setup"),
                    "--tpm2",
                    "--tpmstate",
                    str(state),
                    "--createek",
                    "--pcr-banks",
                    "sha256",
                ],
                capture_output=True,
                text=True,
                check=False,
            )
            if made.returncode != 0:
                raise RigError(f"swtpm_setup: {made.stdout[-500:]}{made.stderr[-500:]}")
        path = self.directory / "tpm.ctrl"
        tpm = subprocess.Popen(
            [
                *_DIES_WITH_US,
                program("swtpm"), "socket", "--tpm2", "--terminate", "--tpmstate", f"dir={state}",
                "--ctrl", f"type=unixio,path={path}", "--log", f"file={self.directory / 'tpm.log'}",
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._await_path(path, tpm)
        return tpm

    def _start_qemu(self, kernel: Path, disks: tuple[list[str], ...]) -> subprocess.Popen[bytes]:
        at = self.directory
        arguments = [
            *_DIES_WITH_US,
            program("qemu-system-x86_64"), "-nodefaults", "-no-user-config", "-display", "none",
            # Never KVM, even where it opens: nested, it stops at some kernels. With the default buffer a reset takes a minute:
            # what was translated before is dropped piece by piece while the next kernel is written over it.
            "-machine", "q35", "-accel", "tcg,thread=multi,tb-size=128",
            # QEMU 7.2 corrupts flags after an unlocked cmpxchg16b, and kernels then crash at random: hidden from them. One
            # processor: of two, each on a thread of its own, both were seen to wait for each other for ever.
            "-cpu", "Nehalem,+rdrand,-cx16", "-smp", "1", "-m", str(_MEMORY_MB),
            "-kernel", str(kernel), "-append", _COMMAND_LINE,
            *itertools.chain(*disks),
            "-serial", f"file:{self.console}",
            "-device", "virtio-rng-pci",
            "-chardev", f"socket,id=tpm,path={at / 'tpm.ctrl'}", "-tpmdev", "emulator,id=tpm0,chardev=tpm",
            "-device", "tpm-crb,tpmdev=tpm0",
            "-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={at / 'agent'},server=on,wait=off",
            "-device", "virtserialport,chardev=agent,name=unsealerd.agent",
            "-qmp", f"unix:{at / 'qmp'},server=on,wait=off",
            # Nothing in the guest reaches anything outside.
            "-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net",
        ]  # fmt: skip
        with (at / "qemu.log").open("wb") as log:
            return subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _await_path(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        try:
            wait_for(lambda: path.exists() or process.poll() is not None, f"{path} to appear", _PATIENCE)
        except AssertionError as err:
            raise RigError(str(err)) from err
        if process.poll() is not None:
            raise RigError(f"{process.args!r} ended with {process.returncode}; see {self.directory}")

    def _connect(self, name: str) -> socket.socket:
        self._await_path(self.directory / name, self._qemu)
        connection = socket.socket(socket.AF_UNIX)
        # The address is short also when the directory is not.
        fd = os.open(self.directory, os.O_PATH)

        def listens() -> bool:
            # There is a moment between the file and whoever listens at it.
            return connection.connect_ex(f"/proc/self/fd/{fd}/{name}") == 0 or self._qemu.poll() is not None

        try:
            wait_for(listens, f"{name} to be listened at", _PATIENCE)
            connection.getpeername()
        except (AssertionError, OSError) as err:
            connection.close()
            raise RigError(f"{name}: {err}; see {self.directory}") from err
        finally:
            os.close(fd)
        return connection

    def monitor(self, command: str, **arguments: object) -> object:
        """One QMP command, and its answer; events are passed over."""
        self._qmp_file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._qmp_file.flush()
        while True:
            line = self._qmp_file.readline()
            if not line:
                raise RigError(f"QEMU ended instead of answering {command}")
            message = json.loads(line)
            if "error" in message:
                raise RigError(f"{command}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]

    def forward(self, port: int) -> int:
        """Let the operator reach the gateway on 127.0.0.1, at this port or, if it is taken (or 0), another."""
        for candidate in dict.fromkeys((port, 0)):
            self._human(f"hostfwd_add net tcp:127.0.0.1:{candidate}-:8750")
            for line in self._human("info usernet").splitlines():
                words = line.split()
                if words and words[0].startswith("TCP[HOST_FORWARD]"):
                    return int(words[3])
        raise RigError("QEMU forwards no port")

    def _human(self, line: str) -> str:
        return str(self.monitor("human-monitor-command", **{"command-line": line}))

    def wait_for_end(self, seconds: float) -> None:
        """Until the guest has switched the machine off. Raises RigError."""
        try:
            self._qemu.wait(seconds)
        except subprocess.TimeoutExpired as err:
            raise RigError(f"the machine did not switch itself off in {seconds} s") from err
        self.cut()

    def freeze(self) -> None:
        """The guest stands still; returns once all threads do. Raises RigError if QEMU has ended."""
        pid = self._qemu.pid
        self._qemu.send_signal(signal.SIGSTOP)
        try:
            # Not reaped, should it have ended: that is for `cut`.
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            # That is told once, so that the next time is waited for.
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG)
        except ChildProcessError as err:
            raise RigError("QEMU has ended") from err

    def thaw(self) -> None:
        self._qemu.send_signal(signal.SIGCONT)

    def cut(self) -> None:
        """Power off, now: nothing is flushed, nobody is asked."""
        processes = [self._qemu, self._tpm] if hasattr(self, "_qemu") else [self._tpm]
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait(_PATIENCE)
        if self._qmp is not None:
            self._qmp.close()
        if hasattr(self, "agent"):
            self.agent.close()
