"""Files out of an image of an ext4 file system, without mounting it: as the next boot would find them."""

import os
import subprocess
from pathlib import Path

from vm.errors import Broken, RigError
from vm.programs import program

_CORRECTED = 1  # e2fsck(8): errors were corrected, as after every crash...
_LEFT = 4  # ...and were not
_REGULAR = "100"


def extract(image: Path, directory: Path) -> None:
    """Replay the journal in the image, then copy the files of its top directory into a new one. Links stay links.

    Raises Broken if the file system is damaged beyond what a journal puts right.
    """
    checked = subprocess.run(
        [program("e2fsck"), "-p", str(image)], capture_output=True, text=True, check=False
    )
    if checked.returncode >= _LEFT:
        raise Broken(f"the file system is damaged: {checked.stdout[-300:].strip()}")
    if checked.returncode > _CORRECTED:
        raise RigError(f"e2fsck ended with {checked.returncode}: {checked.stderr[-300:]}")
    directory.mkdir()
    found: dict[int, list[str]] = {}
    for line in _debugfs(image, "ls -p /").splitlines():
        match line.split("/"):
            case ["", inode, mode, _, _, name, _, ""] if mode.startswith(_REGULAR):
                found.setdefault(int(inode), []).append(name)
    _debugfs(image, *(f"dump <{inode}> {directory / names[0]}" for inode, names in found.items()))
    for first, *others in found.values():
        for other in others:
            os.link(directory / first, directory / other)


def _debugfs(image: Path, *commands: str) -> str:
    return subprocess.run(
        [program("debugfs"), "-f", "-", str(image)],
        input="".join(f"{command}\n" for command in commands),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
