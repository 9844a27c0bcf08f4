"""Sealing for a planned reboot, on a software TPM: the next boot, once, in the measured state, on this TPM."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from rigs.swtpm import SoftwareTpm
from rigs.tpmhost import FILE_KEY, NOW, Host, seal

from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import BadRequest, NotInitialised, SealRefused, TpmChanged, TpmFailed
from unsealerd.model import LockReason, SealKind
from unsealerd.tpm import commands, parent, template
from unsealerd.tpm.commands import Blobs
from unsealerd.tpm.device import Tpm
from unsealerd.tpm.esys import NONE, PASSWORD, Connection, Esys
from unsealerd.tpm.response import TpmResponse
from unsealerd.tpm.sealed import SealedCopy
from unsealerd.tpm.session import SessionKind, loaded, salted


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[SoftwareTpm]:
    with SoftwareTpm(tmp_path / "tpm") as running:
        yield running


@pytest.fixture
def host(tpm: SoftwareTpm) -> Host:
    return Host(tpm)


def refusal(host: Host, copy: SealedCopy, now: int = NOW) -> SealRefused:
    with pytest.raises(SealRefused) as caught:
        host.unseal(copy, now)
    return caught.value


# --- when


@pytest.mark.promise(3)
def test_the_next_boot_gets_the_file_key(host: Host) -> None:
    copy = host.seal()
    host.tpm.reset()
    assert host.unseal(copy) == FILE_KEY


@pytest.mark.promise(3)
def test_a_power_cut_is_a_reset_like_another(host: Host) -> None:
    copy = host.seal()
    host.tpm.power_cut()
    assert host.unseal(copy) == FILE_KEY


@pytest.mark.promise(3)
def test_the_boot_that_sealed_gets_nothing(host: Host) -> None:
    refused = refusal(host, host.seal())
    assert refused.reason is LockReason.NOT_THE_NEXT_BOOT
    assert refused.detail == "the reset count is 1, the copy was made for 2"


@pytest.mark.promise(3)
def test_the_boot_after_the_next_gets_nothing(host: Host) -> None:
    copy = host.seal()
    host.tpm.reset()
    host.tpm.reset()
    assert refusal(host, copy).reason is LockReason.NOT_THE_NEXT_BOOT


@pytest.mark.promise(3)
def test_a_used_copy_gets_nothing_on_the_same_boot(host: Host) -> None:
    copy = host.seal()
    host.tpm.reset()
    assert host.use(copy) == FILE_KEY
    refused = refusal(host, copy)
    assert refused.reason is LockReason.SEALED_COPY_USED
    assert refused.detail == "the counter is not where it was for the copy"


@pytest.mark.promise(3)
def test_a_copy_of_the_disk_opens_nothing_later(host: Host) -> None:
    """The bytes taken between seal and boot are put back after each of the following boots."""
    stolen = host.seal().encode()
    host.tpm.reset()
    assert host.use(SealedCopy.decode(stolen)) == FILE_KEY
    for _ in range(3):
        assert refusal(host, SealedCopy.decode(stolen)).reason is LockReason.SEALED_COPY_USED
        host.tpm.reset()


@pytest.mark.promise(3)
def test_an_unused_copy_is_not_revived_by_a_second_seal(host: Host) -> None:
    first = host.seal()
    host.tpm.reset()
    second = host.seal()
    assert host.unseal(first) == FILE_KEY
    host.tpm.reset()
    assert refusal(host, first).reason is LockReason.NOT_THE_NEXT_BOOT
    assert host.unseal(second) == FILE_KEY


@pytest.mark.promise(3)
@pytest.mark.parametrize("extra", [1, 2])
def test_extra_resets_widen_the_window_and_exclude_the_running_boot(host: Host, extra: int) -> None:
    copy = host.seal(extra_resets=extra)
    assert refusal(host, copy).reason is LockReason.NOT_THE_NEXT_BOOT
    for _ in range(1 + extra):
        host.tpm.reset()
        assert host.unseal(copy) == FILE_KEY
    host.tpm.reset()
    refused = refusal(host, copy)
    assert refused.reason is LockReason.NOT_THE_NEXT_BOOT
    assert refused.detail == f"the reset count is {3 + extra}, the copy was made for 2 to {2 + extra}"


@pytest.mark.promise(3)
def test_kexec_does_not_reset_the_tpm(host: Host) -> None:
    copy = host.seal(kind=SealKind.KEXEC, extra_resets=2)
    assert host.unseal(copy) == FILE_KEY
    host.tpm.reset()
    assert refusal(host, copy).reason is LockReason.NOT_THE_NEXT_BOOT


@pytest.mark.promise(3)
def test_kexec_works_once(host: Host) -> None:
    copy = host.seal(kind=SealKind.KEXEC)
    assert host.use(copy) == FILE_KEY
    assert refusal(host, copy).reason is LockReason.SEALED_COPY_USED


@pytest.mark.promise(3)
def test_nothing_but_the_policy_opens_it(host: Host) -> None:
    """Whoever may load the copy asks without a policy session: by its empty password, and by an HMAC session."""
    copy = host.seal()
    host.tpm.reset()
    connection = Connection(host.tcti)
    try:
        with Esys(connection) as esys:
            key = parent.attach(esys, host.pin)
            with (
                loaded(esys, commands.load(esys, key, Blobs(copy.public, copy.private))) as item,
                salted(esys, SessionKind.HMAC, key) as session,
            ):
                for authority in (PASSWORD, session.tr):
                    with pytest.raises(TpmResponse, match="0x12f"):  # TPM_RC_AUTH_UNAVAILABLE
                        esys.call(
                            "Unseal", item, authority, NONE, NONE, esys.ffi.new("TPM2B_SENSITIVE_DATA **")
                        )
            esys.flush(key)
    finally:
        connection.close()
    assert host.unseal(copy) == FILE_KEY


# --- in which state


@pytest.mark.promise(3)
def test_a_changed_pcr_is_named(host: Host) -> None:
    copy = host.seal(pcrs=(7, 11))
    host.tpm.reset()
    host.tpm.extend(7)
    refused = refusal(host, copy)
    assert refused.reason is LockReason.PCR_MISMATCH
    assert refused.detail == "PCR 7 differs"


@pytest.mark.promise(3)
def test_all_changed_pcrs_are_named(host: Host) -> None:
    copy = host.seal(pcrs=(11, 7, 0))
    host.tpm.reset()
    host.tpm.extend(11)
    host.tpm.extend(7)
    assert refusal(host, copy).detail == "PCRs 7, 11 differ"


def test_a_pcr_that_is_not_configured_may_change(host: Host) -> None:
    copy = host.seal(pcrs=(7,))
    host.tpm.reset()
    host.tpm.extend(8)
    assert host.unseal(copy) == FILE_KEY


def test_more_pcrs_than_the_tpm_reads_at_once(host: Host) -> None:
    host.tpm.extend(23)
    copy = host.seal(pcrs=range(24))
    assert len(set(copy.pcrs.values())) > 1  # PCRs 17 to 22 start with ones, 23 was extended
    host.tpm.reset()
    assert refusal(host, copy).detail == "PCR 23 differs"
    host.tpm.extend(23)
    assert host.unseal(copy) == FILE_KEY


def test_the_reason_that_helps_most_comes_first(host: Host) -> None:
    """Everything differs: used wins over the wrong boot, the wrong boot over the PCR."""
    copy = host.seal()
    host.tpm.reset()
    host.tpm.extend(7)
    assert refusal(host, copy).reason is LockReason.PCR_MISMATCH
    host.tpm.reset()
    host.tpm.extend(7)
    assert refusal(host, copy).reason is LockReason.NOT_THE_NEXT_BOOT
    with host.device() as device:
        device.increment()
    assert refusal(host, copy).reason is LockReason.SEALED_COPY_USED


# --- on which TPM


@pytest.mark.promise(2)
def test_another_tpm_is_noticed(host: Host, tmp_path: Path) -> None:
    with SoftwareTpm(tmp_path / "other") as other:
        Host(other)  # it has a counter at the same handle, too
        with Tpm.open(other.tcti) as device, pytest.raises(TpmChanged, match="storage root key"):
            device.attach(host.pin)


@pytest.mark.promise(2)
def test_another_tpm_opens_nothing_even_if_pinned(host: Host, tmp_path: Path) -> None:
    copy = host.seal()
    host.tpm.reset()
    with SoftwareTpm(tmp_path / "other") as machine:
        other = Host(machine)
        machine.reset()
        assert other.pin.counter_name == host.pin.counter_name
        refused = refusal(other, copy)
        assert refused.reason is LockReason.SEALED_COPY_DAMAGED
        assert "does not load" in refused.detail
    assert host.unseal(copy) == FILE_KEY


# --- the lease


@pytest.mark.parametrize(("now", "given"), [(NOW + 899, True), (NOW + 900, False), (NOW + 9000, False)])
def test_a_lease_ends(host: Host, now: int, given: bool) -> None:
    copy = host.seal(deadline=NOW + 900)
    host.tpm.reset()
    if given:
        assert host.unseal(copy, now) == FILE_KEY
    else:
        assert refusal(host, copy, now).reason is LockReason.LEASE_EXPIRED


@pytest.mark.promise(3)
@pytest.mark.parametrize("written", [0, NOW + 10**6])
def test_a_lease_cannot_be_prolonged_in_the_file(host: Host, written: int) -> None:
    copy = msgspec.structs.replace(host.seal(deadline=NOW + 900), deadline=written)
    host.tpm.reset()
    assert refusal(host, copy, NOW + 901).reason is LockReason.LEASE_EXPIRED


# --- the file


@pytest.mark.promise(10)
def test_a_changed_blob_is_refused(host: Host) -> None:
    copy = host.seal()
    host.tpm.reset()
    for field in ("private", "public"):
        blob = getattr(copy, field)
        for position in (0, 2, 8, len(blob) // 2, len(blob) - 1):
            changed = bytearray(blob)
            changed[position] ^= 0x01
            damaged = msgspec.structs.replace(copy, **{field: bytes(changed)})
            assert refusal(host, damaged).reason is LockReason.SEALED_COPY_DAMAGED
        for cut in (blob[:1], blob[:-1], blob + b"\0"):
            damaged = msgspec.structs.replace(copy, **{field: cut})
            assert refusal(host, damaged).reason is LockReason.SEALED_COPY_DAMAGED
    assert host.unseal(copy) == FILE_KEY


@pytest.mark.promise(3)
def test_the_terms_cannot_be_changed_in_the_file(host: Host) -> None:
    copy = host.seal()
    host.tpm.reset()
    host.tpm.reset()
    for changes in (
        {"resets_low": copy.resets_low + 1, "resets_high": copy.resets_high + 1},
        {"resets_high": copy.resets_high + 1},
        {"counter": copy.counter + 1},
        {"pcrs": {8: copy.pcrs[7]}},
    ):
        changed = msgspec.structs.replace(copy, **changes)
        assert refusal(host, changed).reason is LockReason.SEALED_COPY_DAMAGED


def test_a_copy_of_something_else_is_refused(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sealed by this TPM under this very policy, but not a file key with a deadline."""
    monkeypatch.setattr("unsealerd.tpm.seal.PAYLOAD_SIZE", 25)
    copy = host.seal()
    monkeypatch.undo()
    host.tpm.reset()
    assert refusal(host, copy).reason is LockReason.SEALED_COPY_DAMAGED


