"""``io.unsealerd.Unlock``: unlock sessions, on the ``unlock`` socket for the gateway and on ``admin`` for the console."""

from collections.abc import Awaitable
from typing import TYPE_CHECKING

import msgspec

from unsealerd.core.session import Answer
from unsealerd.daemon import machine
from unsealerd.daemon.access import caller_facts
from unsealerd.daemon.host import Host
from unsealerd.daemon.interface import Empty, Interface, Method
from unsealerd.daemon.unlocking import Conversations
from unsealerd.errors import BadMessage
from unsealerd.model import Purpose

if TYPE_CHECKING:
    from unsealerd.daemon.connection import Connection


class HelloParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    nonce: bytes
    tags: list[bytes]
    peer: str = ""
    purpose: Purpose = Purpose.UNLOCK


class AnswerItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    question: int
    x: bytes


class AnswerParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    session: bytes
    answers: list[AnswerItem]
    reason: str = ""
    accept_rollback: bool = False


class UnlockApi:
    def __init__(self, host: Host, conversations: Conversations, *, console: bool) -> None:
        """``console``: the caller is on this machine, so what it says of where it is does not count."""
        self._host = host
        self._conversations = conversations
        self._console = console
        self._boot_id = machine.boot_id()

    def interface(self) -> Interface:
        return Interface(
            "io.unsealerd.Unlock",
            {
                "GetStatus": Method(Empty, self.get_status),
                "Hello": Method(HelloParameters, self.hello),
                "Answer": Method(AnswerParameters, self.answer),
            },
            malformed=BadMessage,
        )

    def get_status(self, _connection: "Connection", _: Empty) -> dict[str, object]:
        reason = self._host.lock_reason
        return {
            "state": self._host.state.value,
            "lock_reason": reason.value if reason is not None else None,
            **self._shares(),
        }

    def hello(self, connection: "Connection", call: HelloParameters) -> Awaitable[dict[str, object]]:
        return self._hello(connection, call)

    async def _hello(self, connection: "Connection", call: HelloParameters) -> dict[str, object]:
        challenge = await self._conversations.hello(
            connection,
            version=call.version,
            nonce=call.nonce,
            tags=call.tags,
            peer=None if self._console else call.peer,
            purpose=call.purpose,
        )
        reason = self._host.lock_reason
        return {
            "challenge": {
                "session": challenge.session,
                "questions": [
                    {"tag": q.tag, "curve": q.curve.value, "point": q.point, "kdf": q.kdf}
                    for q in challenge.questions
                ],
                "lock_reason": reason.value if reason is not None else "",
                "boot_id": self._boot_id,
                "host_name": machine.host_name(),
                "uptime": machine.uptime(),
                "generation": self._host.last_generation,
                "backup_time": self._host.keeper.store.written_at or 0,
                **self._shares(),
                "deadline": challenge.seconds_left,
                "words": list(challenge.words),
            }
        }

    def answer(self, connection: "Connection", call: AnswerParameters) -> Awaitable[dict[str, object]]:
        return self._answer(connection, call)

    async def _answer(self, connection: "Connection", call: AnswerParameters) -> dict[str, object]:
        judgement = await self._conversations.answer(
            connection,
            session=call.session,
            answers=[Answer(item.question, item.x) for item in call.answers],
            reason=call.reason,
            accept_rollback=call.accept_rollback,
            facts=caller_facts(connection.peer.caller) if self._console else {},
        )
        shares = self._conversations.shares()
        # Who is not one of them is not told their names; where one was enough, there is nobody to wait for.
        among_them = bool(set(judgement.accepted).intersection(shares.answered))
        return {
            "state": self._host.state.value,
            "shares_present": shares.present,
            "shares_needed": shares.needed,
            "outcomes": [{"question": o.question, "result": o.result} for o in judgement.outcomes],
            "answered": list(shares.answered) if among_them else [],
            "missing": list(shares.missing) if among_them else [],
            "seconds_left": shares.seconds_left if among_them else None,
        }

    def forget(self, connection: object) -> None:
        """The connection is gone, and its session with it."""
        self._conversations.end(connection)

    def _shares(self) -> dict[str, object]:
        shares = self._conversations.shares()
        return {"shares_present": shares.present, "shares_needed": shares.needed}
