"""The table of the machine test: what counts as held, and what becomes of the table of the other release."""

import pytest
from vm.table import Outcome, Row, Scenario, Table, document


def _table(release: str, *outcomes: Outcome) -> Table:
    scenario = Scenario("`done`", "expected", lambda _: "")
    return Table(
        release, f"Systems of {release}.", [Row(scenario, "a|b\nc", 1.4, outcome) for outcome in outcomes]
    )


@pytest.mark.parametrize(
    ("outcomes", "holds"),
    [
        ((Outcome.HELD,), True),
        ((Outcome.HELD, Outcome.NOT_HERE), True),
        ((Outcome.HELD, Outcome.BROKEN), False),
        ((Outcome.HELD, Outcome.NOT_REACHED), False),
        ((), False),
    ],
)
def test_a_table_holds_if_nothing_is_broken_or_left_out(outcomes: tuple[Outcome, ...], holds: bool) -> None:
    assert _table("one", *outcomes).holds is holds


def test_what_a_release_does_not_have_counts_as_not_tested() -> None:
    assert _table("one", Outcome.NOT_HERE).markdown().splitlines()[-1] == (
        "| `done` | expected | a\\|b c | 1 | not tested |"
    )


def test_the_table_of_another_release_stays_when_one_is_written() -> None:
    old = document("# Reboots\n", "", [_table("bookworm", Outcome.BROKEN), _table("trixie", Outcome.HELD)])
    new = document("# Reboots, anew\n", old, [_table("bookworm", Outcome.HELD)])
    assert new == document(
        "# Reboots, anew\n", "", [_table("trixie", Outcome.HELD), _table("bookworm", Outcome.HELD)]
    )
    assert new.count("## Debian ") == 2
    assert "broken" not in new
    assert document("# Reboots, anew\n", new, []) == new
