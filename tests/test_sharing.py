"""Who opens a backup together: the rules, the stanza that holds them, and what each operator contributes."""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st
from shamir_reference import secret as interpolate

from unsealerd.core.age import (
    Header,
    Identity,
    P256Identity,
    Stanza,
    X25519Identity,
    encrypt_under,
    parse_header,
    verify_mac,
)
from unsealerd.core.age.header import write_header
from unsealerd.core.rules import KnownOperator, Rules
from unsealerd.core.secret import SecretBuffer
from unsealerd.core.sharing import STANZA_TYPE, Backup, Sharing, read, wrap
from unsealerd.errors import AgeHeaderInvalid, AgeMacInvalid, AgeNoMatch

FILE_KEY = bytes.fromhex("c0ffee00112233445566778899aabbcc")
KDF = "argon2id$v=19$m=65536,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA"
NAMES = ("alice", "bob", "carol", "dave")
PEOPLE: dict[str, Identity] = {
    "alice": X25519Identity.generate(),
    "bob": P256Identity(ec.generate_private_key(ec.SECP256R1())),
    "carol": X25519Identity.generate(),
    "dave": P256Identity(ec.generate_private_key(ec.SECP256R1())),
}


def rules_of(
    threshold: int = 1,
    require: Sequence[str] = (),
    names: Sequence[str] = NAMES,
    *,
    groups: dict[str, tuple[str, ...]] | None = None,
    kdf: dict[str, str] | None = None,
) -> Rules:
    operators = tuple(
        KnownOperator(name, PEOPLE[name].recipient, (groups or {}).get(name, ()), (kdf or {}).get(name))
        for name in names
    )
    return Rules(operators, threshold, tuple(require))


def header_by(rules: Rules) -> Header:
    with SecretBuffer.copy_of(FILE_KEY) as file_key:
        return parse_header(write_header(wrap(rules, file_key), file_key).encode())


def sharing_of(rules: Rules) -> Sharing:
    sharing = read(header_by(rules))
    assert sharing is not None
    return sharing


def contribution(sharing: Sharing, index: int) -> SecretBuffer:
    """As the operator opens it."""
    identity, stanza = PEOPLE[sharing.rules.operators[index].name], sharing.stanzas[index]
    point = identity.recipient.ephemeral(stanza)
    assert point is not None
    with identity.exchange(point) as x, identity.recipient.unwrap(stanza, x) as secret:
        return sharing.open_share(index, secret)


def together(sharing: Sharing, names: Iterable[str]) -> bytes:
    indices = [i for i, operator in enumerate(sharing.rules.operators) if operator.name in set(names)]
    shares = {index: contribution(sharing, index) for index in indices}
    with sharing.combine(shares) as file_key:
        return bytes(file_key.view)


GROUPS = {"alice": ("security",), "bob": ("security", "night"), "carol": ("night",)}
CASES = [
    rules_of(2, names=NAMES[:3]),
    rules_of(3),
    rules_of(4),
    rules_of(1, ["carol"]),
    rules_of(2, ["security"], groups=GROUPS),
    rules_of(2, ["security", "night", "dave"], groups=GROUPS),
    rules_of(2, ["alice"], kdf={"carol": KDF}),
    rules_of(1, ["alice"], names=["alice"]),
]


def subsets() -> list[tuple[str, ...]]:
    return [chosen for size in range(len(NAMES) + 1) for chosen in itertools.combinations(NAMES, size)]


@pytest.mark.parametrize("rules", CASES, ids=range(len(CASES)))
def test_exactly_who_satisfies_the_rules_opens(rules: Rules) -> None:
    """Every set of operators; the rules are worked out here a second time."""
    sharing = sharing_of(rules)
    assert sharing.rules == rules
    known = {operator.name: operator for operator in rules.operators}
    for chosen in subsets():
        if not set(chosen) <= set(known):
            continue
        enough = len(chosen) >= rules.threshold and all(
            any(name == each or name in known[each].groups for each in chosen) for name in rules.require
        )
        assert rules.satisfied(chosen) is enough
        assert (rules.needed(chosen) <= len(chosen)) is enough
        if enough:
            assert together(sharing, chosen) == FILE_KEY
        else:
            with pytest.raises(ValueError, match="too few"):
                together(sharing, chosen)


