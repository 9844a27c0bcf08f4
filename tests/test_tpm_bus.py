"""Somebody on the bus between CPU and TPM: reads every byte, and changes what it likes."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from rigs.swtpm import SoftwareTpm
from rigs.tpmhost import FILE_KEY, NOW, Host, no_pause, persist
from rigs.tpmproxy import Command, Exchange, TpmProxy, error

from unsealerd.errors import SealRefused, TpmChanged, TpmFailed
from unsealerd.model import LockReason
from unsealerd.tpm import parent
from unsealerd.tpm.device import Tpm
from unsealerd.tpm.esys import Connection, Esys
from unsealerd.tpm.session import Session, Use

_POLICY = 0x126
_FORGED = "does not carry the TPM's HMAC"
_RH_NULL = 0x40000007


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[SoftwareTpm]:
    with SoftwareTpm(tmp_path / "tpm") as running:
        yield running


@pytest.fixture
def proxy(tpm: SoftwareTpm) -> Iterator[TpmProxy]:
    with TpmProxy(tpm) as running:
        yield running


def story(proxy: TpmProxy, tpm: SoftwareTpm) -> list[Exchange]:
    """Everything that passes from the initialisation to the proof of destruction."""
    host = Host(tpm, proxy.tcti)
    copy = host.seal()
    tpm.reset()
    with host.device() as device:
        with device.unseal(copy, NOW) as key:
            assert bytes(key.view) == FILE_KEY
        device.increment()
        device.proof_of_destruction(copy)
    return proxy.exchanges


def shows_the_secret(data: bytes) -> bool:
    """The file key, whole or in 8-byte pieces, raw, reversed or in hexadecimal."""
    pieces = [FILE_KEY[at : at + 8] for at in range(len(FILE_KEY) - 7)]
    forms = [form for piece in pieces for form in (piece, piece[::-1], piece.hex().encode())]
    return any(form in data or form.upper() in data for form in forms)


# --- reading


@pytest.mark.promise(3)
def test_the_bus_shows_no_secret(proxy: TpmProxy, tpm: SoftwareTpm) -> None:
    exchanges = story(proxy, tpm)
    assert {Command.CREATE, Command.UNSEAL} <= {exchange.code for exchange in exchanges}
    assert not shows_the_secret(proxy.capture)


@pytest.mark.promise(3)
def test_without_parameter_encryption_it_would(
    proxy: TpmProxy, tpm: SoftwareTpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the same story, the same search, with the encryption taken out of the sessions."""
    using = Session.using

    def plain(session: Session, use: Use, *, last: bool = False) -> int:
        return using(session, use & ~(Use.DECRYPT | Use.ENCRYPT), last=last)

    monkeypatch.setattr(Session, "using", plain)
    exchanges = story(proxy, tpm)
    (create,) = [exchange for exchange in exchanges if exchange.code == Command.CREATE]
    (unseal,) = [exchange for exchange in exchanges if exchange.code == Command.UNSEAL]
    assert shows_the_secret(create.command)
    assert shows_the_secret(unseal.response)


@pytest.mark.promise(3)
def test_every_session_is_salted_and_encrypts(proxy: TpmProxy, tpm: SoftwareTpm) -> None:
    """Without a salt whoever reads the bus computes the session's keys from what it reads."""
    started = [exchange for exchange in story(proxy, tpm) if exchange.code == Command.START_SESSION]
    assert len(started) >= 6
    for exchange in started:
        key, bind, nonce_size = struct.unpack_from(">IIH", exchange.command, 10)
        assert key != _RH_NULL
        assert bind == _RH_NULL
        (salt_size,) = struct.unpack_from(">H", exchange.command, 20 + nonce_size)
        assert salt_size >= 64  # a P-256 point
        kind_and_algorithms = exchange.command[20 + nonce_size + 2 + salt_size + 1 :]
        assert kind_and_algorithms == bytes.fromhex("0006 0080 0043 000b")  # AES, 128, CFB; SHA-256
    salts = {exchange.command[20:] for exchange in started}
    assert len(salts) == len(started)


