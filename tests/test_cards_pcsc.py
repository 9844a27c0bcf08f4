"""Cards through the true stack: pyscard, pcscd, a reader's driver. Every fault has its own name."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rigs.card_client import other_program
from rigs.desk import Desk
from rigs.pcscd import READER
from rigs.person import Person
from rigs.pivcard import PIN, PivCard
from rigs.server import wait_for
from smartcard import scard

import unsealerd
from unsealerd.core.age import P256Identity
from unsealerd.errors import (
    AccessDenied,
    CardBusy,
    CardFailed,
    CardMissing,
    CardRemoved,
    CardReset,
    NotInstalled,
    ReaderMissing,
    UnsealerdError,
)
from unsealerd.operator.cards import pcsc
from unsealerd.operator.cards.apdu import Card, Command, send
from unsealerd.operator.identities import piv

pytestmark = pytest.mark.xdist_group("pcsc")

SHARING_VIOLATION = "8010000B"
SELECT = bytes.fromhex("00a4040005a00000030800")
VERIFY = bytes.fromhex("0020008008") + PIN + b"\xff\xff"


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    with Desk() as desk:
        yield desk


@pytest.fixture
def card(desk: Desk) -> PivCard:
    return desk.place(PivCard())


def point() -> bytes:
    from cryptography.hazmat.primitives.asymmetric import ec

    return P256Identity(ec.generate_private_key(ec.SECP256R1())).recipient.uncompressed


def agreement(at: bytes) -> bytes:
    return bytes.fromhex("008711") + b"\x9d\x47\x7c\x45\x82\x00\x85\x41" + at + b"\x00"


def select(card: Card) -> int:
    return send(card, Command(0, 0xA4, 4, 0, bytes.fromhex("A000000308"), answers=True)).status


# --- what is there


def test_readers_and_cards_are_found(desk: Desk, card: PivCard) -> None:
    assert pcsc.readers_with_cards() == (READER,)
    assert pcsc.use(READER, select) == 0x9000


def test_no_card(desk: Desk, card: PivCard) -> None:
    identity = desk.identity()
    desk.remove()
    with pytest.raises(CardMissing, match="any reader"):
        pcsc.readers_with_cards()
    with pytest.raises(CardMissing, match="Virtual PCD 00 00: there is no card"):
        identity.exchange(point())
    with pytest.raises(ReaderMissing, match="not there"):
        pcsc.use("Another Reader 00 00", select)


def test_no_service(desk: Desk) -> None:
    with desk.service.away():
        with pytest.raises(ReaderMissing, match="service does not run"):
            pcsc.readers_with_cards()
        with pytest.raises(ReaderMissing):
            piv.find(None, prompts=Person(), on_event=lambda event: None)


def test_the_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "smartcard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "smartcard", None)
    with pytest.raises(NotInstalled, match=r"unsealerd\[piv\]"):
        piv.find(None, prompts=Person(), on_event=lambda event: None)


def test_no_module_of_the_operator_loads_the_library_before_a_card_is_used() -> None:
    code = (
        "import sys, unsealerd.operator, unsealerd.operator.unlock, unsealerd.operator.identities.piv\n"
        "import unsealerd.operator.cards.pcsc, unsealerd.operator.cards.attestation\n"
        "found = {name for name in sys.modules if name.split('.')[0] == 'smartcard' or name == 'cryptography.x509'}\n"
        "sys.exit(f'loaded: {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_file_names_the_library() -> None:
    package = Path(unsealerd.__file__).parent
    named = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if "smartcard" in file.read_text()
    }
    assert named == {"operator/cards/pcsc.py"}


# --- faults in the middle


def test_the_card_is_pulled_out_in_the_middle(desk: Desk, card: PivCard) -> None:
    identity = desk.identity()
    card.remove_at = 0x87
    with pytest.raises(CardRemoved, match="pulled out"):
        identity.exchange(point())


def test_the_card_is_pulled_out_before_the_pin(desk: Desk, card: PivCard) -> None:
    person = Person(PIN)
    identity = desk.identity(person)
    card.remove_at = 0xA4
    with pytest.raises(CardRemoved):
        identity.exchange(point())
    assert person.asked == []


@pytest.mark.parametrize("ins", [0xA4, 0x20, 0x87])
def test_the_service_is_killed_in_the_middle(desk: Desk, ins: int) -> None:
    card = desk.place(PivCard())
    identity = desk.identity()

    def kill(apdu: bytes) -> None:
        if apdu[1] == ins:
            card.before = None
            desk.service.kill()

    card.before = kill
    try:
        with pytest.raises(ReaderMissing):
            identity.exchange(point())
        with pytest.raises(ReaderMissing):
            identity.exchange(point())
    finally:
        desk.service.restart()
    desk.place(card)
    identity.exchange(point()).close()


def failing(call: str, code: int, monkeypatch: pytest.MonkeyPatch, *, times: int = 1_000) -> None:
    """The library's function gives this code so many times, then it works again."""
    real = getattr(scard, call)
    left = [times]

    def function(*arguments: object) -> object:
        if left[0]:
            left[0] -= 1
            return (code, []) if call == "SCardTransmit" else (code, 0, 0)
        return real(*arguments)

    monkeypatch.setattr(scard, call, function)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (scard.SCARD_W_REMOVED_CARD, CardRemoved),
        (scard.SCARD_W_UNRESPONSIVE_CARD, CardFailed),
        (scard.SCARD_W_UNPOWERED_CARD, CardFailed),
        (scard.SCARD_E_READER_UNAVAILABLE, ReaderMissing),
        (scard.SCARD_E_UNKNOWN_READER, ReaderMissing),
        (scard.SCARD_E_NO_SERVICE, ReaderMissing),
        (scard.SCARD_E_SERVICE_STOPPED, ReaderMissing),
        (scard.SCARD_E_INVALID_HANDLE, ReaderMissing),
        (scard.SCARD_W_RESET_CARD, CardReset),
        (scard.SCARD_W_SECURITY_VIOLATION, AccessDenied),
        (scard.SCARD_E_NO_MEMORY, CardFailed),
        (
            scard.SCARD_W_RESET_CARD - (1 << 32),
            CardReset,
        ),  # with its sign, as some builds of the library give it
    ],
)
@pytest.mark.usefixtures("card")
def test_what_the_service_may_say_has_a_name(
    monkeypatch: pytest.MonkeyPatch, code: int, error: type[UnsealerdError]
) -> None:
    failing("SCardTransmit", code, monkeypatch)
    with pytest.raises(error, match="Virtual PCD"):
        pcsc.use(READER, select)
    monkeypatch.undo()
    assert pcsc.use(READER, select) == 0x9000


