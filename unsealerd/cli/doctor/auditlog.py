"""The audit log: its chain is whole, it is kept within its bounds, and the disk has room for it."""

import os
from collections.abc import Iterator

from unsealerd.cli.doctor.finding import Finding, ok, problems_or, refused, warn
from unsealerd.cli.doctor.history import History
from unsealerd.cli.doctor.subject import Subject
from unsealerd.errors import UnsealerdError

_CHECK = "audit log"
_MIB = 1 << 20


def check(subject: Subject) -> Iterator[Finding]:
    history = subject.history
    if isinstance(history, UnsealerdError):
        yield refused(_CHECK, history)
        return
    text = f"the chain of {history.records} records verifies"
    if history.first > 1:
        text += f"; it is kept from record {history.first} on"
    yield from problems_or(_problems(subject, history), ok(_CHECK, text))


def _problems(subject: Subject, history: History) -> Iterator[Finding]:
    bounds = subject.config.audit
    if history.missing is not None:
        yield warn(
            _CHECK,
            f"the daemon found that something was missing: {history.missing}",
            "compare with the journal: journalctl -t unsealerd-audit",
        )
    if history.sizes[-1] > bounds.max_size:
        yield warn(
            _CHECK,
            f"audit.jsonl has {history.sizes[-1] // _MIB} MiB and is not closed at {bounds.max_size // _MIB}",
            "`journalctl -u unsealerd` says why",
        )
    found = os.statvfs(subject.config.daemon.state_dir)
    room = found.f_bavail * found.f_frsize
    more = bounds.max_size * (bounds.keep + 1) - sum(history.sizes)
    if more > room:
        yield warn(
            _CHECK,
            f"it may grow by {more // _MIB} MiB, and the disk has room for {room // _MIB}: then nothing takes effect",
            "room on the disk, or a smaller [audit] keep or max_size",
        )
