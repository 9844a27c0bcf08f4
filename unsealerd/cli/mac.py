"""``unsealctl sign`` and ``verify``: MACs of a message on stdin, computed by the daemon."""

import re
import sys

import click

from unsealerd.cli.app import App
from unsealerd.cli.command import Command
from unsealerd.cli.edge import Exit
from unsealerd.cli.output import print_json, print_line
from unsealerd.client import Client
from unsealerd.client.client import MAX_MESSAGE_BYTES
from unsealerd.errors import BadRequest

_HEX_MAC = re.compile(r"[0-9a-f]{64}")


@click.command(cls=Command)
@click.argument("name")
@click.pass_obj
def sign(app: App, name: str) -> None:
    """Compute the MAC of a message on stdin."""
    message = _message()
    with Client(app.service_runtime_dir()) as client:
        signature = client.sign(name, message)
    if app.json:
        print_json({"mac": signature.mac.hex(), "version": signature.version})
    else:
        print_line(signature.mac.hex())


@click.command(cls=Command)
@click.argument("name")
@click.option("--mac", required=True, metavar="HEX", help="What `sign` printed.")
@click.pass_obj
def verify(app: App, name: str, mac: str) -> int:
    """Check the MAC of a message on stdin.

    Exits with 0 when it is right, with 1 when it is not, and with another code when that is not known.
    """
    if not _HEX_MAC.fullmatch(mac.strip().lower()):
        raise BadRequest("--mac: a MAC is 64 hexadecimal digits")
    message = _message()
    with Client(app.service_runtime_dir()) as client:
        found = client.verify(name, message, bytes.fromhex(mac.strip()))
    if app.json:
        print_json({"valid": found.valid, "version": found.version, "stale": found.stale})
    elif not found:
        print_line("not valid")
    else:
        print_line(f"valid: version {found.version}{' (stale: sign again)' if found.stale else ''}")
    return Exit.OK if found else Exit.NOT_VALID


def _message() -> bytes:
    """At most one byte more than the client library takes, which refuses it."""
    return sys.stdin.buffer.read(MAX_MESSAGE_BYTES + 1)
