"""Who opens a backup: one operator alone, or several together. The structure of the age header that says so.

With one operator enough, no ``require`` and no passphrase, the header is one ordinary stanza for each operator, each of
which wraps the file key. Otherwise it begins with one stanza more, and the ordinary ones follow in the order of its list::

    -> unsealerd-operators 1
    {"operators":[{"groups":[...],"kdf":TEXT|null,"name":...,"recipient":...,"share":BASE64|null},...],
     "require":[...],"threshold":K}                        canonical JSON: keys sorted, no white space

    file key = T xor G1 xor ... xor Gm         one G for each name in `require`, each 16 random bytes
    operator's ordinary stanza                 wraps 16 random bytes O of their own, instead of the file key
    share    = ChaCha20-Poly1305(HKDF-SHA256(O, "unsealerd.io/share/v1"), nonce 0, aad = name)
               over  Shamir share of T (K of n, x = place in the list, from 1)  |  each G that this operator satisfies

With K = 1 and no ``require`` every ordinary stanza wraps the file key itself, ``share`` is null, and the list only carries
the ``kdf`` of operators with a passphrase. Whoever knows the file key has made it all: the header's MAC covers it. Before
that is verified nothing in the list is to be believed, but that a share which opens was made for this O.
"""

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from unsealerd.core import shamir
from unsealerd.core.age import FILE_KEY_SIZE, Header, Stanza, parse_recipient
from unsealerd.core.age.primitives import TAG_SIZE, derive
from unsealerd.core.rules import KnownOperator, Rules
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import AgeHeaderInvalid, AgeNoMatch, IdentityInvalid, StorageFailed

STANZA_TYPE = "unsealerd-operators"
PART_SIZE = FILE_KEY_SIZE
"""Bytes of an operator's secret, of a Shamir share and of what stands for a required name."""

_VERSION = ("1",)
_INFO = b"unsealerd.io/share/v1"
# The key of a share is derived from 16 fresh random bytes, and encrypts that one share.
_ZERO_NONCE = bytes(12)


class Sharing(msgspec.Struct, frozen=True):
    """The rules of one backup, as its header has them."""

    rules: Rules
    stanzas: tuple[Stanza, ...]
    """The ordinary ones, in the order of the operators."""
    shares: tuple[bytes, ...]
    """Encrypted, in the same order; none unless the rules are split."""

    def open_share(self, index: int, secret: SecretBuffer) -> SecretBuffer:
        """What this operator contributes, from what their stanza wraps. Raises ``AgeNoMatch``."""
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        body = self.shares[index]
        share = SecretBuffer(len(body) - TAG_SIZE)
        try:
            with derive(secret.view, b"", _INFO) as key:
                name = self.rules.operators[index].name.encode()
                ChaCha20Poly1305(key.view).decrypt_into(_ZERO_NONCE, body, name, share.view)
        except InvalidTag as err:
            share.close()
            raise AgeNoMatch("the share was made for another secret") from err
        return share

    def combine(self, shares: Mapping[int, SecretBuffer]) -> SecretBuffer:
        """The file key, from what operators contribute, by their places in the list.

        ``ValueError`` if they do not satisfy the rules. Whether it is the right one is for the header's MAC to say.
        """
        operators = self.rules.operators
        if not self.rules.satisfied({operators[index].name for index in shares}):
            raise ValueError("too few shares, or not of everybody who is required")
        file_key = SecretBuffer(FILE_KEY_SIZE)
        shamir.combine([(i + 1, share.view[:PART_SIZE]) for i, share in shares.items()], file_key.view)
        for required in self.rules.require:
            holder = next(index for index in shares if operators[index].satisfies(required))
            at = PART_SIZE * (1 + self.rules.require_of(holder).index(required))
            _xor(file_key.view, shares[holder].view[at : at + PART_SIZE])
        return file_key


