"""Who is asked for a PIN or a passphrase: the person at the terminal, or whoever answers systemd's password requests.

What is typed never becomes an argument, is never printed, and lives as long as the command.
"""

import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from unsealerd.cli import terminal
from unsealerd.cli.output import printable
from unsealerd.errors import BadRequest, NotInstalled, NotLocked, PinCancelled

if TYPE_CHECKING:
    from unsealerd.core.secret import SecretBuffer
    from unsealerd.operator.prompts import PinRequest

ASK_PASSWORD = "systemd-ask-password"  # noqa: S105 - the name of a program
_POLL_SECONDS = 2.0
_END_SECONDS = 5.0


class TerminalPrompts:
    """Asks on the terminal, without echo."""

    def pin(self, request: "PinRequest") -> bytes:
        return self._asked(f"{pin_question(request)}: ")

    def passphrase(self, what: str) -> bytes:
        return self._asked(f"Passphrase of {printable(what)}: ")

    def _asked(self, question: str) -> bytes:
        try:
            return terminal.ask_secret(question).encode()
        except BadRequest as err:
            raise PinCancelled(err.detail) from err


class AskPasswordPrompts:
    """Asks through systemd-ask-password: at the boot console, in Plymouth, or wherever a password agent is."""

    def __init__(self, wanted: Callable[[], bool] = lambda: True) -> None:
        """``wanted``: whether an answer is still of use; asked every two seconds while nobody answers."""
        self._wanted = wanted

    def pin(self, request: "PinRequest") -> bytes:
        return self._asked("pin", pin_question(request))

    def passphrase(self, what: str) -> bytes:
        return self._asked(
            what.removeprefix("operator "), f"Passphrase of {printable(what)}, to unlock this host"
        )

    def _asked(self, name: str, question: str) -> bytes:
        """Raises `PinCancelled`, `NotInstalled`, and `NotLocked` when the answer is not wanted any more."""
        command = [ASK_PASSWORD, f"--id=unsealerd:{name}", "--timeout=0", "--echo=no"]
        if not sys.stdin.isatty():
            command.append("--no-tty")
        try:
            asking = subprocess.Popen([*command, f"{question}:"], stdout=subprocess.PIPE)
        except OSError as err:
            raise NotInstalled(f"{ASK_PASSWORD}, which comes with systemd: {err.strerror}") from err
        with asking:
            try:
                answer = self._awaited(asking)
            finally:
                _end(asking)
        if asking.returncode != 0:
            raise PinCancelled(f"{ASK_PASSWORD} ended without an answer")
        return answer.removesuffix(b"\n")

    def _awaited(self, asking: "subprocess.Popen[bytes]") -> bytes:
        while True:
            try:
                return asking.communicate(timeout=_POLL_SECONDS)[0]
            except subprocess.TimeoutExpired:
                if not self._wanted():
                    raise NotLocked("the host was unlocked by others in the meantime") from None


class AnsweredPrompts:
    """Gives the passphrase that was asked for before; for PINs it asks as the prompts it was made with."""

    def __init__(self, passphrase: "SecretBuffer", prompts: AskPasswordPrompts) -> None:
        self._passphrase = passphrase
        self._prompts = prompts

    def pin(self, request: "PinRequest") -> bytes:
        return self._prompts.pin(request)

    def passphrase(self, _what: str) -> bytes:
        return bytes(self._passphrase.view)


def pin_question(request: "PinRequest") -> str:
    """Names the device and the key, and what a mistake costs."""
    match request.tries_left:
        case None:
            left = ""
        case 1:
            left = " (this is the last try)"
        case count:
            left = f" ({count} tries left)"
    return f"PIN of {printable(request.device)}{left}"


def _end(asking: "subprocess.Popen[bytes]") -> None:
    """By SIGTERM the program takes its request back; agents stop to show it."""
    if asking.poll() is None:
        asking.terminate()
        try:
            asking.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            asking.kill()
