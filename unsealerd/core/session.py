"""One unlock session, as the server sees it: hello, challenge, answer, result. No I/O; time is passed in.

::

    opened ──hello──► challenged ──answer──► done
       └───────────────────┴── deadline ──► expired

Each question carries the ephemeral point of one stanza, blinded with a scalar that is drawn for this session, used once and
wiped. Which answer is right is decided by the stanza's authenticated encryption and by nothing else: it opens the file key,
or, where several operators are needed, what this one contributes (`unsealerd.core.sharing`). A drill ends there: what was
opened is wiped, and never leaves the session.
"""

import enum
import hmac
from collections.abc import Mapping, Sequence

import msgspec

from unsealerd.core.age import Recipient, Stanza, verify_mac
from unsealerd.core.blinding import Blinding
from unsealerd.core.rules import KnownOperator
from unsealerd.core.secret import SecretBuffer
from unsealerd.core.sharing import Backup
from unsealerd.errors import (
    AgeHeaderInvalid,
    AgeMacInvalid,
    AgeNoMatch,
    BackupDamaged,
    BadAnswer,
    BadMessage,
    NotAnOperator,
    SessionExpired,
)
from unsealerd.model import Curve, Purpose

PROTOCOL_VERSION = 1
LIFETIME = 120  # seconds
NONCE_SIZE = 32  # bytes
SESSION_ID_SIZE = 16  # bytes
TAG_SIZE = 16  # bytes
MAX_TAGS = 32
MAX_QUESTIONS = 64
ACCEPTED = "accepted"
"""The result of an answer that opened what it was asked for."""


class _Stage(enum.Enum):
    OPENED = "opened"
    CHALLENGED = "challenged"
    DONE = "done"


class Question(msgspec.Struct, frozen=True):
    tag: bytes
    curve: Curve
    point: bytes
    kdf: str | None = None
    """For who has a passphrase: how it becomes the private key."""


class Answer(msgspec.Struct, frozen=True):
    question: int
    x: bytes


class Outcome(msgspec.Struct, frozen=True):
    """``result`` is ``accepted`` or the name of an error."""

    question: int
    operator: str
    result: str


class Judgement(msgspec.Struct, frozen=True):
    """What came of the answers. The buffers are the caller's to wipe; after a drill there are none."""

    outcomes: tuple[Outcome, ...]
    file_key: SecretBuffer | None
    """Where one operator is enough, and an answer opened it. It matches the header."""
    shares: Mapping[int, SecretBuffer]
    """Where several are needed: what those contribute whose answers opened it, by their places in the list."""

    @property
    def accepted(self) -> tuple[str, ...]:
        """The operators of whom an answer was right."""
        return tuple(sorted({outcome.operator for outcome in self.outcomes if outcome.result == ACCEPTED}))

    @property
    def refused(self) -> tuple[str, ...]:
        """The operators of whom no answer was right."""
        return tuple(sorted({outcome.operator for outcome in self.outcomes}.difference(self.accepted)))


class _Pending(msgspec.Struct, frozen=True):
    operator: KnownOperator
    index: int
    """The operator's place in the list of the header, where there is one."""
    stanza: Stanza
    blinding: Blinding


def recipient_tag(nonce: bytes, subject: str, purpose: Purpose = Purpose.UNLOCK) -> bytes:
    """How an operator is named in one session: 16 bytes that say nothing to who does not know the subject.

    ``subject``: `KnownOperator.subject`. Bound to the operator's nonce, so that two sessions of one operator cannot be
    linked by it; and to the purpose, so that who loses that on the way finds nobody, instead of unlocking by a drill.
    """
    prefix = "" if purpose is Purpose.UNLOCK else f"{purpose.value}:"
    return hmac.digest(nonce, (prefix + subject.lower()).encode(), "sha256")[:TAG_SIZE]


def named(
    *,
    version: int,
    nonce: bytes,
    tags: Sequence[bytes],
    operators: Sequence[KnownOperator],
    backup: Backup,
    purpose: Purpose,
) -> tuple[tuple[bytes, int, KnownOperator], ...]:
    """Whom a hello names, with their tags and their places in the backup: all of it that costs next to nothing.

    Raises `BadMessage`, and `NotAnOperator` when it is nobody.
    """
    if version != PROTOCOL_VERSION or len(nonce) != NONCE_SIZE:
        raise BadMessage("not a hello of version 1")
    if not 0 < len(tags) <= MAX_TAGS or any(len(tag) != TAG_SIZE for tag in tags):
        raise BadMessage("malformed tags")
    offered = set(tags)
    found = tuple(
        (tag, index, operator)
        for index, operator in backup.members(operators)
        if (tag := recipient_tag(nonce, operator.subject, purpose)) in offered
    )
    if not found:
        raise _nobody()
    return found


def _nobody() -> NotAnOperator:
    return NotAnOperator("none of the offered identities is an operator with a stanza in the backup")


