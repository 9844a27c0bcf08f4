"""A change of the keyring in the making: rules in, a new keyring out. No I/O; time is passed in."""

from typing import Self

import msgspec

from unsealerd.core.keyring import Key, Keyring, Metadata, Version, compose
from unsealerd.core.lifecycle import VERSION_TABLE, VersionEvent
from unsealerd.errors import KeyNotFound, VersionNotFound
from unsealerd.model import VersionState


class Change(msgspec.Struct, frozen=True):
    """What a draft did to one version, for the audit log and for those who watch."""

    event: str
    key: str
    version: int


class Draft:
    """Starts as a copy of a keyring's metadata; `build` draws the new key bytes.

    Without a keyring it becomes one that is nobody's yet, with a lineage of its own.
    """

    def __init__(self, keyring: Keyring | None) -> None:
        self._base = keyring
        self._keys = {key.name: key for key in keyring.metadata.keys} if keyring else {}
        self._fresh: set[tuple[str, int]] = set()
        self.changes: list[Change] = []

    def create(self, name: str, *, owner: str, purpose: str, size: int, now: int) -> Self:
        """A key with a primary version, unless there is one; then only owner and purpose follow."""
        known = self._keys.get(name)
        if known is None:
            self._keys[name] = Key(name, owner, purpose, ())
            self._append(name, size, now, "created")
        elif (known.owner, known.purpose) != (owner, purpose):
            self._keys[name] = msgspec.structs.replace(known, owner=owner, purpose=purpose)
            self.changes.append(Change("described", name, 0))
        if known is not None and known.primary is None:
            # Every version was revoked while nothing declared the key.
            self._append(name, size, now, "rotated")
        return self

    def rotate(self, name: str, *, size: int | None, overlap: int, now: int) -> Self:
        """A new primary; the old one verifies for ``overlap`` more seconds. Raises `KeyNotFound`."""
        key = self._key(name)
        primary = key.primary
        if primary is not None:
            event = VersionEvent.SUPERSEDE if overlap > 0 else VersionEvent.REPLACE
            self._apply(name, primary, event, now, retires=now + overlap if overlap > 0 else None)
        self._append(name, size or key.versions[-1].size, now, "rotated")
        return self

    def revoke(self, name: str, version: int | None, *, size: int | None, now: int) -> Self:
        """Destroy one version, or all of them. Raises `KeyNotFound`, `VersionNotFound`.

        ``size``: bytes of the version that replaces a revoked primary at once; None: it is not replaced.
        """
        key = self._key(name)
        targets = [
            v for v in key.versions if v.state is not VersionState.REVOKED and version in (None, v.version)
        ]
        if not targets:
            what = (
                f"{name} has no version left"
                if version is None
                else f"{name} has no version {version} to revoke"
            )
            raise VersionNotFound(what)
        had_primary = key.primary is not None
        for target in targets:
            self._apply(name, target, VersionEvent.REVOKE, now, retires=None)
        if size is not None and had_primary and self._key(name).primary is None:
            self._append(name, size, now, "rotated")
        return self

    def expire(self, now: int) -> Self:
        """Retire the active versions whose overlap is over."""
        for key in list(self._keys.values()):
            for version in key.versions:
                if (
                    version.state is VersionState.ACTIVE
                    and version.retires is not None
                    and version.retires <= now
                ):
                    self._apply(key.name, version, VersionEvent.EXPIRE, now, retires=None)
        return self

    def primary_created(self, name: str) -> int | None:
        """Unix seconds at which the key's primary was made, or None if it has none."""
        primary = self._key(name).primary
        return primary.created if primary is not None else None

    def build(self, *, generation: int, counter: int | None, now: int) -> Keyring:
        """The new keyring, in fresh secret memory. The old one is the caller's to close."""
        keys = tuple(self._keys[name] for name in sorted(self._keys))
        sources: list[memoryview | int] = []
        for key in keys:
            for version in key.versions:
                if version.state is VersionState.REVOKED:
                    continue
                if (key.name, version.version) in self._fresh:
                    sources.append(version.size)
                else:
                    assert self._base is not None
                    sources.append(self._base.view(key.name, version.version))
        lineage = self._base.lineage if self._base is not None else None
        return compose(Metadata(generation, now, counter, keys), lineage, sources)

    def _key(self, name: str) -> Key:
        if name not in self._keys:
            raise KeyNotFound(name)
        return self._keys[name]

    def _append(self, name: str, size: int, now: int, event: str) -> None:
        key = self._keys[name]
        version = Version(len(key.versions) + 1, VersionState.PRIMARY, size, now, None, None)
        self._keys[name] = msgspec.structs.replace(key, versions=(*key.versions, version))
        self._fresh.add((name, version.version))
        self.changes.append(Change(event, name, version.version))

    def _apply(
        self, name: str, version: Version, event: VersionEvent, now: int, *, retires: int | None
    ) -> None:
        state = VERSION_TABLE[version.state, event]
        moved = msgspec.structs.replace(version, state=state, changed=now, retires=retires)
        key = self._keys[name]
        versions = tuple(moved if v.version == version.version else v for v in key.versions)
        self._keys[name] = msgspec.structs.replace(key, versions=versions)
        if event in (VersionEvent.EXPIRE, VersionEvent.REVOKE):
            self.changes.append(
                Change("revoked" if event is VersionEvent.REVOKE else "retired", name, version.version)
            )
