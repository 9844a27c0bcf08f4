"""The choke point of every use of a key: authorise, audit (denials too), then act."""

from collections.abc import Callable

import msgspec

from unsealerd.core.auditchain import Facts
from unsealerd.core.policy import NOTHING, Subject
from unsealerd.daemon.caller import Caller
from unsealerd.daemon.host import Host
from unsealerd.daemon.pace import Pace
from unsealerd.errors import AccessDenied, UnsealerdError
from unsealerd.model import Operation

_DENIAL_INTERVAL = 0.2  # seconds between the audited denials of one user
_MAX_NAME = 64  # characters: the name of no key is longer


def caller_facts(caller: Caller) -> Facts:
    """A caller, as it stands in audit records."""
    facts: Facts = {"uid": caller.uid, "gid": caller.gid, "pid": caller.pid}
    if caller.unit is not None:
        facts["unit"] = caller.unit
    if caller.via_systemd:
        facts["credential"] = True
    return {"caller": facts}


def _subject(caller: Caller) -> Subject:
    if caller.via_systemd:
        # systemd asks for the unit: that systemd itself is root grants the unit nothing.
        return Subject(None, frozenset(), caller.unit)
    return Subject(caller.uid, caller.groups, caller.unit)


class Use(msgspec.Struct):
    """One key and operation on one connection: recorded at the first use, then counted."""

    key: str
    operation: Operation
    facts: Facts
    epoch: int
    count: int = 0


class Access:
    def __init__(self, host: Host, monotonic: Callable[[], float]) -> None:
        self._host = host
        self._denials = Pace(_DENIAL_INTERVAL, monotonic)

    def operations(self, caller: Caller, key: str) -> frozenset[Operation]:
        """What the policy grants, for a key that the configuration declares."""
        if key not in self._host.config.keys:
            return NOTHING
        return self._host.policy.operations(_subject(caller), key)

    def granted(self, caller: Caller) -> list[str]:
        """The names of the declared keys with which the caller may do anything at all, sorted."""
        return sorted(self._host.policy.granted(_subject(caller)))

    async def authorise(self, caller: Caller, key: str, operation: Operation) -> Use:
        """Allowed and recorded. Raises `AccessDenied` after recording that, and `AuditUnwritable`.

        A key that does not exist is denied like one that is not granted: names are not to be guessed.
        """
        facts = caller_facts(caller)
        if operation not in self.operations(caller, key):
            await self._denials.turn(caller.uid)
            self._record_denial(caller, key, operation, facts)
            raise AccessDenied(f"{key[:_MAX_NAME]}: {operation.value}")
        return self.record(Use(key, operation, facts, self._host.policy_epoch))

    def _record_denial(self, caller: Caller, key: str, operation: Operation, facts: Facts) -> None:
        source: Facts = {"uid": caller.uid}
        if caller.unit is not None:
            source["unit"] = caller.unit
        about: Facts = {"operation": operation.value}
        # Names that callers invent are one kind: there are any number of them.
        if key in self._host.config.keys:
            about["key"] = key
        self._host.audit.repeats.record(
            "denied",
            # Who is granted something is not lost in the crowd that a user with many uids can make.
            room="callers" if caller.uid == 0 or self.granted(caller) else "strangers",
            source={"caller": source},
            about=about,
            # Cut, so that a caller's invention does not make a record that is too long to be written.
            facts={"key": key[:_MAX_NAME], "operation": operation.value, **facts},
        )

    def record(self, use: Use) -> Use:
        """The first use of a key on a connection, durably, before it takes effect."""
        self._host.audit.append(f"key_{use.operation.value}", key=use.key, **use.facts)
        use.count = 0
        return use

    def flush(self, use: Use) -> None:
        """Write down how often a key was used since it was last written down."""
        if use.count:
            try:
                self._host.audit.append(
                    "key_used", key=use.key, operation=use.operation.value, count=use.count, **use.facts
                )
            except UnsealerdError:
                return  # counted on; the next interval tries again
            use.count = 0

    def current(self, use: Use) -> bool:
        """Whether the policy is still the one under which the use was authorised."""
        return use.epoch == self._host.policy_epoch
