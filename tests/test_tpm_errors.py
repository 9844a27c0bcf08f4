"""A TPM that is not there, is not the one, is busy, or breaks: each with its own error, and nothing left behind."""

import importlib.util
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rigs.swtpm import SoftwareTpm
from rigs.tpmhost import FILE_KEY, NOW, Host, no_pause
from rigs.tpmproxy import Command, TpmProxy, error

from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import (
    ConfigInvalid,
    NotInstalled,
    SealRefused,
    TpmFailed,
    TpmLockout,
    TpmMissing,
    UnsealerdError,
)
from unsealerd.model import LockReason
from unsealerd.tpm.device import Tpm
from unsealerd.tpm.facts import ParentKind

RETRY, YIELDED, TESTING = 0x922, 0x908, 0x90A
NV_RATE, NV_UNAVAILABLE, PCR_CHANGED = 0x920, 0x923, 0x128
LOCKOUT, FAILURE, INITIALIZE = 0x921, 0x101, 0x100
OBJECT_MEMORY, SESSION_MEMORY, REFERENCE_H0, REFERENCE_S0 = 0x902, 0x903, 0x910, 0x918

UNSEAL_PATH = (
    Command.CREATE_PRIMARY,
    Command.NV_READ_PUBLIC,
    Command.START_SESSION,
    Command.POLICY_NV,
    Command.POLICY_COUNTER_TIMER,
    Command.POLICY_PCR,
    Command.LOAD,
    Command.UNSEAL,
    Command.FLUSH,
)


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[SoftwareTpm]:
    with SoftwareTpm(tmp_path / "tpm") as running:
        yield running


@pytest.fixture
def proxy(tpm: SoftwareTpm) -> Iterator[TpmProxy]:
    with TpmProxy(tpm) as running:
        yield running


@pytest.fixture
def host(tpm: SoftwareTpm, proxy: TpmProxy) -> Host:
    return Host(tpm, proxy.tcti)


# --- nothing there


@pytest.mark.promise(10)
def test_no_socket_is_no_tpm(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TpmMissing, match="No such file"):
        Tpm.open(f"swtpm:path={tmp_path / 'nothing'}")
    with pytest.raises(TpmMissing, match="No such file"):
        Tpm.open(f"device:{tmp_path / 'nothing'}")
    assert capfd.readouterr().err == ""


