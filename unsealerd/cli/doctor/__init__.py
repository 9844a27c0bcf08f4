"""``unsealctl doctor``: checks a server before it is relied on. docs/monitoring.md explains each line."""

from collections.abc import Iterator

import click

from unsealerd.cli.app import App
from unsealerd.cli.command import Command
from unsealerd.cli.doctor.finding import Finding, Verdict, refused
from unsealerd.cli.doctor.machine import Machine
from unsealerd.cli.doctor.subject import Answers, Subject
from unsealerd.cli.edge import Exit
from unsealerd.cli.output import print_json, print_line
from unsealerd.errors import AccessDenied, ConfigInvalid, UnsealerdError


@click.command(cls=Command)
@click.pass_obj
def doctor(app: App) -> int:
    """Check this server before it is relied on.

    One line for each check: ok, warn or fail, and what to do. The exit code is 0 when nothing failed, warnings
    or not, and 20 otherwise. Nothing is changed.
    """
    findings = examine(app, Machine())
    failed = any(finding.verdict is Verdict.FAIL for finding in findings)
    if app.json:
        print_json(_facts(findings, failed=failed))
    else:
        _print(findings)
    return Exit.UNFIT if failed else Exit.OK


def examine(app: App, machine: Machine) -> list[Finding]:
    """All checks. Raises `AccessDenied` for who is not root: half of them would then be wrong."""
    from unsealerd.config import DEFAULT_PATH

    path = app.config_path or DEFAULT_PATH
    try:
        config = app.config()
    except ConfigInvalid as err:
        return [refused("configuration", err)]
    from unsealerd.cli.doctor.subject import history_of

    return list(_checks(Subject(config, path, machine, _ask(app), history_of(config.daemon.state_dir))))


def _ask(app: App) -> Answers | UnsealerdError:
    from unsealerd.cli.doctor.subject import ask

    try:
        with app.admin() as admin:
            return ask(admin)
    except AccessDenied:
        raise
    except UnsealerdError as err:
        return err


def _checks(subject: Subject) -> Iterator[Finding]:
    from unsealerd.cli.doctor import (
        auditlog,
        clock,
        files,
        gateway,
        keyring,
        keys,
        memory,
        reboot,
        tpm,
        units,
    )

    for part in (keys, keyring, auditlog, tpm, memory, clock, files, units, gateway, reboot):
        yield from part.check(subject)


def _facts(findings: list[Finding], *, failed: bool) -> dict[str, object]:
    return {
        "healthy": not failed,
        "findings": [
            {
                "check": finding.check,
                "verdict": finding.verdict.value,
                "text": finding.text,
                "hint": finding.hint or None,
            }
            for finding in findings
        ],
    }


def _print(findings: list[Finding]) -> None:
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        print_line(f"{finding.verdict.value:<4}  {finding.check:<{width}}  {finding.text}")
        if finding.hint:
            print_line(f"{'':<4}  {'':<{width}}  hint: {finding.hint}")
    counts = {verdict: sum(finding.verdict is verdict for finding in findings) for verdict in Verdict}
    print_line(", ".join(f"{count} {verdict.value}" for verdict, count in counts.items()))
