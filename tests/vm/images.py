"""The image of a release with the package under test, made once for each content and kept."""

import contextlib
import fcntl
import hashlib
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vm.errors import NotInMirror, RigError

CHECKOUT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
GUEST = HERE / "guest"
_KEEP = 7200  # seconds after which an image of other parts is removed
_NOT_IN_MIRROR = 3  # exit code of scripts/base-tree
_RECIPE = 1  # raise it when an image of the same parts must be made anew


@dataclass(frozen=True, slots=True)
class Image:
    """What a machine is started from. Read only."""

    release: str
    disk: Path
    kernel: Path


def cache() -> Path:
    """Where trees and images are kept, outside of the checkout."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("UNSEALERD_CACHE") or Path(home) / "unsealerd")


def image(release: str, package: Path | None) -> Image:
    """The image of `release` with `package`, or with the one of this checkout. Raises RigError."""
    base_tree = str(CHECKOUT / "scripts" / "base-tree")
    tree = Path(_printed([base_tree, release]))
    if package is None:
        with_tools = _printed([base_tree, "--with-build-tools", release])
        package = Path(_printed([str(HERE / "build-package"), with_tools, str(CHECKOUT), str(cache())]))
    disk = cache() / f"{release}-image-{_digest(tree, package)}.img"
    with _lock(cache() / f".{release}-image.lock"):
        if not disk.exists():
            for old in cache().glob(f"{release}-image-*"):
                if old.stat().st_mtime < time.time() - _KEEP:
                    old.unlink()
            making = disk.with_suffix(".making")
            making.unlink(missing_ok=True)
            try:
                _printed([str(HERE / "build-image"), str(tree), str(package), str(GUEST), str(making)])
            finally:
                with contextlib.suppress(FileNotFoundError):
                    Path(f"{making}.work").rmdir()  # a mount point; what was mounted went with its namespace
            making.rename(disk)
    return Image(release, disk, tree / "boot" / "vmlinuz")


def _digest(tree: Path, deb: Path) -> str:
    parts = hashlib.sha256(f"{_RECIPE} {tree}\n".encode())
    for file in (deb, HERE / "build-image", *sorted(GUEST.iterdir())):
        if file.is_file():
            parts.update(hashlib.sha256(file.read_bytes()).digest())
    return parts.hexdigest()[:12]


def _printed(command: list[str]) -> str:
    """The last line that a program of the project prints; what it says on stderr is for whoever waits."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=CHECKOUT)
    if done.returncode == _NOT_IN_MIRROR:
        raise NotInMirror(f"the mirror does not have {command[-1]}")
    if done.returncode != 0:
        raise RigError(f"{' '.join(command)} ended with {done.returncode}")
    lines = done.stdout.split("\n")
    return lines[-2] if len(lines) > 1 else ""


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