# --- asking for the impossible


def test_no_pcr_at_all_is_refused(host: Host) -> None:
    with pytest.raises(BadRequest, match="at least one PCR"):
        host.seal(pcrs=())


@pytest.mark.parametrize("pcrs", [(24,), (-1,), (7, 99)])
def test_a_pcr_that_does_not_exist_is_refused(host: Host, pcrs: tuple[int, ...]) -> None:
    with pytest.raises(BadRequest, match="from 0 to 23"):
        host.seal(pcrs=pcrs)


@pytest.mark.promise(11)
@pytest.mark.parametrize("size", [0, 15, 17, 32])
def test_only_a_file_key_is_sealed(host: Host, size: int) -> None:
    with host.device() as device, SecretBuffer(size) as key, pytest.raises(BadRequest, match="16 bytes"):
        seal(device, key)


@pytest.mark.parametrize("changes", [{"extra_resets": -1}, {"deadline": -1}])
def test_negative_values_are_refused(host: Host, changes: dict[str, int]) -> None:
    with host.device() as device, SecretBuffer(16) as key, pytest.raises(BadRequest):
        seal(device, key, extra_resets=changes.get("extra_resets", 0), deadline=changes.get("deadline", 0))


def test_nothing_is_sealed_without_a_pin(tpm: SoftwareTpm) -> None:
    with Tpm.open(tpm.tcti) as device, SecretBuffer(16) as key:
        with pytest.raises(NotInitialised):
            seal(device, key)
        with pytest.raises(NotInitialised):
            device.increment()


