"""``unsealctl status``: the state of this host in words, and what to do next."""

import time
from collections.abc import Callable, Mapping

import click

from unsealerd.cli.app import App
from unsealerd.cli.command import Command
from unsealerd.cli.fields import objects, optional, required, texts
from unsealerd.cli.output import print_json, print_table
from unsealerd.cli.times import since, span
from unsealerd.cli.values import rows, worded

_UNLOCK = "an operator unlocks with `unsealctl unlock HOST -i IDENTITY`"
_PIN = "`unsealctl backup pin --replace`"
_NO_TPM = "or unlock with --accept-rollback, once you know why"

REASONS: dict[str, tuple[str, str]] = {
    "first_boot": ("no keyring was ever opened on this host", _UNLOCK),
    "unexpected_reboot": ("the machine went down without a planned reboot, so nothing was sealed", _UNLOCK),
    "not_the_next_boot": (
        "the sealed copy was made for another boot: the TPM was reset more often than planned",
        f"{_UNLOCK}; if the firmware always resets twice, raise [seal] extra_resets",
    ),
    "pcr_mismatch": (
        "the boot was measured differently than when it was sealed",
        f"find out what changed (firmware, boot loader, Secure Boot keys); then {_UNLOCK}",
    ),
    "sealed_copy_used": (
        "the sealed copy was used already, or a later change made it void",
        f"if nobody put an old disk image back: {_UNLOCK}",
    ),
    "sealed_copy_damaged": ("the sealed copy on disk cannot be read", f"look at the disk; {_UNLOCK}"),
    "tpm_missing": (
        "no TPM answers where the configuration says there is one",
        f"look at the firmware's settings and [tpm] tcti; {_UNLOCK}, {_NO_TPM}",
    ),
    "tpm_changed": (
        "this is not the TPM, or not the storage root key, that was pinned at init",
        f"if the board was replaced or the TPM cleared on purpose: {_UNLOCK} --accept-rollback",
    ),
    "tpm_lockout": (
        "the TPM is in dictionary-attack lockout",
        f"`tpm2_dictionarylockout -c` clears it; {_UNLOCK}",
    ),
    "tpm_failed": (
        "the TPM answered with an error that no retry cured",
        f"`journalctl -u unsealerd`; {_UNLOCK}",
    ),
    "rollback": (
        "the backup on disk is older than the TPM's counter says it must be",
        "put the current backup back; or, if the older one is there on purpose, unlock with --accept-rollback",
    ),
    "backup_damaged": (
        "the backup is missing, unreadable or not what was written",
        "put a copy back (keyring.age.previous, or an exported one); then an operator unlocks",
    ),
    "backup_foreign": (
        "the backup opens, and is of another keyring than this host's; or keyring.id, which says so, cannot be read",
        f"find out who did that, and put this host's backup back; or, if it is the right one: {_PIN}, then {_UNLOCK}",
    ),
    "storage_failed": (
        "a file could not be written durably, so the keys were not taken into use",
        f"make room or repair the disk, then restart unsealerd, or {_UNLOCK}",
    ),
    "lease_expired": ("the reboot came after the time that the host was armed for", _UNLOCK),
    "locked_by_admin": ("`unsealctl lock` was run", _UNLOCK),
    "daemon_stopped": (
        "the service was stopped and started again; nothing is sealed then, and nothing stays in memory",
        f"{_UNLOCK}; `systemctl restart unsealerd` would have kept the keys",
    ),
    "memory_refused": (
        "the memory that the daemon before this one left does not belong to the backup on disk",
        f"find out who put another backup, or another descriptor, there; then {_UNLOCK}",
    ),
}
"""For each reason why a host is locked: what happened, and what to do."""

_STATES = {
    "uninitialised": "there is no keyring yet",
    "locked": "the keys are not in memory; services wait",
    "unlocked": "the keys are in memory, services are served",
}
_NEXT_UNINITIALISED = "declare an operator and a key in the configuration, then: sudo unsealctl init"


@click.command(cls=Command)
@click.pass_obj
def status(app: App) -> None:
    """Show the state of this host, and what to do next."""
    with app.admin() as admin:
        facts = required(admin.call("io.unsealerd.Admin.Status"), "status", dict)
    if app.json:
        print_json(facts)
    else:
        print_table(summary(facts))


def summary(facts: Mapping[str, object]) -> list[tuple[str, str]]:
    """The rows of the table: what matters first, then every other fact."""
    state = required(facts, "state", str)
    found = [("state", f"{state}: {_STATES[state]}" if state in _STATES else state)]
    reason = optional(facts, "lock_reason", str)
    next_step = ""
    if reason is not None:
        happened, next_step = REASONS.get(reason, ("", _UNLOCK))
        found.append(("reason", f"{reason}: {happened}" if happened else reason))
    detail = optional(facts, "lock_detail", str)
    if detail:
        found.append(("detail", detail))
    found.append(("since", worded("since", facts.get("since"))))
    if state == "uninitialised":
        next_step = _NEXT_UNINITIALISED
    if next_step:
        found.append(("next", next_step))
    for name, value in facts.items():
        if name in _FIRST:
            continue
        if name in _WORDED:
            found += [(name, text) for text in _WORDED[name](facts)]
        else:
            found += rows({name: value})
    return found


