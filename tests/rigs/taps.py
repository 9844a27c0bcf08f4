"""Taps: proxies that keep what passes. One for a Unix socket, one for TLS that ends and begins it anew."""

import contextlib
import os
import select
import socket
import ssl
import threading
from pathlib import Path
from typing import Self


class Tap:
    """Both directions of every connection, in the order in which they came."""

    def __init__(self) -> None:
        self.sent: list[bytearray] = []
        """From who connected, one for each connection."""
        self.received: list[bytearray] = []
        self._threads: list[threading.Thread] = []
        self._ends: list[socket.socket] = []

    def _listen(self, listener: socket.socket) -> None:
        self._listener = listener
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _near(self, plain: socket.socket) -> socket.socket:
        return plain

    def _far(self) -> socket.socket:
        raise NotImplementedError

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            try:
                near, far = self._near(plain), self._far()
            except OSError:
                plain.close()
                continue
            sent, received = bytearray(), bytearray()
            self.sent.append(sent)
            self.received.append(received)
            self._ends += [near, far]
            thread = threading.Thread(target=_pass_on, args=(near, far, sent, received))
            thread.start()
            self._threads.append(thread)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        for end in self._ends:
            _hang_up(end)
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            end.close()


class UnixTap(Tap):
    """Listens at ``path``, passes on to ``target``."""

    def __init__(self, path: Path, target: Path) -> None:
        super().__init__()
        self._target = os.fspath(target)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.fspath(path))
        listener.listen()
        self._listen(listener)

    def _far(self) -> socket.socket:
        far = socket.socket(socket.AF_UNIX)
        far.connect(self._target)
        return far


class TlsTap(Tap):
    """Listens on [::1] with the server's own key and certificate, passes on what it reads to ``target``."""

    def __init__(self, identity_directory: Path, target: str) -> None:
        super().__init__()
        self._host, self._port = target.rpartition(":")[0].strip("[]"), int(target.rpartition(":")[2])
        self._server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._server.load_cert_chain(identity_directory / "tls.crt", identity_directory / "tls.key")
        self._server.set_alpn_protocols(["h2"])
        self._client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._client.load_verify_locations(identity_directory / "tls.crt")
        self._client.set_alpn_protocols(["h2"])
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
        self.address = f"[::1]:{listener.getsockname()[1]}"
        self._listen(listener)

    def _near(self, plain: socket.socket) -> socket.socket:
        return self._server.wrap_socket(plain, server_side=True)

    def _far(self) -> socket.socket:
        plain = socket.create_connection((self._host, self._port))
        return self._client.wrap_socket(plain, server_hostname="unsealerd.invalid")


def _pass_on(near: socket.socket, far: socket.socket, sent: bytearray, received: bytearray) -> None:
    """Both directions on one thread: OpenSSL allows no two threads on one connection."""
    for end in (near, far):
        end.setblocking(False)
    try:
        while True:
            for source, target, record in ((near, far, sent), (far, near, received)):
                while (data := _read(source)) is not None:
                    if not data:
                        return
                    record += data
                    _send_all(target, data)
            select.select([near, far], [], [])
    except OSError:
        pass
    finally:
        _hang_up(near)
        _hang_up(far)


def _read(source: socket.socket) -> bytes | None:
    """What is there now: None if nothing is, empty at the end."""
    try:
        return source.recv(65536)
    except (BlockingIOError, ssl.SSLWantReadError):
        return None


def _send_all(target: socket.socket, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[target.send(rest) :]
        except (BlockingIOError, ssl.SSLWantWriteError):
            select.select([], [target], [])


def _hang_up(end: socket.socket) -> None:
    # Not SSLSocket.shutdown, which would forget the TLS object under the thread that uses it.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(end, socket.SHUT_RDWR)
