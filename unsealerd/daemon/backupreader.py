"""Reading the backup: who opens it, and what a file key gives."""

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
    KeyringInvalid,
    SealRefused,
)
from unsealerd.model import LockReason


class BackupReader:
    """``opened_for``: what the backup said of its operators that was opened last; None: nothing, or none was opened."""

    def __init__(self, store: BackupStore) -> None:
        self._store = store
        self.opened_for: Rules | None = None

    def backup(self) -> Backup:
        """What the header of the backup on disk says of who opens it. Raises `BackupDamaged`, `NotInitialised`."""
        return _read(self._store.read())

    def restored(self, data: bytes) -> None:
        """This is the backup of a keyring that was never closed. Raises `BackupDamaged`."""
        self._remember(data, _read(data))

    def _remember(self, data: bytes, backup: Backup) -> None:
        self._store.opened(data)
        self.opened_for = backup.sharing.rules if backup.sharing is not None else None

    def decrypt(self, file_key: SecretBuffer) -> Keyring:
        """Raises `BackupDamaged`, `NotInitialised`."""
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
