"""A whole age v1 file: header and payload.

Decryption goes through five stages, and each has its error: armor (`AgeArmorInvalid`), header (`AgeHeaderInvalid`), a
stanza that is ours (`AgeNoMatch`), the header's MAC (`AgeMacInvalid`), the payload (`AgePayloadInvalid`). No stage begins
before the one before it has passed, and no plaintext is given out before the last has.
"""

from collections.abc import Sequence

from unsealerd.core.age.armor import dearmor, is_armored
from unsealerd.core.age.header import MAX_STANZAS, Header, Stanza, parse_header, verify_mac, write_header
from unsealerd.core.age.recipient import Identity, Recipient
from unsealerd.core.age.scrypt import ScryptIdentity
from unsealerd.core.age.stream import NONCE_SIZE, decrypt_stream, encrypt_stream
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import AgeHeaderInvalid, AgeNoMatch


def encrypt(plaintext: memoryview, file_key: SecretBuffer, recipients: Sequence[Recipient]) -> bytes:
    """The binary file. The file key is 16 random bytes that are used for no other file."""
    if not 0 < len(recipients) <= MAX_STANZAS:
        raise ValueError(f"a file is for 1 to {MAX_STANZAS} recipients")
    return encrypt_under([recipient.wrap(file_key) for recipient in recipients], plaintext, file_key)


def encrypt_under(stanzas: Sequence[Stanza], plaintext: memoryview, file_key: SecretBuffer) -> bytes:
    """The same with these stanzas, for who wraps the file key in a way of their own. The MAC covers them all."""
    if not 0 < len(stanzas) <= MAX_STANZAS:
        raise ValueError(f"a header has 1 to {MAX_STANZAS} stanzas")
    header = write_header(stanzas, file_key)
    out = bytearray(header.encode())
    encrypt_stream(plaintext, file_key, out)
    return bytes(out)


def decrypt_payload(data: bytes, header: Header, file_key: SecretBuffer) -> SecretBuffer:
    """The plaintext of a binary file whose file key somebody supplied: all of it or nothing.

    Raises ``AgeMacInvalid``, ``AgeHeaderInvalid`` for a file that ends before the payload's nonce (which other
    implementations read with the header, and report with it), ``AgePayloadInvalid``.
    """
    verify_mac(header, file_key)
    if len(data) - header.size < NONCE_SIZE:
        raise AgeHeaderInvalid("the file ends before its payload begins")
    with memoryview(data) as view:
        return decrypt_stream(view[header.size :], file_key)


def decrypt(data: bytes, identities: Sequence[Identity | ScryptIdentity]) -> SecretBuffer:
    """The plaintext of a binary or armored file. Raises one of the five errors of this module's head.

    With a passphrase also ``LimitExceeded``, if this machine lacks the memory that the file's work factor asks for.
    """
    binary = dearmor(data) if is_armored(data) else data
    header = parse_header(binary)
    with _file_key(header, identities) as file_key:
        return decrypt_payload(binary, header, file_key)


def _file_key(header: Header, identities: Sequence[Identity | ScryptIdentity]) -> SecretBuffer:
    for identity in identities:
        try:
            if isinstance(identity, ScryptIdentity):
                return identity.unwrap(header.stanzas)
            return _unwrap(header.stanzas, identity)
        except AgeNoMatch:
            continue
    raise AgeNoMatch("no stanza is addressed to the identities at hand")


def _unwrap(stanzas: Sequence[Stanza], identity: Identity) -> SecretBuffer:
    recipient = identity.recipient
    # All stanzas are read before the private key is used: a malformed one refuses the file, wherever it stands.
    points = [(stanza, recipient.ephemeral(stanza)) for stanza in stanzas]
    for stanza, point in points:
        if point is None:
            continue
        with identity.exchange(point) as shared:
            try:
                return recipient.unwrap(stanza, shared)
            except AgeNoMatch:  # somebody else's
                continue
    raise AgeNoMatch("no stanza is addressed to this identity")
