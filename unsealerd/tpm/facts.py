"""What the TPM says about itself. Read without a session: for people, nothing is decided on it."""

import enum
from collections.abc import Sequence

import msgspec

from unsealerd.tpm import commands, parent
from unsealerd.tpm.esys import Esys

# TPM_PT (part 2, 6.13).
_MANUFACTURER = 0x105
_FIRMWARE_1 = 0x10B
_FIRMWARE_2 = 0x10C
_PERMANENT = 0x200
_LOCKOUT_COUNTER = 0x20E
_IN_LOCKOUT = 1 << 9  # TPMA_PERMANENT (part 2, 8.6)


class ParentKind(enum.Enum):
    PERSISTENT = "persistent"
    TEMPLATE = "template"


class TpmFacts(msgspec.Struct, frozen=True):
    """`clock` in milliseconds; `lockout_counter` counts failed authorisations, and power cuts with DA objects loaded.

    `pcr_values`: of the SHA-256 bank, hex by the decimal number of the PCR.
    """

    manufacturer: str
    firmware: str
    reset_count: int
    restart_count: int
    clock: int
    lockout_counter: int
    in_lockout: bool
    parent: ParentKind
    pcr_values: dict[str, str]


def read(esys: Esys, parent_handle: int | None, pcrs: Sequence[int]) -> TpmFacts:
    """The facts. `parent_handle` is the pinned one; None where nothing is pinned yet: what would be chosen."""
    fixed = commands.properties(esys, _MANUFACTURER, _FIRMWARE_2 - _MANUFACTURER + 1)
    variable = commands.properties(esys, _PERMANENT, _LOCKOUT_COUNTER - _PERMANENT + 1)
    clock = commands.read_clock(esys, None)
    if parent_handle is None:
        here = parent.PERSISTENT_HANDLE in esys.handles(parent.PERSISTENT_HANDLE, 1)
        parent_handle = parent.PERSISTENT_HANDLE if here else parent.FROM_TEMPLATE
    return TpmFacts(
        manufacturer=_text(fixed.get(_MANUFACTURER, 0)),
        firmware=_version(fixed.get(_FIRMWARE_1, 0), fixed.get(_FIRMWARE_2, 0)),
        reset_count=clock.reset_count,
        restart_count=clock.restart_count,
        clock=clock.clock,
        lockout_counter=variable.get(_LOCKOUT_COUNTER, 0),
        in_lockout=bool(variable.get(_PERMANENT, 0) & _IN_LOCKOUT),
        parent=ParentKind.TEMPLATE if parent_handle == parent.FROM_TEMPLATE else ParentKind.PERSISTENT,
        pcr_values={str(pcr): value.hex() for pcr, value in commands.read_pcrs(esys, None, pcrs).items()},
    )


def _text(four: int) -> str:
    """Four characters, padded with spaces or zeros: ``IBM``. What cannot be printed is left out."""
    return "".join(chr(byte) for byte in four.to_bytes(4, "big") if 0x20 <= byte < 0x7F).strip()


def _version(high: int, low: int) -> str:
    return ".".join(str(part) for part in (high >> 16, high & 0xFFFF, low >> 16, low & 0xFFFF))
