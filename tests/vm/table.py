"""The scenarios that were played: what was done, what was expected, what was seen, and how long it took."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vm.server import Server

_HEAD = ("| what was done | expected | seen | s | |", "| --- | --- | --- | ---: | --- |")


@dataclass(frozen=True, slots=True)
class Scenario:
    """`play` does it, and says what it saw. It raises Broken if that is not what is expected."""

    done: str
    expected: str
    play: Callable[[Server], str]


@dataclass(frozen=True, slots=True)
class Row:
    """`held` is None for what was not played."""

    scenario: Scenario
    seen: str
    seconds: float
    held: bool | None


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one release."""

    release: str
    systems: str
    """Kernel, service manager and emulator."""
    rows: list[Row] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [f"## Debian {self.release}", "", self.systems]
        if self.rows:
            lines += ["", *_HEAD]
        for row in self.rows:
            mark = {True: "held", False: "**broken**", None: "not run"}[row.held]
            cells = (row.scenario.done, row.scenario.expected, row.seen, f"{row.seconds:.0f}", mark)
            lines.append(
                "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
            )
        return "\n".join(lines) + "\n"


def progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
