"""The package's purge: it removes the state directory only where nothing is left of a keyring."""

import subprocess
from pathlib import Path

import pytest

POSTRM = Path(__file__).parents[1] / "packaging" / "debian" / "postrm"


def purge(root: Path) -> str:
    """Run the script on a directory in the place of the root directory; returns what it says."""
    script = POSTRM.read_text()
    for directory in ("/var/lib/", "/run/", "/etc/"):
        assert directory in script
        script = script.replace(directory, f"{root}{directory}")
    done = subprocess.run(["sh", "-s", "purge"], input=script, capture_output=True, text=True, check=True)
    return done.stdout


def pinned(root: Path) -> Path:
    """What `unsealctl init` writes beside the configuration."""
    path = root / "etc/unsealerd/keyring.id"
    path.parent.mkdir(parents=True)
    path.write_text("x")
    return path


@pytest.mark.parametrize(
    "name", ["keyring.age", "keyring.age.previous", "keyring.age.new", "sealed.json", "tpm.json"]
)
def test_whatever_is_left_of_a_keyring_is_kept(tmp_path: Path, name: str) -> None:
    state = tmp_path / "var/lib/unsealerd"
    state.mkdir(parents=True)
    (state / name).write_text("x")
    (state / "audit.jsonl").write_text("x")
    id_file = pinned(tmp_path)
    assert "is kept" in purge(tmp_path)
    assert id_file.exists()  # without it any backup would be opened after the next installation
    assert {path.name for path in state.iterdir()} == {name, "audit.jsonl"}


def test_where_there_is_no_keyring_nothing_is_left(tmp_path: Path) -> None:
    state = tmp_path / "var/lib/unsealerd"
    state.mkdir(parents=True)
    (state / "audit.jsonl").write_text("x")
    id_file = pinned(tmp_path)
    assert purge(tmp_path) == ""
    assert not state.exists()
    assert not id_file.parent.exists()
    assert purge(tmp_path) == ""
