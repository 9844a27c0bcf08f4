"""The counter: an index of the TPM's non-volatile memory that only grows.

It has no authorisation value, so whoever may talk to the TPM can increment it. That locks the host (the sealed copy
and the backup are then behind) and opens nothing. Whoever may define indices can also remove it and define it anew,
under the same name: but a new counter starts above every value that a counter of this TPM ever had (part 1, 37.2.4), so
it never goes back.
"""

import contextlib

from unsealerd.errors import TpmChanged, TpmFailed
from unsealerd.tpm import commands
from unsealerd.tpm.esys import Esys
from unsealerd.tpm.pin import TpmPin
from unsealerd.tpm.response import TpmResponse, is_unknown_handle
from unsealerd.tpm.session import Session, SessionKind, salted

# In the range that the registry of reserved handles leaves to the owner (0x01800000 to 0x01BFFFFF). The first free
# one of these is taken, so that two installations on one TPM, or a second initialisation, do not meet.
FIRST_HANDLE = 0x01817500
HANDLES = range(FIRST_HANDLE, FIRST_HANDLE + 0x40)

_NV_DEFINED = 0x14C


def create(esys: Esys, parent: int) -> tuple[int, bytes]:
    """A new counter, incremented once: its handle and its name.

    The first increment sets the WRITTEN attribute, and so gives the index the name that it keeps. Raises `TpmFailed` if
    no handle is free.
    """
    taken = set(esys.handles(FIRST_HANDLE, len(HANDLES)))
    for handle in HANDLES:
        if handle in taken:
            continue
        try:
            with salted(esys, SessionKind.HMAC, parent) as session:
                return handle, _define(esys, session, handle)
        except TpmResponse as err:
            if err.code != _NV_DEFINED:
                raise
    raise TpmFailed(f"no free handle for a counter from 0x{FIRST_HANDLE:08x} on")


def _define(esys: Esys, session: Session, handle: int) -> bytes:
    """Define the index and increment it once; if the second step fails, undo the first. Returns the name."""
    index = commands.define_counter(esys, session, handle)
    try:
        commands.increment(esys, session, index)
        # The library computes the new name itself. That the TPM accepts it in the HMAC of this command, and answers
        # with an HMAC, is the proof that the index is there under that name.
        commands.read_counter(esys, session, index, last=True)
    except TpmResponse:
        with contextlib.suppress(TpmResponse):
            commands.undefine(esys, index)
        raise
    return esys.name(index)


def attach(esys: Esys, pin: TpmPin) -> int:
    """The pinned counter as ESYS_TR. Raises `TpmChanged` if it is not there, or is another.

    The TPM's statement of the name is enough here: the name enters the HMAC of each later command on the index, and the
    TPM computes it from the index itself.
    """
    try:
        index = esys.from_handle(pin.counter_handle)
    except TpmResponse as err:
        if is_unknown_handle(err.code):
            raise TpmChanged(f"the counter at 0x{pin.counter_handle:08x} is gone") from err
        raise
    if esys.name(index).hex() != pin.counter_name:
        raise TpmChanged("the counter is not the one that was pinned")
    return index
