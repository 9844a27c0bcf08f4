"""One unlock session, as the server sees it: hello, challenge, answer, result. No I/O; time is passed in.

::

    opened ──hello──► challenged ──answer──► done
       └───────────────────┴── deadline ──► expired

Each question carries the ephemeral point of one stanza, blinded with a scalar that is drawn for this session, used once and
wiped. Which answer is right is decided by the stanza's authenticated encryption and by nothing else.
"""

import enum
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from unsealerd.core.age import Header, Recipient, Stanza, verify_mac
from unsealerd.core.blinding import Blinding
from unsealerd.core.secret import SecretBuffer
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
from unsealerd.model import Curve

PROTOCOL_VERSION = 1
LIFETIME = 120  # seconds
NONCE_SIZE = 32  # bytes
SESSION_ID_SIZE = 16  # bytes
TAG_SIZE = 16  # bytes
MAX_TAGS = 32
MAX_QUESTIONS = 64


class _Stage(enum.Enum):
    OPENED = "opened"
    CHALLENGED = "challenged"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class KnownOperator:
    name: str
    recipient: Recipient


@dataclass(frozen=True, slots=True)
class Question:
    tag: bytes
    curve: Curve
    point: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    question: int
    x: bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """``result`` is ``accepted`` or the name of an error."""

    question: int
    operator: str
    result: str


@dataclass(frozen=True, slots=True)
class _Pending:
    operator: KnownOperator
    stanza: Stanza
    blinding: Blinding


def recipient_tag(nonce: bytes, recipient: str) -> bytes:
    """How a recipient is named in one session: 16 bytes that say nothing to who does not know the recipient.

    Bound to the operator's nonce, so that two sessions of one operator cannot be linked by it.
    """
    return hmac.digest(nonce, recipient.lower().encode(), "sha256")[:TAG_SIZE]


class UnlockSession:
    def __init__(self, session: bytes, opened: int) -> None:
        """``session``: `SESSION_ID_SIZE` random bytes. ``opened``: seconds of a monotonic clock."""
        self.id = session
        self.deadline = opened + LIFETIME
        self._stage = _Stage.OPENED
        self._pending: tuple[_Pending, ...] = ()
        self._header: Header | None = None

    def hello(
        self,
        *,
        version: int,
        nonce: bytes,
        tags: Sequence[bytes],
        operators: Sequence[KnownOperator],
        header: Header,
        now: int,
    ) -> tuple[Question, ...]:
        """The questions for whoever can answer for these tags.

        Raises `BadMessage`, `SessionExpired`, and `NotAnOperator` when there is nothing to ask.
        """
        self._require(_Stage.OPENED, now)
        if version != PROTOCOL_VERSION or len(nonce) != NONCE_SIZE:
            raise BadMessage("not a hello of version 1")
        if not 0 < len(tags) <= MAX_TAGS or any(len(tag) != TAG_SIZE for tag in tags):
            raise BadMessage("malformed tags")
        offered = set(tags)
        pending: list[_Pending] = []
        questions: list[Question] = []
        for operator in operators:
            tag = recipient_tag(nonce, str(operator.recipient))
            if tag not in offered:
                continue
            for stanza, point in _addressed(operator.recipient, header):
                if len(pending) == MAX_QUESTIONS:
                    break
                blinding = Blinding.draw(operator.recipient.curve, point)
                pending.append(_Pending(operator, stanza, blinding))
                questions.append(Question(tag, blinding.curve, blinding.point))
        if not pending:
            raise NotAnOperator("none of the offered identities is an operator with a stanza in the backup")
        self._pending = tuple(pending)
        self._header = header
        self._stage = _Stage.CHALLENGED
        return tuple(questions)

    def answer(
        self, session: bytes, answers: Sequence[Answer], now: int
    ) -> tuple[SecretBuffer | None, tuple[Outcome, ...]]:
        """The file key, if one answer opened its stanza, and the outcome of every answer.

        An operator whose key is X25519 is asked once for each X25519 stanza, since those carry no name: that
        some of its answers open nothing is not held against it. Raises `BadMessage`, `SessionExpired`, and
        `BackupDamaged` when the file key does not match the header.
        """
        self._require(_Stage.CHALLENGED, now)
        header = self._header
        if header is None or not hmac.compare_digest(session, self.id):
            raise BadMessage("another session's answer")
        asked = {answer.question for answer in answers}
        if len(asked) != len(answers) or not asked or not asked <= set(range(len(self._pending))):
            raise BadMessage("answers to questions that were not asked")
        self._stage = _Stage.DONE
        file_key: SecretBuffer | None = None
        outcomes: list[Outcome] = []
        try:
            for answer in answers:
                pending = self._pending[answer.question]
                result = "accepted"
                try:
                    opened = _open(pending, answer.x)
                except BadAnswer as err:
                    result = err.name
                else:
                    if file_key is None:
                        file_key = opened
                    else:
                        opened.close()
                outcomes.append(Outcome(answer.question, pending.operator.name, result))
            if file_key is not None:
                verify_mac(header, file_key)
        except AgeMacInvalid as err:
            if file_key is not None:
                file_key.close()
            raise BackupDamaged("the header of the backup was changed") from err
        finally:
            self.close()
        return file_key, tuple(outcomes)

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


def _addressed(recipient: Recipient, header: Header) -> list[tuple[Stanza, bytes]]:
    """The stanzas that may be the recipient's, with their ephemeral points."""
    found: list[tuple[Stanza, bytes]] = []
    for stanza in header.stanzas:
        try:
            point = recipient.ephemeral(stanza)
        except AgeHeaderInvalid as err:
            raise BackupDamaged(f"a stanza of the backup is malformed: {err.detail}") from err
        if point is not None:
            found.append((stanza, point))
    return found


def _open(pending: _Pending, x: bytes) -> SecretBuffer:
    with pending.blinding.unblind(x) as shared:
        try:
            return pending.operator.recipient.unwrap(pending.stanza, shared)
        except AgeNoMatch as err:
            raise BadAnswer("the answer does not open the stanza") from err
