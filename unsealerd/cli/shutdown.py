"""``unsealctl seal --at-shutdown``: what the service does while it is being stopped and the daemon still runs.

Why it stops is read from the service manager's own job queue; logind and dbus need not be there::

    job in the queue                                        then
    reboot.target start                                     seal for a reboot, if it is in [seal] on
    kexec.target or soft-reboot.target start                seal for kexec, likewise: the TPM will not be reset
    the service's own restart                               nothing: the keyring's memory stays
    anything else (poweroff, halt, a plain stop)            a sealed copy, if there is one, is destroyed
    a queue that cannot be read                             likewise: nobody knows that it is a planned reboot

Whatever fails is told, and stops no shutdown: it takes a bounded time, and the exit code is 0.
"""

import contextlib
import enum
import os
import subprocess
from pathlib import Path
from typing import assert_never

from unsealerd.cli.app import App
from unsealerd.cli.output import printable
from unsealerd.cli.stderr import note
from unsealerd.client.connection import Connection, Deadline
from unsealerd.errors import DaemonUnreachable, Locked, NotArmed, NotInitialised, UnsealerdError
from unsealerd.model import SealKind

UNIT = "unsealerd.service"
PATIENCE = 20.0  # seconds in all
_QUEUE_PATIENCE = 5.0  # seconds of it for the service manager
_CONSOLE = "/dev/console"
_ADMIN = "io.unsealerd.Admin"


class Shutdown(enum.Enum):
    """Why the service is being stopped."""

    REBOOT = "reboot"
    KEXEC = "kexec"
    RESTART = "restart"
    STOP = "stop"


_TARGETS = {
    "reboot.target": Shutdown.REBOOT,
    "kexec.target": Shutdown.KEXEC,
    "soft-reboot.target": Shutdown.KEXEC,
}


def why(jobs: str) -> Shutdown:
    """The reason, from the lines ``ID UNIT TYPE STATE`` of ``systemctl list-jobs``."""
    found = Shutdown.STOP
    for line in jobs.splitlines():
        match line.split():
            case [_, target, "start", _] if target in _TARGETS:
                return _TARGETS[target]
            case [_, unit, "restart" | "try-restart", _] if unit == UNIT:
                found = Shutdown.RESTART
    return found


def at_shutdown(app: App) -> None:
    """Seal, or destroy the sealed copy, or do nothing. Raises nothing that the program could end with."""
    deadline = Deadline(PATIENCE)
    try:
        reason = why(_jobs())
    except (OSError, subprocess.SubprocessError) as err:
        reason = Shutdown.STOP
        _tell(
            f"the service manager's jobs could not be read ({type(err).__name__}), so this is taken for a stop: "
            "nothing is sealed, and a sealed copy is destroyed"
        )
    try:
        match reason:
            case Shutdown.REBOOT:
                _seal(app, SealKind.REBOOT, deadline)
            case Shutdown.KEXEC:
                _seal(app, SealKind.KEXEC, deadline)
            case Shutdown.RESTART:
                note("the service is restarted: its memory is kept")
            case Shutdown.STOP:
                _destroy(app, deadline)
            case _:
                assert_never(reason)
    except TimeoutError:
        _tell(f"nothing is known to be sealed: it took more than {PATIENCE:.0f} s")
    except UnsealerdError as err:
        what = "nothing was sealed" if reason is not Shutdown.STOP else "a sealed copy may be left"
        _tell(f"{what}: {err.detail or err.name}")


def _seal(app: App, kind: SealKind, deadline: Deadline) -> None:
    config = app.config()
    if kind not in config.seal.on:
        note(f"[seal] on does not name {kind.value}: the next boot will need an operator")
        return
    if config.tpm.tcti is None:
        note("no TPM: the next boot will need an operator")
        return
    try:
        with _admin(app, deadline) as admin:
            admin.call(f"{_ADMIN}.Seal", {"kind": kind.value}, timeout=deadline.left())
    except (Locked, NotInitialised) as err:
        note(f"nothing was sealed: {err.detail or err.name}")
    else:
        note(f"sealed for the next boot ({kind.value})")


def _destroy(app: App, deadline: Deadline) -> None:
    try:
        with _admin(app, deadline) as admin:
            admin.call(f"{_ADMIN}.Disarm", timeout=deadline.left())
    except NotArmed:
        note("nothing is sealed: the next start will need an operator")
    except DaemonUnreachable as err:
        if not isinstance(err.__cause__, FileNotFoundError | ConnectionRefusedError | ProcessLookupError):
            raise
        note("the daemon has ended already")
    else:
        note("the sealed copy is destroyed: the next start will need an operator")


def _admin(app: App, deadline: Deadline) -> Connection:
    """Raises `DaemonUnreachable`: at once when there is no daemon, although the service manager holds its sockets open."""
    if _has_ended():
        raise DaemonUnreachable("the daemon has ended") from ProcessLookupError()
    directory, _ = app.admin_directory()
    return Connection(directory / "admin", timeout=deadline.left())


def _has_ended() -> bool:
    """Whether the service manager says that there is no main process. By hand nobody says so.

    It sets SERVICE_RESULT for every ExecStop=, and MAINPID only while it knows of one: systemd.exec(5).
    """
    pid = os.environ.get("MAINPID")
    if pid is None:
        return "SERVICE_RESULT" in os.environ
    return not Path("/proc", pid).exists()


def _jobs() -> str:
    """Raises ``OSError``, ``subprocess.SubprocessError``."""
    done = subprocess.run(
        ["systemctl", "list-jobs", "--no-legend", "--no-pager", "--plain", "--full"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        timeout=_QUEUE_PATIENCE,
        env={**os.environ, "LC_ALL": "C", "SYSTEMD_COLORS": "0"},
    )
    return done.stdout.decode(errors="replace")


def _tell(what: str) -> None:
    """To the journal, and to whoever stands before the machine that goes down."""
    line = printable(f"unsealerd: {what}; the next boot will need an operator")
    note(line)
    # Never waited for, and never this process's terminal.
    with contextlib.suppress(OSError):
        fd = os.open(_CONSOLE, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(fd, f"\r{line}\r\n".encode(errors="replace"))
        finally:
            os.close(fd)
