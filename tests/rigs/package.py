"""What a machine of the tests is made of: the distribution's tree, and the package of this tree installed over it.

Both are kept outside of the checkout, by the hash of what they were made from, for the next run.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rigs.swtpm import RigError

SCRIPTS = Path(__file__).parents[2] / "scripts"
_KEPT = 4  # installed trees
_BUILD_SECONDS = 900  # with an empty cache on a slow machine
_INSTALL = """
set -e
mount -t overlay overlay -o "$OVERLAY" "$ROOT"
mount -t proc proc "$ROOT/proc"
cp "$DEB" "$ROOT/tmp/package.deb"
exec chroot "$ROOT" sh -c 'dpkg --force-unsafe-io --install /tmp/package.deb && rm /tmp/package.deb'
"""


@dataclass(frozen=True, slots=True)
class Layers:
    """``paths``: the directories of an overlay, the uppermost first. ``package``: what is installed there.

    In use, and so kept, until `close`.
    """

    paths: tuple[Path, ...]
    package: Path | None = None
    lock: IO[bytes] | None = None

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()


def cache() -> Path:
    """Where the scripts keep what takes long to make."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unsealerd"
    path = Path(os.environ.get("UNSEALERD_CACHE") or default)
    path.mkdir(parents=True, exist_ok=True)
    return path


def release() -> str:
    """The code name of this machine's own distribution: what the package is built for."""
    for line in Path("/etc/os-release").read_text().splitlines():
        name, _, value = line.partition("=")
        if name == "VERSION_CODENAME":
            return value.strip('"')
    raise RigError("/etc/os-release has no VERSION_CODENAME")


def base_tree() -> Path:
    """A clean tree of the distribution, with systemd and what the package depends on. Read only."""
    return Path(_output(SCRIPTS / "base-tree", release()))


def built() -> Path:
    """The package of this tree; built if it is not there yet."""
    return Path(_output(SCRIPTS / "build-deb", "--cached"))


def installed(*, package: bool = True) -> Layers:
    """The tree of a machine. One process makes it, the others wait for it."""
    base = base_tree()
    if not package:
        return Layers((base,))
    deb = built()
    status = base / "var/lib/dpkg/status"
    key = hashlib.sha256(deb.read_bytes() + status.read_bytes() + bytes(base)).hexdigest()[:16]
    home = cache() / "installed"
    home.mkdir(exist_ok=True)
    layer = home / key
    with _locked(home / "lock"):
        if not layer.exists():
            _install(deb, base, layer)
            _prune(home, layer)
        os.utime(layer)
        lock = (home / f"{key}.use").open("ab")
        fcntl.flock(lock, fcntl.LOCK_SH)
    return Layers((layer, base), deb, lock)


def _install(deb: Path, base: Path, layer: Path) -> None:
    work = Path(tempfile.mkdtemp(prefix="making-", dir=layer.parent))
    try:
        for name in ("upper", "work", "root"):
            (work / name).mkdir()
        (work / "upper").chmod(0o755)
        done = subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", _INSTALL],
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "DEBIAN_FRONTEND": "noninteractive",
                "ROOT": str(work / "root"),
                "OVERLAY": f"lowerdir={base},upperdir={work / 'upper'},workdir={work / 'work'}",
                "DEB": str(deb),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_BUILD_SECONDS,
        )
        if done.returncode != 0:
            raise RigError(f"the package does not install:\n{done.stdout.decode(errors='replace')[-4000:]}")
        (work / "upper").rename(layer)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _prune(home: Path, newest: Path) -> None:
    """Remove old trees that no machine uses."""
    trees = [path for path in home.iterdir() if path.is_dir() and not path.name.startswith("making-")]
    trees.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for tree in [tree for tree in trees if tree != newest][_KEPT - 1 :]:
        with (home / f"{tree.name}.use").open("ab") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(tree)
            (home / f"{tree.name}.use").unlink()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _output(*command: str | Path) -> str:
    """The last line that a script prints. Raises `RigError` with its complaints."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_BUILD_SECONDS)
    if done.returncode != 0:
        raise RigError(f"{command[0]}: {done.stderr.decode(errors='replace')[-4000:]}")
    return done.stdout.decode().strip().splitlines()[-1]
