"""Points in time and lengths of time as people read them."""

import time

_UNITS = ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


def span(seconds: int) -> str:
    """``3 days``, ``1 hour``: the largest unit, rounded down."""
    for size, unit in _UNITS:
        if seconds >= size:
            count = seconds // size
            return f"{count} {unit}{'s' if count != 1 else ''}"
    return "0 seconds"


def moment(unix: int) -> str:
    """``2026-01-31 12:00:00 UTC``; a number that is no time stays a number."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix))
    except (OverflowError, ValueError, OSError):
        return str(unix)


def since(unix: int, now: float) -> str:
    """``2026-01-31 12:00:00 UTC, 3 days ago``."""
    distance = int(now) - unix
    relation = f"{span(distance)} ago" if distance >= 0 else f"in {span(-distance)}"
    return f"{moment(unix)}, {relation}"
