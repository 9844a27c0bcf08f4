"""The keyring's memory in the service manager's descriptor store: a restart of the daemon is not a reboot.

An image is secret memory of its own behind a descriptor::

    unsealerd-memory-v1 LF
    BOOT ID LF                36 characters
    SHA-256 LF                64 hex digits: of the backup file that holds the same keyring
    KEYRING                   as core/keyring.py has it, to the end

The order of a change, so that at every instant one stored image belongs to the backup on disk::

    store the image of the new backup → write the new backup → wipe the image of the old one, and have it dropped

Used from the thread of the changes, and from the event loop (`wipe` at a lock, which waits for no TPM): hence the mutex.
"""

import contextlib
import hashlib
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from unsealerd.core import keyring as keyring_format
from unsealerd.core.keyring import Keyring
from unsealerd.core.secret import SecretBuffer, SecretMemoryKind
from unsealerd.core.sharedsecret import SharedSecret
from unsealerd.daemon.fdstore import FdStore, Received
from unsealerd.errors import KeyringInvalid, LimitExceeded, SealRefused, UnsealerdError
from unsealerd.model import LockReason

PREFIX = "memory-"
MAX_IMAGES = 8  # of which all but one are on their way out
_MAGIC = b"unsealerd-memory-v1\n"
_BOOT_ID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_DIGEST = re.compile(rb"[0-9a-f]{64}")
_BOOT_ID_BYTES = 36
_DIGEST_BYTES = 64
_HEAD_BYTES = len(_MAGIC) + _BOOT_ID_BYTES + 1 + _DIGEST_BYTES + 1
_MAX_BYTES = _HEAD_BYTES + keyring_format.MAX_BYTES
_SWAPS = Path("/proc/swaps")

_NO_MANAGER = "no service manager that would keep it"
_SWAP = "no memfd_secret, and this machine has swap: nobody would lock the pages between two daemons"
_NOT_TAKEN = "the service manager did not take it"
_NO_MEMORY = "there was not enough locked memory for it"
_NOTHING = "there is no keyring in memory"
_FULL = "too many images wait to be dropped"

_log = logging.getLogger("unsealerd")


class _Image(msgspec.Struct, frozen=True):
    name: str
    digest: str
    """SHA-256 of the backup, hex; empty if the image says nothing that can be believed."""
    boot_id: str
    memory: SharedSecret


