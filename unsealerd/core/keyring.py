"""The keyring: all keys of a host, as a value, and the format in which it lies inside the backup.

::

    unsealerd-keyring-v2 LF
    LENGTH LF                 decimal, no leading zero: bytes of the metadata
    METADATA                  canonical JSON, no secret in it
    LINEAGE                   32 bytes, drawn when the keyring was made, the same ever since
    KEY BYTES                 of every version that is not revoked, in the order of the metadata, back to back

A backup of version 1 has no lineage. It is read, so that nobody loses a key by an upgrade; what is written has one, drawn then.

The lineage says whose a backup is. An age file can be written by anybody who knows the operators' recipients; one with this
lineage only by who has opened a backup of this keyring. Its digest, the keyring's id, is no secret (unsealerd/keyringid.py).

The whole plaintext is in one `SecretBuffer`, both in memory and while it is encrypted or decrypted, so lineage and key bytes are
never parsed, and copied into such memory only. Strict: unknown fields, gaps, trailing bytes and any other way to write the same
thing are refused, so that ``parse`` and ``Keyring.buffer`` are inverse to each other.
"""

import hmac
import re

import msgspec

from unsealerd.core.secret import SecretBuffer, fill_random
from unsealerd.errors import KeyNotFound, KeyringInvalid, VersionNotFound
from unsealerd.model import KEY_NAME, VersionState

MAX_BYTES = 16 << 20  # of the whole plaintext
LINEAGE_SIZE = 32  # bytes
_MAGIC = b"unsealerd-keyring-v2\n"
_MAGIC_1 = b"unsealerd-keyring-v1\n"
_ID_LABEL = b"unsealerd.io/keyring/v1"
_MAX_LENGTH_DIGITS = 8
_MAX_COUNT = 2**64 - 1  # of the generation; the TPM's counter has 64 bits
_MAX_TIME = 253_402_300_799  # the end of the year 9999: what comes later cannot be shown as a date
_NAME = re.compile(KEY_NAME)

_encoder = msgspec.json.Encoder(order="sorted")


