"""Who may do what with which key. Nothing is granted by default.

Rules name units, users and groups; users and groups arrive here as numbers, looked up by the daemon, so that
deciding needs no I/O.
"""

from collections.abc import Mapping

import msgspec

from unsealerd.model import Operation

NOTHING: frozenset[Operation] = frozenset()


class Grant(msgspec.Struct, frozen=True):
    """One rule. Exactly one of ``unit``, ``uid`` and ``gid`` is set."""

    operations: frozenset[Operation]
    unit: str | None = None
    uid: int | None = None
    gid: int | None = None


class Subject(msgspec.Struct, frozen=True):
    """A caller as the kernel reports it. For a credential that systemd fetches, only ``unit`` is known."""

    uid: int | None
    gids: frozenset[int]
    unit: str | None


class Policy:
    def __init__(self, grants: Mapping[str, tuple[Grant, ...]]) -> None:
        self._grants = dict(grants)
        # By whom, so that a caller costs as much as what it is granted, and not as much as there are keys.
        self._keys: dict[tuple[str, str | int], set[str]] = {}
        for name, rules in self._grants.items():
            for grant in rules:
                for who in (("unit", grant.unit), ("uid", grant.uid), ("gid", grant.gid)):
                    if who[1] is not None:
                        self._keys.setdefault((who[0], who[1]), set()).add(name)

    def operations(self, subject: Subject, key: str) -> frozenset[Operation]:
        """What the subject may do with the key."""
        allowed = NOTHING
        for grant in self._grants.get(key, ()):
            if (
                (grant.unit is not None and grant.unit == subject.unit)
                or (grant.uid is not None and grant.uid == subject.uid)
                or (grant.gid is not None and grant.gid in subject.gids)
            ):
                allowed |= grant.operations
        return allowed

    def granted(self, subject: Subject) -> frozenset[str]:
        """The keys with which the subject may do anything at all."""
        who: list[tuple[str, str | int | None]] = [("unit", subject.unit), ("uid", subject.uid)]
        who += [("gid", gid) for gid in subject.gids]
        return frozenset(
            name for kind, value in who if value is not None for name in self._keys.get((kind, value), ())
        )

    def keys(self) -> tuple[str, ...]:
        return tuple(self._grants)
