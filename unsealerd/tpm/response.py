"""What a response code of the TPM, or of the library, means for us (TPM 2.0 part 2, 6.6; TSS 2.0 overview, 3.13)."""

import enum

from unsealerd.errors import TpmFailed, TpmLockout, TpmMissing, UnsealerdError


class TpmResponse(Exception):
    """A command was answered with something else than success."""

    def __init__(self, command: str, code: int) -> None:
        super().__init__(f"{command}: 0x{code:x}")
        self.command = command
        self.code = code


class Remedy(enum.Enum):
    """What to do after a response code."""

    RETRY = enum.auto()  # the same again, in a new session
    RENEW = enum.auto()  # as RETRY, after flushing what is loaded and looking up the pinned objects again
    NONE = enum.auto()


_LAYER = 0x00FF0000
_LAYER_TCTI = 0x000A0000
_LAYER_RESOURCE_MANAGER_TPM = 0x000B0000  # the TPM's code, passed on by a resource manager
_NO_CONNECTION = 8
_IO_ERROR = 10
_RSP_AUTH_FAILED = 27

_FORMAT_ONE = 0x080  # the code names a parameter, a session or a handle
_OF_PARAMETER = 0x040
_ERROR_MASK = 0x03F

_PCR_CHANGED = 0x128
_POLICY = 0x126
_LOCKOUT = 0x921
_MEMORY = frozenset({0x902, 0x903, 0x904, 0x905})  # object, session, other; no session handle left
# CONTEXT_GAP, YIELDED, CANCELED, TESTING, NV_RATE, RETRY, NV_UNAVAILABLE
_PASSING = frozenset({0x901, 0x908, 0x909, 0x90A, 0x920, 0x922, 0x923, _PCR_CHANGED})
_REFERENCE_SESSION = range(0x918, 0x91F)
_REFERENCE_HANDLE = range(0x910, 0x917)

_FMT1_HANDLE = 0x0B
_FMT1_POLICY_FAIL = 0x1D
_FMT1_VALUE = 0x04
_FMT1_BAD_AUTH = 0x22
_FMT1_AUTH_FAIL = 0x0E


def from_tpm(code: int) -> int | None:
    """The TPM's own code, or None if the code is one of the library's."""
    return code & ~_LAYER if code & _LAYER in (0, _LAYER_RESOURCE_MANAGER_TPM) else None


def remedy(code: int) -> Remedy:
    match from_tpm(code):
        case None:
            return Remedy.NONE
        case tpm if tpm in _PASSING or tpm in _REFERENCE_SESSION:
            return Remedy.RETRY
        case tpm if tpm in _MEMORY or tpm in _REFERENCE_HANDLE or is_unknown_handle(tpm):
            # A killed predecessor left its objects behind, or ours went with a reset of the TPM.
            return Remedy.RENEW
        case _:
            return Remedy.NONE


def _format_one(code: int) -> int | None:
    tpm = from_tpm(code)
    return tpm & _ERROR_MASK if tpm is not None and tpm & _FORMAT_ONE else None


def is_unknown_handle(code: int) -> bool:
    """TPM_RC_HANDLE of a handle: there is no such object or index."""
    return _format_one(code) == _FMT1_HANDLE and not code & _OF_PARAMETER


def is_of_parameter(code: int) -> bool:
    """The TPM refuses a parameter: at TPM2_Load, a blob that it did not make or that was changed."""
    return _format_one(code) is not None and bool(code & _OF_PARAMETER)


def is_policy_refusal(code: int) -> bool:
    """A policy command or the unseal says that the policy does not hold.

    TPM_RC_POLICY from PolicyNV and PolicyCounterTimer, TPM_RC_VALUE from PolicyPCR, TPM_RC_POLICY_FAIL from Unseal.
    """
    if from_tpm(code) == _POLICY:
        return True
    return _format_one(code) in (_FMT1_POLICY_FAIL, _FMT1_VALUE)


def is_disconnect(code: int) -> bool:
    return code & _LAYER == _LAYER_TCTI and code & 0xFFFF in (_NO_CONNECTION, _IO_ERROR)


def as_error(response: TpmResponse) -> UnsealerdError:
    """The named error of a response that nothing cured."""
    code = response.code
    if is_disconnect(code):
        return TpmMissing(f"the connection to the TPM broke at {response}")
    tpm = from_tpm(code)
    if tpm == _LOCKOUT:
        return TpmLockout(f"the TPM is in dictionary-attack lockout: {response}")
    if tpm is None and code & 0xFFFF == _RSP_AUTH_FAILED:
        return TpmFailed(
            f"the answer does not carry the TPM's HMAC, something answers in its place: {response}"
        )
    if _format_one(code) in (_FMT1_BAD_AUTH, _FMT1_AUTH_FAIL):
        return TpmFailed(f"the TPM asks for an authorisation that is not empty: {response}")
    return TpmFailed(f"the TPM answered {response}")
