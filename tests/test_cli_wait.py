"""``unsealctl wait``: returns when the host is unlocked, whatever the daemon goes through meanwhile."""

import signal
import subprocess
from collections.abc import Iterator

import pytest
from rigs.limits import in_time
from rigs.server import PATIENCE, PROGRAMS, Server, wait_for


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(tpm=False) as server:
        yield server


def begin(server: Server, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [PROGRAMS / "unsealctl", "--config", server.config, "wait", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_it_waits_through_everything_until_the_unlock(server: Server) -> None:
    """No daemon yet, none initialised, locked, killed, stopped, and at last unlocked."""
    with begin(server, "--json") as waiting:
        try:
            server.start()
            assert waiting.poll() is None
            server.stop(signal.SIGKILL)
            server.start()
            server.stop()
            server.start()
            assert waiting.poll() is None
            server.ctl("init")
            out, err = waiting.communicate(timeout=PATIENCE)
            assert (waiting.returncode, out, err) == (0, b'{"state":"unlocked"}\n', b"")
        finally:
            waiting.kill()


def test_an_unlocked_host_is_not_waited_for(server: Server) -> None:
    server.start()
    server.ctl("init")
    done = server.ctl("wait", "--timeout", "1m")
    assert (done.stdout, done.stderr) == (b"", b"")


def test_a_locked_host_is_waited_for_and_then_it_says_so(server: Server) -> None:
    server.start()
    server.ctl("init")
    server.ctl("lock")
    # The daemon has to say so within this time.
    refused = in_time(
        lambda seconds: server.ctl("wait", "--timeout", f"{seconds:.0f}s", expect=3), (1, 10, 50)
    )
    assert b"still locked" in refused.stderr
    with begin(server, "--timeout", "5m") as waiting:
        try:
            server.unlock()
            waiting.communicate(timeout=PATIENCE)
            assert waiting.returncode == 0
        finally:
            waiting.kill()


def test_no_daemon_in_time(server: Server) -> None:
    refused = server.ctl("wait", "--timeout", "1s", expect=5)
    assert b"hint:" in refused.stderr


def test_a_malformed_time(server: Server) -> None:
    server.ctl("wait", "--timeout", "soon", expect=2)
    server.ctl("wait", "--timeout", "0s", expect=2)


def test_a_daemon_that_is_killed_in_the_middle_of_the_wait(server: Server) -> None:
    server.start()
    server.ctl("init")
    server.ctl("lock")
    with begin(server) as waiting:
        try:
            wait_for(lambda: _connected(waiting.pid), "the connection")
            server.stop(signal.SIGKILL)
            server.start()
            server.unlock()
            waiting.communicate(timeout=PATIENCE)
            assert waiting.returncode == 0
        finally:
            waiting.kill()


def _connected(pid: int) -> bool:
    """Whether the process has a socket open."""
    found = subprocess.run(
        ["ls", "-l", f"/proc/{pid}/fd"], capture_output=True, text=True, check=False
    ).stdout
    return "socket:" in found
