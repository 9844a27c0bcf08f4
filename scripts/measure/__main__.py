"""What `scripts/bench` measures: ratios of medians, against a peer whose turns alternate with ours in the same run.

Everything runs on one core: between two cores a loop of two processes measures the scheduler. Nothing is asserted.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict

from measure.figure import Figure
from measure.floor import serve_floor
from measure.growth import growing
from measure.signing import serve_grpc, signing
from measure.starting import starting
from measure.unlocking import unlocking


def show(figures: Sequence[Figure], facts: dict[str, object]) -> None:
    rows: list[tuple[str, ...]] = [("what", "against", "reach", "seen", "ours", "peer")]
    for each in figures:
        seen = "" if each.ratio is None else f"{each.ratio:.2f}"
        rows.append((each.what, each.against, each.reach, seen, each.ours, each.theirs))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, tuple("-" * width for width in widths))
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\nRatios of medians; absolute times are not to be compared between runs. " + json.dumps(facts))
    print("The gRPC peer is driven by its own client; the CPU lines are the servers alone.")
    print(
        "Sessions: `live client` is the one of unsealctl; many at once are by a lean one, as tangd's are. The daemon takes two\n"
        "answers a second of a peer, and no row meets that bound: a drill comes from an address that was never there.\n"
        "A floor is a part alone: what must be on disk; or gRPC in Python with the same TLS, and nothing behind it."
    )


def main(arguments: Sequence[str]) -> int:
    match arguments:
        case ["--serve-grpc", path]:
            serve_grpc(path)
            return 0
        case ["--serve-floor", path]:
            serve_floor(path)
            return 0
        case [] | ["--json"]:
            pass
        case _:
            print("usage: scripts/bench [--json]", file=sys.stderr)
            return 2
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    began = time.monotonic()
    figures: list[Figure] = []
    for part in (starting, signing, unlocking, growing):
        with ExitStack() as stack:
            for each in part(stack):
                figures.append(each)
                if not arguments:
                    print(f"\r\033[K{each.what}", end="", file=sys.stderr, flush=True)
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "core": core,
        "seconds": round(time.monotonic() - began, 1),
    }
    if arguments:
        print(json.dumps({"facts": facts, "figures": [asdict(each) for each in figures]}, indent=2))
    else:
        print(file=sys.stderr)
        show(figures, facts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
