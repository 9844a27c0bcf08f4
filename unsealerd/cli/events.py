"""What an operator should see while a private key is used; on stderr, since it is not the result."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from unsealerd.cli.output import printable
from unsealerd.cli.stderr import note
from unsealerd.cli.times import since, span

if TYPE_CHECKING:
    from unsealerd.core.conversation import Challenge
    from unsealerd.operator.events import Event


def showing() -> Callable[["Event"], None]:
    """What shows the events of one conversation.

    Each recipient that answers is named once. It may be asked as often as there are operators with key files: an
    X25519 stanza does not say whose it is.
    """
    from unsealerd.operator.events import Exchanging

    answering: set[str] = set()

    def once(event: "Event") -> None:
        if isinstance(event, Exchanging):
            if event.recipient in answering:
                return
            answering.add(event.recipient)
        show(event)

    return once


def show(event: "Event") -> None:
    from unsealerd.operator.events import (
        Challenged,
        Exchanging,
        HostsExposed,
        KeyFileExposed,
        PinPadUsed,
        TlsOnly,
        TouchNeeded,
    )

    match event:
        case KeyFileExposed(path, mode):
            note(f"warning: {printable(str(path))} can be read by others (mode {mode:04o}): chmod 600")
        case HostsExposed(path, mode):
            note(
                f"warning: {printable(str(path))}, which says whom you answer, can be written by others (mode {mode:04o}):"
                " chmod 600, and compare the words of your hosts again"
            )
        case TlsOnly(name):
            note(f"warning: {printable(name)} has no TPM attestation: it is trusted by its TLS key only")
        case Challenged(challenge, words, times):
            _show_challenge(challenge, words, times)
        case Exchanging(recipient):
            note(f"answering as {printable(recipient)}")
        case TouchNeeded(device):
            note(f"touch the device if it blinks: {printable(device)}")
        case PinPadUsed(device, tries_left):
            left = (
                "" if tries_left is None else f" ({tries_left} {'try' if tries_left == 1 else 'tries'} left)"
            )
            note(f"enter the PIN at the reader: {printable(device)}{left}")


def _show_challenge(challenge: "Challenge", words: tuple[str, ...], times: int) -> None:
    generation = "unknown" if challenge.generation is None else str(challenge.generation)
    written = since(challenge.backup_time, time.time()) if challenge.backup_time else "unknown"
    for name, value in (
        ("host", challenge.host_name),
        ("locked", challenge.lock_reason or "no"),
        ("up for", span(challenge.uptime)),
        ("backup", f"generation {generation}, written {written}"),
        ("shares", f"{challenge.shares_present} of {challenge.shares_needed}"),
        ("words", " ".join(words)),
        *([("asks", f"a key file {times} times, for as many operators with key files")] if times > 1 else []),
    ):
        note(f"  {name:<7} {printable(value)}")