class UnlockSession:
    def __init__(self, session: bytes, opened: int) -> None:
        """``session``: `SESSION_ID_SIZE` random bytes. ``opened``: seconds of a monotonic clock."""
        self.id = session
        self.deadline = opened + LIFETIME
        self._stage = _Stage.OPENED
        self._pending: tuple[_Pending, ...] = ()
        self.backup: Backup | None = None
        self.purpose = Purpose.UNLOCK

    def hello(
        self,
        *,
        version: int,
        nonce: bytes,
        tags: Sequence[bytes],
        operators: Sequence[KnownOperator],
        backup: Backup,
        now: int,
        purpose: Purpose = Purpose.UNLOCK,
    ) -> tuple[Question, ...]:
        """The questions for whoever can answer for these tags. ``operators``: those that the configuration names.

        Raises `BadMessage`, `SessionExpired`, `BackupDamaged`, and `NotAnOperator` when there is nothing to ask.
        """
        self._require(_Stage.OPENED, now)
        pending: list[_Pending] = []
        questions: list[Question] = []
        for tag, index, operator in named(
            version=version, nonce=nonce, tags=tags, operators=operators, backup=backup, purpose=purpose
        ):
            for stanza, point in _addressed(operator.recipient, backup.stanzas(index)):
                if len(pending) == MAX_QUESTIONS:
                    break
                blinding = Blinding.draw(operator.recipient.curve, point)
                pending.append(_Pending(operator, index, stanza, blinding))
                questions.append(Question(tag, blinding.curve, blinding.point, operator.kdf))
        if not pending:
            raise _nobody()
        self._pending, self.backup, self.purpose = tuple(pending), backup, purpose
        self._stage = _Stage.CHALLENGED
        return tuple(questions)

    def answer(self, session: bytes, answers: Sequence[Answer], now: int) -> Judgement:
        """What the answers opened, and the outcome of each.

        Where one operator is enough, an operator whose key is X25519 is asked once for each X25519 stanza, since those
        carry no name: that some of its answers open nothing is not held against it. Raises `BadMessage`,
        `SessionExpired`, and `BackupDamaged` when the file key does not match the header.
        """
        self._require(_Stage.CHALLENGED, now)
        backup = self.backup
        if backup is None or not hmac.compare_digest(session, self.id):
            raise BadMessage("another session's answer")
        asked = {answer.question for answer in answers}
        if len(asked) != len(answers) or not asked or not asked <= set(range(len(self._pending))):
            raise BadMessage("answers to questions that were not asked")
        self._stage = _Stage.DONE
        opened: list[tuple[int, SecretBuffer]] = []
        outcomes: list[Outcome] = []
        keep = False
        try:
            for answer in answers:
                pending = self._pending[answer.question]
                result = ACCEPTED
                try:
                    opened.append((pending.index, _open(backup, pending, answer.x)))
                except BadAnswer as err:
                    result = err.name
                outcomes.append(Outcome(answer.question, pending.operator.name, result))
            if backup.split is None:
                for _, file_key in opened:
                    verify_mac(backup.header, file_key)
            keep = self.purpose is Purpose.UNLOCK
            return _judgement(backup, tuple(outcomes), opened if keep else [])
        except AgeMacInvalid as err:
            raise BackupDamaged("the header of the backup was changed") from err
        finally:
            if not keep:
                for _, content in opened:
                    content.close()
            self.close()

    def close(self) -> None:
        """Wipe what is left of the blinding."""
        self._stage = _Stage.DONE
        for pending in self._pending:
            pending.blinding.close()

    @property
    def operators(self) -> tuple[str, ...]:
        """The names of the operators who were asked."""
        return tuple(dict.fromkeys(pending.operator.name for pending in self._pending))

    def _require(self, stage: _Stage, now: int) -> None:
        if now >= self.deadline:
            self.close()
            raise SessionExpired("the session took too long")
        if self._stage is _Stage.DONE:
            raise SessionExpired("the session is over")
        if self._stage is not stage:
            raise BadMessage(f"not in the stage {stage.value}")


def _addressed(recipient: Recipient, stanzas: Sequence[Stanza]) -> list[tuple[Stanza, bytes]]:
    """The stanzas that may be the recipient's, with their ephemeral points."""
    found: list[tuple[Stanza, bytes]] = []
    for stanza in stanzas:
        try:
            point = recipient.ephemeral(stanza)
        except AgeHeaderInvalid as err:
            raise BackupDamaged(f"a stanza of the backup is malformed: {err.detail}") from err
        if point is not None:
            found.append((stanza, point))
    return found


def _open(backup: Backup, pending: _Pending, x: bytes) -> SecretBuffer:
    """The file key, or what the operator contributes to it. Raises `BadAnswer`."""
    with pending.blinding.unblind(x) as shared:
        try:
            wrapped = pending.operator.recipient.unwrap(pending.stanza, shared)
            if backup.split is None:
                return wrapped
            with wrapped:
                return backup.split.open_share(pending.index, wrapped)
        except AgeNoMatch as err:
            raise BadAnswer("the answer does not open the stanza") from err


def _judgement(
    backup: Backup, outcomes: tuple[Outcome, ...], opened: Sequence[tuple[int, SecretBuffer]]
) -> Judgement:
    if backup.split is not None:
        return Judgement(outcomes, None, dict(opened))
    for _, spare in opened[1:]:
        spare.close()
    return Judgement(outcomes, opened[0][1] if opened else None, {})