# --- forging what is decided on


def set_bytes(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    def change(response: bytes) -> bytes:
        assert response[offset : offset + len(value)] != value
        return response[:offset] + value + response[offset + len(value) :]

    return change


RESPONSE_PARAMETERS = 14  # header (10), size of the parameters (4)
RESET_COUNT = RESPONSE_PARAMETERS + 16
NV_VALUE = RESPONSE_PARAMETERS + 2
LAST_PCR_BYTE = RESPONSE_PARAMETERS + 4 + 10 + 4 + 2 + 31


@pytest.mark.promise(3)
def test_a_forged_reset_count_is_noticed(proxy: TpmProxy, tpm: SoftwareTpm) -> None:
    """A copy sealed at a reset count of somebody's choice would open on a boot of their choice."""
    host = Host(tpm, proxy.tcti)
    proxy.alter(Command.READ_CLOCK, set_bytes(RESET_COUNT, struct.pack(">I", 41)))
    with pytest.raises(TpmFailed, match=_FORGED):
        host.seal()


@pytest.mark.promise(3)
def test_a_forged_pcr_is_noticed(proxy: TpmProxy, tpm: SoftwareTpm) -> None:
    host = Host(tpm, proxy.tcti)
    proxy.alter(Command.PCR_READ, set_bytes(LAST_PCR_BYTE, b"\x01"))
    with pytest.raises(TpmFailed, match=_FORGED):
        host.seal()


@pytest.mark.promise(9)
def test_a_forged_counter_is_noticed(proxy: TpmProxy, tpm: SoftwareTpm) -> None:
    host = Host(tpm, proxy.tcti)
    proxy.alter(Command.NV_READ, set_bytes(NV_VALUE, struct.pack(">Q", 7)))
    with host.device() as device:
        with pytest.raises(TpmFailed, match=_FORGED):
            device.counter()
        assert device.counter() == 1  # and the device goes on


@pytest.mark.promise(9)
@pytest.mark.parametrize("command", [Command.NV_READ, Command.NV_INCREMENT])
def test_a_replayed_answer_is_noticed(proxy: TpmProxy, tpm: SoftwareTpm, command: Command) -> None:
    """The counter that does not count: yesterday's genuine answer, and the TPM never asked."""
    host = Host(tpm, proxy.tcti)
    with host.device() as device:
        device.increment()
        device.counter()
        old = next(e.response for e in reversed(proxy.exchanges) if e.code == command)
        proxy.replace(command, lambda request: old)
        with pytest.raises(TpmFailed, match=_FORGED):
            device.increment()


@pytest.mark.promise(9)
def test_an_answer_without_session_is_noticed(proxy: TpmProxy, tpm: SoftwareTpm) -> None:
    """The HMAC is not forged but left out, with the tag that says so."""
    host = Host(tpm, proxy.tcti)
    value = struct.pack(">HQ", 8, 7)
    for answer in (
        struct.pack(">HII", 0x8001, 20, 0) + value,
        struct.pack(">HIII", 0x8002, 24, 0, 10) + value,
        struct.pack(">HIII", 0x8002, 29, 0, 10) + value + bytes.fromhex("0000 01 0000"),
    ):
        proxy.replace(Command.NV_READ, lambda request, answer=answer: answer)  # type: ignore[misc]
        with host.device() as device, pytest.raises(TpmFailed):
            device.counter()


@pytest.mark.promise(3)
def test_a_changed_secret_is_noticed(proxy: TpmProxy, tpm: SoftwareTpm) -> None:
    """One flipped bit of the ciphertext would be one flipped bit of the file key (CFB)."""
    host = Host(tpm, proxy.tcti)
    copy = host.seal()
    tpm.reset()
    proxy.alter(Command.UNSEAL, lambda r: r[:16] + bytes([r[16] ^ 1]) + r[17:])
    with pytest.raises(TpmFailed, match=_FORGED):
        host.unseal(copy)
    assert host.unseal(copy) == FILE_KEY


# --- forging the refusal, and the consent


@pytest.mark.promise(3)
@pytest.mark.parametrize("command", [Command.POLICY_NV, Command.POLICY_COUNTER_TIMER, Command.POLICY_PCR])
def test_a_lie_about_the_policy_opens_nothing(proxy: TpmProxy, tpm: SoftwareTpm, command: Command) -> None:
    """Each step is declared fulfilled without asking the TPM; its own digest does not follow."""
    host = Host(tpm, proxy.tcti)
    copy = host.seal()
    tpm.reset()
    host.use(copy)
    tpm.reset()
    tpm.extend(7)
    consent = bytes.fromhex("8002 00000013 00000000 00000000 0000 01 0000")  # with an empty password's answer
    proxy.replace(Command.POLICY_NV, lambda request: consent)
    for lie in {Command.POLICY_COUNTER_TIMER, command} - {Command.POLICY_NV}:
        proxy.replace(lie, lambda request: error(0))
    with pytest.raises(SealRefused) as refused:
        host.unseal(copy)
    assert refused.value.reason is LockReason.SEALED_COPY_USED


@pytest.mark.promise(3)
def test_a_forged_refusal_gets_no_reason(proxy: TpmProxy, tpm: SoftwareTpm) -> None:
    """The TPM's own word is that every term holds; so nobody is told that the copy was used."""
    host = Host(tpm, proxy.tcti)
    copy = host.seal()
    tpm.reset()
    proxy.answer(Command.POLICY_NV, _POLICY)
    with pytest.raises(TpmFailed, match="PolicyNV: 0x126"):
        host.unseal(copy)


@pytest.mark.promise(3)
def test_a_forged_refusal_is_no_proof_of_destruction(proxy: TpmProxy, tpm: SoftwareTpm) -> None:
    """Somebody who keeps the counter from moving, and has the proof say what is expected."""
    host = Host(tpm, proxy.tcti)
    copy = host.seal()
    tpm.reset()
    proxy.answer(Command.POLICY_NV, _POLICY)
    with host.device() as device, pytest.raises(TpmFailed):
        device.proof_of_destruction(copy)


# --- standing in for the TPM


def with_another_point(response: bytes) -> bytes:
    """The public area of a P-256 key, in which x and y are those of a key that somebody else has."""
    numbers = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()
    ours = b"\x00\x20" + numbers.x.to_bytes(32, "big") + b"\x00\x20" + numbers.y.to_bytes(32, "big")
    start = response.index(bytes.fromhex("0006 0080 0043 0010 0003 0010")) + 12
    return response[:start] + ours + response[start + len(ours) :]


@pytest.mark.promise(3)
@pytest.mark.parametrize("kind", ["template", "persistent"])
def test_a_key_of_somebody_else_under_the_pinned_name(proxy: TpmProxy, tpm: SoftwareTpm, kind: str) -> None:
    """Sessions salted to it could be read by whoever made it. The TPM's statement of the name is left as it is."""
    if kind == "persistent":
        persist(tpm)
    host = Host(tpm, proxy.tcti)
    copy = host.seal()
    tpm.reset()
    command = Command.CREATE_PRIMARY if kind == "template" else Command.READ_PUBLIC
    proxy.alter(command, with_another_point)
    proxy.forget()
    with pytest.raises((TpmChanged, TpmFailed)), Tpm.open(proxy.tcti, pause=no_pause) as device:
        device.attach(host.pin)
    assert Command.START_SESSION not in proxy.codes  # nothing was encrypted to it
    assert host.unseal(copy) == FILE_KEY


@pytest.mark.promise(3)
def test_a_name_is_computed_from_what_is_used(tpm: SoftwareTpm) -> None:
    """We rely on the library for this: a name stated beside a foreign public area is not believed."""
    host = Host(tpm)
    connection = Connection(tpm.tcti)
    try:
        with Esys(connection) as esys:
            key = parent.attach(esys, host.pin)
            forged = esys.restore(with_another_point(esys.save(key)))
            assert bytes.fromhex(host.pin.parent_name) in esys.save(forged)
            assert esys.name(forged).hex() != host.pin.parent_name
            esys.flush(key)
    finally:
        connection.close()
