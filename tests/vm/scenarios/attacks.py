"""Somebody else gets at the sealed copy: it works once, on the very next boot, in the same measured state."""

from vm.server import Server, check
from vm.table import Scenario


def _two_reboots(server: Server) -> str:
    keys = server.keys()
    server.ctl("seal")
    # Not disabled: masked, so that nothing starts it.
    server.run("systemctl mask unsealerd.service && sync")
    for _ in range(2):
        server.machine.say("systemctl reboot --force --force")
        server.machine.wait_for_boot()
    server.run(
        "systemctl unmask unsealerd.service && systemctl start unsealerd.service unsealerd-gateway.service"
    )
    reason = server.expect_locked("not_the_next_boot")
    server.expect_no_sealed_copy()
    server.unlock()
    server.expect_keys(keys)
    return f"refused, {reason}; unlocked from outside"


def _other_boot(server: Server) -> str:
    keys = server.keys()
    server.run("touch /opt/vm/extend-pcr")
    server.machine.say("systemctl reboot")
    server.machine.wait_for_boot()
    reason = server.expect_locked("pcr_mismatch")
    detail = str(server.status()["lock_detail"])
    check("7" in detail, f"the detail should name PCR 7, and says: {detail}")
    server.unlock()
    server.expect_keys(keys)
    return f"refused, {reason}, PCR 7 is named; unlocked from outside"


def _disk_put_back(server: Server) -> str:
    """The disks are copied in the moment in which the sealed copy is good for the next boot."""
    keys = server.keys()
    server.ctl("arm --for 1h")
    server.run("sync")
    server.machine.cut()
    copy = server.machine.copy_disks("taken")
    server.machine.start()
    server.expect_unlocked()
    server.run("unsealctl key rotate web-sessions")
    newer = server.keys()
    server.machine.say("systemctl poweroff")
    server.machine.wait_for_power_off()
    current = server.machine.copy_disks("current")
    server.machine.put_disks(copy)
    server.machine.start()
    reason = server.expect_locked("sealed_copy_used", "not_the_next_boot", "rollback")
    refused = server.unlock(ok=False)
    check(refused.returncode != 0, "an operator's ordinary unlock opened the older backup")
    check(
        "Rollback" in refused.stdout,
        f"the operator should be told of a rollback, and is told: {refused.stdout}",
    )
    server.machine.cut()
    server.machine.put_disks(current)
    server.machine.start()
    server.expect_locked("unexpected_reboot")
    server.unlock()
    server.expect_keys(keys | newer)
    return f"the first boot took it; put back: refused, {reason}, and to an operator Rollback; the right disk opens"


SCENARIOS = [
    Scenario(
        "sealed, then two reboots before the daemon runs again", "refused, not_the_next_boot", _two_reboots
    ),
    Scenario(
        "disks copied after the seal, put back after the boot that used it",
        "refused; older backup refused",
        _disk_put_back,
    ),
    # The last: this boot stays another one until the next.
    Scenario("planned reboot into another measured boot (PCR 7)", "refused, pcr_mismatch", _other_boot),
]
