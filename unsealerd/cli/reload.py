"""``unsealctl reload``: read the configuration again, and say what that changed for the operators."""

import click

from unsealerd.cli.app import App
from unsealerd.cli.command import Command
from unsealerd.cli.fields import optional, texts
from unsealerd.cli.output import print_json, print_line, printable
from unsealerd.cli.stderr import note


@click.command(cls=Command)
@click.pass_obj
def reload(app: App) -> None:
    """Read the configuration again, and write the backup for the operators that it names now.

    The same as SIGHUP to the daemon, but says what came of it.
    """
    app.config()  # here a refused file is the error, and not a warning
    with app.admin() as admin:
        answer = admin.call("io.unsealerd.Admin.Reload")
    generation = optional(answer, "generation", int)
    added, removed = texts(answer, "added"), texts(answer, "removed")
    pending = optional(answer, "pending", str)
    if app.json:
        print_json({"generation": generation, "added": added, "removed": removed, "pending": pending})
        return
    print_line("the configuration is in use")
    # One with a new recipient is in both lists.
    for name in added:
        print_line(f"{'a new key' if name in removed else 'added'}: {name}")
    for name in removed:
        if name not in added:
            print_line(f"removed: {name}")
    if generation is None:
        if added or removed:
            print_line("the backup is written for the operators of now at the next unlock")
    else:
        print_line(f"the backup is generation {generation}")
    if pending is not None:
        note(f"warning: {printable(pending)}")
    for name in removed:
        _warn(name, generation)


def _warn(name: str, generation: int | None) -> None:
    """What removing an operator does, and what it does not."""
    when = f"from generation {generation} on" if generation is not None else "written after the next unlock"
    key = f"the key that {printable(name)} had"
    note(f"warning: {key} opens no backup {when}, but still opens every earlier copy")
    note(
        "hint: if that matters, `unsealctl key rotate NAME` for each key, `unsealctl key revoke NAME --version N` once"
        " nothing needs the old version, and destroy the earlier copies (exports, disk images, snapshots)"
    )