class Backup(msgspec.Struct, frozen=True):
    """What a header says before anything is opened."""

    header: Header
    sharing: Sharing | None
    """None: it is for whoever has a stanza, each alone."""

    @classmethod
    def of(cls, header: Header) -> "Backup":
        """Raises ``AgeHeaderInvalid``."""
        return cls(header, read(header))

    @property
    def split(self) -> Sharing | None:
        """The sharing, where an operator's stanza gives a share and not the file key."""
        return self.sharing if self.sharing is not None and self.sharing.rules.split else None

    def members(self, current: Sequence[KnownOperator]) -> Iterator[tuple[int, KnownOperator]]:
        """Who may be asked: whom the configuration names and the backup knows, as it knows them, with their places in it.

        A backup without a list was written for nobody with a passphrase.
        """
        if self.sharing is None:
            yield from ((index, each) for index, each in enumerate(current) if each.kdf is None)
            return
        recipients = {str(operator.recipient) for operator in current}
        for index, operator in enumerate(self.sharing.rules.operators):
            if str(operator.recipient) in recipients:
                yield index, operator

    def stanzas(self, index: int) -> tuple[Stanza, ...]:
        """Those that may be this member's."""
        return self.header.stanzas if self.sharing is None else (self.sharing.stanzas[index],)


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    recipient: str
    groups: tuple[str, ...]
    kdf: str | None
    share: bytes | None


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    threshold: int
    require: tuple[str, ...]
    operators: tuple[_Entry, ...]


# --- writing


def wrap(rules: Rules, file_key: SecretBuffer) -> list[Stanza]:
    """All stanzas of a header that opens by these rules. ``ValueError`` for rules that nobody could keep."""
    rules.check()
    if not rules.split:
        ordinary = [operator.recipient.wrap(file_key) for operator in rules.operators]
        return ordinary if rules.plain else [_stanza(rules, [None] * len(ordinary)), *ordinary]
    with (
        SecretBuffer.random(PART_SIZE * (1 + len(rules.require))) as parts,
        SecretBuffer(PART_SIZE * len(rules.operators)) as points,
    ):
        views = [parts.view[at : at + PART_SIZE] for at in range(0, len(parts), PART_SIZE)]
        views[0][:] = file_key.view
        for part in views[1:]:
            _xor(views[0], part)
        shares = [points.view[at : at + PART_SIZE] for at in range(0, len(points), PART_SIZE)]
        shamir.split(views[0], rules.threshold, shares)
        held = dict(zip(rules.require, views[1:], strict=True))
        return _wrap_shares(rules, file_key, shares, held)


