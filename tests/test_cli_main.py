"""unsealctl as a whole: options, errors, exit codes, and what it costs to start."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs.ctl import Ctl
from rigs.stub_daemon import StubDaemon

from unsealerd import errors
from unsealerd.cli.command import LazyGroup
from unsealerd.cli.edge import ANSWERS, Exit, report
from unsealerd.cli.main import COMMANDS, root
from unsealerd.cli.output import printable
from unsealerd.errors import SealRefused, UnsealerdError
from unsealerd.model import LockReason

DOCUMENT = Path(__file__).parent.parent / "docs" / "unsealctl.md"
NAMES = sorted(
    name
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, UnsealerdError) and value is not UnsealerdError
)


@pytest.fixture
def ctl(tmp_path: Path) -> Ctl:
    return Ctl(tmp_path)


# --- errors


def test_every_error_has_its_exit_code_and_hint() -> None:
    assert sorted(ANSWERS) == NAMES
    for name, answer in ANSWERS.items():
        assert answer.hint == printable(answer.hint), name
        assert answer.code not in (Exit.OK, Exit.NOT_VALID), name


def test_the_document_says_the_same() -> None:
    rows = re.findall(r"^\| (\d+) \| .*? \| (.*?) ?\|$", DOCUMENT.read_text(), re.MULTILINE)
    documented = {int(code): set(re.findall(r"`(\w+)`", names)) for code, names in rows}
    assert documented == {
        code.value: {name for name, answer in ANSWERS.items() if answer.code is code} for code in Exit
    }


@pytest.mark.parametrize("name", NAMES)
def test_an_error_is_one_line_and_a_hint(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = errors.named(name)
    assert kind is not None
    for detail in ("", "why\nnot"):
        error = SealRefused(LockReason.ROLLBACK, detail) if kind is SealRefused else kind(detail)
        assert report(error, as_json=False) == ANSWERS[name].code
        out, err = capsys.readouterr()
        assert not out
        message, hint = err.splitlines()
        assert message.startswith("unsealctl: ")
        assert len(message) > len("unsealctl: ")
        assert hint.startswith("hint: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("nothing",),
        ("key", "nothing"),
        ("key", "show"),
        ("status", "extra"),
        ("status", "--odd"),
        ("seal", "--kind", "poweroff"),
        ("get", "web", "--format", "octal"),
        ("verify", "web"),
        ("arm",),
        ("unlock",),
        ("unlock", "-i", "file"),
        ("drill",),
        ("drill", "host", "--local", "-i", "file"),
        ("operator", "add", "alice"),
        ("operator", "add", "alice", "--piv", "--passphrase"),
        ("operator", "add", "alice", "--key-file", "k", "--slot", "9a"),
        ("operator", "add", "--piv"),
        ("unlock", "host", "--local", "-i", "file"),
        ("--config",),
    ],
)
def test_wrong_usage(ctl: Ctl, arguments: tuple[str, ...]) -> None:
    result = ctl.bare(*arguments).refused(Exit.USAGE)
    assert "--help" in result.err
    ctl.bare("--json", *arguments).refused(Exit.USAGE, "BadRequest")
    ctl("status").refused(Exit.DAEMON_UNREACHABLE)


@pytest.mark.parametrize("arguments", [(), ("key",), ("host",), ("backup",)])
def test_a_noun_alone_shows_its_verbs(ctl: Ctl, arguments: tuple[str, ...]) -> None:
    result = ctl.bare(*arguments)
    assert result.code == Exit.USAGE
    assert "Commands:" in result.err
    assert not result.raw


def test_interrupted(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unsealerd.config.load", interrupt)
    result = ctl("status")
    assert (result.code, result.err) == (Exit.INTERRUPTED, "unsealctl: interrupted\n")


def test_a_reader_that_goes_away_is_not_an_error(ctl: Ctl) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-c", "from unsealerd.cli.main import main; main()", "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (Exit.BROKEN_PIPE, b"")


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_a_full_disk_behind_stdout(ctl: Ctl, option: list[str]) -> None:
    with StubDaemon(ctl.runtime_dir) as daemon, open("/dev/full", "wb") as full:
        daemon.answers["Keys.Sign"] = {"mac": "5c" * 32, "version": 1}
        command = ["--config", str(ctl.config), "sign", "web", *option]
        result = subprocess.run(
            [sys.executable, "-c", "from unsealerd.cli.main import main; main()", *command],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert result.returncode == Exit.STORED_DATA
    message, hint = result.stderr.decode().splitlines()
    assert message == "unsealctl: stdout: No space left on device"
    assert hint.startswith("hint: ")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors(closed: str) -> None:
    code = "from unsealerd.cli.main import main; main()"
    result = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" sign web --config /nonexistent {closed}', sys.executable, code],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert result.returncode in (Exit.USAGE, Exit.CONFIGURATION)
    assert b"Traceback" not in result.stderr
    assert not result.stdout


_WORDS = st.sampled_from(  # all but the one that waits, for ever if not told otherwise
    [
        *(COMMANDS.keys() - {"wait"}),
        "list",
        "show",
        "--json",
        "--config",
        "--format",
        "--mac",
        "-i",
        "--",
        "--for",
        "\ud800",
    ]
)


@pytest.mark.promise(10)
@settings(max_examples=60, deadline=None)
@given(words=st.lists(_WORDS | st.text("a-=é\x1b/.", max_size=6), max_size=5))
def test_any_words_are_answered(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    ctl = Ctl(tmp_path_factory.mktemp("ctl"))
    result = ctl(*words)
    assert result.code in set(Exit)
    assert "\x1b" not in result.err
    assert "Traceback" not in result.err


# --- options


def test_global_options_stand_anywhere(ctl: Ctl) -> None:
    config = str(ctl.config)
    with StubDaemon(ctl.runtime_dir) as daemon:
        daemon.answers["Admin.ListKeys"] = {"keys": []}
        for arguments in (
            ("--config", config, "--json", "key", "list"),
            ("--json", "key", "--config", config, "list"),
            ("key", "list", "--json", "--config", config),
            ("--config", "/nonexistent", "key", "list", "--json", f"--config={config}"),
        ):
            assert ctl.bare(*arguments).json == {"keys": []}


def test_the_overview_says_what_the_commands_say() -> None:
    tree = root()
    assert isinstance(tree, LazyGroup)
    context = click.Context(tree)
    for name, lazy in COMMANDS.items():
        command = tree.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert (command.help or "").partition("\n")[0] == lazy.summary
        assert command.help == printable((command.help or "").replace("\n", "")) or "\n" in (
            command.help or ""
        )


def test_every_command_is_documented() -> None:
    text = DOCUMENT.read_text()
    context = click.Context(root())
    for name in COMMANDS:
        command = root().get_command(context, name)  # type: ignore[attr-defined]
        verbs = command.list_commands(context) if isinstance(command, click.Group) else [""]
        for verb in verbs:
            assert f"`{name} {verb}".rstrip() in text, (name, verb)


# --- start-up


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], {"rich", "msgspec", "cryptography", "grpc", "asyncio", "socket", "unsealerd.config"}),
        (
            ["status"],
            {"rich", "cryptography", "grpc", "asyncio", "unsealerd.cli.unlock", "unsealerd.cli.key"},
        ),
        (["sign", "web"], {"rich", "cryptography", "grpc", "asyncio", "unsealerd.operator"}),
        (["host", "list"], {"cryptography", "grpc", "asyncio", "unsealerd.config", "unsealerd.client"}),
    ],
)
def test_nothing_is_imported_that_is_not_needed(
    arguments: list[str], absent: set[str], tmp_path: Path
) -> None:
    code = "import sys; from unsealerd.cli.main import run; run(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "UNSEALERD_HOSTS": str(tmp_path / "hosts.json")},
    )
    assert not absent & set(result.stderr.splitlines()[-1].split())
