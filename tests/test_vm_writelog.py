"""What the machine test takes for the disk after a power cut: all that was flushed, and of the rest any part."""

import random
import struct
from pathlib import Path

import pytest
from vm.errors import RigError
from vm.writelog import SECTOR, Loss, settle

_FLUSH, _FUA = 1, 2
_DISK_SECTORS = 8


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


@pytest.fixture
def medium(tmp_path: Path) -> Path:
    path = tmp_path / "medium"
    path.write_bytes(_sector(".") * _DISK_SECTORS)
    return path


def _letters(medium: Path) -> str:
    return medium.read_bytes()[::SECTOR].decode()


def _settle(tmp_path: Path, medium: Path, log: bytes, seed: int | None = 1) -> Loss:
    (tmp_path / "log").write_bytes(log)
    return settle(tmp_path / "log", medium, None if seed is None else random.Random(seed))


def test_what_was_flushed_stays_whatever_happens(tmp_path: Path, medium: Path) -> None:
    log = _log((0, _sector("a"), 0), (3, _sector("b") * 2, 0), (0, b"", _FLUSH))
    for seed in range(20):
        assert _settle(tmp_path, medium, log, seed) == Loss(0, 0)
        assert _letters(medium) == "a..bb..."


def test_forced_unit_access_stays_without_a_flush(tmp_path: Path, medium: Path) -> None:
    _settle(tmp_path, medium, _log((2, _sector("f"), _FUA)))
    assert _letters(medium) == "..f....."


def test_what_was_not_flushed_is_there_in_part_or_wholly_or_not_at_all(tmp_path: Path, medium: Path) -> None:
    log = _log((0, _sector("a"), 0), (0, b"", _FLUSH), (0, _sector("x") * 4, 0))
    seen = set()
    for seed in range(60):
        medium.write_bytes(_sector(".") * _DISK_SECTORS)
        loss = _settle(tmp_path, medium, log, seed)
        letters = _letters(medium)
        assert loss == Loss(4, 4 - letters.count("x"))
        assert set(letters[:1]) <= {"a", "x"}
        seen.add(letters.count("x"))
    assert {0, 4} < seen  # torn ones too


def test_without_a_power_cut_nothing_is_lost(tmp_path: Path, medium: Path) -> None:
    assert _settle(tmp_path, medium, _log((1, _sector("w"), 0)), seed=None) == Loss(1, 0)
    assert _letters(medium) == ".w......"


def test_an_entry_that_was_cut_off_was_never_written(tmp_path: Path, medium: Path) -> None:
    whole = _log((0, _sector("a"), 0), (0, b"", _FLUSH), (1, _sector("b") * 2, 0))
    _settle(tmp_path, medium, whole[:-SECTOR], seed=None)
    assert _letters(medium) == "a......."


@pytest.mark.parametrize("log", [b"", b"\0" * SECTOR, b"something else" * 100])
def test_another_file_is_refused(tmp_path: Path, medium: Path, log: bytes) -> None:
    with pytest.raises(RigError):
        _settle(tmp_path, medium, log)
