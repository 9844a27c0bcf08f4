"""sd_notify(3): telling the service manager, when there is one. Standard library only."""

import os
import socket
from collections.abc import Sequence

_PATIENCE = 1.0  # seconds for a service manager whose queue is full


def notify(*, fds: Sequence[int] = (), patience: float = _PATIENCE, **fields: str | int) -> bool:
    """Send ``KEY=value`` lines, for instance ``notify(READY=1, STATUS="locked")``. True if a service manager was told.

    ``fds``: descriptors that go with the message. ``patience``: seconds. Without NOTIFY_SOCKET nothing
    happens. A service manager that cannot be reached is no reason to fail: False.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    # A newline within a value would begin another field.
    message = "\n".join(f"{key}={str(value).replace(chr(10), ' ')}" for key, value in fields.items())
    if address.startswith("@"):
        address = "\0" + address[1:]  # abstract: unix(7)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.settimeout(patience)
            channel.connect(address)
            if fds:
                socket.send_fds(channel, [message.encode()], list(fds))
            else:
                channel.send(message.encode())
    except OSError:  # TimeoutError, too
        return False
    return True


def watchdog_interval() -> float | None:
    """Seconds within which the service manager wants to hear ``WATCHDOG=1``, or None (sd_watchdog_enabled(3))."""
    text = os.environ.get("WATCHDOG_USEC", "")
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and int(text) > 0):
        return None
    return int(text) / 1e6
