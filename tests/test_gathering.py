"""The shares given so far, with a clock of our own: taken over, replaced, used once, wiped."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from unsealerd.core.age import Header, Stanza, X25519Identity, parse_header
from unsealerd.core.age.header import write_header
from unsealerd.core.rules import KnownOperator, Rules
from unsealerd.core.secret import SecretBuffer
from unsealerd.core.sharing import Backup, Sharing, wrap
from unsealerd.daemon.gathering import Gathering
from unsealerd.errors import BackupDamaged

FILE_KEY = bytes.fromhex("c0ffee00112233445566778899aabbcc")
PEOPLE = [X25519Identity.generate() for _ in range(3)]
RULES = Rules(tuple(KnownOperator(f"op{i}", each.recipient) for i, each in enumerate(PEOPLE)), 2)


def header_by(rules: Rules) -> Header:
    with SecretBuffer.copy_of(FILE_KEY) as file_key:
        return parse_header(write_header(wrap(rules, file_key), file_key).encode())


@dataclass
class Rig:
    backup: Backup = field(default_factory=lambda: Backup.of(header_by(RULES)))
    now: float = 1000
    dropped: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    made: list[SecretBuffer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gathering = Gathering(lambda: self.now, lambda why, whose: self.dropped.append((why, whose)))

    @property
    def sharing(self) -> Sharing:
        assert self.backup.split is not None
        return self.backup.split

    def share(self, index: int) -> SecretBuffer:
        identity, stanza = PEOPLE[index], self.sharing.stanzas[index]
        point = identity.recipient.ephemeral(stanza)
        assert point is not None
        with identity.exchange(point) as x, identity.recipient.unwrap(stanza, x) as secret:
            self.made.append(self.sharing.open_share(index, secret))
        return self.made[-1]

    def add(self, *indices: int, accept: bool = False, window: int = 60) -> None:
        shares = {index: self.share(index) for index in indices}
        self.gathering.add(self.backup, self.sharing, shares, window=window, accept_rollback=accept)


def status(rig: Rig) -> tuple[tuple[str, ...], int | None]:
    return rig.gathering.answered, rig.gathering.seconds_left


def in_a_loop(test: Callable[[Rig], None]) -> Callable[[], None]:
    """Timers need a running loop; they do not come to fire in these tests."""

    def run() -> None:
        async def body() -> None:
            test(Rig())

        asyncio.run(body())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@in_a_loop
def test_when_satisfied_it_gives_the_file_key_once_and_wipes_every_share(rig: Rig) -> None:
    rig.add(2)
    assert rig.gathering.combine() is None
    assert status(rig) == (("op2",), 60)
    rig.now += 59
    assert rig.gathering.seconds_left == 1
    rig.add(0)
    combined = rig.gathering.combine()
    assert combined is not None
    with combined.file_key as file_key:
        assert bytes(file_key.view) == FILE_KEY
    assert (combined.operators, combined.accept_rollback) == (("op0", "op2"), False)
    assert (rig.gathering.trying, [share.closed for share in rig.made]) == (True, [False, False])
    rig.gathering.settle(keep=False)
    assert not rig.gathering.trying
    assert all(share.closed for share in rig.made)
    assert rig.gathering.combine() is None
    assert status(rig) == ((), None)
    assert rig.dropped == []


@in_a_loop
def test_the_window_begins_with_the_first_and_is_not_made_longer_by_the_others(rig: Rig) -> None:
    rig.add(0)
    rig.now += 40
    rig.add(0)  # again: it replaces the one before, which is wiped
    assert [share.closed for share in rig.made] == [True, False]
    assert rig.gathering.seconds_left == 20
    rig.now += 20
    assert rig.gathering.answered == ()
    assert rig.dropped == [("the window is over", ("op0",))]
    assert all(share.closed for share in rig.made)
    rig.add(1, window=5)
    assert status(rig) == (("op1",), 5)
    rig.gathering.drop("the test ends")


@in_a_loop
def test_a_share_that_comes_after_the_end_opens_a_window_of_its_own(rig: Rig) -> None:
    """Even if the timer is late: nothing from before the end counts."""
    rig.add(0)
    rig.now += 60
    rig.add(1)
    assert rig.gathering.combine() is None
    assert rig.gathering.answered == ("op1",)
    rig.gathering.drop("the test ends")
    assert all(share.closed for share in rig.made)


@in_a_loop
def test_another_backup_wipes_what_was_given_for_the_one_before(rig: Rig) -> None:
    rig.add(0)
    rig.gathering.follow(rig.backup)
    assert rig.gathering.answered == ("op0",)
    rig.backup = Backup.of(header_by(RULES))
    rig.add(1)
    assert rig.gathering.answered == ("op1",)
    assert [share.closed for share in rig.made] == [True, False]
    assert rig.dropped == [("the backup is another one", ("op0",))]
    rig.gathering.drop("the test ends")


@in_a_loop
def test_a_rollback_is_accepted_by_all_or_not_at_all(rig: Rig) -> None:
    for flags, accepted in (((True, True), True), ((True, False), False), ((False, True), False)):
        for index, flag in enumerate(flags):
            rig.add(index, accept=flag)
        combined = rig.gathering.combine()
        assert combined is not None
        combined.file_key.close()
        assert combined.accept_rollback is accepted
        rig.gathering.settle(keep=False)
    rig.add(0, accept=False)
    rig.add(0, accept=True)  # what counts is what was said last
    rig.add(1, accept=True)
    combined = rig.gathering.combine()
    assert combined is not None
    combined.file_key.close()
    assert combined.accept_rollback
    rig.gathering.settle(keep=False)


@in_a_loop
def test_what_was_tried_in_vain_is_kept_and_nobodys_no_cancels_it(rig: Rig) -> None:
    rig.add(0, accept=True)
    rig.add(1, accept=False)
    for operators, accepted in ((("op0", "op1"), False), (("op0", "op2"), True)):
        combined = rig.gathering.combine()
        assert combined is not None
        with combined.file_key as file_key:
            assert bytes(file_key.view) == FILE_KEY
        assert (combined.operators, combined.accept_rollback) == (operators, accepted)
        rig.gathering.settle(keep=True)
        rig.add(2, accept=True)
    assert rig.gathering.answered == ("op0", "op1", "op2")
    rig.now += 60  # and not for longer than the window
    assert rig.gathering.combine() is None
    assert all(share.closed for share in rig.made)


@in_a_loop
def test_a_header_that_was_changed_is_damage_and_every_share_is_wiped(rig: Rig) -> None:
    first, *rest = rig.backup.header.stanzas
    bent = Stanza(first.type, first.args, first.body.replace(b'"groups":[]', b'"groups":["x"]', 1))
    text = rig.backup.header.encode().replace(first.encode(), bent.encode())
    rig.backup = Backup.of(parse_header(text))
    assert len(rest) == 3
    rig.add(0, 1)
    with pytest.raises(BackupDamaged):
        rig.gathering.combine()
    assert all(share.closed for share in rig.made)
    assert rig.gathering.answered == ()


def test_the_timer_wipes_without_being_asked() -> None:
    async def body() -> None:
        rig, over = Rig(), asyncio.Event()

        def dropped(why: str, whose: tuple[str, ...]) -> None:
            rig.dropped.append((why, whose))
            over.set()

        rig.gathering = Gathering(asyncio.get_running_loop().time, dropped)
        rig.add(0, window=0)
        await asyncio.wait_for(over.wait(), 60)
        assert rig.dropped == [("the window is over", ("op0",))]
        assert rig.made[0].closed

    asyncio.run(body())
