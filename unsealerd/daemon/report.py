"""What `unsealctl status` shows."""

import dataclasses
import os

import msgspec

from unsealerd import keyringid
from unsealerd.core.secret import SecretMemoryKind
from unsealerd.daemon import machine
from unsealerd.daemon.host import Host
from unsealerd.daemon.store import BACKUP
from unsealerd.daemon.unlocking import Conversations
from unsealerd.errors import ConfigInvalid, TpmChanged, TpmFailed, TpmLockout, TpmMissing, UnsealerdError
from unsealerd.model import State

PROVEN_FOR = 90 * 86400
"""Seconds for which it counts that an operator opened the backup."""


class Report:
    def __init__(
        self, host: Host, conversations: Conversations, secret_memory: SecretMemoryKind, warnings: list[str]
    ) -> None:
        """``warnings``: what was found at the start and does not change, a sentence each."""
        self._host = host
        self._conversations = conversations
        self._secret_memory = secret_memory
        self._warnings = warnings

    async def status(self) -> dict[str, object]:
        """Stable names; the first nine in the order of the contract."""
        host = self._host
        return {
            "state": host.state.value,
            "lock_reason": host.lock_reason.value if host.lock_reason is not None else None,
            "since": host.since,
            "generation": host.last_generation,
            "keys": self._keys(),
            "tpm": await self._tpm(),
            "seal": self.seal(),
            "sessions": self._conversations.describe(),
            "shares": dataclasses.asdict(self._conversations.shares()),
            "lock_detail": host.lock_detail,
            "operators": [{"name": each.name, "proven": host.proofs.of(each)} for each in host.operators],
            "backup": {
                "path": str(host.config.daemon.state_dir / BACKUP),
                "written": host.keeper.store.written_at,
            },
            "keyring": self.keyring(),
            "boot_id": machine.boot_id(),
            "host_name": machine.host_name(),
            "secret_memory": self._secret_memory.value,
            "memory": host.kept.describe(),
            "warnings": [*self._warnings, *self._unpromised()],
            "counters": host.audit.counters.values(),
            "pid": os.getpid(),
        }

    def seal(self) -> dict[str, object]:
        plan = self._host.keeper.plan
        settings = self._host.config.seal
        return {
            "sealed": plan is not None,
            "kind": plan.kind.value if plan is not None else None,
            "created": plan.created if plan is not None else None,
            "deadline": (plan.deadline or None) if plan is not None else None,
            "on": [kind.value for kind in settings.on],
            "extra_resets": settings.extra_resets,
        }

    def pending_rules(self) -> str | None:
        """`Conversations.pending_rules`."""
        return self._conversations.pending_rules()

    def keyring(self) -> dict[str, object]:
        """Which keyring is open, which one is this host's, and which one was refused because it is not."""
        host = self._host
        path = host.keeper.reader.id_file
        pinned: str | None = None
        error: str | None = None
        try:
            pinned = keyringid.read(path)
        except ConfigInvalid as err:
            error = err.detail
        return {
            "id": host.keyring.id if host.keyring is not None else None,
            "file": str(path),
            "pinned": pinned,
            "error": error,
            "foreign": host.keeper.reader.foreign if host.state is State.LOCKED else None,
        }

    def _keys(self) -> list[str]:
        keyring = self._host.keyring
        if keyring is None:
            return sorted(self._host.config.keys)
        return [key.name for key in keyring.metadata.keys]

    async def _tpm(self) -> dict[str, object]:
        tpm = self._host.config.tpm
        if tpm.tcti is None:
            return {"present": False, "tcti": "none", "pcrs": list(tpm.pcrs), "error": None}
        report: dict[str, object] = {"present": True, "tcti": tpm.tcti, "pcrs": list(tpm.pcrs), "error": None}
        try:
            facts, counter = await self._host.tpm_facts()
        except UnsealerdError as err:
            report["error"] = err.name
            report["present"] = not isinstance(err, TpmMissing)
            if not isinstance(err, TpmMissing | TpmFailed | TpmLockout | TpmChanged):
                raise
        else:
            report |= msgspec.to_builtins(facts)
            report["counter"] = counter
            report["counter_behind"] = self._host.keeper.counter_behind
        return report

    def _unpromised(self) -> list[str]:
        """What this host cannot promise."""
        warnings: list[str] = []
        if self._host.config.tpm.tcti is None:
            warnings.append(
                "no TPM: every reboot needs an operator, and an older backup put back is not noticed"
            )
        if self._secret_memory is not SecretMemoryKind.MEMFD_SECRET:
            warnings.append("no memfd_secret: keys are in locked memory that root and the kernel can read")
        if self._host.keeper.counter_behind:
            warnings.append("the TPM's counter is behind the backup: it is tried again at the next change")
        if pending := self.pending_rules():
            warnings.append(pending)
        if unpinned := self._unpinned():
            warnings.append(unpinned)
        if unproven := self._unproven():
            warnings.append(unproven)
        return warnings

    def _unpinned(self) -> str | None:
        """Whether another backup than this host's could be opened, or its own no more."""
        facts = self.keyring()
        file, opened, pinned = facts["file"], facts["id"], facts["pinned"]
        if facts["error"] is not None:
            return f"{facts['error']}: no backup is opened until it can be"
        if pinned is not None:
            return (
                f"{file} does not name the keyring that is open: the next start will not open it"
                if opened not in (None, pinned)
                else None
            )
        if self._host.state is State.UNINITIALISED:
            return None
        return (
            f"{file} is missing: a backup that somebody else has made for these operators would be opened. "
            "Once unlocked: `unsealctl backup pin`"
        )

    def _unproven(self) -> str | None:
        """Whether so few operators are known to be able to unlock that the loss of one more key could be the end."""
        host = self._host
        if host.state is State.UNINITIALISED:
            return None
        times = [host.proofs.of(operator) for operator in host.operators]
        recent = sum(time is not None and time > host.now - PROVEN_FOR for time in times)
        wanted = min(host.config.unlock.threshold + 1, len(host.operators))
        if recent >= wanted:
            return None
        return (
            f"{recent} of {len(host.operators)} operators were proven within {PROVEN_FOR // 86400} days, and {wanted} "
            "should be: have them run `unsealctl drill`"
        )
