"""Verification of who asks and of what is asked, before a private key is used.

The operator's key must be no oracle. A private key is applied in one place, `VerifiedQuestion.answer`, and a
`VerifiedQuestion` comes from `verify` alone: what a host says is a `Challenge`, which cannot be answered.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final, NoReturn, final

import msgspec

from unsealerd.core import session as protocol
from unsealerd.core.age import Identity, P256Identity, X25519Identity
from unsealerd.core.blinding import validate_point
from unsealerd.core.conversation import Answer, Challenge, Question
from unsealerd.core.rules import passphrase_subject
from unsealerd.core.words import session_words
from unsealerd.errors import BadMessage, BadPoint, BadRequest, HostMismatch, LimitExceeded
from unsealerd.model import Curve, Purpose
from unsealerd.operator.events import Exchanging, OnEvent
from unsealerd.operator.hosts import Trust
from unsealerd.operator.identities.passphrase import PassphraseOperator

# What the host says is shown on a terminal: no control characters, no look-alikes.
_LOCK_REASON = re.compile(r"[a-z0-9_]{0,64}")
_BOOT_ID = re.compile(r"[0-9a-f-]{0,64}")
_HOST_NAME = re.compile(r"[!-~]{0,64}")
_MAX_NUMBER = 1 << 53  # above it JSON programs lose digits; no honest time or generation comes near


# --- what a host shows


class TlsPin(msgspec.Struct, frozen=True):
    """It holds the TLS key with this fingerprint (32 bytes), as it says itself."""

    fingerprint: bytes


class NoEvidence(msgspec.Struct, frozen=True):
    """Nothing, or a kind that this version does not know."""


Evidence = TlsPin | NoEvidence


# --- what the operator expects


class KnownHost(msgspec.Struct, frozen=True):
    """The entry of the host, over a connection that stands on exactly the pinned certificate."""

    name: str
    fingerprint: bytes
    trust: Trust


class LocalSocket(msgspec.Struct, frozen=True):
    """The daemon's own socket: the file system says who owns it, and the evidence of a network host has no meaning."""


Expectation = KnownHost | LocalSocket
Offered = Identity | PassphraseOperator


def subject(offered: Offered) -> str:
    """What an identity is called in a session: its recipient, or whose passphrase it is."""
    if isinstance(offered, PassphraseOperator):
        return passphrase_subject(offered.name)
    return str(offered.recipient)


class Offer(msgspec.Struct, frozen=True):
    """What the hello says the operator can answer for."""

    nonce: bytes
    identities: Mapping[bytes, Offered]
    """By tag."""
    purpose: Purpose = Purpose.UNLOCK

    @classmethod
    def make(cls, nonce: bytes, identities: Iterable[Offered], purpose: Purpose = Purpose.UNLOCK) -> "Offer":
        """Each recipient once. Raises `BadRequest` for no identity, `LimitExceeded` for too many."""
        tags = {protocol.recipient_tag(nonce, subject(each), purpose): each for each in identities}
        if not tags:
            raise BadRequest("no identity to answer with")
        if len(tags) > protocol.MAX_TAGS:
            raise LimitExceeded(f"more than {protocol.MAX_TAGS} identities")
        return cls(nonce, tags, purpose)


# --- what only `verify` makes

_BY_VERIFY: Final = object()


class _MadeByVerify:
    __slots__ = ()

    def __reduce__(self) -> NoReturn:
        raise TypeError("what was verified here is not verified elsewhere")


@final
class VerifiedQuestion(_MadeByVerify):
    """A valid point from a verified host, for an identity that was offered."""

    __slots__ = ("_index", "_kdf", "_offered", "_point")

    def __init__(self, by: object, index: int, offered: Offered, point: bytes, kdf: str | None) -> None:
        if by is not _BY_VERIFY:
            raise TypeError("only verify() makes a VerifiedQuestion")
        self._index = index
        self._offered = offered
        self._point = point
        self._kdf = kdf

    @property
    def index(self) -> int:
        """Its place in the challenge."""
        return self._index

    @property
    def recipient(self) -> str:
        """Or ``passphrase:NAME``: then nobody knows the recipient before the passphrase is entered."""
        return subject(self._offered)

    @property
    def silent(self) -> bool:
        """Whether the key answers without asking the person for anything: it comes from a file, which was read before."""
        return isinstance(self._offered, P256Identity | X25519Identity)

    def answer(self, on_event: OnEvent) -> Answer:
        """Use the private key. May prompt for a PIN or a passphrase, or wait for a touch. Raises what the identity raises."""
        on_event(Exchanging(self.recipient))
        with self._identity().exchange(self._point) as x:
            # Not secret from the wire: without the server's blinding it opens nothing.
            return Answer(self._index, bytes(x.view))

    def _identity(self) -> Identity:
        if not isinstance(self._offered, PassphraseOperator):
            return self._offered
        if self._kdf is None:  # `verify` has seen to it
            raise BadMessage("a question for a passphrase without the parameters")
        return self._offered.identity(self._kdf)


