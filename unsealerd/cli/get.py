"""``unsealctl get``: the bytes of a key, under the caller's own identity."""

import base64
import sys

import click

from unsealerd.cli.app import App
from unsealerd.cli.command import Command
from unsealerd.cli.output import print_json, print_line
from unsealerd.client import Client
from unsealerd.errors import BadRequest, Locked


@click.command(cls=Command)
@click.argument("name")
@click.option("--all", "every", is_flag=True, help="All versions that verify: a line VERSION VALUE each.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["raw", "hex", "base64"]),
    help="[default: raw; hex with --all or --json]",
)
@click.option("--wait", is_flag=True, help="While the host is locked, wait for an operator.")
@click.pass_obj
def get(app: App, name: str, every: bool, form: str | None, wait: bool) -> None:
    """Read the bytes of a key."""
    form = form or ("hex" if every or app.json else "raw")
    if form == "raw" and (every or app.json):
        raise BadRequest("raw bytes are neither lines nor JSON: use --format hex or base64")
    if form == "raw" and sys.stdout.isatty():
        raise BadRequest("raw bytes do not belong on a terminal: use --format hex, or redirect them")
    directory = app.service_runtime_dir()
    with Client(directory) as client:
        try:
            # The daemon holds a connection that it may not answer: ask first, and never hang.
            client.check_readable(name)
        except Locked:
            if not wait:
                raise
    with Client(directory, timeout=None if wait else 30.0) as client:
        if every:
            _print_all(app, name, form, client.read_all(name))
        else:
            _print_one(app, name, form, client.read(name))


def _print_one(app: App, name: str, form: str, value: bytes) -> None:
    if app.json:
        print_json({"name": name, "format": form, "value": _encoded(value, form)})
    elif form == "raw":
        sys.stdout.buffer.write(value)
        sys.stdout.buffer.flush()
    else:
        print_line(_encoded(value, form))


def _print_all(app: App, name: str, form: str, versions: list[tuple[int, bytes]]) -> None:
    if app.json:
        values = [{"version": version, "value": _encoded(value, form)} for version, value in versions]
        print_json({"name": name, "format": form, "versions": values})
        return
    for version, value in versions:
        print_line(f"{version} {_encoded(value, form)}")


def _encoded(value: bytes, form: str) -> str:
    return value.hex() if form == "hex" else base64.b64encode(value).decode()
