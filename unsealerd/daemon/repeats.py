"""Audit records that somebody can cause as often as they like: the first few of a kind one by one, then one with a count.

Else whoever asks again and again would fill the log, and push out of it what it is kept for.
"""

from collections import Counter
from collections.abc import Callable, Iterator

import msgspec

from unsealerd.core.auditchain import Facts
from unsealerd.daemon.counters import Counters
from unsealerd.errors import AuditUnwritable

ONE_BY_ONE = 3  # records of a kind between two writings of the counts, before it is counted
KINDS_OF_EACH = 8  # of one source, before what else comes from it is counted together
KINDS = 32  # of all sources of one room, before what comes from others is counted together
AGAIN = "_again"  # the end of the event's name in the record with a count

_Key = tuple[str, str, bytes, bytes]  # room, event, source, what it is about
_ANY = b""


class _Kind(msgspec.Struct):
    facts: Facts
    alone: int = 0
    count: int = 0


class Repeats:
    """Counts what comes too often. What it holds is bounded, whoever comes."""

    def __init__(self, append: Callable[..., None], counters: Counters) -> None:
        """``append``: `AuditLog.append`."""
        self._append = append
        self._counters = counters
        self._kinds: dict[_Key, _Kind] = {}
        self._of_each: Counter[tuple[str, bytes]] = Counter()
        self._of_room: Counter[str] = Counter()
        self._due: list[tuple[_Key, _Kind]] = []

    def record(self, event: str, *, room: str, source: Facts, about: Facts, facts: Facts) -> None:
        """Write one of a kind, with its ``facts``; or count it. Raises `AuditUnwritable`.

        ``source`` (who) and ``about`` (what) make the kind: that is all that the record with the count says. ``room``: those
        of one take no place from those of another.
        """
        who = msgspec.json.encode(source)
        key = room, event, who, msgspec.json.encode(about)
        kind = self._kinds.get(key)
        if kind is None and self._has_place(room, who):
            kind = self._put(key, {**source, **about})
        if kind is not None and kind.alone < ONE_BY_ONE:
            self._append(event, **facts)
            kind.alone += 1
            return
        if kind is None and (room, who) in self._of_each:
            kind = self._together((room, event, who, _ANY), source)
        elif kind is None:
            kind = self._together((room, event, _ANY, _ANY), {})
        kind.count += 1
        self._counters.count(event)

    def write(self) -> Iterator[None]:
        """Write what was counted, a record for each step; and begin anew. What cannot be written is counted on.

        What is left when somebody stops in between comes first the next time.
        """
        self._due += ((key, kind) for key, kind in self._kinds.items() if kind.count)
        self._kinds.clear()
        self._of_each.clear()
        self._of_room.clear()
        due, self._due = self._due, []
        try:
            while due:
                key, kind = due.pop(0)
                try:
                    self._append(f"{key[1]}{AGAIN}", count=kind.count, **kind.facts)
                except AuditUnwritable:
                    self._keep(key, kind)
                yield
        finally:
            self._due += due

    def _has_place(self, room: str, who: bytes) -> bool:
        return self._of_room[room] < KINDS and self._of_each[room, who] < KINDS_OF_EACH

    def _put(self, key: _Key, facts: Facts) -> _Kind:
        room, _, who, _ = key
        self._of_room[room] += 1
        self._of_each[room, who] += 1
        kind = self._kinds[key] = _Kind(facts)
        return kind

    def _together(self, key: _Key, source: Facts) -> _Kind:
        return self._kinds.setdefault(key, _Kind({**source, "others": True}))

    def _keep(self, key: _Key, kind: _Kind) -> None:
        """Its count goes on, and takes a place again."""
        there = self._kinds.get(key)
        if there is None:
            there = self._put(key, kind.facts)
            there.alone = ONE_BY_ONE
        there.count += kind.count
