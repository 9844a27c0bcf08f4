"""What is told to people, and to whom: the file through which the watcher hands it to ``unsealerd-notify``.

::

    {"event": "locked", "host": NAME, "reason": REASON or null, "since": UNIX, "boot_id": UUID,
     "command": [...], "webhook": URL or null}

The facts are public (the gateway tells anybody the state and the reason). The webhook's address is not: it often has a token in
it, so the file is for root, and systemd hands it to the one unit as a credential.
"""

import json
from dataclasses import dataclass, field, fields

from unsealerd.errors import BadMessage

MAX_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Event:
    """``event``: locked or unlocked. ``since``: Unix seconds."""

    event: str
    host: str
    reason: str | None
    since: int
    boot_id: str

    def sentence(self) -> str:
        """For people: one line."""
        if self.event == "locked":
            why = f" ({self.reason})" if self.reason else ""
            return f"{self.host}: keys are locked{why}; services wait for an operator: unsealctl unlock"
        return f"{self.host}: keys are unlocked"

    def facts(self) -> dict[str, object]:
        """The body of the webhook's request; ``text`` is what chat programs show."""
        return {
            "event": self.event,
            "host": self.host,
            "reason": self.reason,
            "since": self.since,
            "boot_id": self.boot_id,
            "text": self.sentence(),
        }

    def environment(self) -> dict[str, str]:
        """For the administrator's command."""
        return {
            "UNSEALERD_EVENT": self.event,
            "UNSEALERD_HOST": self.host,
            "UNSEALERD_REASON": self.reason or "",
            "UNSEALERD_SINCE": str(self.since),
            "UNSEALERD_BOOT_ID": self.boot_id,
            "UNSEALERD_TEXT": self.sentence(),
        }


@dataclass(frozen=True, slots=True)
class Letter:
    """An event, and who is to be told of it."""

    event: Event
    command: tuple[str, ...]
    webhook: str | None = field(repr=False)

    def encode(self) -> str:
        event = {part.name: getattr(self.event, part.name) for part in fields(Event)}
        return json.dumps({**event, "command": list(self.command), "webhook": self.webhook}) + "\n"


def decode(data: bytes) -> Letter:
    """The inverse of `Letter.encode`. Raises `BadMessage`, on any bytes, and never quotes them."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        # Not `from` the parser's error, which quotes what it read.
        raise BadMessage("the event is not JSON") from None
    match value:
        case {
            "event": "locked" | "unlocked" as event,
            "host": str(host),
            "reason": str() | None as reason,
            "since": int(since),
            "boot_id": str(boot_id),
            "command": [*command],
            "webhook": str() | None as webhook,
        } if len(value) == 7 and all(isinstance(part, str) for part in command):
            return Letter(Event(event, host, reason, since, boot_id), tuple(command), webhook)
    raise BadMessage("the event is not one")
