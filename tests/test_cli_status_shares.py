"""unsealctl status: who answered, who is still needed, and who was proven."""

import time

from unsealerd.cli.status import summary


def rows(**facts: object) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, text in summary({"state": "locked", "since": 1700000000, **facts}):
        found.setdefault(name, []).append(text)
    return found


def shares(**facts: object) -> list[str]:
    return rows(shares={"present": 0, "needed": 1, **facts})["shares"]


def test_an_older_daemon_says_only_how_many() -> None:
    assert shares() == ["0 of 1"]


def test_who_answered_and_who_can_still() -> None:
    assert shares(
        present=1, needed=2, answered=["alice"], missing=["bob", "carol"], require=[], seconds_left=1500
    ) == ["1 of 2, from alice; they count for 25 minutes more", "can still answer: bob, carol"]


def test_who_must_be_among_them() -> None:
    assert shares(
        present=1, needed=2, answered=["bob"], missing=["alice"], require=["security"], seconds_left=59
    ) == [
        "1 of 2, from bob; they count for 59 seconds more",
        "can still answer: alice",
        "must be among them: security",
    ]


def test_nobody_is_missing_when_it_is_unlocked() -> None:
    assert shares(
        present=2, needed=2, answered=[], missing=["bob", "carol"], require=[], seconds_left=None
    ) == ["2 of 2"]


def test_when_operators_were_proven() -> None:
    now = int(time.time())
    found = rows(operators=[{"name": "alice", "proven": now - 86400 * 3}, {"name": "bob", "proven": None}])
    alice, bob = found["operators"]
    assert alice.startswith("alice: proven ")
    assert alice.endswith("3 days ago")
    assert bob == "bob: never proven: unsealctl drill"
    assert rows(operators=[])["operators"] == ["none"]
    assert rows(warnings=["one", "two"])["warnings"] == ["one", "two"]