class Version(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    state: VersionState
    size: int
    """Bytes."""
    created: int
    """Unix seconds, as every time here."""
    changed: int | None
    """When it came into its state; None in a primary, which is what every version is created as."""
    retires: int | None
    """When an active version becomes retired; None in every other state."""


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    owner: str
    purpose: str
    versions: tuple[Version, ...]
    """Ascending, from 1, without a gap."""

    @property
    def primary(self) -> Version | None:
        """The version that signs. None only when every version is revoked or retired."""
        for version in reversed(self.versions):
            if version.state is VersionState.PRIMARY:
                return version
        return None


class Metadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    generation: int
    """Grows by one with every write, from 1."""
    written: int
    counter: int | None
    """The value that the TPM's counter has once this backup is the current one; None without a TPM."""
    keys: tuple[Key, ...]
    """Sorted by name."""


class Usable(msgspec.Struct, frozen=True):
    """One version of a key, with its bytes. The view is of the keyring's secret memory."""

    version: int
    view: memoryview


class Keyring:
    """Metadata, and the secret memory that holds the serialised whole. Closed when it is replaced."""

    __slots__ = ("_keys", "_usable", "_views", "buffer", "lineage", "metadata")

    def __init__(self, metadata: Metadata, buffer: SecretBuffer, offset: int, lineage_size: int) -> None:
        """``offset``: where the secret part of the buffer begins. ``lineage_size``: 0 in a keyring of version 1."""
        self.metadata = metadata
        self.buffer = buffer
        self.lineage = buffer.view[offset : offset + lineage_size] if lineage_size else None
        offset += lineage_size
        self._keys = {key.name: key for key in metadata.keys}
        self._views: dict[tuple[str, int], memoryview] = {}
        self._usable: dict[str, tuple[Usable, ...]] = {}
        for key in metadata.keys:
            usable: list[Usable] = []
            for version in key.versions:
                if version.state is VersionState.REVOKED:
                    continue
                view = buffer.view[offset : offset + version.size]
                offset += version.size
                self._views[key.name, version.version] = view
                if version.state is VersionState.PRIMARY:
                    usable.insert(0, Usable(version.version, view))
                elif version.state is VersionState.ACTIVE:
                    usable.append(Usable(version.version, view))
            # Without a primary nothing is usable: an older version must not pass for it.
            self._usable[key.name] = tuple(usable) if key.primary is not None else ()

    @property
    def id(self) -> str | None:
        """HMAC-SHA256 with the lineage as key, in hex. It tells nothing of the lineage, which is as long as the digest.

        None in a keyring of version 1.
        """
        return None if self.lineage is None else hmac.digest(self.lineage, _ID_LABEL, "sha256").hex()

    def key(self, name: str) -> Key:
        """Raises `KeyNotFound`."""
        key = self.find(name)
        if key is None:
            raise KeyNotFound(name)
        return key

    def find(self, name: str) -> Key | None:
        return self._keys.get(name)

    def usable(self, name: str) -> tuple[Usable, ...]:
        """The versions that verify, primary first. Raises `KeyNotFound`, and `VersionNotFound` when there is no primary."""
        usable = self._usable.get(name)
        if usable is None:
            raise KeyNotFound(name)
        if not usable:
            raise VersionNotFound(f"{name} has no primary version")
        return usable

    def view(self, name: str, version: int) -> memoryview:
        """The bytes of any version that is not revoked."""
        return self._views[name, version]

    def close(self) -> None:
        """Wipe every key."""
        for view in self._views.values():
            view.release()
        if self.lineage is not None:
            self.lineage.release()
        self.buffer.close()
        self._views.clear()
        self._usable.clear()


def compose(metadata: Metadata, lineage: memoryview | None, keys: list[memoryview | int]) -> Keyring:
    """A keyring whose key bytes are, in the order of the metadata, copied from a view or drawn afresh.

    An int in ``keys`` is the number of bytes to draw from the kernel's generator. ``lineage``: None makes a keyring that is
    nobody's yet. Raises `KeyringInvalid` for what `parse` would refuse.
    """
    _check(metadata)
    sources = [LINEAGE_SIZE if lineage is None else lineage, *keys]
    text = _encoder.encode(metadata)
    head = b"%b%d\n%b" % (_MAGIC, len(text), text)
    total = len(head) + sum(source if isinstance(source, int) else source.nbytes for source in sources)
    if total > MAX_BYTES:
        raise KeyringInvalid(f"larger than {MAX_BYTES} bytes")
    buffer = SecretBuffer(total)
    buffer.view[: len(head)] = head
    offset = len(head)
    for source in sources:
        size = source if isinstance(source, int) else source.nbytes
        target = buffer.view[offset : offset + size]
        if isinstance(source, int):
            fill_random(target)
        else:
            target[:] = source
        offset += size
    return Keyring(metadata, buffer, len(head), LINEAGE_SIZE)


def parse(buffer: SecretBuffer) -> Keyring:
    """Take over a decrypted plaintext. Raises `KeyringInvalid` on any other bytes; the buffer is then the caller's to close."""
    metadata, offset, lineage_size = _parse_head(buffer.view)
    _check(metadata)
    keys = (v.size for key in metadata.keys for v in key.versions if v.state is not VersionState.REVOKED)
    sizes = [lineage_size, *keys] if lineage_size else [*keys]
    if offset + sum(sizes) != len(buffer):
        raise KeyringInvalid("lineage and key bytes are not as long as the metadata says")
    for size in sizes:
        # Promise 11: bytes that were never drawn are not a key.
        if hmac.compare_digest(buffer.view[offset : offset + size], bytes(size)):
            raise KeyringInvalid("a key, or the lineage, is all zero")
        offset += size
    return Keyring(metadata, buffer, len(buffer) - sum(sizes), lineage_size)


def _parse_head(view: memoryview) -> tuple[Metadata, int, int]:
    """The metadata, where the secret part begins, and how long the lineage in it is."""
    if view.nbytes > MAX_BYTES or view[: len(_MAGIC)] not in (_MAGIC, _MAGIC_1):
        raise KeyringInvalid("not a keyring of version 1 or 2")
    lineage_size = LINEAGE_SIZE if view[: len(_MAGIC)] == _MAGIC else 0
    start = len(_MAGIC)
    # The length and the metadata hold no secret, so ordinary bytes will do.
    digits, newline, _ = bytes(view[start : start + _MAX_LENGTH_DIGITS + 1]).partition(b"\n")
    if not newline or not digits.isdigit() or digits.startswith(b"0"):
        raise KeyringInvalid("the length of the metadata is malformed")
    start += len(digits) + 1
    text = bytes(view[start : start + int(digits)])
    if len(text) != int(digits):
        raise KeyringInvalid("the metadata is cut off")
    try:
        metadata = msgspec.json.decode(text, type=Metadata)
    except (ValueError, RecursionError) as err:
        raise KeyringInvalid(f"metadata: {err}") from err
    if _encoder.encode(metadata) != text:
        raise KeyringInvalid("the metadata is not canonical")
    return metadata, start + len(text), lineage_size


def _check(metadata: Metadata) -> None:
    counter = 1 if metadata.counter is None else metadata.counter
    if not (
        1 <= metadata.generation <= _MAX_COUNT and 1 <= counter <= _MAX_COUNT and _is_time(metadata.written)
    ):
        raise KeyringInvalid("generation, time or counter out of range")
    names = [key.name for key in metadata.keys]
    if names != sorted(set(names)):
        raise KeyringInvalid("the keys are not sorted by name")
    for key in metadata.keys:
        if _NAME.fullmatch(key.name) is None:
            raise KeyringInvalid(f"{key.name!r} is not the name of a key")
        if not (key.owner.isprintable() and key.purpose.isprintable()):
            raise KeyringInvalid(f"{key.name}: owner or purpose cannot be printed")
        _check_versions(key)


def _check_versions(key: Key) -> None:
    numbers = [version.version for version in key.versions]
    if not numbers or numbers != list(range(1, len(numbers) + 1)):
        raise KeyringInvalid(f"{key.name}: the versions are not numbered from 1")
    for version in key.versions:
        if version.state is VersionState.PRIMARY and version.version != len(numbers):
            # So there are no two, and no newer version stands behind one that signs.
            raise KeyringInvalid(f"{key.name}: a primary version that is not the newest")
        if not 1 <= version.size <= MAX_BYTES or not all(
            _is_time(time) for time in (version.created, version.changed, version.retires) if time is not None
        ):
            raise KeyringInvalid(f"{key.name}: size or time out of range")
        if (version.changed is None) != (version.state is VersionState.PRIMARY) or (
            version.retires is None
        ) != (version.state is not VersionState.ACTIVE):
            raise KeyringInvalid(f"{key.name}: the times of version {version.version} do not fit its state")


def _is_time(seconds: int) -> bool:
    return 0 <= seconds <= _MAX_TIME
