"""The choke point: allowed or denied, on record before it takes effect, and never faster than the log can bear."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from unsealerd.config import parse
from unsealerd.core.auditchain import AUDIT_LOG, GENESIS, MAX_LINE_BYTES, Record, verify_line
from unsealerd.daemon.access import Access, caller_facts
from unsealerd.daemon.address import site_of
from unsealerd.daemon.audit import AuditLog
from unsealerd.daemon.caller import Caller
from unsealerd.daemon.host import Host
from unsealerd.daemon.pace import Pace
from unsealerd.errors import AccessDenied, AuditUnwritable
from unsealerd.gateway.admission import _peer_key
from unsealerd.model import Operation

CONFIG = """
[daemon]
state_dir = "{place}"
runtime_dir = "{place}"
[tpm]
tcti = "none"
[key.web]
owner = "o"
purpose = "p"
[[key.web.allow]]
user = "1000"
operations = ["sign", "verify"]
[[key.web.allow]]
user = "0"
operations = ["verify"]
[[key.web.allow]]
unit = "web.service"
operations = ["read"]
"""
WEB = Caller(1000, 1000, frozenset({1000}), 77, None)
UNIT = Caller(0, 0, frozenset(), 1, "web.service", via_systemd=True)
STRANGER = Caller(1001, 1001, frozenset({1001}), 78, "other.service")


class Clock:
    """A monotonic clock that moves only when somebody sleeps, and a sleep that takes no time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.slept: list[float] = []
        monkeypatch.setattr(asyncio, "sleep", self._sleep)

    def __call__(self) -> float:
        return self.now

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 3))
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Rig:
    def __init__(self, place: Path, clock: Clock) -> None:
        self.path = place / AUDIT_LOG
        self.audit = AuditLog(place, lambda: 1_800_000_000.0)
        self.audit.open()
        config = parse(CONFIG.format(place=place).encode())
        self.host = Host(config, place / "keyring.id", lambda: 1_800_000_000.0, self.audit)
        self.access = Access(self.host, clock)

    def records(self) -> list[Record]:
        prev, records = GENESIS, []
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            records.append(verify_line(line, prev, number))
            prev = str(records[-1]["hash"])
        return records

    def events(self) -> list[tuple[object, object]]:
        return [(record["event"], record.get("key")) for record in self.records()]


@pytest.fixture
def rig(tmp_path: Path, clock: Clock) -> Rig:
    return Rig(tmp_path, clock)