@pytest.mark.promise(2)
def test_too_few_shares_do_not_give_the_file_key_by_force_either() -> None:
    """With the rules out of the way: what the arithmetic gives for too few is not the file key."""
    sharing = sharing_of(rules_of(2, ["security"], groups=GROUPS))
    weak = Sharing(Rules(sharing.rules.operators, 1, sharing.rules.require), sharing.stanzas, sharing.shares)
    assert together(weak, ["alice"]) != FILE_KEY
    lax = Sharing(Rules(sharing.rules.operators, 2), sharing.stanzas, sharing.shares)
    assert together(lax, ["carol", "dave"]) != FILE_KEY  # two, and nobody of security
    assert together(sharing, ["alice", "dave"]) == FILE_KEY


def test_the_format_is_as_it_is_documented() -> None:
    """Opened with other code: HKDF, ChaCha20-Poly1305 and the second implementation of Shamir, from the documentation."""
    rules = rules_of(2, ["security", "dave"], groups=GROUPS)
    header = header_by(rules)
    first, *ordinary = header.stanzas
    assert (first.type, first.args) == (STANZA_TYPE, ("1",))
    body = json.loads(first.body)
    assert json.dumps(body, sort_keys=True, separators=(",", ":")).encode() == first.body
    assert [entry["name"] for entry in body["operators"]] == list(NAMES)
    plain: dict[int, bytes] = {}
    for index, (entry, stanza) in enumerate(zip(body["operators"], ordinary, strict=True)):
        identity = PEOPLE[entry["name"]]
        point = identity.recipient.ephemeral(stanza)
        assert point is not None
        with identity.exchange(point) as x, identity.recipient.unwrap(stanza, x) as buffer:
            secret = bytes(buffer.view)
        assert len(secret) == 16
        key = HKDF(SHA256(), 32, b"", b"unsealerd.io/share/v1").derive(secret)
        sealed = base64.b64decode(entry["share"], validate=True)
        plain[index] = ChaCha20Poly1305(key).decrypt(bytes(12), sealed, entry["name"].encode())
    whole = interpolate({1: plain[0][:16], 4: plain[3][:16]})
    security, dave = plain[1][16:32], plain[3][16:32]
    assert plain[0][16:32] == security  # given whole to everybody of the group
    assert len(plain[2]) == 16
    assert bytes(a ^ b ^ c for a, b, c in zip(whole, security, dave, strict=True)) == FILE_KEY


def test_an_ordinary_header_stays_as_it_was() -> None:
    rules = rules_of(1)
    header = header_by(rules)
    assert rules.plain
    assert [stanza.type for stanza in header.stanzas] == ["X25519", "p256tag", "X25519", "p256tag"]
    assert read(header) is None


def test_a_passphrase_alone_adds_the_list_and_every_stanza_opens_by_itself() -> None:
    rules = rules_of(1, kdf={"carol": KDF})
    backup = Backup.of(header_by(rules))
    assert backup.sharing is not None
    assert backup.split is None
    assert backup.sharing.shares == ()
    for operator, stanza in zip(rules.operators, backup.sharing.stanzas, strict=True):
        point = operator.recipient.ephemeral(stanza)
        assert point is not None
        with PEOPLE[operator.name].exchange(point) as x, operator.recipient.unwrap(stanza, x) as file_key:
            verify_mac(backup.header, file_key)


def test_a_share_opens_with_its_own_secret_and_name_only() -> None:
    sharing = sharing_of(rules_of(2))
    with SecretBuffer.random(16) as other, pytest.raises(AgeNoMatch):
        sharing.open_share(0, other)
    moved = Sharing(sharing.rules, sharing.stanzas, (sharing.shares[1], *sharing.shares[1:]))
    with pytest.raises(AgeNoMatch):
        contribution(moved, 0)


def test_each_write_draws_everything_anew() -> None:
    one, two = sharing_of(CASES[4]), sharing_of(CASES[4])
    assert not set(one.shares) & set(two.shares)
    with contribution(one, 0) as first, contribution(two, 0) as second:
        assert first != second


# --- who could open before, and now


