"""``io.unsealerd.Keys``: what services use on the ``keys`` socket."""

import hmac
from collections.abc import Awaitable
from typing import TYPE_CHECKING

import msgspec

from unsealerd.core.keyring import Usable
from unsealerd.daemon.access import Access, Use
from unsealerd.daemon.host import Host
from unsealerd.daemon.interface import Empty, Interface, Method
from unsealerd.daemon.watch import Event
from unsealerd.errors import LimitExceeded
from unsealerd.model import Operation

if TYPE_CHECKING:
    from unsealerd.daemon.connection import Connection

MAX_MESSAGE_BYTES = 65536
MAC_BYTES = 32  # HMAC-SHA256
_KEY_EVENTS = frozenset({"created", "rotated", "revoked"})


class SignParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: str
    message: bytes


class VerifyParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: str
    message: bytes
    mac: str


class Signed(msgspec.Struct, frozen=True):
    mac: str
    version: int


class Verified(msgspec.Struct, frozen=True, omit_defaults=True):
    valid: bool
    version: int | None = None
    stale: bool | None = None


class KeysApi:
    """Sign and verify are answered without a task of their own once the connection's use of the key is on record."""

    def __init__(self, host: Host, access: Access) -> None:
        self._host = host
        self._access = access
        self._uses: dict[object, dict[tuple[str, Operation], Use]] = {}

    def interface(self) -> Interface:
        return Interface(
            "io.unsealerd.Keys",
            {
                "ListKeys": Method(Empty, self.list_keys),
                "Sign": Method(SignParameters, self.sign),
                "Verify": Method(VerifyParameters, self.verify),
                "Monitor": Method(Empty, self.monitor, streams=True),
            },
        )

    def list_keys(self, connection: "Connection", _: Empty) -> dict[str, object]:
        caller = connection.peer.caller
        keyring = self._host.keyring
        keys: list[dict[str, object]] = []
        for name in self._access.granted(caller):
            operations = self._access.operations(caller, name)
            entry: dict[str, object] = {
                "name": name,
                "operations": sorted(operation.value for operation in operations),
                "versions": [],
            }
            key = keyring.find(name) if keyring is not None else None
            if key is not None:
                entry["primary"] = key.primary.version if key.primary is not None else None
                entry["versions"] = [
                    {"version": v.version, "state": v.state.value, "created": v.created} for v in key.versions
                ]
            keys.append(entry)
        return {"state": self._host.state.value, "keys": keys}

    def sign(self, connection: "Connection", call: SignParameters) -> Signed | Awaitable[Signed]:
        use = self._known_use(connection, call.key, Operation.SIGN)
        if use is None:
            return self._first_sign(connection, call)
        return self._sign(use, call)

    def verify(self, connection: "Connection", call: VerifyParameters) -> Verified | Awaitable[Verified]:
        use = self._known_use(connection, call.key, Operation.VERIFY)
        if use is None:
            return self._first_verify(connection, call)
        return self._verify(use, call)

    def monitor(self, connection: "Connection", _: Empty) -> None:
        caller = connection.peer.caller
        stream = connection.stream()

        def tell(event: Event) -> None:
            if event.event in _KEY_EVENTS and not (event.key and self._access.operations(caller, event.key)):
                return
            stream.send(
                {
                    "event": event.event,
                    "state": event.state.value,
                    "key": event.key,
                    "version": event.version,
                }
            )

        stream.on_close = self._host.watchers.add(tell)
        tell(Event("state", self._host.state, None, None))

    def forget(self, connection: object) -> None:
        """The connection is gone: its counts become one record each."""
        for use in self._uses.pop(connection, {}).values():
            self._access.flush(use)

    def flush(self) -> None:
        """Write down what was counted since the last time."""
        for uses in self._uses.values():
            for use in uses.values():
                self._access.flush(use)

    def _known_use(self, connection: object, key: str, operation: Operation) -> Use | None:
        uses = self._uses.get(connection)
        use = uses.get((key, operation)) if uses is not None else None
        return use if use is not None and self._access.current(use) else None

    async def _authorise(self, connection: "Connection", key: str, operation: Operation) -> Use:
        self._host.open_keyring()  # while locked nothing is used, and nothing need be recorded
        use = await self._access.authorise(connection.peer.caller, key, operation)
        self._uses.setdefault(connection, {})[key, operation] = use
        return use

    async def _first_sign(self, connection: "Connection", call: SignParameters) -> Signed:
        return self._sign(await self._authorise(connection, call.key, Operation.SIGN), call)

    async def _first_verify(self, connection: "Connection", call: VerifyParameters) -> Verified:
        return self._verify(await self._authorise(connection, call.key, Operation.VERIFY), call)

    def _usable(self, use: Use, message: bytes) -> tuple[Usable, ...]:
        if len(message) > MAX_MESSAGE_BYTES:
            raise LimitExceeded(f"a message is at most {MAX_MESSAGE_BYTES} bytes")
        usable = self._host.open_keyring().usable(use.key)
        use.count += 1
        return usable

    def _sign(self, use: Use, call: SignParameters) -> Signed:
        primary = self._usable(use, call.message)[0]
        # hmac.digest reads the key where it lies, and keeps no midstate of it.
        return Signed(hmac.digest(primary.view, call.message, "sha256").hex(), primary.version)

    def _verify(self, use: Use, call: VerifyParameters) -> Verified:
        usable = self._usable(use, call.message)
        given = call.mac.encode("ascii", "replace").lower()
        found: Usable | None = None
        for candidate in usable:
            mac = hmac.digest(candidate.view, call.message, "sha256").hex().encode()
            # Every version is tried, so that the time says nothing about which one matched.
            if hmac.compare_digest(mac, given) and found is None:
                found = candidate
        if found is None:
            return Verified(valid=False)
        return Verified(valid=True, version=found.version, stale=found is not usable[0])
