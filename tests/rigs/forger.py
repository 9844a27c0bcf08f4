"""Whoever can write the state directory: makes a backup of their own for the operators of a host, from what is public.

Nothing secret of the host is used: the recipients are in its configuration and in the header of its backup, and what the
TPM's counter says was seen by whoever had the machine once.
"""

import os
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

from rigs.server import Server
from unsealerd.core.age import FILE_KEY_SIZE, decrypt, encrypt_under, parse_recipient
from unsealerd.core.draft import Draft
from unsealerd.core.keyring import LINEAGE_SIZE
from unsealerd.core.rules import KnownOperator, Rules
from unsealerd.core.secret import SecretBuffer
from unsealerd.core.sharing import wrap
from unsealerd.model import SealKind
from unsealerd.tpm.device import Tpm
from unsealerd.tpm.pin import TpmPin

BACKUP = "keyring.age"


@dataclass(frozen=True, slots=True)
class Forged:
    """A keyring that the attacker knows, as a backup that any one of the host's operators opens."""

    data: bytes
    key: bytes
    id: str
    file_key: bytes


def forge(server: Server, *, counter: int | None = None) -> Forged:
    """``counter``: the value that the backup has to say."""
    tables = tomllib.loads(server.config.read_text())["operator"]
    operators = tuple(KnownOperator(o["name"], parse_recipient(o["recipient"])) for o in tables)
    draft = Draft(None).create(
        "demo", owner="test@example.com", purpose="to be tested", size=32, now=int(time.time())
    )
    keyring = draft.build(generation=50, counter=counter, now=int(time.time()))
    try:
        with SecretBuffer.random(FILE_KEY_SIZE) as file_key:
            data = encrypt_under(wrap(Rules(operators), file_key), keyring.buffer.view, file_key)
            key = bytes(keyring.usable("demo")[0].view)
            return Forged(data, key, str(keyring.id), bytes(file_key.view))
    finally:
        keyring.close()


def without_lineage(keyring: bytes) -> bytes:
    """The plaintext of a keyring as version 1 of the format has it."""
    head, length, rest = keyring.split(b"\n", 2)
    metadata, secret = rest[: int(length)], rest[int(length) + LINEAGE_SIZE :]
    return b"%b\n%b\n%b%b" % (head.replace(b"-v2", b"-v1"), length, metadata, secret)


def before_lineages(server: Server) -> None:
    """The host's own backup as a version of this program wrote it whose format had no lineage. Without a TPM."""
    tables = tomllib.loads(server.config.read_text())["operator"]
    operators = tuple(KnownOperator(o["name"], parse_recipient(o["recipient"])) for o in tables)
    with decrypt((server.state / BACKUP).read_bytes(), [server.identity]) as plaintext:
        plain = memoryview(without_lineage(bytes(plaintext.view)))
    with SecretBuffer.random(FILE_KEY_SIZE) as file_key:
        data = encrypt_under(wrap(Rules(operators), file_key), plain, file_key)
    (server.state / BACKUP).write_bytes(data)


def put(server: Server, forged: Forged) -> None:
    (server.state / BACKUP).write_bytes(forged.data)


def seal(server: Server, forged: Forged, counter: int) -> None:
    """A sealed copy of the forged backup, by who can speak to the TPM; the daemon is off."""
    assert server.tpm is not None
    server.tpm.start()
    with (
        Tpm.open(server.tpm.tcti) as tpm,
        SecretBuffer.copy_of(forged.file_key) as file_key,
    ):
        tpm.attach(TpmPin.decode((server.state / "tpm.json").read_bytes()))
        copy = tpm.seal(
            file_key,
            kind=SealKind.REBOOT,
            pcrs=server.pcrs,
            counter=counter,
            extra_resets=0,
            created=0,
            deadline=0,
        )
    (server.state / "sealed.json").write_bytes(copy.encode())


def contents(state: Path) -> dict[str, bytes]:
    """What the state directory has of a keyring, by name; with the identity of each file, so that a rewrite shows."""
    return {
        name: str(os.stat(state / name).st_ino).encode() + (state / name).read_bytes()
        for name in (BACKUP, "keyring.age.previous", "sealed.json", "tpm.json", "lock.json")
        if (state / name).exists()
    }