@pytest.mark.parametrize("before", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize(
    "now", [*CASES, rules_of(1), rules_of(1, names=NAMES[:2])], ids=range(len(CASES) + 2)
)
def test_whether_somebody_has_lost_something(before: Rules, now: Rules) -> None:
    """If rules are said to admit what others did, every set that opened by those opens by these."""
    if now.admits(before):
        assert all(now.satisfied(chosen) for chosen in subsets() if before.satisfied(chosen))
    assert before.admits(before)


def test_a_removed_operator_and_a_higher_threshold_are_noticed() -> None:
    assert not rules_of(1, names=NAMES[:2]).admits(rules_of(1))
    assert not rules_of(2).admits(rules_of(1))
    assert not rules_of(1, ["alice"]).admits(rules_of(1))
    assert rules_of(1).admits(rules_of(2, ["alice"]))
    assert rules_of(2).admits(rules_of(2, names=NAMES[:3]))
    assert not rules_of(2, ["security"], groups={"alice": ("security",)}).admits(CASES[4])


@pytest.mark.parametrize(
    "rules",
    [
        rules_of(0),
        rules_of(5),
        rules_of(1, names=[]),
        rules_of(1, ["nobody"]),
        rules_of(1, ["alice", "alice"]),
        rules_of(1, groups={"alice": ("x", "x")}),
        rules_of(1, groups={"alice": ("bob",)}),
        rules_of(1, groups={"alice": ("a b",)}),
        rules_of(1, kdf={"bob": KDF}),  # a passphrase gives no key on P-256
        rules_of(1, kdf={"alice": "argon2id$v=19$m=8,t=1,p=1$AAAAAAAAAAAAAAAAAAAAAA"}),
        rules_of(1, names=["alice", "alice"]),
        Rules((KnownOperator("alice", PEOPLE["bob"].recipient), *rules_of(names=["bob"]).operators)),
        Rules((KnownOperator("ALICE", PEOPLE["bob"].recipient), *rules_of(names=["alice"]).operators)),
        Rules((KnownOperator("a\nb", PEOPLE["bob"].recipient),)),
        Rules((KnownOperator("", PEOPLE["bob"].recipient),)),
    ],
    ids=range(15),
)
def test_rules_that_nobody_could_keep(rules: Rules) -> None:
    with SecretBuffer.copy_of(FILE_KEY) as file_key, pytest.raises(ValueError):
        wrap(rules, file_key)


# --- the parser: what would not be written is refused

Json = dict[str, Any]


def forged(body: bytes, args: tuple[str, ...] = ("1",), ordinary: Sequence[Stanza] | None = None) -> Header:
    stanzas = header_by(CASES[4]).stanzas
    rest = stanzas[1:] if ordinary is None else ordinary
    with SecretBuffer.copy_of(FILE_KEY) as file_key:
        return parse_header(write_header([Stanza(STANZA_TYPE, args, body), *rest], file_key).encode())


def good_body() -> Json:
    body: Json = json.loads(header_by(CASES[4]).stanzas[0].body)
    return body


def canonical(body: object) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def changed(change: Callable[[Json], object]) -> bytes:
    body = good_body()
    change(body)
    return canonical(body)


def entry(**fields: object) -> Callable[[Json], object]:
    return lambda body: body["operators"][0].update(fields)


BAD_BODIES: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"{",
    "not UTF-8": b"\xff",
    "null": b"null",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "a space": json.dumps(good_body(), sort_keys=True).encode(),
    "keys not sorted": json.dumps(dict(reversed(good_body().items())), separators=(",", ":")).encode(),
    "line feed": canonical(good_body()) + b"\n",
    "a key twice": canonical(good_body()).replace(b'"threshold":2', b'"threshold":1,"threshold":2'),
    "escaped": canonical(good_body()).replace(b'"alice"', b'"\\u0061lice"'),
    "surrogate": canonical(good_body()).replace(b'"alice"', b'"\\ud800"'),
    "float": canonical(good_body()).replace(b'"threshold":2', b'"threshold":2.0'),
    "unknown field": changed(lambda body: body.update(version=1)),
    "unknown field of an operator": changed(entry(key="x")),
    "no threshold": changed(lambda body: body.pop("threshold")),
    "threshold 0": changed(lambda body: body.update(threshold=0)),
    "negative": changed(lambda body: body.update(threshold=-1)),
    "huge": changed(lambda body: body.update(threshold=2**70)),
    "too many": changed(lambda body: body.update(threshold=5)),
    "true": changed(lambda body: body.update(threshold=True)),
    "required twice": changed(lambda body: body.update(require=["security", "security"])),
    "nobody is required": changed(lambda body: body.update(require=["nobody"])),
    "not required": changed(lambda body: body.update(require=[])),
    "no operators": changed(lambda body: body.update(operators=[])),
    "one too few": changed(lambda body: body["operators"].pop()),
    "swapped": changed(lambda body: body["operators"].insert(0, body["operators"].pop(1))),
    "twice": changed(lambda body: body["operators"].append(body["operators"][0])),
    "a bad name": changed(entry(name="a b")),
    "a bad recipient": changed(entry(recipient="age1x")),
    "upper case": changed(entry(recipient=str(PEOPLE["alice"].recipient).upper())),
    "another curve": changed(entry(recipient=str(P256Identity(ec.generate_private_key(ec.SECP256R1())).recipient))),
    "no share": changed(entry(share=None)),
    "short share": changed(entry(share="AAAA")),
    "share not base64": changed(entry(share="!" * 64)),
    "another group": changed(entry(groups=[])),
    "bad kdf": changed(entry(kdf="x")),
}  # fmt: skip


