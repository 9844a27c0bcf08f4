"""The identities that a command line names with ``-i``, and who is asked for their PINs and passphrases."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from unsealerd.cli import terminal
from unsealerd.cli.events import show
from unsealerd.errors import BadRequest

if TYPE_CHECKING:
    from unsealerd.core.age import Identity
    from unsealerd.operator.identities.passphrase import PassphraseOperator
    from unsealerd.operator.prompts import Prompts

PASSPHRASE = "passphrase:"  # noqa: S105 - how a spec begins

IDENTITY_OPTION = click.option(
    "-i",
    "--identity",
    "specs",
    multiple=True,
    metavar="IDENTITY",
    help="piv: or piv:SERIAL or piv:SERIAL/SLOT, openpgp: or openpgp:SERIAL, pkcs11:URI, passphrase:NAME, or a key file"
    " (age-keygen, P-256 in PEM). Can be given more than once.  [default: the cards that are plugged in]",
)
LAST_TRY_OPTION = click.option(
    "--last-try", is_flag=True, help="Use the last try of a PIN: if it is wrong, the card blocks."
)
ASK_PASSWORD_OPTION = click.option(
    "--ask-password",
    is_flag=True,
    help="Ask through systemd-ask-password, as at a boot console; by itself for passphrase: without a terminal.",
)


def identity_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The three options that every command with a private key has."""
    for option in (ASK_PASSWORD_OPTION, LAST_TRY_OPTION, IDENTITY_OPTION):
        command = option(command)
    return command


@contextmanager
def opened(
    specs: Sequence[str], *, last_try: bool, ask_password: bool, wanted: Callable[[], bool]
) -> "Iterator[list[Identity | PassphraseOperator]]":
    """The identities; ``wanted`` says whether an answer is still of use.

    The passphrase of an operator is asked for beforehand when systemd asks for it: somebody comes to a boot console
    when they come, and a session lives for two minutes.
    """
    from unsealerd.operator.identities import open_identities, plugged_in

    unattended = not (sys.stdin.isatty() or terminal.present())
    passphrases = [spec for spec in specs if spec.startswith(PASSPHRASE)]
    with _prompts(
        passphrases, ask_password=ask_password or (unattended and bool(passphrases)), wanted=wanted
    ) as prompts:
        if not specs:
            yield plugged_in(prompts=prompts, on_event=show, last_try=last_try)
            return
        yield [
            identity
            for spec in specs
            for identity in open_identities(spec, prompts=prompts, on_event=show, last_try=last_try)
        ]


@contextmanager
def _prompts(
    passphrases: Sequence[str], *, ask_password: bool, wanted: Callable[[], bool]
) -> "Iterator[Prompts]":
    from unsealerd.cli.prompts import AnsweredPrompts, AskPasswordPrompts, TerminalPrompts

    if not ask_password:
        yield TerminalPrompts()
        return
    asking = AskPasswordPrompts(wanted)
    if not passphrases:
        yield asking
        return
    if len(passphrases) > 1:
        raise BadRequest("systemd-ask-password asks for one passphrase at a time: one passphrase:NAME")
    if not wanted():
        from unsealerd.errors import NotLocked

        raise NotLocked("there is nothing to unlock")
    from unsealerd.core.secret import SecretBuffer

    name = passphrases[0].removeprefix(PASSPHRASE)
    with SecretBuffer.copy_of(asking.passphrase(f"operator {name}")) as passphrase:
        yield AnsweredPrompts(passphrase, asking)
