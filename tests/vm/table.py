"""The scenarios that were played: what was done, what was expected, what was seen, and how long it took."""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vm.server import Server

_HEADING = "## Debian "
_HEAD = ("| what was done | expected | seen | s | |", "| --- | --- | --- | ---: | --- |")


class Outcome(enum.Enum):
    """As it stands in the table."""

    HELD = "held"
    BROKEN = "**broken**"
    NOT_REACHED = "not run"
    NOT_HERE = "not tested"
    """The release does not have it. That is no failure, and proves nothing."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """`play` does it, and says what it saw. It raises Broken if that is not what is expected, and NotHere."""

    done: str
    expected: str
    play: Callable[[Server], str]


@dataclass(frozen=True, slots=True)
class Row:
    """One scenario, as it went."""

    scenario: Scenario
    seen: str
    seconds: float
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one release."""

    release: str
    systems: str
    """Kernel, service manager and emulator."""
    rows: list[Row] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return bool(self.rows) and all(row.outcome in (Outcome.HELD, Outcome.NOT_HERE) for row in self.rows)

    def markdown(self) -> str:
        lines = [f"{_HEADING}{self.release}", "", self.systems]
        if self.rows:
            lines += ["", *_HEAD]
        for row in self.rows:
            cells = (
                row.scenario.done,
                row.scenario.expected,
                row.seen,
                f"{row.seconds:.0f}",
                row.outcome.value,
            )
            lines.append(
                "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
            )
        return "\n".join(lines) + "\n"


def document(preface: str, before: str, tables: Sequence[Table]) -> str:
    """The document with these tables; of the one ``before``, those of other releases stay as they are."""
    parts = {
        part.split("\n", 1)[0]: f"{_HEADING}{part.rstrip()}\n" for part in before.split(f"\n{_HEADING}")[1:]
    }
    parts |= {table.release: table.markdown() for table in tables}
    return "\n".join([preface, *(parts[release] for release in sorted(parts))])
