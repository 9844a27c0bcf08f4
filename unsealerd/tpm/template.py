"""Public areas (TPMT_PUBLIC, TPMS_NV_PUBLIC) as bytes, as part 2 of the TPM 2.0 library specification lays them out.

All integers are big endian; a "sized" field has two bytes of length in front.
"""

import struct

from unsealerd.tpm.policy import ALG_SHA256, DIGEST_SIZE

_ALG_KEYEDHASH = 0x0008
_ALG_AES = 0x0006
_ALG_NULL = 0x0010
_ALG_ECC = 0x0023
_ALG_CFB = 0x0043
_ECC_NIST_P256 = 0x0003

# TPMA_OBJECT (part 2, 8.3).
_FIXED_TPM = 1 << 1
_FIXED_PARENT = 1 << 4
_SENSITIVE_DATA_ORIGIN = 1 << 5
_USER_WITH_AUTH = 1 << 6
_ADMIN_WITH_POLICY = 1 << 7
_NO_DA = 1 << 10
_RESTRICTED = 1 << 16
_DECRYPT = 1 << 17
_SIGN = 1 << 18

# TPMA_NV (part 2, 13.4). No TPMA_NV_ORDERLY: such a counter lives in RAM and jumps after a power cut.
_NV_AUTHWRITE = 1 << 2
_NV_COUNTER = 1 << 4
_NV_OWNERREAD = 1 << 17
_NV_AUTHREAD = 1 << 18
_NV_NO_DA = 1 << 25
COUNTER_ATTRIBUTES = _NV_AUTHREAD | _NV_AUTHWRITE | _NV_OWNERREAD | _NV_NO_DA | _NV_COUNTER
COUNTER_SIZE = 8


def _sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def storage_root_key() -> bytes:
    """The standard ECC P-256 storage root key (TCG TPM v2.0 Provisioning Guidance, 7.5.1; EK profile, template H-2).

    noDA, so that a power cut while it is loaded does not count as an attack on it.
    """
    attributes = (
        _FIXED_TPM
        | _FIXED_PARENT
        | _SENSITIVE_DATA_ORIGIN
        | _USER_WITH_AUTH
        | _NO_DA
        | _RESTRICTED
        | _DECRYPT
    )
    parameters = struct.pack(">HHHHHH", _ALG_AES, 128, _ALG_CFB, _ALG_NULL, _ECC_NIST_P256, _ALG_NULL)
    unique = _sized(bytes(32)) * 2
    return struct.pack(">HHI", _ALG_ECC, ALG_SHA256, attributes) + _sized(b"") + parameters + unique


def sealed_object(policy: bytes) -> bytes:
    """The public area of a sealed copy, all but its `unique` field, which the TPM fills in.

    No userWithAuth: nothing but the policy opens it. adminWithPolicy: nor is there another way to certify it or to
    change its authorisation. fixedTPM and fixedParent: it cannot be duplicated.
    """
    attributes = _FIXED_TPM | _FIXED_PARENT | _ADMIN_WITH_POLICY | _NO_DA
    return (
        struct.pack(">HHI", _ALG_KEYEDHASH, ALG_SHA256, attributes)
        + _sized(policy)
        + struct.pack(">H", _ALG_NULL)
    )


def is_sealed_object(public: bytes, policy: bytes) -> bool:
    """Is `public` a sealed copy of ours, under this policy?"""
    prefix = sealed_object(policy)
    unique = public[len(prefix) :]
    return (
        public.startswith(prefix)
        and len(unique) == 2 + DIGEST_SIZE
        and unique[:2] == struct.pack(">H", DIGEST_SIZE)
    )


def is_storage_key(public: bytes) -> bool:
    """Does `public` describe a restricted decryption key, that is, one which protects others?"""
    attributes = int(struct.unpack_from(">I", public, 4)[0])
    return attributes & (_RESTRICTED | _DECRYPT | _SIGN) == _RESTRICTED | _DECRYPT


def counter(handle: int) -> bytes:
    """TPMS_NV_PUBLIC of the counter: handle, name algorithm, attributes, no policy, eight bytes."""
    return struct.pack(">IHIHH", handle, ALG_SHA256, COUNTER_ATTRIBUTES, 0, COUNTER_SIZE)
