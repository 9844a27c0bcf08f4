"""A daemon that runs, and a configuration on disk that it would refuse: its state is said nevertheless, and it can be locked."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rigs.ctl import Ctl
from rigs.stub_daemon import StubDaemon

from unsealerd.cli.edge import Exit

STATUS = {"state": "unlocked", "since": 1700000000, "generation": 7}


@pytest.fixture
def ctl(tmp_path: Path) -> Ctl:
    return Ctl(tmp_path)


@pytest.fixture
def daemon(ctl: Ctl) -> Iterator[StubDaemon]:
    with StubDaemon(ctl.runtime_dir) as stub:
        stub.answers["Admin.Status"] = {"status": STATUS}
        stub.answers["Admin.Lock"] = {}
        yield stub


@pytest.fixture
def default(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default file is that of the test, and so is the default directory of the sockets."""
    from unsealerd.config import Daemon

    monkeypatch.setattr("unsealerd.config.DEFAULT_PATH", ctl.config)
    monkeypatch.setattr("unsealerd.config.Daemon", lambda: Daemon(runtime_dir=ctl.runtime_dir))
    return ctl.config


def test_what_is_toml_still_says_where_the_daemon_is(ctl: Ctl, daemon: StubDaemon) -> None:
    ctl.config.write_text(ctl.config.read_text() + "[odd]\n")
    result = ctl("status", "--json")
    assert (result.code, result.json) == (0, STATUS)
    warning, hint = result.err.splitlines()
    assert warning.startswith(f"warning: {ctl.config}: ")
    assert "odd" in warning
    assert hint.startswith("hint: the daemon goes on with what it read before; correct the file")
    assert ctl("lock").code == 0
    assert daemon.calls[-1][0] == "Admin.Lock"


@pytest.mark.parametrize("text", ["[", "\xff", None])
def test_the_default_file_means_the_default_place(
    ctl: Ctl, daemon: StubDaemon, default: Path, text: str | None
) -> None:
    if text is None:
        default.unlink()
    else:
        default.write_bytes(text.encode("latin-1"))
    result = ctl.bare("status", "--json")
    assert (result.code, result.json) == (0, STATUS)
    assert result.err.startswith(f"warning: {default}: ")


def test_without_a_daemon_the_file_is_what_is_wrong(ctl: Ctl, default: Path) -> None:
    default.write_text("[")
    ctl.bare("status", "--json").refused(Exit.CONFIGURATION, "ConfigInvalid")


@pytest.mark.parametrize(
    "text", ["[", '[daemon]\nruntime_dir = "run"\n', "[daemon]\nruntime_dir = 1\n", "daemon = 1\n"]
)
def test_another_file_that_does_not_say_where_is_refused(ctl: Ctl, daemon: StubDaemon, text: str) -> None:
    ctl.config.write_text(text)
    ctl("status", "--json").refused(Exit.CONFIGURATION, "ConfigInvalid")


def test_a_reload_is_refused_before_the_daemon_is_asked(ctl: Ctl, daemon: StubDaemon) -> None:
    ctl.config.write_text(ctl.config.read_text() + "[odd]\n")
    ctl("reload", "--json").refused(Exit.CONFIGURATION, "ConfigInvalid")
    assert not daemon.calls
