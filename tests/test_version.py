"""Every program says its version, without a configuration, and from the one place that has it."""

import subprocess
import sys
from pathlib import Path

import pytest
from rigs.ctl import Ctl

from unsealerd import __version__


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("unsealerd.daemon.main", "unsealerd"),
        ("unsealerd.gateway.main", "unsealerd-gateway"),
        ("unsealerd.watch.main", "unsealerd-watch"),
    ],
)
def test_of_a_daemon(module: str, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == (f"{name} {__version__}\n", "")


def test_of_unsealctl(tmp_path: Path) -> None:
    ctl = Ctl(tmp_path)
    result = ctl.bare("--version")
    assert (result.code, result.out, result.err) == (0, f"unsealctl {__version__}\n", "")
    for arguments in (("--json", "--version"), ("--version", "--json")):
        assert ctl.bare(*arguments).json == {"version": __version__}
    assert ctl.bare("status", "--version").code == 2, "of the program, not of a command"