# --- proof of destruction


@pytest.mark.promise(3)
def test_the_proof_of_destruction_is_the_refusal(host: Host) -> None:
    copy = host.seal()
    host.tpm.reset()
    with host.device() as device:
        device.unseal(copy, NOW).close()
        assert device.increment() == copy.counter + 1
        assert device.proof_of_destruction(copy) is LockReason.SEALED_COPY_USED


@pytest.mark.promise(3)
@pytest.mark.parametrize("deadline", [0, 1])
def test_a_copy_that_still_opens_is_no_proof(host: Host, deadline: int) -> None:
    """Also where its lease is over: the TPM did give the secret."""
    copy = host.seal(deadline=deadline)
    host.tpm.reset()
    with host.device() as device, pytest.raises(TpmFailed, match="gave a used sealed copy again"):
        device.proof_of_destruction(copy)


# --- the dictionary-attack counter


def _power_cut_in_use(host: Host) -> None:
    """Cut the power on a boot that has used the sealed copy, the storage root key and the counter."""
    copy = host.seal()
    host.tpm.power_cut()
    with host.device() as device:
        device.unseal(copy, NOW).close()
        device.increment()
        host.tpm.kill()
    host.tpm.start()


def test_power_cuts_do_not_count_as_attacks(host: Host) -> None:
    for _ in range(4):
        _power_cut_in_use(host)
        assert host.tpm.lockout_counter == 0
    with host.device() as device:
        facts = device.facts()
    assert (facts.lockout_counter, facts.in_lockout) == (0, False)


def test_without_noda_they_would(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same with objects that are subject to dictionary-attack protection."""
    monkeypatch.setattr(template, "_NO_DA", 0)
    other = Host(host.tpm)
    _power_cut_in_use(other)
    assert host.tpm.lockout_counter > 0
