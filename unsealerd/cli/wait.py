"""``unsealctl wait``: return when the host is unlocked. For units that need a key; needs no privilege."""

import time

import click

from unsealerd.cli.app import App
from unsealerd.cli.command import Command
from unsealerd.cli.output import print_json
from unsealerd.errors import BadRequest, DaemonUnreachable, LimitExceeded, Locked, UnsealerdError
from unsealerd.model import State

_PAUSE = 0.5  # seconds after the daemon could not be reached


@click.command(cls=Command)
@click.option("--timeout", metavar="TIME", help="90s, 15m, 2h, 1d  [default: for ever]")
@click.pass_obj
def wait(app: App, timeout: str | None) -> None:
    """Wait until the host is unlocked.

    Goes on waiting while the daemon is restarted, or not there yet.
    """
    from unsealerd.config import parse_duration

    try:
        seconds = None if timeout is None else parse_duration(timeout)
    except ValueError as err:
        raise BadRequest(f"--timeout: {err}") from err
    _wait(app, None if seconds is None else time.monotonic() + seconds)
    if app.json:
        print_json({"state": State.UNLOCKED.value})


def _wait(app: App, deadline: float | None) -> None:
    """Raises `Locked`, or why the daemon could not be asked, when the time is up."""
    from unsealerd.client import Client

    why: UnsealerdError = DaemonUnreachable("the daemon did not answer in time")
    directory = app.service_runtime_dir()
    while True:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise why
        try:
            # Each look at the state takes the time that is left at the most, so that the last one ends with it.
            with Client(directory, timeout=left) as client:
                for event in client.monitor(patience=left):
                    if event.state is State.UNLOCKED:
                        return
                    why = Locked(f"the host is still {event.state.value}")
        except (DaemonUnreachable, LimitExceeded) as err:
            if deadline is None or time.monotonic() < deadline:
                why = err
            time.sleep(_PAUSE if left is None else min(_PAUSE, left))
