"""A daemon's unlock socket, and nothing else of a daemon: real sessions over a real backup, for the gateway and the operator.

It speaks Varlink by io.unsealerd.Unlock alone. `tamper` makes it a hostile one.
"""

import base64
import json
import os
import secrets
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from unsealerd.core.age import Recipient, encrypt, parse_header
from unsealerd.core.rules import KnownOperator
from unsealerd.core.secret import SecretBuffer
from unsealerd.core.session import Answer, UnlockSession
from unsealerd.core.sharing import Backup
from unsealerd.errors import BadMessage, UnsealerdError
from unsealerd.model import Purpose

Json = dict[str, Any]
FACTS: Json = {
    "lock_reason": "unexpected_reboot",
    "boot_id": "5a1b9d60-7d4e-4a3c-9a52-0c7f2b7f7a11",
    "host_name": "vault-host-one",
    "uptime": 77,
    "generation": 12,
    "backup_time": 1_750_000_000,
    "shares_present": 0,
    "shares_needed": 1,
    "deadline": 120,
}


class UnlockDaemon:
    """Serves ``directory``/unlock while it is a context."""

    def __init__(
        self, directory: Path, recipients: Sequence[Recipient], plaintext: bytes = b"keyring"
    ) -> None:
        self.path = directory / "unlock"
        self.operators = [KnownOperator(f"operator{n}", each) for n, each in enumerate(recipients)]
        with SecretBuffer.random(16) as file_key:
            self.file_key = bytes(file_key.view)
            self.backup = encrypt(memoryview(plaintext), file_key, recipients)
        self.tamper: Callable[[Json], object] = lambda challenge: None
        """Changes a challenge before it is sent."""
        self.error: str | None = None
        """The full Varlink name of an error to answer every call with."""
        self.raw_reply: bytes | None = None
        """What to answer every call with, whatever it is."""
        self.peers: list[str] = []
        self.answers: list[Json] = []
        self.opened: list[bytes] = []
        """The file keys that came out of sessions."""
        self._changed = threading.Condition()
        self._connections = 0

    def __enter__(self) -> Self:
        daemon = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                daemon._count(1)
                try:
                    daemon._serve(self.request)
                except ConnectionError:
                    pass
                finally:
                    daemon._count(-1)

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True
            request_queue_size = 128

        self._server = Server(os.fspath(self.path), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        # The handlers' threads end with their connections, which are the other side's to close.
        self._server.socket.close()
        self.path.unlink()

    @property
    def connections(self) -> int:
        return self._connections

    def wait_for_connections(self, count: int, seconds: float = 60) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._connections == count, seconds)

    def _count(self, step: int) -> None:
        with self._changed:
            self._connections += step
            self._changed.notify_all()

    def _serve(self, connection: socket.socket) -> None:
        session = UnlockSession(secrets.token_bytes(16), _now())
        buffered = b""
        try:
            while data := connection.recv(65536):
                buffered += data
                *frames, buffered = buffered.split(b"\0")
                for frame in frames:
                    connection.sendall(
                        self.raw_reply or json.dumps(self._reply(session, frame)).encode() + b"\0"
                    )
        finally:
            session.close()

    def _reply(self, session: UnlockSession, frame: bytes) -> Json:
        if self.error is not None:
            return {"error": self.error}
        call = json.loads(frame)
        method = call["method"].removeprefix("io.unsealerd.Unlock.")
        try:
            return {"parameters": getattr(self, f"_{method.lower()}")(session, call["parameters"])}
        except UnsealerdError as err:
            return {
                "error": f"io.unsealerd.Unlock.{err.name}",
                "parameters": {"detail": "not for the network"},
            }

    def _getstatus(self, _session: UnlockSession, _parameters: Json) -> Json:
        return {
            "state": "unlocked" if self.opened else "locked",
            "lock_reason": None if self.opened else FACTS["lock_reason"],
            "shares_present": 0,
            "shares_needed": 1,
        }

    def _hello(self, session: UnlockSession, parameters: Json) -> Json:
        self.peers.append(parameters["peer"])
        questions = session.hello(
            version=parameters["version"],
            nonce=base64.b64decode(parameters["nonce"]),
            tags=[base64.b64decode(tag) for tag in parameters["tags"]],
            operators=self.operators,
            backup=Backup.of(parse_header(self.backup)),
            now=_now(),
            purpose=Purpose(parameters.get("purpose", "unlock")),
        )
        challenge = {
            "session": _text(session.id),
            "questions": [
                {"tag": _text(q.tag), "curve": q.curve.value, "point": _text(q.point)} for q in questions
            ],
            "words": [],
            **FACTS,
        }
        self.tamper(challenge)
        return {"challenge": challenge}

    def _answer(self, session: UnlockSession, parameters: Json) -> Json:
        self.answers.append(parameters)
        try:
            answers = [
                Answer(each["question"], base64.b64decode(each["x"])) for each in parameters["answers"]
            ]
        except ValueError as err:
            raise BadMessage("not base64") from err
        judgement = session.answer(base64.b64decode(parameters["session"]), answers, _now())
        file_key, outcomes = judgement.file_key, judgement.outcomes
        if file_key is not None:
            with file_key:
                self.opened.append(bytes(file_key.view))
        return {
            "state": "unlocked" if file_key is not None else "locked",
            "shares_present": 1 if file_key is not None else 0,
            "shares_needed": 1,
            "outcomes": [{"question": each.question, "result": each.result} for each in outcomes],
        }


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _now() -> int:
    return int(time.monotonic())
