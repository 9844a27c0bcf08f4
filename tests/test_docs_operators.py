"""The operator's guide: every command in it is one that exists, with options that exist; every configuration is one."""

import importlib.machinery
import importlib.util
import re
import shlex
import subprocess
from pathlib import Path
from types import ModuleType

import click
import pytest

from unsealerd import config
from unsealerd.cli.app import App
from unsealerd.cli.candidate import MIN_PASSPHRASE
from unsealerd.cli.main import root
from unsealerd.core import passphrase

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs" / "operators.md"
TEXT = GUIDE.read_text()


def commands(program: str) -> list[list[str]]:
    """The indented lines that begin with this program, without their comments."""
    lines = [line.strip() for line in TEXT.splitlines() if line.startswith(f"    {program} ")]
    assert lines
    return [shlex.split(line, comments=True)[1:] for line in lines]


def parse(command: click.Command, arguments: list[str], parent: click.Context) -> None:
    """As far as the command line goes: nothing runs."""
    if isinstance(command, click.Group):
        name, found, rest = command.resolve_command(parent, arguments)
        assert found is not None
        assert name is not None
        parse(found, rest, click.Context(found, parent=parent, info_name=name, obj=App()))
    else:
        command.parse_args(parent, list(arguments))


@pytest.mark.parametrize("arguments", commands("unsealctl"), ids=" ".join)
def test_unsealctl_takes_it(arguments: list[str]) -> None:
    parse(root(), arguments, click.Context(root(), info_name="unsealctl", obj=App()))


def test_a_command_that_is_not_there_is_noticed() -> None:
    for arguments in (["operators", "add"], ["drill", "web1", "--odd"], ["operator", "add", "--piv"]):
        with pytest.raises(click.UsageError):
            parse(root(), arguments, click.Context(root(), info_name="unsealctl", obj=App()))


def recover() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("recover", str(ROOT / "scripts" / "recover"))
    spec = importlib.util.spec_from_loader("recover", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["recover"] = module  # where its dataclasses look for it
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("arguments", commands("recover"), ids=" ".join)
def test_recover_takes_it(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if ">" in arguments:
        arguments = arguments[: arguments.index(">")]
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    recover().arguments().parse_args(arguments)


@pytest.mark.parametrize(
    ("program", "overview"), [("yubico-piv-tool", ("--full-help",)), ("pkcs11-tool", ("--help",))]
)
def test_other_programs_have_these_options(program: str, overview: tuple[str, ...]) -> None:
    known = subprocess.run([program, *overview], capture_output=True, text=True, check=False, timeout=60)
    options = set(re.findall(r"--[a-z][a-z0-9-]*", known.stdout + known.stderr))
    for arguments in commands(program):
        for argument in arguments:
            if argument.startswith("--"):
                assert argument.partition("=")[0] in options, argument


def test_yubico_piv_tool_has_these_values() -> None:
    known = subprocess.run(
        ["yubico-piv-tool", "--full-help"], capture_output=True, text=True, check=True
    ).stdout
    for arguments in commands("yubico-piv-tool"):
        for argument in arguments:
            option, _, value = argument.partition("=")
            if option in ("--action", "--slot", "--algorithm", "--pin-policy", "--touch-policy"):
                assert f'"{value}"' in known, argument


@pytest.mark.parametrize("block", re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL))
def test_configurations_are_valid(block: str) -> None:
    assert config.parse(block.encode()).operators


def test_numbers_are_those_of_the_program() -> None:
    assert f"less than {passphrase.MIN_MEMORY >> 10}\nMiB and two passes" in TEXT
    assert passphrase.MIN_PASSES == 2
    parameters = passphrase.Parameters.make()
    assert f"{parameters.memory >> 10} MiB, {parameters.passes} passes, {parameters.lanes} lanes" in TEXT
    assert len("one two six word") >= MIN_PASSPHRASE


def test_every_link_within_leads_somewhere() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    }
    targets = re.findall(r"\]\(#([^)]+)\)", TEXT)
    assert targets
    assert set(targets) <= headings
    for other in re.findall(r"\]\(([a-z-]+\.md)", TEXT):
        assert (GUIDE.parent / other).exists()
    elsewhere = (GUIDE.parent / "configuration.md").read_text()
    assert set(re.findall(r"operators\.md#([a-z-]+)", elsewhere)) <= headings
