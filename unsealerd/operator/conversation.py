"""The conversation with a host, whatever carries it: a port with two methods."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec

from unsealerd.core.conversation import INTERFACE, AnswerCall, Challenge, HelloCall, HelloReply, Result
from unsealerd.errors import BadMessage
from unsealerd.operator.evidence import Evidence, Expectation, LocalSocket, NoEvidence

_T = TypeVar("_T")

VarlinkCall = Callable[[str, dict[str, object]], dict[str, object]]
"""Method with its interface, parameters → parameters of the reply. Raises the named errors."""


class Conversation(Protocol):
    """One session: `hello`, then at most one `answer`. Both raise the error that the host names, and `BadMessage`."""

    @property
    def expected(self) -> Expectation:
        """Who must be at the other end."""

    def hello(self, call: HelloCall) -> tuple[Challenge, Evidence]: ...

    def answer(self, call: AnswerCall) -> Result: ...


class VarlinkConversation:
    """The conversation at the console, over the daemon's own socket."""

    def __init__(self, call: VarlinkCall) -> None:
        """``call``: calls on one connection, which is the caller's to open and to close."""
        self._call = call

    @property
    def expected(self) -> Expectation:
        return LocalSocket()

    def hello(self, call: HelloCall) -> tuple[Challenge, Evidence]:
        return self._converted("Hello", call, HelloReply).challenge, NoEvidence()

    def answer(self, call: AnswerCall) -> Result:
        return self._converted("Answer", call, Result)

    def _converted(self, method: str, call: msgspec.Struct, reply: type[_T]) -> _T:
        parameters: dict[str, object] = msgspec.to_builtins(call)
        try:
            return msgspec.convert(self._call(f"{INTERFACE}.{method}", parameters), reply)
        except msgspec.ValidationError as err:
            raise BadMessage(f"an answer to {method} that is not {INTERFACE}'s") from err
