"""Keys on PKCS#11 tokens, on SoftHSM2. What OpenSC's spy module writes down is what the token was asked."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from rigs.person import Person
from rigs.softhsm import MODULE, PIN, SoftHsm

from unsealerd.core.age import P256Identity, P256TagRecipient
from unsealerd.core.blinding import Blinding
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import (
    BadPoint,
    BadRequest,
    CardMissing,
    CardRemoved,
    NotInstalled,
    PinCancelled,
    PinWrong,
    UnsealerdError,
    WrongCard,
)
from unsealerd.model import Curve
from unsealerd.operator.identities import pkcs11
from unsealerd.operator.identities.pkcs11 import Pkcs11Identity

pytestmark = pytest.mark.xdist_group("softhsm")
(SPY,) = Path("/usr/lib").glob("*/pkcs11-spy.so")
ID = b"\x03"
HOSTILE = {
    "empty": b"",
    "identity": b"\0",
    "off the curve": b"\x04" + bytes(31) + b"\1" + bytes(32),
    "compressed": b"\x02" + bytes.fromhex("6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296"),
    "too short": b"\x04" + bytes(63),
    "too long": b"\x04" + bytes(65),
    "x25519": b"\x09" + bytes(31),
}


def sec1(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def taken(buffer: SecretBuffer) -> bytes:
    with buffer:
        return bytes(buffer.view)


@pytest.fixture(scope="module")
def key() -> ec.EllipticCurvePrivateKey:
    return new_key()


@pytest.fixture(scope="module")
def hsm(tmp_path_factory: pytest.TempPathFactory, key: ec.EllipticCurvePrivateKey) -> SoftHsm:
    hsm = SoftHsm.make(tmp_path_factory.mktemp("softhsm") / "hsm")
    hsm.add_token("ops")
    hsm.add_key("ops", "unlock", ID, key)
    return hsm


@pytest.fixture(autouse=True)
def configured(hsm: SoftHsm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTHSM2_CONF", str(hsm.config))


def find(uri: str, person: Person) -> Pkcs11Identity:
    (identity,) = pkcs11.find(uri, prompts=person, on_event=person.see)
    return identity


@pytest.fixture
def person() -> Person:
    return Person(PIN)


@pytest.fixture
def identity(hsm: SoftHsm, person: Person) -> Pkcs11Identity:
    return find(hsm.uri(token="ops", object="unlock"), person)


# --- it is right


def test_the_public_key_is_read_without_a_pin(
    identity: Pkcs11Identity, person: Person, key: ec.EllipticCurvePrivateKey
) -> None:
    assert isinstance(identity.recipient, P256TagRecipient)
    assert identity.recipient.uncompressed == sec1(key)
    assert re.fullmatch(r"ops, serial [0-9a-f]{16}, key unlock", identity.device)
    assert person.asked == []


def test_200_exchanges_agree_with_software(
    identity: Pkcs11Identity, person: Person, key: ec.EllipticCurvePrivateKey
) -> None:
    software = P256Identity(key)
    for _ in range(200):
        session = Blinding.draw(Curve.P256, sec1(new_key()))
        answer = taken(identity.exchange(session.point))
        assert answer == taken(software.exchange(session.point))
        taken(session.unblind(answer))
    assert len(person.asked) == 200
    assert {each.device for each in person.asked} == {identity.device}


def test_leading_zeros_of_x_are_kept(identity: Pkcs11Identity, key: ec.EllipticCurvePrivateKey) -> None:
    software = P256Identity(key)
    for _ in range(2):
        points = iter(lambda: sec1(new_key()), b"")
        point = next(point for point in points if taken(software.exchange(point))[0] == 0)
        assert taken(identity.exchange(point)) == taken(software.exchange(point))


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"token": "ops"},
        {"object": "unlock"},
        {"id": "%03"},
        {"model": "SoftHSM%20v2", "manufacturer": "SoftHSM%20project", "type": "private"},
    ],
)
def test_a_key_is_found_by_what_it_is_called(
    hsm: SoftHsm, person: Person, attributes: dict[str, str], identity: Pkcs11Identity
) -> None:
    assert find(hsm.uri(**attributes), person).recipient == identity.recipient


def test_without_a_module_p11_kit_has_the_token(person: Person, identity: Pkcs11Identity) -> None:
    found = find("pkcs11:token=ops", person)
    assert found.recipient == identity.recipient
    point = sec1(new_key())
    assert taken(found.exchange(point)) == taken(identity.exchange(point))


# --- what is not there


@pytest.mark.parametrize(
    ("attributes", "error"),
    [
        ({"token": "other"}, CardMissing),
        ({"serial": "0"}, CardMissing),
        ({"slot_id": "1"}, CardMissing),
        ({"token": "ops", "object": "other"}, WrongCard),
        ({"token": "ops", "id": "%04"}, WrongCard),
    ],
)
def test_what_is_not_there_is_named(
    hsm: SoftHsm, person: Person, attributes: dict[str, str], error: type[UnsealerdError]
) -> None:
    with pytest.raises(error):
        find(hsm.uri(**attributes), person)


def test_a_module_that_is_not_there_is_named(person: Person, tmp_path: Path) -> None:
    not_a_library = tmp_path / "x.so"
    not_a_library.write_bytes(b"\x7fELF")
    for query in ("module-path=/nowhere/x.so", f"module-path={not_a_library}", "module-name=nowhere"):
        with pytest.raises(NotInstalled, match="PKCS#11 module"):
            find(f"pkcs11:?{query}", person)


def test_a_library_that_is_no_module_is_named(person: Person) -> None:
    with pytest.raises(NotInstalled, match="PKCS#11 module"):
        find("pkcs11:?module-name=c", person)


def test_a_missing_library_says_what_to_install(
    hsm: SoftHsm, person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pkcs11", None)
    with pytest.raises(NotInstalled, match=r"unsealerd\[pkcs11\]"):
        find(hsm.uri(), person)


def test_a_bad_uri_is_refused_before_anything_is_loaded(person: Person) -> None:
    with pytest.raises(BadRequest):
        find("pkcs11:?module-path=relative.so", person)


def test_the_library_is_loaded_only_when_it_is_used() -> None:
    code = (
        "import sys, unsealerd.operator, unsealerd.operator.identities.pkcs11, unsealerd.cli.main;"
        "sys.exit(' '.join(sorted({'pkcs11', 'smartcard', 'asn1crypto'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.stderr.strip() == b""


def test_no_reader_and_no_token_is_named(tmp_path: Path) -> None:
    """OpenSC without a PC/SC service; in a process of its own, since libpcsclite reads the name of the service once."""
    code = (
        "from unsealerd.errors import ReaderMissing\n"
        "from unsealerd.operator.identities import pkcs11\n"
        "try: pkcs11.find('pkcs11:?module-name=opensc-pkcs11', prompts=None, on_event=print)\n"
        "except ReaderMissing as err: print(err)"
    )
    nobody = {"PCSCLITE_CSOCK_NAME": str(tmp_path / "nobody"), "OPENSC_CONF": "/dev/null"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | nobody, capture_output=True, check=True
    )
    assert done.stdout.strip() == b"the PKCS#11 module has neither a token nor a reader"


def test_a_token_that_is_gone_is_named(
    identity: Pkcs11Identity, person: Person, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOFTHSM2_CONF", str(SoftHsm.make(tmp_path / "other").config))
    with pytest.raises(CardRemoved):
        identity.exchange(sec1(new_key()))
    assert person.asked == []


# --- the PIN


def test_a_wrong_pin_is_named_and_the_next_one_counts(identity: Pkcs11Identity, person: Person) -> None:
    person.pins = [b"000000", PIN, b"000000", PIN]
    point = sec1(new_key())
    for _ in range(2):
        with pytest.raises(PinWrong):
            identity.exchange(point)
        taken(identity.exchange(point))
    # The token says of itself that a wrong one was entered; SoftHSM2 then keeps the flag until the next login.
    assert [each.device for each in person.asked][0::2] == [identity.device] * 2


@pytest.mark.parametrize(("typed", "error"), [(None, PinCancelled), (b"", PinCancelled), (b"\xff", PinWrong)])
def test_a_pin_that_is_none_is_not_tried(
    identity: Pkcs11Identity, person: Person, typed: bytes | None, error: type[UnsealerdError]
) -> None:
    person.pins = typed
    with pytest.raises(error):
        identity.exchange(sec1(new_key()))
    assert len(person.asked) == 1


def test_no_pin_is_in_logs_or_errors(
    identity: Pkcs11Identity,
    person: Person,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.NOTSET)
    person.pins = [b"424242", PIN]
    with pytest.raises(PinWrong) as caught:
        identity.exchange(sec1(new_key()))
    taken(identity.exchange(sec1(new_key())))
    written = caplog.text + "".join(capfd.readouterr()) + repr(caught.value) + repr(caught.value.__cause__)
    written = written.replace(identity.device, "")  # its serial number is random
    assert "424242" not in written
    assert PIN.decode() not in written


# --- what the token is asked


@pytest.fixture(scope="module")
def spy_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The spy opens its file once in a process, when it is loaded."""
    path = tmp_path_factory.mktemp("spy") / "calls.txt"
    path.touch()
    return path


