"""PKCS#11 identities in a process of their own, used as if they were in this one.

python-pkcs11 finalises a module without letting other threads run. A card that a thread of the same process plays could
then not answer the reader that the module waits for.
"""

import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from rigs.person import Person
from unsealerd.core.age import P256TagRecipient
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import UnsealerdError


@dataclass(frozen=True, slots=True)
class _Find:
    uri: str
    last_try: bool


@dataclass(frozen=True, slots=True)
class _Exchange:
    index: int
    point: bytes


class Apart:
    """It has the environment of the moment in which it is entered."""

    def __enter__(self) -> Self:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join(60)

    def find(self, uri: str, person: Person, *, last_try: bool = False) -> list["IdentityApart"]:
        """`unsealerd.operator.identities.pkcs11.find`."""
        found = self.ask(_Find(uri, last_try), person)
        return [IdentityApart(self, person, *each) for each in found]

    def ask(self, request: _Find | _Exchange, person: Person) -> Any:
        self._connection.send((request, person.pins))
        assert self._connection.poll(60), "no answer"
        result, theirs = self._connection.recv()
        person.pins = theirs.pins
        person.asked += theirs.asked
        person.seen += theirs.seen
        if isinstance(result, UnsealerdError):
            raise result
        return result


@dataclass(frozen=True, slots=True)
class IdentityApart:
    """A `Pkcs11Identity` over there."""

    _process: Apart
    _person: Person
    _index: int
    device: str
    recipient: P256TagRecipient

    def exchange(self, point: bytes) -> SecretBuffer:
        return SecretBuffer.copy_of(self._process.ask(_Exchange(self._index, point), self._person))


def _serve(connection: Connection) -> None:
    from unsealerd.operator.identities import pkcs11

    identities: list[pkcs11.Pkcs11Identity] = []
    person = Person()

    def work(request: _Find | _Exchange) -> Any:
        match request:
            case _Exchange(index, point):
                with identities[index].exchange(point) as x:
                    return bytes(x.view)
            case _Find(uri, last_try):
                first = len(identities)
                identities.extend(pkcs11.find(uri, prompts=person, on_event=person.see, last_try=last_try))
                return [(first + n, each.device, each.recipient) for n, each in enumerate(identities[first:])]

    while True:
        try:
            request, person.pins = connection.recv()
        except EOFError:
            return
        person.asked.clear()
        person.seen.clear()
        try:
            result = work(request)
        except UnsealerdError as err:
            result = err
        connection.send((result, person))
