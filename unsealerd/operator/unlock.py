"""The unlock client: hello, challenge, verification, answer, result, over any `Conversation`.

A drill is the same conversation for another purpose: the host checks the answers and forgets what they opened.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable

import msgspec

from unsealerd.core import session as protocol
from unsealerd.core.conversation import AnswerCall, HelloCall, Result
from unsealerd.errors import BadAnswer, BadMessage, BadRequest, named
from unsealerd.model import Purpose, State
from unsealerd.operator.conversation import Conversation
from unsealerd.operator.events import Challenged, OnEvent, TlsOnly, ignore
from unsealerd.operator.evidence import KnownHost, Offer, Offered, VerifiedChallenge, VerifiedQuestion, verify
from unsealerd.operator.hosts import Trust

MAX_REASON = 256
"""Characters."""
MAX_NAMES = 255
"""Of operators, in a result."""

# What the host says is shown on a terminal.
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_MAX_NUMBER = 1 << 32


class Outcome(msgspec.Struct, frozen=True):
    """What came of it. At least one recipient was accepted."""

    state: State
    shares_present: int
    shares_needed: int
    accepted: tuple[str, ...]
    """Recipients; or ``passphrase:NAME``."""
    refused: tuple[tuple[str, str], ...]
    """Recipients with the name of an error, where no answer was accepted."""
    words: tuple[str, ...]
    operators_answered: tuple[str, ...] = ()
    """Where several are needed: the names of who has answered so far."""
    operators_missing: tuple[str, ...] = ()
    """The names of who has not, and could."""
    seconds_left: int | None = None
    """Until the answers so far are forgotten; None: nothing waits for another operator."""


def unlock(
    conversation: Conversation,
    identities: Iterable[Offered],
    *,
    reason: str = "",
    accept_rollback: bool = False,
    on_event: OnEvent = ignore,
) -> Outcome:
    """Hold one session, and answer whatever a verified host asks. The host may need other operators, too.

    ``reason``: for the host's audit log, `MAX_REASON` characters. Raises `BadAnswer` if no answer was accepted, what
    `verify`, the identities and the conversation raise, and the error that the host names.
    """
    if len(reason) > MAX_REASON:
        raise BadRequest(f"a reason has at most {MAX_REASON} characters")
    offer = Offer.make(os.urandom(protocol.NONCE_SIZE), identities)
    return _converse(conversation, offer, reason, accept_rollback, on_event)


def drill(
    conversation: Conversation, identities: Iterable[Offered], *, on_event: OnEvent = ignore
) -> Outcome:
    """Prove that these identities still open the host's current backup. Nothing is unlocked by it.

    Raises what `unlock` raises.
    """
    offer = Offer.make(os.urandom(protocol.NONCE_SIZE), identities, Purpose.DRILL)
    return _converse(conversation, offer, "", accept_rollback=False, on_event=on_event)


def _converse(
    conversation: Conversation, offer: Offer, reason: str, accept_rollback: bool, on_event: OnEvent
) -> Outcome:
    expected = conversation.expected
    hello = HelloCall(
        protocol.PROTOCOL_VERSION, offer.nonce, tuple(offer.identities), peer="", purpose=offer.purpose
    )
    challenge = verify(expected, offer, *conversation.hello(hello))
    match expected:
        case KnownHost(trust=Trust.TLS):
            on_event(TlsOnly(expected.name))
    on_event(_challenged(challenge))
    answers = tuple(question.answer(on_event) for question in challenge.questions)
    result = conversation.answer(AnswerCall(challenge.facts.session, answers, reason, accept_rollback))
    return _outcome(result, challenge.questions, challenge.words)


def _challenged(challenge: VerifiedChallenge) -> Challenged:
    times = Counter(question.recipient for question in challenge.questions)
    return Challenged(
        challenge.facts,
        challenge.words,
        max(times.values()),
        all(question.silent for question in challenge.questions),
    )


def _outcome(result: Result, questions: tuple[VerifiedQuestion, ...], words: tuple[str, ...]) -> Outcome:
    """Outcomes by recipient: one accepted answer is enough, since X25519 stanzas do not say whose they are."""
    accepted: dict[str, None] = {}
    refused: dict[str, str] = {}
    for outcome in result.outcomes:
        if not 0 <= outcome.question < len(questions):
            raise BadMessage("the outcome of a question that was not asked")
        recipient = questions[outcome.question].recipient
        if outcome.result == protocol.ACCEPTED:
            accepted[recipient] = None
        elif named(outcome.result) is None:
            raise BadMessage("an outcome without a known name")
        else:
            refused[recipient] = outcome.result
    if not accepted:
        raise BadAnswer("no answer opened the backup")
    _check(result)
    return Outcome(
        result.state,
        result.shares_present,
        result.shares_needed,
        tuple(accepted),
        tuple((recipient, name) for recipient, name in refused.items() if recipient not in accepted),
        words,
        result.answered,
        result.missing,
        result.seconds_left,
    )


def _check(result: Result) -> None:
    """Raises `BadMessage` for what is not fit to be shown."""
    names = (*result.answered, *result.missing)
    if len(names) > MAX_NAMES or not all(_NAME.fullmatch(name) for name in names):
        raise BadMessage("a result with names that are not operators'")
    numbers = (result.shares_present, result.shares_needed, result.seconds_left or 0)
    if not all(0 <= number < _MAX_NUMBER for number in numbers):
        raise BadMessage("a result with impossible numbers")
