"""Plays all scenarios in a virtual machine, and prints the table. Exit code: 0 if all of them held."""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from vm import qemu
from vm.errors import Broken, GuestSilent, NotHere, NotInMirror, RigError
from vm.images import CHECKOUT, image
from vm.progress import progress
from vm.scenarios import all_scenarios
from vm.server import Server
from vm.table import Outcome, Row, Scenario, Table, document

RELEASES = ("bookworm", "trixie")
_DOCUMENT = CHECKOUT / "docs" / "reboots.md"
_PREFACE = """# Reboots that were played

Made by `./scripts/test-vm --write-docs`, in a virtual machine with a software TPM: real kernels, real boots, real
power cuts. The processor is emulated, so that times are ten to thirty times those of a real server.
"""


def main() -> int:
    arguments = _parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    releases = RELEASES if arguments.release == "all" else (arguments.release,)
    logs = Path(tempfile.mkdtemp(prefix="unsealerd-vm-"))
    try:
        tables = [_table(release, arguments, logs / release) for release in releases]
    except RigError as err:
        print(f"test-vm: {err}\nhint: the logs are in {logs}", file=sys.stderr)
        return 1
    print("\n".join(table.markdown() for table in tables))
    played = [table for table in tables if table.rows]
    if not played or not all(table.holds for table in played):
        print(f"test-vm: not everything held\nhint: the logs are in {logs}", file=sys.stderr)
        return 1
    shutil.rmtree(logs)
    if arguments.write_docs:
        _DOCUMENT.write_text(document(_PREFACE, _DOCUMENT.read_text() if _DOCUMENT.exists() else "", tables))
        progress(f"wrote {_DOCUMENT}")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="test-vm", description=__doc__)
    parser.add_argument("--release", choices=(*RELEASES, "all"), default="bookworm")
    parser.add_argument(
        "--only",
        metavar="TEXT",
        action="append",
        help="of the scenarios, those whose title has TEXT; the first in any case; can be given again",
    )
    parser.add_argument(
        "--cuts",
        type=int,
        default=4,
        help="power cuts, each with a boot, in each of the two loops (default 4)",
    )
    parser.add_argument("--package", type=Path, metavar="DEB", help="test this package, and do not build one")
    parser.add_argument(
        "--write-docs", action="store_true", help="write the table to docs/reboots.md if all held"
    )
    return parser.parse_args()


def _table(release: str, arguments: argparse.Namespace, logs: Path) -> Table:
    """With `--release all` a mirror may lack one of the releases; the one that is named must be there."""
    try:
        return _play(release, arguments, logs)
    except NotInMirror as err:
        if arguments.release != "all":
            raise
        progress(f"{release}: not run: {err}")
        return Table(release, f"Not run: {err}.", [])


def _play(release: str, arguments: argparse.Namespace, logs: Path) -> Table:
    progress(f"{release}: making the package and the image")
    made = image(release, arguments.package)
    logs.mkdir()
    scenarios = all_scenarios(arguments.cuts)
    if arguments.only:
        scenarios = [
            scenarios[0],
            *(one for one in scenarios[1:] if any(text in one.done for text in arguments.only)),
        ]
    started = time.monotonic()
    server = Server(logs, made)
    try:
        rows = _rows(server, scenarios)
        systems = _systems(server)
    finally:
        server.machine.cut()
        for disk in logs.glob("m/**/*"):
            if disk.name in ("root", "state", "overlay", "writes", "before") and disk.is_file():
                disk.unlink()
    minutes = (time.monotonic() - started) / 60
    progress(f"{release}: {server.machine.boots} boots in {minutes:.1f} minutes")
    return Table(
        release,
        f"{systems} {server.machine.boots} boots in {minutes:.0f} minutes on {os.cpu_count()} cores.",
        rows,
    )


def _rows(server: Server, scenarios: list[Scenario]) -> list[Row]:
    rows: list[Row] = []
    for scenario in scenarios:
        if rows and rows[0].outcome is Outcome.BROKEN:
            rows.append(Row(scenario, "not reached", 0, Outcome.NOT_REACHED))
            continue
        started = time.monotonic()
        try:
            if rows:
                server.ready()
            started = time.monotonic()
            row = Row(scenario, scenario.play(server), time.monotonic() - started, Outcome.HELD)
        except NotHere as err:
            row = Row(scenario, str(err), time.monotonic() - started, Outcome.NOT_HERE)
        except (Broken, RigError) as err:
            row = Row(scenario, str(err), time.monotonic() - started, Outcome.BROKEN)
            _keep_journal(server, len(rows))
            if isinstance(err, GuestSilent):
                server.machine.cut()  # the next one starts it anew
        rows.append(row)
        progress(
            f"{server.release}: {row.outcome.value.strip('*'):10} {row.seconds:4.0f} s  {scenario.done}: {row.seen}"
        )
    return rows


def _keep_journal(server: Server, number: int) -> None:
    try:
        journal = server.run(
            "journalctl --no-pager -o short-monotonic -n 2000; systemctl list-jobs; unsealctl status",
            ok=False,
        )
    except RigError:
        journal = server.machine.console()
    (server.directory / f"journal-{number}.txt").write_text(journal)


def _systems(server: Server) -> str:
    try:
        server.ready()
        kernel = server.run("uname -r").strip()
        manager = server.run("systemctl --version | head -n 1").strip()
    except (Broken, RigError):
        kernel, manager = "kernel unknown", "systemd unknown"
    return f"Linux {kernel}, {manager}, QEMU {qemu.version()} without hardware acceleration."


if __name__ == "__main__":
    raise SystemExit(main())
