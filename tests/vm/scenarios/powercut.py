"""The power is cut at random instants: no key that was given is ever lost, and no sealed copy works twice.

Each cut is followed by a boot. The log of what was written before it gives the disks of many more cuts, which are
judged without one.
"""

import random
import time
from dataclasses import dataclass, field
from functools import partial

from vm.crashes import Verdict, judged
from vm.machine import Crash
from vm.notes import FILE_SYSTEM, READ_CANARIES, SLOTS, Note, canaries, notes, versions
from vm.server import Server, check, wait_for
from vm.table import Scenario
from vm.writelog import Log

_LONGEST = 4.0  # seconds of work before the cut, at most
_IMAGES = 320  # of the disk in each of the two loops, about


@dataclass(slots=True)
class _Tally:
    """What the cuts of one loop have shown."""

    chance: random.Random
    cuts: int
    steps: int = 0
    unflushed: int = 0
    lost: int = 0
    verdict: Verdict = field(default_factory=Verdict)

    def shares(self) -> list[float]:
        """How much of what was not flushed each cut leaves. Nothing, a part, everything: dealt, so that each comes up."""
        dealt = [(0.0, 0.5, 1.0)[number % 3] for number in range(self.cuts)]
        self.chance.shuffle(dealt)
        return dealt

    def canaries(self, server: Server, log: Log) -> None:
        """Count those that were written, not flushed, and are not there; of the flushed ones none may be missing."""
        flushed = log.flushed(len(log.writes))
        there = {int(number) for number in server.run(READ_CANARIES).split()}
        gone = canaries(log, 0, flushed) - there
        check(gone == set(), f"the disk has lost what was flushed: canaries {gone}")
        unflushed = canaries(log, flushed, len(log.writes))
        self.unflushed += len(unflushed)
        self.lost += len(unflushed - there)

    def judge(self, server: Server, crash: Crash, before: dict[int, str]) -> None:
        self.verdict += judged(crash, server.key_of_operator, before, _IMAGES // self.cuts, self.chance)
        crash.forget()

    def text(self) -> str:
        check(self.lost > 0, f"of {self.unflushed} unflushed canaries none was lost: the cuts show nothing")
        check(self.verdict.found_out > 0, "no image of a disk that lies was found out")
        return (
            f"of {self.unflushed} unflushed canaries {self.lost} were lost; {self.verdict.held} more disks as a cut at another"
            f" moment leaves them, from the log of the writes: all good; of {self.verdict.controls} that lost flushed"
            f" writes, too, {self.verdict.found_out} were found out"
        )


def _cut_in(server: Server, what: str, share: float, tally: _Tally) -> tuple[Crash, list[Note]]:
    """Keep the server busy, and cut the power in the middle. The disk with its log, and what the guest had noted."""
    machine = server.machine
    server.run("rm -rf /root/stale; mkdir /root/stale; sync")
    machine.say(f"python3 /opt/vm/busy.py {what} {FILE_SYSTEM} {machine.boots * SLOTS}")
    wait_for(
        lambda: any(note.words[0] == "done" for note in notes(machine.log())),
        f"busy.py {what} does something",
    )
    time.sleep(tally.chance.uniform(0, _LONGEST))

    def something_to_lose(log: Log) -> bool:
        end = len(log.writes)
        return bool(canaries(log, log.flushed(end), end))

    crash = machine.crash(something_to_lose, share, tally.chance)
    told = notes(crash.log)
    tally.steps += sum(note.words[0] == "done" for note in told)
    return crash, told


def _rotations(server: Server, cuts: int, chance: random.Random) -> str:
    tally = _Tally(chance, cuts)
    for share in tally.shares():
        before = server.keys()
        crash, told = _cut_in(server, "rotate", share, tally)
        server.machine.start()
        server.expect_locked("unexpected_reboot")
        tally.canaries(server, crash.log)
        server.unlock()
        server.expect_keys(before | versions(told))
        server.run("unsealctl --json audit >/dev/null")
        tally.judge(server, crash, before)
    return (
        f"{cuts} cuts, {tally.steps} rotations reported: none lost, the audit chain is whole, locked each time;"
        f" {tally.text()}"
    )


def _seals(server: Server, cuts: int, chance: random.Random) -> str:
    tally = _Tally(chance, cuts)
    keys = server.keys()
    opened = 0
    for share in tally.shares():
        crash, _ = _cut_in(server, "seal", share, tally)
        server.machine.start()
        text = server.state_text()
        tally.canaries(server, crash.log)
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
        tally.judge(server, crash, keys)
    return (
        f"{cuts} cuts, {tally.steps} seals and disarms reported: the last copy opened {opened} boots, the others were locked;"
        f" every copy that was kept aside was refused; no key lost; {tally.text()}"
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
    # The instants differ from run to run, and so does what is lost.
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
