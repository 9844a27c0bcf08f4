"""``unsealctl init``: the keyring, its keys and the host's TLS identity."""

import pwd
from pathlib import Path

import click

from unsealerd import keyringid
from unsealerd.cli.app import App
from unsealerd.cli.backup import id_file, write_id
from unsealerd.cli.command import Command
from unsealerd.cli.fields import required, texts
from unsealerd.cli.identity import show_fingerprint
from unsealerd.cli.output import print_json, print_line
from unsealerd.cli.stderr import note
from unsealerd.errors import ConfigInvalid, UnsealerdError

GATEWAY_USER = "unsealerd-gateway"


@click.command(cls=Command)
@click.pass_obj
def init(app: App) -> None:
    """Make the keyring, its keys and the host's identity.

    Once for each host, as root, with the daemon running and at least one operator in the configuration.
    """
    state_dir = app.config().daemon.state_dir
    # The identity before the keyring: if the second step fails, init can be run again; the other way round
    # it could not.
    with app.admin() as admin:
        digest = _identity(state_dir / "gateway")
        answer = admin.call("io.unsealerd.Admin.Init")
    generation, keys = required(answer, "generation", int), texts(answer, "keys")
    keyring = required(answer, "keyring", str)
    _pin(id_file(app), keyring)
    if app.json:
        from unsealerd.core.words import fingerprint_words

        print_json(
            {
                "generation": generation,
                "keys": keys,
                "keyring": keyring,
                "fingerprint": digest.hex(),
                "words": list(fingerprint_words(digest)),
            }
        )
        return
    print_line(f"initialised: generation {generation}, {len(keys)} key{'s' if len(keys) != 1 else ''} made")
    for name in keys:
        print_line(f"  {name}")
    print_line(f"the id of the keyring, for the label of its backup: {keyring}")
    print_line("this host's fingerprint, for the operators to compare at `unsealctl host add`:")
    show_fingerprint(digest)
    print_line()
    print_line("what to do next:")
    print_line("  start unsealerd-gateway                      operators can reach this host")
    print_line("  unsealctl host add NAME HOST:PORT            on each operator's machine; compare the words")
    print_line("  unsealctl backup export FILE                 keep a copy of the backup off this machine")


def _pin(file: Path, keyring: str) -> None:
    """Say where the daemon cannot write which keyring is this host's.

    The keyring is there whatever becomes of this: an error would only say that nothing was made.
    """
    try:
        if (before := keyringid.read(file)) not in (None, keyring):
            raise ConfigInvalid(f"{file} names the keyring {before}")
        write_id(file, keyring)
    except UnsealerdError as err:
        note(f"warning: which keyring is this host's could not be written down: {err.detail}")
        note("hint: when that is mended: unsealctl backup pin")


def _identity(directory: Path) -> bytes:
    """The fingerprint of the gateway's TLS key, which is made if there is none."""
    from unsealerd.core.tlskey import fingerprint
    from unsealerd.errors import AlreadyInitialised
    from unsealerd.gateway import identity

    try:
        return identity.create(directory, _gateway_owner())
    except AlreadyInitialised:
        return fingerprint(identity.load_certificate(directory))


def _gateway_owner() -> tuple[int, int] | None:
    try:
        user = pwd.getpwnam(GATEWAY_USER)
    except KeyError:
        return None  # as on a developer's machine, where everything runs as one user
    return user.pw_uid, user.pw_gid
