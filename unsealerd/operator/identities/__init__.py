"""Private keys that can answer. Each kind is one file; all of them are `unsealerd.core.age.Identity`.

`exchange` may take as long as a person needs for a PIN or a touch, and raises the errors of its own kind.
"""

from collections.abc import Callable
from pathlib import Path

from unsealerd.core.age import Identity
from unsealerd.errors import AccessDenied, IdentityInvalid
from unsealerd.operator.events import KeyFileExposed, OnEvent, ignore
from unsealerd.operator.identities import agefile, pem

AskPassphrase = Callable[[Path], bytes]
"""Asks for the passphrase of this file, at the moment when it is needed."""

MAX_FILE_BYTES = 256 << 10
_OTHERS = 0o077  # permission bits of group and others


def load_identity(path: Path, ask_passphrase: AskPassphrase, on_event: OnEvent = ignore) -> list[Identity]:
    """All private keys of a file: of age-keygen (also as `age -p` encrypts it), PEM or OpenSSH on P-256.

    Raises `IdentityInvalid` for anything else, and for a wrong passphrase; `AccessDenied`; `NotInstalled`.
    """
    data = _read(path, on_event)

    def ask() -> bytes:
        return ask_passphrase(path)

    try:
        if agefile.is_encrypted(data):
            return agefile.decrypt(data, ask)
        if pem.is_pem(data):
            return [pem.parse(data, ask)]
        return agefile.parse(data)
    except IdentityInvalid as err:
        raise IdentityInvalid(f"{path}: {err.detail}") from err


def _read(path: Path, on_event: OnEvent) -> bytes:
    # The key file is the operator's own memory to protect: what is read here lives as long as the tool, which is seconds.
    import os
    import stat

    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(MAX_FILE_BYTES + 1)
    except PermissionError as err:
        raise AccessDenied(f"{path}: {err.strerror}") from err
    except OSError as err:
        raise IdentityInvalid(f"{path}: {err.strerror}") from err
    if len(data) > MAX_FILE_BYTES:
        raise IdentityInvalid(f"{path}: too large for a key file")
    if stat.S_ISREG(status.st_mode) and status.st_mode & _OTHERS:
        on_event(KeyFileExposed(path, stat.S_IMODE(status.st_mode)))
    return data
