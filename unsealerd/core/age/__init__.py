"""The age v1 file format, strictly: X25519, p256tag and scrypt stanzas, header MAC, STREAM payload, armor.

Written from the C2SP specification (https://c2sp.org/age), readable on its own. Bytes in, bytes or secret memory out.
"""

from unsealerd.core.age.armor import dearmor, is_armored
from unsealerd.core.age.file import decrypt, decrypt_payload, encrypt, encrypt_under
from unsealerd.core.age.header import Header, Stanza, parse_header, verify_mac
from unsealerd.core.age.p256tag import P256Identity, P256TagRecipient
from unsealerd.core.age.primitives import FILE_KEY_SIZE
from unsealerd.core.age.recipient import Identity, Recipient, parse_recipient
from unsealerd.core.age.scrypt import ScryptIdentity
from unsealerd.core.age.x25519 import X25519Identity, X25519Recipient

__all__ = [
    "FILE_KEY_SIZE",
    "Header",
    "Identity",
    "P256Identity",
    "P256TagRecipient",
    "Recipient",
    "ScryptIdentity",
    "Stanza",
    "X25519Identity",
    "X25519Recipient",
    "dearmor",
    "decrypt",
    "decrypt_payload",
    "encrypt",
    "encrypt_under",
    "is_armored",
    "parse_header",
    "parse_recipient",
    "verify_mac",
]