@pytest.mark.parametrize(
    ("state", "error"),
    [
        (scard.SCARD_STATE_EMPTY, CardRemoved),
        (scard.SCARD_STATE_UNKNOWN, ReaderMissing),
        (scard.SCARD_STATE_UNAVAILABLE, ReaderMissing),
    ],
)
@pytest.mark.usefixtures("card")
def test_a_failed_exchange_is_explained_by_what_became_of_the_reader(
    monkeypatch: pytest.MonkeyPatch, state: int, error: type[UnsealerdError]
) -> None:
    failing("SCardTransmit", scard.SCARD_E_NOT_TRANSACTED, monkeypatch)
    monkeypatch.setattr(scard, "SCardGetStatusChange", lambda *_: (0, [(READER, state, [])]))
    with pytest.raises(error, match="Virtual PCD"):
        pcsc.use(READER, select)


@pytest.mark.usefixtures("card")
def test_a_failed_exchange_with_everything_in_place_is_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    failing("SCardTransmit", scard.SCARD_E_NOT_TRANSACTED, monkeypatch)
    with pytest.raises(CardFailed, match="does not answer"):
        pcsc.use(READER, select)


def test_a_reset_card_is_taken_up_again_from_the_beginning(
    desk: Desk, card: PivCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was told before the reset, it has forgotten: also the PIN, which nobody has kept.

    pcsc-lite lets nobody reset a card that is used exclusively; other services do, and a machine that slept. So it is
    played here: every command is refused until the program connects again.
    """
    person = Person(PIN)
    identity = desk.identity(person)
    transmit, reconnect = scard.SCardTransmit, scard.SCardReconnect
    state = {"resets": 0, "refuses": False}

    def refusing(handle: int, header: int, apdu: list[int]) -> tuple[int, list[int]]:
        if apdu[1] == 0x87 and not state["resets"]:
            state.update(resets=1, refuses=True)
            card.reset()
        if state["refuses"]:
            return scard.SCARD_W_RESET_CARD, []
        answer: tuple[int, list[int]] = transmit(handle, header, apdu)
        return answer

    def reconnected(*arguments: int) -> tuple[int, int]:
        assert arguments[1] == scard.SCARD_SHARE_EXCLUSIVE
        state["refuses"] = False
        answer: tuple[int, int] = reconnect(*arguments)
        return answer

    monkeypatch.setattr(scard, "SCardTransmit", refusing)
    monkeypatch.setattr(scard, "SCardReconnect", reconnected)
    at = point()
    assert identity.exchange(at) == P256Identity(card.key).exchange(at)
    assert (len(person.asked), card.seen.pins) == (2, 2)


@pytest.mark.usefixtures("card")
def test_a_card_that_is_reset_again_is_given_up(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    person = Person(PIN)
    identity = desk.identity(person)
    failing("SCardTransmit", scard.SCARD_W_RESET_CARD, monkeypatch, times=2)
    with pytest.raises(CardReset):
        identity.exchange(point())
    assert person.asked == []


# --- the card belongs to one program at a time


@pytest.mark.parametrize("mode", ["shared", "exclusive"])
def test_a_card_that_another_program_uses_is_busy(desk: Desk, card: PivCard, mode: str) -> None:
    """As GnuPG's scdaemon does, which never lets go of a card by itself."""
    person = Person(PIN)
    identity = desk.identity(person)
    with other_program(READER, mode) as lines:
        assert lines == ["00000000"]
        with pytest.raises(CardBusy, match="another program"):
            identity.exchange(point())
        with pytest.raises(CardBusy):
            desk.identity()
    assert person.asked == []
    identity.exchange(point()).close()


def test_in_a_shared_connection_anybody_can_use_the_pin(desk: Desk, card: PivCard) -> None:
    """The control of the next test: this is why the connection is exclusive."""
    with (
        other_program(READER, "shared", SELECT, VERIFY) as verified,
        other_program(READER, "shared", agreement(point())) as thief,
    ):
        assert verified[-1] == "9000"
        assert thief[1].endswith("9000")
        assert len(card.seen.points) == 1


@pytest.mark.promise(5)
def test_no_other_program_can_use_a_verified_pin(desk: Desk, card: PivCard) -> None:
    """Tried in the very moment when the PIN is verified, and right after."""
    identity = desk.identity()
    thieves: list[list[str]] = []

    def steal(apdu: bytes) -> None:
        if apdu[1] == 0x87 and card.verified:
            card.before = None
            for mode in ("shared", "exclusive", "direct"):
                with other_program(READER, mode, agreement(point())) as lines:
                    thieves.append(lines)

    card.before = steal
    identity.exchange(point()).close()
    assert thieves == [[SHARING_VIOLATION]] * 3
    assert len(card.seen.points) == 1
    assert not card.verified
    # The reset has also deselected the application: the command is not even known.
    with other_program(READER, "shared", agreement(point()), SELECT, agreement(point())) as lines:
        assert [line[-4:] for line in lines[1:]] == ["6d00", "9000", "6982"]


@pytest.mark.promise(5)
def test_the_pin_dies_with_the_program_that_asked_for_it(desk: Desk, card: PivCard) -> None:
    """Killed between VERIFY and the answer to the key agreement."""
    reached, go_on = threading.Event(), threading.Event()

    def stop_there(apdu: bytes) -> None:
        if apdu[1] == 0x87:
            reached.set()
            go_on.wait(60)

    code = (
        "import sys; from rigs.person import Person; from unsealerd.operator.identities import piv\n"
        "(it,) = piv.find(None, prompts=Person(b'123456'), on_event=print)\n"
        "it.exchange(bytes.fromhex(sys.argv[1]))"
    )
    card.before = stop_there
    with subprocess.Popen([sys.executable, "-c", code, point().hex()], cwd="tests") as victim:
        assert reached.wait(60)
        assert card.verified
        victim.kill()
        victim.wait()
    go_on.set()
    wait_for(lambda: not card.verified, "the reset of the card")


def test_the_card_is_reset_whatever_happens(card: PivCard) -> None:
    def broken(_card: Card) -> None:
        raise RuntimeError("something else")

    pcsc.use(READER, select)
    before = card.seen.resets
    with pytest.raises(RuntimeError):
        pcsc.use(READER, broken)
    assert card.seen.resets > before
