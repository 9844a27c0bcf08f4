"""The policy of the sealed copy, and its digest, computed without a TPM.

The digest is not asked of the TPM in a trial session: whatever sits on the bus could answer with the digest of
a policy of its own. It is a hash chain over what part 3 of the TPM 2.0 library specification (rev. 1.59) says for
each policy command, and starts from a digest of zeros. All integers are big endian.
"""

import enum
import hashlib
import struct
from collections.abc import Mapping, Sequence

import msgspec

DIGEST_SIZE = 32
ALG_SHA256 = 0x000B
PCR_COUNT = 24

_CC_POLICY_NV = 0x00000149
_CC_POLICY_COUNTER_TIMER = 0x0000016D
_CC_POLICY_PCR = 0x0000017F

# resetCount in TPMS_TIME_INFO: time (8), then TPMS_CLOCK_INFO: clock (8), resetCount (4). Part 2, 10.11.
RESET_COUNT_OFFSET = 16

_PCR_SELECT_SIZE = 3  # 24 PCRs, one bit each: the least that part 2, 10.6.1 allows on a PC


class Comparison(enum.IntEnum):
    """TPM_EO (part 2, 6.9): how the TPM compares its own value with the operand."""

    EQ = 0x0000
    UNSIGNED_GT = 0x0003
    UNSIGNED_LE = 0x0009


class Condition(msgspec.Struct, frozen=True):
    """One comparison of the reset count, as PolicyCounterTimer makes it."""

    operand: bytes
    comparison: Comparison


class Terms(msgspec.Struct, frozen=True):
    """What must hold when the sealed copy is asked for: all of it.

    The reset count lies between `resets_low` and `resets_high`, both included; the counter has the value `counter`;
    the PCRs of the SHA-256 bank have the values `pcrs`.
    """

    counter_name: bytes
    counter: int
    resets_low: int
    resets_high: int
    pcrs: Mapping[int, bytes]

    @property
    def counter_operand(self) -> bytes:
        return struct.pack(">Q", self.counter)

    @property
    def reset_conditions(self) -> tuple[Condition, ...]:
        """One condition for a single value, two for a range. The running boot is never inside the range."""
        if self.resets_low == self.resets_high:
            return (Condition(struct.pack(">I", self.resets_low), Comparison.EQ),)
        return (
            Condition(struct.pack(">I", self.resets_low - 1), Comparison.UNSIGNED_GT),
            Condition(struct.pack(">I", self.resets_high), Comparison.UNSIGNED_LE),
        )

    @property
    def pcr_digest(self) -> bytes:
        """The hash of the selected values in ascending order (part 1, 17.9)."""
        return hashlib.sha256(b"".join(self.pcrs[index] for index in sorted(self.pcrs))).digest()

    def digest(self) -> bytes:
        """The authPolicy. The order is that of the commands at the unseal.

        The counter comes first, so that a used copy costs the TPM one command to refuse.
        """
        digest = policy_nv(bytes(DIGEST_SIZE), self.counter_name, self.counter_operand, 0, Comparison.EQ)
        for condition in self.reset_conditions:
            digest = policy_counter_timer(digest, condition.operand, RESET_COUNT_OFFSET, condition.comparison)
        return policy_pcr(digest, pcr_selection(tuple(self.pcrs)), self.pcr_digest)


def pcr_selection(indices: Sequence[int]) -> bytes:
    """TPML_PCR_SELECTION of one bank, SHA-256: count (4), algorithm (2), size (1), bit map (3)."""
    bits = sum(1 << index for index in set(indices))
    return struct.pack(">IHB", 1, ALG_SHA256, _PCR_SELECT_SIZE) + bits.to_bytes(_PCR_SELECT_SIZE, "little")


def policy_nv(before: bytes, name: bytes, operand: bytes, offset: int, comparison: Comparison) -> bytes:
    """Part 3, 23.9: H(before || TPM_CC_PolicyNV || H(operand || offset || operation) || name)."""
    arguments = hashlib.sha256(operand + struct.pack(">HH", offset, comparison)).digest()
    return hashlib.sha256(before + struct.pack(">I", _CC_POLICY_NV) + arguments + name).digest()


def policy_counter_timer(before: bytes, operand: bytes, offset: int, comparison: Comparison) -> bytes:
    """Part 3, 23.10: H(before || TPM_CC_PolicyCounterTimer || H(operand || offset || operation))."""
    arguments = hashlib.sha256(operand + struct.pack(">HH", offset, comparison)).digest()
    return hashlib.sha256(before + struct.pack(">I", _CC_POLICY_COUNTER_TIMER) + arguments).digest()


def policy_pcr(before: bytes, selection: bytes, pcr_digest: bytes) -> bytes:
    """Part 3, 23.7: H(before || TPM_CC_PolicyPCR || selection || digest of the values)."""
    return hashlib.sha256(before + struct.pack(">I", _CC_POLICY_PCR) + selection + pcr_digest).digest()
