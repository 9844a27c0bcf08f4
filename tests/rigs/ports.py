"""Ports at which nobody answers."""

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def deaf_port(address: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """A port of this address at which every connection is refused, and which nobody else can get meanwhile.

    A port that was merely given back may be another process's by then, or that of the caller's own connection.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((address, port))  # and does not listen
        yield int(held.getsockname()[1])
