"""unsealerd-watch [--config FILE]: tells people and services what happens to the keys.

Exit codes: 0 stopped by SIGTERM or SIGINT; 2 wrong usage; 78 the configuration is wrong (sysexits.h).
"""

import argparse
import logging
import queue
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from unsealerd import __version__, config
from unsealerd.errors import ConfigInvalid
from unsealerd.watch.feed import Feed, Wake
from unsealerd.watch.places import Places
from unsealerd.watch.settings import Settings
from unsealerd.watch.watcher import Watcher

EX_USAGE = 2
EX_CONFIG = 78


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="unsealerd-watch", description="Tells people and services what happens to the keys."
    )
    parser.add_argument("--config", type=Path, default=config.DEFAULT_PATH, metavar="FILE")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return serve(options.config, Places())
    except ConfigInvalid as err:
        print(f"unsealerd-watch: {err.name}: {err.detail}", file=sys.stderr)
        print("hint: correct the file, or name another one with --config", file=sys.stderr)
        return EX_CONFIG


def serve(path: Path, places: Places) -> int:
    """Until SIGTERM or SIGINT. Raises `ConfigInvalid`."""
    settings = Settings(path)
    wakes: queue.SimpleQueue[Wake] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        # SimpleQueue.put may be called while another put is under way: library reference, queue.
        signal.signal(number, lambda *_: wakes.put(None))
    admin = settings.current().daemon.runtime_dir / "admin"
    watcher = Watcher(settings, places, admin, time.time, time.monotonic)
    Feed(admin, wakes, time.sleep).start()
    watcher.run(wakes)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
