"""move_gateway.py UNSEALERD_TOML GATEWAY_TOML: what the gateway of an earlier version read of the one goes to its own file.

Run by postinst at an upgrade, with the distribution's Python alone. Afterwards both files together say what the one said before;
or nothing is changed, and the exit code is 1.
"""

import json
import os
import re
import stat
import sys
import tempfile
import tomllib
from pathlib import Path

MODE = 0o644
_HEADER = re.compile(r"""\s*\[\s*(gateway|"gateway"|'gateway')\s*\]\s*(#.*)?""")
_NEXT = re.compile(r"\s*\[")
_SHARED = ("state_dir", "runtime_dir")


def main(config: Path, gateway: Path) -> int:
    try:
        return move(config.resolve(), gateway.resolve())
    except (OSError, ValueError) as err:
        print(
            f"unsealerd: the settings of [gateway] in {config} could not be moved: {err}\n"
            f"hint: write them to {gateway}, without the line [gateway]; remove them from {config}; then: dpkg --configure -a",
            file=sys.stderr,
        )
        return 1


def move(config: Path, gateway: Path) -> int:
    """Raises ``OSError``, ``ValueError``."""
    text = read(config)
    try:
        before = tomllib.loads(text)
    except ValueError:
        return 0  # the daemon says where the mistake is, and ran on with what it read before
    there = read(gateway) if gateway.exists() else ""
    stated = tomllib.loads(there)
    rest, moved = divide(text) if "gateway" in before else (text, "")
    settings = before.pop("gateway", {})
    if tomllib.loads(rest) != before or tomllib.loads(moved) != settings:
        raise ValueError("it is not an ordinary table")
    added = "" if "listen" in stated else moved
    daemon = before.get("daemon")
    for name in _SHARED:
        value = daemon.get(name) if isinstance(daemon, dict) else None
        if isinstance(value, str) and name not in stated:
            added += f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
    if tomllib.loads(added):
        replace(gateway, f"{there}\n{added}" if there else added)
        print(f"unsealerd: added to {gateway}, from {config}: {', '.join(tomllib.loads(added))}")
    if rest != text:
        replace(config, rest)
        print(f"unsealerd: removed [gateway] from {config}; the gateway reads {gateway}")
    return 0


def divide(text: str) -> tuple[str, str]:
    """The text without the table, and the lines of the table without its header.

    Comments after the last setting, or after the first empty line if there is no setting, belong to what follows.
    """
    lines = text.splitlines(keepends=True)
    headers = [number for number, line in enumerate(lines) if _HEADER.fullmatch(line.rstrip("\r\n"))]
    if len(headers) != 1:
        raise ValueError("it is not one table")
    start = headers[0] + 1
    end = next((n for n in range(start, len(lines)) if _NEXT.match(lines[n])), len(lines))
    stated = [n for n in range(start, end) if lines[n].strip() and not lines[n].lstrip().startswith("#")]
    first_empty = next((n for n in range(start, end) if not lines[n].strip()), end)
    end = stated[-1] + 1 if stated else first_empty
    moved = "".join(lines[start:end])
    return "".join(lines[: start - 1] + lines[end:]), moved if moved.endswith(
        "\n"
    ) or not moved else f"{moved}\n"


def read(path: Path) -> str:
    with path.open(encoding="utf-8", newline="") as file:
        return file.read()


def replace(path: Path, text: str) -> None:
    """Whole or not at all, with the owner and mode that it had. Raises ``OSError``."""
    found = path.stat() if path.exists() else None
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            if found is not None:
                os.fchown(descriptor, found.st_uid, found.st_gid)
            os.fchmod(descriptor, MODE if found is None else stat.S_IMODE(found.st_mode))
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


if __name__ == "__main__":
    raise SystemExit(main(*map(Path, sys.argv[1:])))