def _wrap_shares(
    rules: Rules, file_key: SecretBuffer, points: Sequence[memoryview], held: Mapping[str, memoryview]
) -> list[Stanza]:
    """``held``: what stands for each required name."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    ordinary: list[Stanza] = []
    bodies: list[bytes] = []
    contents: list[SecretBuffer] = []
    try:
        for index, operator in enumerate(rules.operators):
            pieces = [points[index], *(held[name] for name in rules.require_of(index))]
            content = SecretBuffer(PART_SIZE * len(pieces))
            contents.append(content)
            for number, piece in enumerate(pieces):
                content.view[number * PART_SIZE : (number + 1) * PART_SIZE] = piece
            with SecretBuffer.random(PART_SIZE) as secret, derive(secret.view, b"", _INFO) as key:
                body = bytearray(len(content) + TAG_SIZE)
                name = operator.name.encode()
                ChaCha20Poly1305(key.view).encrypt_into(_ZERO_NONCE, content.view, name, body)
                bodies.append(bytes(body))
                ordinary.append(operator.recipient.wrap(secret))
        _prove(Sharing(rules, tuple(ordinary), tuple(bodies)), contents, file_key)
    finally:
        for content in contents:
            content.close()
    return [_stanza(rules, bodies), *ordinary]


def _prove(sharing: Sharing, contents: Sequence[SecretBuffer], file_key: SecretBuffer) -> None:
    """The smallest set from the end of the list opens what is about to replace the only backup; a fault here is a bug."""
    operators = sharing.rules.operators
    chosen = set(range(len(operators) - sharing.rules.threshold, len(operators)))
    for required in sharing.rules.unmet({operators[index].name for index in chosen}):
        chosen.add(next(i for i, operator in enumerate(operators) if operator.satisfies(required)))
    with sharing.combine({index: contents[index] for index in chosen}) as again:
        if again != file_key:
            raise StorageFailed("the shares do not give the file key again")


def _stanza(rules: Rules, shares: Sequence[bytes | None]) -> Stanza:
    entries = tuple(
        _Entry(operator.name, str(operator.recipient), operator.groups, operator.kdf, share)
        for operator, share in zip(rules.operators, shares, strict=True)
    )
    return Stanza(STANZA_TYPE, _VERSION, _encode(_Body(rules.threshold, rules.require, entries)))


def _encode(body: _Body) -> bytes:
    return msgspec.json.encode(body, order="sorted")


# --- reading


def read(header: Header) -> Sharing | None:
    """Who opens the file of this header together; None if it is for whoever has a stanza, each alone.

    Raises ``AgeHeaderInvalid`` for what `wrap` would not write.
    """
    if not any(stanza.type == STANZA_TYPE for stanza in header.stanzas):
        return None
    first, *ordinary = header.stanzas
    if first.type != STANZA_TYPE or any(stanza.type == STANZA_TYPE for stanza in ordinary):
        raise AgeHeaderInvalid("the list of operators is the first stanza, and there is one")
    if first.args != _VERSION:
        raise AgeHeaderInvalid("a list of operators of another version")
    body = _decode(first.body)
    rules = _rules(body)
    if rules.plain:
        raise AgeHeaderInvalid("a list of operators where an ordinary header says it all")
    shares = tuple(entry.share for entry in body.operators if entry.share is not None)
    if len(shares) != (len(body.operators) if rules.split else 0):
        raise AgeHeaderInvalid("a share for all operators or for none, as the rules ask for")
    for index, share in enumerate(shares):
        if len(share) != PART_SIZE * (1 + len(rules.require_of(index))) + TAG_SIZE:
            raise AgeHeaderInvalid("a share of another length than its parts have")
    if len(ordinary) != len(rules.operators) or not all(
        operator.recipient.ephemeral(stanza) is not None
        for operator, stanza in zip(rules.operators, ordinary, strict=True)
    ):
        raise AgeHeaderInvalid("one stanza for each operator, in the order of the list")
    return Sharing(rules, tuple(ordinary), shares)


def _decode(data: bytes) -> _Body:
    try:
        body = msgspec.json.decode(data, type=_Body)
        again = _encode(body)
    # Bad UTF-8 and deep nesting are errors of their own in msgspec.
    except (msgspec.DecodeError, UnicodeError, RecursionError) as err:
        raise AgeHeaderInvalid("not a list of operators") from err
    # The library is lax about white space, escapes, the order of keys, numbers and base64. Writing it again and comparing
    # is strict about all of them at once.
    if again != data:
        raise AgeHeaderInvalid("a list of operators in another spelling than the canonical one")
    return body


def _rules(body: _Body) -> Rules:
    try:
        operators = tuple(
            KnownOperator(entry.name, parse_recipient(entry.recipient), entry.groups, entry.kdf)
            for entry in body.operators
        )
        rules = Rules(operators, body.threshold, body.require)
        rules.check()
    except IdentityInvalid as err:
        raise AgeHeaderInvalid(f"a list of operators with a bad recipient: {err.detail}") from err
    except ValueError as err:
        raise AgeHeaderInvalid(f"a list of operators with rules that are none: {err}") from err
    return rules


def _xor(target: memoryview, other: memoryview) -> None:
    for at in range(target.nbytes):
        target[at] ^= other[at]
