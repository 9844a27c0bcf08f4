"""What every command has: the global options, and the way to the configuration and to the daemon."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unsealerd.errors import ConfigInvalid

if TYPE_CHECKING:
    from unsealerd.client.connection import Connection
    from unsealerd.config import Config

ADMIN_TIMEOUT = 60.0
"""Seconds. A change may take several commands to a slow TPM, and a backup on a slow disk."""
MAX_ADMIN_REPLY_BYTES = 64 << 20
"""A whole backup, base64."""


@dataclass(slots=True)
class App:
    config_path: Path | None = None
    """None: the default."""
    json: bool = False

    def config(self) -> "Config":
        """The checked configuration. Raises `ConfigInvalid`."""
        # Here, because `host` and `unlock HOST` need no configuration, and must not pay for it.
        from unsealerd.config import DEFAULT_PATH, load

        return load(self.config_path or DEFAULT_PATH)

    def service_runtime_dir(self) -> Path:
        """Where the sockets for services are.

        A service's user may be unable to read the configuration of the host, or be in a container that has
        only the sockets. So without --config an unreadable file means the default directory.
        """
        from unsealerd.config import Daemon

        try:
            return self.config().daemon.runtime_dir
        except ConfigInvalid as err:
            if self.config_path is None and isinstance(err.__cause__, OSError):
                return Daemon().runtime_dir
            raise

    def admin(self) -> "Connection":
        """The admin socket. Raises `ConfigInvalid`, `AccessDenied`, `DaemonUnreachable`."""
        from unsealerd.client.connection import Connection

        path = self.config().daemon.runtime_dir / "admin"
        return Connection(path, timeout=ADMIN_TIMEOUT, max_reply=MAX_ADMIN_REPLY_BYTES)
