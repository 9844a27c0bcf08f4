"""What `busy.py` writes beside the file system, on the same disk, past its cache in the guest and without a flush.

A note says what the daemon has just reported; its place in the log of the disk says what had been written and flushed by
then. A canary says nothing, and is there to be lost: a disk that loses none of them shows nothing about a power cut. The
disk::

    0             the file system
    48 MiB        the last note: words, then zeros
    48 MiB + 4 K  1000 canaries of a sector, in turn: its number, then zeros
"""

from dataclasses import dataclass

from vm.writelog import SECTOR, Log

FILE_SYSTEM = 48 << 20  # bytes
DISK = FILE_SYSTEM + (1 << 20)
_CANARIES = FILE_SYSTEM + 4096
SLOTS = 1000
# Run in the guest: prints the numbers of the canaries that are on the disk.
READ_CANARIES = (
    f"dd if=/dev/vda iflag=direct bs=4096 skip={_CANARIES // 4096} count={SLOTS * SECTOR // 4096} status=none"
    " | tr -d '\\000'"
)


@dataclass(frozen=True, slots=True)
class Note:
    """``index``: its place among the requests of the log."""

    index: int
    words: tuple[str, ...]


def notes(log: Log) -> list[Note]:
    """All notes of a run: `begin`, `done KIND` after the daemon's answer, `version NUMBER DIGEST` once a service has it."""
    return [
        Note(index, tuple(log.text(write).split()))
        for index, write in enumerate(log.writes)
        if write.offset == FILE_SYSTEM and write.size
    ]


def versions(found: list[Note]) -> dict[int, str]:
    """Number and digest of the versions that a service got."""
    return {int(note.words[1]): note.words[2] for note in found if note.words[0] == "version"}


def canaries(log: Log, begin: int, end: int) -> set[int]:
    """The numbers of those among these requests."""
    return {
        int(log.text(write)) for write in log.writes[begin:end] if write.offset >= _CANARIES and write.size
    }
