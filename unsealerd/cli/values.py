"""Facts of the daemon as rows of a table, whatever fields it has."""

import time
from collections.abc import Mapping

from unsealerd.cli.times import since

_TIMES = frozenset({"since", "created", "deadline", "written", "opened"})


def rows(facts: Mapping[str, object]) -> list[tuple[str, str]]:
    """Name and value of each field that says something."""
    return [
        (name.replace("_", " "), worded(name, value))
        for name, value in facts.items()
        if value is not None and value not in ("", [], {})
    ]


def worded(name: str, value: object) -> str:
    """A value in words."""
    match value:
        case bool():
            return "yes" if value else "no"
        case int() if name in _TIMES:
            return "none" if value == 0 else since(value, time.time())
        case None:
            return "none"
        case list():
            return ", ".join(worded("", item) for item in value) or "none"
        case dict():
            return ", ".join(f"{label} {text}" for label, text in rows(value)) or "none"
    return str(value)
