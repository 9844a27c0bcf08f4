"""What the audit log tells: that its chain verifies, how large it is, and how the planned reboots went."""

from dataclasses import dataclass
from pathlib import Path

from unsealerd.cli.chainedlog import ChainedLog
from unsealerd.core.auditchain import ROTATED


@dataclass(frozen=True, slots=True)
class Start:
    """A start of the daemon for which a copy had been sealed. ``refused``: the lock reason, or None if it came up unlocked."""

    time: str
    refused: str | None


@dataclass(frozen=True, slots=True)
class History:
    """``first``: the number of the first record that is kept. ``missing``: what the daemon itself did not find, the last time."""

    records: int
    first: int
    sizes: tuple[int, ...]
    """Bytes of its files; the last is the one that is written to."""
    missing: str | None
    last_planned: Start | None


def read_history(state_dir: Path) -> History:
    """Reads all of it. Raises `NotInitialised`, `AccessDenied`, `AuditBroken`."""
    log = ChainedLog(state_dir)
    last: Start | None = None
    missing: str | None = None
    trying = False  # between a record that the sealed copy is used, and what became of it
    try:
        for _, record in log.records():
            match record.get("event"):
                case event if event == ROTATED:
                    missing = str(record["missing"]) if "missing" in record else missing
                case "start":
                    trying = False
                case "unseal":
                    trying = True
                case "unsealed" if trying:
                    last, trying = Start(str(record.get("time")), None), False
                case "locked" if trying:
                    last, trying = Start(str(record.get("time")), str(record.get("reason"))), False
                case _:
                    continue
        log.check_kept()
        sizes = log.sizes()
    finally:
        log.close()
    return History(log.count, log.first, sizes, missing, last)
