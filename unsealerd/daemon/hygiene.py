"""How the process must run so that nothing secret is left behind, and out of others' reach.

Imports next to nothing before the environment is right: it runs first, and may replace the process.
"""

import os
import sys

# Freed memory is overwritten (perturb), small blocks included (PYTHONMALLOC, tcache_count), and the linker spills no vector
# registers with secrets in them to the stack while it resolves a symbol late (LD_BIND_NOW).
ENVIRONMENT = {
    "LD_BIND_NOW": "1",
    "PYTHONMALLOC": "malloc",
    "GLIBC_TUNABLES": "glibc.malloc.perturb=165:glibc.malloc.tcache_count=0",
}
_DONE = "UNSEALERD_HYGIENE"  # set in the process that was executed for it, so that it happens once

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38


def ensure_environment() -> str | None:
    """Execute the program again, once, if the memory environment is not as it must be.

    Returns a warning where that did not help: the dynamic linker ignores these variables in a set-id process.
    """
    if all(os.environ.get(name) == value for name, value in ENVIRONMENT.items()):
        return None
    if os.environ.get(_DONE) != "1":
        # The linker has read its environment already, so setting the variables here would do nothing.
        environment = {**os.environ, **ENVIRONMENT, _DONE: "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606
    return "the memory environment is not in force: freed memory may hold copies of wrapping secrets"


def harden() -> list[str]:
    """No core dumps, no reading by other processes of the user, no new privileges; enough descriptors and locked memory.

    Returns what could not be had, a sentence each.
    """
    import ctypes
    import resource

    warnings: list[str] = []
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value, what in (
        (_PR_SET_DUMPABLE, 0, "core dumps could not be forbidden"),
        (_PR_SET_NO_NEW_PRIVS, 1, "new privileges could not be given up"),
    ):
        if libc.prctl(option, value, 0, 0, 0) != 0:
            warnings.append(what)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK):
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (hard, hard))
    os.umask(0o077)
    return warnings


def trim() -> None:
    """Give memory that is free back to the kernel (malloc_trim(3)); where the C library cannot, nothing happens."""
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
