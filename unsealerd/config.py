"""The configuration of the daemon: one TOML file, read strictly into values.

Every name in it is a contract. What is unknown, missing or out of range is `ConfigInvalid` with the place
and the reason; nothing is guessed. It says who may unlock the host, and is not for the gateway, which has a file
of its own (`unsealerd.gateway.settings`).
"""

import re
from pathlib import Path
from typing import Annotated

import msgspec

from unsealerd import tomlfile
from unsealerd.errors import ConfigInvalid
from unsealerd.model import KEY_NAME, Operation, SealKind

DEFAULT_PATH = Path("/etc/unsealerd/unsealerd.toml")

MAX_KEYS = 4096
MAX_OPERATORS = 32
MIN_KEY_BYTES = 16  # below the 128-bit security level
MAX_KEY_BYTES = 1024
MAX_EXTRA_RESETS = 3
MAX_WINDOW = 86400  # seconds for which shares are kept in memory
PCR_COUNT = 24
MIN_AUDIT_BYTES = 1 << 20  # of a file of the audit log: room for many records of the greatest length
MAX_AUDIT_BYTES = 16 << 30
MAX_AUDIT_FILES = 100  # `unsealctl audit` has them all open

MAX_SECONDS = 100 * 365 * 86400  # of a duration: what is added to the time of today is still a date

