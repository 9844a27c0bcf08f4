"""One virtual server: its disks, its TPM, and whatever runs on it while it is on."""

import random
import subprocess
from pathlib import Path

from vm.agentlink import AgentLink, Done
from vm.errors import GuestSilent, RigError
from vm.images import Image
from vm.qemu import Processes, program
from vm.writelog import Loss, settle

BOOT_SECONDS = 300.0  # 10 to 20 on an idle machine
STOP_SECONDS = 200.0
_STATE_SIZE = "48M"
_WRITES_A_SECOND = 40


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
        _copy(image.disk, self.root)
        _quiet("truncate", "-s", _STATE_SIZE, str(self.state))
        _quiet(program("mke2fs"), "-q", "-t", "ext4", "-m", "0", str(self.state))

    # --- power

    @property
    def on(self) -> bool:
        return self._processes is not None

    def start(self) -> str:
        """Switch it on, wait for the agent, and return the boot id."""
        if self._processes is not None:
            raise RigError("the machine is on already")
        self._starts += 1
        run = self.directory / f"run{self._starts}"
        run.mkdir()
        self._processes = Processes(
            run, self._image.kernel, _root_disk(self.root), _state_disk(self.state, run)
        )
        self.port = self._processes.forward(self.port)
        self._link = AgentLink(self._processes.agent)
        return self.wait_for_boot()

    def wait_for_boot(self) -> str:
        """The agent's first word after the next boot: the boot id."""
        self.boots += 1
        try:
            return self._agent.wait_for_boot(BOOT_SECONDS)
        except GuestSilent as err:
            raise GuestSilent(f"{err}\n{self.console_tail()}") from err

    def wait_for_power_off(self) -> None:
        """Until the guest has switched itself off."""
        if self._processes is None:
            raise RigError("the machine is off")
        self._processes.wait_for_end(STOP_SECONDS)
        self._off(None)

    def reset(self) -> None:
        """The reset button."""
        if self._processes is None:
            raise RigError("the machine is off")
        self._processes.monitor("system_reset")

    def cut(self, chance: random.Random | None = None) -> Loss:
        """Pull the plug. `chance` decides what is left of what was not flushed; without it, everything."""
        if self._processes is None:
            return Loss(0, 0)
        self._processes.cut()
        return self._off(chance)

    def _off(self, chance: random.Random | None) -> Loss:
        assert self._processes is not None
        run = self._processes.directory
        self._processes = self._link = None
        loss = settle(run / "writes", self.state, chance)
        (run / "writes").unlink()
        (run / "overlay").unlink()
        return loss

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
        return (self.directory / f"run{self._starts}" / "console").read_text(errors="replace")

    def console_tail(self) -> str:
        return "the console's last lines:\n" + "\n".join(self.console().splitlines()[-25:])

    # --- the disks, when it is off

    def copy_disks(self, name: str) -> Path:
        """What somebody has who takes the disks away for a minute."""
        copy = self.directory / name
        copy.mkdir()
        _copy(self.root, copy / "root")
        _copy(self.state, copy / "state")
        return copy

    def put_disks(self, copy: Path) -> None:
        if self.on:
            raise RigError("the machine is on")
        _copy(copy / "root", self.root)
        _copy(copy / "state", self.state)


def _copy(source: Path, target: Path) -> None:
    _quiet("cp", "--sparse=always", "--reflink=auto", str(source), str(target))


def _quiet(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RigError(f"{' '.join(command)}: {done.stderr[-500:]}")


def _root_disk(medium: Path) -> list[str]:
    return [
        "-blockdev", f"driver=raw,node-name=root,file.driver=file,file.filename={medium}",
        "-device", "nvme,drive=root,serial=0",
    ]  # fmt: skip


def _state_disk(medium: Path, run: Path) -> list[str]:
    """Writes go to an overlay that is thrown away, and to a log that says what was flushed.

    It is as slow as a hard disk, so that a power cut often finds something that is not flushed. Not NVMe: QEMU's
    ignores "force unit access", which file systems rely on; for virtio they flush instead.
    """
    overlay, log = run / "overlay", run / "writes"
    _quiet(program("qemu-img"), "create", "-q", "-f", "qcow2", "-b", str(medium), "-F", "raw", str(overlay))
    log.touch()
    return [
        "-blockdev", f"driver=qcow2,node-name=overlay,file.driver=file,file.filename={overlay}",
        "-blockdev", f"driver=raw,node-name=log,file.driver=file,file.filename={log}",
        "-object", f"throttle-group,id=slow,x-iops-write={_WRITES_A_SECOND}",
        "-blockdev", "driver=throttle,node-name=slow,throttle-group=slow,file=overlay",
        "-blockdev", "driver=blklogwrites,node-name=state,file=slow,log=log,log-sector-size=512",
        "-device", "virtio-blk-pci,drive=state",
    ]  # fmt: skip
