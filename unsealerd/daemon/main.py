"""``unsealerd [--config FILE]``: the daemon's process."""

import gc
import sys

from unsealerd import __version__
from unsealerd.daemon import hygiene

EX_SOFTWARE = 70
EX_CONFIG = 78  # sysexits.h; systemd shows it by name
_USAGE = "usage: unsealerd [--config FILE] | --version"


def main() -> int:
    """Run until SIGTERM. Exit codes: 0 stopped, 2 usage, 70 could not start, 78 configuration."""
    config_path = _parse(sys.argv[1:])
    if config_path is None:
        return 2
    warning = hygiene.ensure_environment()  # may not return; so before everything that takes time to import
    gc.disable()  # a start makes no garbage worth looking for; enabled a moment after it is ready
    # The import system's way to say that a module is not there: asyncio then does without TLS, as in a Python without it.
    sys.modules["ssl"] = None  # type: ignore[assignment]
    from pathlib import Path

    from unsealerd.config import DEFAULT_PATH, load
    from unsealerd.errors import ConfigInvalid, UnsealerdError

    path = Path(config_path) if config_path else DEFAULT_PATH
    try:
        config = load(path)
        warnings = hygiene.harden()
        from unsealerd.daemon.app import serve

        serve(path, config, [*([warning] if warning else []), *warnings])
    except ConfigInvalid as err:
        _complain(err.detail, "correct the file; unsealerd.toml in the documentation is an example")
        return EX_CONFIG
    except UnsealerdError as err:
        _complain(err.detail or err.name, "the journal has more: journalctl -u unsealerd")
        return EX_SOFTWARE
    return 0


def _parse(arguments: list[str]) -> str | None:
    """The path of the configuration, empty for the default; None after a usage message."""
    match arguments:
        case []:
            return ""
        case ["--config", path] if path:
            return path
        case [option] if option.startswith("--config=") and len(option) > len("--config="):
            return option.removeprefix("--config=")
        case ["-h" | "--help"]:
            print(_USAGE)
            raise SystemExit(0)
        case ["--version"]:
            print(f"unsealerd {__version__}")
            raise SystemExit(0)
        case _:
            print(_USAGE, file=sys.stderr)
            return None


def _complain(what: str, hint: str) -> None:
    print(f"unsealerd: {what}\nhint: {hint}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
