"""``unsealctl backup``: the encrypted keyring."""

import base64
import binascii
import contextlib
import hashlib
import os
from pathlib import Path

import click

from unsealerd import keyringid
from unsealerd.cli.app import App
from unsealerd.cli.command import Group
from unsealerd.cli.fields import optional, required, texts
from unsealerd.cli.output import print_json, print_table
from unsealerd.errors import (
    AccessDenied,
    BadMessage,
    BadRequest,
    ConfigInvalid,
    Locked,
    NotInitialised,
    StorageFailed,
)

_ADMIN = "io.unsealerd.Admin"
_AGE_V1 = b"age-encryption.org/v1\n"


@click.group(cls=Group)
def backup() -> None:
    """Verify, export and pin the backup."""


@backup.command("verify")
@click.pass_obj
def verify(app: App) -> None:
    """Check the backup on disk against what the daemon wrote, and that every operator can open it."""
    with app.admin() as admin:
        answer = admin.call(f"{_ADMIN}.VerifyBackup")
    facts = {
        "generation": required(answer, "generation", int),
        "bytes": required(answer, "bytes", int),
        "sha256": required(answer, "sha256", str),
        "operators": texts(answer, "operators"),
    }
    if app.json:
        print_json(facts)
        return
    print_table(
        [
            ("backup", "is what the daemon wrote"),
            ("generation", str(facts["generation"])),
            ("size", f"{facts['bytes']} bytes"),
            ("sha256", str(facts["sha256"])),
            ("opened by", ", ".join(texts(answer, "operators")) or "nobody"),
        ]
    )


@backup.command("export")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--force", is_flag=True, help="Replace FILE.")
@click.pass_obj
def export(app: App, file: Path, force: bool) -> None:
    """Write a copy of the backup to FILE: an age file that only the operators' keys open."""
    with app.admin() as admin:
        answer = admin.call(f"{_ADMIN}.ExportBackup")
    generation = required(answer, "generation", int)
    try:
        data = base64.b64decode(required(answer, "backup", str), validate=True)
    except binascii.Error as err:
        raise BadMessage("the exported backup is not base64") from err
    if not data.startswith(_AGE_V1):
        raise BadMessage("the exported backup is not an age file")
    write_new(file, data, replace=force)
    facts = {
        "file": str(file),
        "keyring": optional(answer, "keyring", str),
        "generation": generation,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    if app.json:
        print_json(facts)
        return
    print_table([(name, str(value)) for name, value in facts.items() if value is not None])


@backup.command("pin")
@click.option("--replace", is_flag=True, help="Even if another keyring is pinned.")
@click.pass_obj
def pin(app: App, replace: bool) -> None:
    """Say which keyring is this host's: from then on no backup of another one is opened.

    `unsealctl init` has done so. It is needed again after a backup was restored on another machine. The keyring is the one that
    is open; or, with --replace, the one that was just refused for being another.
    """
    file = id_file(app)
    with app.admin() as admin:
        status = required(admin.call(f"{_ADMIN}.Status"), "status", dict)
    keyring = required(status, "keyring", dict)
    if required(keyring, "file", str) != str(file):
        raise ConfigInvalid(f"the daemon reads {keyring['file']}: name the same configuration, --config FILE")
    if required(status, "state", str) == "uninitialised":
        raise NotInitialised("there is no keyring yet")
    before, whole = _pinned(file)
    # What was refused is pinned only in the place of what it was refused for: for less somebody has to have opened it.
    found = optional(keyring, "id", str) or (optional(keyring, "foreign", str) if whole is not None else None)
    if found is None:
        raise Locked("no keyring is open, and none was refused")
    if before != found:
        if whole is not None and not replace:
            raise BadRequest(
                f"{file} says {whole}, and the backup says {found}; --replace, if it is the right one"
            )
        write_id(file, found)
    if app.json:
        print_json({"file": str(file), "keyring": found, "before": before})
        return
    rows = [("file", str(file)), ("keyring", found)]
    print_table([*rows, ("before", "the same" if before == found else whole or "none")])


def id_file(app: App) -> Path:
    """Where it says which keyring is this host's."""
    from unsealerd.config import DEFAULT_PATH

    return keyringid.beside(app.config_path or DEFAULT_PATH)


def write_id(file: Path, keyring_id: str) -> None:
    """Replace whatever is there. Raises `AccessDenied`, `StorageFailed`."""
    # For everybody to read: the daemon's user must, and it is no secret.
    write_new(file, keyringid.line(keyring_id), replace=True, mode=0o644)


def _pinned(file: Path) -> tuple[str | None, str | None]:
    """The id that is pinned, and what to show of the file; None each, if there is none."""
    try:
        pinned = keyringid.read(file)
    except ConfigInvalid:
        return None, "something that cannot be read"
    return pinned, pinned


def write_new(file: Path, data: bytes, *, replace: bool, mode: int = 0o600) -> None:
    """Write a file whole or not at all, and durably; the mode does not depend on the umask.

    Raises `BadRequest` if it is there and may not be replaced, `AccessDenied`, `StorageFailed`.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    placed = False
    try:
        if not replace:
            # The name is taken first, so that the rename below replaces nothing but this empty file. (Not
            # link(2): the offline medium may well be FAT.)
            os.close(os.open(file, flags, 0o600))
            placed = True
        with os.fdopen(os.open(temporary, flags, 0o600), "wb") as out:
            out.write(data)
            out.flush()
            os.fchmod(out.fileno(), mode)
            os.fsync(out.fileno())
        temporary.rename(file)
        placed = False
        directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except FileExistsError as err:
        raise BadRequest(f"{err.filename} exists; --force replaces it") from err
    except PermissionError as err:
        raise AccessDenied(f"{err.filename or file}: {err.strerror}") from err
    except OSError as err:
        raise StorageFailed(f"{err.filename or file}: {err.strerror}") from err
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if placed:
            with contextlib.suppress(OSError):
                file.unlink()
