"""unsealerd-notify: the administrator's command and webhook, and what neither the log nor a redirect gives away."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rigs.limits import in_time
from rigs.server import PATIENCE, Server, wait_for
from rigs.watch import Watch
from rigs.webhook import Webhook

from unsealerd.errors import BadMessage
from unsealerd.watch import notify
from unsealerd.watch.event import Event, Letter, decode

SECRET = "T0KEN-in-the-path"
EVENT = Event("locked", "web1", "unexpected_reboot", 1_700_000_000, "0f" * 16)


@pytest.fixture
def webhook(tmp_path: Path) -> Iterator[Webhook]:
    with Webhook(tmp_path) as webhook:
        yield webhook


def run(
    directory: Path, letter: Letter | None, *arguments: str, authority: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The program, with the credential in a directory."""
    if letter is not None:
        (directory / "event").write_text(letter.encode())
    environment = {**os.environ, "CREDENTIALS_DIRECTORY": str(directory)}
    if authority is not None:
        environment["SSL_CERT_FILE"] = str(authority)
    return subprocess.run(
        [sys.executable, "-m", "unsealerd.watch.notify", *(arguments or ("locked",))],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environment,
        check=False,
    )


def call(webhook: Webhook, monkeypatch: pytest.MonkeyPatch, address: str) -> tuple[bool, list[float]]:
    """The webhook, called in this process with no pauses; whether it was told, and the pauses."""
    monkeypatch.setenv("SSL_CERT_FILE", str(webhook.authority))
    pauses: list[float] = []
    return notify.call_webhook(address, Letter(EVENT, (), address), pauses.append), pauses


# --- the webhook


def test_the_webhook_gets_the_facts(webhook: Webhook, tmp_path: Path) -> None:
    done = run(tmp_path, Letter(EVENT, (), webhook.address(f"/{SECRET}?q=1")), authority=webhook.authority)
    assert done.returncode == 0, done.stderr
    ((verb, path, headers, body),) = webhook.requests
    assert (verb, path, headers["Content-Type"]) == ("POST", f"/{SECRET}?q=1", "application/json")
    assert json.loads(body) == {
        "event": "locked",
        "host": "web1",
        "reason": "unexpected_reboot",
        "since": 1_700_000_000,
        "boot_id": "0f" * 16,
        "text": "web1: keys are locked (unexpected_reboot); services wait for an operator: unsealctl unlock",
    }
    assert done.stderr == "webhook=localhost told\n"


