"""What a check says: one line, and what to do about it."""

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from unsealerd.errors import UnsealerdError


class Verdict(enum.Enum):
    OK = "ok"
    WARN = "warn"
    """It works, and something is weaker than it could be, or was not checked."""
    FAIL = "fail"
    """Do not rely on this server until it is put right."""


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    verdict: Verdict
    text: str
    hint: str = ""


def ok(check: str, text: str) -> Finding:
    return Finding(check, Verdict.OK, text)


def warn(check: str, text: str, hint: str) -> Finding:
    return Finding(check, Verdict.WARN, text, hint)


def fail(check: str, text: str, hint: str) -> Finding:
    return Finding(check, Verdict.FAIL, text, hint)


def refused(check: str, error: UnsealerdError) -> Finding:
    """An error of the vocabulary, with the hint that it has everywhere."""
    from unsealerd.cli.edge import ANSWERS

    text = f"{error.name}: {error.detail}" if error.detail else error.name
    return fail(check, text, ANSWERS[error.name].hint)


def problems_or(problems: Iterable[Finding], fine: Finding) -> list[Finding]:
    """What is wrong, or else one line that says that nothing is."""
    return list(problems) or [fine]
