"""``unsealctl seal``, ``arm`` and ``disarm``: the sealed copy for the next boot."""

import click

from unsealerd.cli.app import App
from unsealerd.cli.command import Command
from unsealerd.cli.fields import required
from unsealerd.cli.output import print_json, print_line, print_table
from unsealerd.cli.values import rows
from unsealerd.errors import BadRequest

_ADMIN = "io.unsealerd.Admin"


@click.command(cls=Command)
@click.option("--kind", type=click.Choice(["reboot", "kexec"]), default="reboot", show_default=True)
@click.option(
    "--at-shutdown",
    is_flag=True,
    help="For the service itself, while it is stopped: seal only if the machine reboots. Always exits 0.",
)
@click.pass_obj
def seal(app: App, kind: str, at_shutdown: bool) -> None:
    """Seal to the TPM for the next boot.

    The service does this by itself when the machine is asked to reboot. kexec: the TPM will not be reset.
    """
    if at_shutdown:
        from unsealerd.cli import shutdown

        shutdown.at_shutdown(app)
        return
    with app.admin() as admin:
        answer = admin.call(f"{_ADMIN}.Seal", {"kind": kind})
    _print_seal(app, required(answer, "seal", dict), f"sealed for the next boot ({kind})")


@click.command(cls=Command)
@click.option("--for", "duration", required=True, metavar="TIME", help="90s, 15m, 2h, 1d")
@click.pass_obj
def arm(app: App, duration: str) -> None:
    """Seal for a reboot within a time.

    For a reboot that is not announced to the service manager: `reboot -f`, a power cycle. When the time is
    up the sealed copy is destroyed.
    """
    from unsealerd.config import parse_duration

    try:
        seconds = parse_duration(duration)
    except ValueError as err:
        raise BadRequest(f"--for: {err}") from err
    with app.admin() as admin:
        answer = admin.call(f"{_ADMIN}.Arm", {"seconds": seconds})
    _print_seal(
        app, required(answer, "seal", dict), f"armed: a reboot within {duration} finds the sealed copy"
    )


@click.command(cls=Command)
@click.pass_obj
def disarm(app: App) -> None:
    """Destroy the sealed copy."""
    with app.admin() as admin:
        admin.call(f"{_ADMIN}.Disarm")
    if app.json:
        print_json({"disarmed": True})
    else:
        print_line("the sealed copy is destroyed: the next boot will need an operator")


def _print_seal(app: App, sealed: dict[str, object], sentence: str) -> None:
    if app.json:
        print_json(sealed)
        return
    print_line(sentence)
    print_table(rows(sealed))
