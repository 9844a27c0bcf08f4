"""A second copy of the audit records in systemd's journal, where there is one."""

from pathlib import Path

import msgspec

from unsealerd.core.auditchain import Record
from unsealerd.daemon.audit import Mirror

_SOCKET = Path("/run/systemd/journal/socket")


def mirror() -> Mirror | None:
    """What writes a record to the journal; None without a journal, or without systemd-python."""
    if not _SOCKET.exists():
        return None
    try:
        from systemd import journal  # type: ignore[attr-defined,unused-ignore]
    except ImportError:
        return None

    def send(record: Record) -> None:
        journal.send(
            _text(record),
            SYSLOG_IDENTIFIER="unsealerd-audit",
            **{f"UNSEALERD_{name.upper()}": _text(value) for name, value in record.items()},
        )

    return send


def _text(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value, order="sorted").decode()
