"""``unsealctl drill``: prove that an identity still opens a host's backup, and change nothing."""

import click

from unsealerd.cli.app import App
from unsealerd.cli.command import Command
from unsealerd.cli.events import showing
from unsealerd.cli.identities import identity_options, opened
from unsealerd.cli.output import print_json, print_line
from unsealerd.cli.reach import conversation, require_one
from unsealerd.cli.unlock import facts_of, warn_refused


@click.command(cls=Command)
@click.argument("host", required=False)
@click.option("--local", is_flag=True, help="This machine, over its admin socket.")
@identity_options
@click.pass_obj
def drill(
    app: App, host: str | None, local: bool, specs: tuple[str, ...], last_try: bool, ask_password: bool
) -> None:
    """Prove that an identity still opens a host's current backup, and change nothing.

    Works whether the host is locked or not, and unlocks nothing. The host remembers when each operator was last
    proven.
    """
    require_one(host, local)
    with conversation(app, host) as connection:
        from unsealerd.operator import unlock as client

        with opened(specs, last_try=last_try, ask_password=ask_password, wanted=lambda: True) as identities:
            outcome = client.drill(connection, identities, on_event=showing())
    if app.json:
        print_json(facts_of(outcome))
        return
    warn_refused(outcome)
    for name in outcome.accepted:
        print_line(f"proven: {name}")
    print_line(f"{host or 'this host'} would accept it; nothing was unlocked or changed")
