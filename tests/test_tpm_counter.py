"""The counter and the storage root key: what is pinned, and what happens when it is not there any more."""

import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from rigs.swtpm import SoftwareTpm
from rigs.tpmhost import FILE_KEY, Host, no_pause, persist
from rigs.tpmproxy import Command, TpmProxy

from unsealerd.errors import SealRefused, TpmChanged, TpmFailed
from unsealerd.tpm import counter, template
from unsealerd.tpm.device import Tpm
from unsealerd.tpm.facts import ParentKind
from unsealerd.tpm.parent import PERSISTENT_HANDLE

_STORAGE = 0x00030472  # TPMA_OBJECT of a storage root key
_RSA = struct.pack(">HHIHHHHHHIH", 0x0001, 0x000B, _STORAGE, 0, 6, 128, 0x43, 0x10, 2048, 0, 256) + bytes(256)
# A signing key: not restricted, no decryption; ECC P-256, no scheme.
_SIGNING = struct.pack(">HHIHHHHHHH", 0x0023, 0x000B, 0x00040072, 0, 0x10, 0x10, 3, 0x10, 0, 0)


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[SoftwareTpm]:
    with SoftwareTpm(tmp_path / "tpm") as running:
        yield running


# --- the counter


@pytest.mark.promise(9)
def test_the_counter_only_grows(tpm: SoftwareTpm) -> None:
    host = Host(tpm)
    expected = 1
    for interrupt in (tpm.reset, tpm.power_cut, tpm.power_cut, tpm.reset):
        with host.device() as device:
            assert device.counter() == expected
            assert device.increment() == expected + 1
            assert device.increment() == expected + 2
            assert device.counter() == expected + 2
        expected += 2
        interrupt()


@pytest.mark.promise(9)
def test_a_counter_that_is_gone(tpm: SoftwareTpm) -> None:
    host = Host(tpm)
    tpm.undefine(host.pin.counter_handle)
    with Tpm.open(tpm.tcti) as device, pytest.raises(TpmChanged, match="is gone"):
        device.attach(host.pin)
    assert tpm.loaded() == []


@pytest.mark.promise(9)
def test_a_counter_that_goes_while_the_device_is_open(tpm: SoftwareTpm) -> None:
    host = Host(tpm)
    with host.device() as device:
        tpm.undefine(host.pin.counter_handle)
        with pytest.raises(TpmChanged, match="is gone"):
            device.counter()


@pytest.mark.promise(9)
@pytest.mark.parametrize("written", [False, True])
def test_an_index_of_another_kind_in_its_place(tpm: SoftwareTpm, written: bool) -> None:
    """Something that could be set back: an ordinary index; and a counter that was never incremented."""
    host = Host(tpm)
    tpm.undefine(host.pin.counter_handle)
    ordinary = template.COUNTER_ATTRIBUTES & ~0xF0
    tpm.define(host.pin.counter_handle, ordinary if written else template.COUNTER_ATTRIBUTES)
    with Tpm.open(tpm.tcti) as device, pytest.raises(TpmChanged, match="not the one"):
        device.attach(host.pin)


@pytest.mark.promise(9)
def test_a_counter_defined_anew_does_not_go_back(tpm: SoftwareTpm) -> None:
    """It has the same name, so nothing notices; but it starts above every value there ever was."""
    host = Host(tpm)
    with host.device() as device:
        for _ in range(5):
            device.increment()
        before = device.counter()
    copy = host.seal()
    tpm.undefine(host.pin.counter_handle)
    tpm.define(host.pin.counter_handle, template.COUNTER_ATTRIBUTES)
    tpm.increment(host.pin.counter_handle)
    with host.device() as device:
        assert device.counter() > before
    tpm.reset()
    with pytest.raises(SealRefused, match="the counter is"):
        host.unseal(copy)


