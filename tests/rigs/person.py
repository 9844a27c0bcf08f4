"""Who types PINs and sees what goes on: `Prompts` and `OnEvent`, with a memory."""

from dataclasses import dataclass, field

from unsealerd.errors import PinCancelled
from unsealerd.operator.events import Event
from unsealerd.operator.prompts import PinRequest


@dataclass(slots=True)
class Person:
    """``pin``: what is typed; None to cancel. A list: one after the other."""

    pins: list[bytes] | bytes | None = None
    asked: list[PinRequest] = field(default_factory=list)
    seen: list[Event] = field(default_factory=list)

    def pin(self, request: PinRequest) -> bytes:
        self.asked.append(request)
        if self.pins is None:
            raise PinCancelled("nobody typed")
        return self.pins if isinstance(self.pins, bytes) else self.pins.pop(0)

    def passphrase(self, what: str) -> bytes:
        raise AssertionError(f"asked for the passphrase of {what}")

    def see(self, event: Event) -> None:
        self.seen.append(event)
