"""What the audit log tells: that its chain verifies, and how the planned reboots went."""

from dataclasses import dataclass
from pathlib import Path

from unsealerd.cli.audit import AUDIT_LOG, ChainedLog


@dataclass(frozen=True, slots=True)
class Start:
    """A start of the daemon for which a copy had been sealed. ``refused``: the lock reason, or None if it came up unlocked."""

    time: str
    refused: str | None


@dataclass(frozen=True, slots=True)
class History:
    records: int
    last_planned: Start | None


def read_history(state_dir: Path) -> History:
    """Reads all of it. Raises `NotInitialised`, `AccessDenied`, `AuditBroken`."""
    log = ChainedLog(state_dir / AUDIT_LOG)
    last: Start | None = None
    trying = False  # between a record that the sealed copy is used, and what became of it
    try:
        for _, record in log.records():
            match record.get("event"):
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
    finally:
        log.close()
    return History(log.count, last)
