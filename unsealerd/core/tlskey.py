"""The fingerprint of a TLS key, as the gateway says it and the operator pins it.

Found by walking to one element of the certificate, not by parsing it: the X.509 library costs the gateway 10 MB and the
operator's tool 20 ms, and TLS itself judges the certificate.
"""

import base64
import binascii
import hashlib

from unsealerd.errors import IdentityInvalid

SERVER_NAME = "unsealerd.invalid"
"""The name in every gateway's certificate (RFC 2606 section 2: never a real one). The key is pinned, not the name."""

_PEM_BEGIN = b"-----BEGIN CERTIFICATE-----"
_PEM_END = b"-----END CERTIFICATE-----"
_SEQUENCE = 0x30
_VERSION = 0xA0  # [0] EXPLICIT
_BEFORE_KEY = 5  # serialNumber, signature, issuer, validity, subject


def fingerprint(certificate: bytes) -> bytes:
    """SHA-256 of the SubjectPublicKeyInfo of a certificate, PEM or DER: 32 bytes.

    Of the key and not of the certificate, as RFC 7469 section 2.4 does: a new certificate on the same key is the same
    host. Raises `IdentityInvalid`.

    ::

        Certificate    ::= SEQUENCE { tbsCertificate, signatureAlgorithm, signatureValue }      RFC 5280 section 4.1
        TBSCertificate ::= SEQUENCE { [0] version, serialNumber, signature, issuer, validity, subject,
                                      subjectPublicKeyInfo, ... }
    """
    try:
        der = _from_pem(certificate) if certificate.lstrip().startswith(b"-----") else certificate
        whole, rest = _element(der, _SEQUENCE)
        if rest:
            raise ValueError("more than one element")
        fields, _ = _element(_content(whole), _SEQUENCE)
        _, rest = _element(_content(fields), _VERSION)
        for _ in range(_BEFORE_KEY):
            _, rest = _element(rest)
        info, _ = _element(rest, _SEQUENCE)
    except ValueError as err:
        raise IdentityInvalid("not an X.509 certificate") from err
    return hashlib.sha256(info).digest()


def _from_pem(text: bytes) -> bytes:
    begin, _, rest = text.strip().partition(b"\n")
    body, end, after = rest.partition(_PEM_END)
    if begin.strip() != _PEM_BEGIN or not end or after:
        raise ValueError("not one PEM certificate")
    try:
        return base64.b64decode(b"".join(body.split()), validate=True)
    except binascii.Error as err:
        raise ValueError("not base64") from err


def _header(data: bytes) -> tuple[int, int]:
    """Sizes of tag and length, and of the content: X.690 section 10.1, lengths of at most two bytes."""
    if len(data) < 2:
        raise ValueError("cut off")
    first = data[1]
    if first < 0x80:
        return 2, first
    count = first & 0x7F
    if count not in (1, 2) or len(data) < 2 + count:
        raise ValueError("not a length")
    return 2 + count, int.from_bytes(data[2 : 2 + count], "big")


def _element(data: bytes, tag: int | None = None) -> tuple[bytes, bytes]:
    """The first element, whole, and what comes after it. Raises ``ValueError``."""
    head, size = _header(data)
    if len(data) < head + size or (tag is not None and data[0] != tag):
        raise ValueError("cut off, or another element")
    return data[: head + size], data[head + size :]


def _content(element: bytes) -> bytes:
    return element[_header(element)[0] :]
