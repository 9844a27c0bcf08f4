"""The status of a host as Prometheus metrics, in the text format.

https://prometheus.io/docs/instrumenting/exposition_formats/ (version 0.0.4), names after
https://prometheus.io/docs/practices/naming/: base units, ``_total`` for what only grows, ``_timestamp_seconds`` for points in
time, ``_info`` with the value 1 for what is a text. Nothing here is secret; docs/monitoring.md lists every name.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from unsealerd.model import State

PROVEN_SECONDS = 90 * 86400
"""How long ago an operator may have shown that their identity opens the backup, to count as proven."""

Value = int | float
_PREFIX = "unsealerd_"

_COUNTERS = {
    "seals": "Sealed copies made for the next boot.",
    "seal_failures": "Sealed copies that could not be made.",
    "unseals": "Times the TPM opened the backup.",
    "unlocks": "Times operators opened the backup.",
    "unlock_failures": "Answers of operators that did not open the backup.",
    "drill_failures": "Answers to drills that did not open the backup.",
    "locks": "Times the host became locked, or stayed it for another reason.",
    "denials": "Uses of a key that the policy refused.",
    "rotations": "New versions of keys.",
    "revocations": "Versions of keys whose bytes were destroyed.",
}


@dataclass(frozen=True, slots=True)
class Sample:
    value: Value
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Metric:
    """One family. ``kind``: gauge or counter."""

    name: str
    kind: str
    help: str
    samples: tuple[Sample, ...]


def metrics(status: Mapping[str, object] | None, version: str, now: float) -> tuple[Metric, ...]:
    """What a status (``io.unsealerd.Admin.Status``) says at `now`, Unix seconds; None: the daemon does not answer.

    A fact that is missing gives no sample, never one that is made up.
    """
    found = [
        _gauge("up", "Whether the daemon answers.", int(status is not None)),
        _info("build_info", "The version of the program.", version=version),
    ]
    if status is not None:
        found += _host(status)
        found += _operators(status, now)
        found += _seal(_table(status, "seal"))
        found += _tpm(_table(status, "tpm"))
        found += _counters(_table(status, "counters"))
    return tuple(metric for metric in found if metric.samples)


def exposition(families: Iterable[Metric]) -> str:
    """The text. Ends with a newline, as the format asks."""
    lines: list[str] = []
    for family in families:
        lines.append(f"# HELP {family.name} {_escape(family.help)}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        for sample in family.samples:
            labels = ",".join(f'{name}="{_escape(text, quote=True)}"' for name, text in sample.labels)
            lines.append(
                f"{family.name}{{{labels}}} {sample.value}" if labels else f"{family.name} {sample.value}"
            )
    return "\n".join(lines) + "\n"


def _escape(text: str, *, quote: bool = False) -> str:
    escaped = text.replace("\\", r"\\").replace("\n", r"\n")
    return escaped.replace('"', r"\"") if quote else escaped


def _host(status: Mapping[str, object]) -> Iterator[Metric]:
    state = status.get("state")
    shares = _table(status, "shares")
    backup = _table(status, "backup")
    reason = status.get("lock_reason") if state == State.LOCKED.value else None
    yield _gauge(
        "locked",
        "Whether the keys are not in memory, and an operator is needed.",
        int(state == State.LOCKED.value),
    )
    yield _gauge("initialised", "Whether there is a keyring.", int(state != State.UNINITIALISED.value))
    yield _info("lock_info", "Why the host is locked.", reason=reason)
    yield _gauge("state_timestamp_seconds", "Since when the host is in its state.", status.get("since"))
    yield _gauge("generation", "The generation of the keyring.", status.get("generation"))
    yield _gauge("keys", "Keys of the host.", _count(status, "keys"))
    yield _gauge("unlock_sessions", "Conversations with operators that are open.", _count(status, "sessions"))
    yield _gauge("shares_present", "Operators who have answered in this unlock.", shares.get("present"))
    yield _gauge("shares_needed", "Operators who must answer.", shares.get("needed"))
    yield _gauge("backup_timestamp_seconds", "When the backup was written.", backup.get("written"))
    yield _info("secret_memory_info", "The memory that the keys are in.", kind=status.get("secret_memory"))
    yield _gauge(
        "warnings", "What the host cannot promise: see unsealctl status.", _count(status, "warnings")
    )


def _operators(status: Mapping[str, object], now: float) -> Iterator[Metric]:
    operators = [operator for operator in _list(status, "operators") if isinstance(operator, Mapping)]
    proven = {
        str(operator.get("name")): when
        for operator in operators
        if isinstance(when := operator.get("proven"), int) and when > 0
    }
    recent = sum(now - when <= PROVEN_SECONDS for when in proven.values())
    yield _gauge("operators", "People who may unlock.", _count(status, "operators"))
    yield _gauge("operators_proven", "Those whose identity opened the backup in the last 90 days.", recent)
    yield Metric(
        f"{_PREFIX}operator_proven_timestamp_seconds",
        "gauge",
        "When an operator's identity last opened the backup.",
        tuple(Sample(when, (("operator", name),)) for name, when in proven.items()),
    )


def _seal(seal: Mapping[str, object]) -> Iterator[Metric]:
    yield _gauge("sealed", "Whether there is a sealed copy for the next boot.", seal.get("sealed"))
    yield _gauge(
        "seal_deadline_timestamp_seconds", "When the sealed copy is destroyed.", seal.get("deadline")
    )


def _tpm(tpm: Mapping[str, object]) -> Iterator[Metric]:
    yield _gauge("tpm_present", "Whether a TPM answers.", tpm.get("present"))
    yield _info("tpm_error_info", "What the TPM answers instead of facts.", error=tpm.get("error"))
    yield _gauge("tpm_in_lockout", "Whether the TPM is in dictionary-attack lockout.", tpm.get("in_lockout"))
    yield _gauge(
        "tpm_lockout_failures", "Failed authorisations that the TPM remembers.", tpm.get("lockout_counter")
    )
    yield _counter("tpm_resets_total", "Resets of the TPM: one for each boot.", tpm.get("reset_count"))
    yield _counter(
        "tpm_changes_total", "The TPM's counter: one for each write of the backup.", tpm.get("counter")
    )
    yield _gauge(
        "tpm_backup_ahead", "Whether the TPM's counter waits to be moved.", tpm.get("counter_behind")
    )


def _counters(counts: Mapping[str, object]) -> Iterator[Metric]:
    for name, text in _COUNTERS.items():
        yield _counter(f"{name}_total", text, counts.get(name))


def _gauge(name: str, text: str, value: object) -> Metric:
    return Metric(_PREFIX + name, "gauge", text, _samples(value))


def _counter(name: str, text: str, value: object) -> Metric:
    return Metric(_PREFIX + name, "counter", text, _samples(value))


def _info(name: str, text: str, **labels: object) -> Metric:
    """Always 1; the label is what it says. No sample without it."""
    known = tuple((label, value) for label, value in labels.items() if isinstance(value, str))
    return Metric(_PREFIX + name, "gauge", text, (Sample(1, known),) if known else ())


def _samples(value: object) -> tuple[Sample, ...]:
    return (
        (Sample(int(value) if isinstance(value, bool) else value),) if isinstance(value, int | float) else ()
    )


def _table(facts: Mapping[str, object], name: str) -> Mapping[str, object]:
    value = facts.get(name)
    return value if isinstance(value, Mapping) else {}


def _list(facts: Mapping[str, object], name: str) -> list[object]:
    value = facts.get(name)
    return value if isinstance(value, list) else []


def _count(facts: Mapping[str, object], name: str) -> int | None:
    value = facts.get(name)
    return len(value) if isinstance(value, list) else None
