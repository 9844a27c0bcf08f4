"""How the machine test judges disks after a power cut: what is whole and current passes, and nothing else does."""

import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from rigs.server import Server
from vm import ext4, judge
from vm.crashes import judged
from vm.errors import Broken
from vm.judge import KEY, Promised, State
from vm.machine import Crash
from vm.notes import FILE_SYSTEM, Note
from vm.writelog import SECTOR, Log

from unsealerd.core.age import X25519Identity


@dataclass(frozen=True, slots=True)
class States:
    """The state directory of a host at three moments, one change between each."""

    first: Path
    rotated: Path
    sealed: Path
    identity: X25519Identity
    keys: dict[int, str]
    """After the rotation."""


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Iterator[States]:
    base = tmp_path_factory.mktemp("states")
    with Server(keys=(KEY,)) as server:
        server.start()
        server.ctl("init")
        for moment, change in (("first", ()), ("rotated", ("key", "rotate", KEY)), ("sealed", ("seal",))):
            if change:
                server.ctl(*change)
            shutil.copytree(server.state, base / moment, ignore=lambda _, names: {"gateway"} & set(names))
        keys = {version: hashlib.sha256(key).hexdigest()[:16] for version, key in server.client.read_all(KEY)}
        yield States(base / "first", base / "rotated", base / "sealed", server.identity, keys)


def _state(directory: Path, states: States) -> State:
    return judge.state(directory, states.identity)


def test_each_moment_is_what_was_promised_for_it(states: States) -> None:
    first, rotated, sealed = (_state(one, states) for one in (states.first, states.rotated, states.sealed))
    assert (first.sealed, rotated.sealed, sealed.sealed) == (False, False, True)
    assert rotated.versions == sealed.versions == states.keys
    judge.require(rotated, first, Promised(1, states.keys))
    judge.require(sealed, first, Promised(2, states.keys, sealed=True))
    judge.require(sealed, first, Promised(1, states.keys, sealed=None))  # under way


@pytest.mark.parametrize(
    "least",
    [
        Promised(2, sealed=None),
        Promised(1, {3: "00"}, sealed=None),
        Promised(1, {1: "00"}, sealed=None),
        Promised(1, sealed=True),
    ],
)
def test_less_than_was_promised_is_found_out(states: States, least: Promised) -> None:
    with pytest.raises(Broken):
        judge.require(_state(states.rotated, states), _state(states.first, states), least)


def test_a_change_that_is_only_in_the_audit_log_or_only_in_the_backup_is_found_out(states: States) -> None:
    first, rotated = _state(states.first, states), _state(states.rotated, states)
    with pytest.raises(Broken, match="audit log"):
        judge.require(replace(rotated, changes=first.changes), first, Promised(1))
    with pytest.raises(Broken, match="generation"):
        judge.require(replace(rotated, generation=first.generation), first, Promised(1))


