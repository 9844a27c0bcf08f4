"""One virtual server: its disks, its TPM, and whatever runs on it while it is on."""

import os
import random
import select
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vm import ext4
from vm.agentlink import AgentLink, Done
from vm.errors import GuestSilent, RigError
from vm.images import Image
from vm.notes import DISK, FILE_SYSTEM
from vm.programs import copy, quietly
from vm.progress import progress
from vm.qemu import Processes
from vm.writelog import Log

BOOT_SECONDS = 300.0  # 10 to 20 on an idle machine
HUNG_SECONDS = 150.0  # after which a guest that has not written a byte never will
STOP_SECONDS = 200.0
_WRITES_A_SECOND = 50
_NOTHING_LOST = 1.0
_LOG = "writes"
_LOOK = 0.01  # seconds between two looks
_LOOKS = 3000


@dataclass(frozen=True, slots=True)
class Crash:
    """The power was cut in the middle of something; what is known of it."""

    before: Path
    """The disk of the state as it was when the machine was switched on."""
    log: Log

    def forget(self) -> None:
        self.before.unlink()
        self.log.path.unlink()


class Machine:
    """Off at first. Disks and TPM keep what they have from one start to the next.

    The root disk is a copy of the image. What the daemon keeps is on a disk of its own, whose cache is volatile: what
    the guest has not flushed is lost in a power cut.
    """

    def __init__(self, directory: Path, image: Image) -> None:
        directory.mkdir()
        self.directory = directory
        self.root = directory / "root"
        self.state = directory / "state"
        self.boots = 0
        self.port = 0
        """Where the operator reaches the gateway, on 127.0.0.1."""
        self._image = image
        self._starts = 0
        self._processes: Processes | None = None
        self._link: AgentLink | None = None
        copy(image.disk, self.root)
        quietly("truncate", "-s", str(DISK), str(self.state))
        quietly("mke2fs", "-q", "-t", "ext4", "-m", "0", str(self.state), f"{FILE_SYSTEM >> 10}k")

    # --- power

    @property
    def on(self) -> bool:
        return self._processes is not None

    def start(self) -> str:
        """Switch it on, wait for the agent, and return the boot id."""
        if self._processes is not None:
            raise RigError("the machine is on already")
        tpm, before = self.directory / "tpm", self.directory / "tpm-before"
        if tpm.exists():  # made at the first start
            _replace(before, tpm)
        try:
            return self._power_on()
        except GuestSilent:
            # Seen after power cuts, a few times in a hundred: QEMU works, and the guest does nothing. That says nothing about the
            # guest: the same again, with the TPM as it was. Once.
            if not self._untouched():
                raise
            progress("the emulator hung at power on; the same again")
            self._on().cut()
            self._processes = self._link = None
            if before.exists():
                _replace(tpm, before)
            return self._power_on()

    def _power_on(self) -> str:
        self._starts += 1
        run = self.directory / f"run{self._starts}"
        run.mkdir()
        self._processes = Processes(
            run, self._image.kernel, _root_disk(self.root), _state_disk(self.state, run)
        )
        self.port = self._processes.forward(self.port)
        self._link = AgentLink(self._processes.agent)
        return self.wait_for_boot(HUNG_SECONDS)

    def _untouched(self) -> bool:
        """Whether the guest has written nothing to the disk of the state since it was switched on."""
        return (self._on().directory / _LOG).stat().st_size == 0

    def wait_for_boot(self, hung: float = BOOT_SECONDS) -> str:
        """The boot id: the agent's first word after the next boot. ``hung``: seconds in which the guest has to write a byte."""
        self.boots += 1
        try:
            try:
                return self._agent.wait_for_boot(hung)
            except GuestSilent:
                if self._untouched() or hung >= BOOT_SECONDS:
                    raise
                return self._agent.wait_for_boot(BOOT_SECONDS - hung)
        except GuestSilent as err:
            raise GuestSilent(f"{err}\n{self.console_tail()}") from err

    def wait_for_power_off(self) -> None:
        """Until the guest has switched itself off."""
        self._on().wait_for_end(STOP_SECONDS)
        self._off()

    def reset(self) -> None:
        """The reset button."""
        self._on().monitor("system_reset")

    def cut(self) -> None:
        """Switch it off, now. The disk has time to write what it was given."""
        if self._processes is not None:
            self._processes.cut()
            self._off()

    def crash(self, when: Callable[[Log], bool], share: float, chance: random.Random) -> Crash:
        """Pull the plug, at the first moment at which ``when`` holds of the log of the disk.

        What was not flushed is there to this share. The disk from before and the log stay, until `Crash.forget`.
        """
        processes = self._on()
        log = self.log()
        for _ in range(_LOOKS):
            processes.freeze()
            log = self.log()
            if log.whole and when(log):
                break
            processes.thaw()
            select.select([], [], [], _LOOK)
        else:
            raise RigError("the moment to pull the plug does not come")
        processes.cut()
        crash = Crash(processes.directory / "before", log)
        copy(self.state, crash.before)
        self._off(share, chance, keep=True)
        return crash

    def log(self) -> Log:
        """What the guest has written to the disk of the state, up to now."""
        return Log.read(self._on().directory / _LOG)

    def files_on_disk(self) -> set[str]:
        """The names of the files on the disk of the state as it is, whether the machine is on or off."""
        directory = self.directory / "look"
        directory.mkdir()
        try:
            copy(self.state, directory / "disk")
            if self.on:
                log = self.log()
                log.settle(directory / "disk", log.cut(_NOTHING_LOST), random.Random())
            ext4.extract(directory / "disk", directory / "files")
            return set(os.listdir(directory / "files"))
        finally:
            shutil.rmtree(directory)

    def _on(self) -> Processes:
        if self._processes is None:
            raise RigError("the machine is off")
        return self._processes

    def _off(
        self, share: float = _NOTHING_LOST, chance: random.Random | None = None, *, keep: bool = False
    ) -> None:
        run = self._on().directory
        self._processes = self._link = None
        log = Log.read(run / _LOG)
        log.settle(self.state, log.cut(share), chance or random.Random())
        (run / "overlay").unlink()
        if not keep:
            log.path.unlink()

    # --- inside

    @property
    def _agent(self) -> AgentLink:
        if self._link is None:
            raise GuestSilent("the machine is off")
        return self._link

    def run(self, shell: str, *, stdin: str = "", seconds: float = 120.0, ok: bool = True) -> Done:
        return self._agent.run(shell, stdin=stdin, seconds=seconds, ok=ok)

    def say(self, shell: str) -> int:
        """Start a command whose end the machine may not live to see."""
        return self._agent.start(shell)

    def console(self) -> str:
        """Everything that this start has printed on the console."""
        path = self.directory / f"run{self._starts}" / "console"
        return path.read_text(errors="replace") if path.exists() else ""

    def console_tail(self) -> str:
        return "the console's last lines:\n" + "\n".join(self.console().splitlines()[-25:])

    # --- the disks, when it is off

    def copy_disks(self, name: str) -> Path:
        """What somebody has who takes the disks away for a minute."""
        taken = self.directory / name
        taken.mkdir()
        copy(self.root, taken / "root")
        copy(self.state, taken / "state")
        return taken

    def put_disks(self, taken: Path) -> None:
        if self.on:
            raise RigError("the machine is on")
        copy(taken / "root", self.root)
        copy(taken / "state", self.state)


