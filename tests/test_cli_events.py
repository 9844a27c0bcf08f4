"""What an operator sees on stderr while a private key is used."""

from pathlib import Path

import pytest
from rigs.ctl import Ctl
from rigs.stub_daemon import StubDaemon

from unsealerd.cli import terminal
from unsealerd.cli.events import show, showing
from unsealerd.cli.prompts import AskPasswordPrompts, TerminalPrompts, pin_question
from unsealerd.errors import BadRequest, PinCancelled
from unsealerd.operator.events import Event, Exchanging, KeyFileExposed, PinPadUsed, TlsOnly, TouchNeeded
from unsealerd.operator.prompts import PinRequest

DEVICE = "YubiKey 5 12345678, PIV slot 9D"


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (TouchNeeded(DEVICE), f"touch the device if it blinks: {DEVICE}"),
        (PinPadUsed(DEVICE, 3), f"enter the PIN at the reader: {DEVICE} (3 tries left)"),
        (PinPadUsed(DEVICE, 1), f"enter the PIN at the reader: {DEVICE} (1 try left)"),
        (PinPadUsed(DEVICE, None), f"enter the PIN at the reader: {DEVICE}"),
        (Exchanging("age1x"), "answering as age1x"),
        (TlsOnly("web1"), "warning: web1 has no TPM attestation: it is trusted by its TLS key only"),
        (
            KeyFileExposed(Path("k"), 0o644),
            "warning: k can be read by others (mode 0644): chmod 600",
        ),
    ],
)
def test_each_event_is_one_line(event: Event, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    show(event)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"{line}\n")


def test_who_is_asked_twice_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    shown = showing()
    for event in (
        Exchanging("age1x"),
        TouchNeeded(DEVICE),
        Exchanging("age1x"),
        TouchNeeded(DEVICE),
        Exchanging("age1y"),
    ):
        shown(event)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("answering")] == [
        "answering as age1x",
        "answering as age1y",
    ]
    assert len(lines) == 4


def test_a_device_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for event in (TouchNeeded("\x1b[2J"), PinPadUsed("\x1b[2J", 3), Exchanging("\x1b[2J")):
        show(event)
    assert "\x1b" not in capsys.readouterr().err
    assert "\x1b" not in pin_question(PinRequest("\x1b[2J", 3))


def test_the_question_names_the_device_and_the_tries() -> None:
    assert pin_question(PinRequest(DEVICE, 3)) == f"PIN of {DEVICE} (3 tries left)"
    assert pin_question(PinRequest(DEVICE, 1)) == f"PIN of {DEVICE} (this is the last try)"
    assert pin_question(PinRequest(DEVICE, None)) == f"PIN of {DEVICE}"


def test_without_a_terminal_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_question: str) -> str:
        raise BadRequest("there is no terminal to ask on")

    monkeypatch.setattr(terminal, "ask_secret", nobody)
    with pytest.raises(PinCancelled, match="no terminal"):
        TerminalPrompts().pin(PinRequest(DEVICE, 3))
    with pytest.raises(PinCancelled, match="no terminal"):
        TerminalPrompts().passphrase("operator alice")


def test_a_pin_can_be_asked_for_by_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The question is the same; what is printed is the answer, without its line end."""
    program = tmp_path / "systemd-ask-password"
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" >{tmp_path}/asked\necho 123456\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert AskPasswordPrompts().pin(PinRequest(DEVICE, 2)) == b"123456"
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[0] == "--id=unsealerd:pin"
    assert "--timeout=0" in asked
    assert asked[-1] == f"PIN of {DEVICE} (2 tries left):"
    program.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(PinCancelled):
        AskPasswordPrompts().pin(PinRequest(DEVICE, 2))


def test_one_passphrase_at_a_time_by_systemd(tmp_path: Path) -> None:
    ctl = Ctl(tmp_path)
    with StubDaemon(ctl.runtime_dir) as daemon:
        daemon.answers["Unlock.GetStatus"] = {"state": "locked"}
        arguments = ("unlock", "--local", "-i", "passphrase:a", "-i", "passphrase:b", "--ask-password")
        ctl(*arguments, "--json").refused(2, "BadRequest")
        daemon.answers["Unlock.GetStatus"] = {"state": "unlocked"}
        ctl(*arguments[:4], "--ask-password", "--json").refused(9, "NotLocked")
