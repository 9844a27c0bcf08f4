"""Which keyring is this host's, and whether that is written where the daemon cannot change it."""

from collections.abc import Iterator

from unsealerd.cli.doctor.finding import Finding, fail, ok, warn
from unsealerd.cli.doctor.subject import Answers, Subject
from unsealerd.cli.fields import optional, required

_CHECK = "keyring"


def check(subject: Subject) -> Iterator[Finding]:
    if isinstance(subject.answers, Answers) and subject.answers.state != "uninitialised":
        yield _pin(subject.answers)


def _pin(answers: Answers) -> Finding:
    facts = required(answers.status, "keyring", dict)
    file, error = required(facts, "file", str), optional(facts, "error", str)
    opened, pinned = optional(facts, "id", str), optional(facts, "pinned", str)
    if error is not None:
        return fail(
            _CHECK, f"{error}: no backup will be opened", "if nobody meddled: unsealctl backup pin --replace"
        )
    if pinned is None:
        return warn(
            _CHECK,
            f"{file} is missing: a backup that somebody else makes for these operators would be opened",
            "unsealctl backup pin" if opened is not None else "unlock, then: unsealctl backup pin",
        )
    if opened not in (None, pinned):
        return fail(
            _CHECK,
            f"{file} names another one than is open, and which will not be opened again",
            "find out who changed it; if the open one is right: unsealctl backup pin --replace",
        )
    return ok(_CHECK, f"{pinned[:16]}… is this host's, says {file}")