def _replace(target: Path, source: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def _file(path: Path) -> str:
    """A file of this machine that no flush of the guest waits for.

    It may have gigabytes to write just then, and a guest gives a disk up that does not answer for 90 seconds. What a power
    cut leaves is decided by the log of the writes, not by this machine's disk.
    """
    return f"file.driver=file,file.filename={path},file.cache.no-flush=on"


def _root_disk(medium: Path) -> list[str]:
    return [
        "-blockdev", f"driver=raw,node-name=root,{_file(medium)}",
        "-device", "nvme,drive=root,serial=0",
    ]  # fmt: skip


def _state_disk(medium: Path, run: Path) -> list[str]:
    """Writes go to an overlay that is thrown away, and to a log that says what was flushed.

    It is as slow as a hard disk, so that a power cut often finds something that is not flushed. Not NVMe: QEMU's
    ignores "force unit access", which file systems rely on; for virtio they flush instead.
    """
    overlay, log = run / "overlay", run / _LOG
    quietly("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(medium), "-F", "raw", str(overlay))
    log.touch()
    return [
        "-blockdev", f"driver=qcow2,node-name=overlay,{_file(overlay)}",
        "-blockdev", f"driver=raw,node-name=log,{_file(log)}",
        "-object", f"throttle-group,id=slow,x-iops-write={_WRITES_A_SECOND}",
        "-blockdev", "driver=throttle,node-name=slow,throttle-group=slow,file=overlay",
        "-blockdev", "driver=blklogwrites,node-name=state,file=slow,log=log,log-sector-size=512",
        "-device", "virtio-blk-pci,drive=state",
    ]  # fmt: skip
