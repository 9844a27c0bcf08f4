"""What a power cut leaves of a disk with a volatile write cache.

QEMU's block filter `blklogwrites` keeps each request in a file, in the format of the kernel's dm-log-writes:

    superblock   magic, version, entries, sector size: 8 + 8 + 8 + 4 bytes, padded to a sector
    entry        sector, sectors, flags, data length: 8 bytes each, padded to a sector, then the data

All numbers are little endian. What was written before the last flush, or with FUA, is on the disk. Of what came
after, each 512-byte sector is there or not, as it happens: a disk may do its cached writes in any order, and
lose power in the middle of one.
"""

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vm.errors import RigError

SECTOR = 512
_MAGIC = 0x6A736677736872
_SUPER = struct.Struct("<QQQL")
_ENTRY = struct.Struct("<QQQQ")
_FLUSH, _FUA, _DISCARD = 1, 2, 4


@dataclass(frozen=True, slots=True)
class Write:
    """One request; offsets and sizes in bytes."""

    offset: int
    size: int
    flags: int
    position: int
    """Where its data is in the log."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What a power cut did: sectors that were not flushed, and how many of them were lost."""

    unflushed: int
    lost: int


def requests(log: BinaryIO) -> Iterator[Write]:
    """All requests in the order in which they came. Raises RigError if it is no log."""
    header = log.read(_SUPER.size)
    if len(header) < _SUPER.size:
        raise RigError("the log of the disk is empty")
    magic, version, _, sector = _SUPER.unpack(header)
    if (magic, version) != (_MAGIC, 1):
        raise RigError("not a log of a disk")
    end = log.seek(0, 2)
    position = sector
    while position + _ENTRY.size <= end:
        log.seek(position)
        number, count, flags, _ = _ENTRY.unpack(log.read(_ENTRY.size))
        if not (count or flags):
            return  # where QEMU was killed
        size = 0 if flags & _DISCARD else count * sector
        if position + sector + size > end:
            return
        yield Write(number * sector, size, flags, position + sector)
        position += sector + size


def settle(log_file: Path, medium: Path, chance: random.Random | None) -> Loss:
    """Bring the medium to a state in which the power cut may have left it; with no chance, nothing is lost."""
    with log_file.open("rb") as log, medium.open("r+b") as disk:
        writes = list(requests(log))
        flushed = max((index for index, write in enumerate(writes) if write.flags & _FLUSH), default=-1)
        unflushed = lost = 0
        # Nothing of the cache, all of it, or a part: each is a third of the cuts.
        share = 1.0 if chance is None else chance.choice((0.0, 0.5, 1.0))
        for index, write in enumerate(writes):
            if not write.size:
                continue
            log.seek(write.position)
            data = log.read(write.size)
            if index <= flushed or write.flags & _FUA:
                disk.seek(write.offset)
                disk.write(data)
                continue
            for start in range(0, write.size, SECTOR):
                unflushed += 1
                if chance is not None and chance.random() >= share:
                    lost += 1
                    continue
                disk.seek(write.offset + start)
                disk.write(data[start : start + SECTOR])
    return Loss(unflushed, lost)
