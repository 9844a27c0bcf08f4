"""Where errors leave the program: one table from each name to its exit code and its hint.

The codes are the contract of docs/unsealctl.md.
"""

import enum
from typing import NamedTuple

from unsealerd.cli.output import print_json, printable
from unsealerd.cli.stderr import complain
from unsealerd.errors import UnsealerdError


class Exit(enum.IntEnum):
    """The exit codes. A code is never given a second meaning; a new one gets a new number."""

    OK = 0
    NOT_VALID = 1
    USAGE = 2
    LOCKED = 3
    ACCESS_DENIED = 4
    DAEMON_UNREACHABLE = 5
    NOT_FOUND = 6
    NOT_INITIALISED = 7
    ALREADY_INITIALISED = 8
    NOTHING_TO_DO = 9
    LIMIT = 10
    HOST_UNKNOWN = 11
    HOST_MISMATCH = 12
    HOST_UNREACHABLE = 13
    PEER = 14
    STORED_DATA = 15
    HARDWARE = 16
    CONFIGURATION = 17
    CARD = 18
    PIN = 19
    UNFIT = 20
    INTERRUPTED = 130
    BROKEN_PIPE = 141


class Answer(NamedTuple):
    code: Exit
    hint: str


_AGE_FILE = "is this the file that was meant? A backup and its copies begin with age-encryption.org/v1"
_RESTORE = "keep the files as they are; `unsealctl backup verify` tells more, and a copy of the backup can be put back"
_DISK = "look at the disk: space, mount options, `journalctl -u unsealerd`; nothing was changed"
_WITHOUT_TPM = "an operator can unlock without the TPM, with --accept-rollback"
_TPM = f"`unsealctl status` and `tpm2_getcap properties-variable` tell more; {_WITHOUT_TPM}"

