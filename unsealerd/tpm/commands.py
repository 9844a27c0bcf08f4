"""The commands that we use, one function each. All raise `TpmResponse`.

An answer on which something is decided is read in a salted session, and so carries the TPM's HMAC, which the library
checks. What is read without a session is for people, or is checked by other means.
"""

import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from unsealerd.core.secret import SecretBuffer
from unsealerd.tpm import template
from unsealerd.tpm.esys import NONE, PASSWORD, RH_OWNER, Esys
from unsealerd.tpm.policy import ALG_SHA256, RESET_COUNT_OFFSET, Comparison, Condition
from unsealerd.tpm.response import TpmResponse
from unsealerd.tpm.session import Session, Use

_PCR_CHANGED = 0x128
_CAP_TPM_PROPERTIES = 6
_BOTH_WAYS = Use.DECRYPT | Use.ENCRYPT


class Clock(msgspec.Struct, frozen=True):
    """TPMS_CLOCK_INFO: milliseconds of operation, and counts of resets and of resumes."""

    clock: int
    reset_count: int
    restart_count: int


class Blobs(msgspec.Struct, frozen=True):
    """What TPM2_Create gives: TPMT_PUBLIC and the wrapped sensitive area."""

    public: bytes
    private: bytes


def create_primary(esys: Esys) -> int:
    """The standard storage root key, as a transient object. Needs an owner hierarchy without authorisation value."""
    ffi = esys.ffi
    found = ffi.new("ESYS_TR *")
    out = [
        ffi.new(f"{kind} **")
        for kind in ("TPM2B_PUBLIC", "TPM2B_CREATION_DATA", "TPM2B_DIGEST", "TPMT_TK_CREATION")
    ]
    esys.call(
        "CreatePrimary",
        RH_OWNER,
        PASSWORD,
        NONE,
        NONE,
        ffi.new("TPM2B_SENSITIVE_CREATE *"),
        esys.public(template.storage_root_key()),
        ffi.new("TPM2B_DATA *"),
        ffi.new("TPML_PCR_SELECTION *"),
        found,
        *out,
    )
    for pointer in out:
        esys.owned(pointer)
    return int(found[0])


def read_clock(esys: Esys, session: Session | None, *, last: bool = False) -> Clock:
    pointer = esys.ffi.new("TPMS_TIME_INFO **")
    handle = NONE if session is None else session.using(Use.AUDIT, last=last)
    esys.call("ReadClock", handle, NONE, NONE, pointer)
    info = esys.owned(pointer)
    clock = info.clockInfo
    return Clock(int(clock.clock), int(clock.resetCount), int(clock.restartCount))


