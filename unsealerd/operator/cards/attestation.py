"""Proof that a key was made inside of the card: Yubico's PIV attestation.

    slot certificate ──signed by──► device key (slot F9) ──its certificate signed by──► the vendor's CA

Without the vendor's CA this proves little: anybody can put a key of their own into slot F9, and then sign what they like.
https://developers.yubico.com/PIV/Introduction/PIV_attestation.html
"""

import enum
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unsealerd.errors import AttestationInvalid, CardFailed, IdentityInvalid
from unsealerd.operator.cards.names import printable
from unsealerd.operator.cards.policies import Policies, parse_policies

if TYPE_CHECKING:
    from cryptography.x509 import Certificate, ExtensionType

_FIRMWARE = "1.3.6.1.4.1.41482.3.3"
_SERIAL = "1.3.6.1.4.1.41482.3.7"
_POLICIES = "1.3.6.1.4.1.41482.3.8"


class Anchor(enum.Enum):
    """How far the chain of signatures was verified."""

    VENDOR = "vendor"
    """Up to a certificate of the CA bundle that the caller trusts."""
    DEVICE = "device"
    """To the certificate in the device's own slot F9, which its owner can replace."""


@dataclass(frozen=True, slots=True)
class Attestation:
    """A statement that verified: the key was made inside of this device, as far as ``anchor`` is to be trusted."""

    anchor: Anchor
    issuer: str
    """Who signed the device's certificate, for people."""
    serial: str | None
    firmware: tuple[int, ...] | None
    policies: Policies | None


def verify(statement: bytes, device: bytes, public: bytes, ca: bytes | None) -> Attestation:
    """Verify a statement about the key ``public``. It says nothing of which time it is: certificates are not aged.

    ``statement``: the card's certificate for the slot; ``device``: the certificate in slot F9; both in DER. ``public``:
    65 bytes. ``ca``: certificates in PEM, each of which the caller trusts; a chain may also pass through some of them.
    Raises `AttestationInvalid`; `IdentityInvalid` if the bundle cannot be read.
    """
    try:
        slot_certificate, device_certificate = _load(statement), _load(device)
        attested = public_point(statement)
    except CardFailed as err:
        raise AttestationInvalid(err.detail) from err
    if not _is_issued(slot_certificate, device_certificate):
        raise AttestationInvalid("the statement is not signed by the device's key")
    if attested != public:
        raise AttestationInvalid("the statement is about another key")
    anchor = Anchor.DEVICE
    if ca is not None:
        _require_anchored(device_certificate, _bundle(ca))
        anchor = Anchor.VENDOR
    return _result(slot_certificate, device_certificate, anchor)


def public_point(certificate: bytes) -> bytes | None:
    """The public key of a certificate in DER, 65 bytes; None if it is not on P-256. Raises `CardFailed`."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    try:
        key = _load(certificate).public_key()
    except UnsupportedAlgorithm:
        return None
    except ValueError as err:
        raise CardFailed("the card has a certificate that cannot be read") from err
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        return None
    return key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def _load(der: bytes) -> "Certificate":
    from cryptography.x509 import load_der_x509_certificate

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old habits of those who issue, which change nothing here
            return load_der_x509_certificate(der)
    except ValueError as err:
        raise CardFailed("the card has a certificate that cannot be read") from err


def _bundle(pem: bytes) -> "list[Certificate]":
    from cryptography.x509 import load_pem_x509_certificates

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_pem_x509_certificates(pem)
    except ValueError as err:
        raise IdentityInvalid("the bundle of CA certificates is not in PEM") from err


def _is_issued(certificate: "Certificate", issuer: "Certificate") -> bool:
    """Whether the name and the signature fit."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
        return False
    return True


def _require_anchored(device: "Certificate", bundle: "Sequence[Certificate]") -> None:
    """Every certificate of the bundle is trusted, so one step is enough; it must be a CA's all the same."""
    if device in bundle:
        return
    if not any(_is_ca(issuer) and _is_issued(device, issuer) for issuer in bundle):
        raise AttestationInvalid("the device's certificate is not signed by a CA of the bundle")


def _is_ca(certificate: "Certificate") -> bool:
    from cryptography.x509 import BasicConstraints

    value = _extension(certificate, BasicConstraints.oid.dotted_string)
    return isinstance(value, BasicConstraints) and value.ca


def _result(statement: "Certificate", device: "Certificate", anchor: Anchor) -> Attestation:
    firmware, serial = _yubicos(statement, _FIRMWARE), _yubicos(statement, _SERIAL)
    return Attestation(
        anchor,
        _issuer(device),
        _serial(serial) if serial else None,
        tuple(firmware) or None,
        parse_policies(_yubicos(statement, _POLICIES)),
    )


def _extension(certificate: "Certificate", oid: str) -> "ExtensionType | None":
    """Raises `AttestationInvalid` for a certificate whose extensions cannot be read."""
    from cryptography.x509 import (
        DuplicateExtension,
        ExtensionNotFound,
        ObjectIdentifier,
        UnsupportedGeneralNameType,
    )

    try:
        return certificate.extensions.get_extension_for_oid(ObjectIdentifier(oid)).value
    except ExtensionNotFound:
        return None
    except (ValueError, DuplicateExtension, UnsupportedGeneralNameType) as err:
        raise AttestationInvalid("a certificate with extensions that cannot be read") from err


def _yubicos(certificate: "Certificate", oid: str) -> bytes:
    """The value of an extension of Yubico's; nothing if it is not there."""
    from cryptography.x509 import UnrecognizedExtension

    value = _extension(certificate, oid)
    return value.value if isinstance(value, UnrecognizedExtension) else b""


def _serial(data: bytes) -> str:
    """An INTEGER in DER."""
    if len(data) < 3 or data[0] != 0x02 or data[1] != len(data) - 2:
        raise AttestationInvalid("the statement has a serial number that cannot be read")
    return str(int.from_bytes(data[2:], "big"))


def _issuer(device: "Certificate") -> str:
    try:
        name = device.issuer.rfc4514_string()
    except ValueError as err:
        raise AttestationInvalid("the device's certificate names no issuer") from err
    return printable(name)
