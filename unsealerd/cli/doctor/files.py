"""Permissions: of the configuration, of what is at rest, and of the sockets."""

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unsealerd.cli.doctor.finding import Finding, fail, ok, problems_or, warn
from unsealerd.cli.doctor.subject import Answers, Subject

_OTHERS_WRITE = 0o022  # group and others
_OTHERS_ALL = 0o077


@dataclass(frozen=True, slots=True)
class _Rule:
    """A path, the permission bits that it must not have, and its kind. ``needed``: it must be there."""

    path: Path
    forbidden: int
    what: str
    needed: bool = True
    kind: int = stat.S_IFREG


def check(subject: Subject) -> Iterator[Finding]:
    yield from problems_or(
        _configuration(subject), ok("configuration", f"{subject.config_path} is read, and root's")
    )
    state = subject.config.daemon.state_dir
    initialised = isinstance(subject.answers, Answers) and subject.answers.state != "uninitialised"
    at_rest = [
        _Rule(state, 0o066, "state directory", kind=stat.S_IFDIR),
        _Rule(state / "keyring.age", _OTHERS_ALL, "backup", needed=initialised),
        _Rule(state / "keyring.age.previous", _OTHERS_ALL, "previous backup", needed=False),
        _Rule(state / "sealed.json", _OTHERS_ALL, "sealed copy", needed=False),
        _Rule(
            state / "tpm.json",
            _OTHERS_ALL,
            "pin of the TPM",
            needed=initialised and subject.config.tpm.tcti is not None,
        ),
        _Rule(state / "audit.jsonl", _OTHERS_ALL, "audit log"),
        _Rule(state / "gateway", _OTHERS_ALL, "gateway's directory", needed=initialised, kind=stat.S_IFDIR),
        _Rule(state / "gateway" / "tls.key", _OTHERS_ALL, "gateway's TLS key", needed=initialised),
        _Rule(state / "gateway" / "tls.crt", _OTHERS_WRITE, "gateway's certificate", needed=initialised),
    ]
    yield from problems_or(
        _violations(at_rest, "files"), ok("files", f"{state}: nobody else reads or writes it")
    )
    yield from problems_or(
        _parents(state), ok("way to the files", "only root and the daemon can replace them")
    )
    if isinstance(subject.answers, Answers):
        run = subject.config.daemon.runtime_dir
        sockets = [
            _Rule(run, _OTHERS_WRITE, "runtime directory", kind=stat.S_IFDIR),
            _Rule(run / "admin", _OTHERS_ALL, "administrator's socket", kind=stat.S_IFSOCK),
            _Rule(run / "unlock", 0o007, "gateway's socket", kind=stat.S_IFSOCK),
            _Rule(run / "keys", 0, "services' socket", kind=stat.S_IFSOCK),
        ]
        yield from problems_or(
            _violations(sockets, "sockets"), ok("sockets", f"{run}: admin, unlock and keys")
        )


def _configuration(subject: Subject) -> Iterator[Finding]:
    path = subject.config_path
    found = path.stat()
    if found.st_uid != 0:
        yield fail("configuration", f"{path} belongs to user {found.st_uid}", f"chown root: {path}")
    if found.st_mode & _OTHERS_WRITE:
        yield fail("configuration", f"{path} can be written by others than root", f"chmod go-w {path}")
    if subject.config.notify.webhook is not None and found.st_mode & 0o004:
        yield warn(
            "configuration", f"{path} is readable by everybody, and has a webhook", f"chmod o-r {path}"
        )


def _violations(rules: list[_Rule], check: str) -> Iterator[Finding]:
    for rule in rules:
        try:
            found = rule.path.lstat()
        except OSError as err:
            if rule.needed:
                yield fail(
                    check,
                    f"{rule.what}: {rule.path}: {err.strerror}",
                    "`journalctl -u unsealerd`; is the disk mounted?",
                )
            continue
        if stat.S_IFMT(found.st_mode) != rule.kind:
            yield fail(check, f"{rule.what}: {rule.path} is something else", "find out who put it there")
        elif found.st_mode & rule.forbidden:
            right = stat.S_IMODE(found.st_mode) & ~rule.forbidden
            yield fail(
                check,
                f"{rule.what}: {rule.path} has mode {stat.S_IMODE(found.st_mode):04o}",
                f"chmod {right:04o} {rule.path}",
            )


def _parents(state: Path) -> Iterator[Finding]:
    """Who may rename a directory may put another one in its place."""
    for directory in state.parents:
        try:
            found = directory.stat()
        except OSError:
            continue
        if found.st_mode & _OTHERS_WRITE and not found.st_mode & stat.S_ISVTX:
            yield fail(
                "way to the files",
                f"{directory} can be written by others than root",
                f"chmod go-w {directory}",
            )
