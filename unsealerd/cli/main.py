"""The entry point: the table of commands, and the one place where errors become messages and exit codes."""

import gc
import os
import sys
from collections.abc import Sequence

import click

from unsealerd.cli.app import App
from unsealerd.cli.command import Lazy, LazyGroup
from unsealerd.cli.edge import Exit, report
from unsealerd.cli.output import print_json, printable
from unsealerd.cli.stderr import complain, note
from unsealerd.errors import StorageFailed, UnsealerdError

PROGRAM = "unsealctl"
_COMPLETE = "_UNSEALCTL_COMPLETE"
"""In the environment when a shell asks for completions."""
_CLI = "unsealerd.cli"
_GARBAGE = 200_000
"""Objects between two collections: more than a command loads, for nothing of that is garbage; and few enough for `wait`."""

COMMANDS = {
    "init": Lazy(f"{_CLI}.init:init", "Make the keyring, its keys and the host's identity."),
    "status": Lazy(f"{_CLI}.status:status", "Show the state of this host, and what to do next."),
    "identity": Lazy(f"{_CLI}.identity:identity", "Show this host's fingerprint, for operators to compare."),
    "key": Lazy(f"{_CLI}.key:key", "List, show, rotate and revoke keys."),
    "get": Lazy(f"{_CLI}.get:get", "Read the bytes of a key."),
    "sign": Lazy(f"{_CLI}.mac:sign", "Compute the MAC of a message on stdin."),
    "verify": Lazy(f"{_CLI}.mac:verify", "Check the MAC of a message on stdin."),
    "wait": Lazy(f"{_CLI}.wait:wait", "Wait until the host is unlocked."),
    "seal": Lazy(f"{_CLI}.seal:seal", "Seal to the TPM for the next boot."),
    "arm": Lazy(f"{_CLI}.seal:arm", "Seal for a reboot within a time."),
    "disarm": Lazy(f"{_CLI}.seal:disarm", "Destroy the sealed copy."),
    "lock": Lazy(f"{_CLI}.lock:lock", "Wipe the keys from memory, and destroy a sealed copy."),
    "unlock": Lazy(f"{_CLI}.unlock:unlock", "Open a host's backup with an operator's identity."),
    "drill": Lazy(
        f"{_CLI}.drill:drill",
        "Prove that an identity still opens a host's current backup, and change nothing.",
    ),
    "operator": Lazy(
        f"{_CLI}.operator:operator",
        "Read an operator's public key for the configuration, and list the operators of this host.",
    ),
    "reload": Lazy(
        f"{_CLI}.reload:reload",
        "Read the configuration again, and write the backup for the operators that it names now.",
    ),
    "host": Lazy(f"{_CLI}.host:host", "Add, list and remove the hosts that this operator unlocks."),
    "backup": Lazy(f"{_CLI}.backup:backup", "Verify, export and pin the backup."),
    "doctor": Lazy(f"{_CLI}.doctor:doctor", "Check this server before it is relied on."),
    "metrics": Lazy(f"{_CLI}.metrics:metrics", "Print the state of this host as Prometheus metrics."),
    "audit": Lazy(f"{_CLI}.audit:audit", "Show the audit log, oldest records first, and check its chain."),
}


def root() -> click.Command:
    return LazyGroup(
        PROGRAM,
        COMMANDS,
        "HMAC keys that live only in RAM and survive reboots: administer this host, or unlock another.",
    )


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. No error leaves it."""
    app = App()
    try:
        code = _run(app, arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        _abandon_stdout()  # whoever reads it has seen enough
        return Exit.BROKEN_PIPE
    except OSError as err:
        return _output_failed(app, err)
    except (KeyboardInterrupt, EOFError, click.Abort):
        complain("interrupted")
        return Exit.INTERRUPTED
    return code


def _run(app: App, arguments: Sequence[str]) -> int:
    # Not click's own main(): it would end with 1 on a broken pipe, and 1 says that a MAC is not valid.
    command = root()
    try:
        with command.make_context(PROGRAM, list(arguments), obj=app) as context:
            code = command.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as err:
        return _usage(err, as_json=app.json or "--json" in arguments)
    except UnsealerdError as err:
        return report(err, as_json=app.json)
    return code if isinstance(code, int) else Exit.OK


def _usage(error: click.ClickException, *, as_json: bool) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        note(error.format_message())
        return Exit.USAGE
    context = error.ctx if isinstance(error, click.UsageError) else None
    message = printable(error.format_message())
    complain(message, hint=f"{context.command_path if context else PROGRAM} --help")
    if as_json:
        print_json({"error": "BadRequest", "detail": message})
    return Exit.USAGE


def _output_failed(app: App, error: OSError) -> int:
    """A file that no command expected to fail, or stdout itself."""
    try:
        code = report(StorageFailed(f"{error.filename or 'stdout'}: {error.strerror}"), as_json=app.json)
        sys.stdout.flush()
    except OSError:
        _abandon_stdout()
        return Exit.STORED_DATA
    return code


def _abandon_stdout() -> None:
    """Let the interpreter flush what is left into nothing, instead of complaining at its end."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)


def main() -> None:
    """The console script."""
    gc.set_threshold(_GARBAGE)
    if _COMPLETE in os.environ:
        root()(prog_name=PROGRAM)  # click answers the shell, and exits
    if sys.stdin is None or sys.stdout is None:
        complain("stdin or stdout is closed", hint="redirect it from or to /dev/null")
        sys.exit(Exit.USAGE)
    code = run(sys.argv[1:])
    gc.freeze()  # the end of the process frees it all: the interpreter need not look for cycles in it before
    sys.exit(code)
