"""Gathering shares on a host in this process, where the clock and the log are ours."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from unsealerd.config import Config, Daemon, Operator, TpmTable, Unlock
from unsealerd.core.age import X25519Identity
from unsealerd.core.session import Answer, Judgement, recipient_tag
from unsealerd.daemon.audit import AuditLog
from unsealerd.daemon.host import Host
from unsealerd.daemon.unlocking import MAX_CONSOLE_SESSIONS, Conversations
from unsealerd.errors import AuditUnwritable, LimitExceeded, NotLocked, SessionExpired
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
        self.now = 1000.0

    async def start(self) -> None:
        """A host that has a keyring, and is locked."""
        first = Host(self.config, time.time, self.log)
        await first.start()
        await first.initialise({})
        assert await first.close()
        self.log.close()
        self.host = Host(self.config, time.time, self.log)
        await self.host.start()
        assert self.host.state is State.LOCKED
        self.conversations = Conversations(self.host, lambda: self.now)

    async def answer(self, name: str, purpose: Purpose = Purpose.UNLOCK) -> Judgement:
        connection, nonce = object(), os.urandom(32)
        self.now += 1  # the pace of answers is another test's
        challenge = await self.conversations.hello(
            connection,
            version=1,
            nonce=nonce,
            tags=[recipient_tag(nonce, str(PEOPLE[name].recipient), purpose)],
            peer=None,
            purpose=purpose,
        )
        answers = []
        for number, question in enumerate(challenge.questions):
            with PEOPLE[name].exchange(question.point) as x:
                answers.append(Answer(number, bytes(x.view)))
        return await self.conversations.answer(
            connection,
            session=challenge.session,
            answers=answers,
            reason="",
            accept_rollback=False,
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
        assert rig.answered() == (() if event == "unlock" else ("alice",))  # used once, whatever came of it
        rig.log.refuses = ""
        await rig.answer("alice")
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
