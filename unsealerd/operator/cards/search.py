"""Looking through all readers for the cards that fit."""

from collections.abc import Callable
from typing import TypeVar

from unsealerd.errors import (
    CardBusy,
    CardFailed,
    CardMissing,
    CardRemoved,
    CardReset,
    ReaderMissing,
    UnsealerdError,
    WrongCard,
)
from unsealerd.operator.cards import pcsc
from unsealerd.operator.cards.apdu import Card

_T = TypeVar("_T")

_TELLING = (CardBusy, WrongCard, CardReset, CardRemoved, CardFailed, ReaderMissing, CardMissing)
"""Which problem is told when several cards have one: the first of these."""


def search(look: Callable[[Card], _T | None], missing: str) -> list[tuple[str, _T]]:
    """The reader and what ``look`` sees, of each card in which it sees something: of one at least.

    ``missing``: what to say if none fits. Raises `CardMissing`, or what kept the only one from being found: `CardBusy`,
    `CardFailed`, `CardRemoved`, `CardReset`, `ReaderMissing`, `WrongCard`; `AccessDenied`, `NotInstalled`.
    """
    found: list[tuple[str, _T]] = []
    problems: list[UnsealerdError] = []
    for reader in pcsc.readers_with_cards():
        try:
            seen = pcsc.use(reader, look)
        except _TELLING as err:
            problems.append(err)
            continue
        if seen is not None:
            found.append((reader, seen))
    if not found:
        problems.append(CardMissing(missing))
        raise min(problems, key=lambda problem: _TELLING.index(type(problem)))
    return found
