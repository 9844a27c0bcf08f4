"""Reading the backup: who opens it, what a file key gives, and whether that is this host's keyring.

An age file that opens is not for that reason one that this host has written: the stanzas are made with public keys only. So what
was opened is compared with what is pinned (unsealerd/keyringid.py), before anything is done with it or because of it.
"""

from pathlib import Path

from unsealerd import keyringid
from unsealerd.core import keyring as keyring_format
from unsealerd.core.age import decrypt_payload, parse_header, verify_mac
from unsealerd.core.keyring import Keyring
from unsealerd.core.rules import Rules
from unsealerd.core.secret import SecretBuffer
from unsealerd.core.sharing import Backup
from unsealerd.daemon.store import BackupStore
from unsealerd.errors import (
    AgeHeaderInvalid,
    AgeMacInvalid,
    AgePayloadInvalid,
    BackupDamaged,
    BackupForeign,
    ConfigInvalid,
    KeyringInvalid,
    SealRefused,
)
from unsealerd.model import LockReason


class BackupReader:
    """``opened_for``: what the backup said of its operators that was opened last; None: nothing, or none was opened.

    ``foreign``: the id of the keyring that was refused last, and was not the pinned one as far as that can be read.
    """

    def __init__(self, store: BackupStore, id_file: Path) -> None:
        self._store = store
        self.id_file = id_file
        self.opened_for: Rules | None = None
        self.foreign: str | None = None

    def backup(self) -> Backup:
        """What the header of the backup on disk says of who opens it. Raises `BackupDamaged`, `NotInitialised`."""
        return _read(self._store.read())

    def restored(self, keyring: Keyring, data: bytes) -> None:
        """This is the backup of a keyring that was never closed. Raises `BackupDamaged`, `BackupForeign`."""
        self._require_ours(keyring)
        self._remember(data, _read(data))

    def _require_ours(self, opened: Keyring) -> None:
        """Raises `BackupForeign`. Where nothing is pinned every keyring is ours, and `status` says so."""
        found = opened.id
        try:
            pinned = keyringid.read(self.id_file)
        except ConfigInvalid as err:
            self.foreign = found
            raise BackupForeign(f"{err.detail}; until it can be read, no backup is known to be ours") from err
        if pinned is not None and pinned != found:
            self.foreign = found
            what = (
                "of version 1, which does not say of which keyring it is"
                if found is None
                else f"of the keyring {found}"
            )
            raise BackupForeign(f"the backup is {what}, and {self.id_file} names {pinned}")
        self.foreign = None

    def _remember(self, data: bytes, backup: Backup) -> None:
        self._store.opened(data)
        self.opened_for = backup.sharing.rules if backup.sharing is not None else None

    def decrypt(self, file_key: SecretBuffer) -> Keyring:
        """Raises `BackupDamaged`, `BackupForeign`, `NotInitialised`."""
        data = self._store.read()
        backup = _read(data)
        try:
            plain = decrypt_payload(data, backup.header, file_key)
        except (AgeHeaderInvalid, AgeMacInvalid, AgePayloadInvalid) as err:
            raise BackupDamaged(f"{err.name}: {err.detail}") from err
        try:
            opened = keyring_format.parse(plain)
        except KeyringInvalid as err:
            plain.close()
            raise BackupDamaged(f"{err.name}: {err.detail}") from err
        try:
            self._require_ours(opened)
        except BackupForeign:
            opened.close()
            raise
        self._remember(data, backup)
        return opened

    def decrypt_sealed(self, file_key: SecretBuffer) -> Keyring:
        """The same, with what the TPM gave.

        Raises `SealRefused`, too: for the copy of the backup before, when a change after the seal was cut off before its
        increment.
        """
        try:
            return self.decrypt(file_key)
        except BackupDamaged:
            if not self._opens_previous(file_key):
                raise
        raise SealRefused(
            LockReason.UNEXPECTED_REBOOT, "the machine stopped in the middle of a change after it was sealed"
        )

    def _opens_previous(self, file_key: SecretBuffer) -> bool:
        data = self._store.previous()
        try:
            if data is not None:
                verify_mac(parse_header(data), file_key)
        except (AgeHeaderInvalid, AgeMacInvalid):
            return False
        return data is not None


def _read(data: bytes) -> Backup:
    try:
        return Backup.of(parse_header(data))
    except AgeHeaderInvalid as err:
        raise BackupDamaged(f"header: {err.detail}") from err
