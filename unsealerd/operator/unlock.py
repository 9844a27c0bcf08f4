"""The unlock client: hello, challenge, verification, answer, result, over any `Conversation`."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from unsealerd.core import session as protocol
from unsealerd.core.age import Identity
from unsealerd.core.conversation import AnswerCall, HelloCall, Result
from unsealerd.errors import BadAnswer, BadMessage, BadRequest, named
from unsealerd.model import State
from unsealerd.operator.conversation import Conversation
from unsealerd.operator.events import Challenged, OnEvent, TlsOnly, ignore
from unsealerd.operator.evidence import KnownHost, Offer, VerifiedQuestion, verify
from unsealerd.operator.hosts import Trust

MAX_REASON = 256
"""Characters."""
ACCEPTED = "accepted"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it. At least one recipient was accepted."""

    state: State
    shares_present: int
    shares_needed: int
    accepted: tuple[str, ...]
    """Recipients."""
    refused: tuple[tuple[str, str], ...]
    """Recipients with the name of an error, where no answer was accepted."""
    words: tuple[str, ...]


def unlock(
    conversation: Conversation,
    identities: Iterable[Identity],
    *,
    reason: str = "",
    accept_rollback: bool = False,
    on_event: OnEvent = ignore,
) -> Outcome:
    """Hold one session, and answer whatever a verified host asks.

    ``reason``: for the host's audit log, `MAX_REASON` characters. Raises `BadAnswer` if no answer was accepted, what
    `verify`, the identities and the conversation raise, and the error that the host names.
    """
    if len(reason) > MAX_REASON:
        raise BadRequest(f"a reason has at most {MAX_REASON} characters")
    offer = Offer.make(os.urandom(protocol.NONCE_SIZE), identities)
    expected = conversation.expected
    hello = HelloCall(protocol.PROTOCOL_VERSION, offer.nonce, tuple(offer.identities), peer="")
    challenge = verify(expected, offer, *conversation.hello(hello))
    match expected:
        case KnownHost(trust=Trust.TLS):
            on_event(TlsOnly(expected.name))
    on_event(Challenged(challenge.facts, challenge.words))
    answers = tuple(question.answer(on_event) for question in challenge.questions)
    result = conversation.answer(AnswerCall(challenge.facts.session, answers, reason, accept_rollback))
    return _outcome(result, challenge.questions, challenge.words)


def _outcome(result: Result, questions: tuple[VerifiedQuestion, ...], words: tuple[str, ...]) -> Outcome:
    """Outcomes by recipient: one accepted answer is enough, since X25519 stanzas do not say whose they are."""
    accepted: dict[str, None] = {}
    refused: dict[str, str] = {}
    for outcome in result.outcomes:
        if not 0 <= outcome.question < len(questions):
            raise BadMessage("the outcome of a question that was not asked")
        recipient = questions[outcome.question].recipient
        if outcome.result == ACCEPTED:
            accepted[recipient] = None
        elif named(outcome.result) is None:
            raise BadMessage("an outcome without a known name")
        else:
            refused[recipient] = outcome.result
    if not accepted:
        raise BadAnswer("no answer opened the backup")
    return Outcome(
        result.state,
        result.shares_present,
        result.shares_needed,
        tuple(accepted),
        tuple((recipient, name) for recipient, name in refused.items() if recipient not in accepted),
        words,
    )
