"""`tpm.json` and `sealed.json`: strict, canonical, and readable where there is neither TPM nor library."""

import contextlib
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unsealerd.errors import SealRefused, TpmChanged
from unsealerd.model import LockReason, SealKind
from unsealerd.tpm.pin import TpmPin
from unsealerd.tpm.sealed import SealedCopy

PIN = TpmPin(0x81000001, "000b" + 32 * "a0", 0x01817500, "000b" + 32 * "0c")
COPY = SealedCopy(
    kind=SealKind.REBOOT,
    public=b"public",
    private=b"private",
    pcrs={7: 32 * "00", 11: 32 * "5a"},
    resets_low=2,
    resets_high=4,
    counter=17,
    created=1_800_000_000,
    deadline=0,
)

names = st.binary(min_size=22, max_size=66).map(bytes.hex)
handles = st.integers(0, 0xFFFFFFFF)
numbers = st.integers(0, 2**63 - 1)


@given(st.builds(TpmPin, handles, names, handles, names))
def test_a_pin_survives_the_file(pin: TpmPin) -> None:
    assert TpmPin.decode(pin.encode()) == pin


@st.composite
def copies(draw: st.DrawFn) -> SealedCopy:
    low = draw(st.integers(1, 0xFFFFFFFF))
    pcrs = draw(st.dictionaries(st.integers(0, 23), st.binary(min_size=32, max_size=32), min_size=1))
    return SealedCopy(
        kind=draw(st.sampled_from(SealKind)),
        public=draw(st.binary(min_size=1, max_size=1024)),
        private=draw(st.binary(min_size=1, max_size=1024)),
        pcrs={index: pcrs[index].hex() for index in sorted(pcrs)},
        resets_low=low,
        resets_high=draw(st.integers(low, 0xFFFFFFFF)),
        counter=draw(numbers),
        created=draw(numbers),
        deadline=draw(numbers),
    )


@given(copies())
def test_a_sealed_copy_survives_the_file(copy: SealedCopy) -> None:
    assert SealedCopy.decode(copy.encode()) == copy


@pytest.mark.promise(10)
@given(st.binary(max_size=200))
def test_any_bytes_are_answered(data: bytes) -> None:
    with pytest.raises(SealRefused) as refused:
        SealedCopy.decode(data)
    assert refused.value.reason is LockReason.SEALED_COPY_DAMAGED
    with pytest.raises(TpmChanged):
        TpmPin.decode(data)


@pytest.mark.promise(10)
@given(st.data())
def test_a_changed_byte_is_a_refusal_or_another_value(data: st.DataObject) -> None:
    """What decodes is exactly what would be written: there is one form of each value."""
    encoded = bytearray(COPY.encode())
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] ^= data.draw(st.integers(1, 255))
    changed: SealedCopy | None = None
    with contextlib.suppress(SealRefused):
        changed = SealedCopy.decode(bytes(encoded))
    assert changed != COPY
    assert changed is None or changed.encode() == bytes(encoded)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"version": 0},
        {"bank": "sha1"},
        {"kind": "poweroff"},
        {"pcrs": {}},
        {"pcrs": {24: 32 * "00"}},
        {"pcrs": {7: 31 * "00"}},
        {"pcrs": {7: 32 * "AB"}},
        {"pcrs": {11: 32 * "00", 7: 32 * "00"}},
        {"resets_low": 5},
        {"resets_low": 0},
        {"resets_high": 2**32},
        {"counter": -1},
        {"counter": 2**64},
        {"created": -1},
        {"deadline": "soon"},
        {"public": b""},
        {"private": bytes(1025)},
        {"surprise": 1},
    ],
)
def test_what_would_not_be_written_is_refused(changes: dict[str, object]) -> None:
    fields = msgspec.structs.asdict(COPY) | changes
    with pytest.raises(SealRefused) as refused:
        SealedCopy.decode(msgspec.json.encode(fields) + b"\n")
    assert refused.value.reason is LockReason.SEALED_COPY_DAMAGED


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"parent_name": "000b"},
        {"counter_handle": -1},
        {"parent_handle": 2**32},
        {"surprise": 1},
    ],
)
def test_a_pin_that_would_not_be_written_is_refused(changes: dict[str, object]) -> None:
    fields = msgspec.structs.asdict(PIN) | changes
    with pytest.raises(TpmChanged):
        TpmPin.decode(msgspec.json.encode(fields) + b"\n")


@pytest.mark.parametrize("missing", SealedCopy.__struct_fields__)
def test_every_field_is_required(missing: str) -> None:
    fields = msgspec.structs.asdict(COPY)
    del fields[missing]
    with pytest.raises(SealRefused):
        SealedCopy.decode(msgspec.json.encode(fields) + b"\n")


def test_the_files_need_no_library() -> None:
    """Nor does importing the device: the library is loaded when a TPM is opened."""
    program = (
        "import sys, unsealerd.tpm.pin, unsealerd.tpm.sealed, unsealerd.tpm.device\n"
        "assert not [name for name in sys.modules if 'tpm2_pytss' in name or 'cffi' in name]\n"
        "assert 'cryptography' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