def test_each_enrolment_has_a_counter_of_its_own(tpm: SoftwareTpm) -> None:
    first, second = Host(tpm), Host(tpm)
    assert second.pin.counter_handle == first.pin.counter_handle + 1
    assert second.pin.parent_name == first.pin.parent_name
    with second.device() as device:
        device.increment()
        value = device.counter()
    with first.device() as device:
        assert device.counter() < value


def test_a_handle_taken_meanwhile_is_skipped(tpm: SoftwareTpm) -> None:
    """The list of handles is not authenticated, and may be old."""
    first = Host(tpm)
    with TpmProxy(tpm) as proxy:
        empty = bytes.fromhex("8001 00000013 00000000 00 00000001 00000000")
        proxy.replace(Command.GET_CAPABILITY, lambda request: empty)
        assert Host(tpm, proxy.tcti).pin.counter_handle == first.pin.counter_handle + 1


def test_no_handle_left(tpm: SoftwareTpm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counter, "HANDLES", range(counter.FIRST_HANDLE, counter.FIRST_HANDLE + 1))
    Host(tpm)
    with pytest.raises(TpmFailed, match="no free handle"):
        Host(tpm)
    assert tpm.loaded() == []


# --- the storage root key


@pytest.mark.promise(3)
@pytest.mark.parametrize("public", [None, _RSA], ids=["ecc", "rsa"])
def test_the_platforms_own_storage_root_key_is_used(tpm: SoftwareTpm, public: bytes | None) -> None:
    persist(tpm, public)
    host = Host(tpm)
    assert host.pin.parent_handle == PERSISTENT_HANDLE
    with host.device() as device:
        assert device.facts().parent is ParentKind.PERSISTENT
        assert tpm.loaded() == []  # nothing has to be created
    copy = host.seal()
    tpm.reset()
    assert host.use(copy) == FILE_KEY
    tpm.power_cut()
    assert tpm.lockout_counter == 0


def test_a_key_that_protects_nothing_is_not_used(tpm: SoftwareTpm) -> None:
    persist(tpm, _SIGNING)
    host = Host(tpm)
    assert host.pin.parent_handle == 0
    copy = host.seal()
    tpm.reset()
    assert host.unseal(copy) == FILE_KEY


@pytest.mark.promise(2)
def test_a_storage_root_key_that_is_gone(tpm: SoftwareTpm) -> None:
    persist(tpm)
    host = Host(tpm)
    tpm.evict(PERSISTENT_HANDLE)
    with Tpm.open(tpm.tcti) as device, pytest.raises(TpmChanged, match="no storage root key at 0x81000001"):
        device.attach(host.pin)


@pytest.mark.promise(2)
def test_another_storage_root_key_in_its_place(tpm: SoftwareTpm) -> None:
    persist(tpm)
    host = Host(tpm)
    tpm.evict(PERSISTENT_HANDLE)
    persist(tpm, _RSA)
    with Tpm.open(tpm.tcti) as device, pytest.raises(TpmChanged, match="not the one that was pinned"):
        device.attach(host.pin)


def test_a_storage_root_key_made_persistent_later_changes_nothing(tpm: SoftwareTpm) -> None:
    """The pin says how it was found at initialisation; systemd may put one there afterwards."""
    host = Host(tpm)
    copy = host.seal()
    persist(tpm, _RSA)
    tpm.reset()
    assert host.unseal(copy) == FILE_KEY


def test_a_pin_for_another_counter_is_refused(tpm: SoftwareTpm) -> None:
    first, second = Host(tpm), Host(tpm)
    crossed = msgspec.structs.replace(first.pin, counter_handle=second.pin.counter_handle)
    with Tpm.open(tpm.tcti) as device, pytest.raises(TpmChanged, match="counter"):
        device.attach(crossed)


def test_an_owner_password_is_named(tpm: SoftwareTpm) -> None:
    tpm.set_owner_password(b"somebody's")
    with (
        Tpm.open(tpm.tcti, pause=no_pause) as device,
        pytest.raises(TpmFailed, match="authorisation that is not empty"),
    ):
        device.enrol()
