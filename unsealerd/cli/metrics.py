"""``unsealctl metrics``: the state of this host for Prometheus. docs/monitoring.md lists every name."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import click

from unsealerd import __version__
from unsealerd.cli.app import App
from unsealerd.cli.command import Command
from unsealerd.cli.fields import required
from unsealerd.cli.output import print_json
from unsealerd.errors import DaemonUnreachable


@click.command(cls=Command)
@click.option(
    "--textfile",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write them to FILE, whole or not at all, for the node exporter.",
)
@click.pass_obj
def metrics(app: App, textfile: Path | None) -> None:
    """Print the state of this host as Prometheus metrics.

    If the daemon does not answer, they say so (unsealerd_up is 0), and the exit code is 5.
    """
    try:
        with app.admin() as admin:
            status = required(admin.call("io.unsealerd.Admin.Status"), "status", dict)
    except DaemonUnreachable:
        if not app.json:
            _write(None, textfile)
        raise
    if app.json:
        _write_json(status, textfile)
    else:
        _write(status, textfile)


def _write(status: Mapping[str, object] | None, path: Path | None) -> None:
    from unsealerd.core.metrics import exposition, metrics
    from unsealerd.watch import textfile

    text = exposition(metrics(status, __version__, time.time()))
    if path is None:
        sys.stdout.write(text)
    else:
        textfile.replace(path, text)


def _write_json(status: Mapping[str, object], path: Path | None) -> None:
    """The same samples, for a program that does not read the text format."""
    from unsealerd.core.metrics import metrics

    if path is not None:
        _write(status, path)
    print_json(
        {
            "metrics": [
                {
                    "name": family.name,
                    "type": family.kind,
                    "value": sample.value,
                    "labels": dict(sample.labels),
                }
                for family in metrics(status, __version__, time.time())
                for sample in family.samples
            ]
        }
    )