ANSWERS: dict[str, Answer] = {
    "BadRequest": Answer(Exit.USAGE, "`unsealctl COMMAND --help` shows what is expected"),
    "AccessDenied": Answer(
        Exit.ACCESS_DENIED,
        "administration needs root: try sudo; for a service, the key's `allow` in the configuration must name its"
        " unit, user or group",
    ),
    "CallerChanged": Answer(Exit.ACCESS_DENIED, "run the command again"),
    "KeyNotFound": Answer(Exit.NOT_FOUND, "`unsealctl key list` shows the keys there are"),
    "VersionNotFound": Answer(Exit.NOT_FOUND, "`unsealctl key show NAME` shows the versions there are"),
    "Locked": Answer(
        Exit.LOCKED,
        "`unsealctl status` says why; an operator unlocks with `unsealctl unlock HOST -i IDENTITY`",
    ),
    "NotLocked": Answer(Exit.NOTHING_TO_DO, "the keys are in memory; there is nothing to unlock"),
    "NotInitialised": Answer(
        Exit.NOT_INITIALISED,
        "on a new host declare an operator and a key, then: sudo unsealctl init; else `unsealctl status` says more",
    ),
    "AlreadyInitialised": Answer(
        Exit.ALREADY_INITIALISED,
        "`unsealctl status` shows what is there; to begin anew, move the state directory, and keyring.id beside the"
        " configuration, away first",
    ),
    "NotArmed": Answer(
        Exit.NOTHING_TO_DO, "`unsealctl status` shows under `seal` whether there is a sealed copy"
    ),
    "DaemonUnreachable": Answer(Exit.DAEMON_UNREACHABLE, "systemctl status unsealerd"),
    "LimitExceeded": Answer(Exit.LIMIT, "send less, or later"),
    "BadMessage": Answer(Exit.PEER, "are both ends of the same version?"),
    "BadPoint": Answer(
        Exit.PEER, "do not answer this host until you know why; it asks for what no honest host asks"
    ),
    "BadAnswer": Answer(
        Exit.PEER, "is this the identity, or the passphrase, that the host's backup was made for?"
    ),
    "NotAnOperator": Answer(
        Exit.PEER,
        "give -i with the identity whose recipient is under [[operator]] in the host's configuration",
    ),
    "SessionExpired": Answer(Exit.PEER, "run the command again; a session lives for two minutes"),
    "HostUnknown": Answer(Exit.HOST_UNKNOWN, "unsealctl host add NAME HOST:PORT"),
    "HostMismatch": Answer(
        Exit.HOST_MISMATCH,
        "do not answer it. If the server was set up anew, compare with `unsealctl identity` on its console, then"
        " `unsealctl host remove NAME` and `unsealctl host add NAME HOST:PORT`",
    ),
    "HostUnreachable": Answer(
        Exit.HOST_UNREACHABLE,
        "is the address right, and does `systemctl status unsealerd-gateway` there say it runs?",
    ),
    "AgeArmorInvalid": Answer(Exit.STORED_DATA, _AGE_FILE),
    "AgeHeaderInvalid": Answer(Exit.STORED_DATA, _AGE_FILE),
    "AgeMacInvalid": Answer(Exit.STORED_DATA, _RESTORE),
    "AgeNoMatch": Answer(
        Exit.STORED_DATA, "give the identity that the file was encrypted to, or another passphrase"
    ),
    "AgePayloadInvalid": Answer(Exit.STORED_DATA, _RESTORE),
    "KeyringInvalid": Answer(Exit.STORED_DATA, _RESTORE),
    "BackupDamaged": Answer(Exit.STORED_DATA, _RESTORE),
    "BackupForeign": Answer(
        Exit.STORED_DATA,
        "nothing was opened: somebody put another backup on that host's disk, or its file keyring.id is wrong. Its"
        " administrator finds out which, with `unsealctl status` there",
    ),
    "Rollback": Answer(
        Exit.STORED_DATA,
        "if this older backup was put there on purpose: `unsealctl unlock … --accept-rollback`",
    ),
    "StorageFailed": Answer(Exit.STORED_DATA, _DISK),
    "AuditUnwritable": Answer(Exit.STORED_DATA, _DISK),
    "AuditBroken": Answer(
        Exit.STORED_DATA, "keep a copy of the log, and compare it with the journal: journalctl -u unsealerd"
    ),
    "IdentityInvalid": Answer(
        Exit.STORED_DATA,
        "an identity is a file of age-keygen, or a P-256 private key in PEM; a recipient is age1…",
    ),
    "TpmMissing": Answer(
        Exit.HARDWARE,
        'is the TPM on in the firmware, and [tpm] tcti right? A host without one has tcti = "none"; '
        + _WITHOUT_TPM,
    ),
    "TpmChanged": Answer(
        Exit.HARDWARE,
        "if the TPM or the board was replaced on purpose: `unsealctl unlock … --accept-rollback`",
    ),
    "TpmLockout": Answer(Exit.HARDWARE, f"`tpm2_dictionarylockout -c` clears it; {_WITHOUT_TPM}"),
    "TpmFailed": Answer(Exit.HARDWARE, _TPM),
    "SealRefused": Answer(Exit.HARDWARE, _TPM),
    "ReaderMissing": Answer(
        Exit.CARD,
        "plug the reader in; `systemctl status pcscd.socket` shows whether the PC/SC service is there",
    ),
    "CardMissing": Answer(
        Exit.CARD, "plug the card in, or name another: `-i piv:SERIAL`, `-i openpgp:SERIAL`"
    ),
    "CardRemoved": Answer(Exit.CARD, "put the card back, and run the command again; nothing was unlocked"),
    "CardBusy": Answer(
        Exit.CARD, "if it is GnuPG that has the card: `gpgconf --kill scdaemon`; then run the command again"
    ),
    "CardReset": Answer(Exit.CARD, "end the other program that uses the card, and run the command again"),
    "CardFailed": Answer(Exit.CARD, "take the card out, put it back, and run the command again"),
    "WrongCard": Answer(
        Exit.CARD,
        "plug in the card whose recipient is under [[operator]] on the host; a new card needs a key on P-256 first:"
        " docs/operators.md",
    ),
    "TouchMissed": Answer(Exit.CARD, "run the command again, and touch the device when it blinks"),
    "AttestationInvalid": Answer(
        Exit.CARD,
        "make the key anew inside of the card; do not rely on one that may have been copied into it",
    ),
    "PinWrong": Answer(Exit.PIN, "run the command again with the right PIN; each wrong one costs a try"),
    "PinBlocked": Answer(
        Exit.PIN, "unblock the PIN with the card's PUK and its vendor's tool, or use another operator's card"
    ),
    "PinLastTry": Answer(Exit.PIN, "if you are sure of the PIN: the same with --last-try"),
    "PinCancelled": Answer(Exit.PIN, "run the command again, and enter the PIN"),
    "ConfigInvalid": Answer(Exit.CONFIGURATION, "correct the file, or name another: --config FILE"),
    "NotInstalled": Answer(
        Exit.CONFIGURATION,
        "in a clone of unsealerd: pipx install --force '.[operator,piv,pkcs11]' (piv: cards, pkcs11: tokens); or your"
        " distribution's package",
    ),
}


def message_of(error: UnsealerdError) -> str:
    """One line: the detail, or else what the class says about itself."""
    text = error.detail or (type(error).__doc__ or error.name).partition("\n")[0]
    return printable(text)


def report(error: UnsealerdError, *, as_json: bool) -> int:
    """Say what went wrong, and return the exit code."""
    answer = ANSWERS[error.name]
    complain(message_of(error), hint=answer.hint)
    if as_json:
        print_json({"error": error.name, "detail": message_of(error)})
    return answer.code
