"""Permissions: of the configuration, of what is at rest, and of the sockets."""

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unsealerd import keyringid
from unsealerd.cli.doctor.finding import Finding, fail, ok, problems_or, warn
from unsealerd.cli.doctor.subject import Answers, Subject
from unsealerd.cli.init import GATEWAY_USER

_OTHERS_WRITE = 0o022  # group and others
_OTHERS_ALL = 0o077
DAEMON_GROUP = "unsealerd"


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
        [
            *_owned(subject.config_path),
            *_owned(gateway_file(subject)),
            *_owned(keyringid.beside(subject.config_path)),
            *_readable(subject),
        ],
        ok("configuration", f"{subject.config_path} is read, and root's"),
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
        *(_Rule(path, _OTHERS_ALL, "audit log") for path in sorted(state.glob("audit-*.jsonl"))),
        _Rule(state / "gateway", _OTHERS_ALL, "gateway's directory", needed=initialised, kind=stat.S_IFDIR),
        _Rule(state / "gateway" / "tls.key", _OTHERS_ALL, "gateway's TLS key", needed=initialised),
        _Rule(state / "gateway" / "tls.crt", _OTHERS_WRITE, "gateway's certificate", needed=initialised),
    ]
    yield from problems_or(
        _violations(at_rest, "files"), ok("files", f"{state}: nobody else reads or writes it")
    )
    yield from problems_or(
        _parents(state, subject.config_path),
        ok("way to the files", "only root and the daemon can replace them"),
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


def gateway_file(subject: Subject) -> Path:
    """The gateway's configuration: beside the daemon's."""
    from unsealerd.gateway.settings import FILE_NAME

    return subject.config_path.with_name(FILE_NAME)


def _owned(path: Path) -> Iterator[Finding]:
    """Only root may write it."""
    try:
        found = path.stat()
    except OSError:
        return  # who reads it says so
    if found.st_uid != 0:
        yield fail("configuration", f"{path} belongs to user {found.st_uid}", f"chown root: {path}")
    if found.st_mode & _OTHERS_WRITE:
        yield fail("configuration", f"{path} can be written by others than root", f"chmod go-w {path}")


def _readable(subject: Subject) -> Iterator[Finding]:
    """It says who may unlock, and may have what a passphrase can be guessed with: not for others, nor for the gateway."""
    path, config = subject.config_path, subject.config
    found = path.stat()
    gateway = subject.machine.account(GATEWAY_USER)
    if found.st_mode & stat.S_IROTH:
        who, hint = "everybody", f"chmod o-r {path}"
    elif gateway is not None and gateway.may_read(found):
        who, hint = "the gateway", f"chgrp {DAEMON_GROUP} {path}"
    else:
        return
    secrets = []
    if config.notify.webhook is not None:
        secrets.append("the webhook")
    if any(operator.passphrase is not None for operator in config.operators):
        secrets.append("what a passphrase can be guessed with")
    verdict = fail if secrets else warn
    yield verdict(
        "configuration", f"{who} can read {path}, with {' and '.join(['who may unlock', *secrets])}", hint
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


def _parents(*paths: Path) -> Iterator[Finding]:
    """Who may rename a directory may put another one in its place."""
    for directory in dict.fromkeys(parent for path in paths for parent in path.absolute().parents):
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
