"""Starts of the daemon."""

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

from rigs.server import PATIENCE, Server
from rigs.swtpm import SoftwareTpm

from measure.figure import MESSAGE, Figure, absent, compare, figure, rss, run, timed
from unsealerd.daemon.app import SETTLING
from unsealerd.daemon.hygiene import ENVIRONMENT


class Starts:
    """Times starts of a server's daemon by what it tells its manager; in the environment that its unit sets."""

    def __init__(self, server: Server, stack: ExitStack) -> None:
        self.server = server
        path = server.base / "notify"
        self._socket = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self._socket.bind(str(path))
        self._socket.settimeout(PATIENCE)
        server.extra_environment |= {"NOTIFY_SOCKET": str(path), **ENVIRONMENT}

    def start(self) -> None:
        self.server.launch()
        while b"READY=1" not in self._socket.recv(4096).split(b"\n"):
            pass

    def serve(self) -> None:
        self.start()
        self.server.key()

    def restart(self) -> float:
        self.server.stop()
        return timed(self.start)

    def reboot(self) -> float:
        """From exec to the key in a reader's hands."""
        self.server.ctl("seal")
        self.server.stop()
        self.server.reset_tpm()
        return timed(self.serve)


def starting(stack: ExitStack) -> Iterator[Figure]:
    starts = Starts(server := stack.enter_context(Server()), stack)
    starts.start()
    server.ctl("init")
    if why := absent("clevis", "clevis-decrypt-tpm2", "tpm2_unseal"):
        yield figure("exec to keys served, unsealed by TPM", why, "<= 1.0", starts.reboot(), None)
    else:
        tpm = stack.enter_context(SoftwareTpm(server.base / "clevis"))
        where = {"TPM2TOOLS_TCTI": tpm.tcti}
        sealed = run("clevis", "encrypt", "tpm2", '{"pcr_ids":"7"}', stdin=MESSAGE, **where)

        def clevis() -> float:
            tpm.reset()  # without a resource manager its tools leave objects behind
            return timed(lambda: run("clevis", "decrypt", stdin=sealed, **where))

        found = compare(9, starts.reboot, clevis)
        yield figure("exec to keys served, unsealed by TPM", "clevis decrypt (tpm2)", "<= 1.0", *found)
    server.assert_unlocked()
    time.sleep(2 * SETTLING)  # the rest of it is loaded
    yield rss("memory of the daemon, unsealed, idle", "<= 40 MB", server.pid)
    bare = (sys.executable, "-I", "-c", "pass")
    found = compare(9, starts.restart, lambda: timed(lambda: run(*bare)))
    server.assert_locked("daemon_stopped")
    yield figure("exec to ready, locked", "bare interpreter", "<= 6", *found)
