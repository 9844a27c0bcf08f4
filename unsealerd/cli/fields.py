"""Reading the daemon's answers: a field that is missing or of another type is `BadMessage`, not a
traceback.
"""

from collections.abc import Mapping
from typing import TypeVar

from unsealerd.errors import BadMessage

T = TypeVar("T")


def required(answer: Mapping[str, object], name: str, kind: type[T]) -> T:
    value = optional(answer, name, kind)
    if value is None:
        raise BadMessage(f"the daemon's answer lacks {name!r}")
    return value


def optional(answer: Mapping[str, object], name: str, kind: type[T]) -> T | None:
    value = answer.get(name)
    # True and False are ints in Python, and are not in JSON.
    if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise BadMessage(f"the daemon's answer has an odd {name!r}")
    return value


def objects(answer: Mapping[str, object], name: str) -> list[dict[str, object]]:
    """A list of objects."""
    found = []
    for item in required(answer, name, list):
        if not isinstance(item, dict):
            raise BadMessage(f"the daemon's answer has an odd {name!r}")
        found.append(item)
    return found


def texts(answer: Mapping[str, object], name: str) -> list[str]:
    """A list of strings."""
    found = []
    for item in required(answer, name, list):
        if not isinstance(item, str):
            raise BadMessage(f"the daemon's answer has an odd {name!r}")
        found.append(item)
    return found
