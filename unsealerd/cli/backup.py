"""``unsealctl backup``: the encrypted keyring."""

import base64
import binascii
import contextlib
import hashlib
import os
from pathlib import Path

import click

from unsealerd.cli.app import App
from unsealerd.cli.command import Group
from unsealerd.cli.fields import required, texts
from unsealerd.cli.output import print_json, print_table
from unsealerd.errors import AccessDenied, BadMessage, BadRequest, StorageFailed

_ADMIN = "io.unsealerd.Admin"
_AGE_V1 = b"age-encryption.org/v1\n"


@click.group(cls=Group)
def backup() -> None:
    """Verify and export the backup."""


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
        "generation": generation,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    if app.json:
        print_json(facts)
        return
    print_table([(name, str(value)) for name, value in facts.items()])


def write_new(file: Path, data: bytes, *, replace: bool) -> None:
    """Write a file, mode 0600, whole or not at all, and durably.

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
