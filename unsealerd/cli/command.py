"""Commands and groups of commands that take the global options before and after their own name."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import click

from unsealerd import __version__
from unsealerd.cli.app import App
from unsealerd.cli.output import print_json, print_line


def _set_config(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.ensure_object(App).config_path = Path(value)


def _set_json(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(App).json = True


def _show_version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        if context.ensure_object(App).json:
            print_json({"version": __version__})
        else:
            print_line(f"{context.info_name} {__version__}")
        context.exit()


def _version_option() -> click.Option:
    return click.Option(
        ["--version"],
        is_flag=True,
        expose_value=False,
        callback=_show_version,
        help="Show the version and exit.",
    )


def _global_options() -> list[click.Parameter]:
    return [
        click.Option(
            ["--config"],
            metavar="FILE",
            expose_value=False,
            callback=_set_config,
            help="The configuration.  [default: /etc/unsealerd/unsealerd.toml]",
        ),
        click.Option(
            ["--json"],
            is_flag=True,
            is_eager=True,  # known before anything is printed
            expose_value=False,
            callback=_set_json,
            help="Print one JSON object.",
        ),
    ]


class Command(click.Command):
    """A command that takes the global options too."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = super().get_params(ctx)
        return [*own[:-1], *_global_options(), *own[-1:]]  # the last is --help


class Group(click.Group):
    """A noun with its verbs, all in one file."""

    command_class = Command

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = super().get_params(ctx)
        return [*own[:-1], *_global_options(), *own[-1:]]


class Lazy(NamedTuple):
    """Where a command is, and its line in the overview: known without importing its file."""

    place: str
    summary: str


class LazyGroup(Group):
    """The top of the tree: imports the file of the command that is used, and no other."""

    def __init__(self, name: str, table: Mapping[str, Lazy], help: str) -> None:
        super().__init__(
            name, help=help, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}
        )
        self._table = table

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        inherited = super().get_params(ctx)
        return [*inherited[:-1], _version_option(), *inherited[-1:]]

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        lazy = self._table.get(cmd_name)
        if lazy is None:
            return None
        module, _, attribute = lazy.place.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.summary) for name, lazy in self._table.items()])
