"""Questions to the person at the terminal: on /dev/tty, so that redirected data is never an answer."""

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

from unsealerd.errors import BadRequest


def attended() -> bool:
    """Whether a person started this, not a script: stdin and stderr are a terminal."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def present() -> bool:
    """Whether there is a terminal to ask on, whatever stdin is."""
    try:
        with open("/dev/tty", "rb"):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def _terminal(purpose: str) -> Iterator[tuple[TextIO, TextIO]]:
    with contextlib.ExitStack() as stack:
        try:
            # Two files, because a terminal cannot be seeked, which one buffered file for both ways would
            # need.
            reader = stack.enter_context(open("/dev/tty", encoding="utf-8", errors="replace"))
            writer = stack.enter_context(open("/dev/tty", "w", encoding="utf-8", errors="replace"))
        except OSError as err:
            raise BadRequest(f"{purpose}, and there is no terminal to ask on") from err
        yield reader, writer


def confirm(question: str, *, otherwise: str = "say --yes") -> bool:
    """Whether the answer is y or yes.

    Raises `BadRequest` without a terminal; ``otherwise``: what to do then.
    """
    with _terminal(f"a confirmation is needed ({otherwise})") as (reader, writer):
        writer.write(f"{question} [y/N] ")
        writer.flush()
        return reader.readline().strip().lower() in ("y", "yes")


def ask_secret(question: str) -> str:
    """What is typed, without echo. Raises `BadRequest` without a terminal.

    It is a `str`, which Python cannot wipe: it lives as long as the identity that it opens, in a process that
    ends with the command.
    """
    import getpass

    with _terminal("a passphrase is needed") as (_, writer):
        try:
            return getpass.getpass(question, stream=writer)
        except EOFError as err:
            raise BadRequest("no passphrase was given") from err


def tell(text: str) -> None:
    """Show what belongs on the terminal and nowhere else. Raises `BadRequest` without one."""
    with _terminal("a passphrase is to be shown") as (_, writer):
        writer.write(text)
        writer.flush()