@pytest.mark.promise(10)
@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_list_is_refused(name: str) -> None:
    with pytest.raises(AgeHeaderInvalid):
        read(forged(BAD_BODIES[name]))


def test_the_forgery_is_good_if_nothing_is_wrong() -> None:
    assert read(forged(canonical(good_body()))) is not None


@pytest.mark.promise(10)
def test_a_list_in_the_wrong_place() -> None:
    first, *ordinary = header_by(CASES[4]).stanzas
    body = first.body
    for args in ((), ("2",), ("1", "1"), ("01",)):
        with pytest.raises(AgeHeaderInvalid):
            read(forged(body, args))
    for rest in ([], ordinary[:-1], [*ordinary, ordinary[0]], ordinary[::-1], [*ordinary[:-1], first]):
        with pytest.raises(AgeHeaderInvalid):
            read(forged(body, ordinary=rest))
    with SecretBuffer.copy_of(FILE_KEY) as file_key:
        last = parse_header(write_header([*ordinary, first], file_key).encode())
    with pytest.raises(AgeHeaderInvalid):
        read(last)


def test_a_list_that_is_not_needed_is_refused() -> None:
    body: Json = {
        "operators": [
            {"groups": [], "kdf": None, "name": name, "recipient": str(PEOPLE[name].recipient), "share": None}
            for name in NAMES
        ],
        "require": [],
        "threshold": 1,
    }
    with pytest.raises(AgeHeaderInvalid, match="ordinary header"):
        read(forged(canonical(body)))


@pytest.mark.promise(10)
@given(st.binary(max_size=200))
def test_any_bytes_in_place_of_the_list(data: bytes) -> None:
    with pytest.raises(AgeHeaderInvalid):
        read(forged(data))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=8) | st.sampled_from(NAMES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["threshold", "require", "operators", "name", "recipient", "groups", "kdf", "share"]


@pytest.mark.promise(10)
@given(st.sampled_from(FIELDS), json_values, st.integers(0, 3))
def test_any_value_in_any_field_is_refused_or_reads_back_as_it_was_written(
    field: str, value: object, index: int
) -> None:
    body = good_body()
    target = body if field in body else body["operators"][index]
    target[field] = value
    data = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(
        errors="surrogatepass"
    )
    header = forged(data)
    try:
        sharing = read(header)
    except AgeHeaderInvalid:
        return
    assert sharing is not None
    sharing.rules.check()
    assert sharing.rules.split


@pytest.mark.promise(10)
@given(st.integers(0), st.integers(0, 7))
def test_one_other_bit_in_the_list(place: int, bit: int) -> None:
    """Refused, or another file key: the MAC covers it, whoever puts the shares together."""
    header = header_by(CASES[4])
    body = bytearray(header.stanzas[0].body)
    body[place % len(body)] ^= 1 << bit
    bent = Stanza(STANZA_TYPE, ("1",), bytes(body))
    text = header.encode().replace(header.stanzas[0].encode(), bent.encode())
    again = parse_header(text)
    with contextlib.suppress(AgeHeaderInvalid):
        read(again)
    with SecretBuffer.copy_of(FILE_KEY) as file_key, pytest.raises(AgeMacInvalid):
        verify_mac(again, file_key)


# --- stock age


@pytest.mark.parametrize("threshold", [1, 2])
def test_stock_age_opens_the_file_alone_or_fails_cleanly(tmp_path: Path, threshold: int) -> None:
    """With one operator enough the list is a stanza that age passes over. Otherwise what it unwraps is not the file key."""
    age = shutil.which("age")
    assert age is not None, "the package age is needed"
    rules = rules_of(threshold, names=["alice", "carol"], kdf={"carol": KDF})
    with SecretBuffer.copy_of(os.urandom(16)) as file_key:
        data = encrypt_under(wrap(rules, file_key), memoryview(b"attack at dawn"), file_key)
    file, key = tmp_path / "keyring.age", tmp_path / "alice.txt"
    file.write_bytes(data)
    alice = PEOPLE["alice"]
    assert isinstance(alice, X25519Identity)
    key.write_text(alice.encode() + "\n")
    done = subprocess.run([age, "-d", "-i", str(key), str(file)], capture_output=True, check=False)
    if threshold == 1:
        assert (done.returncode, done.stdout) == (0, b"attack at dawn")
    else:
        assert done.returncode == 1
        assert done.stdout == b""
        assert b"bad header MAC" in done.stderr
