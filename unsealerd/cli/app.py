"""What every command has: the global options, and the way to the configuration and to the daemon."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unsealerd.cli.output import printable
from unsealerd.cli.stderr import note
from unsealerd.errors import ConfigInvalid, DaemonUnreachable

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
    warned: bool = False
    """Of a configuration that is refused: once is enough."""

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

        directory, wrong = self.admin_directory()
        try:
            admin = Connection(directory / "admin", timeout=ADMIN_TIMEOUT, max_reply=MAX_ADMIN_REPLY_BYTES)
        except DaemonUnreachable as err:
            if wrong is not None:
                raise wrong from err
            raise
        if wrong is not None and not self.warned:
            self.warned = True
            note(f"warning: {printable(wrong.detail)}")
            note(
                "hint: the daemon goes on with what it read before; correct the file, then: unsealctl reload"
            )
        return admin

    def admin_directory(self) -> tuple[Path, ConfigInvalid | None]:
        """Where the admin socket is, and what is wrong with the configuration.

        The daemon runs on with what it read before: nobody shall have to mend a file to see its state, or to lock
        it. So a file that is refused still says where the sockets are if it is TOML, and means the default place if
        it is the default file. Raises `ConfigInvalid` where neither helps.
        """
        import tomllib

        from unsealerd.config import DEFAULT_PATH, Daemon
        from unsealerd.tomlfile import MAX_FILE_BYTES

        try:
            return self.config().daemon.runtime_dir, None
        except ConfigInvalid as err:
            path, wrong = self.config_path or DEFAULT_PATH, err
        try:
            with path.open("rb") as file:
                tables = tomllib.loads(file.read(MAX_FILE_BYTES).decode())
        except (OSError, ValueError, RecursionError) as err:
            if path != DEFAULT_PATH:
                raise wrong from err
            tables = {}
        daemon = tables.get("daemon", {})
        stated = daemon.get("runtime_dir", str(Daemon().runtime_dir)) if isinstance(daemon, dict) else None
        if not isinstance(stated, str) or not stated.startswith("/") or "\0" in stated:
            raise wrong
        return Path(stated), wrong
