"""Records that anybody can cause: on record, and no way to have the log forget."""

import asyncio
from pathlib import Path

import pytest

from unsealerd.core.auditchain import AUDIT_LOG, GENESIS, Facts, Record, verify_line
from unsealerd.daemon.audit import AuditLog
from unsealerd.daemon.caller import Caller
from unsealerd.daemon.host import Host
from unsealerd.daemon.repeats import KINDS, KINDS_OF_EACH, ONE_BY_ONE
from unsealerd.daemon.unlocking import Conversations
from unsealerd.errors import AccessDenied
from unsealerd.model import Operation


class Log(AuditLog):
    """Without the sync, which is another test's."""

    def __init__(self, place: Path) -> None:
        super().__init__(place, lambda: 1_800_000_000.0)
        self._file = place / AUDIT_LOG
        self.open()

    def flood(
        self, event: str, times: int = 1, *, room: str = "r", who: object = 1, what: object = 1
    ) -> None:
        source: Facts = {"caller": {"uid": who}}
        for _ in range(times):
            self.repeats.record(
                event, room=room, source=source, about={"key": what}, facts={"key": what, **source}
            )

    def write(self) -> None:
        for _ in self.repeats.write():
            pass

    def records(self) -> list[Record]:
        prev, records = GENESIS, []
        for number, line in enumerate(self._file.read_bytes().splitlines(), 1):
            records.append(verify_line(line, prev, number))
            prev = str(records[-1]["hash"])
        return records

    def told(self) -> list[tuple[object, object]]:
        return [(record["event"], record.get("count")) for record in self.records()]


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


@pytest.mark.promise(7)
def test_the_first_are_written_and_the_others_counted(log: Log) -> None:
    log.flood("denied", 1000)
    assert log.told() == [("denied", None)] * ONE_BY_ONE
    log.write()
    again = log.records()[-1]
    assert (again["event"], again["count"]) == ("denied_again", 1000 - ONE_BY_ONE)
    assert (again["caller"], again["key"]) == ({"uid": 1}, 1)
    assert log.counters.values()["denials"] == 1000
    log.write()
    assert len(log.told()) == ONE_BY_ONE + 1  # nothing came since
    log.flood("denied")
    assert log.told()[-1] == ("denied", None)  # counting has begun anew


def test_the_end_of_the_daemon_writes_what_was_counted(log: Log) -> None:
    log.flood("denied", 5)
    log.close()
    assert log.told()[-1] == ("denied_again", 5 - ONE_BY_ONE)


@pytest.mark.promise(7)
def test_however_many_callers_there_are_what_is_written_is_bounded(log: Log) -> None:
    for who in range(2000):
        log.flood("denied", 2, who=who)
    log.write()
    told = log.told()
    assert len(told) == 2 * KINDS + 1
    assert told[-1] == ("denied_again", 2 * (2000 - KINDS))
    assert log.records()[-1]["others"] is True
    assert log.counters.values()["denials"] == 4000


def test_one_caller_with_many_things_to_ask_for_leaves_room_for_others(log: Log) -> None:
    for what in range(100):
        log.flood("denied", what=what)
    log.flood("denied", who=2)
    assert log.records()[-1]["caller"] == {"uid": 2}
    log.write()
    again = log.records()[-1]
    assert (again["count"], again["caller"], "key" in again) == (100 - KINDS_OF_EACH, {"uid": 1}, False)


def test_rooms_take_no_place_from_each_other(log: Log) -> None:
    for who in range(100):
        log.flood("denied", who=who)
    log.flood("denied", room="other", who=7, what=7)
    assert log.records()[-1]["key"] == 7


@pytest.mark.promise(6)
def test_what_cannot_be_written_is_counted_on(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    log.flood("denied", 10)
    monkeypatch.setattr(log, "_broken", "no room")
    log.write()
    log.flood("denied", 10)
    log.write()
    monkeypatch.setattr(log, "_broken", "")
    log.write()
    assert log.told()[ONE_BY_ONE:] == [("denied_again", 20 - ONE_BY_ONE)]


def test_who_stops_writing_half_way_loses_nothing(log: Log) -> None:
    log.flood("denied", 10, who=1)
    log.flood("denied", 10, who=2)
    steps = log.repeats.write()
    next(steps)
    del steps
    log.write()
    assert [count for _, count in log.told() if count] == [10 - ONE_BY_ONE] * 2


# --- where it is used


def _deny(access: object, caller: Caller, key: str) -> None:
    with pytest.raises(AccessDenied):
        asyncio.run(access.authorise(caller, key, Operation.SIGN))  # type: ignore[attr-defined]


@pytest.mark.promise(7)
def test_names_that_a_caller_invents_are_one_kind(log: Log, tmp_path: Path) -> None:
    from unsealerd.config import Config, Daemon, TpmTable
    from unsealerd.daemon.access import Access

    config = Config(daemon=Daemon(tmp_path, tmp_path), tpm=TpmTable(tcti=None))
    times = iter(range(0, 10_000, 10))
    access = Access(Host(config, tmp_path / "keyring.id", lambda: 0, log), lambda: next(times))
    stranger = Caller(5, 5, frozenset({5}), 77, "x.service")
    for number in range(20):
        _deny(access, stranger, f"no-{number}")
    log.write()
    events = [record["event"] for record in log.records()]
    assert events == ["denied"] * ONE_BY_ONE + ["denied_again"]
    again = log.records()[-1]
    assert (again["count"], again["operation"]) == (20 - ONE_BY_ONE, "sign")
    assert again["caller"] == {"uid": 5, "unit": "x.service"}


@pytest.mark.promise(7)
def test_wrong_answers_over_the_network_are_counted_too(log: Log, tmp_path: Path) -> None:
    """And each place that they come from is told."""
    from unsealerd.config import Config, Daemon, TpmTable

    config = Config(daemon=Daemon(tmp_path, tmp_path), tpm=TpmTable(tcti=None))
    conversations = Conversations(Host(config, tmp_path / "keyring.id", lambda: 0, log), lambda: 0)
    for number in range(50):
        who: Facts = {"peer": f"2001:db8::{number:x}", "operators": ["alice"], "reason": f"{number}"}
        for drill in (False, True):
            conversations._refused(drill, "BadAnswer", who)
    log.write()
    assert len(log.told()) == 2 * (ONE_BY_ONE + 1)
    assert log.records()[-1]["peer"] == "2001:db8::/64"
    assert log.counters.values()["unlock_failures"] == log.counters.values()["drill_failures"] == 50