def _cut_short(name: str) -> Callable[[Path], object]:
    return lambda directory: os.truncate(directory / name, (directory / name).stat().st_size // 2)


def _zeros(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(bytes((directory / name).stat().st_size))


def _ahead(directory: Path) -> None:
    """The backup of before under a sealed copy of after: it went to the disk too late."""
    (directory / "keyring.age.previous").replace(directory / "keyring.age")


def _changed(directory: Path) -> None:
    log = directory / "audit.jsonl"
    log.write_bytes(log.read_bytes().replace(b"key_rotate", b"key_revoke"))


@pytest.mark.parametrize(
    "harm",
    [
        lambda directory: (directory / "keyring.age").unlink(),
        _cut_short("keyring.age"),
        _zeros("keyring.age"),
        _zeros("keyring.age.previous"),
        _cut_short("sealed.json"),
        _ahead,
        _changed,
    ],
)
def test_what_is_not_whole_is_found_out(
    states: States, tmp_path: Path, harm: Callable[[Path], object]
) -> None:
    directory = tmp_path / "state"
    shutil.copytree(states.sealed, directory)
    harm(directory)
    with pytest.raises(Broken):
        _state(directory, states)


def test_a_line_of_the_audit_log_that_was_cut_off_is_no_damage(states: States, tmp_path: Path) -> None:
    directory = tmp_path / "state"
    shutil.copytree(states.rotated, directory)
    with (directory / "audit.jsonl").open("ab") as log:
        log.write(b'{"caller":{"g')
    assert _state(directory, states) == _state(states.rotated, states)
    assert json.loads((directory / "audit.jsonl").read_text().splitlines()[-1])["event"] == "audit_repaired"


def test_what_a_guest_knew_at_a_moment() -> None:
    told = [
        Note(index, tuple(text.split()))
        for index, text in enumerate(
            ("begin seal", "done seal", "begin disarm", "done disarm", "begin rotate", "done rotate", "version 2 ab")
        )
    ]  # fmt: skip
    moments = [judge.promised(told, end, {1: "aa"}) for end in range(len(told) + 1)]
    assert [moment.sealed for moment in moments] == [False, None, True, None, False, False, False, False]
    assert [moment.steps for moment in moments] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [dict(moment.versions) for moment in moments[-2:]] == [{1: "aa"}, {1: "aa", 2: "ab"}]


# --- images of a disk


def _disk(content: Path, target: Path) -> Path:
    with target.open("wb") as file:
        file.truncate(FILE_SYSTEM)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-m", "0", "-d", content, target], check=True)
    return target


def _entry(sector: int, data: bytes, flags: int = 0) -> bytes:
    head = struct.pack("<QQQQ", sector, len(data) // SECTOR, flags, len(data))
    return head.ljust(SECTOR, b"\0") + data


def _note(text: str) -> bytes:
    return _entry(FILE_SYSTEM // SECTOR, text.encode().ljust(SECTOR, b"\0"))


_FLUSH = _entry(0, b"", 1)


@pytest.fixture
def crash(states: States, tmp_path: Path) -> Callable[..., Crash]:
    """A run in which a rotation went to the disk between two flushes. ``flush_first``: the second one, then the report."""
    before, after = _disk(states.first, tmp_path / "before"), _disk(states.rotated, tmp_path / "after")
    with before.open("rb") as one, after.open("rb") as other:
        changes = [
            _entry(number, new)
            for number in range(FILE_SYSTEM // SECTOR)
            if one.read(SECTOR) != (new := other.read(SECTOR))
        ]

    def made(*, flush_first: bool) -> Crash:
        end = (_FLUSH, _note("done rotate")) if flush_first else (_note("done rotate"), _FLUSH)
        superblock = struct.pack("<QQQL", 0x6A736677736872, 1, 0, SECTOR).ljust(SECTOR, b"\0")
        log = tmp_path / "writes"
        log.write_bytes(b"".join((superblock, _note("begin rotate"), _FLUSH, *changes, *end)))
        return Crash(before, Log.read(log))

    return made


def test_a_disk_that_loses_what_was_flushed_is_found_out(states: States, crash: Callable[..., Crash]) -> None:
    made = crash(flush_first=True)
    verdict = judged(made, states.identity, {}, 0, random.Random(1))
    assert verdict.controls == verdict.found_out == 2
    made.forget()
    assert not made.before.exists()


def test_a_daemon_that_reports_before_the_flush_is_found_out(
    states: States, crash: Callable[..., Crash]
) -> None:
    made = crash(flush_first=False)
    with pytest.raises(Broken, match="an image of the disk"):
        judged(made, states.identity, {}, 40, random.Random(1))


def test_files_come_out_of_an_image_with_their_links(states: States, tmp_path: Path) -> None:
    directory = tmp_path / "state"
    shutil.copytree(states.rotated, directory)
    os.link(directory / "audit.jsonl", directory / "two")
    ext4.extract(_disk(directory, tmp_path / "disk"), tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == {
        file.name: file.read_bytes() for file in directory.iterdir()
    }
    assert (tmp_path / "out/two").samefile(tmp_path / "out/audit.jsonl")


def test_a_damaged_file_system_is_found_out(states: States, tmp_path: Path) -> None:
    disk = _disk(states.rotated, tmp_path / "disk")
    with disk.open("r+b") as file:
        file.write(bytes(8192))
    with pytest.raises(Broken, match="file system"):
        ext4.extract(disk, tmp_path / "out")
