"""The storage root key: the parent of the sealed copy, and the key that sessions are salted to."""

import contextlib

from unsealerd.errors import TpmChanged
from unsealerd.tpm import commands, template
from unsealerd.tpm.esys import Esys, saved_public
from unsealerd.tpm.pin import TpmPin
from unsealerd.tpm.response import TpmResponse, is_unknown_handle

# Where platforms keep it (TCG TPM v2.0 Provisioning Guidance, 7.8). systemd makes it there at boot.
PERSISTENT_HANDLE = 0x81000001
FROM_TEMPLATE = 0


def choose(esys: Esys) -> tuple[int, int]:
    """The storage root key to pin: its handle (`FROM_TEMPLATE` if created) and ESYS_TR.

    The platform's own if there is one, whatever its type; else the standard ECC key, which the TPM derives anew at
    each start from its seed, always the same. This is the moment of trust: who answers now is who is pinned.
    """
    found = _persistent(esys)
    if found is not None and template.is_storage_key(saved_public(esys.save(found))):
        return PERSISTENT_HANDLE, found
    return FROM_TEMPLATE, commands.create_primary(esys)


def attach(esys: Esys, pin: TpmPin) -> int:
    """The pinned storage root key as ESYS_TR. Raises `TpmChanged` if it is not there, or is another."""
    if pin.parent_handle == FROM_TEMPLATE:
        key: int | None = commands.create_primary(esys)
    else:
        key = _persistent(esys, pin.parent_handle)
    if key is None:
        raise TpmChanged(f"there is no storage root key at 0x{pin.parent_handle:08x} any more")
    if esys.name(key).hex() != pin.parent_name:
        let_go(esys, pin.parent_handle, key)
        raise TpmChanged("the storage root key is not the one that was pinned: another TPM, or a cleared one")
    return key


def let_go(esys: Esys, handle: int, key: int) -> None:
    """Flush the key if it was created. A TPM that does not even flush has said so, or will, elsewhere."""
    if handle == FROM_TEMPLATE:
        with contextlib.suppress(TpmResponse):
            esys.flush(key)


def _persistent(esys: Esys, handle: int = PERSISTENT_HANDLE) -> int | None:
    try:
        return esys.from_handle(handle)
    except TpmResponse as err:
        if is_unknown_handle(err.code):
            return None
        raise
