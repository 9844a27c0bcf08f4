"""The host's end of the virtio-serial port: runs commands in the guest."""

import itertools
import json
import select
import socket
import time
from collections import deque
from dataclasses import dataclass

from vm.errors import GuestFailed, GuestSilent

_SLICE = 1.0  # seconds; how often whoever waits looks whether the machine is still there


@dataclass(frozen=True, slots=True)
class Done:
    """What a command in the guest did."""

    rc: int
    out: str
    err: str


class AgentLink:
    """One connection for the life of a QEMU process; the guest behind it may reboot."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._pending = b""
        self._answers: dict[int, Done] = {}
        self._boots: deque[str] = deque()
        self._ids = itertools.count(1)

    def close(self) -> None:
        self._connection.close()

    def wait_for_boot(self, seconds: float) -> str:
        """The boot id of the next boot whose agent reports. Raises GuestSilent."""
        deadline = time.monotonic() + seconds
        while not self._boots:
            self._receive(deadline, "no agent reported after the boot")
        return self._boots.popleft()

    def start(self, shell: str, *, stdin: str = "", seconds: float = 120.0) -> int:
        """Start a command and do not wait; the number is for `wait`."""
        number = next(self._ids)
        line = json.dumps({"id": number, "sh": shell, "stdin": stdin, "timeout": seconds})
        try:
            self._connection.sendall(line.encode() + b"\n")
        except OSError as err:
            raise GuestSilent(f"the agent's port is closed: {shell}") from err
        return number

    def wait(self, number: int, what: str, seconds: float = 120.0) -> Done:
        deadline = time.monotonic() + seconds
        while number not in self._answers:
            self._receive(deadline, f"no answer to: {what}")
        return self._answers.pop(number)

    def run(self, shell: str, *, stdin: str = "", seconds: float = 120.0, ok: bool = True) -> Done:
        """Run a command in the guest's shell. Raises GuestFailed if `ok` and it fails, GuestSilent."""
        done = self.wait(self.start(shell, stdin=stdin, seconds=seconds), shell, seconds + 30)
        if ok and done.rc != 0:
            raise GuestFailed(f"exit code {done.rc} of: {shell}\n{done.err[-2000:]}{done.out[-1000:]}")
        return done

    def _receive(self, deadline: float, what: str) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise GuestSilent(what)
        if not select.select([self._connection], [], [], min(left, _SLICE))[0]:
            return
        try:
            chunk = self._connection.recv(65536)
        except OSError as err:
            raise GuestSilent(f"the machine is gone; {what}") from err
        if not chunk:
            raise GuestSilent(f"the machine is gone; {what}")
        *lines, self._pending = (self._pending + chunk).split(b"\n")
        for line in lines:
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            return  # a line that the end of a boot has cut off
        if "boot" in message:
            self._boots.append(message["boot"])
        elif message["id"] is not None:
            self._answers[message["id"]] = Done(message["rc"], message["out"], message["err"])
