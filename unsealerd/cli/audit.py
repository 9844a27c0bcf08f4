"""``unsealctl audit``: the audit log and its chain, read from the files themselves, so that it works without the
daemon.
"""

import sys
import time
from itertools import islice
from typing import TYPE_CHECKING

import click

from unsealerd.cli.app import App
from unsealerd.cli.chainedlog import ChainedLog
from unsealerd.cli.command import Command
from unsealerd.cli.output import print_line

if TYPE_CHECKING:
    from unsealerd.core.auditchain import Record

_POLL_SECONDS = 0.2
_CHAIN_FIELDS = frozenset({"seq", "time", "event", "prev", "hash"})


@click.command(cls=Command)
@click.option("--follow", is_flag=True, help="Keep on printing records as they are written.")
@click.pass_obj
def audit(app: App, follow: bool) -> None:
    """Show the audit log, oldest records first, and check its chain.

    With --json one object; with --json --follow one object for each record, on a line of its own.
    """
    log = ChainedLog(app.config().daemon.state_dir)
    try:
        if app.json and not follow:
            _print_whole(log)
            return
        for line, record in log.records():
            _print_record(app, line, record)
        if follow:
            log.check_kept()
        while follow:
            sys.stdout.flush()
            time.sleep(_POLL_SECONDS)
            for line, record in log.follow():
                _print_record(app, line, record)
        log.check_end()
        log.check_kept()
    finally:
        log.close()
    removed = f"; {_removed(log)}" if log.first > 1 else ""
    print_line(f"chain of {log.count} records verifies{removed}")


def _removed(log: ChainedLog) -> str:
    many = "record 1 is" if log.first == 2 else f"records 1 to {log.first - 1} are"
    return f"{many} no longer kept"


def _print_whole(log: ChainedLog) -> None:
    """In two passes, so that nothing is printed of a broken chain and it need not all be in memory."""
    for _ in log.records():
        pass
    log.check_end()
    log.check_kept()
    first, count, head = log.first, log.count, log.head
    log.rewind()
    sys.stdout.write('{"records":[')
    for number, (line, _) in enumerate(islice(log.records(), count)):
        # The lines are kept as they are: they were verified to be canonical JSON.
        sys.stdout.write(("," if number else "") + line.decode())
    sys.stdout.write(f'],"first":{first},"count":{count},"head":"{head}"}}\n')


def _print_record(app: App, line: bytes, record: "Record") -> None:
    if app.json:
        sys.stdout.write(line.decode() + "\n")
        return
    facts = " ".join(_fact(name, value) for name, value in record.items() if name not in _CHAIN_FIELDS)
    print_line(f"{record['seq']:>6}  {record.get('time')}  {record.get('event')}  {facts}".rstrip())


def _fact(name: str, value: object) -> str:
    if isinstance(value, dict):
        return " ".join(_fact(f"{name}.{key}", item) for key, item in value.items())
    text = str(value)
    return f"{name}={text}" if text and text.isprintable() and " " not in text else f"{name}={text!r}"
