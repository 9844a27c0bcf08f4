"""Reboots that are announced, and shutdowns that are none."""

import time
from collections.abc import Callable

from vm.errors import Broken, GuestFailed, NotHere
from vm.server import Server, check, wait_for
from vm.table import Scenario

_LOGIN = "org.freedesktop.login1 /org/freedesktop/login1 org.freedesktop.login1.Manager"
_BOOT_ID = "cat /proc/sys/kernel/random/boot_id"
_SOON = 3_000_000  # microseconds; `shutdown -r` itself counts in minutes


_SOFT_REBOOT_SINCE = 254  # systemd


def _comes_back(
    server: Server, reboot: Callable[[], object], *, reset: bool = True, kernel: bool = True
) -> str:
    """Reboots, and comes back unlocked with nobody there: the same keys, the sealed copy gone, the counter advanced.

    ``reset``: the TPM is reset; ``kernel``: the kernel is started anew.
    """
    keys, (resets, counter), boot = server.keys(), server.resets(), server.run(_BOOT_ID)
    started = time.monotonic()
    reboot()
    server.machine.wait_for_boot()
    served = server.kernel_to_served()
    seconds = time.monotonic() - started
    server.expect_unlocked()
    server.expect_keys(keys)
    server.web_has(keys)
    server.expect_no_sealed_copy()
    resets_now, counter_now = server.resets()
    check(resets_now == resets + int(reset), f"the TPM was reset {resets_now - resets} times")
    check(counter_now > counter, "the counter did not advance")
    check((server.run(_BOOT_ID) != boot) is kernel, "the kernel should have been started anew, or not")
    from_kernel = f" kernel start to key served {served:.1f} s," if kernel else ""
    return (
        f"unlocked with nobody there, same key, sealed copy gone, counter {counter} to {counter_now};{from_kernel} exec to ready"
        f" {server.exec_to_ready():.1f} s, from the command to key served {seconds:.0f} s"
    )


def _reboot(server: Server) -> str:
    return _comes_back(server, lambda: server.machine.say("systemctl reboot"))


def _scheduled(server: Server) -> str:
    """What `shutdown -r +1` asks of logind, for an earlier time."""
    when = f"$(( $(date +%s) * 1000000 + {_SOON} ))"
    return _comes_back(server, lambda: server.run(f"busctl call {_LOGIN} ScheduleShutdown st reboot {when}"))


def _kexec(server: Server) -> str:
    server.run("kexec --load /boot/vmlinuz --reuse-cmdline")
    return _comes_back(server, lambda: server.machine.say("systemctl kexec"), reset=False)


def _soft_reboot(server: Server) -> str:
    """User space alone is started anew: the kernel, its boot id and the TPM's count of resets stay."""
    version = int(server.run("systemctl --version").split()[1])
    if version < _SOFT_REBOOT_SINCE:
        raise NotHere(f"systemd {version} has no soft-reboot")
    return _comes_back(server, lambda: server.machine.say("systemctl soft-reboot"), reset=False, kernel=False)


def _armed(server: Server) -> str:
    server.ctl("arm --for 15m")
    return _comes_back(server, lambda: server.machine.say("systemctl reboot --force --force"))


def _lapsed(server: Server) -> str:
    server.ctl("arm --for 2s")
    wait_for(lambda: not server.sealed(), "the lease ends and the sealed copy is destroyed", 90)
    server.expect_unlocked()
    return "sealed copy destroyed, host still unlocked"


def _cancelled_schedule(server: Server) -> str:
    when = "$(( ($(date +%s) + 600) * 1000000 ))"
    server.run(f"busctl call {_LOGIN} ScheduleShutdown st reboot {when}")
    cancelled = server.run(f"busctl call {_LOGIN} CancelScheduledShutdown").strip()
    check(cancelled == "b true", "there was no shutdown to cancel")
    server.expect_no_sealed_copy()
    server.expect_unlocked()
    return "no sealed copy, still unlocked"


