"""What could carry key bytes out of memory: swap, core dumps, and what the daemon itself warns of."""

import re
from collections.abc import Iterator

from unsealerd import keyringid
from unsealerd.cli.doctor.finding import Finding, fail, ok, warn
from unsealerd.cli.doctor.subject import Answers, Subject
from unsealerd.cli.fields import optional, required

_CORE_LIMIT = re.compile(r"^Max core file size\s+(\S+)\s+(\S+)", re.MULTILINE)
_BEST = "memfd_secret"
_ELSEWHERE = (
    "no TPM:",
    "no memfd_secret:",
    "the TPM's counter",
    "operators were proven",
    keyringid.FILE_NAME,
)
"""Parts of warnings of the daemon that other checks are about."""


def check(subject: Subject) -> Iterator[Finding]:
    if isinstance(subject.answers, Answers):
        kind = str(subject.answers.status.get("secret_memory"))
        yield _kind(kind)
        yield _swap(subject, safe=kind == _BEST)
        yield from _kept(subject.answers)
        for warning in subject.answers.warnings:
            if not any(part in warning for part in _ELSEWHERE):
                yield warn("daemon", warning, "`unsealctl status`; `journalctl -u unsealerd`")
        yield _core(subject, required(subject.answers.status, "pid", int))


def _kind(kind: str) -> Finding:
    if kind == _BEST:
        return ok("secret memory", "memfd_secret: in no dump, swap or map of the kernel")
    return warn(
        "secret memory",
        f"{kind}: root and the kernel can read it",
        "a kernel of 6.5 or later; on an older one the boot option secretmem.enable=1",
    )


def _swap(subject: Subject, *, safe: bool) -> Finding:
    areas = (subject.machine.text("proc/swaps") or "").splitlines()[1:]
    if not areas:
        return ok("swap", "none")
    if safe:
        return ok("swap", f"{len(areas)} in use, which secret memory never reaches")
    return warn(
        "swap",
        f"{len(areas)} in use; key memory is locked, but a hibernation would write it there",
        "encrypt the swap, and mask hibernate.target; or have memfd_secret",
    )


def _kept(answers: Answers) -> Iterator[Finding]:
    """Whether the service manager holds the memory over a restart of the daemon."""
    memory = optional(answers.status, "memory", dict)
    if memory is None or answers.state != "unlocked":
        return
    if memory.get("kept") is True:
        yield ok(
            "restart", "the service manager keeps the secret memory: a restart of the daemon stays unlocked"
        )
    else:
        yield warn(
            "restart",
            f"a restart of the daemon locks the host: {memory.get('why')}",
            "FileDescriptorStoreMax= in unsealerd.service; `unsealctl seal` before a restart helps once",
        )


def _core(subject: Subject, pid: int) -> Finding:
    found = _CORE_LIMIT.search(subject.machine.text(f"proc/{pid}/limits") or "")
    pattern = (subject.machine.text("proc/sys/kernel/core_pattern") or "").strip()
    if found is None:
        return warn(
            "core dumps", f"the limits of process {pid} cannot be read", "run it as root, on the host itself"
        )
    if found[1] != "0":
        return fail(
            "core dumps",
            f"the daemon may dump {found[1]} bytes, to {pattern[:80]}",
            "restart unsealerd; LimitCORE=0 in its unit",
        )
    return ok("core dumps", "none from the daemon")
