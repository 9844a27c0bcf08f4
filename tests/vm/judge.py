"""Whether what is left of the state directory is what was promised, by the operator's key and the project's own readers."""

import hashlib
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from unsealerd.cli.chainedlog import ChainedLog
from unsealerd.core import keyring
from unsealerd.core.age import X25519Identity, decrypt, parse_header
from unsealerd.core.keyring import Keyring
from unsealerd.core.sharing import Backup
from unsealerd.daemon.audit import AuditLog
from unsealerd.daemon.keeper import SEALED
from unsealerd.daemon.store import BACKUP, PREVIOUS
from unsealerd.errors import UnsealerdError
from unsealerd.tpm.sealed import SealedCopy
from vm.errors import Broken
from vm.notes import Note, versions

KEY = "web-sessions"
_CHANGES = frozenset({"key_rotate", "seal", "disarm"})  # events, one for each step of busy.py


@dataclass(frozen=True, slots=True)
class State:
    """What was found."""

    generation: int
    versions: Mapping[int, str]
    """Number and digest of those that verify."""
    changes: int
    """Of them the audit log tells."""
    sealed: bool
    """There is a sealed copy, and it is of the very backup beside it."""
    stale: bool
    """There is one of a backup before it."""


@dataclass(frozen=True, slots=True)
class Promised:
    """What must be found, at least."""

    steps: int = 0
    """Changes that the daemon had reported."""
    versions: Mapping[int, str] = field(default_factory=dict)
    sealed: bool | None = False
    """None: a change was under way."""


def promised(told: list[Note], end: int, before: Mapping[int, str]) -> Promised:
    """What the guest knew after ``end`` requests of its disk. ``before``: the versions that it had at first."""
    known = [note for note in told if note.index < end]
    done = [note for note in known if note.words[0] == "done"]
    steps = [note.words for note in known if note.words[0] != "version"]
    sealed: bool | None = False
    if steps and steps[-1][0] == "begin":
        sealed = False if steps[-1][1] == "rotate" else None
    elif steps:
        sealed = steps[-1][1] == "seal"
    return Promised(len(done), {**before, **versions(known)}, sealed)


def state(directory: Path, identity: X25519Identity) -> State:
    """Of a copy of the state directory. Raises Broken if anything is not whole."""
    sealed = directory / SEALED
    try:
        with closing(_opened(directory / BACKUP, identity)) as opened:
            usable = {one.version: hashlib.sha256(one.view).hexdigest()[:16] for one in opened.usable(KEY)}
            metadata = opened.metadata
        if (directory / PREVIOUS).exists():
            _opened(directory / PREVIOUS, identity).close()
        copy = SealedCopy.decode(sealed.read_bytes()) if sealed.exists() else None
        changes = _changes(directory)
    except UnsealerdError as err:
        raise Broken(f"{type(err).__name__}: {err.detail}") from err
    counter = metadata.counter or 0
    if copy is not None and copy.counter > counter:
        raise Broken("the sealed copy is of a backup that is not there")
    return State(
        metadata.generation,
        usable,
        changes,
        sealed=copy is not None and copy.counter == counter,
        stale=copy is not None and copy.counter < counter,
    )


def require(found: State, start: State, least: Promised) -> None:
    """``start``: the state before the first step. Raises Broken."""
    if found.generation < start.generation + least.steps:
        raise Broken(
            f"a change is lost: generation {found.generation}, after {least.steps} from {start.generation}"
        )
    if found.changes < start.changes + least.steps:
        raise Broken("a change that was reported is not in the audit log")
    for version, digest in least.versions.items():
        if found.versions.get(version) != digest:
            raise Broken(f"version {version} of the key is lost or another")
    if least.sealed is not None and (found.stale or found.sealed is not least.sealed):
        raise Broken(f"a sealed copy should {'' if least.sealed else 'not '}be there for this backup")


def _opened(backup: Path, identity: X25519Identity) -> Keyring:
    if not backup.exists():
        raise Broken("the backup is missing")
    data = backup.read_bytes()
    Backup.of(parse_header(data))
    plain = decrypt(data, [identity])
    try:
        return keyring.parse(plain)
    except UnsealerdError:
        plain.close()
        raise


def _changes(directory: Path) -> int:
    """Verifies the whole chain; then the daemon's own part opens it, which may cut a torn line off the end."""
    with closing(ChainedLog(directory)) as chain:
        changes = sum(record["event"] in _CHANGES for _, record in chain.records())
        chain.check_kept()
    opened = AuditLog(directory, time.time)
    try:
        opened.open()
    finally:
        opened.close()
    return changes
