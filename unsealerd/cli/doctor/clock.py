"""The clock: rotations and leases go by it."""

import calendar
from collections.abc import Iterator

from unsealerd.cli.doctor.finding import Finding, fail, ok, warn
from unsealerd.cli.doctor.subject import Answers, Subject
from unsealerd.cli.fields import optional, required
from unsealerd.cli.times import moment, span

_EARLIEST = calendar.timegm((2025, 1, 1, 0, 0, 0))  # before this program was written
_TOLERANCE = 120  # seconds
_TIMESYNC = "run/systemd/timesync/synchronized"  # systemd-timesyncd.service(8)


def check(subject: Subject) -> Iterator[Finding]:
    now = int(subject.machine.now())
    written = None
    if isinstance(subject.answers, Answers):
        written = optional(required(subject.answers.status, "backup", dict), "written", int)
    hint = "set the clock, then restart unsealerd; rotations and leases go by it"
    if now < _EARLIEST:
        yield fail("clock", f"it says {moment(now)}", hint)
    elif written is not None and written > now + _TOLERANCE:
        yield fail(
            "clock", f"it is {span(written - now)} behind the time at which the backup was written", hint
        )
    else:
        yield ok("clock", moment(now))
    if subject.machine.exists(_TIMESYNC) or subject.machine.kernel_says_synchronised():
        yield ok("time source", "synchronised")
    else:
        yield warn("time source", "not synchronised", "systemctl enable --now systemd-timesyncd, or chrony")
