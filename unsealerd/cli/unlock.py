"""``unsealctl unlock``: open a host's backup, over the network or at its console."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from unsealerd.cli.app import App
from unsealerd.cli.command import Command
from unsealerd.cli.output import print_json, print_line, printable
from unsealerd.cli.stderr import note
from unsealerd.cli.times import since, span
from unsealerd.errors import BadRequest
from unsealerd.model import State

if TYPE_CHECKING:
    from unsealerd.core.age import Identity
    from unsealerd.operator.conversation import Conversation
    from unsealerd.operator.events import Event
    from unsealerd.operator.unlock import Outcome


@click.command(cls=Command)
@click.argument("host", required=False)
@click.option("--local", is_flag=True, help="This machine, over its admin socket.")
@click.option(
    "-i",
    "--identity",
    "files",
    multiple=True,
    required=True,
    metavar="IDENTITY",
    type=click.Path(path_type=Path),
    help="A private key: a file of age-keygen, or P-256 in PEM. Can be given more than once.",
)
@click.option("--reason", default="", metavar="TEXT", help="Why, for the host's audit log.")
@click.option(
    "--accept-rollback",
    is_flag=True,
    help="Open the backup although it is older than the TPM's counter says.",
)
@click.pass_obj
def unlock(
    app: App, host: str | None, local: bool, files: tuple[Path, ...], reason: str, accept_rollback: bool
) -> None:
    """Open a host's backup with an operator's identity.

    HOST is a name or HOST:PORT that was added with `unsealctl host add`. Neither the key nor the backup
    leaves the host.
    """
    if local == (host is not None):
        raise BadRequest("either HOST or --local")
    with _conversation(app, host) as conversation:
        from unsealerd.operator import unlock as client

        identities = _identities(files)
        outcome = client.unlock(
            conversation, identities, reason=reason, accept_rollback=accept_rollback, on_event=_show
        )
    _print_outcome(app, host or "this host", outcome)


@contextmanager
def _conversation(app: App, host: str | None) -> Iterator["Conversation"]:
    """Nothing is sent on the network before the identities are read, so that no session runs out over a
    passphrase.
    """
    if host is None:
        from unsealerd.operator.conversation import VarlinkConversation

        with app.admin() as admin:
            yield VarlinkConversation(admin.call)
        return
    from unsealerd.operator.hosts import Hosts, default_path

    known = Hosts(default_path()).find(host)
    from unsealerd.operator import network

    with network.connect(known) as conversation:
        yield conversation


def _identities(files: tuple[Path, ...]) -> "list[Identity]":
    from unsealerd.operator.identities import load_identity

    return [identity for file in files for identity in load_identity(file, _ask_passphrase, _show)]


def _ask_passphrase(file: Path) -> bytes:
    from unsealerd.cli.terminal import ask_secret

    return ask_secret(f"Passphrase of {printable(str(file))}: ").encode()


def _show(event: "Event") -> None:
    """What the operator should see before the private key is used; on stderr, since it is not the result."""
    from unsealerd.operator.events import Challenged, Exchanging, KeyFileExposed, TlsOnly

    match event:
        case KeyFileExposed(path, mode):
            note(f"warning: {printable(str(path))} can be read by others (mode {mode:04o}): chmod 600")
        case TlsOnly(name):
            note(f"warning: {printable(name)} has no TPM attestation: it is trusted by its TLS key only")
        case Challenged(challenge, words):
            generation = "unknown" if challenge.generation is None else str(challenge.generation)
            written = since(challenge.backup_time, time.time()) if challenge.backup_time else "unknown"
            for name, value in (
                ("host", challenge.host_name),
                ("locked", challenge.lock_reason),
                ("up for", span(challenge.uptime)),
                ("backup", f"generation {generation}, written {written}"),
                ("shares", f"{challenge.shares_present} of {challenge.shares_needed}"),
                ("words", " ".join(words)),
            ):
                note(f"  {name:<7} {printable(value)}")
        case Exchanging(recipient):
            note(f"answering as {printable(recipient)}")


def _print_outcome(app: App, host: str, outcome: "Outcome") -> None:
    if app.json:
        print_json(
            {
                "state": outcome.state.value,
                "shares_present": outcome.shares_present,
                "shares_needed": outcome.shares_needed,
                "accepted": list(outcome.accepted),
                "refused": [{"recipient": recipient, "error": name} for recipient, name in outcome.refused],
                "words": list(outcome.words),
            }
        )
        return
    for recipient, name in outcome.refused:
        note(f"warning: not accepted: {recipient}: {name}")
    if outcome.state is State.UNLOCKED:
        print_line(f"{host} is unlocked")
    else:
        print_line(
            f"{host} has {outcome.shares_present} of {outcome.shares_needed} shares; it needs another operator"
        )
