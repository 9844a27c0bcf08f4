"""Faults at the system call boundary: strace stops, or fails, the daemon at one call on one of the files of the store."""

from pathlib import Path

from rigs.server import Server

# What changes the disk, or makes a change durable.
CALLS = "openat,write,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat,ftruncate"


def watched(server: Server) -> list[Path]:
    """The files of the backup store, under the names that they have during a write, and their directory."""
    names = ("keyring.age", "keyring.age.new", "keyring.age.previous", "sealed.json", "sealed.json.new")
    return [server.state, *(server.state / name for name in names)]


def strace(server: Server, log: Path, inject: str | None = None) -> tuple[str, ...]:
    """The command to put before the daemon; strace is its child, so that signals reach the daemon. `inject` as strace(1) takes it after the names of the calls."""
    paths = [argument for path in watched(server) for argument in ("-P", str(path))]
    fault = ("-e", f"inject={CALLS}:{inject}") if inject is not None else ()
    return ("strace", "-D", "-f", "-qq", "-o", str(log), "-e", f"trace={CALLS}", *fault, *paths)


def calls_by_thread(log: Path) -> dict[str, list[str]]:
    """The calls that strace saw, by thread, in the order in which strace counts them for ``when=``."""
    found: dict[str, list[str]] = {}
    for line in log.read_text(errors="replace").splitlines():
        thread, _, call = line.partition(" ")
        call = call.strip()
        # A call that another thread interrupted is in the log twice: begun, and resumed.
        if "(" in call and not call.startswith(("<...", "+++", "---")):
            found.setdefault(thread, []).append(call)
    return found


def strip(call: str) -> str:
    """The name of the system call."""
    return call.partition("(")[0]
