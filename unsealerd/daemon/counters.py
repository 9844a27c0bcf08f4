"""How often what has happened since the daemon started: counted where the audit log records it."""

COUNTED = {
    "sealed": "seals",
    "seal_failed": "seal_failures",
    "unsealed": "unseals",
    "unlocked": "unlocks",
    "unlock_failed": "unlock_failures",
    "unlock_refused": "unlock_failures",
    "drill_refused": "drill_failures",
    "locked": "locks",
    "denied": "denials",
    "key_rotated": "rotations",
    "key_revoked": "revocations",
}
"""The event of an audit record, and what it is one more of."""


class Counters:
    """Begin at 0 with the process, and only grow."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(COUNTED.values(), 0)

    def count(self, event: str) -> None:
        """One more record of this event. What nobody counts is let pass."""
        name = COUNTED.get(event)
        if name is not None:
            self._counts[name] += 1

    def values(self) -> dict[str, int]:
        return dict(self._counts)
