"""What an operator should see while a private key is used; on stderr, since it is not the result."""

import time
from typing import TYPE_CHECKING

from unsealerd.cli.output import printable
from unsealerd.cli.stderr import note
from unsealerd.cli.times import since, span

if TYPE_CHECKING:
    from unsealerd.core.conversation import Challenge
    from unsealerd.operator.events import Event


def show(event: "Event") -> None:
    from unsealerd.operator.events import (
        Challenged,
        Exchanging,
        KeyFileExposed,
        PinPadUsed,
        TlsOnly,
        TouchNeeded,
    )

    match event:
        case KeyFileExposed(path, mode):
            note(f"warning: {printable(str(path))} can be read by others (mode {mode:04o}): chmod 600")
        case TlsOnly(name):
            note(f"warning: {printable(name)} has no TPM attestation: it is trusted by its TLS key only")
        case Challenged(challenge, words):
            _show_challenge(challenge, words)
        case Exchanging(recipient):
            note(f"answering as {printable(recipient)}")
        case TouchNeeded(device):
            note(f"touch the device if it blinks: {printable(device)}")
        case PinPadUsed(device, tries_left):
            left = (
                "" if tries_left is None else f" ({tries_left} {'try' if tries_left == 1 else 'tries'} left)"
            )
            note(f"enter the PIN at the reader: {printable(device)}{left}")


def _show_challenge(challenge: "Challenge", words: tuple[str, ...]) -> None:
    generation = "unknown" if challenge.generation is None else str(challenge.generation)
    written = since(challenge.backup_time, time.time()) if challenge.backup_time else "unknown"
    for name, value in (
        ("host", challenge.host_name),
        ("locked", challenge.lock_reason or "no"),
        ("up for", span(challenge.uptime)),
        ("backup", f"generation {generation}, written {written}"),
        ("shares", f"{challenge.shares_present} of {challenge.shares_needed}"),
        ("words", " ".join(words)),
    ):
        note(f"  {name:<7} {printable(value)}")
