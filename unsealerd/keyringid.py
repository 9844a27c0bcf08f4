"""Which keyring is this host's: the file ``keyring.id`` beside the configuration, where the daemon's user cannot write.

An age file does not say who wrote it: whoever can write the state directory can put a backup there whose keys they know. What
they cannot make is one of this keyring, for that takes its lineage (core/keyring.py). One line::

    unsealerd-keyring-id-v1 SP ID LF         64 hex digits in lower case: `Keyring.id`
"""

import os
import re
import stat
from pathlib import Path

from unsealerd.errors import ConfigInvalid

FILE_NAME = "keyring.id"
_LINE = re.compile(rb"unsealerd-keyring-id-v1 ([0-9a-f]{64})\n")
_LINE_BYTES = 89


def beside(config: Path) -> Path:
    """Where the file is, by the path of the daemon's configuration."""
    return config.absolute().with_name(FILE_NAME)


def line(keyring_id: str) -> bytes:
    """What the file says."""
    return f"unsealerd-keyring-id-v1 {keyring_id}\n".encode()


def read(path: Path) -> str | None:
    """The id that is pinned, or None if there is no such file.

    Raises `ConfigInvalid` for whatever else is there: what cannot be read must not count as nothing.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as err:
        if isinstance(err, FileNotFoundError) and not path.is_symlink():
            return None
        raise ConfigInvalid(f"{path}: {err.strerror}") from err
    try:
        # Only a file of its size: a pipe is not waited for, and a directory is no file.
        found = os.fstat(fd)
        regular = stat.S_ISREG(found.st_mode) and found.st_size == _LINE_BYTES
        data = os.read(fd, _LINE_BYTES) if regular else b""
    except OSError as err:
        raise ConfigInvalid(f"{path}: {err.strerror}") from err
    finally:
        os.close(fd)
    match = _LINE.fullmatch(data)
    if match is None:
        raise ConfigInvalid(f"{path}: not the id of a keyring as `unsealctl init` writes it")
    return match[1].decode()
