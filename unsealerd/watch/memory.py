"""What was told and done already, over a restart of the watcher: ``state.json`` in its runtime directory.

It is gone with the boot, as it must be: what a boot before was told is no news of this one.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from unsealerd.errors import BadMessage, UnsealerdError
from unsealerd.watch.textfile import PRIVATE, replace

STATE_FILE = "state.json"
_MAX_BYTES = 4 << 20

_log = logging.getLogger("unsealerd-watch")


@dataclass(frozen=True, slots=True)
class Memory:
    told: tuple[str, str | None] | None = None
    """The state and the reason that people were last told; None before the first time."""
    keys: Mapping[str, str] | None = None
    """What was last seen of each key; None before the first time."""


def recall(directory: Path) -> Memory:
    """What is remembered; nothing, if that is not readable: then it may be told twice, which is better than never."""
    try:
        with (directory / STATE_FILE).open("rb") as file:
            return _decode(file.read(_MAX_BYTES))
    except FileNotFoundError:
        return Memory()
    except (OSError, BadMessage) as err:
        _log.warning("memory=%s error=%s", directory / STATE_FILE, err)
        return Memory()


def remember(directory: Path, memory: Memory) -> None:
    """A failure is logged: it costs no more than telling it twice."""
    text = json.dumps({"told": memory.told, "keys": memory.keys}) + "\n"
    try:
        replace(directory / STATE_FILE, text, PRIVATE)
    except UnsealerdError as err:
        _log.warning("memory error=%s detail=%s", err.name, err.detail)


def _decode(data: bytes) -> Memory:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as err:
        raise BadMessage("not JSON") from err
    match value:
        case {"told": list() | None as told, "keys": dict() | None as keys} if keys is None or all(
            isinstance(seen, str) for seen in keys.values()
        ):
            match told:
                case None:
                    return Memory(None, keys)
                case [str(state), str() | None as reason]:
                    return Memory((state, reason), keys)
    raise BadMessage("not what the watcher writes")
