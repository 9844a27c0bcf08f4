"""`tpm.json`: which TPM this host was initialised with."""

from typing import Annotated, Self

import msgspec
from msgspec import Meta

from unsealerd.errors import TpmChanged

_VERSION = 1

# TPM 2.0 part 2, 10.4.3: two bytes of hash algorithm, then the digest: SHA-1 to SHA-512.
_Name = Annotated[str, Meta(pattern="^[0-9a-f]{44,132}$")]
_Handle = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]


class TpmPin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The names of the storage root key and of the counter.

    A name is a hash of the whole public area, so that no other key and no other counter can have it. Handles
    are TPM handles; a `parent_handle` of 0 says that the storage root key is created from the standard template
    at each start. Nothing here is secret.
    """

    parent_handle: _Handle
    parent_name: _Name
    counter_handle: _Handle
    counter_name: _Name
    version: Annotated[int, Meta(ge=_VERSION, le=_VERSION)] = _VERSION

    def encode(self) -> bytes:
        return msgspec.json.encode(self) + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The inverse of `encode`. Raises `TpmChanged` on anything that `encode` does not write."""
        try:
            pin = msgspec.json.decode(data, type=cls)
        except (ValueError, RecursionError) as err:
            raise TpmChanged(f"the pin of the TPM cannot be read: {err}") from err
        if pin.encode() != data:
            raise TpmChanged("the pin of the TPM is not in the form it was written in")
        return pin
