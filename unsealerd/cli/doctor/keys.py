"""What the server is for: the host unlocked, its keys in order, its operators able to come back."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from unsealerd.cli.doctor.finding import Finding, fail, ok, problems_or, refused, warn
from unsealerd.cli.doctor.subject import Answers, Subject
from unsealerd.cli.fields import objects, optional, required
from unsealerd.cli.times import span
from unsealerd.core.metrics import PROVEN_SECONDS
from unsealerd.errors import Locked, NotInitialised, UnsealerdError

if TYPE_CHECKING:
    from unsealerd.config import Config

_LATE_SECONDS = 3600
_SHOWN = 5  # names in one line


def check(subject: Subject) -> Iterator[Finding]:
    answers = subject.answers
    if isinstance(answers, UnsealerdError):
        yield refused("daemon", answers)
    else:
        yield _state(answers)
        yield from _operators(answers, subject.config, int(subject.machine.now()))
        yield _backup(answers)
        yield from _keys(answers, int(subject.machine.now()))


def _state(answers: Answers) -> Finding:
    match answers.state:
        case "unlocked":
            return ok("host", "unlocked")
        case "uninitialised":
            return fail(
                "host", "there is no keyring yet", "declare an operator and a key, then: sudo unsealctl init"
            )
        case _:
            reason = answers.status.get("lock_reason")
            return fail(
                "host", f"locked: {reason}", "`unsealctl status` says what to do; an operator unlocks"
            )


def _operators(answers: Answers, config: "Config", now: int) -> Iterator[Finding]:
    """One more than are needed, so that one lost card is no lost server."""
    operators = objects(answers.status, "operators")
    threshold = config.unlock.threshold
    drill = "each operator: unsealctl drill HOST -i IDENTITY"
    if len(operators) < threshold or not operators:
        yield fail(
            "operators", f"{len(operators)} named, {threshold} needed", "[[operator]] in the configuration"
        )
        return
    proven = {
        required(operator, "name", str)
        for operator in operators
        if now - (optional(operator, "proven", int) or 0) <= PROVEN_SECONDS
    }
    count = (
        f"{len(proven)} of {len(operators)} proved in the last 90 days that their identity opens the backup"
    )
    if len(proven) < threshold:
        yield fail("operators", f"{count}; {threshold} needed", drill)
    elif len(operators) == threshold:
        yield warn("operators", f"{count}; when one identity is lost, the keys are", "name one operator more")
    elif len(proven) == threshold:
        yield warn("operators", f"{count}: just enough, with none to spare", drill)
    else:
        yield ok("operators", count)
    for name in config.unlock.require:
        members = {
            operator.name for operator in config.operators if name in (operator.name, *operator.groups)
        }
        if not members & proven:
            yield fail(
                "operators", f"{name} must be among those who answer, and none of them is proven", drill
            )


def _backup(answers: Answers) -> Finding:
    match answers.backup:
        case Locked():
            return warn("backup", "not checked: that needs the keys in memory", "unlock, then run this again")
        case NotInitialised():
            return warn("backup", "none yet", "sudo unsealctl init")
        case UnsealerdError() as err:
            return refused("backup", err)
        case facts:
            return ok(
                "backup", f"generation {facts.get('generation')} is readable, and every operator is in it"
            )


def _keys(answers: Answers, now: int) -> Iterator[Finding]:
    if isinstance(answers.keys, UnsealerdError):
        return  # locked: said above
    keys = answers.keys
    found = [finding for key in keys for finding in _key(key, now)]
    if len(found) > _SHOWN:
        rest = len(found) - _SHOWN
        found = [*found[:_SHOWN], warn("keys", f"and {rest} more of this kind", "unsealctl key list")]
    yield from problems_or(found, ok("keys", f"{len(keys)}, each declared, granted and in time"))


def _key(key: Mapping[str, object], now: int) -> Iterator[Finding]:
    name = required(key, "name", str)
    if key.get("declared") is not True:
        yield warn(
            "keys",
            f"{name} is not declared, so nobody may use it",
            f"unsealctl key revoke {name}, or declare it",
        )
        return
    states = [version.get("state") for version in objects(key, "versions")]
    if "primary" not in states:
        yield fail("keys", f"{name} has no version that signs", f"unsealctl key rotate {name}")
    if not required(key, "allow", list):
        yield warn("keys", f"{name} is granted to nobody", f"[[key.{name}.allow]]")
    if key.get("rotate_every") is None:
        return
    if not key.get("overlap"):
        yield warn(
            "keys",
            f"{name} rotates without overlap: earlier MACs are invalid at once",
            f"[key.{name}] overlap",
        )
    due = optional(key, "next_rotation", int)
    if due is not None and now - due > _LATE_SECONDS:
        yield fail("keys", f"{name} should have rotated {span(now - due)} ago", "journalctl -u unsealerd")