_KEY_NAME = re.compile(KEY_NAME)
_OPERATOR_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_UNIT_NAME = re.compile(r"[A-Za-z0-9:_.\\@-]{1,255}\.(service|scope|socket|mount|swap)")
_MAX_ACCOUNT = 256  # characters of the name of a user or a group
_TCTI = re.compile(r"(device:|swtpm:path=)/[^,\0]+")
_DURATION = re.compile(r"([1-9][0-9]{0,9})(s|m|h|d|w)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SIZE = re.compile(r"([1-9][0-9]{0,9})([MG])")
_UNIT_BYTES = {"M": 1 << 20, "G": 1 << 30}
_WEBHOOK = re.compile(r"https://[!-~]{1,1000}")


class Daemon(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    state_dir: Path = Path("/var/lib/unsealerd")
    runtime_dir: Path = Path("/run/unsealerd")


class TpmTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tcti: str | None = "device:/dev/tpmrm0"
    """None for a host without a TPM, written "none"."""
    pcrs: tuple[int, ...] = (7,)


class Seal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    on: tuple[SealKind, ...] = (SealKind.REBOOT, SealKind.KEXEC)
    extra_resets: Annotated[int, msgspec.Meta(ge=0, le=MAX_EXTRA_RESETS)] = 0


class Audit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    max_size: int = 64 << 20
    """Bytes of a file of the audit log; the next record begins another."""
    keep: Annotated[int, msgspec.Meta(ge=1, le=MAX_AUDIT_FILES)] = 15
    """Closed files that are kept beside the one that is written to."""


class Unlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    threshold: Annotated[int, msgspec.Meta(ge=1)] = 1
    """How many operators must answer."""
    require: tuple[str, ...] = ()
    """Operators and groups of which one must be among those who answer, for each name."""
    window: int = 1800
    """Seconds from the first answer to the last."""


class Operator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    recipient: str
    groups: tuple[str, ...] = ()
    passphrase: str | None = None
    """``argon2id$...``: how the operator's passphrase becomes the private key (core/passphrase.py)."""


class Notify(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who is told when the host is locked; nobody by default."""

    command: tuple[str, ...] = ()
    """A program with its arguments, run by a user without rights; the facts are in its environment."""
    webhook: str | None = None
    """An https:// address that gets a POST with the facts in JSON."""


class Metrics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    textfile: Path | None = None
    """Where the Prometheus node exporter picks up a file ``*.prom``."""


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
    on_rotate: tuple[str, ...] = ()
    """Units that are reloaded, or else restarted, after a rotation."""
    allow: tuple[Rule, ...] = ()


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    daemon: Daemon = Daemon()
    tpm: TpmTable = TpmTable()
    seal: Seal = Seal()
    audit: Audit = Audit()
    unlock: Unlock = Unlock()
    notify: Notify = Notify()
    metrics: Metrics = Metrics()
    operators: tuple[Operator, ...] = msgspec.field(default=(), name="operator")
    keys: dict[str, KeyConfig] = msgspec.field(default_factory=dict, name="key")


def parse_duration(text: str) -> int:
    """Seconds of ``90s``, ``15m``, ``12h``, ``30d`` or ``2w``. Raises ``ValueError``."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration such as 90s, 15m, 12h, 30d or 2w")
    seconds = int(match[1]) * _SECONDS[match[2]]
    if seconds > MAX_SECONDS:
        raise ValueError(f"{text!r} is longer than 100 years")
    return seconds


def parse_size(text: str) -> int:
    """Bytes of ``64M`` or ``1G``, in powers of 1024. Raises ``ValueError``."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 64M or 1G")
    return int(match[1]) * _UNIT_BYTES[match[2]]


def load(path: Path) -> Config:
    """Read and check the file. Raises `ConfigInvalid`."""
    return tomlfile.load(path, parse)


def parse(data: bytes) -> Config:
    """Check the text of a configuration. Raises `ConfigInvalid`."""
    config = _config(tomlfile.tables(data))
    _check_tpm(config.tpm)
    _check_operators(config)
    _check_keys(config.keys)
    if not MIN_AUDIT_BYTES <= config.audit.max_size <= MAX_AUDIT_BYTES:
        raise ConfigInvalid(f"audit.max_size: from {MIN_AUDIT_BYTES >> 20}M to {MAX_AUDIT_BYTES >> 30}G")
    _check_notify(config.notify)
    tomlfile.check_absolute("daemon.state_dir", config.daemon.state_dir)
    tomlfile.check_absolute("daemon.runtime_dir", config.daemon.runtime_dir)
    if config.metrics.textfile is not None:
        tomlfile.check_absolute("metrics.textfile", config.metrics.textfile)
    return config


def _config(tables: dict[str, object]) -> Config:
    """The values. Tables of which there may be many are read one by one, so that an error names the one."""
    if "gateway" in tables:
        raise ConfigInvalid(
            "gateway: the gateway has a file of its own, gateway.toml beside this one. "
            "What was in [gateway] goes there, without that line"
        )
    rest = dict(tables)
    operators = [
        tomlfile.convert(f"operator[{number}]", table, Operator)
        for number, table in enumerate(_list("operator", rest.pop("operator", [])))
    ]
    keys = {name: _key(name, table) for name, table in _table("key", rest.pop("key", {})).items()}
    unlock = rest.get("unlock")
    if isinstance(unlock, dict) and "window" in unlock:
        rest["unlock"] = {**unlock, "window": _seconds("unlock.window", unlock["window"])}
    audit = rest.get("audit")
    if isinstance(audit, dict) and "max_size" in audit:
        rest["audit"] = {**audit, "max_size": _bytes("audit.max_size", audit["max_size"])}
    tpm = rest.get("tpm")
    if isinstance(tpm, dict) and tpm.get("tcti") == "none":
        rest["tpm"] = {**tpm, "tcti": None}
    config = tomlfile.convert("", rest, Config)
    return msgspec.structs.replace(config, operators=tuple(operators), keys=keys)


def _key(name: str, value: object) -> KeyConfig:
    place = f"key.{_shown(name)}"
    table = dict(_table(place, value))
    rules = [
        tomlfile.convert(f"{place}.allow[{number}]", rule, Rule)
        for number, rule in enumerate(_list(f"{place}.allow", table.pop("allow", [])))
    ]
    for field in ("rotate_every", "overlap"):
        if field in table:
            table[field] = _seconds(f"{place}.{field}", table[field])
    return msgspec.structs.replace(tomlfile.convert(place, table, KeyConfig), allow=tuple(rules))


def _bytes(place: str, value: object) -> int:
    if not isinstance(value, str):
        raise ConfigInvalid(f'{place}: a size is text, such as "64M"')
    try:
        return parse_size(value)
    except ValueError as err:
        raise ConfigInvalid(f"{place}: {err}") from err


def _seconds(place: str, value: object) -> int:
    if not isinstance(value, str):
        raise ConfigInvalid(f'{place}: a duration is text, such as "30d"')
    try:
        return parse_duration(value)
    except ValueError as err:
        raise ConfigInvalid(f"{place}: {err}") from err


def _table(place: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ConfigInvalid(f"{place}: expected a table [{place}…]")
    return value


def _list(place: str, value: object) -> list[object]:
    if not isinstance(value, list):
        raise ConfigInvalid(f"{place}: expected tables [[{place}]]")
    return value


def _shown(name: str) -> str:
    """The name of a key in a message: one that is not a name is quoted, and cut."""
    return name if _KEY_NAME.fullmatch(name) else repr(name[:64])


def _check_tpm(tpm: TpmTable) -> None:
    if tpm.tcti is not None and not _TCTI.fullmatch(tpm.tcti):
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
    if len({operator.name.lower() for operator in operators}) != len(operators):
        raise ConfigInvalid("operator: two have the same name")
    if len({operator.recipient.lower() for operator in operators}) != len(operators):
        raise ConfigInvalid("operator: two have the same recipient")
    _check_unlock(config)


def _check_unlock(config: Config) -> None:
    """What nobody could ever fulfil is refused before a backup is written for it."""
    operators, unlock = config.operators, config.unlock
    names = {operator.name for operator in operators}
    for operator in operators:
        for group in operator.groups:
            if not _OPERATOR_NAME.fullmatch(group) or group in names:
                raise ConfigInvalid(f"operator {operator.name}: {group!r} is not the name of a group")
        if len(set(operator.groups)) != len(operator.groups):
            raise ConfigInvalid(f"operator {operator.name}: a group is named twice")
    if operators and unlock.threshold > len(operators):
        raise ConfigInvalid(f"unlock.threshold: {unlock.threshold} of {len(operators)} operators")
    if len(set(unlock.require)) != len(unlock.require):
        raise ConfigInvalid("unlock.require: a name is there twice")
    for name in unlock.require:
        if name not in names and not any(name in operator.groups for operator in operators):
            raise ConfigInvalid(f"unlock.require: {name!r} is neither an operator nor a group of one")
    if not 1 <= unlock.window <= MAX_WINDOW:
        raise ConfigInvalid(f"unlock.window: from 1 second to {MAX_WINDOW // 3600} hours")


def _check_keys(keys: dict[str, KeyConfig]) -> None:
    if len(keys) > MAX_KEYS:
        raise ConfigInvalid(f"key: more than {MAX_KEYS}")
    for name, key in keys.items():
        if not _KEY_NAME.fullmatch(name):
            raise ConfigInvalid(f"key.{_shown(name)}: a name is a-z, 0-9, '.', '_' and '-', 64 at most")
        for field, value in (("owner", key.owner), ("purpose", key.purpose)):
            if not value.strip() or len(value) > 200 or not value.isprintable():
                raise ConfigInvalid(f"key.{name}.{field}: required, printable, 200 characters at most")
        if key.rotate_every is not None and key.overlap > key.rotate_every:
            raise ConfigInvalid(f"key.{name}.overlap: longer than rotate_every")
        for unit in key.on_rotate:
            if not _UNIT_NAME.fullmatch(unit):
                raise ConfigInvalid(f"key.{name}.on_rotate: {unit!r} is not a unit name such as web.service")
        for number, rule in enumerate(key.allow):
            _check_rule(f"key.{name}.allow[{number}]", rule)


def _check_rule(place: str, rule: Rule) -> None:
    subjects = [subject for subject in (rule.unit, rule.user, rule.group) if subject is not None]
    if len(subjects) != 1 or not subjects[0]:
        raise ConfigInvalid(f"{place}: exactly one of unit, user and group")
    if rule.unit is not None and not _UNIT_NAME.fullmatch(rule.unit):
        raise ConfigInvalid(f"{place}: {rule.unit!r} is not a unit name such as web.service")
    account = rule.user if rule.user is not None else rule.group
    if account is not None and (len(account) > _MAX_ACCOUNT or not account.isprintable()):
        # A NUL, for one, would be cut off by the C library, or refused.
        raise ConfigInvalid(f"{place}: {account[:_MAX_ACCOUNT]!r} is not the name of a user or group")
    if not rule.operations or len(set(rule.operations)) != len(rule.operations):
        raise ConfigInvalid(f"{place}: operations are one or more of read, sign, verify")


def _check_notify(notify: Notify) -> None:
    if notify.command and not notify.command[0].startswith("/"):
        raise ConfigInvalid(f"notify.command: {notify.command[0]!r} is not an absolute path")
    if notify.webhook is not None and not _WEBHOOK.fullmatch(notify.webhook):
        raise ConfigInvalid("notify.webhook: not an https:// address")
