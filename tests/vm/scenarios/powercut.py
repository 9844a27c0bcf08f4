"""The power is cut at random instants: no key that was given is ever lost, and no sealed copy works twice."""

import random
import re
import time
from functools import partial

from vm.server import Server, check, wait_for
from vm.table import Scenario

_LONGEST = 4.0  # seconds of work before the cut, at most
_TOLD = re.compile(r"^busy: (\w+) (\S+)(?: (\S+))?\.\s*$", re.MULTILINE)


def _cut_in(server: Server, what: str, chance: random.Random) -> tuple[list[tuple[str, str, str]], int, int]:
    """Keep the server busy, cut the power in the middle. What it said it had done; sectors not flushed, and lost."""
    server.run("rm -rf /root/stale; mkdir /root/stale; sync")
    seen = len(server.machine.console())
    server.machine.say(f"python3 /opt/vm/busy.py {what}")
    wait_for(lambda: bool(_TOLD.search(server.machine.console()[seen:])), f"busy.py {what} does something")
    time.sleep(chance.uniform(0, _LONGEST))
    loss = server.machine.cut(chance)
    return _TOLD.findall(server.machine.console()[seen:]), loss.unflushed, loss.lost


def _rotations(server: Server, cuts: int, chance: random.Random) -> str:
    rotated = unflushed = lost = 0
    for _ in range(cuts):
        keys = server.keys()
        said, left, dropped = _cut_in(server, "rotate", chance)
        keys |= {int(version): digest for _, version, digest in said}
        rotated, unflushed, lost = rotated + len(said), unflushed + left, lost + dropped
        server.machine.start()
        server.expect_locked("unexpected_reboot")
        server.unlock()
        server.expect_keys(keys)
        server.run("unsealctl --json audit >/dev/null")
    return (
        f"{cuts} cuts, {rotated} rotations reported: none lost, the audit chain is whole, locked each time; of"
        f" {unflushed} unflushed sectors {lost} were lost"
    )


def _seals(server: Server, cuts: int, chance: random.Random) -> str:
    keys = server.keys()
    sealed = opened = unflushed = lost = 0
    for _ in range(cuts):
        said, left, dropped = _cut_in(server, "seal", chance)
        sealed, unflushed, lost = sealed + len(said), unflushed + left, lost + dropped
        server.machine.start()
        text = server.state_text()
        # The copy of the last seal is good for this boot; one that was replaced or destroyed meanwhile never is.
        if text.startswith("unlocked"):
            opened += 1
        else:
            server.unlock()
        server.expect_no_sealed_copy()
        server.expect_keys(keys)
        reasonable = ("unlocked", "locked: unexpected_reboot", "locked: sealed_copy_used")
        check(text.startswith(reasonable), f"no key is lost, but the host came up {text}")
        _stale_copies_are_dead(server)
        server.expect_keys(keys)
    return (
        f"{cuts} cuts, {sealed} seals and disarms reported: the last copy opened {opened} boots, the others were locked; every"
        f" copy that was kept aside was refused; no key lost; of {unflushed} unflushed sectors {lost} were lost"
    )


def _stale_copies_are_dead(server: Server) -> None:
    """On the very boot for which they were made, with the backup that they would open."""
    names = [name for name in server.run("ls /root/stale").split() if name.isdigit()]
    check(names != [], "no sealed copy was kept aside")
    state = "/var/lib/unsealerd"
    server.run(f"systemctl stop unsealerd && cp -a {state} /root/good")
    for name in sorted(names, key=int)[-2:]:
        # The owner stays: the daemon reads what is its own.
        server.run(
            f"for f in sealed.json keyring.age; do cp --no-preserve=ownership /root/stale/{name}/$f {state}/$f"
            f" && chown unsealerd: {state}/$f; done && systemctl start unsealerd"
        )
        server.expect_locked("sealed_copy_used", "rollback", "not_the_next_boot")
        server.run("systemctl stop unsealerd")
    server.run(
        f"rm -rf {state}/* && cp -a /root/good/. {state}/ && rm -rf /root/good && systemctl start unsealerd"
    )
    server.unlock()


def scenarios(cuts: int) -> list[Scenario]:
    # The instants differ from run to run; what is lost of a cache is drawn from the same seed and told in the log.
    chance = random.Random()
    return [
        Scenario(
            "power cut in the middle of a rotation, at random instants; the disk loses what was not flushed",
            "locked; an operator unlocks; no version that was reported is lost",
            partial(_rotations, cuts=cuts, chance=chance),
        ),
        Scenario(
            "power cut in the middle of a seal, at random instants; copies of the disk put back",
            "no key lost; the last sealed copy opens the next boot or none does; no stale copy works",
            partial(_seals, cuts=cuts, chance=chance),
        ),
    ]
