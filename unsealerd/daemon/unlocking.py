"""The unlock sessions of the host: at most so many, each bound to one connection and gone with it."""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unsealerd.core.age import Header
from unsealerd.core.session import (
    LIFETIME,
    SESSION_ID_SIZE,
    Answer,
    Outcome,
    Question,
    UnlockSession,
)
from unsealerd.core.words import session_words
from unsealerd.daemon.host import Facts, Host
from unsealerd.daemon.pace import Pace
from unsealerd.errors import (
    BackupDamaged,
    BadMessage,
    LimitExceeded,
    NotInitialised,
    NotLocked,
    UnsealerdError,
)
from unsealerd.model import State

MAX_SESSIONS = 64
MAX_CONSOLE_SESSIONS = 16  # besides: whoever is at the console is not kept out by the network
SHARES_NEEDED = 1
_ANSWER_INTERVAL = 0.5  # seconds between the audited answers of one peer
_CONSOLE = "console"
_MAX_REASON = 256  # characters
_MAX_PEER = 128  # characters


@dataclass(frozen=True, slots=True)
class Challenge:
    session: bytes
    questions: tuple[Question, ...]
    words: tuple[str, ...]
    seconds_left: int


@dataclass(slots=True)
class _Open:
    session: UnlockSession
    peer: str | None
    opened: int
    words: tuple[str, ...]
    timer: asyncio.TimerHandle


class Conversations:
    """All open sessions, by whatever stands for their connection."""

    def __init__(self, host: Host, monotonic: Callable[[], float]) -> None:
        self._host = host
        self._monotonic = monotonic
        self._pace = Pace(_ANSWER_INTERVAL, monotonic)
        self._open: dict[object, _Open] = {}
        self._header: tuple[object, Header | BackupDamaged] | None = None

    def hello(
        self, connection: object, *, version: int, nonce: bytes, tags: Sequence[bytes], peer: str | None
    ) -> Challenge:
        """Start the connection's session. ``peer``: None at the console.

        Raises the errors of the session, `NotLocked` and `LimitExceeded`.
        """
        self._require_locked()
        if connection in self._open:
            raise BadMessage("one hello for each connection")
        alike = sum((other.peer is None) == (peer is None) for other in self._open.values())
        if alike >= (MAX_CONSOLE_SESSIONS if peer is None else MAX_SESSIONS):
            raise LimitExceeded("too many unlock sessions")
        now = int(self._monotonic())
        session = UnlockSession(secrets.token_bytes(SESSION_ID_SIZE), now)
        questions = session.hello(
            version=version,
            nonce=nonce,
            tags=tags,
            operators=self._host.operators,
            header=self._current_header(),
            now=now,
        )
        words = session_words(session.id, nonce, tuple(question.point for question in questions))
        timer = asyncio.get_running_loop().call_later(LIFETIME, self.end, connection)
        self._open[connection] = _Open(
            session, None if peer is None else _printable(peer, _MAX_PEER), self._host.now, words, timer
        )
        return Challenge(session.id, questions, words, LIFETIME)

    async def answer(
        self,
        connection: object,
        *,
        session: bytes,
        answers: Sequence[Answer],
        reason: str,
        accept_rollback: bool,
        facts: Facts,
    ) -> tuple[Outcome, ...]:
        """Try the answers. The host is unlocked afterwards if an outcome is ``accepted``; otherwise none was right."""
        opened = self._open.get(connection)
        if opened is None:
            raise BadMessage("an answer before the hello")
        try:
            await self._pace.turn(opened.peer)
            self._require_locked()
            who: Facts = {
                **facts,
                "peer": opened.peer or _CONSOLE,
                "operators": list(opened.session.operators),
                "reason": _printable(reason, _MAX_REASON) or None,
            }
            self._host.audit.append("unlock_answer", **who)
            try:
                file_key, outcomes = opened.session.answer(session, answers, int(self._monotonic()))
            except UnsealerdError as err:
                self._host.audit.append("unlock_refused", error=err.name, **who)
                raise
            if file_key is None:
                self._host.audit.append("unlock_refused", error="BadAnswer", **who)
                return outcomes
            accepted = sorted({outcome.operator for outcome in outcomes if outcome.result == "accepted"})
            await self._host.unlock(file_key, {**who, "operators": accepted}, accept_rollback=accept_rollback)
            return outcomes
        finally:
            self.end(connection)

    def end(self, connection: object) -> None:
        """Wipe the connection's session, if it has one."""
        opened = self._open.pop(connection, None)
        if opened is not None:
            opened.timer.cancel()
            opened.session.close()

    def describe(self) -> list[dict[str, object]]:
        """The open sessions, as `status` shows them."""
        return [
            {
                "operators": o.session.operators,
                "peer": o.peer or _CONSOLE,
                "opened": o.opened,
                "words": o.words,
            }
            for o in self._open.values()
        ]

    def _require_locked(self) -> None:
        match self._host.state:
            case State.UNINITIALISED:
                raise NotInitialised("there is nothing to unlock")
            case State.UNLOCKED:
                raise NotLocked("the host is not locked")
            case State.LOCKED:
                return

    def _current_header(self) -> Header:
        """Parsed again only when the file is another one: a peer that says hello costs no disk read."""
        signature = self._host.keeper.store.signature()
        if self._header is None or self._header[0] != signature:
            try:
                self._header = (signature, self._host.keeper.header())
            except BackupDamaged as err:
                self._header = (signature, err)
                self._host.relock(err)
        header = self._header[1]
        if isinstance(header, BackupDamaged):
            raise BackupDamaged(header.detail)
        return header


def _printable(text: str, limit: int) -> str:
    """What a peer sent, fit for a log line."""
    return "".join(c if c.isprintable() else "?" for c in text[:limit])
