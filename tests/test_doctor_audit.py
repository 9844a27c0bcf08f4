"""What unsealctl doctor says of the audit log, besides that its chain verifies."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from rigs.auditlog import current, files, opened, written
from rigs.patient import Patient

from unsealerd.cli.doctor.finding import Finding, Verdict


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[Patient]:
    with Patient(tmp_path) as patient:
        patient.write()
        current(patient.state).unlink()
        yield patient


def found(patient: Patient, check: str = "audit log") -> Finding:
    (finding,) = [finding for finding in patient.examine() if finding.check == check]
    return finding


def test_all_files_are_one_chain(patient: Patient) -> None:
    written(patient.state, 30, keep=99)
    finding = found(patient)
    assert finding.verdict is Verdict.OK
    assert finding.text.startswith("the chain of 39 records verifies")
    assert "kept" not in finding.text


def test_it_says_where_the_kept_part_begins(patient: Patient) -> None:
    oldest, *_ = written(patient.state, 30, keep=2)
    first = int(oldest.name.removeprefix("audit-").removesuffix(".jsonl"))
    assert found(patient).text.endswith(f"; it is kept from record {first} on")


@pytest.mark.promise(7)
def test_a_closed_file_that_is_gone(patient: Patient) -> None:
    written(patient.state, 30, keep=99)[2].unlink()
    assert found(patient).verdict is Verdict.FAIL
    assert "are missing" in found(patient).text


def test_a_closed_file_that_others_can_read(patient: Patient) -> None:
    path = written(patient.state, 30, keep=99)[2]
    path.chmod(0o640)
    finding = found(patient, "files")
    assert finding.verdict is Verdict.FAIL
    assert str(path) in finding.text


def test_what_the_daemon_did_not_find(patient: Patient) -> None:
    written(patient.state, 30, keep=99)
    current(patient.state).unlink()
    written(patient.state, 1, keep=99)
    finding = found(patient)
    assert finding.verdict is Verdict.WARN
    assert finding.text.endswith("something was missing: audit.jsonl")
    assert "journalctl" in finding.hint


def test_a_file_that_is_not_closed_in_time(patient: Patient) -> None:
    log = opened(patient.state, max_size=1 << 24)
    for _ in range(110):
        log.append("event", pad="x" * 10_000)
    log.close()
    assert len(files(patient.state)) == 1
    finding = found(patient)
    assert finding.verdict is Verdict.WARN
    assert finding.text == "audit.jsonl has 1 MiB and is not closed at 1"


def test_a_disk_that_is_too_small_for_it(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    written(patient.state, 30, keep=99)
    real = os.statvfs(patient.state)
    room = 1_000_000 // real.f_frsize
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result([*real[:4], room, *real[5:]]))
    finding = found(patient)
    assert finding.verdict is Verdict.WARN
    assert finding.text.startswith("it may grow by 1 MiB, and the disk has room for 0: ")
