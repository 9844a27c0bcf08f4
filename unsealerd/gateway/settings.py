"""What the gateway reads: a file of its own, because its user must not read who may unlock the host.

Where it listens, and the two directories that it has in common with the daemon. Nothing in it is secret.
"""

from pathlib import Path

import msgspec

from unsealerd import tomlfile
from unsealerd.errors import ConfigInvalid

FILE_NAME = "gateway.toml"
"""Beside ``unsealerd.toml``."""
DEFAULT_PATH = Path("/etc/unsealerd") / FILE_NAME


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``state_dir`` and ``runtime_dir``: the daemon's, as its own configuration says."""

    listen: tuple[str, ...] = ("[::]:8750",)
    state_dir: Path = Path("/var/lib/unsealerd")
    runtime_dir: Path = Path("/run/unsealerd")

    @property
    def identity_dir(self) -> Path:
        """Where the TLS key is."""
        return self.state_dir / "gateway"

    @property
    def socket(self) -> Path:
        """Where the daemon answers."""
        return self.runtime_dir / "unlock"


def load(path: Path) -> Settings:
    """Read and check the file. Raises `ConfigInvalid`."""
    return tomlfile.load(path, parse)


def parse(data: bytes) -> Settings:
    """Check the text of the file. Raises `ConfigInvalid`."""
    settings = tomlfile.convert("", tomlfile.tables(data), Settings)
    _check_listen(settings.listen)
    tomlfile.check_absolute("state_dir", settings.state_dir)
    tomlfile.check_absolute("runtime_dir", settings.runtime_dir)
    return settings


def _check_listen(listen: tuple[str, ...]) -> None:
    if not listen:
        raise ConfigInvalid("listen: empty; a gateway that listens nowhere unlocks nothing")
    for address in listen:
        host, separator, port = address.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not (
            separator and bare and port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 65536
        ) or (":" in bare and bare == host):
            raise ConfigInvalid(f'listen: {address!r} is not "HOST:PORT" or "[IPV6]:PORT"')
