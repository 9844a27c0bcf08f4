"""Gathering shares on a host in this process, where the clock and the log are ours."""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from unsealerd.config import Config, Daemon, Operator, TpmTable, Unlock
from unsealerd.core.age import X25519Identity
from unsealerd.core.secret import SecretBuffer
from unsealerd.core.session import Answer, Judgement, recipient_tag
from unsealerd.daemon.audit import AuditLog
from unsealerd.daemon.host import Host
from unsealerd.daemon.proven import PROOFS
from unsealerd.daemon.unlocking import MAX_CONSOLE_SESSIONS, Conversations
from unsealerd.errors import (
    AuditUnwritable,
    BackupDamaged,
    LimitExceeded,
    NotLocked,
    Rollback,
    SessionExpired,
    TpmFailed,
    UnsealerdError,
)
from unsealerd.model import Purpose, State

NAMES = ("alice", "bob", "carol")
PEOPLE = {name: X25519Identity.generate() for name in NAMES}


class Log(AuditLog):
    """Can be told to refuse one event."""

    refuses = ""

    def append(self, event: str, **fields: object) -> None:
        if event == self.refuses:
            raise AuditUnwritable("the disk is full")
        super().append(event, **fields)


class Rig:
    def __init__(self, directory: Path, threshold: int = 2, window: int = 600) -> None:
        self.config = Config(
            daemon=Daemon(directory, directory / "run"),
            tpm=TpmTable(tcti=None),
            unlock=Unlock(threshold, (), window),
            operators=tuple(Operator(name, str(PEOPLE[name].recipient)) for name in NAMES),
        )
        self.log = Log(directory, time.time)
        self.id_file = directory / "keyring.id"
        self.now = 1000.0

    async def start(self) -> None:
        """A host that has a keyring, and is locked."""
        first = Host(self.config, self.id_file, time.time, self.log)
        await first.start()
        await first.initialise({})
        assert await first.close()
        self.log.close()
        self.host = Host(self.config, self.id_file, time.time, self.log)
        await self.host.start()
        assert self.host.state is State.LOCKED
        self.conversations = Conversations(self.host, lambda: self.now)

    async def answer(
        self,
        name: str,
        purpose: Purpose = Purpose.UNLOCK,
        *,
        key: X25519Identity | None = None,
        peer: str | None = None,
        reason: str = "",
        accept_rollback: bool = False,
        between: Callable[[], None] = lambda: None,
    ) -> Judgement:
        """``key``: another than the operator's. ``between``: what happens between the hello and the answer."""
        connection, nonce = object(), os.urandom(32)
        self.now += 1  # the pace of answers is another test's
        challenge = await self.conversations.hello(
            connection,
            version=1,
            nonce=nonce,
            tags=[recipient_tag(nonce, str(PEOPLE[name].recipient), purpose)],
            peer=peer,
            purpose=purpose,
        )
        between()
        answers = []
        for number, question in enumerate(challenge.questions):
            with (key or PEOPLE[name]).exchange(question.point) as x:
                answers.append(Answer(number, bytes(x.view)))
        return await self.conversations.answer(
            connection,
            session=challenge.session,
            answers=answers,
            reason=reason,
            accept_rollback=accept_rollback,
            facts={},
        )

    def answered(self) -> tuple[str, ...]:
        return self.conversations.shares().answered

    def state(self) -> State:
        return self.host.state


