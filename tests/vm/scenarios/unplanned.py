"""Crashes: the host comes up locked, and an operator unlocks it from outside."""

from collections.abc import Callable

from vm.server import Server, check, wait_for
from vm.table import Scenario


def _needs_an_operator(server: Server, crash: Callable[[], object]) -> str:
    keys, (resets, _) = server.keys(), server.resets()
    crash()
    server.machine.wait_for_boot()
    reason = server.expect_locked("unexpected_reboot")
    check(server.resets()[0] == resets + 1, "the TPM was not reset once")
    check(server.unit("web.service", "ActiveState") == "activating", "web.service should wait for its key")
    check(
        server.unit("ordered.service", "ActiveState") == "inactive",
        "ordered.service should wait for the unlock",
    )
    server.unlock()
    server.web_has(keys)
    server.expect_keys(keys)
    wait_for(
        lambda: server.unit("ordered.service", "ActiveState") == "active",
        "ordered.service starts after the unlock",
    )
    return f"locked, {reason}; services waited, and started by themselves after the unlock"


def _sysrq(server: Server) -> str:
    return _needs_an_operator(server, lambda: server.machine.say("sync; echo b >/proc/sysrq-trigger"))


def _panic(server: Server) -> str:
    return _needs_an_operator(server, lambda: server.machine.say("sync; echo c >/proc/sysrq-trigger"))


def _reset(server: Server) -> str:
    def press() -> None:
        server.run("sync")
        server.machine.reset()

    return _needs_an_operator(server, press)


_EXPECTED = "locked, unexpected_reboot; services wait; an operator unlocks over the network; services start"

SCENARIOS = [
    Scenario("crash: `echo b > /proc/sysrq-trigger`", _EXPECTED, _sysrq),
    Scenario("kernel panic", _EXPECTED, _panic),
    Scenario("reset button", _EXPECTED, _reset),
]
