"""Tests that have to be quicker than a limit of what they test."""

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from unsealerd.errors import UnsealerdError

T = TypeVar("T")


def in_time(attempt: Callable[[float], T], limits: Sequence[float] = (0.5, 5.0, 40.0)) -> T:
    """What the attempt gives with the first of these limits, in seconds, within which it does what it has to.

    Where this process stands still for longer than a short limit, a longer one decides; the last must be enough.
    """
    *short, last = limits
    for limit in short:
        with contextlib.suppress(AssertionError, OSError, UnsealerdError):
            return attempt(limit)
    return attempt(last)