def run(rig: Rig, body: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await rig.start()
        try:
            await body()
        finally:
            rig.conversations.close()
            assert await rig.host.close()
            rig.log.close()

    asyncio.run(whole())


@pytest.mark.promise(8)
@pytest.mark.parametrize("peer", ["console", ""])
def test_the_gateway_cannot_pose_as_the_console(tmp_path: Path, peer: str) -> None:
    rig = Rig(tmp_path)

    async def body() -> None:
        await rig.answer("alice", peer=peer)
        await rig.answer("bob", peer=None)

    run(rig, body)
    records = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    told = {record["peer"] for record in records if record["event"] == "unlock_answer"}
    assert told == {"unknown", "console"}


def test_the_clock_ends_the_window(tmp_path: Path) -> None:
    rig = Rig(tmp_path)

    async def body() -> None:
        await rig.answer("alice")
        rig.now += 300
        assert rig.answered() == ("alice",)
        assert rig.conversations.shares().seconds_left == 300
        rig.now += 300
        assert rig.answered() == ()
        assert rig.conversations.shares().seconds_left is None
        await rig.answer("bob")
        assert rig.state() is State.LOCKED
        await rig.answer("carol")
        assert rig.state() is State.UNLOCKED
        assert rig.answered() == ()

    run(rig, body)


@pytest.mark.promise(7)
@pytest.mark.parametrize("event", ["unlock_answer", "unlock_share", "unlock"])
def test_no_audit_no_effect(tmp_path: Path, event: str) -> None:
    """A share that cannot be recorded is not kept, and the last one does not unlock."""
    rig = Rig(tmp_path)

    async def body() -> None:
        await rig.answer("alice")
        rig.log.refuses = event
        with pytest.raises(AuditUnwritable):
            await rig.answer("bob")
        assert rig.state() is State.LOCKED
        assert rig.answered() == (("alice", "bob") if event == "unlock" else ("alice",))
        rig.log.refuses = ""
        await rig.answer("alice")
        if event != "unlock":  # else what bob gave is still there
            await rig.answer("carol")
        assert rig.state() is State.UNLOCKED

    run(rig, body)


@pytest.mark.promise(7)
@pytest.mark.parametrize("event", ["drill_answer", "drill"])
def test_no_audit_no_proof(tmp_path: Path, event: str) -> None:
    rig = Rig(tmp_path)

    async def body() -> None:
        rig.log.refuses = event
        with pytest.raises(AuditUnwritable):
            await rig.answer("bob", Purpose.DRILL)
        assert all(rig.host.proofs.of(operator) is None for operator in rig.host.operators)
        rig.log.refuses = ""
        judgement = await rig.answer("bob", Purpose.DRILL)
        assert (judgement.accepted, judgement.file_key, judgement.shares) == (("bob",), None, {})
        assert rig.host.proofs.of(rig.host.operators[1]) is not None
        assert rig.answered() == ()

    run(rig, body)


def test_who_unlocks_does_not_wait_for_what_is_remembered_of_it(tmp_path: Path) -> None:
    rig = Rig(tmp_path, threshold=1)

    async def body() -> None:
        await rig.answer("alice")
        assert rig.host.state is State.UNLOCKED
        assert rig.host.proofs.of(rig.host.operators[0]) is not None
        assert not (tmp_path / PROOFS).exists()
        while not (tmp_path / PROOFS).exists():
            await asyncio.sleep(0)
        assert list(json.loads((tmp_path / PROOFS).read_bytes())) == [str(PEOPLE["alice"].recipient)]

    run(rig, body)


def test_a_backup_that_is_written_between_the_question_and_the_answer(tmp_path: Path) -> None:
    """A rotation makes a new file: an answer about the old one proves nothing about the new one."""
    rig = Rig(tmp_path)

    async def body() -> None:
        await rig.answer("alice")
        await rig.answer("bob")
        connection, nonce = object(), bytes(32)
        challenge = await rig.conversations.hello(
            connection,
            version=1,
            nonce=nonce,
            tags=[recipient_tag(nonce, str(PEOPLE["carol"].recipient), Purpose.DRILL)],
            peer=None,
            purpose=Purpose.DRILL,
        )
        await rig.host.lock({})
        await rig.answer("alice")
        await rig.answer("bob")  # writes the backup anew
        with pytest.raises(SessionExpired), PEOPLE["carol"].exchange(challenge.questions[0].point) as x:
            await rig.conversations.answer(
                connection,
                session=challenge.session,
                answers=[Answer(0, bytes(x.view))],
                reason="",
                accept_rollback=False,
                facts={},
            )
        assert rig.host.proofs.of(rig.host.operators[2]) is None

    run(rig, body)


def test_drills_are_bounded_while_the_host_serves_keys(tmp_path: Path) -> None:
    rig = Rig(tmp_path, threshold=1)

    async def body() -> None:
        await rig.answer("alice")
        assert rig.state() is State.UNLOCKED
        with pytest.raises(NotLocked):
            await rig.answer("bob")

        async def hello() -> None:
            nonce = os.urandom(32)
            rig.now += 1
            await rig.conversations.hello(
                object(),
                version=1,
                nonce=nonce,
                tags=[recipient_tag(nonce, str(PEOPLE["bob"].recipient), Purpose.DRILL)],
                peer=None,
                purpose=Purpose.DRILL,
            )

        for _ in range(MAX_CONSOLE_SESSIONS):
            await hello()
        assert {session["purpose"] for session in rig.conversations.describe()} == {"drill"}
        with pytest.raises(LimitExceeded):
            await hello()

    run(rig, body)


def test_guesses_by_drills_are_bounded_for_the_whole_host(tmp_path: Path) -> None:
    """From however many networks they come; and who has guessed nothing wrong goes on drilling."""
    rig = Rig(tmp_path, threshold=1)
    wrong = X25519Identity.generate()

    def refused() -> int:
        return rig.log.counters.values()["drill_failures"]

    async def body() -> None:
        async def guess(peer: str) -> bool:
            """Whether it was judged. The clock stands still but for what `answer` adds."""
            before = refused()
            try:
                judgement = await rig.answer(
                    "alice", Purpose.DRILL, key=wrong, peer=peer, reason="\u4e00" * 256
                )
            except LimitExceeded:
                assert refused() == before
                return False
            assert (judgement.accepted, refused()) == ((), before + 1)
            return True

        assert [await guess(f"2001:db8::{number:x}") for number in range(30)] == [True] * 22 + [False] * 8
        assert (await rig.answer("alice", Purpose.DRILL, peer="2001:db8:0:1::1")).accepted == ("alice",)
        assert (
            await rig.answer("alice", Purpose.DRILL, key=wrong)
        ).accepted == ()  # the console has its own limits
        for number in range(2, 80):
            rig.now -= 1  # all in one minute
            assert await guess(f"2001:db8:0:{number:x}::1") is (number < 65)
        rig.now += 60
        assert await guess("2001:db8::1")
        records = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
        longest = max(len((record.get("reason") or "").encode()) for record in records)
        assert 250 < longest <= 256

    run(rig, body)


@pytest.mark.parametrize("threshold", [1, 2])
def test_who_is_removed_during_a_session_counts_no_more(tmp_path: Path, threshold: int) -> None:
    rig = Rig(tmp_path, threshold)

    async def body() -> None:
        def remove() -> None:
            left = tuple(operator for operator in rig.config.operators if operator.name != "alice")
            rig.host.configure(msgspec.structs.replace(rig.config, operators=left))

        with pytest.raises(SessionExpired):
            await rig.answer("alice", between=remove)
        assert (rig.state(), rig.answered()) == (State.LOCKED, ())
        for name in ("bob", "carol")[:threshold]:
            await rig.answer(name)
        assert rig.state() is State.UNLOCKED

    run(rig, body)


@pytest.mark.parametrize("hangs_up", [False, True])
def test_an_unlock_that_fails_keeps_what_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs_up: bool
) -> None:
    """But for a damaged backup: then all is wiped, whether or not the caller is still there to hear of it."""
    rig = Rig(tmp_path)

    async def body() -> None:
        trying = asyncio.Event()

        def fail(with_error: UnsealerdError) -> None:
            async def unlock(file_key: SecretBuffer, *_: object, **__: object) -> None:
                with file_key:
                    trying.set()
                    await asyncio.sleep(0.05)
                    rig.host.relock(with_error)
                    raise with_error

            monkeypatch.setattr(rig.host, "unlock", unlock)

        async def attempt(name: str, error: UnsealerdError) -> None:
            fail(error)
            trying.clear()
            answering = asyncio.ensure_future(rig.answer(name))
            await asyncio.wait_for(trying.wait(), 60)
            if hangs_up:
                answering.cancel()
                await asyncio.wait({answering})
                while rig.conversations._gathering.trying:
                    await asyncio.sleep(0.01)
            else:
                with pytest.raises(type(error)):
                    await answering

        await rig.answer("alice")
        await attempt("bob", Rollback("older"))
        await attempt("bob", TpmFailed("no answer"))
        assert rig.answered() == ("alice", "bob")
        await attempt("bob", BackupDamaged("bent"))
        assert rig.answered() == ()
        monkeypatch.undo()
        await rig.answer("alice")
        await rig.answer("bob")
        assert rig.state() is State.UNLOCKED
        assert "unlock_shares_dropped" not in (tmp_path / "audit.jsonl").read_text()

    run(rig, body)


