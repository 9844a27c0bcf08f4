"""``unsealctl unlock``: open a host's backup, over the network or at its console."""

from typing import TYPE_CHECKING

import click

from unsealerd.cli import terminal
from unsealerd.cli.app import App
from unsealerd.cli.command import Command
from unsealerd.cli.events import showing
from unsealerd.cli.identities import identity_options, opened
from unsealerd.cli.output import print_json, print_line, printable
from unsealerd.cli.reach import conversation, may_be_locked, require_one
from unsealerd.cli.stderr import note
from unsealerd.cli.times import span
from unsealerd.errors import BadRequest
from unsealerd.model import State

if TYPE_CHECKING:
    from unsealerd.operator.events import Event, OnEvent
    from unsealerd.operator.unlock import Outcome


@click.command(cls=Command)
@click.argument("host", required=False)
@click.option("--local", is_flag=True, help="This machine, over its admin socket.")
@identity_options
@click.option("--reason", default="", metavar="TEXT", help="Why, for the host's audit log.")
@click.option(
    "--accept-rollback",
    is_flag=True,
    help="Open the backup although it is older than the TPM's counter says.",
)
@click.option("--yes", is_flag=True, help="Answer with a key file without a question on the terminal.")
@click.pass_obj
def unlock(
    app: App,
    host: str | None,
    local: bool,
    specs: tuple[str, ...],
    last_try: bool,
    ask_password: bool,
    reason: str,
    accept_rollback: bool,
    yes: bool,
) -> None:
    """Open a host's backup with an operator's identity.

    HOST is a name or HOST:PORT that was added with `unsealctl host add`. Neither the key nor the backup
    leaves the host.
    """
    require_one(host, local)
    # The host is known before anybody is asked for a passphrase, and spoken to after the identities are there.
    with conversation(app, host) as connection:
        from unsealerd.operator import unlock as client

        def wanted() -> bool:
            return host is not None or may_be_locked(app)

        with opened(specs, last_try=last_try, ask_password=ask_password, wanted=wanted) as identities:
            on_event = showing() if yes or host is None else _asking(showing())
            outcome = client.unlock(
                connection, identities, reason=reason, accept_rollback=accept_rollback, on_event=on_event
            )
    _print_outcome(app, host or "this host", outcome)


def _asking(show: "OnEvent") -> "OnEvent":
    """On a terminal, what the host says is read before a key file answers; other keys wait for the person by themselves."""
    from unsealerd.operator.events import Challenged

    def shown(event: "Event") -> None:
        show(event)
        if (
            isinstance(event, Challenged)
            and event.silent
            and terminal.attended()
            and not terminal.confirm("Answer?")
        ):
            raise BadRequest("not confirmed; nothing was answered")

    return shown


def _print_outcome(app: App, host: str, outcome: "Outcome") -> None:
    if app.json:
        print_json(facts_of(outcome))
        return
    warn_refused(outcome)
    if outcome.state is State.UNLOCKED:
        print_line(f"{host} is unlocked")
        return
    answered = f" ({', '.join(outcome.operators_answered)})" if outcome.operators_answered else ""
    needs = f"; it needs {_needs(outcome)}"
    print_line(f"{host} has {outcome.shares_present} of {outcome.shares_needed} shares{answered}{needs}")


def _needs(outcome: "Outcome") -> str:
    more = max(outcome.shares_needed - outcome.shares_present, 1)
    missing = list(outcome.operators_missing)
    who = "another operator" if more == 1 else f"{more} other operators"
    if missing:
        who = f"{more} more of {', '.join(missing)}" if len(missing) > more else " and ".join(missing)
    return who if outcome.seconds_left is None else f"{who}, within {span(outcome.seconds_left)}"


def facts_of(outcome: "Outcome") -> dict[str, object]:
    return {
        "state": outcome.state.value,
        "shares_present": outcome.shares_present,
        "shares_needed": outcome.shares_needed,
        "accepted": list(outcome.accepted),
        "refused": [{"recipient": recipient, "error": name} for recipient, name in outcome.refused],
        "words": list(outcome.words),
        "operators_answered": list(outcome.operators_answered),
        "operators_missing": list(outcome.operators_missing),
        "seconds_left": outcome.seconds_left,
    }


def warn_refused(outcome: "Outcome") -> None:
    for recipient, name in outcome.refused:
        note(f"warning: not accepted: {printable(recipient)}: {name}")
