"""Sealing the file key to the next boot, and asking for it back."""

import struct

from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import SealRefused, TpmFailed
from unsealerd.model import LockReason, SealKind
from unsealerd.tpm import commands, template
from unsealerd.tpm.commands import Blobs
from unsealerd.tpm.esys import Esys
from unsealerd.tpm.policy import Terms
from unsealerd.tpm.response import TpmResponse, is_of_parameter, is_policy_refusal
from unsealerd.tpm.sealed import SealedCopy
from unsealerd.tpm.session import SessionKind, loaded, salted

FILE_KEY_SIZE = 16
_DEADLINE = struct.Struct(">Q")
# What is sealed: file key (16) || deadline (8, big endian, Unix seconds, 0 = none). So the lease is as authentic as the key.
PAYLOAD_SIZE = FILE_KEY_SIZE + _DEADLINE.size

_RESET_COUNT_MAX = 0xFFFFFFFF


def window(kind: SealKind, resets: int, extra: int) -> tuple[int, int]:
    """Lowest and highest reset count at which the copy opens, sealed at `resets`.

    The running boot is never in it, except for kexec, where the TPM is not reset at all, and `extra` means nothing.
    """
    match kind:
        case SealKind.REBOOT:
            low, high = resets + 1, resets + 1 + extra
        case SealKind.KEXEC:
            low, high = resets, resets
    if high > _RESET_COUNT_MAX:
        raise TpmFailed("the TPM's reset count is at its end")
    return low, high


def seal(
    esys: Esys,
    parent: int,
    counter_name: bytes,
    secret: SecretBuffer,
    *,
    kind: SealKind,
    pcrs: tuple[int, ...],
    counter: int,
    extra_resets: int,
    created: int,
    deadline: int,
) -> SealedCopy:
    """Four commands: session, PCRs, clock, create. What the policy is made of is read with the TPM's HMAC."""
    with salted(esys, SessionKind.HMAC, parent) as session:
        values = commands.read_pcrs(esys, session, pcrs)
        if values.keys() != set(pcrs):
            raise TpmFailed("the TPM has no active SHA-256 bank of PCRs")
        clock = commands.read_clock(esys, session)
        low, high = window(kind, clock.reset_count, extra_resets)
        policy = Terms(counter_name, counter, low, high, values).digest()
        with SecretBuffer(PAYLOAD_SIZE) as payload:
            payload.view[:FILE_KEY_SIZE] = secret.view
            _DEADLINE.pack_into(payload.view, FILE_KEY_SIZE, deadline)
            blobs = commands.create_sealed(esys, session, parent, policy, payload.view)
    return SealedCopy(
        kind=kind,
        public=blobs.public,
        private=blobs.private,
        pcrs={index: value.hex() for index, value in values.items()},
        resets_low=low,
        resets_high=high,
        counter=counter,
        created=created,
        deadline=deadline,
    )


def release(esys: Esys, parent: int, index: int, counter_name: bytes, copy: SealedCopy) -> SecretBuffer:
    """The payload, if the TPM gives it. Raises `SealRefused` with the reason.

    Seven commands: session, three of policy, load, unseal, flush. The policy comes before the load, so that a refusal
    costs less and leaves nothing loaded.
    """
    terms = copy.terms(counter_name)
    if not template.is_sealed_object(copy.public, terms.digest()):
        raise SealRefused(
            LockReason.SEALED_COPY_DAMAGED,
            "the sealed copy is not under the terms it states, for this counter",
        )
    try:
        with salted(esys, SessionKind.POLICY, parent) as session:
            commands.policy_nv(esys, session, index, terms.counter_operand)
            for condition in terms.reset_conditions:
                commands.policy_reset_count(esys, session, condition)
            commands.policy_pcr(esys, session, tuple(terms.pcrs), terms.pcr_digest)
            with loaded(esys, commands.load(esys, parent, Blobs(copy.public, copy.private))) as item:
                return commands.unseal(esys, session, item)
    except TpmResponse as err:
        if err.command == "Load" and is_of_parameter(err.code):
            # The parent is the pinned one, so it is not the TPM that changed.
            raise SealRefused(
                LockReason.SEALED_COPY_DAMAGED, f"the TPM does not load the sealed copy: {err}"
            ) from err
        if err.command in _POLICY_COMMANDS and is_policy_refusal(err.code):
            raise _refusal(esys, parent, index, terms, err) from err
        raise


_POLICY_COMMANDS = frozenset({"PolicyNV", "PolicyCounterTimer", "PolicyPCR", "Unseal"})


def _refusal(
    esys: Esys, parent: int, index: int, terms: Terms, refused: TpmResponse
) -> SealRefused | TpmResponse:
    """Why the TPM refuses, from what it says with its HMAC. One reason, the one to act upon.

    A moved counter comes first: such a copy is dead for good, whatever else differs. Then the reset count: at another
    boot than the next one the PCRs may differ for that very reason. The PCRs come last: if they alone differ, the right
    boot was measured differently, and their numbers say where to look. If nothing differs, the refusal itself is what is
    wrong (something on the bus can forge an error, which carries no HMAC).
    """
    with salted(esys, SessionKind.HMAC, parent) as session:
        if commands.read_counter(esys, session, index) != terms.counter:
            # Without the values: what is said of a refusal is stored on the disk.
            return SealRefused(LockReason.SEALED_COPY_USED, "the counter is not where it was for the copy")
        values = commands.read_pcrs(esys, session, tuple(terms.pcrs))
        resets = commands.read_clock(esys, session, last=True).reset_count
    if not terms.resets_low <= resets <= terms.resets_high:
        made_for = (
            f"{terms.resets_low}"
            if terms.resets_low == terms.resets_high
            else f"{terms.resets_low} to {terms.resets_high}"
        )
        return SealRefused(
            LockReason.NOT_THE_NEXT_BOOT, f"the reset count is {resets}, the copy was made for {made_for}"
        )
    differing = [index for index in sorted(terms.pcrs) if values.get(index) != terms.pcrs[index]]
    if len(differing) == 1:
        return SealRefused(LockReason.PCR_MISMATCH, f"PCR {differing[0]} differs")
    if differing:
        return SealRefused(LockReason.PCR_MISMATCH, f"PCRs {', '.join(map(str, differing))} differ")
    return refused


def open_payload(payload: SecretBuffer, now: int) -> SecretBuffer:
    """The file key (16 bytes); the payload is wiped. Raises `SealRefused` if the lease is over.

    `now` is the system clock in Unix seconds: a lease limits how long a host may take to come back, and is no protection
    against somebody who sets its clock.
    """
    with payload:
        if len(payload) != PAYLOAD_SIZE:
            raise SealRefused(LockReason.SEALED_COPY_DAMAGED, "what was sealed is not a file key")
        (deadline,) = _DEADLINE.unpack_from(payload.view, FILE_KEY_SIZE)
        if deadline != 0 and now >= deadline:
            raise SealRefused(LockReason.LEASE_EXPIRED, f"the lease ended {now - deadline} s ago")
        return SecretBuffer.copy_of(payload.view[:FILE_KEY_SIZE])
