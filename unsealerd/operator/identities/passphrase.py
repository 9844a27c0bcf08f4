"""A passphrase as an operator's identity: it is asked for when a verified host has sent this operator's parameters.

The tool cannot know the recipient before that, so this is no `Identity` but makes one.
"""

from typing import TYPE_CHECKING

from unsealerd.core.age import Identity
from unsealerd.errors import BadMessage, BadRequest

if TYPE_CHECKING:
    from unsealerd.operator.prompts import Prompts

SCHEME = "passphrase"


class PassphraseOperator:
    """The operator of that name, who knows a passphrase."""

    __slots__ = ("_prompts", "name")

    def __init__(self, name: str, prompts: "Prompts") -> None:
        """Raises `BadRequest` for an empty name."""
        if not name:
            raise BadRequest(f"{SCHEME}:NAME needs the operator's name, as the host's configuration has it")
        self.name = name
        self._prompts = prompts

    @property
    def device(self) -> str:
        return f"passphrase of operator {self.name}"

    def identity(self, parameters: str) -> Identity:
        """Ask, and derive. ``parameters``: what the host says.

        Raises `BadMessage` for parameters that no honest host sends, before anybody is asked; `PinCancelled`,
        `LimitExceeded`, `NotInstalled`.
        """
        from unsealerd.core.passphrase import Parameters, derive
        from unsealerd.core.secret import SecretBuffer

        try:
            checked = Parameters.parse(parameters)
        except BadRequest as err:
            raise BadMessage(f"operator {self.name}: {err.detail}") from err
        with SecretBuffer.copy_of(self._prompts.passphrase(f"operator {self.name}")) as passphrase:
            return derive(passphrase.view, checked)