def _keys(facts: Mapping[str, object]) -> list[str]:
    names = texts(facts, "keys")
    shown = names[:_SHOWN_KEYS] + (
        [f"and {len(names) - _SHOWN_KEYS} more"] if len(names) > _SHOWN_KEYS else []
    )
    return [f"{len(names)}: {', '.join(shown)}" if names else "none declared"]


def _tpm(facts: Mapping[str, object]) -> list[str]:
    tpm = required(facts, "tpm", dict)
    if tpm.get("tcti") == "none":
        return ["none configured"]
    error = optional(tpm, "error", str)
    if error is not None:
        return [f"{error} at {tpm.get('tcti')}"]
    known = {name: tpm[name] for name in _TPM_FACTS if tpm.get(name) is not None}
    pcrs = f"pcrs {' '.join(str(pcr) for pcr in required(tpm, 'pcrs', list))}"
    return [", ".join([worded("", known), pcrs, *(["in lockout"] if tpm.get("in_lockout") is True else [])])]


def _keyring(facts: Mapping[str, object]) -> list[str]:
    keyring = required(facts, "keyring", dict)
    pinned, foreign = keyring.get("pinned"), keyring.get("foreign")
    if facts.get("state") == "uninitialised":
        return ["none yet"]
    known = keyring.get("id") or pinned or "not known while it is locked"
    return [f"{known}" if pinned else f"{known}, not pinned", *([f"refused: {foreign}"] if foreign else [])]


def _seal(facts: Mapping[str, object]) -> list[str]:
    seal = required(facts, "seal", dict)
    if seal.get("sealed") is not True and required(facts, "tpm", dict).get("tcti") == "none":
        return ["nothing can be sealed without a TPM"]
    if seal.get("sealed") is not True:
        return [f"nothing is sealed; at shutdown it will be for: {worded('', seal.get('on'))}"]
    text = f"sealed for the next boot ({seal.get('kind')}), made {worded('created', seal.get('created'))}"
    if seal.get("deadline") is not None:
        text += f"; destroyed {worded('deadline', seal['deadline'])}"
    return [text]


def _sessions(facts: Mapping[str, object]) -> list[str]:
    return [
        f"{worded('', session.get('operators'))} from {session.get('peer')},"
        f" words: {' '.join(str(word) for word in required(session, 'words', list))}"
        for session in objects(facts, "sessions")
    ] or ["none open"]


def _shares(facts: Mapping[str, object]) -> list[str]:
    """Who answered, who can still, and for how long; never a share."""
    shares = required(facts, "shares", dict)
    lines = [f"{shares.get('present')} of {shares.get('needed')}"]
    answered, missing, require = (
        texts(shares, name) if name in shares else [] for name in ("answered", "missing", "require")
    )
    if answered:
        lines[0] += f", from {', '.join(answered)}"
    left = optional(shares, "seconds_left", int)
    if left is not None:
        lines[0] += f"; they count for {span(left)} more"
    if shares.get("present") != shares.get("needed") and missing:
        lines.append(f"can still answer: {', '.join(missing)}")
    if require:
        lines.append(f"must be among them: {', '.join(require)}")
    return lines


def _memory(facts: Mapping[str, object]) -> list[str]:
    memory = required(facts, "memory", dict)
    if memory.get("kept") is True:
        return ["kept over a restart of the daemon"]
    why = optional(memory, "why", str)
    return [f"not kept over a restart of the daemon{f': {why}' if why else ''}"]


def _operators(facts: Mapping[str, object]) -> list[str]:
    return [
        f"{required(item, 'name', str)}: {_proven(optional(item, 'proven', int))}"
        for item in objects(facts, "operators")
    ] or ["none"]


def _proven(unix: int | None) -> str:
    return "never proven: unsealctl drill" if unix is None else f"proven {since(unix, time.time())}"


_SHOWN_KEYS = 10
_TPM_FACTS = ("manufacturer", "firmware", "reset_count", "counter", "lockout_counter")
_FIRST = frozenset({"state", "lock_reason", "lock_detail", "since"})
_WORDED: dict[str, Callable[[Mapping[str, object]], list[str]]] = {
    "keys": _keys,
    "tpm": _tpm,
    "keyring": _keyring,
    "seal": _seal,
    "sessions": _sessions,
    "shares": _shares,
    "memory": _memory,
    "operators": _operators,
    "warnings": lambda facts: texts(facts, "warnings"),
}