def test_it_tries_again(
    webhook: Webhook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    webhook.answers = [500, 503]
    assert call(webhook, monkeypatch, webhook.address("/x")) == (True, [2.0, 4.0])
    webhook.answers = [500, 404, 503, 200]
    assert call(webhook, monkeypatch, webhook.address("/x")) == (False, [2.0, 4.0])
    assert "try=3 error=it answers 503" in caplog.text


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(webhook: Webhook, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Not to http, where anybody reads the event, and not to another place of the server's choice either."""
    with socket.create_server(("127.0.0.1", 0)) as plain:
        plain.setblocking(False)
        for target in (
            f"http://127.0.0.1:{plain.getsockname()[1]}/",
            webhook.address("/elsewhere"),
            "file:///etc/passwd",
        ):
            webhook.requests.clear()
            webhook.answers, webhook.location = [code] * 3, target
            assert call(webhook, monkeypatch, webhook.address("/here"))[0] is False
            assert [path for _, path, _, _ in webhook.requests] == ["/here"] * 3
        with pytest.raises(BlockingIOError):
            plain.accept()


@pytest.mark.parametrize(
    "address",
    [
        "https://user:{secret}@localhost:{port}/",
        "https://localhost:{secret}/",
        "https://localhost:{port}/{secret}\x7f",
        "https://[::{secret}/",
        "https://127.0.0.1:{port}/{secret}",  # not a name of the certificate
        "https://localhost:{closed}/{secret}",
        "http://localhost:{port}/{secret}",
        "file:///{secret}",
    ],
)
def test_an_address_that_cannot_be_reached_stays_out_of_the_log(
    webhook: Webhook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # not listening: refused
        text = address.format(secret=SECRET, port=webhook.port, closed=unused.getsockname()[1])
        assert call(webhook, monkeypatch, text)[0] is False
    assert webhook.requests == []
    assert caplog.text.count("error=") == 3
    assert SECRET not in caplog.text


def test_only_https_is_spoken(tmp_path: Path) -> None:
    """The configuration allows no other; who can write the credential gets no more."""
    (tmp_path / "there").touch()
    with socket.create_server(("127.0.0.1", 0)) as plain:
        plain.setblocking(False)
        for address in (f"http://127.0.0.1:{plain.getsockname()[1]}/", f"file://{tmp_path}/there", "data:,x"):
            assert notify.call_webhook(address, Letter(EVENT, (), address), lambda _: None) is False
        with pytest.raises(BlockingIOError):
            plain.accept()


def test_a_certificate_of_an_unknown_authority_is_refused(webhook: Webhook, tmp_path: Path) -> None:
    letter = Letter(EVENT, (), webhook.address(f"/{SECRET}"))
    assert notify.call_webhook(letter.webhook or "", letter, lambda _: None) is False
    assert webhook.requests == []


# --- the command


def test_the_command_has_the_facts_in_its_environment(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("/bin/sh", "-c", 'env > "$0"; echo "$@" >> "$0"; exit "$1"', str(out))
    done = run(tmp_path, Letter(EVENT, (*command, "0"), None))
    assert done.returncode == 0, done.stderr
    variables = dict(line.split("=", 1) for line in out.read_text().splitlines() if "=" in line)
    assert {
        name: value
        for name, value in variables.items()
        if name.startswith("UNSEALERD_") and name not in os.environ
    } == {
        "UNSEALERD_EVENT": "locked",
        "UNSEALERD_HOST": "web1",
        "UNSEALERD_REASON": "unexpected_reboot",
        "UNSEALERD_SINCE": "1700000000",
        "UNSEALERD_BOOT_ID": "0f" * 16,
        "UNSEALERD_TEXT": EVENT.sentence(),
    }
    assert "CREDENTIALS_DIRECTORY" not in variables
    assert run(tmp_path, Letter(EVENT, (*command, "3"), None)).returncode == notify.EX_FAILED


def test_a_command_that_fails_does_not_keep_the_webhook_from_being_told(
    webhook: Webhook, tmp_path: Path
) -> None:
    letter = Letter(EVENT, ("/nonexistent",), webhook.address("/"))
    done = run(tmp_path, letter, authority=webhook.authority)
    assert done.returncode == notify.EX_FAILED
    assert "command=/nonexistent error=No such file or directory" in done.stderr
    assert len(webhook.requests) == 1


def test_a_command_that_hangs_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file = tmp_path / "pid"
    script = f"sleep 1000 & echo $! > {pid_file}; wait"

    def hang(seconds: float) -> int:
        """The child, which has to be there before the command's time is up."""
        monkeypatch.setattr(notify, "COMMAND_SECONDS", seconds)
        assert notify.run_command(Letter(EVENT, ("/bin/sh", "-c", script), None)) is False
        assert pid_file.exists()
        assert pid_file.read_text().endswith("\n")
        return int(pid_file.read_text())

    pid = in_time(hang, (0.3, 3.0, 30.0))

    def gone() -> bool:
        try:
            return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True

    wait_for(gone, "the end of the child")


# --- the credential


def test_without_its_credential_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, None)
    assert (done.returncode, done.stderr) == (
        1,
        "error=NotInitialised detail=the credential 'event': No such file or directory\n",
    )
    (tmp_path / "event").write_bytes(b"\xff" + SECRET.encode())
    done = run(tmp_path, None)
    assert (done.returncode, done.stderr) == (1, "error=BadMessage detail=the event is not JSON\n")
    done = run(tmp_path, Letter(EVENT, (), None), "unlocked-3")
    assert (done.returncode, done.stderr) == (
        1,
        "error=BadMessage detail=the event is locked, not unlocked\n",
    )
    for name in ("other", "locked-", "locked-x", "locked-1-2", "relocked-1", "locked-1.service"):
        done = run(tmp_path, None, name)
        assert done.returncode == notify.EX_USAGE
        assert done.stderr.startswith("usage: ")


@given(
    st.builds(
        Letter,
        st.builds(
            Event,
            st.sampled_from(["locked", "unlocked"]),
            st.text(),
            st.none() | st.text(),
            st.integers(),
            st.text(),
        ),
        st.lists(st.text()).map(tuple),
        st.none() | st.text(),
    )
)
def test_letter_round_trip(letter: Letter) -> None:
    assert decode(letter.encode().encode()) == letter
    assert repr(letter) == repr(dataclasses.replace(letter, webhook=SECRET))


@given(
    st.binary() | st.builds(json.dumps, st.dictionaries(st.text(), st.integers() | st.text())).map(str.encode)
)
def test_only_a_letter_is_one(data: bytes) -> None:
    with pytest.raises(BadMessage) as refused:
        decode(data)
    assert refused.value.__cause__ is None


# --- all of it


def test_from_the_lock_of_a_host_to_the_webhook(webhook: Webhook) -> None:
    """systemctl stands for systemd: it runs the program with the credential that the unit names."""
    with Server(tpm=False) as server:
        server.tables = f'[notify]\nwebhook = "{webhook.address("/hook")}"\ncommand = ["/bin/true"]\n'
        server.configure()
        server.start()
        server.ctl("init")
        environment = {"SSL_CERT_FILE": str(webhook.authority)}
        with Watch(server.config, server.base, environment) as watch:
            credentials = server.base / "credentials"
            credentials.mkdir()
            watch.systemctl(
                extra=f'cp "{watch.memory}/event-locked-1.json" "{credentials}/event" && '
                f'CREDENTIALS_DIRECTORY="{credentials}" "{sys.executable}" -m unsealerd.watch.notify locked-1'
            )
            watch.hears("state")
            server.ctl("lock")
            wait_for(lambda: len(webhook.requests) == 1, "the webhook")
            facts = json.loads(webhook.requests[0][3])
            assert (facts["event"], facts["reason"]) == ("locked", "locked_by_admin")
            assert facts["since"] == server.status()["since"]
