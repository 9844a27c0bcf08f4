"""What a host says is there to be read before a key answers: where nothing else makes the person wait, they are asked."""

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from unsealerd.cli import terminal
from unsealerd.cli.unlock import _asking
from unsealerd.core.age import P256Identity, Recipient, X25519Identity
from unsealerd.core.conversation import AnswerCall, Challenge, HelloCall, Question, Result
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import BadAnswer, BadRequest
from unsealerd.operator.conversation import Conversation
from unsealerd.operator.events import Challenged, Event
from unsealerd.operator.evidence import Evidence, Expectation, LocalSocket, NoEvidence, Offered
from unsealerd.operator.unlock import unlock

OTHER = P256Identity(ec.generate_private_key(ec.SECP256R1()))


class Card:
    """Would ask for its PIN."""

    def __init__(self) -> None:
        self._key = P256Identity(ec.generate_private_key(ec.SECP256R1()))
        self.recipient: Recipient = self._key.recipient

    def exchange(self, point: bytes) -> SecretBuffer:
        return self._key.exchange(point)


class Asking(Conversation):
    """A host that asks whoever comes, X25519 keys ``times``, and accepts nothing."""

    def __init__(self, identities: list[Offered], times: int = 1) -> None:
        self._identities = identities
        self._times = times
        self.answered = False

    @property
    def expected(self) -> Expectation:
        return LocalSocket()

    def hello(self, call: HelloCall) -> tuple[Challenge, Evidence]:
        questions = []
        for tag, identity in zip(call.tags, self._identities, strict=True):
            if isinstance(identity, X25519Identity):
                point = X25519Identity.generate().recipient.public
                questions += [Question(tag, identity.recipient.curve, point)] * self._times
            else:
                questions.append(Question(tag, OTHER.recipient.curve, OTHER.recipient.uncompressed))
        return Challenge(bytes(16), tuple(questions), "first_boot", "", "web1", 1, 1, 0, 1, 120), NoEvidence()

    def answer(self, call: AnswerCall) -> Result:
        self.answered = True
        raise BadAnswer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A person at a terminal who says no."""
    questions: list[str] = []

    def confirm(question: str) -> bool:
        questions.append(question)
        return False

    monkeypatch.setattr(terminal, "attended", lambda: True)
    monkeypatch.setattr(terminal, "confirm", confirm)
    return questions


def try_with(identities: list[Offered], times: int = 1) -> tuple[bool, list[Event]]:
    """Whether the host was answered, and what was shown."""
    host, events = Asking(identities, times), list[Event]()
    with pytest.raises((BadAnswer, BadRequest)):
        unlock(host, identities, on_event=_asking(events.append))
    return host.answered, events


@pytest.mark.promise(5)
@pytest.mark.parametrize("key", [X25519Identity.generate(), OTHER])
def test_a_key_file_waits_for_a_word_of_the_person(asked: list[str], key: Offered) -> None:
    answered, events = try_with([key])
    assert (answered, asked) == (False, ["Answer?"])
    assert [type(event) for event in events] == [Challenged]  # shown before, and no key was used


def test_a_card_makes_the_person_wait_by_itself(asked: list[str]) -> None:
    assert try_with([Card()])[0]
    assert try_with([X25519Identity.generate(), Card()])[0]
    assert asked == []


def test_nobody_is_asked_where_nobody_sits(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "attended", lambda: False)
    assert try_with([X25519Identity.generate()])[0]
    assert asked == []


def test_how_often_a_key_is_asked_is_told(asked: list[str]) -> None:
    _, (event,) = try_with([X25519Identity.generate()], times=5)
    assert isinstance(event, Challenged)
    assert event.times == 5