@final
class VerifiedChallenge(_MadeByVerify):
    """What a verified host asks and says."""

    __slots__ = ("_facts", "_questions", "_words")

    def __init__(
        self, by: object, facts: Challenge, questions: tuple[VerifiedQuestion, ...], words: tuple[str, ...]
    ) -> None:
        if by is not _BY_VERIFY:
            raise TypeError("only verify() makes a VerifiedChallenge")
        self._facts = facts
        self._questions = questions
        self._words = words

    @property
    def facts(self) -> Challenge:
        """The challenge itself, its strings checked: printable ASCII."""
        return self._facts

    @property
    def questions(self) -> tuple[VerifiedQuestion, ...]:
        return self._questions

    @property
    def words(self) -> tuple[str, ...]:
        return self._words


def verify(
    expected: Expectation, offer: Offer, challenge: Challenge, evidence: Evidence
) -> VerifiedChallenge:
    """Check who asks, then everything that is asked; all of it, before the first answer.

    Raises `HostMismatch` when the evidence is not the expected host's, `BadMessage` and `BadPoint` for what no honest
    host sends.
    """
    _verify_host(expected, evidence)
    _verify_facts(challenge)
    questions = tuple(_verified(offer, challenge, index) for index in range(len(challenge.questions)))
    _verify_numbers(offer, challenge)
    words = session_words(
        challenge.session, offer.nonce, tuple(question.point for question in challenge.questions)
    )
    return VerifiedChallenge(_BY_VERIFY, challenge, questions, words)


def _verify_host(expected: Expectation, evidence: Evidence) -> None:
    match expected:
        case LocalSocket():
            return
        case KnownHost(trust=Trust.TPM):
            # Fails closed until this version can verify a quote.
            raise HostMismatch(f"{expected.name} must show a TPM quote, which this version cannot verify")
        case KnownHost(trust=Trust.TLS):
            # The handshake has shown the key already. A gateway that believes it serves another key is misconfigured.
            if not isinstance(evidence, TlsPin) or evidence.fingerprint != expected.fingerprint:
                raise HostMismatch(f"{expected.name} does not show the TLS key that was pinned")


def _verify_facts(challenge: Challenge) -> None:
    if len(challenge.session) != protocol.SESSION_ID_SIZE:
        raise BadMessage(f"a session id of {len(challenge.session)} bytes")
    if not 0 < len(challenge.questions) <= protocol.MAX_QUESTIONS:
        raise BadMessage(f"{len(challenge.questions)} questions in one challenge")
    if not 0 < challenge.deadline <= protocol.LIFETIME:
        raise BadMessage(f"a session of {challenge.deadline} seconds")
    texts = (
        (challenge.lock_reason, _LOCK_REASON),
        (challenge.boot_id, _BOOT_ID),
        (challenge.host_name, _HOST_NAME),
    )
    if not all(pattern.fullmatch(text) for text, pattern in texts):
        raise BadMessage("a challenge with text that is not fit to be shown")
    numbers = (challenge.uptime, challenge.backup_time, challenge.generation or 0)
    shares = (challenge.shares_present, challenge.shares_needed)
    if not all(0 <= number < _MAX_NUMBER for number in (*numbers, *shares)):
        raise BadMessage("a challenge with impossible numbers")


def _verify_numbers(offer: Offer, challenge: Challenge) -> None:
    """How often one identity is asked. Raises `BadMessage`.

    Each answer is one use of the private key, and a host that was broken into may have brought the point from the backup of
    another. On P-256 a stanza says whose it is (but for one pair in 2^32), and a passphrase is asked for where there is a list:
    once. Two salts would be worth two guesses, too. An X25519 stanza says nothing, so a key file is asked about each of them.
    """
    asked = Counter(question.tag for question in challenge.questions)
    for tag, times in asked.items():
        offered = offer.identities[tag]
        if times > 1 and (
            isinstance(offered, PassphraseOperator) or offered.recipient.curve is not Curve.X25519
        ):
            raise BadMessage(
                f"{subject(offered)} is asked {times} times in one session, which no honest host does"
            )


def _verified(offer: Offer, challenge: Challenge, index: int) -> VerifiedQuestion:
    question = challenge.questions[index]
    offered = offer.identities.get(question.tag)
    if offered is None:
        raise BadMessage("a question for somebody else")
    if question.curve is not _curve(offered, question):
        raise BadPoint("a question on another curve than the identity's")
    validate_point(question.curve, question.point)
    return VerifiedQuestion(_BY_VERIFY, index, offered, question.point, question.kdf)


def _curve(offered: Offered, question: Question) -> Curve:
    """The curve of the identity. Raises `BadMessage` for parameters of a passphrase that are missing, bad, or out of place."""
    if not isinstance(offered, PassphraseOperator):
        if question.kdf is not None:
            raise BadMessage("the parameters of a passphrase for who has a key")
        return offered.recipient.curve
    from unsealerd.core.passphrase import Parameters

    try:
        Parameters.parse(question.kdf or "")
    except BadRequest as err:
        raise BadMessage(f"{subject(offered)}: {err.detail}") from err
    return Curve.X25519
