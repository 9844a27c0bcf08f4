"""Varlink interfaces: what methods there are, how parameters are read and errors are written.

https://varlink.org/Service and https://varlink.org/Interface-Definition. The descriptions in ``interfaces/*.varlink``
are normative.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from unsealerd.errors import BadRequest, UnsealerdError

# bytes: a whole reply as `error_reply` makes it, the NUL included.
Result = msgspec.Struct | dict[str, Any] | bytes | None
# (connection, parameters) -> result. The first is a `Connection`; spelled loosely, for the two would import each other.
Handler = Callable[[Any, Any], Result | Awaitable[Result]]

_UNKNOWN_FIELD = re.compile(r"unknown field `([^`]*)`")
_MISSING_FIELD = re.compile(r"missing required field `([^`]*)`")
_AT_PATH = re.compile(r" at `\$\.([^`.\[]+)")


class Empty(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No parameters."""


class Method(msgspec.Struct, frozen=True):
    """`parameters` must be a Struct with ``forbid_unknown_fields``.

    It must have no ``msgspec.Raw`` in it, which would point into a buffer that is shared by all connections.
    `handler` returns the result, None for an empty one, or an awaitable of it: then later messages of the
    connection wait. `streams`: callable only with ``more``; the handler takes ``connection.stream()`` and returns None.
    """

    parameters: type[msgspec.Struct]
    handler: Handler
    streams: bool = False

    def __post_init__(self) -> None:
        if not self.parameters.__struct_config__.forbid_unknown_fields:
            raise TypeError(f"{self.parameters.__name__} would accept unknown fields")


def load_description(name: str) -> str:
    """The text of ``interfaces/NAME.varlink``."""
    from importlib import resources  # lazily: nobody asks for it in normal operation

    return (resources.files("unsealerd.daemon") / "interfaces" / f"{name}.varlink").read_text("utf-8")


class Interface(msgspec.Struct):
    """One interface that a server offers.

    `description` is loaded from the package when it is first asked for, unless given. `details`: errors carry
    ``{"detail": str}`` for an administrator; otherwise a peer is told the name and no more. `malformed` is the error for what
    is not a Varlink call at all.
    """

    name: str
    methods: Mapping[str, Method]
    details: bool = False
    malformed: type[UnsealerdError] = BadRequest
    description: str | None = None
    _errors: dict[str, bytes] = {}  # a new one for each interface

    def text(self) -> str:
        if self.description is None:
            self.description = load_description(self.name)
        return self.description

    def declares(self, method: str) -> bool:
        """Whether the description has this method, implemented or not."""
        return re.search(rf"^method\s+{re.escape(method)}\s*\(", self.text(), re.MULTILINE) is not None

    def error(self, error: UnsealerdError) -> bytes:
        """The whole reply for an error, its NUL included."""
        name = f"{self.name}.{error.name}"
        if self.details:
            return error_reply(name, {"detail": error.detail})
        reply = self._errors.get(name)
        if reply is None:
            reply = self._errors[name] = error_reply(name, {})
        return reply


def error_reply(name: str, parameters: Mapping[str, str]) -> bytes:
    return msgspec.json.encode({"error": name, "parameters": parameters}) + b"\0"


def bad_parameter(err: Exception) -> str:
    """The name of the parameter that the decoder refused, or ``parameters`` if it was none in particular."""
    text = str(err)
    nested = _AT_PATH.search(text)
    found = nested or _UNKNOWN_FIELD.search(text) or _MISSING_FIELD.search(text)
    return found[1] if found else "parameters"
