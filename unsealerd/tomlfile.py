"""A TOML file, read strictly into values: what is unknown, missing or of another type is `ConfigInvalid` with its place."""

import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from unsealerd.errors import ConfigInvalid

MAX_FILE_BYTES = 4 << 20

_AT = re.compile(r"(.*) - at `(?:key in )?\$\.?([^`]*)`", re.DOTALL)

T = TypeVar("T")


def load(path: Path, parse: Callable[[bytes], T]) -> T:
    """What ``parse`` makes of the file; its name is in each error. Raises `ConfigInvalid`."""
    try:
        with path.open("rb") as file:
            # The size first: read(limit) would allocate the limit, and the malloc of the daemon fills what it allocates.
            if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise ConfigInvalid(f"{path}: larger than {MAX_FILE_BYTES} bytes")
            data = file.read()
    except OSError as err:
        raise ConfigInvalid(f"{path}: {err.strerror}") from err
    try:
        return parse(data)
    except ConfigInvalid as err:
        raise ConfigInvalid(f"{path}: {err.detail}") from err


def tables(data: bytes) -> dict[str, object]:
    """The text as TOML. Raises `ConfigInvalid`."""
    try:
        return tomllib.loads(data.decode())
        # tomllib recurses for each level of nesting, and gives RecursionError on hostile depth.
    except (ValueError, RecursionError) as err:
        raise ConfigInvalid(f"not TOML: {err}") from err


def convert(place: str, value: object, kind: type[T]) -> T:
    """The value as a structure. ``place``: where it stands in the file. Raises `ConfigInvalid`."""
    try:
        return msgspec.convert(value, kind, strict=True, dec_hook=_path)
    except msgspec.ValidationError as err:
        raise ConfigInvalid(_with_place(place, str(err))) from err


def check_absolute(name: str, path: Path) -> None:
    """Raises `ConfigInvalid`."""
    if not path.is_absolute():
        raise ConfigInvalid(f"{name}: {path} is not an absolute path")


def _path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str) and value and "\0" not in value:
        return Path(value)
    raise ValueError(f"expected a path, got {value!r}")


def _with_place(place: str, message: str) -> str:
    """The library says what is wrong and then where in the value it was given; here the place comes first, and is whole."""
    what, inner = message, ""
    if match := _AT.fullmatch(message):
        what, inner = match[1], match[2]
    where = ".".join(part for part in (place, inner) if part)
    return f"{where}: {what}" if where else what
