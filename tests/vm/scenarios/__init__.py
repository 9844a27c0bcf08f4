"""What is played, in this order: each begins on an unlocked host, whatever the one before left behind."""

from vm.scenarios import attacks, planned, powercut, running, unplanned
from vm.table import Scenario


def all_scenarios(cuts: int) -> list[Scenario]:
    """``cuts``: how often the power is cut, in each of the two loops."""
    return [
        *running.FIRST,
        *planned.SCENARIOS,
        *running.SCENARIOS,
        *unplanned.SCENARIOS,
        *attacks.SCENARIOS,
        *powercut.scenarios(cuts),
    ]