# --- another configuration while it is locked


@pytest.mark.promise(2)
def test_a_share_of_who_is_removed_is_wiped_at_the_reload_and_does_not_come_back(tmp_path: Path) -> None:
    rig = Rig(tmp_path)

    async def body() -> None:
        await rig.answer("alice")
        given = [share.share for share in rig.conversations._gathering._given.values()]
        others = tuple(operator for operator in rig.config.operators if operator.name != "alice")
        await rig.host.reload(msgspec.structs.replace(rig.config, operators=others))
        assert [share.closed for share in given] == [True]  # nobody has asked for anything since
        await rig.host.reload(rig.config)
        await rig.answer("bob")
        assert rig.answered() == ("bob",)
        assert rig.state() is State.LOCKED

    run(rig, body)


@pytest.mark.parametrize(
    ("threshold", "wanted", "still"),
    [
        (1, Unlock(3, ("carol",)), "still opens with 1 of 3 operators"),
        (1, Unlock(1, ("carol",)), "still opens with 1 of 3 operators"),
        (2, Unlock(3), "still opens with 2 of 3 operators"),
        (2, Unlock(2), None),
        (1, Unlock(1, (), 60), None),
    ],
)
def test_stricter_rules_that_do_not_apply_yet_are_told(
    tmp_path: Path, threshold: int, wanted: Unlock, still: str | None
) -> None:
    rig = Rig(tmp_path, threshold)

    async def body() -> None:
        assert rig.conversations.pending_rules() is None
        await rig.host.reload(msgspec.structs.replace(rig.config, unlock=wanted))
        told = rig.conversations.pending_rules()
        if still is None:
            assert told is None
            return
        assert told is not None
        assert still in told
        await rig.answer("alice")
        if threshold == 2:
            await rig.answer("bob")
        assert rig.state() is State.UNLOCKED  # it was said
        assert rig.conversations.pending_rules() is None

    run(rig, body)