@pytest.mark.promise(10)
def test_a_socket_where_nobody_listens_is_no_tpm(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as once:
        once.bind(str(path))
    with pytest.raises(TpmMissing), Tpm.open(f"swtpm:path={path}") as device:
        device.attach(host.pin)


@pytest.mark.promise(10)
def test_a_file_is_no_tpm(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    for tcti in (f"device:{path}", f"swtpm:path={path}", f"device:{tmp_path}"):
        with pytest.raises(TpmMissing, match="neither a device nor a socket"):
            Tpm.open(tcti)


@pytest.mark.promise(10)
def test_a_device_that_is_no_tpm_is_no_tpm(host: Host) -> None:
    with pytest.raises((TpmMissing, TpmFailed)), Tpm.open("device:/dev/null") as device:
        device.attach(host.pin)


@pytest.mark.parametrize("tcti", ["", "none", "device", "device:", "swtpm:port=2321", "mssim:", "libx.so:y"])
def test_a_text_that_names_no_tpm(tcti: str) -> None:
    with pytest.raises(ConfigInvalid, match="not a TPM"):
        Tpm.open(tcti)


def test_without_the_library(tpm: SoftwareTpm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tpm2_pytss._libtpm2_pytss", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotInstalled, match="tpm2-pytss"):
        Tpm.open(tpm.tcti)


def test_the_library_is_shared_with_whoever_imports_the_package(tpm: SoftwareTpm) -> None:
    program = (
        "import sys\n"
        "from unsealerd.tpm.device import Tpm\n"
        f"Tpm.open({tpm.tcti!r}).close()\n"
        "assert 'tpm2_pytss' not in sys.modules and 'cryptography.x509' not in sys.modules\n"
        "ours = sys.modules['tpm2_pytss._libtpm2_pytss']\n"
        "from tpm2_pytss import ESAPI\n"
        "from tpm2_pytss import _libtpm2_pytss as theirs\n"
        "assert ours is theirs\n"
        f"with ESAPI({tpm.tcti!r}) as esapi: assert len(esapi.get_random(8)) == 8\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# --- a TPM that is busy


@pytest.mark.promise(10)
@pytest.mark.parametrize("command", UNSEAL_PATH)
@pytest.mark.parametrize("code", [RETRY, NV_RATE])
def test_a_passing_refusal_is_retried(host: Host, proxy: TpmProxy, command: Command, code: int) -> None:
    """`RETRY` is cured by the library itself, `NV_RATE` by us, in a new session."""
    copy = host.seal()
    host.tpm.reset()
    proxy.answer(command, code, times=2)
    with host.device() as device:
        with device.unseal(copy, NOW) as key:
            assert bytes(key.view) == FILE_KEY
        device.counter()  # whatever a failed flush left is cleared away by the next call
        proxy.clear()
    assert host.tpm.loaded() == []


@pytest.mark.promise(10)
@pytest.mark.parametrize("code", [YIELDED, TESTING, NV_UNAVAILABLE, PCR_CHANGED, REFERENCE_S0, REFERENCE_H0])
def test_every_passing_refusal_is_retried(host: Host, proxy: TpmProxy, code: int) -> None:
    copy = host.seal()
    host.tpm.reset()
    proxy.answer(Command.UNSEAL, code, times=1)
    assert host.unseal(copy) == FILE_KEY


@pytest.mark.promise(10)
@pytest.mark.parametrize("code", [RETRY, NV_RATE, OBJECT_MEMORY, REFERENCE_H0])
def test_retries_end(host: Host, proxy: TpmProxy, code: int) -> None:
    copy = host.seal()
    host.tpm.reset()
    pauses: list[float] = []
    proxy.answer(Command.UNSEAL, code, times=None)
    with Tpm.open(host.tcti, pause=pauses.append) as device:
        device.attach(host.pin)
        proxy.forget()
        with pytest.raises(TpmFailed, match=f"0x{code:x}"):
            device.unseal(copy, NOW)
        tries = proxy.codes.count(Command.UNSEAL)
        assert tries <= 25
        assert proxy.codes.count(Command.START_SESSION) == 5  # a new session each time
        assert pauses == [0.02, 0.04, 0.08, 0.16]
        proxy.clear()
        with device.unseal(copy, NOW) as key:
            assert bytes(key.view) == FILE_KEY


@pytest.mark.promise(9)
@pytest.mark.parametrize("executed", [False, True])
def test_a_retried_increment_adds_exactly_one(host: Host, proxy: TpmProxy, executed: bool) -> None:
    """Also if the TPM did it and its answer was lost: two would make the backup look old."""
    proxy.answer(Command.NV_INCREMENT, NV_RATE, times=1, executed=executed)
    with host.device() as device:
        before = device.counter()
        assert device.increment() == before + 1
        assert device.counter() == before + 1


# --- a TPM that refuses or breaks


@pytest.mark.promise(10)
@pytest.mark.parametrize("command", UNSEAL_PATH)
@pytest.mark.parametrize(
    ("code", "expected"), [(LOCKOUT, TpmLockout), (FAILURE, TpmFailed), (INITIALIZE, TpmFailed)]
)
def test_each_refusal_has_its_error(
    host: Host, proxy: TpmProxy, command: Command, code: int, expected: type[UnsealerdError]
) -> None:
    copy = host.seal()
    host.tpm.reset()
    proxy.answer(command, code)
    with pytest.raises(expected, match=f"0x{code:x}"):
        host.unseal(copy)
    assert host.unseal(copy) == FILE_KEY


@pytest.mark.promise(10)
@pytest.mark.parametrize("executed", [False, True])
@pytest.mark.parametrize("command", UNSEAL_PATH)
def test_a_connection_that_breaks_is_a_missing_tpm(
    host: Host, proxy: TpmProxy, command: Command, executed: bool
) -> None:
    copy = host.seal()
    host.tpm.reset()
    with Tpm.open(host.tcti, pause=no_pause) as device:
        proxy.drop(command, executed=executed)
        with pytest.raises(TpmMissing, match="broke"):
            device.attach(host.pin)
            device.unseal(copy, NOW)
        device.attach(host.pin)
        with device.unseal(copy, NOW) as key:  # the same object goes on
            assert bytes(key.view) == FILE_KEY
    assert host.tpm.loaded() == []


@pytest.mark.promise(10)
def test_a_tpm_that_dies_is_missing_and_comes_back(host: Host) -> None:
    with Tpm.open(host.tpm.tcti, pause=no_pause) as device:
        device.attach(host.pin)
        value = device.counter()
        host.tpm.kill()
        for _ in range(2):
            with pytest.raises(TpmMissing):
                device.counter()
        host.tpm.start()
        assert device.counter() == value


@pytest.mark.promise(10)
def test_a_tpm_that_was_reset_under_us(host: Host) -> None:
    """The storage root key from the template went with the reset: it is created again."""
    with host.device() as device:
        value = device.counter()
        host.tpm.reset()
        assert device.counter() == value


@pytest.mark.promise(10)
@pytest.mark.parametrize(
    "answer",
    [
        b"\x80\x01\x00\x00\x00\x0a\x00\x00\x00\x00",  # success, and nothing more
        b"\x80\x02\x00\x00\x00\x0a\x00\x00\x00\x00",
        b"\x80\x02\x00\x00\x00\x0e\x00\x00\x00\x00\xff\xff\xff\xff",
        b"\x80\x02\x00\x00\x00\x13\x00\x00\x00\x00\x00\x00\x00\x04\x00\x02\xab\xcd\x00",
        b"\xff" * 10,
        b"\x00" * 10,
        error(0xFFFFFFFF),
        error(0x00000001),
        error(0x000000BF),
        error(0x000A000A),  # a TPM that speaks with the library's voice
        error(0x0007001B),
    ],
)
@pytest.mark.parametrize("command", [c for c in UNSEAL_PATH if c is not Command.FLUSH])
def test_any_answer_is_answered(
    host: Host, proxy: TpmProxy, command: Command, answer: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = host.seal()
    host.tpm.reset()
    proxy.replace(command, lambda request: answer, times=None)
    with pytest.raises(UnsealerdError) as caught:
        host.unseal(copy)
    proxy.clear()
    assert not isinstance(caught.value, SealRefused) or caught.value.reason in (
        LockReason.SEALED_COPY_DAMAGED,
        LockReason.TPM_CHANGED,
    )
    assert host.unseal(copy) == FILE_KEY
    assert capfd.readouterr().err == ""


# --- nothing is left behind


@pytest.mark.promise(10)
def test_fifty_refusals_leave_room_in_the_tpm(host: Host) -> None:
    copy = host.seal()
    with Tpm.open(host.tpm.tcti, pause=no_pause) as device:
        device.attach(host.pin)
        attached = host.tpm.loaded()
        assert len(attached) == 1  # the storage root key from the template
        for _ in range(50):
            with pytest.raises(SealRefused):
                device.unseal(copy, NOW)
            assert host.tpm.loaded() == attached
    assert host.tpm.loaded() == []


@pytest.mark.promise(10)
@pytest.mark.parametrize("command", [Command.POLICY_PCR, Command.LOAD, Command.UNSEAL, Command.NV_INCREMENT])
def test_failures_in_the_middle_leave_nothing_loaded(host: Host, proxy: TpmProxy, command: Command) -> None:
    copy = host.seal()
    host.tpm.reset()
    with host.device() as device:
        attached = host.tpm.loaded()
        for _ in range(5):
            proxy.answer(command, FAILURE)
            with pytest.raises(TpmFailed):
                device.unseal(copy, NOW).close()
                device.increment()
            assert host.tpm.loaded() == attached


@pytest.mark.promise(10)
def test_what_killed_predecessors_left_is_cleared_away(host: Host) -> None:
    """Without a resource manager the objects of a killed process stay in the TPM, which has three places."""
    for _ in range(3):
        abandoned = Tpm.open(host.tpm.tcti)
        abandoned.attach(host.pin)
        abandoned._anchors = None  # as if killed: it closes without flushing
        abandoned.close()
    assert len(host.tpm.loaded()) == 3
    with host.device() as device:
        assert device.counter() == 1
    assert host.tpm.loaded() == []


def test_failed_enrolments_leave_no_counter_and_no_object(host: Host, proxy: TpmProxy) -> None:
    proxy.answer(Command.NV_READ, FAILURE)
    with Tpm.open(proxy.tcti) as device:
        with pytest.raises(TpmFailed):
            device.enrol()
        assert host.tpm.loaded() == []
        assert device.enrol().counter_handle == host.pin.counter_handle + 1


def test_close_twice_and_after_the_tpm_went(host: Host) -> None:
    device = Tpm.open(host.tpm.tcti)
    device.attach(host.pin)
    host.tpm.kill()
    device.close()
    device.close()


# --- facts


def test_facts(host: Host) -> None:
    host.tpm.reset()
    with Tpm.open(host.tcti) as device:
        facts = device.facts()
        assert (facts.manufacturer, facts.reset_count, facts.restart_count) == ("IBM", 2, 0)
        assert (facts.lockout_counter, facts.in_lockout) == (0, False)
        assert facts.parent is ParentKind.TEMPLATE
        assert facts.firmware.count(".") == 3
        assert facts.clock >= 0
        host.tpm.extend(7)
        values = device.pcrs([7, 0])
    assert list(values) == [0, 7]
    assert values[0] == bytes(32)
    assert values[7] not in (bytes(32), values[0])


def test_the_secret_of_an_unseal_is_in_secret_memory(host: Host) -> None:
    copy = host.seal()
    host.tpm.reset()
    with host.device() as device, device.unseal(copy, NOW) as key:
        assert isinstance(key, SecretBuffer)
        assert len(key) == 16
