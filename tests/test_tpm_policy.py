"""The policy digest computed in software, against the TPM's own trial session and against a written-out example."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from rigs.swtpm import SoftwareTpm
from rigs.tpmhost import Host

from unsealerd.errors import TpmFailed
from unsealerd.model import SealKind
from unsealerd.tpm import commands, counter, parent
from unsealerd.tpm.esys import NONE, Connection, Esys
from unsealerd.tpm.policy import Terms, pcr_selection
from unsealerd.tpm.seal import window
from unsealerd.tpm.session import SessionKind, salted


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[SoftwareTpm]:
    with SoftwareTpm(tmp_path / "tpm") as running:
        yield running


def trial_digest(host: Host, terms: Terms) -> bytes:
    """What the TPM says that the digest of these terms is."""
    connection = Connection(host.tcti)
    try:
        with Esys(connection) as esys:
            key, index = parent.attach(esys, host.pin), counter.attach(esys, host.pin)
            with salted(esys, SessionKind.TRIAL, key) as session:
                commands.policy_nv(esys, session, index, terms.counter_operand)
                for condition in terms.reset_conditions:
                    commands.policy_reset_count(esys, session, condition)
                commands.policy_pcr(esys, session, tuple(terms.pcrs), terms.pcr_digest)
                pointer = esys.ffi.new("TPM2B_DIGEST **")
                esys.call("PolicyGetDigest", session.tr, NONE, NONE, NONE, pointer)
                digest = esys.owned(pointer)
                return bytes(esys.ffi.buffer(digest.buffer, digest.size))
    finally:
        connection.close()


@pytest.mark.promise(3)
@pytest.mark.parametrize("pcrs", [(7,), (0, 23), tuple(range(24))])
@pytest.mark.parametrize(("low", "high"), [(1, 1), (2, 2), (2, 5), (0xFFFFFFFE, 0xFFFFFFFF)])
def test_the_tpm_computes_the_same_digest(
    tpm: SoftwareTpm, pcrs: tuple[int, ...], low: int, high: int
) -> None:
    host = Host(tpm)
    values = {index: hashlib.sha256(bytes([index])).digest() for index in pcrs}
    terms = Terms(bytes.fromhex(host.pin.counter_name), 2**40 + 3, low, high, values)
    assert terms.digest() == trial_digest(host, terms)


def test_every_term_changes_the_digest() -> None:
    name, values = b"\x00\x0b" + bytes(32), {7: bytes(32)}
    digests = {
        Terms(name, 1, 2, 2, values).digest(),
        Terms(b"\x00\x0b" + bytes(31) + b"\x01", 1, 2, 2, values).digest(),
        Terms(name, 2, 2, 2, values).digest(),
        Terms(name, 1, 3, 3, values).digest(),
        Terms(name, 1, 2, 3, values).digest(),
        Terms(name, 1, 2, 2, {7: bytes(31) + b"\x01"}).digest(),
        Terms(name, 1, 2, 2, {8: bytes(32)}).digest(),
        Terms(name, 1, 2, 2, {7: bytes(32), 8: bytes(32)}).digest(),
    }
    assert len(digests) == 8


def test_the_order_of_the_pcrs_does_not_matter() -> None:
    name, one, two = bytes(34), b"\x01" * 32, b"\x02" * 32
    assert Terms(name, 1, 2, 2, {4: one, 7: two}).digest() == Terms(name, 1, 2, 2, {7: two, 4: one}).digest()


def test_the_selection_is_the_structure_of_part_two() -> None:
    assert pcr_selection([7]).hex() == "00000001" + "000b" + "03" + "800000"
    assert pcr_selection([0, 8, 23]).hex() == "00000001" + "000b" + "03" + "010180"


def test_the_window_excludes_the_running_boot() -> None:
    assert window(SealKind.REBOOT, 41, 0) == (42, 42)
    assert window(SealKind.REBOOT, 41, 2) == (42, 44)
    assert window(SealKind.KEXEC, 41, 2) == (41, 41)


@pytest.mark.parametrize(("resets", "extra"), [(0xFFFFFFFF, 0), (0xFFFFFFFE, 1)])
def test_a_reset_count_at_its_end_is_an_error(resets: int, extra: int) -> None:
    with pytest.raises(TpmFailed, match="at its end"):
        window(SealKind.REBOOT, resets, extra)
