"""What the machine test takes for the disk after a power cut: all that was flushed, and of the rest any part."""

import random
import struct
from pathlib import Path

import pytest
from vm.crashes import cuts, lies
from vm.errors import RigError
from vm.notes import Note
from vm.writelog import SECTOR, Cut, Log, Loss

_FLUSH, _FUA = 1, 2
_DISK_SECTORS = 8
_WHOLLY = 1.0


def _log(*entries: tuple[int, bytes, int]) -> bytes:
    """Entries: first sector, data, flags; as QEMU's blklogwrites writes them."""
    text = struct.pack("<QQQL", 0x6A736677736872, 1, 0, SECTOR).ljust(SECTOR, b"\0")
    for sector, data, flags in entries:
        text += (
            struct.pack("<QQQQ", sector, len(data) // SECTOR, flags, len(data)).ljust(SECTOR, b"\0") + data
        )
    return text


def _sector(letter: str) -> bytes:
    return letter.encode() * SECTOR


_FLUSHED = (0, b"", _FLUSH)


@pytest.fixture
def medium(tmp_path: Path) -> Path:
    path = tmp_path / "medium"
    path.write_bytes(_sector(".") * _DISK_SECTORS)
    return path


def _letters(medium: Path) -> str:
    return medium.read_bytes()[::SECTOR].decode()


def _read(tmp_path: Path, log: bytes) -> Log:
    (tmp_path / "log").write_bytes(log)
    return Log.read(tmp_path / "log")


def _settle(tmp_path: Path, medium: Path, log: bytes, share: float = 0.5, seed: int = 1) -> Loss:
    found = _read(tmp_path, log)
    return found.settle(medium, found.cut(share), random.Random(seed))


def test_what_was_flushed_stays_whatever_happens(tmp_path: Path, medium: Path) -> None:
    log = _log((0, _sector("a"), 0), (3, _sector("b") * 2, 0), _FLUSHED)
    for share in (0.0, 0.5, 1.0):
        assert _settle(tmp_path, medium, log, share) == Loss(0, 0)
        assert _letters(medium) == "a..bb..."


def test_forced_unit_access_stays_without_a_flush(tmp_path: Path, medium: Path) -> None:
    _settle(tmp_path, medium, _log((2, _sector("f"), _FUA)), 0.0)
    assert _letters(medium) == "..f....."


def test_what_was_not_flushed_is_there_in_part_or_wholly_or_not_at_all(tmp_path: Path, medium: Path) -> None:
    log = _log((0, _sector("a"), 0), _FLUSHED, (0, _sector("x") * 4, 0))
    seen = set()
    for seed in range(20):
        for share in (0.0, 0.5, 1.0):
            medium.write_bytes(_sector(".") * _DISK_SECTORS)
            loss = _settle(tmp_path, medium, log, share, seed)
            letters = _letters(medium)
            assert loss == Loss(4, 4 - letters.count("x"))
            assert set(letters[:1]) <= {"a", "x"}
            assert share == 0.5 or loss.lost == 4 * (1 - share)
            seen.add(letters.count("x"))
    assert {0, 2, 4} < seen  # torn ones too


def test_an_entry_that_was_cut_off_was_never_written(tmp_path: Path, medium: Path) -> None:
    whole = _log((0, _sector("a"), 0), _FLUSHED, (1, _sector("b") * 2, 0))
    _settle(tmp_path, medium, whole[:-SECTOR], _WHOLLY)
    assert _letters(medium) == "a......."
    assert _read(tmp_path, whole).whole
    assert not _read(tmp_path, whole[:-SECTOR]).whole
    # QEMU is done with the entry after one that it is still writing: the guest may know of it.
    assert not _read(tmp_path, whole[: 3 * SECTOR] + bytes(2 * SECTOR) + whole[3 * SECTOR :]).whole


def test_a_machine_that_wrote_nothing_has_an_empty_log(tmp_path: Path, medium: Path) -> None:
    before = medium.read_bytes()
    _settle(tmp_path, medium, b"", _WHOLLY)
    assert medium.read_bytes() == before
    assert _read(tmp_path, b"").whole


@pytest.mark.parametrize("log", [b"\0", b"\0" * SECTOR, b"something else" * 100])
def test_another_file_is_refused(tmp_path: Path, log: bytes) -> None:
    with pytest.raises(RigError):
        _read(tmp_path, log)


_STEPS = (
    (0, _sector("a"), 0),
    _FLUSHED,
    (1, _sector("b"), 0),
    (2, _sector("c"), 0),
    _FLUSHED,
    _FLUSHED,
    (3, _sector("d"), 0),
)


def test_cuts_at_other_moments_lose_nothing_but_what_lies_after_the_flush_before(
    tmp_path: Path, medium: Path
) -> None:
    log = _read(tmp_path, _log(*_STEPS))
    seen = set()
    for seed in range(40):
        found = cuts(log, 2, 100, random.Random(seed))
        assert {Cut(4, 2, 0.0), Cut(5, 5, 0.0), Cut(7, 6, 0.0)} <= set(found)  # the last moments of each
        for cut in found:
            medium.write_bytes(_sector(".") * _DISK_SECTORS)
            log.settle(medium, cut, random.Random(seed))
            letters = _letters(medium)
            assert letters[0] == "a"
            assert cut.end < 5 or letters[1:3] == "bc"
            assert cut.end > 2 or letters[1:] == "......."
            seen.add(letters)
    assert seen == {f"a{rest}...." for rest in ("...", "b..", ".c.", "bc.", "bcd")}


def test_no_more_cuts_than_were_asked_for(tmp_path: Path) -> None:
    log = _read(tmp_path, _log(*_STEPS * 20))
    assert len(cuts(log, 0, 10, random.Random(1))) == 10


def test_images_in_order_share_what_is_flushed(tmp_path: Path, medium: Path) -> None:
    log = _read(tmp_path, _log(*_STEPS))
    chance = random.Random(1)
    log.settle(medium, Cut(2, 2, 1.0), chance)
    medium_then = _letters(medium)
    log.settle(medium, Cut(6, 6, 1.0), chance, since=2)
    assert (medium_then, _letters(medium)) == ("a.......", "abc.....")


def test_a_disk_that_lies_loses_what_was_flushed(tmp_path: Path, medium: Path) -> None:
    log = _read(tmp_path, _log(*_STEPS))
    told = [Note(2, ("begin", "rotate")), Note(6, ("done", "rotate")), Note(6, ("version", "2", "ab"))]
    whole, half = lies(told)
    assert (whole, half) == (Cut(7, 2, 0.0), Cut(7, 2, 0.5))
    log.settle(medium, whole, random.Random(1))
    assert _letters(medium) == "a......."
