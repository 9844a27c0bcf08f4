"""What the daemon knows about the machine it runs on."""

import contextlib
import grp
import pwd
import socket
import time
from pathlib import Path

from unsealerd.config import Config, Rule
from unsealerd.core.policy import Grant, Policy


def boot_id() -> str:
    """The kernel's random name of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def host_name() -> str:
    return socket.gethostname()


def uptime() -> int:
    """Seconds since boot, suspend included."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME))


def policy_of(config: Config) -> tuple[Policy, tuple[str, ...]]:
    """The configured policy with names looked up, and the names that do not exist on this machine.

    A rule for a user or group that does not exist grants nothing; looked up again at every reload.
    """
    missing: list[str] = []
    grants: dict[str, tuple[Grant, ...]] = {}
    for name, key in config.keys.items():
        found: list[Grant] = []
        for rule in key.allow:
            grant = _grant(rule)
            if grant is None:
                missing.append(f"{name}: {rule.user or rule.group}")
            else:
                found.append(grant)
        grants[name] = tuple(found)
    return Policy(grants), tuple(missing)


def _grant(rule: Rule) -> Grant | None:
    operations = frozenset(rule.operations)
    if rule.unit is not None:
        return Grant(operations, unit=rule.unit)
    with contextlib.suppress(KeyError):
        if rule.user is not None:
            uid = int(rule.user) if _is_number(rule.user) else pwd.getpwnam(rule.user).pw_uid
            return Grant(operations, uid=uid)
        if rule.group is not None:
            gid = int(rule.group) if _is_number(rule.group) else grp.getgrnam(rule.group).gr_gid
            return Grant(operations, gid=gid)
    return None


def _is_number(account: str) -> bool:
    return account.isascii() and account.isdecimal()
