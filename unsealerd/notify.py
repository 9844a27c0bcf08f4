"""sd_notify(3): telling the service manager, when there is one. Standard library only."""

import os
import socket


def notify(**fields: str | int) -> bool:
    """Send ``KEY=value`` lines, for instance ``notify(READY=1, STATUS="locked")``. True if a service manager was told.

    Without NOTIFY_SOCKET nothing happens. A service manager that cannot be reached is no reason to fail: False.
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
            channel.sendto(message.encode(), address)
    except OSError:
        return False
    return True
