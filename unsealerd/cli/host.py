"""``unsealctl host``: the hosts that this operator knows. Needs no configuration."""

import re
import time
from typing import TYPE_CHECKING

import click

from unsealerd.cli import terminal
from unsealerd.cli.app import App
from unsealerd.cli.command import Group
from unsealerd.cli.events import show
from unsealerd.cli.output import print_json, print_line, print_table, printable
from unsealerd.cli.stderr import note
from unsealerd.cli.times import moment
from unsealerd.errors import BadRequest, HostMismatch

if TYPE_CHECKING:
    from unsealerd.operator.hosts import Host, Hosts

_HEX_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@click.group(cls=Group)
def host() -> None:
    """Add, list and remove the hosts that this operator unlocks."""


@host.command("add")
@click.argument("name")
@click.argument("address", metavar="HOST:PORT")
@click.option("--yes", is_flag=True, help="Do not ask: the fingerprint was compared.")
@click.option(
    "--fingerprint", "expected", metavar="TEXT", help="Add it only if this is its fingerprint: words or hex."
)
@click.pass_obj
def add(app: App, name: str, address: str, yes: bool, expected: str | None) -> None:
    """Fetch a host's identity, compare its fingerprint, and remember it.

    `unsealctl identity` on the server's console prints the same words. What is added here is what will be
    answered: compare them over another channel than this network.
    """
    from unsealerd.operator.hosts import fetch_certificate, make_host

    found = make_host(name, address, fetch_certificate(address), int(time.time()))
    hosts = _hosts()
    _refuse_second(hosts, found)
    note(f"{printable(address)} has the fingerprint")
    note(f"  words        {' '.join(_words(found))}")
    note(f"  fingerprint  {found.tls_fingerprint}")
    if expected is not None:
        if not _same(expected, found):
            raise HostMismatch(f"{address} has another fingerprint than the one that was given")
    elif not yes and not terminal.confirm(
        "Does `unsealctl identity` on the server's console print the same?",
        otherwise="compare it there, and say --fingerprint or --yes",
    ):
        raise BadRequest("not confirmed; nothing was added")
    hosts.add(found)
    if app.json:
        print_json(_facts(found))
        return
    print_line(f"added {name}; unlock it with: unsealctl unlock {name} -i IDENTITY")
    print_line("it has no TPM attestation: it is trusted by its TLS key only")


@host.command("list")
@click.pass_obj
def list_hosts(app: App) -> None:
    """List the hosts that were added."""
    found = _hosts().list()
    if app.json:
        print_json({"hosts": [_facts(item) for item in found]})
    elif not found:
        print_line("no hosts; add one with: unsealctl host add NAME HOST:PORT")
    else:
        print_table(
            [
                (item.name, item.address, item.trust.value, moment(item.added), " ".join(_words(item)))
                for item in found
            ],
            ("NAME", "ADDRESS", "TRUST", "ADDED", "FINGERPRINT"),
        )


@host.command("remove")
@click.argument("name")
@click.pass_obj
def remove(app: App, name: str) -> None:
    """Forget a host."""
    removed = _hosts().remove(name)
    if app.json:
        print_json(_facts(removed))
    else:
        print_line(f"removed {removed.name} ({removed.address})")


def _hosts() -> "Hosts":
    from unsealerd.operator.hosts import Hosts, default_path

    return Hosts(default_path(), show)


def _refuse_second(hosts: "Hosts", found: "Host") -> None:
    """A name or an address is added once.

    Another key under it is what an attack looks like, and has its own error.
    """
    for other in hosts.list():
        if other.name == found.name or other.address == found.address:
            if other.fingerprint != found.fingerprint:
                raise HostMismatch(
                    f"{other.name} ({other.address}) was added with another key than {found.address} has"
                )
            raise BadRequest(f"{other.name} ({other.address}) was added already, with the same key")


def _same(expected: str, found: "Host") -> bool:
    """Whether what was typed is the fingerprint: all of its words, or its hex with or without colons."""
    given = expected.strip().lower()
    digits = given.replace(":", "")
    if _HEX_FINGERPRINT.fullmatch(digits):
        return digits == found.tls_fingerprint
    # Fewer words than there are would be a weaker comparison than the operator believes.
    return tuple(re.split(r"[\s-]+", given)) == _words(found)


def _words(found: "Host") -> tuple[str, ...]:
    from unsealerd.core.words import fingerprint_words

    return fingerprint_words(found.fingerprint)


def _facts(found: "Host") -> dict[str, object]:
    return {
        "name": found.name,
        "address": found.address,
        "fingerprint": found.tls_fingerprint,
        "words": list(_words(found)),
        "trust": found.trust.value,
        "added": found.added,
    }