@pytest.fixture
def spied(spy_output: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The names of the functions that were called, since the last time."""
    monkeypatch.setenv("PKCS11SPY", MODULE)
    monkeypatch.setenv("PKCS11SPY_OUTPUT", str(spy_output))

    def calls() -> list[str]:
        names = re.findall(r"^\d+: (C_\w+)$", spy_output.read_text(errors="replace"), re.MULTILINE)
        spy_output.write_text("")
        return names

    return calls


def spied_identity(person: Person) -> Pkcs11Identity:
    return find(f"pkcs11:token=ops?module-path={SPY}", person)


def test_one_session_closed_and_no_derived_key_left(spied: Callable[[], list[str]], person: Person) -> None:
    identity = spied_identity(person)
    looked = spied()
    assert looked.count("C_OpenSession") == looked.count("C_CloseSession") == 1
    assert not {"C_Login", "C_DeriveKey"} & set(looked)
    taken(identity.exchange(sec1(new_key())))
    asked = spied()
    once = [
        "C_OpenSession",
        "C_Login",
        "C_DeriveKey",
        "C_DestroyObject",
        "C_Logout",
        "C_CloseSession",
        "C_Finalize",
    ]
    assert [name for name in asked if name in once] == once


def test_the_derived_key_is_destroyed_even_if_it_is_no_x(
    spied: Callable[[], list[str]], person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = spied_identity(person)
    spied()

    def refuse(answer: bytes, device: str) -> SecretBuffer:
        raise WrongCard(device)

    monkeypatch.setattr(pkcs11, "x_of", refuse)
    with pytest.raises(WrongCard):
        identity.exchange(sec1(new_key()))
    ends = ["C_DestroyObject", "C_Logout", "C_CloseSession", "C_Finalize"]
    assert [name for name in spied() if name in ends] == ends


def test_after_a_wrong_pin_nothing_stays_open(spied: Callable[[], list[str]], person: Person) -> None:
    identity = spied_identity(person)
    spied()
    person.pins = b"000000"
    with pytest.raises(PinWrong):
        identity.exchange(sec1(new_key()))
    assert spied()[-1] == "C_Finalize"


@pytest.mark.parametrize("point", HOSTILE.values(), ids=list(HOSTILE))
def test_the_token_never_sees_a_hostile_point(
    spied: Callable[[], list[str]], person: Person, point: bytes
) -> None:
    identity = spied_identity(person)
    assert "C_FindObjects" in spied()
    with pytest.raises(BadPoint):
        identity.exchange(point)
    assert spied() == []
    assert person.asked == []


# --- other tokens and keys


@pytest.fixture
def crowded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: ec.EllipticCurvePrivateKey) -> SoftHsm:
    """Two tokens; keys of other kinds beside the right one."""
    hsm = SoftHsm.make(tmp_path / "crowded")
    hsm.add_token("first")
    hsm.add_token("second")
    hsm.add_key("first", "unlock", ID, key)
    hsm.tool("first", "--keypairgen", "--key-type", "EC:secp384r1", "--id", "04", "--label", "large")
    hsm.tool("first", "--keypairgen", "--key-type", "rsa:2048", "--id", "05", "--label", "old")
    hsm.add_key("second", "unlock", ID, new_key())
    monkeypatch.setenv("SOFTHSM2_CONF", str(hsm.config))
    return hsm


def test_keys_of_other_kinds_and_tokens(
    crowded: SoftHsm, person: Person, key: ec.EllipticCurvePrivateKey
) -> None:
    both = pkcs11.find(crowded.uri(), prompts=person, on_event=person.see)
    assert len({str(each.recipient) for each in both}) == 2
    identity = find(crowded.uri(token="first"), person)
    assert isinstance(identity.recipient, P256TagRecipient)
    assert identity.recipient.uncompressed == sec1(key)
    point = sec1(new_key())
    assert taken(identity.exchange(point)) == taken(P256Identity(key).exchange(point))
    # Another key in its place, under the same name, is noticed before it is used.
    crowded.tool("first", "--delete-object", "--type", "privkey", "--id", "03")
    with pytest.raises(WrongCard, match="no private key"):
        identity.exchange(point)
    crowded.tool("first", "--delete-object", "--type", "pubkey", "--id", "03")
    crowded.add_key("first", "unlock", ID, new_key())
    with pytest.raises(WrongCard, match="another key"):
        identity.exchange(point)


def test_a_key_that_must_not_derive_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, person: Person
) -> None:
    hsm = SoftHsm.make(tmp_path / "signing")
    hsm.add_token("ops")
    hsm.tool("ops", "--keypairgen", "--key-type", "EC:prime256v1", "--id", "03", "--usage-sign")
    monkeypatch.setenv("SOFTHSM2_CONF", str(hsm.config))
    with pytest.raises(WrongCard, match="must not derive"):
        find(hsm.uri(token="ops"), person).exchange(sec1(new_key()))


def test_a_public_key_behind_the_pin_costs_one_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, person: Person, key: ec.EllipticCurvePrivateKey
) -> None:
    hsm = SoftHsm.make(tmp_path / "hidden")
    hsm.add_token("ops")
    hsm.add_token("empty")
    hsm.add_key("ops", "unlock", ID, key, "--private")
    monkeypatch.setenv("SOFTHSM2_CONF", str(hsm.config))
    # Of several tokens none is asked: nobody said which.
    with pytest.raises(WrongCard):
        find(hsm.uri(), person)
    assert person.asked == []
    identity = find(hsm.uri(token="ops"), person)
    assert len(person.asked) == 1
    point = sec1(new_key())
    assert taken(identity.exchange(point)) == taken(P256Identity(key).exchange(point))
