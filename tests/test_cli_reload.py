"""unsealctl reload: what a new configuration means for the operators, in plain words."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rigs.ctl import Ctl
from rigs.stub_daemon import StubDaemon, error

from unsealerd.cli.edge import Exit


@pytest.fixture
def ctl(tmp_path: Path) -> Ctl:
    return Ctl(tmp_path)


@pytest.fixture
def daemon(ctl: Ctl) -> Iterator[StubDaemon]:
    with StubDaemon(ctl.runtime_dir) as stub:
        yield stub


def answer(
    daemon: StubDaemon,
    generation: int | None,
    added: list[str],
    removed: list[str],
    pending: str | None = None,
) -> None:
    daemon.answers["Admin.Reload"] = {
        "generation": generation,
        "added": added,
        "removed": removed,
        "pending": pending,
    }


def test_nothing_changed(ctl: Ctl, daemon: StubDaemon) -> None:
    answer(daemon, 7, [], [])
    result = ctl("reload")
    assert (result.code, result.err) == (0, "")
    assert result.out == "the configuration is in use\nthe backup is generation 7\n"


def test_a_removed_operator_still_opens_what_was_written_before(ctl: Ctl, daemon: StubDaemon) -> None:
    answer(daemon, 8, ["carol"], ["bob"])
    result = ctl("reload")
    assert "added: carol\nremoved: bob\n" in result.out
    warning, hint = result.err.splitlines()
    assert warning == (
        "warning: the key that bob had opens no backup from generation 8 on, but still opens every earlier copy"
    )
    for word in ("key rotate", "key revoke", "destroy the earlier copies"):
        assert word in hint
    assert ctl("reload", "--json").json == {
        "generation": 8,
        "added": ["carol"],
        "removed": ["bob"],
        "pending": None,
    }


def test_an_operator_with_a_new_key(ctl: Ctl, daemon: StubDaemon) -> None:
    """Has left with the old one, and that is said."""
    answer(daemon, 8, ["bob"], ["bob"])
    result = ctl("reload")
    assert "a new key: bob" in result.out
    assert "removed: bob" not in result.out
    assert "the key that bob had" in result.err


def test_while_it_is_locked(ctl: Ctl, daemon: StubDaemon) -> None:
    answer(daemon, None, [], ["bob"])
    result = ctl("reload")
    assert "at the next unlock" in result.out
    assert "written after the next unlock" in result.err
    answer(daemon, None, [], [])
    assert ctl("reload").out == "the configuration is in use\n"


def test_rules_that_do_not_apply_yet_are_said(ctl: Ctl, daemon: StubDaemon) -> None:
    answer(daemon, None, [], [], "the backup on this disk still opens with 1 of 3 operators")
    assert ctl("reload").err == "warning: the backup on this disk still opens with 1 of 3 operators\n"


def test_a_configuration_that_is_refused(ctl: Ctl, daemon: StubDaemon) -> None:
    daemon.answers["Admin.Reload"] = error("io.unsealerd.Admin.ConfigInvalid", detail="key.web: no owner")
    ctl("reload", "--json").refused(Exit.CONFIGURATION, "ConfigInvalid")


@pytest.mark.parametrize(
    "odd", [{}, {"generation": "7", "added": [], "removed": []}, {"added": [1], "removed": []}]
)
def test_an_odd_answer(ctl: Ctl, daemon: StubDaemon, odd: dict[str, object]) -> None:
    daemon.answers["Admin.Reload"] = odd
    ctl("reload", "--json").refused(Exit.PEER, "BadMessage")