def run(what: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(what)


@pytest.mark.promise(7)
def test_what_is_granted_is_on_record_with_who_used_it(rig: Rig) -> None:
    use = run(rig.access.authorise(WEB, "web", Operation.SIGN))
    assert (use.key, use.operation) == ("web", Operation.SIGN)
    assert rig.events() == [("key_sign", "web")]
    assert rig.records()[0]["caller"] == {"uid": 1000, "gid": 1000, "pid": 77}


@pytest.mark.promise(7)
@pytest.mark.parametrize(
    ("caller", "key", "operation"),
    [
        (WEB, "web", Operation.READ),
        (STRANGER, "web", Operation.SIGN),
        (WEB, "nothing", Operation.SIGN),
        (UNIT, "web", Operation.SIGN),
        (UNIT, "web", Operation.VERIFY),  # root's, and not that of a unit whose credential root fetches
        (Caller(0, 0, frozenset({0}), 1, None), "web", Operation.READ),
        (Caller(0, 0, frozenset(), 1, "other.service", via_systemd=True), "web", Operation.READ),
    ],
)
def test_what_is_not_granted_is_denied_and_that_is_on_record(
    rig: Rig, caller: Caller, key: str, operation: Operation
) -> None:
    with pytest.raises(AccessDenied):
        run(rig.access.authorise(caller, key, operation))
    assert rig.events() == [("denied", key)]
    assert rig.records()[0]["operation"] == operation.value


@pytest.mark.promise(7)
def test_a_credential_is_the_units_and_that_systemd_is_root_counts_for_nothing(rig: Rig) -> None:
    run(rig.access.authorise(UNIT, "web", Operation.READ))
    assert caller_facts(UNIT)["caller"] == {
        "uid": 0,
        "gid": 0,
        "pid": 1,
        "unit": "web.service",
        "credential": True,
    }


@pytest.mark.promise(7)
@pytest.mark.promise(10)
@pytest.mark.parametrize("name", ["x" * 100_000, "\x01" * 100_000, "é" * 60_000, "\U0001f511" * 40_000])
def test_a_caller_cannot_write_a_record_that_breaks_the_log(rig: Rig, name: str) -> None:
    """A record that is too long would keep the daemon from starting again."""
    with pytest.raises(AccessDenied) as caught:
        run(rig.access.authorise(STRANGER, name, Operation.SIGN))
    assert len(caught.value.detail) < 100
    assert rig.events() == [("denied", name[:64])]
    assert rig.path.stat().st_size < MAX_LINE_BYTES
    rig.audit.close()
    rig.audit.open()


@pytest.mark.promise(7)
def test_without_a_log_nothing_is_allowed_and_nothing_denied(rig: Rig) -> None:
    rig.audit.close()
    for caller in (WEB, STRANGER):
        with pytest.raises(AuditUnwritable):
            run(rig.access.authorise(caller, "web", Operation.SIGN))


def test_uses_are_counted_and_the_count_is_written_once(rig: Rig) -> None:
    use = run(rig.access.authorise(WEB, "web", Operation.SIGN))
    rig.access.flush(use)
    use.count = 5
    rig.access.flush(use)
    rig.access.flush(use)
    assert rig.events() == [("key_sign", "web"), ("key_used", "web")]
    assert rig.records()[1]["count"] == 5


def test_a_count_that_could_not_be_written_is_written_later(rig: Rig) -> None:
    use = run(rig.access.authorise(WEB, "web", Operation.SIGN))
    use.count = 5
    rig.audit.close()
    rig.access.flush(use)
    assert use.count == 5
    rig.audit.open()
    rig.access.flush(use)
    assert rig.records()[-1]["count"] == 5


@pytest.mark.promise(7)
def test_a_use_ends_with_the_policy_under_which_it_was_granted(rig: Rig) -> None:
    use = run(rig.access.authorise(WEB, "web", Operation.SIGN))
    assert rig.access.current(use)
    rig.host.configure(rig.host.config)
    assert not rig.access.current(use)


def test_denials_of_one_user_wait_their_turn_and_nobody_elses(rig: Rig, clock: Clock) -> None:
    async def story() -> None:
        for caller in (STRANGER, STRANGER, STRANGER, Caller(5, 5, frozenset({5}), 9, None)):
            with pytest.raises(AccessDenied):
                await rig.access.authorise(caller, "web", Operation.SIGN)
        await rig.access.authorise(WEB, "web", Operation.SIGN)

    run(story())
    assert clock.slept == [0.2, 0.2]
    assert len(rig.records()) == 5


# --- pace


def test_turns_of_one_key_are_an_interval_apart(clock: Clock) -> None:
    async def story() -> list[float]:
        turns = Pace(2.0, clock)
        times = []
        for _ in range(3):
            await turns.turn("a")
            times.append(clock.now)
        await turns.turn("b")
        clock.now += 10
        await turns.turn("a")
        return [*times, clock.now]

    assert run(story()) == [100, 102, 104, 114]


def test_turns_are_taken_in_the_order_of_asking() -> None:
    async def story() -> list[int]:
        loop = asyncio.get_running_loop()
        turns = Pace(0.001, loop.time)
        order: list[int] = []

        async def one(number: int) -> None:
            await turns.turn("a")
            order.append(number)

        await asyncio.gather(*(one(number) for number in range(8)))
        return order

    assert run(story()) == list(range(8))


def test_who_gives_up_waiting_takes_no_turn() -> None:
    """Else somebody who hangs up again and again would keep everybody with the same key waiting."""

    async def story() -> float:
        now = 100.0
        turns = Pace(1000.0, lambda: now)
        await turns.turn("a")
        for _ in range(50):
            waiting = asyncio.ensure_future(turns.turn("a"))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait({waiting})
        now += 1000
        await asyncio.wait_for(turns.turn("a"), 5)  # at once, and not after fifty turns more
        return now

    assert run(story()) == 1100


def test_keys_that_are_through_are_forgotten(clock: Clock) -> None:
    async def story() -> int:
        turns = Pace(1.0, clock)
        for number in range(5000):
            await turns.turn(number)
            clock.now += 0.01
        return len(turns._queues)

    assert run(story()) < 1200


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "192.0.2.1", True),
        ("unix:", "unknown", False),
    ],
)
def test_the_daemon_counts_peers_as_the_gateway_does(one: str, other: str, same: bool) -> None:
    assert (site_of(one) == site_of(other)) is same
    assert (_peer_key(one) == _peer_key(other)) is same


def test_only_so_many_wait_for_one_key() -> None:
    async def story() -> list[str]:
        turns = Pace(1000.0, asyncio.get_running_loop().time, most_waiting=2)
        await turns.turn("a")
        waiting = [asyncio.ensure_future(turns.turn("a")) for _ in range(3)]
        await asyncio.wait({waiting[2]}, timeout=20)
        waiting[0].cancel()
        await asyncio.wait({waiting[0]})
        again = asyncio.ensure_future(turns.turn("a"))  # there is room again
        await asyncio.sleep(0)
        found = [type(waiting[2].exception()).__name__, str(again.done())]
        for task in (waiting[1], again):
            task.cancel()
        await asyncio.wait({waiting[1], again})
        return found

    assert run(story()) == ["LimitExceeded", "False"]
