"""A host in this process: the core's unlock session behind the operator's conversation, without a daemon or a wire."""

import os
import time
from collections.abc import Callable

from unsealerd.core import session as core
from unsealerd.core.age import Recipient, encrypt, parse_header
from unsealerd.core.conversation import AnswerCall, Challenge, HelloCall, Outcome, Question, Result
from unsealerd.core.rules import KnownOperator
from unsealerd.core.secret import SecretBuffer
from unsealerd.core.sharing import Backup
from unsealerd.model import State
from unsealerd.operator.evidence import Evidence, Expectation, LocalSocket, NoEvidence


class MemoryHost:
    """One session with a host whose fresh backup opens to any of these recipients.

    ``opened``: the file key that came of it. ``disguise``: what a hostile host sends in place of a question's point.
    """

    def __init__(self, *recipients: Recipient, disguise: Callable[[bytes], bytes] | None = None) -> None:
        self.file_key = os.urandom(16)
        self.opened: bytes | None = None
        self._disguise = disguise
        self._operators = [KnownOperator(f"operator-{n}", each) for n, each in enumerate(recipients)]
        with SecretBuffer.copy_of(self.file_key) as file_key:
            self._header = parse_header(encrypt(memoryview(b"keyring"), file_key, list(recipients)))
        self._session = core.UnlockSession(os.urandom(16), _now())

    @property
    def expected(self) -> Expectation:
        return LocalSocket()

    def hello(self, call: HelloCall) -> tuple[Challenge, Evidence]:
        asked = self._session.hello(
            version=call.version,
            nonce=call.nonce,
            tags=call.tags,
            operators=self._operators,
            backup=Backup.of(self._header),
            now=_now(),
            purpose=call.purpose,
        )
        disguise = self._disguise or (lambda point: point)
        questions = tuple(Question(each.tag, each.curve, disguise(each.point)) for each in asked)
        return Challenge(
            session=self._session.id,
            questions=questions,
            lock_reason="unexpected_reboot",
            boot_id="0" * 32,
            host_name="host",
            uptime=1,
            backup_time=1,
            shares_present=0,
            shares_needed=1,
            deadline=core.LIFETIME,
        ), NoEvidence()

    def answer(self, call: AnswerCall) -> Result:
        answers = [core.Answer(each.question, each.x) for each in call.answers]
        judgement = self._session.answer(call.session, answers, _now())
        if judgement.file_key is not None:
            with judgement.file_key as file_key:
                self.opened = bytes(file_key.view)
        outcomes = tuple(Outcome(each.question, each.result) for each in judgement.outcomes)
        state = State.UNLOCKED if self.opened is not None else State.LOCKED
        return Result(state, int(self.opened is not None), 1, outcomes)


def _now() -> int:
    return int(time.monotonic())