def _selection(esys: Esys, indices: Sequence[int]) -> Any:
    selection = esys.ffi.new("TPML_PCR_SELECTION *")
    selection.count = 1
    bank = selection.pcrSelections[0]
    bank.hash = ALG_SHA256
    bank.sizeofSelect = 3
    for index in indices:
        bank.pcrSelect[index // 8] |= 1 << (index % 8)
    return selection


def read_pcrs(esys: Esys, session: Session | None, indices: Sequence[int]) -> dict[int, bytes]:
    """Values of the SHA-256 bank, ascending. A TPM without that bank gives none: an empty dictionary.

    TPM2_PCR_Read gives at most eight at a time. If a PCR changes between two parts, TPM_RC_PCR_CHANGED is raised, as the
    TPM would do itself in a policy session: the caller starts again.
    """
    values: dict[int, bytes] = {}
    missing = sorted(set(indices))
    first_update: int | None = None
    while missing:
        update = esys.ffi.new("uint32_t *")
        chosen, digests = esys.ffi.new("TPML_PCR_SELECTION **"), esys.ffi.new("TPML_DIGEST **")
        handle = NONE if session is None else session.using(Use.AUDIT)
        esys.call("PCR_Read", handle, NONE, NONE, _selection(esys, missing), update, chosen, digests)
        selection, listed = esys.owned(chosen), esys.owned(digests)
        if first_update is None:
            first_update = int(update[0])
        elif first_update != int(update[0]):
            raise TpmResponse("PCR_Read", _PCR_CHANGED)
        bits = bytes(selection.pcrSelections[0].pcrSelect) if selection.count == 1 else bytes(3)
        read = [index for index in missing if bits[index // 8] >> (index % 8) & 1]
        if not read or len(read) != listed.count:
            return {}
        for index, digest in zip(read, listed.digests, strict=False):
            values[index] = bytes(esys.ffi.buffer(digest.buffer, digest.size))
        missing = [index for index in missing if index not in values]
    return dict(sorted(values.items()))


def define_counter(esys: Esys, session: Session, handle: int) -> int:
    """TPM2_NV_DefineSpace of a counter without authorisation value."""
    area = template.counter(handle)
    public = esys.ffi.new("TPM2B_NV_PUBLIC *")
    public.size = len(area)
    space = public.nvPublic
    space.nvIndex, space.nameAlg, space.attributes, _, space.dataSize = struct.unpack(">IHIHH", area)
    found = esys.ffi.new("ESYS_TR *")
    esys.call(
        "NV_DefineSpace",
        RH_OWNER,
        session.using(Use.DECRYPT),
        NONE,
        NONE,
        esys.ffi.new("TPM2B_AUTH *"),
        public,
        found,
    )
    return int(found[0])


def undefine(esys: Esys, index: int) -> None:
    esys.call("NV_UndefineSpace", RH_OWNER, index, PASSWORD, NONE, NONE)


def increment(esys: Esys, session: Session, index: int, *, last: bool = False) -> None:
    esys.call("NV_Increment", index, index, session.using(Use.AUTHORISE, last=last), NONE, NONE)


def read_counter(esys: Esys, session: Session, index: int, *, last: bool = False) -> int:
    pointer = esys.ffi.new("TPM2B_MAX_NV_BUFFER **")
    handle = session.using(Use.AUTHORISE, last=last)
    esys.call("NV_Read", index, index, handle, NONE, NONE, template.COUNTER_SIZE, 0, pointer)
    value = esys.owned(pointer)
    return int.from_bytes(esys.ffi.buffer(value.buffer, value.size), "big")


def create_sealed(esys: Esys, session: Session, parent: int, policy: bytes, secret: memoryview) -> Blobs:
    """TPM2_Create of a sealed data object; ends the session. `secret` travels encrypted."""
    ffi = esys.ffi
    area = template.sealed_object(policy) + bytes(2)  # `unique` is empty: the TPM fills it in
    private, public = ffi.new("TPM2B_PRIVATE **"), ffi.new("TPM2B_PUBLIC **")
    rest = [ffi.new(f"{kind} **") for kind in ("TPM2B_CREATION_DATA", "TPM2B_DIGEST", "TPMT_TK_CREATION")]
    sensitive = ffi.new("TPM2B_SENSITIVE_CREATE *")
    try:
        # From secret memory into the structure and from there nowhere but into the library, which encrypts it; the
        # structure is overwritten below, the library's own copies end with the context.
        ffi.memmove(sensitive.sensitive.data.buffer, secret, len(secret))
        sensitive.sensitive.data.size = len(secret)
        esys.call(
            "Create",
            parent,
            session.using(_BOTH_WAYS, last=True),
            NONE,
            NONE,
            sensitive,
            esys.public(area),
            ffi.new("TPM2B_DATA *"),
            ffi.new("TPML_PCR_SELECTION *"),
            private,
            public,
            *rest,
        )
    finally:
        ffi.memmove(
            sensitive, bytes(ffi.sizeof("TPM2B_SENSITIVE_CREATE")), ffi.sizeof("TPM2B_SENSITIVE_CREATE")
        )
    for pointer in rest:
        esys.owned(pointer)
    wrapped = esys.owned(private)
    return Blobs(
        public=esys.area(esys.owned(public)), private=bytes(ffi.buffer(wrapped.buffer, wrapped.size))
    )


def load(esys: Esys, parent: int, blobs: Blobs) -> int:
    """TPM2_Load. No secret passes: `private` is wrapped by the TPM, and the parent's authorisation value is empty."""
    found = esys.ffi.new("ESYS_TR *")
    private, public = esys.sized("TPM2B_PRIVATE", blobs.private), esys.public(blobs.public)
    esys.call("Load", parent, PASSWORD, NONE, NONE, private, public, found)
    return int(found[0])


def policy_nv(esys: Esys, session: Session, index: int, operand: bytes) -> None:
    """The counter equals `operand`. The TPM compares; its answer proves nothing to us, the unseal does."""
    value = esys.sized("TPM2B_OPERAND", operand)
    esys.call("PolicyNV", index, index, session.tr, PASSWORD, NONE, NONE, value, 0, int(Comparison.EQ))


def policy_reset_count(esys: Esys, session: Session, condition: Condition) -> None:
    value = esys.sized("TPM2B_OPERAND", condition.operand)
    comparison = int(condition.comparison)
    esys.call("PolicyCounterTimer", session.tr, NONE, NONE, NONE, value, RESET_COUNT_OFFSET, comparison)


def policy_pcr(esys: Esys, session: Session, indices: Sequence[int], digest: bytes) -> None:
    """The PCRs have the digest `digest`. With the digest given the TPM refuses at once, not at the unseal."""
    expected = esys.sized("TPM2B_DIGEST", digest)
    esys.call("PolicyPCR", session.tr, NONE, NONE, NONE, expected, _selection(esys, indices))


def unseal(esys: Esys, session: Session, item: int) -> SecretBuffer:
    """TPM2_Unseal; ends the session. The answer travels encrypted."""
    pointer = esys.ffi.new("TPM2B_SENSITIVE_DATA **")
    esys.call("Unseal", item, session.using(Use.ENCRYPT, last=True), NONE, NONE, pointer)
    data = esys.owned(pointer)
    try:
        secret = SecretBuffer(data.size)
        esys.ffi.memmove(secret.view, data.buffer, data.size)
        return secret
    finally:
        # One structure on the C heap, alive for these lines: overwritten before the library frees it.
        esys.ffi.memmove(
            data, bytes(esys.ffi.sizeof("TPM2B_SENSITIVE_DATA")), esys.ffi.sizeof("TPM2B_SENSITIVE_DATA")
        )


def properties(esys: Esys, first: int, count: int) -> dict[int, int]:
    """TPM2_GetCapability of TPM properties (part 2, 6.13), from `first` on. Not authenticated: for people."""
    more, pointer = esys.ffi.new("TPMI_YES_NO *"), esys.ffi.new("TPMS_CAPABILITY_DATA **")
    esys.call("GetCapability", NONE, NONE, NONE, _CAP_TPM_PROPERTIES, first, count, more, pointer)
    answer = esys.owned(pointer)
    listed = answer.data.tpmProperties
    return {
        int(listed.tpmProperty[i].property): int(listed.tpmProperty[i].value) for i in range(listed.count)
    }
