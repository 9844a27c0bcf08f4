"""Unlock sessions with a server through its gateway."""

import itertools
import os
import time
from typing import TYPE_CHECKING

from rigs.server import PATIENCE, Server

from measure import leanclient
from measure.figure import timed
from unsealerd.client.connection import Connection
from unsealerd.model import Purpose

if TYPE_CHECKING:
    from unsealerd.proto.unlock_pb2 import Challenge


class Unlocks:
    """Sessions with a server through its gateway."""

    def __init__(self, server: Server) -> None:
        from unsealerd.operator.hosts import make_host

        self._server = server
        server.ctl("host", "add", "server", server.start_gateway(), "--yes")
        certificate = (server.state / "gateway" / "tls.crt").read_text()
        self._host = make_host("server", server.address, certificate, added=0)
        self._tls = leanclient.context(certificate)
        self._peers = itertools.count(1)

    def lock(self) -> None:
        with Connection(str(self._server.run_dir / "admin"), timeout=PATIENCE) as admin:
            admin.call("io.unsealerd.Admin.Lock", {})
        time.sleep(0.5)  # the daemon takes one answer of a peer in that time

    def command(self) -> float:
        self.lock()
        return timed(lambda: self._server.ctl("unlock", "server", "-i", str(self._server.identity_file)))

    def session(self) -> float:
        """All of it by a client that lives: audit records, the backup opened, the state changed."""
        from unsealerd.operator.network import connect
        from unsealerd.operator.unlock import unlock

        self.lock()
        with connect(self._host) as conversation:
            return timed(lambda: unlock(conversation, [self._server.identity]))

    def challenge(self) -> None:
        """A new connection, hello, the challenge verified."""
        from unsealerd.core.conversation import HelloCall
        from unsealerd.operator.evidence import Offer, verify
        from unsealerd.operator.network import connect

        offer = Offer.make(os.urandom(32), [self._server.identity])
        with connect(self._host) as conversation:
            hello = HelloCall(1, offer.nonce, tuple(offer.identities), peer="")
            verify(conversation.expected, offer, *conversation.hello(hello))

    # --- by the leanest client, so that the server is what is measured

    def connection(self, source: str = "") -> leanclient.LeanClient:
        return leanclient.LeanClient(address(self._host.address), self._tls, source)

    def ask(self, connection: leanclient.LeanClient) -> None:
        """A session up to its challenge, and its end. Not answered: answers are paced, two a second for a peer."""
        self._ask(connection, Purpose.UNLOCK)
        connection.leave()

    def ask_anew(self) -> None:
        with self.connection() as connection:
            self.ask(connection)

    def drill(self) -> None:
        """A whole session on a new connection, judged and recorded, of a peer that was never there: so no pace is met."""
        from unsealerd.proto.unlock_pb2 import Share

        number = next(self._peers)
        with self.connection(f"127.{1 + (number >> 16)}.{number >> 8 & 255}.{number & 255}") as connection:
            challenge = self._ask(connection, Purpose.DRILL)
            with self._server.identity.exchange(challenge.questions[0].point) as x:
                share = Share(question=0, x=bytes(x.view))
            result = leanclient.result(connection.answer(leanclient.answer(challenge.session, [share])))
            assert [outcome.result for outcome in result.outcomes] == ["accepted"], result
            connection.leave()

    def _ask(self, connection: leanclient.LeanClient, purpose: Purpose) -> "Challenge":
        from unsealerd.core.session import recipient_tag

        nonce = os.urandom(32)
        tag = recipient_tag(nonce, str(self._server.identity.recipient), purpose)
        challenge = leanclient.challenge(connection.hello(leanclient.hello(nonce, [tag], purpose)))
        assert len(challenge.questions) == 1, challenge
        return challenge


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)
