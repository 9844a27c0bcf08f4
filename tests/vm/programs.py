"""Programs of this machine that the rig uses."""

import shutil
import subprocess
from pathlib import Path

from vm.errors import RigError


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise RigError(f"{name} is missing")
    return found


def quietly(name: str, *arguments: str) -> None:
    """Raises RigError if it fails."""
    done = subprocess.run([program(name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RigError(f"{name} {' '.join(arguments)}: {done.stderr[-500:]}")


def copy(source: Path, target: Path) -> None:
    """Holes stay holes."""
    quietly("cp", "--sparse=always", "--reflink=auto", str(source), str(target))
