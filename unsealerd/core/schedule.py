"""What the configuration and the time ask of a keyring. Time is passed in."""

from collections.abc import Mapping
from typing import Protocol

from unsealerd.core.draft import Draft
from unsealerd.core.keyring import Keyring


class Declared(Protocol):
    """A key as the configuration declares it; sizes in bytes, times in seconds."""

    @property
    def owner(self) -> str: ...
    @property
    def purpose(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def rotate_every(self) -> int | None: ...
    @property
    def overlap(self) -> int: ...


def amend(draft: Draft, declared: Mapping[str, Declared], now: int) -> None:
    """Make the declared keys that are missing, end the overlaps that are over, and rotate what is due."""
    for name, key in declared.items():
        draft.create(name, owner=key.owner, purpose=key.purpose, size=key.size, now=now)
    draft.expire(now)
    for name, key in declared.items():
        created = draft.primary_created(name)
        if key.rotate_every is not None and created is not None and created + key.rotate_every <= now:
            draft.rotate(name, size=key.size, overlap=key.overlap, now=now)


def due(keyring: Keyring, declared: Mapping[str, Declared]) -> int | None:
    """Unix seconds at which `amend` will have something to do, or None."""
    times: list[int] = []
    for key in keyring.metadata.keys:
        every = declared[key.name].rotate_every if key.name in declared else None
        if every is not None and key.primary is not None:
            times.append(key.primary.created + every)
        times.extend(version.retires for version in key.versions if version.retires is not None)
    return min(times, default=None)
