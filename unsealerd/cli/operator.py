"""``unsealctl operator``: the public key of a device as configuration lines, and the operators of this host."""

from typing import TYPE_CHECKING

import click

from unsealerd.cli.app import App
from unsealerd.cli.command import Group
from unsealerd.cli.fields import objects, optional, required
from unsealerd.cli.output import print_json, print_line, print_table, printable
from unsealerd.cli.stderr import note
from unsealerd.errors import BadRequest

if TYPE_CHECKING:
    from unsealerd.cli.candidate import Candidate

_SLOTS = {"9a": 0x9A, "9c": 0x9C, "9d": 0x9D, "9e": 0x9E} | {
    f"{number:02x}": number for number in range(0x82, 0x96)
}
_NEVER = "never proven"


@click.group(cls=Group)
def operator() -> None:
    """Read an operator's public key for the configuration, and list the operators of this host."""


@operator.command("add")
@click.argument("name")
@click.option("--piv", is_flag=False, flag_value="", metavar="[SERIAL]", help="A PIV card or YubiKey.")
@click.option("--openpgp", is_flag=False, flag_value="", metavar="[SERIAL]", help="An OpenPGP card.")
@click.option("--pkcs11", metavar="URI", help="A PKCS#11 token: pkcs11:token=…;object=…")
@click.option("--key-file", type=click.Path(), metavar="FILE", help="A file of age-keygen, or P-256 in PEM.")
@click.option("--passphrase", is_flag=True, help="A passphrase, asked for on the terminal.")
@click.option(
    "--slot",
    type=click.Choice(list(_SLOTS), case_sensitive=False),
    default="9d",
    metavar="SLOT",
    help="Of a PIV card.  [default: 9d]",
)
@click.option(
    "--attestation-ca",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="The vendor's root certificate, in PEM: the key must have been made in one of its devices.",
)
@click.option("--group", "groups", multiple=True, metavar="GROUP", help="For [unlock] require; repeatable.")
@click.pass_obj
def add(
    app: App,
    name: str,
    piv: str | None,
    openpgp: str | None,
    pkcs11: str | None,
    key_file: str | None,
    passphrase: bool,
    slot: str,
    attestation_ca: str | None,
    groups: tuple[str, ...],
) -> None:
    """Read the public key of NAME's device, and print the configuration lines for it.

    The lines go to stdout; put them into the configuration of each host that NAME may unlock, then
    `unsealctl reload` there. Needs neither a host nor a PIN.
    """
    from unsealerd.cli import candidate

    chosen = [way is not None for way in (piv, openpgp, pkcs11, key_file)] + [passphrase]
    if sum(chosen) != 1:
        raise BadRequest("exactly one of --piv, --openpgp, --pkcs11, --key-file and --passphrase")
    if piv is None and (attestation_ca is not None or slot != "9d"):
        raise BadRequest("--slot and --attestation-ca are for --piv")
    if piv is not None:
        found = candidate.of_piv(piv or None, _SLOTS[slot.lower()], attestation_ca)
    elif openpgp is not None:
        found = candidate.of_openpgp(openpgp)
    elif pkcs11 is not None:
        found = candidate.of_token(pkcs11)
    elif key_file is not None:
        found = candidate.of_file(key_file)
    else:
        found = candidate.of_passphrase()
    _print_candidate(app, name, groups, found)


def _print_candidate(app: App, name: str, groups: tuple[str, ...], found: "Candidate") -> None:
    from unsealerd.cli.candidate import configuration

    lines = configuration(name, groups, found)
    if app.json:
        facts = {"name": name, "recipient": found.recipient, "groups": list(groups)}
        print_json({**facts, **found.facts(), "configuration": lines})
        return
    for label, text in found.rows():
        note(f"  {label:<12} {printable(text)}")
    for line in lines.splitlines():
        print_line(line)


@operator.command("list")
@click.pass_obj
def list_operators(app: App) -> None:
    """List the operators of this host, and when each was last proven to open its backup."""
    from unsealerd.cli.values import worded

    config = app.config()
    with app.admin() as admin:
        status = required(admin.call("io.unsealerd.Admin.Status"), "status", dict)
    proven = {
        required(item, "name", str): optional(item, "proven", int) for item in objects(status, "operators")
    }
    listed = [
        {
            "name": each.name,
            "recipient": each.recipient,
            "groups": list(each.groups),
            "passphrase": each.passphrase is not None,
            "in_use": each.name in proven,
            "proven": proven.get(each.name),
        }
        for each in config.operators
    ]
    if app.json:
        print_json(
            {
                "operators": listed,
                "threshold": config.unlock.threshold,
                "require": list(config.unlock.require),
            }
        )
        return
    if not listed:
        print_line("no operators; `unsealctl operator add NAME …` prints the lines for the configuration")
        return
    rows = []
    for each, facts in zip(config.operators, listed, strict=True):
        when = worded("created", facts["proven"]) if facts["proven"] is not None else _NEVER
        if not facts["in_use"]:
            when = "not in use: unsealctl reload"
        rows.append((each.name, ", ".join(each.groups) or "-", when, each.recipient))
    print_table(rows, ("NAME", "GROUPS", "PROVEN", "RECIPIENT"))
    unlock = config.unlock
    print_line(
        f"{unlock.threshold} of {len(listed)} needed"
        + (f", among them: {', '.join(unlock.require)}" if unlock.require else "")
    )
