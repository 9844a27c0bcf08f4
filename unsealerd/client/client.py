"""A service's view of the daemon: the sockets ``keys``, ``key/NAME`` and ``keyset/NAME``."""

import os
import re
import threading
from binascii import b2a_base64
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Self

from unsealerd.client.connection import Connection, Deadline, connect, is_uint
from unsealerd.errors import (
    AccessDenied,
    BadMessage,
    BadRequest,
    CallerChanged,
    DaemonUnreachable,
    KeyNotFound,
    LimitExceeded,
    Locked,
    NotInitialised,
    UnsealerdError,
)
from unsealerd.model import Operation, State, VersionState

MAX_MESSAGE_BYTES = 65536
"""io.unsealerd.Keys: the longest message that is signed or verified."""
MIN_KEY_BYTES = 16
MAX_KEY_BYTES = 1024
MAX_KEYSET_BYTES = 1 << 20
MAC_BYTES = 32
_KEY_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_KEYSET_LINE = re.compile(rb"([1-9][0-9]{0,9}) ((?:[0-9a-f]{2}){16,1024})")
_MAC = re.compile(r"[0-9a-f]{64}")


class Signature(NamedTuple):
    mac: bytes
    """HMAC-SHA256, 32 bytes."""
    version: int


class Verification(NamedTuple):
    """What `Client.verify` found. It is true exactly when the MAC is right.

    A tuple is true whatever it holds; ``if client.verify(…)`` must not be, so that this one says so itself.
    """

    valid: bool
    version: int | None
    stale: bool | None
    """The MAC matched a version that is not primary: sign again."""

    def __bool__(self) -> bool:
        return self.valid is True


class KeyVersion(NamedTuple):
    version: int
    state: VersionState
    created: int
    """Unix time, seconds."""


class Key(NamedTuple):
    """A key that the caller may use in some way. While the host is locked only the first two are known."""

    name: str
    operations: frozenset[Operation]
    primary: int | None
    versions: tuple[KeyVersion, ...]


class Keys(NamedTuple):
    state: State
    keys: tuple[Key, ...]

    def find(self, name: str) -> Key | None:
        return next((key for key in self.keys if key.name == name), None)


class Event(NamedTuple):
    """Something that `Client.monitor` saw: state, locked, unlocked, rotated, revoked or created."""

    event: str
    state: State
    key: str | None
    version: int | None


