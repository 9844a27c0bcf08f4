"""``watch_program.py CONFIG DIRECTORY``: unsealerd-watch with the places of a machine in a directory."""

import logging
import sys
from pathlib import Path

from unsealerd.watch.main import serve
from unsealerd.watch.places import Places

if __name__ == "__main__":
    base = Path(sys.argv[2])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    raise SystemExit(
        serve(Path(sys.argv[1]), Places(base / "console", base / "issue", base / "motd", base / "memory"))
    )
