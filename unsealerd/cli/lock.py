"""``unsealctl lock``."""

import click

from unsealerd.cli.app import App
from unsealerd.cli.command import Command
from unsealerd.cli.output import print_json, print_line


@click.command(cls=Command)
@click.pass_obj
def lock(app: App) -> None:
    """Wipe the keys from memory, and destroy a sealed copy."""
    with app.admin() as admin:
        admin.call("io.unsealerd.Admin.Lock")
    if app.json:
        print_json({"state": "locked"})
    else:
        print_line("locked: services wait for an operator (unsealctl unlock)")
