"""The operators of a host, and how many of them, and which, it takes to open the backup."""

import re
from collections.abc import Collection

import msgspec

from unsealerd.core import shamir
from unsealerd.core.age import Recipient
from unsealerd.errors import BadRequest
from unsealerd.model import Curve

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class KnownOperator(msgspec.Struct, frozen=True):
    name: str
    recipient: Recipient
    groups: tuple[str, ...] = ()
    kdf: str | None = None
    """How a passphrase becomes the private key; None for who has a key."""

    @property
    def subject(self) -> str:
        """What names the operator in a session. With a passphrase not the recipient: it would let anybody try passphrases."""
        return str(self.recipient) if self.kdf is None else passphrase_subject(self.name)

    def satisfies(self, required: str) -> bool:
        return required == self.name or required in self.groups


def passphrase_subject(name: str) -> str:
    """How an operator with a passphrase is named: as only people are, in lower case."""
    return f"passphrase:{name.lower()}"


class Rules(msgspec.Struct, frozen=True):
    """Who may open, and how many of them it takes."""

    operators: tuple[KnownOperator, ...]
    threshold: int = 1
    require: tuple[str, ...] = ()
    """Names of operators and groups: one of each must be among those who answer."""

    @property
    def split(self) -> bool:
        """Whether nobody opens alone by the file key itself."""
        return self.threshold > 1 or bool(self.require)

    @property
    def plain(self) -> bool:
        """Whether an ordinary age header says it all."""
        return not self.split and all(operator.kdf is None for operator in self.operators)

    def require_of(self, index: int) -> tuple[str, ...]:
        """The required names that this operator stands for, in order."""
        return tuple(name for name in self.require if self.operators[index].satisfies(name))

    def unmet(self, names: Collection[str]) -> tuple[str, ...]:
        """The required names that none of these operators stands for."""
        answered = [operator for operator in self.operators if operator.name in names]
        return tuple(name for name in self.require if not any(o.satisfies(name) for o in answered))

    def satisfied(self, answered: Collection[str]) -> bool:
        """Whether these operators together open the backup."""
        known = {operator.name for operator in self.operators}.intersection(answered)
        return len(known) >= self.threshold and not self.unmet(known)

    def needed(self, answered: Collection[str]) -> int:
        """How many must answer, at the least, given that these have."""
        return max(self.threshold, len(answered) + bool(self.unmet(answered)))

    def admits(self, before: "Rules") -> bool:
        """Whether every set of operators that could open before can open now, too."""
        now = {str(operator.recipient): operator for operator in self.operators}
        return (
            self.threshold <= before.threshold
            and set(self.require) <= set(before.require)
            and all(
                (same := now.get(str(old.recipient))) is not None
                and all(same.satisfies(name) for name in self.require if old.satisfies(name))
                for old in before.operators
            )
        )

    def check(self) -> None:
        """Raises ``ValueError`` for rules that nobody could keep, or that could be read in two ways."""
        names = [operator.name for operator in self.operators]
        groups = {group for operator in self.operators for group in operator.groups}
        if not 1 <= self.threshold <= len(names) <= shamir.MAX_SHARES:
            raise ValueError(f"{self.threshold} of {len(names)} operators")
        if not all(_NAME.fullmatch(name) for name in (*names, *groups)):
            raise ValueError("a name of an operator or group that is not a word")
        recipients = {str(operator.recipient) for operator in self.operators}
        if len({name.lower() for name in names}) != len(names) or len(recipients) != len(names):
            raise ValueError("two operators with one name or recipient")
        if groups.intersection(names) or any(len(set(o.groups)) != len(o.groups) for o in self.operators):
            raise ValueError("a group that is named twice, or as an operator is")
        if len(set(self.require)) != len(self.require) or self.unmet(names):
            raise ValueError("a required name that is there twice, or that nobody stands for")
        for operator in self.operators:
            if operator.kdf is not None:
                _check_kdf(operator, operator.kdf)


def _check_kdf(operator: KnownOperator, kdf: str) -> None:
    from unsealerd.core.passphrase import Parameters

    if operator.recipient.curve is not Curve.X25519:
        raise ValueError(f"{operator.name}: a passphrase gives a key on X25519 only")
    try:
        Parameters.parse(kdf)
    except BadRequest as err:
        raise ValueError(f"{operator.name}: {err.detail}") from err
