"""The daemon's sockets with canned answers, for tests of what talks to them.

Shares no code with the client.
"""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

_PATIENCE = 10.0  # seconds

Parameters = dict[str, object]
Answer = Parameters | bytes | Callable[[Parameters], "Parameters | bytes"]
"""Reply parameters; or raw bytes to send as they are, after which the connection is closed; or what
computes one.
"""


def error(name: str, **parameters: object) -> bytes:
    """The error of a reply, as raw bytes."""
    return json.dumps({"error": name, "parameters": parameters}).encode() + b"\0"


class StubDaemon:
    """Listens in a directory like the daemon's runtime directory.

    ``answers`` maps ``Interface.Method`` (without ``io.unsealerd.``) to an answer; ``calls`` records every
    call. ``keys`` maps a path such as ``key/NAME`` to the bytes that it gives, None for one that is held.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.answers: dict[str, Answer] = {}
        self.streams: dict[str, list[Parameters]] = {}
        self.calls: list[tuple[str, Parameters]] = []
        self.keys: dict[str, bytes | None] = {}
        self.accepted = 0
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        (self.directory / "key").mkdir(parents=True, exist_ok=True)
        (self.directory / "keyset").mkdir(exist_ok=True)
        self.listen("keys")
        self.listen("admin")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def listen(self, name: str) -> None:
        """Open one socket: ``keys``, ``admin``, or what is in `keys`."""
        path = self.directory / name
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(16)
        with self._lock:
            self._open.append(listener)
        serve = self._converse if name in ("keys", "admin") else lambda peer: self._give(name, peer)
        self._spawn(self._accept, listener, serve)

    def _spawn(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def give(self, name: str, data: bytes | None) -> None:
        """Serve a key socket such as ``key/NAME``; None: hold the reader."""
        self.keys[name] = data
        self.listen(name)

    def stop(self) -> None:
        """End every connection and listener, as the end of the process does; the socket files stay."""
        with self._lock:
            ending, self._open = self._open, []
        for one in ending:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        # Closed only when no thread is about to use the descriptor, whose number is soon another socket's.
        for thread in self._threads:
            thread.join(_PATIENCE)
        self._threads.clear()
        for one in ending:
            one.close()

    def _accept(self, listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                self._open.append(peer)
                self.accepted += 1
            self._spawn(self._serve, peer, serve)

    def _serve(self, peer: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        with peer, contextlib.suppress(OSError):
            serve(peer)

    def _give(self, name: str, peer: socket.socket) -> None:
        data = self.keys[name]
        if data is None:
            peer.recv(1)  # until the peer gives up
            return
        peer.sendall(data)
        peer.close()

    def _converse(self, peer: socket.socket) -> None:
        for method, parameters in _calls(peer):
            self.calls.append((method, parameters))
            if method in self.streams:
                for item in self.streams[method]:
                    peer.sendall(json.dumps({"parameters": item, "continues": True}).encode() + b"\0")
                continue
            answer = self.answers.get(method, error("org.varlink.service.MethodNotFound"))
            if callable(answer):
                answer = answer(parameters)
            if isinstance(answer, bytes):
                peer.sendall(answer)
                if not answer.startswith(b'{"error"'):
                    peer.close()
                    return
            else:
                peer.sendall(json.dumps({"parameters": answer}).encode() + b"\0")


def _calls(peer: socket.socket) -> Iterator[tuple[str, Parameters]]:
    pending = b""
    while data := peer.recv(65536):
        pending += data
        *whole, pending = pending.split(b"\0")
        for frame in whole:
            message = json.loads(frame)
            yield message["method"].removeprefix("io.unsealerd."), message["parameters"]