class Client:
    """The daemon on this machine, for one service.

    ``timeout``: seconds for each call, None for ever. It is also how long `read` waits while the host is
    locked.

    Threads may share one: `sign` and `verify` then take turns on one connection (a `Client` for each thread
    does not wait). After fork(2) the child connects anew by itself, because the daemon answers a process,
    not a descriptor. A connection that the daemon closed is made again, once for each call: nothing that is
    asked here changes anything, so it can be asked twice.
    """

    def __init__(
        self, runtime_dir: str | os.PathLike[str] = "/run/unsealerd", timeout: float | None = 30.0
    ) -> None:
        self._directory = os.fspath(runtime_dir)
        self._timeout = timeout
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._pid = 0

    def close(self) -> None:
        with self._lock:
            self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- key bytes

    def read(self, name: str) -> bytes:
        """The raw bytes of the primary version: at least 16, never none.

        Waits while the host is locked. Raises `Locked`, `AccessDenied` or `DaemonUnreachable` when the time
        is up (the daemon never ends a connection without the key, so the reason is asked for on the other
        socket), `KeyNotFound`, `BadMessage`.
        """
        data = self._read_socket("key", name, MAX_KEY_BYTES)
        # The daemon sends a key with one send(2), which a Unix socket does not split at this size: less
        # than the smallest key is not a torn key, it is something else.
        if not MIN_KEY_BYTES <= len(data) <= MAX_KEY_BYTES:
            raise BadMessage(f"key {name}: {len(data)} bytes are not a key")
        return data

    def read_all(self, name: str) -> list[tuple[int, bytes]]:
        """Version and bytes of all versions that verify, the primary first. Waits and raises as `read`."""
        return parse_keyset(self._read_socket("keyset", name, MAX_KEYSET_BYTES))

    def _read_socket(self, kind: str, name: str, limit: int) -> bytes:
        _check_name(name)
        path = os.path.join(self._directory, kind, name)
        deadline = Deadline(self._timeout)
        try:
            # Nothing at all means that the daemon ended while this reader waited: the next one may be there
            # already.
            data = _read_to_end(path, limit, deadline) or _read_to_end(path, limit, deadline)
        except TimeoutError as err:
            raise self._why_held(name) from err
        except DaemonUnreachable as err:
            if isinstance(err.__cause__, FileNotFoundError) and os.path.exists(self._path("keys")):
                raise KeyNotFound(f"no key {name}") from err
            raise
        if not data:
            raise DaemonUnreachable(f"{path}: closed without giving the key")
        return data

    def _why_held(self, name: str) -> UnsealerdError:
        """Why a reader was kept waiting for the whole time."""
        try:
            self.check_readable(name)
        except UnsealerdError as err:
            return err
        return DaemonUnreachable(f"key {name}: no answer in time")

    def check_readable(self, name: str) -> None:
        """Whether `read` would answer now.

        Raises `Locked`, `NotInitialised`, `AccessDenied`, or what `keys` raises.
        """
        _check_name(name)
        listing = self.keys()
        key = listing.find(name)
        if listing.state is State.UNINITIALISED:
            raise NotInitialised("this host has no keys yet")
        if key is None or Operation.READ not in key.operations:
            # Whether there is such a key is not told to who may not use it.
            raise AccessDenied(f"key {name}: this caller may not read it, or there is no such key")
        if listing.state is State.LOCKED:
            raise Locked("the host is locked")

    # --- computing with keys

    def sign(self, name: str, message: bytes) -> Signature:
        """The HMAC-SHA256 of at most 65536 bytes under the primary version."""
        answer = self._ask("Sign", {"key": _check_name(name), "message": _encoded(message)})
        mac, version = answer.get("mac"), answer.get("version")
        if not isinstance(mac, str) or not _MAC.fullmatch(mac) or not is_uint(version):
            raise BadMessage("the answer to Sign is not one")
        return Signature(bytes.fromhex(mac), version)

    def verify(self, name: str, message: bytes, mac: bytes) -> Verification:
        """Whether the MAC is right under the primary or an active version: a `Verification`, true or false."""
        answer = self._ask(
            "Verify", {"key": _check_name(name), "message": _encoded(message), "mac": bytes(mac).hex()}
        )
        valid, version, stale = answer.get("valid"), answer.get("version"), answer.get("stale")
        if valid is False and version is None and stale is None:
            return Verification(False, None, None)
        if valid is True and is_uint(version) and isinstance(stale, bool):
            return Verification(True, version, stale)
        raise BadMessage("the answer to Verify is not one")

    def keys(self) -> Keys:
        """The host's state, and the keys that the caller may use in some way. Answers while locked too."""
        answer = self._ask("ListKeys", {})
        keys = answer.get("keys")
        if not isinstance(keys, list):
            raise BadMessage("the answer to ListKeys is not one")
        return Keys(_state(answer.get("state")), tuple(_key(key) for key in keys))

    def monitor(self, *, patience: float | None = None) -> Iterator[Event]:
        """The state now, then every change, on a connection of its own.

        Ends with `DaemonUnreachable` when the daemon does; call it again then, and the first event says
        what was missed. Also if there is no change for ``patience`` seconds.
        """
        with Connection(self._path("keys"), timeout=self._timeout) as connection:
            for event in connection.stream("io.unsealerd.Keys.Monitor", patience=patience):
                yield _event(event)

    # --- the connection

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def _ask(self, method: str, parameters: Mapping[str, object]) -> dict[str, object]:
        with self._lock:
            try:
                return self._call(method, parameters)
            except CallerChanged:
                # This process moved to another unit since it connected: the new connection is judged as
                # what it is now.
                self._drop()
            except DaemonUnreachable:
                if self._connection is None or not self._connection.lost:
                    raise
            return self._call(method, parameters)

    def _call(self, method: str, parameters: Mapping[str, object]) -> dict[str, object]:
        if self._pid != os.getpid() or self._connection is None or self._connection.closed:
            self._drop()
            self._connection = Connection(self._path("keys"), timeout=self._timeout)
            self._pid = os.getpid()
        return self._connection.call(f"io.unsealerd.Keys.{method}", parameters)

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def parse_keyset(data: bytes) -> list[tuple[int, bytes]]:
    """The lines ``VERSION HEX`` of a keyset, the primary first. Raises `BadMessage`, on any bytes.

    Each line ends with a newline, so that a truncated answer is never taken for a shorter one.
    """
    if not data.endswith(b"\n"):
        raise BadMessage("the key set is empty or truncated")
    found: dict[int, bytes] = {}
    for line in data[:-1].split(b"\n"):
        match = _KEYSET_LINE.fullmatch(line)
        if match is None or int(match[1]) in found:
            raise BadMessage("the key set is not lines of VERSION HEX")  # and never quotes one
        found[int(match[1])] = bytes.fromhex(match[2].decode())
    return list(found.items())


