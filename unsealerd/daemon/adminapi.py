"""``io.unsealerd.Admin``: everything that changes state, on the ``admin`` socket."""

import asyncio
import base64
import hashlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec

from unsealerd.core.auditchain import Facts
from unsealerd.core.keyring import Key
from unsealerd.core.sharing import Backup
from unsealerd.daemon.access import caller_facts
from unsealerd.daemon.host import Host
from unsealerd.daemon.interface import Empty, Interface, Method
from unsealerd.daemon.report import Report
from unsealerd.daemon.watch import Event
from unsealerd.errors import BackupDamaged, BadRequest
from unsealerd.model import SealKind, VersionState

if TYPE_CHECKING:
    from unsealerd.daemon.connection import Connection

MAX_LEASE = 86400  # seconds


class NameParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str


class RevokeParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    version: int | None = None


class SealParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: SealKind


class ArmParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    seconds: int


class AdminApi:
    def __init__(self, host: Host, report: Report, reload: Callable[[Facts], Awaitable[None]]) -> None:
        """``reload``: takes over the configuration file as it is now."""
        self._host = host
        self._report = report
        self._take_over = reload

    def interface(self) -> Interface:
        return Interface(
            "io.unsealerd.Admin",
            {
                "Status": Method(Empty, self.status),
                "Init": Method(Empty, self.init),
                "ListKeys": Method(Empty, self.list_keys),
                "ShowKey": Method(NameParameters, self.show_key),
                "RotateKey": Method(NameParameters, self.rotate_key),
                "RevokeKey": Method(RevokeParameters, self.revoke_key),
                "Seal": Method(SealParameters, self.seal),
                "Arm": Method(ArmParameters, self.arm),
                "Disarm": Method(Empty, self.disarm),
                "Lock": Method(Empty, self.lock),
                "Reload": Method(Empty, self.reload),
                "VerifyBackup": Method(Empty, self.verify_backup),
                "ExportBackup": Method(Empty, self.export_backup),
                "Monitor": Method(Empty, self.monitor, streams=True),
            },
            details=True,
        )

    async def status(self, _connection: "Connection", _: Empty) -> dict[str, object]:
        return {"status": await self._report.status()}

    async def init(self, connection: "Connection", _: Empty) -> dict[str, object]:
        await self._host.initialise(caller_facts(connection.peer.caller))
        keyring = self._host.open_keyring()
        metadata = keyring.metadata
        return {
            "generation": metadata.generation,
            "keys": [key.name for key in metadata.keys],
            "keyring": keyring.id,
        }

    def list_keys(self, _connection: "Connection", _: Empty) -> dict[str, object]:
        return {"keys": [self._describe(key) for key in self._host.open_keyring().metadata.keys]}

    def show_key(self, _connection: "Connection", call: NameParameters) -> dict[str, object]:
        return {"key": self._describe(self._host.open_keyring().key(call.name))}

    async def rotate_key(self, connection: "Connection", call: NameParameters) -> dict[str, object]:
        await self._host.rotate(call.name, caller_facts(connection.peer.caller))
        return {"key": self._describe(self._host.open_keyring().key(call.name))}

    async def revoke_key(self, connection: "Connection", call: RevokeParameters) -> dict[str, object]:
        await self._host.revoke(call.name, call.version, caller_facts(connection.peer.caller))
        return {"key": self._describe(self._host.open_keyring().key(call.name))}

    async def seal(self, connection: "Connection", call: SealParameters) -> dict[str, object]:
        await self._host.seal(call.kind, 0, caller_facts(connection.peer.caller))
        return {"seal": self._report.seal()}

    async def arm(self, connection: "Connection", call: ArmParameters) -> dict[str, object]:
        if not 0 < call.seconds <= MAX_LEASE:
            raise BadRequest(f"a lease is from 1 second to {MAX_LEASE // 3600} hours")
        deadline = self._host.now + call.seconds
        await self._host.seal(SealKind.REBOOT, deadline, caller_facts(connection.peer.caller))
        return {"seal": self._report.seal()}

    async def disarm(self, connection: "Connection", _: Empty) -> None:
        await self._host.disarm(caller_facts(connection.peer.caller))

    async def lock(self, connection: "Connection", _: Empty) -> None:
        await self._host.lock(caller_facts(connection.peer.caller))

    async def reload(self, connection: "Connection", _: Empty) -> dict[str, object]:
        before = {str(operator.recipient): operator.name for operator in self._host.operators}
        # Whole, even if the caller hangs up meanwhile: sockets follow the configuration after the host has taken it over.
        await asyncio.shield(self._take_over(caller_facts(connection.peer.caller)))
        now = {str(operator.recipient): operator.name for operator in self._host.operators}
        written = self._host.keyring is not None and not self._host.keeper.outdated
        return {
            "generation": self._host.last_generation if written else None,
            "added": [name for recipient, name in now.items() if recipient not in before],
            "removed": [name for recipient, name in before.items() if recipient not in now],
            "pending": self._report.pending_rules(),
        }

    async def verify_backup(self, _connection: "Connection", _: Empty) -> dict[str, object]:
        metadata = self._host.open_keyring().metadata
        if self._host.keeper.outdated:
            raise BackupDamaged(
                "the backup is not yet written for the operators that the configuration names"
            )
        data = await self._host.inspect(self._host.keeper.store.verify)
        self._require_stanzas(self._host.keeper.reader.backup())
        return {
            "generation": metadata.generation,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "operators": [operator.name for operator in self._host.operators],
        }

    async def export_backup(self, connection: "Connection", _: Empty) -> dict[str, object]:
        keyring = self._host.open_keyring()
        generation, keyring_id = keyring.metadata.generation, keyring.id
        data = await self._host.inspect(self._host.keeper.store.verify)
        self._host.audit.append("backup_export", **caller_facts(connection.peer.caller))
        return {
            "generation": generation,
            "keyring": keyring_id,
            "backup": base64.b64encode(data).decode(),
        }

    def monitor(self, connection: "Connection", _: Empty) -> None:
        """First the state now, then every change, each with the reason of that moment."""
        stream = connection.stream()

        def tell(event: Event) -> None:
            reason = self._host.lock_reason
            stream.send(
                {
                    "event": event.event,
                    "state": event.state.value,
                    "key": event.key,
                    "version": event.version,
                    "reason": reason.value if reason is not None else None,
                    "detail": self._host.lock_detail or None,
                }
            )

        stream.on_close = self._host.watchers.add(tell)
        tell(Event("state", self._host.state, None, None))

    def _require_stanzas(self, backup: Backup) -> None:
        """One stanza for each operator, and no more. Those of X25519 carry no name, and are counted, unless there is a list."""
        operators, header = self._host.operators, backup.header
        if backup.sharing is not None:
            if backup.sharing.rules.operators != operators:
                raise BackupDamaged("its list of operators is another one than the configuration's")
            return
        if len(header.stanzas) != len(operators):
            raise BackupDamaged(f"{len(header.stanzas)} stanzas for {len(operators)} operators")
        for operator in operators:
            if not any(operator.recipient.ephemeral(stanza) is not None for stanza in header.stanzas):
                raise BackupDamaged(f"no stanza for the operator {operator.name}")

    def _describe(self, key: Key) -> dict[str, object]:
        declared = self._host.config.keys.get(key.name)
        every = declared.rotate_every if declared else None
        rules = declared.allow if declared else ()
        return {
            "name": key.name,
            "owner": key.owner,
            "purpose": key.purpose,
            "size": next((v.size for v in reversed(key.versions) if v.state is not VersionState.REVOKED), 0),
            "declared": declared is not None,
            "rotate_every": every,
            "overlap": declared.overlap if declared else None,
            "next_rotation": key.primary.created + every if every and key.primary else None,
            "allow": [
                {
                    **({"unit": rule.unit} if rule.unit else {}),
                    **({"user": rule.user} if rule.user else {}),
                    **({"group": rule.group} if rule.group else {}),
                    "operations": [operation.value for operation in rule.operations],
                }
                for rule in rules
            ],
            "versions": [
                {
                    "version": v.version,
                    "state": v.state.value,
                    "created": v.created,
                    "changed": v.changed,
                    "retires": v.retires,
                }
                for v in key.versions
            ],
        }
