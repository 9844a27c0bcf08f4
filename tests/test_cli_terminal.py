"""Questions of unsealctl, on a real terminal."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from unsealerd.cli import terminal

# The child makes the pseudo-terminal its controlling one; its stdin and stdout are not the terminal.
_CHILD = """
import fcntl, sys, termios
fcntl.ioctl(int(sys.argv[1]), termios.TIOCSCTTY, 0)
from unsealerd.cli import terminal
{}
"""


@dataclass(frozen=True, slots=True)
class Terminal:
    """A person in front of a program."""

    screen: int
    device: int

    def start(self, code: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-c", _CHILD.format(code), str(self.device)],
            pass_fds=[self.device],
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def read_until(self, text: bytes) -> bytes:
        seen = b""
        while text not in seen:
            seen += os.read(self.screen, 1024)
        return seen

    def type(self, text: bytes) -> None:
        os.write(self.screen, text)


@pytest.fixture
def tty() -> Iterator[Terminal]:
    screen, device = os.openpty()
    yield Terminal(screen, device)
    os.close(screen)
    os.close(device)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [(b"y\n", b"True"), (b"YES\n", b"True"), (b"n\n", b"False"), (b"\n", b"False"), (b"yo\n", b"False")],
)
def test_a_confirmation_comes_from_the_terminal(tty: Terminal, typed: bytes, expected: bytes) -> None:
    with tty.start("print(terminal.confirm('Sure?'), end='')") as process:
        assert tty.read_until(b"[y/N] ") == b"Sure? [y/N] "
        tty.type(typed)
        out, err = process.communicate(b"y\ny\n", timeout=60)  # on stdin, where it does not count
    assert (out, err) == (expected, b"")


def test_a_passphrase_is_not_shown(tty: Terminal) -> None:
    with tty.start("print(terminal.ask_secret('Passphrase: '), end='')") as process:
        tty.read_until(b"Passphrase: ")
        tty.type(b"s3cret\n")
        out, err = process.communicate(b"other\n", timeout=60)
    assert (out, err) == (b"s3cret", b"")
    os.set_blocking(tty.screen, False)
    assert b"s3cret" not in os.read(tty.screen, 1024)


@pytest.mark.parametrize("code", ["terminal.confirm('Sure?')", "terminal.ask_secret('Passphrase: ')"])
def test_without_a_terminal_nobody_is_asked(code: str) -> None:
    attempt = f"""
from unsealerd.cli import terminal
from unsealerd.errors import BadRequest
try:
    {code}
except BadRequest as err:
    print(err)
"""
    result = subprocess.run(
        [sys.executable, "-c", attempt],
        input=b"y\n",
        capture_output=True,
        start_new_session=True,
        timeout=60,
        check=True,
    )
    assert b"there is no terminal to ask on" in result.stdout
    assert not result.stderr


def test_a_script_is_not_a_person() -> None:
    assert not terminal.attended()