def _read_to_end(path: str, limit: int, deadline: Deadline) -> bytes:
    """All bytes until the other end closes; empty when there were none.

    Raises `TimeoutError`, `DaemonUnreachable`.
    """
    sock = connect(path, deadline.left())
    data = bytearray()
    with sock:
        try:
            while len(data) <= limit:
                sock.settimeout(deadline.left())
                piece = sock.recv(min(limit + 1, 65536))
                if not piece:
                    break
                data += piece
            else:
                raise BadMessage(f"{path}: more than {limit} bytes")
        except TimeoutError:
            raise
        except ConnectionError:
            return b""
        except OSError as err:
            raise DaemonUnreachable(f"{path}: {err.strerror}") from err
    return bytes(data)


def _check_name(name: str) -> str:
    """The name, which also becomes a path: no slash, no leading dot. Raises `BadRequest`."""
    if not _KEY_NAME.fullmatch(name):
        raise BadRequest(f"{name!r} is not the name of a key")
    return name


def _encoded(message: bytes) -> str:
    if len(message) > MAX_MESSAGE_BYTES:
        raise LimitExceeded(
            f"a message has at most {MAX_MESSAGE_BYTES} bytes; a longer one can be hashed first"
        )
    return b2a_base64(message, newline=False).decode()


def _state(value: object) -> State:
    try:
        return State(value)
    except ValueError as err:
        raise BadMessage("the daemon names a state that is none") from err


def _key(value: object) -> Key:
    match value:
        case {"name": str(name), "operations": [*operations], "versions": [*versions], **rest}:
            primary = rest.get("primary")
            if primary is None or is_uint(primary):
                try:
                    allowed = frozenset(Operation(operation) for operation in operations)
                except ValueError as err:
                    raise BadMessage("the daemon names an operation that is none") from err
                return Key(name, allowed, primary, tuple(_version(version) for version in versions))
    raise BadMessage("the answer to ListKeys is not one")


def _version(value: object) -> KeyVersion:
    match value:
        case {"version": int(version), "state": str(state), "created": int(created)}:
            try:
                return KeyVersion(version, VersionState(state), created)
            except ValueError as err:
                raise BadMessage("the daemon names a state of a version that is none") from err
    raise BadMessage("the answer to ListKeys is not one")


def _event(value: dict[str, object]) -> Event:
    key, version = value.get("key"), value.get("version")
    event = value.get("event")
    if (
        not isinstance(event, str)
        or not (key is None or isinstance(key, str))
        or not (version is None or is_uint(version))
    ):
        raise BadMessage("the answer to Monitor is not one")
    return Event(event, _state(value.get("state")), key, version)
