"""Will the next planned reboot come back unlocked, with nobody there?"""

import re
from collections.abc import Iterator

from unsealerd.cli.doctor.finding import Finding, fail, ok, warn
from unsealerd.cli.doctor.history import History
from unsealerd.cli.doctor.subject import Answers, Subject
from unsealerd.cli.doctor.units import is_loaded, seals_at_stop
from unsealerd.model import LockReason, SealKind

_CHECK = "planned reboot"
_KEXEC = "kexec-load.service"
_LOADS_KEXEC = re.compile(r"^\s*LOAD_KEXEC=[\"']?true", re.MULTILINE)
_HINTS = {
    LockReason.NOT_THE_NEXT_BOOT.value: "if the firmware always resets the TPM twice: [seal] extra_resets = 1",
    LockReason.PCR_MISMATCH.value: "what changed at that boot? [tpm] pcrs without what changes at each",
}


def check(subject: Subject) -> Iterator[Finding]:
    if not isinstance(subject.answers, Answers):
        return
    if subject.config.tpm.tcti is None:
        yield warn(
            _CHECK, "an operator will be needed: there is no TPM", "plan reboots for when one is there"
        )
        return
    if SealKind.REBOOT not in subject.config.seal.on:
        yield warn(
            _CHECK,
            "an operator will be needed: [seal] on does not name reboot",
            "[seal] on, or `unsealctl arm`",
        )
        return
    obstacles = list(_obstacles(subject, subject.answers))
    if obstacles:
        yield fail(
            _CHECK, f"an operator will be needed: {'; '.join(obstacles)}", "the lines above say what to do"
        )
        return
    history = subject.history
    last = history.last_planned if isinstance(history, History) else None
    if last is None:
        yield warn(
            _CHECK, "nothing stands against it, but it was never tried", "try one while an operator is there"
        )
    elif last.refused is not None:
        hint = _HINTS.get(
            last.refused, "docs/locked.md says what this reason means; try again while an operator is there"
        )
        yield warn(_CHECK, f"the last sealed copy was refused: {last.refused}, {last.time}", hint)
    else:
        yield ok(_CHECK, f"nothing stands against it; the last sealed copy opened at {last.time}")


def _obstacles(subject: Subject, answers: Answers) -> Iterator[str]:
    tpm = answers.tpm
    if answers.state != "unlocked":
        yield f"the host is {answers.state}"
    if tpm.get("error") is not None:
        yield f"the TPM answers {tpm['error']}"
        return
    if tpm.get("in_lockout") is True:
        yield "the TPM is in lockout"
    if tpm.get("counter_behind") is True:
        yield "the TPM's counter is behind"
    if tpm.get("pcr_values") == {}:
        yield "the TPM has no SHA-256 bank"
    if subject.machine.exists("run/systemd/system") and not seals_at_stop(subject):
        yield "unsealerd.service does not seal when it is stopped"
    if _LOADS_KEXEC.search(subject.machine.text("etc/default/kexec") or "") and is_loaded(subject, _KEXEC):
        # Its init script does so behind the service manager's back: the TPM is not reset, and refuses the sealed copy.
        yield "kexec-tools turns each reboot into a kexec (LOAD_KEXEC=true in /etc/default/kexec)"