def _cancelled_late(server: Server) -> str:
    keys = server.keys()
    server.run("systemctl start last.service")
    server.machine.say("systemctl reboot")
    wait_for(
        lambda: server.unit("unsealerd.service", "ActiveState") == "inactive", "the daemon is stopped", 40
    )
    sealed = server.sealed()
    try:
        server.run("systemctl cancel")
    except GuestFailed as err:
        raise Broken("too late to cancel the shutdown") from err
    server.run(
        "systemctl reset-failed; systemctl start --no-block multi-user.target; systemctl start dbus unsealerd"
    )
    text = server.state_text()
    server.expect_no_sealed_copy()
    if not text.startswith("unlocked"):
        server.unlock()
    server.expect_keys(keys)
    how = "sealed, then cancelled" if sealed else "cancelled"
    return f"{how}; after the start of the daemon: no sealed copy, {text.split(',')[0]}"


def _stopped(server: Server) -> str:
    keys = server.keys()
    server.run("systemctl stop unsealerd.service")
    server.expect_no_sealed_copy()
    server.run("systemctl start unsealerd.service")
    reason = server.expect_locked("daemon_stopped")
    server.unlock()
    server.expect_keys(keys)
    return f"no sealed copy; after the start locked, {reason}; unlocked from outside"


def _powered_off(server: Server) -> str:
    keys = server.keys()
    server.machine.say("systemctl poweroff")
    server.machine.wait_for_power_off()
    _nothing_sealed_on_disk(server)
    server.machine.start()
    return _locked_after_all(server, keys)


def _halted(server: Server) -> str:
    keys, seen, (resets, _) = server.keys(), len(server.machine.console()), server.resets()
    server.machine.say("systemctl halt")
    wait_for(
        lambda: "reboot: System halted" in server.machine.console()[seen:],
        "the machine says on its console that it is halted",
    )
    _nothing_sealed_on_disk(server)
    server.machine.reset()
    server.machine.wait_for_boot()
    seen_now = _locked_after_all(server, keys)
    check(server.resets()[0] == resets + 1, "the TPM was not reset once")
    return seen_now


def _nothing_sealed_on_disk(server: Server) -> None:
    """As somebody finds it who carries the machine away."""
    found = server.machine.files_on_disk()
    check("keyring.age" in found, "there is no backup on the disk")
    check("sealed.json" not in found, "a sealed copy is left on the disk")


def _locked_after_all(server: Server, keys: dict[int, str]) -> str:
    reason = server.expect_locked("unexpected_reboot")
    server.expect_no_sealed_copy()
    server.unlock()
    server.web_has(keys)
    return f"no sealed copy on the disk; locked, {reason}; unlocked from outside"


SCENARIOS = [
    Scenario("`systemctl reboot`", "unlocked with nobody there, same key, sealed copy gone", _reboot),
    Scenario("a reboot scheduled with logind, as `shutdown -r +5` does", "the same", _scheduled),
    Scenario("`systemctl kexec`", "the same, without a reset of the TPM", _kexec),
    Scenario("`systemctl soft-reboot`", "the same, without a reset of the TPM or a new kernel", _soft_reboot),
    Scenario("`unsealctl arm --for 15m`, then `reboot -f -f`", "the same", _armed),
    Scenario("`unsealctl arm --for 2s`, and no reboot", "sealed copy destroyed when the time is up", _lapsed),
    Scenario("a scheduled reboot is cancelled", "no sealed copy, still unlocked", _cancelled_schedule),
    Scenario(
        "a reboot is cancelled after the daemon was stopped",
        "no sealed copy once the daemon runs again",
        _cancelled_late,
    ),
    Scenario(
        "`systemctl stop unsealerd`, and start", "no sealed copy, locked until an operator unlocks", _stopped
    ),
    Scenario(
        "`systemctl poweroff`, and switched on",
        "no sealed copy, locked until an operator unlocks",
        _powered_off,
    ),
    Scenario(
        "`systemctl halt`, and the reset button",
        "no sealed copy, locked until an operator unlocks",
        _halted,
    ),
]
