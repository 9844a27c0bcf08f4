"""The peer of the unlock: tangd, and clevis as its client."""

import json
import socket
from contextlib import ExitStack
from pathlib import Path

from rigs.server import wait_for

from measure.figure import MESSAGE, background, run

TANGD = "/usr/libexec/tangd"


class Tang:
    """tangd behind socat: a process for each connection, as its unit has it, without the service manager's share."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        keys = directory / "tang"
        keys.mkdir()
        run(f"{TANGD}-keygen", str(keys))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._address: tuple[str, int] = probe.getsockname()
        listen = f"TCP-LISTEN:{self._address[1]},bind=127.0.0.1,reuseaddr,fork,backlog=64"
        background(stack, "socat", listen, f"EXEC:{TANGD} {keys}")
        exchange = next(path for path in keys.iterdir() if json.loads(path.read_text())["alg"] == "ECMR")
        point = run("jose", "jwk", "pub", "-i-", stdin=exchange.read_bytes()).strip()
        head = f"POST /rec/{exchange.stem} HTTP/1.1\r\nHost: tang\r\nContent-Type: application/jwk+json\r\n"
        self._request = f"{head}Content-Length: {len(point)}\r\n\r\n".encode() + point
        wait_for(self._listens, "tangd")
        options = json.dumps({"url": f"http://127.0.0.1:{self._address[1]}"})
        self._sealed = run("clevis", "encrypt", "tang", options, "-y", stdin=MESSAGE)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(self._address) == 0

    def post(self) -> None:
        """One recovery, on a new connection."""
        with socket.create_connection(self._address) as connection:
            connection.sendall(self._request)
            answer = b""
            while b'"x"' not in answer:
                part = connection.recv(4096)
                assert part, answer
                answer += part

    def decrypt(self) -> None:
        run("clevis", "decrypt", stdin=self._sealed)
