"""A desk with a card reader: pcscd, and a card in the virtual reader that can be changed from one test to the next at once."""

from contextlib import ExitStack
from types import TracebackType
from typing import Self

from rigs.pcscd import READER, Inserted, Pcscd
from rigs.person import Person
from rigs.pivcard import PIN, PivCard
from unsealerd.operator.identities import piv
from unsealerd.operator.identities.piv import PivIdentity


class Desk:
    """As long as it is open, this process and its children are clients of its pcscd."""

    def __init__(self) -> None:
        self.service = Pcscd()
        self._inserted: Inserted | None = None
        self._stack = ExitStack()

    def place(self, card: PivCard) -> PivCard:
        """This card is in the reader now, as if it had been there all the time."""
        inserted = self._inserted
        if inserted is not None and inserted.alive:
            inserted.card = card
            self.service.await_card(READER)
        else:
            self._inserted = self.service.insert(card)
        card.forget()
        return card

    def remove(self) -> None:
        if self._inserted is not None:
            self._inserted.remove()
            self.service.await_card(READER, present=False)

    def identity(
        self, person: Person | None = None, *, slot: int = 0x9D, last_try: bool = False
    ) -> PivIdentity:
        """The only one there is."""
        who = person or Person(PIN)
        (found,) = piv.find(None, slot, prompts=who, on_event=who.see, last_try=last_try)
        return found

    def __enter__(self) -> Self:
        self._stack.enter_context(self.service)
        self._stack.enter_context(self.service.client())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
