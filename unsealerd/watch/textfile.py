"""A small file that others read: there whole, or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path

from unsealerd.errors import AccessDenied, StorageFailed

PUBLIC = 0o644
PRIVATE = 0o600


def replace(path: Path, text: str, mode: int = PUBLIC) -> None:
    """Write a file anew, and make its directory if it is missing. Raises `AccessDenied`, `StorageFailed`.

    Atomic, and not durable: what lies here is made again at the next start. The temporary file has a leading dot and another
    ending, so that neither agetty (``*.issue``) nor the node exporter (``*.prom``) reads half of one.
    """
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                os.fchmod(descriptor, mode)
                file.write(text)
            os.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except PermissionError as err:
        raise AccessDenied(f"{path}: {err.strerror}") from err
    except OSError as err:
        raise StorageFailed(f"{path}: {err.strerror}") from err


def remove(path: Path) -> None:
    """Let it be gone. Raises `StorageFailed`."""
    try:
        path.unlink(missing_ok=True)
    except OSError as err:
        raise StorageFailed(f"{path}: {err.strerror}") from err
