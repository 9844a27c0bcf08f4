"""The units as files: how they are rated, and what in them must agree with the programs."""

import re
import subprocess
from pathlib import Path

import pytest

from unsealerd.daemon import fdstore, hygiene

UNITS = Path(__file__).parents[1] / "systemd"
LONGEST_RUN = 8  # directives under one comment


def directives(unit: str) -> list[tuple[str, str]]:
    lines = (UNITS / unit).read_text().splitlines()
    return [
        (line.partition("=")[0], line.partition("=")[2]) for line in lines if re.match(r"[A-Z]\w*=", line)
    ]


def values(unit: str, name: str) -> list[str]:
    return [value for key, value in directives(unit) if key == name]


@pytest.mark.parametrize(
    ("unit", "limit"),
    [
        ("unsealerd.service", 1.5),
        ("unsealerd-gateway.service", 1.5),
        ("unsealerd-unlocked.service", 1.5),
        ("unsealerd-watch.service", 2.0),  # runs as root
        ("unsealerd-notify@.service", 2.0),  # runs what the administrator wants
    ],
)
def test_the_service_manager_rates_the_sandbox_as_good(unit: str, limit: float) -> None:
    done = subprocess.run(
        [
            "systemd-analyze",
            "security",
            "--offline=true",
            "--no-pager",
            f"--threshold={int(limit * 10)}",
            UNITS / unit,
        ],
        capture_output=True,
        text=True,
    )
    rated = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert rated is not None, done.stderr
    assert float(rated[1]) <= limit, done.stdout
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("unit", sorted(path.name for path in UNITS.iterdir()))
def test_each_directive_stands_under_its_reason(unit: str) -> None:
    plain = {
        "Description",
        "Documentation",
        "WantedBy",
        "Type",
        "ExecStart",
        "StandardOutput",
        "StandardError",
    }
    run = LONGEST_RUN
    for number, line in enumerate((UNITS / unit).read_text().splitlines(), 1):
        if line.startswith("#"):
            run = 0
        elif not line or line.startswith("["):
            run = LONGEST_RUN
        elif line.partition("=")[0] not in plain:
            run += 1
            assert run <= LONGEST_RUN, f"{unit}:{number}: {line}: why?"


def test_the_daemon_starts_with_the_environment_that_it_would_make_for_itself() -> None:
    given = dict(value.split("=", 1) for value in values("unsealerd.service", "Environment"))
    assert given == hygiene.ENVIRONMENT


def test_the_descriptor_store_has_the_room_that_the_daemon_counts_on() -> None:
    assert values("unsealerd.service", "FileDescriptorStoreMax") == [str(fdstore.ROOM)]


def test_what_the_daemon_must_see_of_its_callers_is_not_hidden_from_it() -> None:
    assert values("unsealerd.service", "ProtectProc") == ["default"]
    assert values("unsealerd.service", "ProcSubset") == ["all"]
    assert values("unsealerd.service", "PrivateUsers") == []


def test_no_service_is_stopped_by_a_restart_of_the_daemon() -> None:
    for unit in ("unsealerd-unlocked.service", "unsealerd-gateway.service", "unsealerd-watch.service"):
        for name in ("Requires", "BindsTo", "PartOf", "Requisite", "StopPropagatedFrom"):
            assert "unsealerd.service" not in " ".join(values(unit, name)), f"{unit}: {name}"
