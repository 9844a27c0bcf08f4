"""The disks that power cuts at other moments of a run would have left: made from its log, and judged without a boot."""

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from unsealerd.core.age import X25519Identity
from vm import ext4, judge
from vm.errors import Broken, RigError
from vm.machine import Crash
from vm.notes import Note, notes
from vm.programs import copy
from vm.writelog import Cut, Log

_CONTROLS = 20  # at most, for each run


@dataclass(frozen=True, slots=True)
class Verdict:
    """Images that hold all that was promised, and those of a disk that lies: how many, and how many were found out."""

    held: int = 0
    controls: int = 0
    found_out: int = 0

    def __add__(self, other: "Verdict") -> "Verdict":
        return Verdict(
            self.held + other.held, self.controls + other.controls, self.found_out + other.found_out
        )


class _Images:
    """Images of one run, made in the order in which its requests came."""

    def __init__(self, crash: Crash, directory: Path, chance: random.Random) -> None:
        self._crash = crash
        self._directory = directory
        self._chance = chance
        self._medium = directory / "medium"
        self._there = 0
        copy(crash.before, self._medium)

    def state(self, cut: Cut, identity: X25519Identity) -> judge.State:
        """What that cut leaves. Raises Broken."""
        if cut.kept < self._there:
            raise RigError("images are made in order")
        self._crash.log.settle(self._medium, Cut(cut.kept, cut.kept, 1.0), self._chance, since=self._there)
        self._there = cut.kept
        image, files = self._directory / "image", self._directory / "files"
        copy(self._medium, image)
        self._crash.log.settle(image, cut, self._chance, since=cut.kept)
        try:
            ext4.extract(image, files)
            return judge.state(files, identity)
        finally:
            shutil.rmtree(files, ignore_errors=True)


def judged(
    crash: Crash, identity: X25519Identity, before: dict[int, str], most: int, chance: random.Random
) -> Verdict:
    """``before``: the versions at the start; ``most``: so many images. Raises Broken for the first that does not hold."""
    told = notes(crash.log)
    if not told:
        raise Broken("the run ended before it began")
    directory = crash.before.parent / "images"
    directory.mkdir()
    try:
        return _judged(_Images(crash, directory, chance), crash.log, told, identity, before, most, chance)
    finally:
        shutil.rmtree(directory)


def _judged(
    images: _Images,
    log: Log,
    told: list[Note],
    identity: X25519Identity,
    before: dict[int, str],
    most: int,
    chance: random.Random,
) -> Verdict:
    first = told[0].index
    start = images.state(Cut(first, log.flushed(first), 1.0), identity)
    honest = [(cut, False) for cut in cuts(log, first, most, chance)]
    lying = [(cut, True) for cut in lies(told)]
    verdict = Verdict()
    for cut, lie in sorted(honest + lying, key=lambda one: (one[0].kept, one[0].end, one[0].share)):
        try:
            judge.require(images.state(cut, identity), start, judge.promised(told, cut.end, before))
        except Broken as err:
            if not lie:
                raise Broken(f"an image of the disk, {cut} of {log.path}: {err}") from err
            verdict += Verdict(controls=1, found_out=1)
        else:
            if lie and cut.share == 0.0:
                raise Broken(f"a disk that lost all of a change that was flushed passes: {cut} of {log.path}")
            verdict += Verdict(controls=1) if lie else Verdict(held=1)
    return verdict


def cuts(log: Log, first: int, most: int, chance: random.Random) -> list[Cut]:
    """Between each two flushes from ``first`` on: at the last moment without the cache, at any with some or all of it."""
    found: list[Cut] = []
    kept = log.flushed(first)
    for index in range(first, len(log.writes) + 1):
        if index < len(log.writes) and not log.writes[index].flushes:
            continue
        if index > kept:
            moments = range(max(kept, first), index + 1)
            found.append(Cut(index, kept, 0.0))
            found.append(Cut(chance.choice(moments), kept, 0.5))
            found.append(Cut(chance.choice(moments), kept, 1.0))
        else:
            found.append(Cut(index, kept, 0.0))
        kept = index + 1
    return chance.sample(found, min(most, len(found)))


def lies(told: list[Note]) -> list[Cut]:
    """What a disk leaves that says "flushed" and is not: cut right after a change that was reported, without it, or with half."""
    found: list[Cut] = []
    begun = None
    for note in told:
        if note.words[0] == "begin":
            begun = note.index
        elif note.words[0] == "done" and begun is not None:
            found += [Cut(note.index + 1, begun, share) for share in (0.0, 0.5)]
    return found[:_CONTROLS]
