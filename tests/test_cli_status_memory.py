"""``unsealctl status`` says in words whether a restart of the daemon keeps the keys."""

import pytest

from unsealerd.cli.status import summary


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        ({"kept": True, "why": None}, "kept over a restart of the daemon"),
        ({"kept": False, "why": "no manager"}, "not kept over a restart of the daemon: no manager"),
        ({"kept": False, "why": None}, "not kept over a restart of the daemon"),
    ],
)
def test_memory(memory: dict[str, object], said: str) -> None:
    rows = dict(summary({"state": "unlocked", "since": 1700000000, "memory": memory}))
    assert rows["memory"] == said
