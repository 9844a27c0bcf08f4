"""``unsealctl key``: the keys of this host and their versions. Never their bytes."""

import time

import click

from unsealerd.cli.app import App
from unsealerd.cli.command import Group
from unsealerd.cli.fields import objects, optional, required, texts
from unsealerd.cli.output import print_json, print_line, print_table
from unsealerd.cli.times import moment, since, span
from unsealerd.errors import BadRequest

_ADMIN = "io.unsealerd.Admin"


@click.group(cls=Group)
def key() -> None:
    """List, show, rotate and revoke keys."""


@key.command("list")
@click.pass_obj
def list_keys(app: App) -> None:
    """List the keys."""
    with app.admin() as admin:
        answer = admin.call(f"{_ADMIN}.ListKeys")
    keys = objects(answer, "keys")
    if app.json:
        print_json({"keys": keys})
        return
    if not keys:
        print_line("no keys; declare one as [key.NAME] in the configuration")
        return
    print_table(
        [_row(item) for item in keys], ("NAME", "PRIMARY", "VERSIONS", "NEXT ROTATION", "OWNER", "PURPOSE")
    )


@key.command("show")
@click.argument("name")
@click.pass_obj
def show(app: App, name: str) -> None:
    """Show one key, its versions and who may use it."""
    with app.admin() as admin:
        answer = admin.call(f"{_ADMIN}.ShowKey", {"name": name})
    _print_key(app, required(answer, "key", dict))


@key.command("rotate")
@click.argument("name")
@click.pass_obj
def rotate(app: App, name: str) -> None:
    """Make a new primary version; the old one verifies for the key's overlap."""
    with app.admin() as admin:
        answer = admin.call(f"{_ADMIN}.RotateKey", {"name": name})
    _print_key(app, required(answer, "key", dict))


@key.command("revoke")
@click.argument("name")
@click.option("--version", type=click.IntRange(min=1), metavar="N", help="Only this version.  [default: all]")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def revoke(app: App, name: str, version: int | None, yes: bool) -> None:
    """Destroy the bytes of a key: in memory, in the backups and in a sealed copy."""
    from unsealerd.cli import terminal

    if not yes and terminal.attended():
        what = f"version {version} of {name}" if version is not None else f"every version of {name}"
        if not terminal.confirm(
            f"Destroy {what}? What it signed will not verify any more, and no copy is kept."
        ):
            raise BadRequest("not confirmed; nothing was destroyed")
    parameters: dict[str, object] = {"name": name}
    if version is not None:
        parameters["version"] = version
    with app.admin() as admin:
        answer = admin.call(f"{_ADMIN}.RevokeKey", parameters)
    _print_key(app, required(answer, "key", dict))


def _row(item: dict[str, object]) -> tuple[str, ...]:
    versions = objects(item, "versions")
    primary = next((required(v, "version", int) for v in versions if v.get("state") == "primary"), None)
    verifying = sum(1 for v in versions if v.get("state") in ("primary", "active"))
    rotation = optional(item, "next_rotation", int)
    return (
        required(item, "name", str),
        "-" if primary is None else str(primary),
        f"{verifying} of {len(versions)}",
        "-" if rotation is None else moment(rotation),
        required(item, "owner", str),
        required(item, "purpose", str),
    )


def _print_key(app: App, item: dict[str, object]) -> None:
    if app.json:
        print_json(item)
        return
    now = time.time()
    rows = [
        ("name", required(item, "name", str)),
        ("owner", required(item, "owner", str)),
        ("purpose", required(item, "purpose", str)),
        ("size", f"{required(item, 'size', int)} bytes"),
        (
            "declared",
            "yes" if item.get("declared") is True else "no: its lines are gone from the configuration",
        ),
        ("rotation", _rotation(item, now)),
    ]
    rows += [("allowed", _rule(rule)) for rule in objects(item, "allow")] or [("allowed", "nobody")]
    rows += [(f"version {required(v, 'version', int)}", _version(v, now)) for v in objects(item, "versions")]
    print_table(rows)


def _rotation(item: dict[str, object], now: float) -> str:
    every, overlap = optional(item, "rotate_every", int), optional(item, "overlap", int)
    upcoming = optional(item, "next_rotation", int)
    text = "only when asked" if every is None else f"every {span(every)}"
    if overlap:
        text += f", the version before verifies for {span(overlap)}"
    return text if upcoming is None else f"{text}; next {since(upcoming, now)}"


def _rule(rule: dict[str, object]) -> str:
    who = next((f"{kind} {rule[kind]}" for kind in ("unit", "user", "group") if rule.get(kind)), "?")
    return f"{who}: {', '.join(texts(rule, 'operations'))}"


def _version(version: dict[str, object], now: float) -> str:
    text = f"{required(version, 'state', str)}, made {since(required(version, 'created', int), now)}"
    changed, retires = optional(version, "changed", int), optional(version, "retires", int)
    if changed is not None:
        text += f"; changed {moment(changed)}"
    if retires is not None:
        text += f"; retires {since(retires, now)}"
    return text
