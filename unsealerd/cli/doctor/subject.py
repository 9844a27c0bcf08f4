"""What is examined: the configuration, what the daemon answers, and the machine. Gathered once, then only read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unsealerd.cli.doctor.history import History, read_history
from unsealerd.cli.doctor.machine import Machine
from unsealerd.cli.fields import objects, required
from unsealerd.errors import UnsealerdError

if TYPE_CHECKING:
    from unsealerd.client.connection import Connection
    from unsealerd.config import Config

Facts = Mapping[str, object]
_ADMIN = "io.unsealerd.Admin"


@dataclass(frozen=True, slots=True)
class Answers:
    """Of the daemon. `keys` and `backup` are the error that it gave where it gave one."""

    status: Facts
    keys: list[dict[str, object]] | UnsealerdError
    backup: Facts | UnsealerdError

    @property
    def state(self) -> str:
        return required(self.status, "state", str)

    @property
    def tpm(self) -> Facts:
        return required(self.status, "tpm", dict)

    @property
    def warnings(self) -> list[str]:
        return [str(warning) for warning in required(self.status, "warnings", list)]


@dataclass(frozen=True, slots=True)
class Subject:
    config: "Config"
    config_path: Path
    machine: Machine
    answers: Answers | UnsealerdError
    history: History | UnsealerdError


def ask(admin: "Connection") -> Answers:
    """Raises what the connection raises, and `BadMessage`."""
    status = required(admin.call(f"{_ADMIN}.Status"), "status", dict)
    keys: list[dict[str, object]] | UnsealerdError
    backup: Facts | UnsealerdError
    try:
        keys = objects(admin.call(f"{_ADMIN}.ListKeys"), "keys")
    except UnsealerdError as err:
        keys = err
    try:
        backup = admin.call(f"{_ADMIN}.VerifyBackup")
    except UnsealerdError as err:
        backup = err
    return Answers(status, keys, backup)


def history_of(state_dir: Path) -> History | UnsealerdError:
    try:
        return read_history(state_dir)
    except UnsealerdError as err:
        return err
