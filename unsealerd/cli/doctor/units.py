"""The units of the service manager."""

from collections.abc import Iterator, Mapping

from unsealerd.cli.doctor.finding import Finding, fail, ok, problems_or, warn
from unsealerd.cli.doctor.subject import Subject

DAEMON = "unsealerd.service"
GATEWAY = "unsealerd-gateway.service"
WATCH = "unsealerd-watch.service"
TARGET = "unsealerd-unlocked.target"
NOTIFY = "unsealerd-notify@locked.service"
SEAL_AT_STOP = "--at-shutdown"
_PROPERTIES = (
    "LoadState",
    "UnitFileState",
    "ActiveState",
    "WatchdogUSec",
    "FileDescriptorStoreMax",
    "ExecStop",
    "NeedDaemonReload",
)
_ENABLED = ("enabled", "enabled-runtime", "static", "alias", "indirect", "generated")

Unit = Mapping[str, str]


def check(subject: Subject) -> Iterator[Finding]:
    if not subject.machine.exists("run/systemd/system"):  # sd_booted(3)
        yield warn(
            "units",
            "systemd does not run here: nothing seals at a reboot, keeps the memory or restarts the daemon",
            "have another service manager run `unsealctl seal --at-shutdown` before it stops the daemon",
        )
        return
    wanted = sorted({unit for key in subject.config.keys.values() for unit in key.on_rotate})
    names = [DAEMON, GATEWAY, WATCH, TARGET, NOTIFY, *wanted]
    units = subject.machine.units(names, _PROPERTIES)
    if units is None:
        yield fail("units", "systemctl does not answer", "`systemctl show unsealerd.service` says why")
        return
    yield from problems_or(
        _running(DAEMON, units[DAEMON]), ok("daemon's unit", "installed, enabled and active")
    )
    yield from _daemon(units[DAEMON])
    yield from problems_or(
        _running(GATEWAY, units[GATEWAY]), ok("gateway's unit", "installed, enabled and active")
    )
    yield from _installed(TARGET, units[TARGET], "services that wait for the unlock name it")
    yield from _telling(subject, units)
    for name in wanted:
        if units[name].get("LoadState") != "loaded":
            yield warn(
                "on_rotate", f"{name} does not exist here, and will not be reloaded", "correct the name"
            )


def seals_at_stop(subject: Subject) -> bool:
    """Whether the daemon's unit seals before a planned reboot."""
    units = subject.machine.units([DAEMON], _PROPERTIES)
    return units is not None and SEAL_AT_STOP in units[DAEMON].get("ExecStop", "")


def is_loaded(subject: Subject, name: str) -> bool:
    """Whether the service manager knows the unit, and may start it: it is not masked."""
    units = subject.machine.units([name], _PROPERTIES)
    return units is not None and units[name].get("LoadState") == "loaded"


def _installed(name: str, unit: Unit, why: str) -> Iterator[Finding]:
    if unit.get("LoadState") != "loaded":
        yield fail(
            "units",
            f"{name} is {unit.get('LoadState', 'unknown')}: {why}",
            "install the units: scripts/install",
        )


def _running(name: str, unit: Unit) -> Iterator[Finding]:
    if unit.get("LoadState") != "loaded":
        yield from _installed(name, unit, "it is not started at boot")
        return
    if unit.get("UnitFileState") not in _ENABLED:
        yield fail(
            "units", f"{name} is {unit.get('UnitFileState') or 'not enabled'}", f"systemctl enable {name}"
        )
    if unit.get("ActiveState") not in ("active", "reloading"):
        yield fail(
            "units",
            f"{name} is {unit.get('ActiveState')}",
            f"systemctl status {name}; systemctl start {name}",
        )
    if unit.get("NeedDaemonReload") == "yes":
        yield warn("units", f"{name} was changed on disk since systemd read it", "systemctl daemon-reload")


def _daemon(unit: Unit) -> Iterator[Finding]:
    if unit.get("LoadState") != "loaded":
        return
    if unit.get("WatchdogUSec", "0") in ("0", "infinity"):
        yield warn("watchdog", "a daemon that hangs is not restarted", "WatchdogSec= in unsealerd.service")
    else:
        yield ok(
            "watchdog", f"after {unit['WatchdogUSec']} without a sign of life systemd restarts the daemon"
        )
    if unit.get("FileDescriptorStoreMax", "0") == "0":
        yield warn(
            "fd store",
            "a restart of the daemon locks the host",
            "FileDescriptorStoreMax= in unsealerd.service",
        )
    else:
        yield ok("fd store", "systemd keeps the secret memory while the daemon restarts")


def _telling(subject: Subject, units: Mapping[str, Unit]) -> Iterator[Finding]:
    """Nobody is told without the watcher."""
    notify = subject.config.notify
    somebody = bool(notify.command) or notify.webhook is not None
    problems = list(_running(WATCH, units[WATCH]))
    if somebody:
        problems += _installed(NOTIFY, units[NOTIFY], "nobody is told of a lock")
    yield from problems
    if not problems and somebody:
        yield ok("notification", "the watcher runs, and [notify] names somebody")
    elif not problems:
        yield warn(
            "notification",
            "the watcher runs; a locked host says so on its console and in its metrics, but tells nobody",
            "[notify] command or webhook",
        )
