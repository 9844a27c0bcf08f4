"""Private keys that can answer. Each kind is one file; all of them are `unsealerd.core.age.Identity`.

`exchange` may take as long as a person needs for a PIN or a touch, and raises the errors of its own kind. What a person
types to name identities is a spec: ``SCHEME:WHICH``, or else the path of a key file. A kind of hardware is a file here
and a line in `open_identities`; its libraries are loaded when it is used.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from unsealerd.core.age import Identity
from unsealerd.errors import (
    AccessDenied,
    CardMissing,
    IdentityInvalid,
    NotInstalled,
    ReaderMissing,
    UnsealerdError,
)
from unsealerd.operator.events import KeyFileExposed, OnEvent, ignore
from unsealerd.operator.identities import agefile, pem
from unsealerd.operator.identities.passphrase import PassphraseOperator

if TYPE_CHECKING:
    from unsealerd.operator.prompts import Prompts

AskPassphrase = Callable[[Path], bytes]
"""Asks for the passphrase of this file, at the moment when it is needed."""

MAX_FILE_BYTES = 256 << 10
_OTHERS = 0o077  # permission bits of group and others


def open_identities(
    spec: str, *, prompts: "Prompts", on_event: OnEvent = ignore, last_try: bool = False
) -> list[Identity | PassphraseOperator]:
    """The identities of one spec: at least one.

    ``piv:``, ``piv:SERIAL``, ``piv:SERIAL/SLOT``, ``openpgp:``, ``openpgp:SERIAL``, ``pkcs11:URI`` (RFC 7512),
    ``passphrase:NAME``, or a path (``./piv:x`` for a file of such a name). Reads public keys only, but for a file, whose
    passphrase is asked for.
    ``last_try``: use the last try of a PIN. Raises what the kind raises: `ReaderMissing`, `CardMissing`, `NotInstalled`,
    `IdentityInvalid`, `BadRequest`, ...
    """
    scheme, separator, which = spec.partition(":")
    match scheme if separator else "":
        case "piv":
            from unsealerd.operator.identities import piv

            serial, slot = piv.which(which)
            return [*piv.find(serial, slot, prompts=prompts, on_event=on_event, last_try=last_try)]
        case "openpgp":
            from unsealerd.operator.identities import openpgp

            return [*openpgp.find(which or None, prompts=prompts, on_event=on_event, last_try=last_try)]
        case "pkcs11":
            from unsealerd.operator.identities import pkcs11

            return [*pkcs11.find(spec, prompts=prompts, on_event=on_event, last_try=last_try)]
        case "passphrase":
            return [PassphraseOperator(which, prompts)]
        case _:
            return [*load_identity(Path(spec), lambda file: prompts.passphrase(str(file)), on_event)]


def plugged_in(
    *, prompts: "Prompts", on_event: OnEvent = ignore, last_try: bool = False
) -> list[Identity | PassphraseOperator]:
    """Every card that is there. (PKCS#11 needs a URI: nothing says which module to load.)

    A kind that has none, or whose card is not in order, is no error as long as another kind is found. Else the error that
    says most: of a card that is there, of a reader without a card, of no reader.
    """
    found: list[Identity | PassphraseOperator] = []
    errors: list[UnsealerdError] = []
    for scheme in ("piv:", "openpgp:"):
        try:
            found += open_identities(scheme, prompts=prompts, on_event=on_event, last_try=last_try)
        except UnsealerdError as err:
            errors.append(err)
    if found:
        return found
    raise min(errors, key=_silence)


def _silence(error: UnsealerdError) -> int:
    """How little an error says of what the person should look at."""
    match error:
        case CardMissing():
            return 1
        case ReaderMissing():
            return 2
        case NotInstalled():
            return 3
        case _:
            return 0


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
