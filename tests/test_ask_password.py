"""Somebody at a boot console, and no terminal: systemd's password agents, with the real systemd-ask-password.

Its folder, /run/systemd/ask-password, belongs to the whole machine. Every operator here has a name of their own, and only
requests with this name are answered.
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from rigs.server import PATIENCE, PROGRAMS, Server, wait_for

from unsealerd.cli.edge import Exit
from unsealerd.core.passphrase import Parameters, derive

REQUESTS = Path("/run/systemd/ask-password")
PASSPHRASE = "correct horse battery staple"
CHEAP = "argon2id$v=19$m=65536,t=2,p=1$AAECAwQFBgcICQoLDA0ODw"


def requests(name: str) -> list[dict[str, str]]:
    """The open requests for this operator. https://systemd.io/PASSWORD_AGENTS/"""
    found = []
    for path in REQUESTS.glob("ask.*"):
        with contextlib.suppress(OSError):
            lines = path.read_text().splitlines()
            facts = dict(line.split("=", 1) for line in lines if "=" in line)
            if facts.get("Id") == f"unsealerd:{name}" and Path(facts["Socket"]).exists():
                found.append(facts)
    return found


def reply(request: dict[str, str], text: str | None) -> None:
    """As an agent does: plus and the password, or minus for a person who does not want to."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as agent:
        agent.sendto(b"-" if text is None else b"+" + text.encode(), request["Socket"])


class Boot:
    """A host with an operator who knows a passphrase, and the command that the unit runs."""

    def __init__(self, server: Server, name: str) -> None:
        self.server = server
        self.name = name
        self._running: list[subprocess.Popen[bytes]] = []

    def ask(self, *arguments: str) -> "subprocess.Popen[bytes]":
        """Without a terminal: a session of its own, and nothing on stdin."""
        process = subprocess.Popen(
            [
                *(PROGRAMS / "unsealctl", "--config", self.server.config, "unlock", "--local"),
                *("-i", f"passphrase:{self.name}", *arguments),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._running.append(process)
        return process

    def request(self) -> dict[str, str]:
        wait_for(lambda: bool(requests(self.name)), "the request")
        (found,) = requests(self.name)
        return found

    def close(self) -> None:
        for process in self._running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture(scope="module")
def _server() -> Iterator[tuple[Server, str]]:
    # Where systemd is not PID 1 nobody has made it, and from version 257 on its program does not.
    REQUESTS.parent.mkdir(exist_ok=True)
    name = f"test-{secrets.token_hex(8)}"
    recipient = derive(memoryview(PASSPHRASE.encode()), Parameters.parse(CHEAP)).recipient
    with Server(tpm=False) as server:
        server.tables = f'[[operator]]\nname = "{name}"\nrecipient = "{recipient}"\npassphrase = "{CHEAP}"\n'
        server.configure()
        server.start()
        server.ctl("init")
        yield server, name


@pytest.fixture
def boot(_server: tuple[Server, str]) -> Iterator[Boot]:
    server, name = _server
    if server.status()["state"] != "locked":
        server.ctl("lock")
    one = Boot(server, name)
    yield one
    one.close()
    wait_for(lambda: requests(name) == [], "the end of the request")


pytestmark = pytest.mark.xdist_group("ask-password")


@pytest.mark.parametrize("arguments", [("--ask-password",), ()])
def test_somebody_answers_at_the_console(boot: Boot, arguments: tuple[str, ...]) -> None:
    """Without the option, too: there is no terminal."""
    process = boot.ask(*arguments)
    request = boot.request()
    assert boot.name in request["Message"]
    assert "NotAfter" not in request or request["NotAfter"] == "0"  # whenever they come
    reply(request, PASSPHRASE)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (0, b"this host is unlocked\n"), err
    assert PASSPHRASE.encode() not in err
    boot.server.assert_unlocked()
    assert PASSPHRASE not in boot.server.log_text()


def test_a_wrong_passphrase_opens_nothing(boot: Boot) -> None:
    process = boot.ask("--ask-password")
    reply(boot.request(), PASSPHRASE + "x")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == Exit.PEER, err
    assert boot.server.status()["state"] == "locked"


def test_somebody_declines(boot: Boot) -> None:
    process = boot.ask("--ask-password")
    reply(boot.request(), None)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == Exit.PIN
    assert b"without an answer" in err


def test_no_session_waits_for_somebody_to_come(boot: Boot) -> None:
    """The session begins with the answer, so that it does not end before the person comes."""
    process = boot.ask("--ask-password")
    request = boot.request()
    assert boot.server.status()["sessions"] == []
    reply(request, PASSPHRASE)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


def test_the_daemon_may_be_restarted_meanwhile(boot: Boot) -> None:
    """The person took their time; what was typed is not lost."""
    process = boot.ask("--ask-password")
    request = boot.request()
    boot.server.stop()
    boot.server.start()
    reply(request, PASSPHRASE)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (0, b"this host is unlocked\n"), err


def test_the_request_goes_away_when_others_unlock(boot: Boot) -> None:
    process = boot.ask("--ask-password")
    boot.request()
    boot.server.unlock()
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == Exit.NOTHING_TO_DO, err
    wait_for(lambda: requests(boot.name) == [], "the end of the request")


def test_nobody_is_asked_when_there_is_nothing_to_unlock(boot: Boot) -> None:
    boot.server.unlock()
    process = boot.ask("--ask-password")
    process.communicate(timeout=PATIENCE)
    assert process.returncode == Exit.NOTHING_TO_DO


def test_the_request_goes_away_with_the_command(boot: Boot) -> None:
    """A service manager ends all processes of a unit with SIGTERM."""
    process = boot.ask("--ask-password")
    boot.request()
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    wait_for(lambda: requests(boot.name) == [], "the end of the request")


def test_without_systemd(boot: Boot) -> None:
    server = boot.server
    done = subprocess.run(
        [
            *(PROGRAMS / "unsealctl", "--config", server.config, "unlock", "--local"),
            *("-i", f"passphrase:{boot.name}", "--ask-password"),
        ],
        env={**os.environ, "PATH": "/nonexistent"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == Exit.CONFIGURATION
    assert b"systemd-ask-password" in done.stderr