class KeptMemory:
    """``read_backup`` gives the backup on disk, and raises the storage errors."""

    def __init__(
        self,
        store: FdStore,
        received: Sequence[Received],
        read_backup: Callable[[], bytes],
        boot_id: Callable[[], str],
    ) -> None:
        self._store = store
        self._read_backup = read_backup
        self._boot_id = boot_id
        self._mutex = threading.Lock()
        self._images: list[_Image] = []
        self._refused: list[str] = []  # why, for each descriptor that is no image
        self._closed = False  # to new images: the host was locked since
        self._why: str | None = _NOTHING if store.available else _NO_MANAGER
        self._take(received)

    def _take(self, received: Sequence[Received]) -> None:
        names = [entry.name for entry in received]
        for entry in received:
            try:
                image = _open(entry)
            except KeyringInvalid as err:
                self._refuse(entry.name, err.detail)
                continue
            if image is None:
                self._store.remove(entry.name)
            elif names.count(entry.name) > 1:
                image.memory.close()  # wiped, as whatever else is refused
                self._refuse(entry.name, "two descriptors of one name")
            else:
                self._images.append(image)

    def _refuse(self, name: str, why: str) -> None:
        _log.warning("kept_memory_refused name=%r why=%s", name, why)
        self._refused.append(why)
        self._store.remove(name)

    # --- after a restart

    @property
    def found(self) -> bool:
        """Whether the process before this one has left anything."""
        return bool(self._images or self._refused)

    def restore(self) -> tuple[Keyring, bytes]:
        """The keyring that belongs to the backup on disk, in memory of its own, and that backup.

        Whether the backup is current is for the caller to find out. What does not belong to it is wiped. Raises `SealRefused`
        (memory_refused) if nothing does, and the storage errors.
        """
        data = self._read_backup()
        digest = hashlib.sha256(data).hexdigest()
        with self._mutex:
            refused, self._refused = self._refused, []
            for image in tuple(self._images):
                if image.boot_id != self._boot_id():
                    refused.append("it is of another boot")
                elif image.digest != digest:
                    refused.append("it belongs to another backup than the one on disk")
                else:
                    try:
                        keyring = _keyring(image.memory)
                    except KeyringInvalid as err:
                        refused.append(err.detail)
                    else:
                        self._why = None
                        self._drop_others(digest)
                        return keyring, data
            self._drop_all()
        raise SealRefused(LockReason.MEMORY_REFUSED, "; ".join(dict.fromkeys(refused)))

    # --- while the daemon runs

    def admit(self) -> None:
        """From now on what is opened may be kept."""
        with self._mutex:
            self._closed = False

    @contextlib.contextmanager
    def following(self, keyring: Keyring, backup: bytes) -> Iterator[None]:
        """Around the write of a backup: before it the image is stored, and after it every other one is gone.

        If the write fails, what stays is the image of whatever is on disk then. Never raises by itself: a keyring that is not
        kept is no reason not to change it.
        """
        digest = hashlib.sha256(backup).hexdigest()
        self._offer(keyring, digest)
        try:
            yield
        except BaseException:
            with contextlib.suppress(UnsealerdError):  # what is on disk is not known: all stay
                self._settle(hashlib.sha256(self._read_backup()).hexdigest())
            raise
        self._settle(digest)

    def _offer(self, keyring: Keyring, digest: str) -> None:
        with self._mutex:
            if self._closed or not self._store.available:
                return
            if len(self._images) >= MAX_IMAGES:
                self._why = _FULL
                return
            try:
                memory = SharedSecret(_HEAD_BYTES + len(keyring.buffer))
            except LimitExceeded:
                self._why = _NO_MEMORY
                return
            if memory.kind is not SecretMemoryKind.MEMFD_SECRET and has_swap():
                memory.close()
                self._why = _SWAP
                return
            boot_id = self._boot_id()
            memory.view[:_HEAD_BYTES] = b"%b%b\n%b\n" % (_MAGIC, boot_id.encode(), digest.encode())
            memory.view[_HEAD_BYTES:] = keyring.buffer.view
            image = _Image(PREFIX + digest, digest, boot_id, memory)
            self._images.append(image)
            if self._store.store(image.name, memory.fd):
                self._why = None
            else:
                self._drop(image)
                self._why = _NOT_TAKEN

    def _settle(self, digest: str) -> None:
        with self._mutex:
            self._drop_others(digest)

    def wipe(self) -> None:
        """Wipe every image, and take no more until `admit`."""
        with self._mutex:
            self._closed = True
            self._refused.clear()
            self._drop_all()

    def leave(self) -> None:
        """The process ends: what is stored stays as it is."""
        with self._mutex:
            self._closed = True
            while self._images:
                self._images.pop().memory.leave()

    def describe(self) -> dict[str, object]:
        """``kept``: a restart of the daemon finds the keyring; ``why``: if not, why not."""
        kept = bool(self._images) and self._why is None
        return {"kept": kept, "why": None if kept else self._why}

    # --- parts

    def _drop_others(self, digest: str) -> None:
        for image in tuple(self._images):
            if image.digest != digest:
                self._drop(image)

    def _drop_all(self) -> None:
        for image in tuple(self._images):
            self._drop(image)
        self._why = _NOTHING if self._store.available else _NO_MANAGER

    def _drop(self, image: _Image) -> None:
        self._images.remove(image)
        image.memory.close()  # wipes, for the service manager's copy too
        self._store.remove(image.name)


def has_swap(swaps: Path = _SWAPS) -> bool:
    """Whether the kernel may write memory to a disk. In doubt, yes."""
    try:
        return len(swaps.read_text().splitlines()) > 1  # the first line is the heading
    except OSError:
        return True


def _open(received: Received) -> _Image | None:
    """None if it was wiped, and not dropped when the process ended. Raises `KeyringInvalid`; what was mapped is wiped then."""
    memory = SharedSecret.received(received.fd, _MAX_BYTES)
    head = bytes(memory.view[:_HEAD_BYTES])
    if not any(head):
        memory.close()
        return None
    boot_id, _, digest = head[len(_MAGIC) : -1].partition(b"\n")
    if (
        head[: len(_MAGIC)] != _MAGIC
        or head[-1:] != b"\n"
        or not _BOOT_ID.fullmatch(boot_id)
        or not _DIGEST.fullmatch(digest)
        or received.name != PREFIX + digest.decode()
    ):
        memory.close()
        raise KeyringInvalid("not an image of a keyring")
    return _Image(received.name, digest.decode(), boot_id.decode(), memory)


def _keyring(memory: SharedSecret) -> Keyring:
    """A copy first: nobody who holds the descriptor too can change what was checked. Raises `KeyringInvalid`."""
    plain = SecretBuffer.copy_of(memory.view[_HEAD_BYTES:])
    try:
        return keyring_format.parse(plain)
    except KeyringInvalid:
        plain.close()
        raise
