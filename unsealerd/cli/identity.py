"""``unsealctl identity``: what operators compare before they trust this host."""

import click

from unsealerd.cli.app import App
from unsealerd.cli.command import Command
from unsealerd.cli.output import print_json, print_line


@click.command(cls=Command)
@click.pass_obj
def identity(app: App) -> None:
    """Show this host's fingerprint, for operators to compare.

    `unsealctl host add` shows the same words on the operator's machine.
    """
    from unsealerd.core.tlskey import fingerprint
    from unsealerd.core.words import fingerprint_words
    from unsealerd.gateway.identity import load_certificate

    digest = fingerprint(load_certificate(app.config().daemon.state_dir / "gateway"))
    if app.json:
        print_json({"fingerprint": digest.hex(), "words": list(fingerprint_words(digest))})
    else:
        show_fingerprint(digest)


def show_fingerprint(digest: bytes) -> None:
    """The words on one line, the SHA-256 of the public key on the next."""
    from unsealerd.core.words import fingerprint_words

    print_line(f"  words        {' '.join(fingerprint_words(digest))}")
    print_line(f"  fingerprint  {digest.hex()}")
