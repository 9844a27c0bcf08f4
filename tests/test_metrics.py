"""Prometheus metrics: judged by Prometheus' own parser, and by what the daemon really did."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from rigs.ctl import Ctl
from rigs.server import Server
from rigs.stub_daemon import StubDaemon

from unsealerd.core.metrics import PROVEN_SECONDS, exposition, metrics

NOW = 1_800_000_000.0
DOCUMENT = Path(__file__).parent.parent / "docs" / "monitoring.md"
STATUS: dict[str, Any] = {
    "state": "locked",
    "lock_reason": "rollback",
    "since": 1_799_999_000,
    "generation": 12,
    "keys": ["a", "b"],
    "tpm": {
        "present": True,
        "error": None,
        "in_lockout": False,
        "lockout_counter": 2,
        "reset_count": 9,
        "counter": 40,
        "counter_behind": True,
    },
    "seal": {"sealed": True, "deadline": 1_800_000_900},
    "sessions": [{}],
    "shares": {"present": 1, "needed": 2},
    "operators": [
        {"name": "alice", "proven": int(NOW) - 10},
        {"name": 'b"o\\b\n', "proven": int(NOW) - PROVEN_SECONDS - 1},
        {"name": "carol", "proven": None},
    ],
    "backup": {"path": "/x", "written": 1_799_990_000},
    "secret_memory": "memfd_secret",
    "warnings": ["one"],
    "counters": {
        "seals": 1,
        "seal_failures": 2,
        "unseals": 3,
        "unlocks": 4,
        "unlock_failures": 5,
        "drill_failures": 10,
        "locks": 6,
        "denials": 7,
        "rotations": 8,
        "revocations": 9,
    },
}


def parsed(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample, as Prometheus reads it."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def plain(text: str) -> dict[str, float]:
    return {name: value for (name, labels), value in parsed(text).items() if not labels}


def test_what_a_status_says() -> None:
    found = parsed(exposition(metrics(STATUS, "1.2", NOW)))
    assert {
        name.removeprefix("unsealerd_"): value for (name, labels), value in found.items() if not labels
    } == {
        "up": 1,
        "locked": 1,
        "initialised": 1,
        "state_timestamp_seconds": 1_799_999_000,
        "generation": 12,
        "keys": 2,
        "unlock_sessions": 1,
        "shares_present": 1,
        "shares_needed": 2,
        "backup_timestamp_seconds": 1_799_990_000,
        "warnings": 1,
        "operators": 3,
        "operators_proven": 1,
        "sealed": 1,
        "seal_deadline_timestamp_seconds": 1_800_000_900,
        "tpm_present": 1,
        "tpm_in_lockout": 0,
        "tpm_lockout_failures": 2,
        "tpm_resets_total": 9,
        "tpm_changes_total": 40,
        "tpm_backup_ahead": 1,
        "seals_total": 1,
        "seal_failures_total": 2,
        "unseals_total": 3,
        "unlocks_total": 4,
        "unlock_failures_total": 5,
        "drill_failures_total": 10,
        "locks_total": 6,
        "denials_total": 7,
        "rotations_total": 8,
        "revocations_total": 9,
    }
    assert {
        (name.removeprefix("unsealerd_"), labels): value for (name, labels), value in found.items() if labels
    } == {
        ("build_info", (("version", "1.2"),)): 1,
        ("lock_info", (("reason", "rollback"),)): 1,
        ("secret_memory_info", (("kind", "memfd_secret"),)): 1,
        ("operator_proven_timestamp_seconds", (("operator", "alice"),)): NOW - 10,
        ("operator_proven_timestamp_seconds", (("operator", 'b"o\\b\n'),)): NOW - PROVEN_SECONDS - 1,
    }


def test_names_and_kinds_follow_the_conventions() -> None:
    families = metrics(STATUS | {"tpm": {**STATUS["tpm"], "error": "TpmFailed"}}, "1", NOW)
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert re.fullmatch(r"unsealerd_[a-z][a-z0-9_]*", family.name)
        assert (family.kind == "counter") == family.name.endswith("_total")
        assert family.help.endswith(".")
    kinds = {family.name: family.type for family in text_string_to_metric_families(exposition(families))}
    assert kinds == {family.name.removesuffix("_total"): family.kind for family in families}


def test_the_document_names_them_all() -> None:
    families = metrics(STATUS | {"tpm": {**STATUS["tpm"], "error": "TpmFailed"}}, "1", NOW)
    documented = set(re.findall(r"^\| `(unsealerd_\w+)", DOCUMENT.read_text(), re.MULTILINE))
    assert documented == {family.name for family in families}


def test_a_daemon_that_does_not_answer_is_down_and_nothing_else() -> None:
    assert parsed(exposition(metrics(None, "1", NOW))) == {
        ("unsealerd_up", ()): 0,
        ("unsealerd_build_info", (("version", "1"),)): 1,
    }


def test_what_is_not_known_gives_no_sample() -> None:
    status = {"state": "unlocked", "lock_reason": None, "since": None, "operators": ["alice"], "tpm": None}
    found = plain(exposition(metrics(status, "1", NOW)))
    assert found == {
        "unsealerd_up": 1,
        "unsealerd_locked": 0,
        "unsealerd_initialised": 1,
        "unsealerd_operators": 1,
        "unsealerd_operators_proven": 0,
    }


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(STATUS)), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(STATUS)), values), st.text())
def test_whatever_the_status_is_the_text_is_well_formed(status: dict[str, object], version: str) -> None:
    parsed(exposition(metrics(status, version, NOW)))


@given(st.text(), st.text())
def test_labels_come_back_as_they_were(reason: str, version: str) -> None:
    text = exposition(metrics({"state": "locked", "lock_reason": reason}, version, NOW))
    labels = {name: dict(labels) for (name, labels) in parsed(text) if labels}
    assert labels == {"unsealerd_lock_info": {"reason": reason}, "unsealerd_build_info": {"version": version}}


# --- the command


@pytest.fixture
def ctl(tmp_path: Path) -> Ctl:
    return Ctl(tmp_path)


def test_the_command_prints_or_writes(ctl: Ctl, tmp_path: Path) -> None:
    with StubDaemon(ctl.runtime_dir) as daemon:
        daemon.answers["Admin.Status"] = {"status": STATUS}
        printed = ctl("metrics")
        assert printed.code == 0
        assert plain(printed.out)["unsealerd_generation"] == 12
        file = tmp_path / "m" / "unsealerd.prom"
        written = ctl("metrics", "--textfile", str(file))
        assert (written.code, written.raw) == (0, b"")
        assert plain(file.read_text()).keys() == plain(printed.out).keys()
        assert file.stat().st_mode & 0o777 == 0o644
        found = ctl("metrics", "--json").json["metrics"]
        assert isinstance(found, list)
        assert {"name": "unsealerd_generation", "type": "gauge", "value": 12, "labels": {}} in found
        ctl("--json", "metrics", "--textfile", "/proc/nothing/x.prom").refused(15, "StorageFailed")
    down = ctl("metrics", "--textfile", str(file)).refused(5)
    assert not down.raw
    assert plain(file.read_text()) == {"unsealerd_up": 0}
    assert plain(ctl("metrics").refused(5).out) == {"unsealerd_up": 0}
    ctl("metrics", "--json").refused(5, "DaemonUnreachable")


def test_the_counters_count_what_the_daemon_did() -> None:
    with Server(keys=("demo",)) as server:
        server.keys["other"] = ""
        server.configure()
        server.start()
        server.ctl("init")

        def counted() -> dict[str, float]:
            found = plain(server.ctl("metrics").stdout.decode())
            return {
                name.removeprefix("unsealerd_").removesuffix("_total"): value
                for name, value in found.items()
                if name.endswith("_total") and not name.startswith("unsealerd_tpm") and value
            }

        assert counted() == {}
        server.ctl("key", "rotate", "demo")
        server.ctl("key", "revoke", "demo", "--version", "1", "--yes")
        server.ctl("sign", "nothing", expect=4)
        server.ctl("seal")
        assert counted() == {"rotations": 1, "revocations": 1, "denials": 1, "seals": 1}
        server.ctl("lock")
        server.unlock()
        assert counted().items() >= {"locks": 1, "unlocks": 1}.items()
        facts = plain(server.ctl("metrics").stdout.decode())
        assert facts["unsealerd_tpm_present"] == 1
        assert facts["unsealerd_locked"] == 0
        server.reboot()
        assert counted() == {"unseals": 1}
        status = server.status()
        assert status["tpm"]["pcr_values"] == {"7": "00" * 32}
