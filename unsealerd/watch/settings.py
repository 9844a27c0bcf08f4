"""The configuration as the watcher sees it: read again when the file is another one."""

import logging
from pathlib import Path

from unsealerd.config import Config, load
from unsealerd.errors import ConfigInvalid

_log = logging.getLogger("unsealerd-watch")


class Settings:
    """One that is refused later changes nothing, as for the daemon."""

    def __init__(self, path: Path) -> None:
        """Raises `ConfigInvalid`."""
        self._path = path
        self._seen = self._signature()
        self._config = load(path)

    def current(self) -> Config:
        seen = self._signature()
        if seen != self._seen:
            self._seen = seen
            try:
                self._config = load(self._path)
            except ConfigInvalid as err:
                _log.error("configuration refused detail=%s", err.detail)
        return self._config

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size
