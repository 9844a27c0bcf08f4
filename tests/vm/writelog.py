"""What a power cut leaves of a disk with a volatile write cache.

QEMU's block filter `blklogwrites` keeps each request in a file, in the format of the kernel's dm-log-writes:

    superblock   magic, version, entries, sector size: 8 + 8 + 8 + 4 bytes, padded to a sector
    entry        sector, sectors, flags, data length: 8 bytes each, padded to a sector, then the data

All numbers are little endian. A request stands there once it has come to its end, and the guest is told afterwards.
What was written before the last flush, or with FUA, is on the disk. Of what came after, each 512-byte sector is there or
not, as it happens: a disk may do its cached writes in any order, and lose power in the middle of one.
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

    @property
    def flushes(self) -> bool:
        return bool(self.flags & _FLUSH)


@dataclass(frozen=True, slots=True)
class Cut:
    """A power cut after the first ``end`` requests of a log.

    Of these the first ``kept`` are on the disk, and those with FUA; of the others this share of the sectors.
    """

    end: int
    kept: int
    share: float


@dataclass(frozen=True, slots=True)
class Loss:
    """What a power cut did: sectors that were not flushed, and how many of them were lost."""

    unflushed: int
    lost: int


@dataclass(frozen=True, slots=True)
class Log:
    """All requests of one run of a machine, in the order in which they came to their end."""

    path: Path
    writes: tuple[Write, ...]
    whole: bool
    """Whether the file ends with the last of them. If not, QEMU is in the middle of writing one."""

    @classmethod
    def read(cls, path: Path) -> "Log":
        """Raises RigError if it is no log."""
        with path.open("rb") as file:
            writes = tuple(_requests(file))
            end = writes[-1].position + writes[-1].size if writes else SECTOR
            size = file.seek(0, 2)
            return cls(path, writes, whole=size in {0, end} if not writes else size == end)

    def flushed(self, end: int) -> int:
        """How many of the first ``end`` requests are on the disk for sure: up to the last flush among them."""
        return next((index + 1 for index in reversed(range(end)) if self.writes[index].flushes), 0)

    def cut(self, share: float) -> Cut:
        """At the end of the log."""
        return Cut(len(self.writes), self.flushed(len(self.writes)), share)

    def data(self, file: BinaryIO, write: Write) -> bytes:
        file.seek(write.position)
        return file.read(write.size)

    def text(self, write: Write) -> str:
        """What was written, up to the first zero; for the test's own notes beside the file system."""
        with self.path.open("rb") as file:
            return self.data(file, write).partition(b"\0")[0].decode(errors="replace")

    def settle(self, medium: Path, cut: Cut, chance: random.Random, *, since: int = 0) -> Loss:
        """Bring the medium to a state in which that power cut may have left it.

        ``since``: of the requests that are kept, so many have been brought there before.
        """
        unflushed = lost = 0
        with self.path.open("rb") as log, medium.open("r+b") as disk:
            for index in range(min(since, cut.kept), cut.end):
                write = self.writes[index]
                if not write.size:
                    continue
                data = self.data(log, write)
                if index < cut.kept or write.flags & _FUA:
                    disk.seek(write.offset)
                    disk.write(data)
                    continue
                for start in range(0, write.size, SECTOR):
                    unflushed += 1
                    if chance.random() >= cut.share:
                        lost += 1
                        continue
                    disk.seek(write.offset + start)
                    disk.write(data[start : start + SECTOR])
        return Loss(unflushed, lost)


def _requests(log: BinaryIO) -> Iterator[Write]:
    header = log.read(_SUPER.size)
    if not header:
        return  # its head comes with the first write
    if len(header) < _SUPER.size:
        raise RigError("the log of the disk is cut off")
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
