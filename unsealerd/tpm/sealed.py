"""`sealed.json`: the file key, sealed to this TPM, this state and a boot that is still to come."""

from typing import Annotated, Literal, Self

import msgspec
from msgspec import Meta

from unsealerd.errors import SealRefused
from unsealerd.model import LockReason, SealKind
from unsealerd.tpm.policy import DIGEST_SIZE, PCR_COUNT, Terms

_VERSION = 1
_BLOB_MAX = 1024  # bytes: the TPM's own limit for a private area of this kind is about 200

_Blob = Annotated[bytes, Meta(min_length=1, max_length=_BLOB_MAX)]
_Resets = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
_Seconds = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Counter = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Index = Annotated[int, Meta(ge=0, le=PCR_COUNT - 1)]
_Digest = Annotated[str, Meta(pattern=f"^[0-9a-f]{{{2 * DIGEST_SIZE}}}$")]


class SealedCopy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the TPM gave at the seal, and the terms under which it gives the secret back.

    `public` is a TPMT_PUBLIC, `private` the wrapped sensitive area; only this TPM can unwrap it. The terms stand
    in `public` as the hash of the policy, and the TPM binds `public` to `private`: whoever changes `pcrs`, `resets_*` or
    `counter` here gets a copy that does not load. `created` and `deadline` (Unix seconds, 0 = none) are for people; the
    deadline that counts is sealed together with the key. Nothing here is secret.
    """

    kind: SealKind
    public: _Blob
    private: _Blob
    pcrs: Annotated[dict[_Index, _Digest], Meta(min_length=1)]
    resets_low: _Resets
    resets_high: _Resets
    counter: _Counter
    created: _Seconds
    deadline: _Seconds
    bank: Literal["sha256"] = "sha256"
    version: Annotated[int, Meta(ge=_VERSION, le=_VERSION)] = _VERSION

    def encode(self) -> bytes:
        return msgspec.json.encode(self) + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The inverse of `encode`. Raises `SealRefused` (sealed_copy_damaged) on anything that it does not write."""
        try:
            copy = msgspec.json.decode(data, type=cls)
        except (ValueError, RecursionError) as err:
            raise SealRefused(
                LockReason.SEALED_COPY_DAMAGED, f"the sealed copy cannot be read: {err}"
            ) from err
        if copy.encode() != data or list(copy.pcrs) != sorted(copy.pcrs):
            raise SealRefused(
                LockReason.SEALED_COPY_DAMAGED, "the sealed copy is not in the form it was written in"
            )
        if copy.resets_low > copy.resets_high or copy.resets_low == 0 < copy.resets_high:
            raise SealRefused(LockReason.SEALED_COPY_DAMAGED, "the range of reset counts is impossible")
        return copy

    def terms(self, counter_name: bytes) -> Terms:
        """The terms as the policy states them, for the counter of that name."""
        return Terms(
            counter_name=counter_name,
            counter=self.counter,
            resets_low=self.resets_low,
            resets_high=self.resets_high,
            pcrs={index: bytes.fromhex(value) for index, value in self.pcrs.items()},
        )
