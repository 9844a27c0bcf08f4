"""The configuration: one TOML file, read strictly into values.

Every name in it is a contract. What is unknown, missing or out of range is `ConfigInvalid` with the place
and the reason; nothing is guessed.
"""

import re
import tomllib
from pathlib import Path
from typing import Annotated

import msgspec

from unsealerd.errors import ConfigInvalid
from unsealerd.model import Operation, SealKind

DEFAULT_PATH = Path("/etc/unsealerd/unsealerd.toml")

MAX_KEYS = 4096
MAX_OPERATORS = 32
MAX_FILE_BYTES = 4 << 20
MIN_KEY_BYTES = 16  # below the 128-bit security level
MAX_KEY_BYTES = 1024
MAX_EXTRA_RESETS = 3
PCR_COUNT = 24

_KEY_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_OPERATOR_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_UNIT_NAME = re.compile(r"[A-Za-z0-9:_.\\@-]{1,255}\.(service|scope|socket|mount|swap)")
_DURATION = re.compile(r"([1-9][0-9]{0,8})(s|m|h|d|w)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


class Daemon(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    state_dir: Path = Path("/var/lib/unsealerd")
    runtime_dir: Path = Path("/run/unsealerd")


class TpmTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tcti: str | None = "device:/dev/tpmrm0"
    """None for a host without a TPM, written "none"."""
    pcrs: tuple[int, ...] = (7,)


class Seal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    on: tuple[SealKind, ...] = (SealKind.REBOOT,)
    extra_resets: Annotated[int, msgspec.Meta(ge=0, le=MAX_EXTRA_RESETS)] = 0


class Gateway(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    listen: tuple[str, ...] = ("[::]:8750",)


class Unlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    threshold: Annotated[int, msgspec.Meta(ge=1)] = 1


class Operator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    recipient: str


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who (exactly one of unit, user, group) may do what."""

    operations: tuple[Operation, ...]
    unit: str | None = None
    user: str | None = None
    group: str | None = None


class KeyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    owner: str
    purpose: str
    size: Annotated[int, msgspec.Meta(ge=MIN_KEY_BYTES, le=MAX_KEY_BYTES)] = 32
    rotate_every: int | None = None
    """Seconds; None: only when asked."""
    overlap: int = 0
    """Seconds for which the version before the primary still verifies."""
    allow: tuple[Rule, ...] = ()


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    daemon: Daemon = Daemon()
    tpm: TpmTable = TpmTable()
    seal: Seal = Seal()
    gateway: Gateway = Gateway()
    unlock: Unlock = Unlock()
    operators: tuple[Operator, ...] = msgspec.field(default=(), name="operator")
    keys: dict[str, KeyConfig] = msgspec.field(default_factory=dict, name="key")


def parse_duration(text: str) -> int:
    """Seconds of ``90s``, ``15m``, ``12h``, ``30d`` or ``2w``. Raises ``ValueError``."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration such as 90s, 15m, 12h, 30d or 2w")
    return int(match[1]) * _SECONDS[match[2]]


def load(path: Path) -> Config:
    """Read and check the file. Raises `ConfigInvalid`."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as err:
        raise ConfigInvalid(f"{path}: {err.strerror}") from err
    if len(data) > MAX_FILE_BYTES:
        raise ConfigInvalid(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    try:
        return parse(data)
    except ConfigInvalid as err:
        raise ConfigInvalid(f"{path}: {err.detail}") from err


def parse(data: bytes) -> Config:
    """Check the text of a configuration. Raises `ConfigInvalid`."""
    try:
        tables = tomllib.loads(data.decode())
        # tomllib recurses for each level of nesting, and gives RecursionError on hostile depth.
    except (ValueError, RecursionError) as err:
        raise ConfigInvalid(f"not TOML: {err}") from err
    try:
        config = msgspec.convert(_with_seconds(tables), Config, strict=True, dec_hook=_path)
    except msgspec.ValidationError as err:
        raise ConfigInvalid(str(err)) from err
    _check_tpm(config.tpm)
    _check_operators(config)
    _check_keys(config.keys)
    _check_listen(config.gateway)
    for name, place in (("state_dir", config.daemon.state_dir), ("runtime_dir", config.daemon.runtime_dir)):
        if not place.is_absolute():
            raise ConfigInvalid(f"daemon.{name}: {place} is not an absolute path")
    return config


def _path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str) and value and "\0" not in value:
        return Path(value)
    raise msgspec.ValidationError(f"expected a path, got {value!r}")


def _with_seconds(tables: dict[str, object]) -> dict[str, object]:
    """The tables with durations as seconds and the TCTI "none" as None."""
    result = dict(tables)
    tpm = tables.get("tpm")
    if isinstance(tpm, dict) and tpm.get("tcti") == "none":
        result["tpm"] = {**tpm, "tcti": None}
    keys = tables.get("key")
    if isinstance(keys, dict):
        result["key"] = {name: _key_with_seconds(name, table) for name, table in keys.items()}
    return result


def _key_with_seconds(name: str, table: object) -> object:
    if not isinstance(table, dict):
        return table
    result = dict(table)
    for field in ("rotate_every", "overlap"):
        if field in result:
            value = result[field]
            if not isinstance(value, str):
                raise ConfigInvalid(f'key.{name}.{field}: a duration is text, such as "30d"')
            try:
                result[field] = parse_duration(value)
            except ValueError as err:
                raise ConfigInvalid(f"key.{name}.{field}: {err}") from err
    return result


def _check_tpm(tpm: TpmTable) -> None:
    if tpm.tcti is not None and not tpm.tcti.startswith(("device:", "swtpm:")):
        raise ConfigInvalid(f'tpm.tcti: {tpm.tcti!r} is none of "device:PATH", "swtpm:path=PATH", "none"')
    if not tpm.pcrs:
        raise ConfigInvalid("tpm.pcrs: empty; a sealed copy that is bound to no PCR opens for any boot")
    if len(set(tpm.pcrs)) != len(tpm.pcrs) or not all(0 <= pcr < PCR_COUNT for pcr in tpm.pcrs):
        raise ConfigInvalid(f"tpm.pcrs: {list(tpm.pcrs)} are not different numbers from 0 to {PCR_COUNT - 1}")


def _check_operators(config: Config) -> None:
    operators = config.operators
    if len(operators) > MAX_OPERATORS:
        raise ConfigInvalid(f"operator: more than {MAX_OPERATORS}")
    for operator in operators:
        if not _OPERATOR_NAME.fullmatch(operator.name):
            raise ConfigInvalid(f"operator: {operator.name!r} is not a name")
        if not operator.recipient.lower().startswith("age1"):
            raise ConfigInvalid(f'operator {operator.name}: the recipient is not "age1…" or "age1tag1…"')
    if len({operator.name for operator in operators}) != len(operators):
        raise ConfigInvalid("operator: two have the same name")
    if len({operator.recipient.lower() for operator in operators}) != len(operators):
        raise ConfigInvalid("operator: two have the same recipient")
    if config.unlock.threshold > 1:
        # Splitting the file key is not built; a threshold that is not kept would be a false promise.
        raise ConfigInvalid("unlock.threshold: this version supports 1 only")


def _check_keys(keys: dict[str, KeyConfig]) -> None:
    if len(keys) > MAX_KEYS:
        raise ConfigInvalid(f"key: more than {MAX_KEYS}")
    for name, key in keys.items():
        if not _KEY_NAME.fullmatch(name):
            raise ConfigInvalid(f"key {name!r}: a name is a-z, 0-9, '.', '_' and '-', 64 at most")
        for field, value in (("owner", key.owner), ("purpose", key.purpose)):
            if not value.strip() or len(value) > 200 or not value.isprintable():
                raise ConfigInvalid(f"key.{name}.{field}: required, printable, 200 characters at most")
        if key.rotate_every is not None and key.overlap > key.rotate_every:
            raise ConfigInvalid(f"key.{name}.overlap: longer than rotate_every")
        for rule in key.allow:
            _check_rule(name, rule)


def _check_rule(name: str, rule: Rule) -> None:
    subjects = [subject for subject in (rule.unit, rule.user, rule.group) if subject is not None]
    if len(subjects) != 1 or not subjects[0]:
        raise ConfigInvalid(f"key.{name}.allow: exactly one of unit, user and group")
    if rule.unit is not None and not _UNIT_NAME.fullmatch(rule.unit):
        raise ConfigInvalid(f"key.{name}.allow: {rule.unit!r} is not a unit name such as web.service")
    if not rule.operations or len(set(rule.operations)) != len(rule.operations):
        raise ConfigInvalid(f"key.{name}.allow: operations are one or more of read, sign, verify")


def _check_listen(gateway: Gateway) -> None:
    for address in gateway.listen:
        host, separator, port = address.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not (separator and bare and port.isascii() and port.isdigit() and int(port) < 65536) or (
            ":" in bare and bare == host
        ):
            raise ConfigInvalid(f'gateway.listen: {address!r} is not "HOST:PORT" or "[IPV6]:PORT"')
