"""The unlock sessions of the host: at most so many, each bound to one connection and gone with it.

Where several operators are needed, what their answers open outlives the session, in the `Gathering`. A drill's does not:
the session wipes it, and only that it opened is told.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unsealerd.core.auditchain import Facts
from unsealerd.core.rules import KnownOperator, Rules
from unsealerd.core.session import (
    LIFETIME,
    SESSION_ID_SIZE,
    Answer,
    Judgement,
    Question,
    UnlockSession,
    named,
)
from unsealerd.core.sharing import Backup, Sharing
from unsealerd.core.words import session_words
from unsealerd.daemon.gathering import Gathering
from unsealerd.daemon.host import Host
from unsealerd.daemon.pace import Pace, Refusals
from unsealerd.daemon.watch import Event
from unsealerd.errors import (
    AuditUnwritable,
    BackupDamaged,
    BadMessage,
    LimitExceeded,
    NotInitialised,
    NotLocked,
    SessionExpired,
    StorageFailed,
    UnsealerdError,
)
from unsealerd.model import LockReason, Purpose, State

MAX_SESSIONS = 64
MAX_CONSOLE_SESSIONS = 16  # besides: whoever is at the console is not kept out by the network
_ANSWER_INTERVAL = 0.5  # seconds between the audited answers of one peer, and between drills that it begins
_MAX_WAITING = 8  # of one peer
_REFUSALS = {"of_each": 2, "keys": 64, "of_all": 20}  # drills a minute, of the network
_CONSOLE = "console"
_MAX_REASON = 256  # bytes
_MAX_PEER = 128  # bytes

_log = logging.getLogger("unsealerd")


@dataclass(frozen=True, slots=True)
class Challenge:
    session: bytes
    questions: tuple[Question, ...]
    words: tuple[str, ...]
    seconds_left: int


@dataclass(frozen=True, slots=True)
class Shares:
    """How far the operators are. All of it but the first two is for the administrator and for who is one of them."""

    present: int
    needed: int
    """At the least."""
    answered: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    """Operators who have not answered, and could."""
    require: tuple[str, ...] = ()
    """Required names that nobody has stood for yet."""
    seconds_left: int | None = None


@dataclass(slots=True)
class _Open:
    session: UnlockSession
    peer: str | None
    site: str | None
    operators: tuple[KnownOperator, ...]
    """Whom the configuration named at the hello."""
    opened: int
    words: tuple[str, ...]
    timer: asyncio.TimerHandle


class Conversations:
    """All open sessions, by whatever stands for their connection."""

    def __init__(self, host: Host, monotonic: Callable[[], float]) -> None:
        self._host = host
        self._monotonic = monotonic
        self._pace = Pace(_ANSWER_INTERVAL, monotonic, _MAX_WAITING)
        self._refusals = Refusals(60, monotonic, **_REFUSALS)
        self._open: dict[object, _Open] = {}
        self._backup: tuple[object, Backup | BackupDamaged] | None = None
        self._gathering = Gathering(monotonic, self._shares_dropped)
        self._operators = host.operators
        host.watchers.add(self._state_changed)
        host.on_configured(self._follow_operators)

    async def hello(
        self,
        connection: object,
        *,
        version: int,
        nonce: bytes,
        tags: Sequence[bytes],
        peer: str | None,
        purpose: Purpose = Purpose.UNLOCK,
    ) -> Challenge:
        """Start the connection's session. ``peer``: None at the console.

        Raises the errors of the session, `NotLocked` and `LimitExceeded`.
        """
        peer = None if peer is None else _from_network(peer)
        site = None if peer is None else _site_of(peer)
        self._require_room(connection, peer, purpose)
        if purpose is Purpose.DRILL:
            # A host that serves keys does not spend its time on points for whoever asks, and who is nobody does not wait.
            named(
                version=version,
                nonce=nonce,
                tags=tags,
                operators=self._host.operators,
                backup=self._current_backup(),
                purpose=purpose,
            )
            await self._pace.turn((purpose, site))
            self._require_room(connection, peer, purpose)
        now = int(self._monotonic())
        session = UnlockSession(secrets.token_bytes(SESSION_ID_SIZE), now)
        questions = session.hello(
            version=version,
            nonce=nonce,
            tags=tags,
            operators=self._host.operators,
            backup=self._current_backup(),
            now=now,
            purpose=purpose,
        )
        words = session_words(session.id, nonce, tuple(question.point for question in questions))
        timer = asyncio.get_running_loop().call_later(LIFETIME, self.end, connection)
        self._open[connection] = _Open(
            session,
            peer,
            site,
            self._host.operators,
            self._host.now,
            words,
            timer,
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
    ) -> Judgement:
        """Try the answers: for an unlock, or for a drill, as the hello said.

        The host is unlocked afterwards if one that was accepted is enough, or the last that was needed. The judgement that
        comes back has no secret in it any more.
        """
        opened = self._open.get(connection)
        if opened is None:
            raise BadMessage("an answer before the hello")
        drill = opened.session.purpose is Purpose.DRILL
        try:
            await self._pace.turn(opened.site)
            self._require_state(opened.session.purpose)
            if self._host.operators != opened.operators:
                raise SessionExpired("the operators are others since the hello")
            if drill and opened.site is not None:
                self._refusals.check(opened.site)
            who: Facts = {
                **facts,
                "peer": opened.peer or _CONSOLE,
                "operators": list(opened.session.operators),
                "reason": _printable(reason, _MAX_REASON) or None,
            }
            self._record_try("drill_answer" if drill else "unlock_answer", who)
            judgement: Judgement | None = None
            try:
                backup = self._require_current(opened.session)
                judgement = opened.session.answer(session, answers, int(self._monotonic()))
            except UnsealerdError as err:
                self._refused(drill, err.name, who)
                raise
            finally:
                if drill and opened.site is not None and (judgement is None or not judgement.accepted):
                    self._refusals.count(opened.site)
            if not judgement.accepted:
                self._refused(drill, "BadAnswer", who)
                return judgement
            who |= {"operators": list(judgement.accepted), "refused": list(judgement.refused) or None}
            if drill:
                self._host.audit.append("drill", **who)
                self._host.proofs.record(
                    self._recipients(backup, judgement), self._host.operators, self._host.now
                )
            else:
                await self._unlock(backup, judgement, who, accept_rollback)
            return Judgement(judgement.outcomes, None, {})
        finally:
            self.end(connection)

    async def _unlock(self, backup: Backup, judgement: Judgement, who: Facts, accept_rollback: bool) -> None:
        self._host.proofs.note(self._recipients(backup, judgement), self._host.operators, self._host.now)
        try:
            await self._open_with(backup, judgement, who, accept_rollback)
        finally:
            # A hint that decides nothing: it is written when the operator, who waits, has the result.
            asyncio.get_running_loop().call_later(0, self._save_proofs)

    async def _open_with(
        self, backup: Backup, judgement: Judgement, who: Facts, accept_rollback: bool
    ) -> None:
        if judgement.file_key is not None:
            await self._host.unlock(judgement.file_key, who, accept_rollback=accept_rollback)
        elif backup.split is not None:
            self._gather(backup, backup.split, judgement, who, accept_rollback)
            try:
                combined = self._gathering.combine()
            except BackupDamaged as err:
                self._refused(False, err.name, who)
                raise
            if combined is not None:
                who |= {"operators": list(combined.operators), "completed_by": list(judgement.accepted)}
                unlock = self._host.unlock(combined.file_key, who, accept_rollback=combined.accept_rollback)
                unlocking = asyncio.ensure_future(unlock)
                unlocking.add_done_callback(self._tried)
                await asyncio.shield(unlocking)  # what becomes of the shares must not depend on who hangs up

    def _tried(self, unlocking: "asyncio.Future[None]") -> None:
        err = None if unlocking.cancelled() else unlocking.exception()
        keep = isinstance(err, UnsealerdError) and not isinstance(err, BackupDamaged | NotLocked)
        self._gathering.settle(keep=keep)

    def _gather(
        self, backup: Backup, sharing: Sharing, judgement: Judgement, who: Facts, accept_rollback: bool
    ) -> None:
        """Keep the shares for those that are still to come. Takes them over."""
        try:
            present = {*self._gathering.answered, *judgement.accepted}
            self._host.audit.append(
                "unlock_share",
                **who,
                accept_rollback=accept_rollback or None,
                present=len(present),
                needed=sharing.rules.needed(present),
            )
        except BaseException:
            for share in judgement.shares.values():
                share.close()
            raise
        self._gathering.add(
            backup,
            sharing,
            judgement.shares,
            window=self._host.config.unlock.window,
            accept_rollback=accept_rollback,
        )

    def shares(self) -> Shares:
        """How far the operators are."""
        needed = self._host.config.unlock.threshold
        match self._host.state:
            case State.UNINITIALISED:
                return Shares(0, needed)
            case State.UNLOCKED:
                return Shares(needed, needed)
            case State.LOCKED:
                pass
        try:
            backup = self._current_backup()
        except (BackupDamaged, NotInitialised):
            return Shares(0, needed)
        members = tuple(operator.name for _, operator in backup.members(self._host.operators))
        if backup.split is None:
            return Shares(0, 1, missing=members)
        self._gathering.follow(backup)
        rules, answered = backup.split.rules, self._gathering.answered
        return Shares(
            len(answered),
            rules.needed(answered),
            answered,
            tuple(name for name in members if name not in answered),
            rules.unmet(answered),
            self._gathering.seconds_left,
        )

    def pending_rules(self) -> str | None:
        """In a sentence, that the backup on disk opens by other rules than the configuration's; None if it does not.

        Nobody can write it anew while the host is locked.
        """
        if self._host.state is not State.LOCKED:
            return None
        try:
            backup = self._current_backup()
        except (BackupDamaged, NotInitialised):
            return None
        wanted = self._host.config.unlock
        rules = backup.sharing.rules if backup.sharing is not None else Rules(())
        threshold, require = rules.threshold, rules.require
        count = len(rules.operators or backup.header.stanzas)
        if (threshold, set(require)) == (wanted.threshold, set(wanted.require)):
            return None
        among = f", {' and '.join(require)} among them" if require else ""
        return (
            "[unlock] of the configuration applies when the keyring is written next, after an unlock: "
            f"the backup on this disk still opens with {threshold} of {count} operators{among}"
        )

    def close(self) -> None:
        """Wipe what there is of sessions and shares."""
        for connection in list(self._open):
            self.end(connection)
        self._gathering.drop("the daemon ends")

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
                "purpose": o.session.purpose.value,
                "peer": o.peer or _CONSOLE,
                "opened": o.opened,
                "words": o.words,
            }
            for o in self._open.values()
        ]

    def _require_room(self, connection: object, peer: str | None, purpose: Purpose) -> None:
        self._require_state(purpose)
        if connection in self._open:
            raise BadMessage("one hello for each connection")
        alike = sum((other.peer is None) == (peer is None) for other in self._open.values())
        if alike >= (MAX_CONSOLE_SESSIONS if peer is None else MAX_SESSIONS):
            raise LimitExceeded("too many unlock sessions")

    def _require_state(self, purpose: Purpose) -> None:
        match self._host.state:
            case State.UNINITIALISED:
                raise NotInitialised("there is nothing to unlock")
            case State.UNLOCKED if purpose is Purpose.UNLOCK:
                raise NotLocked("the host is not locked")
            case State.UNLOCKED | State.LOCKED:
                return

    def _require_current(self, session: UnlockSession) -> Backup:
        """The backup that the session asked about, if it is still the one on disk."""
        backup = self._current_backup()
        if backup != session.backup:
            raise SessionExpired("the backup was written anew since the hello")
        return backup

    def _current_backup(self) -> Backup:
        """Parsed again only when the file is another one: a peer that says hello costs no disk read."""
        signature = self._host.keeper.store.signature()
        if self._backup is None or self._backup[0] != signature:
            try:
                self._backup = (signature, self._host.keeper.reader.backup())
            except BackupDamaged as err:
                self._backup = (signature, err)
                self._host.relock(err)
        backup = self._backup[1]
        if isinstance(backup, BackupDamaged):
            raise BackupDamaged(backup.detail)
        return backup

    def _refused(self, drill: bool, error: str, who: Facts) -> None:
        self._record_try("drill_refused" if drill else "unlock_refused", who, error=error)

    def _record_try(self, event: str, who: Facts, **about: object) -> None:
        """What whoever names an operator can have written at will. What an answer opens has a record of its own."""
        peer = str(who["peer"])
        self._host.audit.repeats.record(
            event,
            room="console" if peer == _CONSOLE else "network",
            source={"peer": peer if peer == _CONSOLE else _site_of(peer)},
            about={**about, "operators": who["operators"]},
            facts={**about, **who},
        )

    def _recipients(self, backup: Backup, judgement: Judgement) -> set[str]:
        return {
            str(operator.recipient)
            for _, operator in backup.members(self._host.operators)
            if operator.name in judgement.accepted
        }

    def _save_proofs(self) -> None:
        """That it cannot be remembered is no reason not to unlock."""
        try:
            self._host.proofs.save()
        except StorageFailed as err:
            _log.warning("who was proven is not remembered: %s", err.detail)

    def _follow_operators(self) -> None:
        """Shares of who is no operator any more do not count; simpler and as good: none that were given before."""
        if self._host.operators != self._operators:
            self._operators = self._host.operators
            self._gathering.drop("the operators are others")

    def _state_changed(self, event: Event) -> None:
        trying = self._gathering.trying
        if event.event == "unlocked" and trying:
            self._gathering.spend()
        elif event.event == "locked" and trying and self._host.lock_reason is not LockReason.LOCKED_BY_ADMIN:
            pass  # still locked, for the reason that the attempt has found: `_tried` decides
        elif event.event in ("locked", "unlocked"):
            self._gathering.drop(f"the host is {event.event}")

    def _shares_dropped(self, why: str, operators: tuple[str, ...]) -> None:
        with contextlib.suppress(AuditUnwritable):  # giving up what was given needs no permission
            self._host.audit.append("unlock_shares_dropped", detail=why, operators=list(operators))


def _printable(text: str, limit: int) -> str:
    """What a peer sent, fit for a log line. ``limit``: bytes, of UTF-8."""
    printable = "".join(c if c.isprintable() else "?" for c in text[:limit])
    return printable.encode()[:limit].decode(errors="ignore")


def _from_network(peer: str) -> str:
    """What the gateway says of its peer, fit for a record: never the word for the console, whoever speaks for the gateway."""
    printable = _printable(peer, _MAX_PEER)
    return printable if printable not in ("", _CONSOLE) else "unknown"


def _site_of(peer: str) -> str:
    from unsealerd.daemon.address import site_of

    return site_of(peer)
