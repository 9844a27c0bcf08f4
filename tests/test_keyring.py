"""The keyring's format: it round-trips, it has one spelling, and what it refuses it refuses by one error."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from unsealerd.core import keyring as keyring_format
from unsealerd.core.draft import Draft
from unsealerd.core.keyring import MAX_BYTES, Key, Keyring, Metadata, Version, compose, parse
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import KeyNotFound, KeyringInvalid, VersionNotFound
from unsealerd.model import KEY_NAME, VersionState

MAGIC = b"unsealerd-keyring-v2\n"
LINEAGE = b"l" * 32
NOW = 1_800_000_000
FULL_COUNT = 2**64 - 1
LAST_TIME = 253_402_300_799

Json = dict[str, Any]


def content(keyring: Keyring) -> bytes:
    """The whole plaintext. These keys protect nothing, so they may be bytes."""
    return bytes(keyring.buffer.view)


@contextmanager
def parsed(data: bytes) -> Iterator[Keyring]:
    buffer = SecretBuffer.copy_of(data)
    try:
        yield parse(buffer)
    finally:
        buffer.close()


def refused(data: bytes) -> str:
    """Why `data` is not a keyring."""
    with pytest.raises(KeyringInvalid) as caught, parsed(data):
        pass
    return caught.value.detail


def spelled(metadata: object, keys: bytes = b"", lineage: bytes = LINEAGE) -> bytes:
    text = json.dumps(metadata, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode()
    return MAGIC + b"%d\n" % len(text) + text + lineage + keys


def version(number: int = 1, state: str = "primary", **fields: object) -> Json:
    changed = None if state == "primary" else NOW
    retires = NOW + 9 if state == "active" else None
    return {
        "version": number,
        "state": state,
        "size": 16,
        "created": NOW,
        "changed": changed,
        "retires": retires,
        **fields,
    }


def key(name: str = "web", *versions: Json, **fields: object) -> Json:
    return {
        "name": name,
        "owner": "team",
        "purpose": "cookies",
        "versions": versions or [version()],
        **fields,
    }


def metadata(*keys: Json, **fields: object) -> Json:
    return {"generation": 1, "written": NOW, "counter": None, "keys": keys, **fields}


GOOD = spelled(metadata(key(), counter=7), b"k" * 16)
HEAD_SIZE = len(GOOD) - 32 - 16


# --- what is built is what is read

names = st.from_regex(re.compile(KEY_NAME), fullmatch=True)
texts = st.text(max_size=20).filter(str.isprintable)


@st.composite
def keyrings(draw: st.DrawFn) -> Keyring:
    """Any keyring that drafts can make."""
    draft = Draft(None)
    now = NOW
    known = draw(st.lists(names, max_size=4, unique=True))
    for name in known:
        draft.create(name, owner=draw(texts), purpose=draw(texts), size=draw(st.integers(16, 80)), now=now)
    for name in known:
        for step in draw(
            st.lists(st.sampled_from(["rotate", "replace", "revoke", "purge", "expire"]), max_size=5)
        ):
            now += 10
            match step:
                case "rotate":
                    draft.rotate(name, size=draw(st.none() | st.integers(16, 80)), overlap=15, now=now)
                case "replace":
                    draft.rotate(name, size=None, overlap=0, now=now)
                case "expire":
                    draft.expire(now)
                case "revoke":
                    try:
                        draft.revoke(name, 1, size=32, now=now)
                    except VersionNotFound:
                        continue
                case "purge":
                    try:
                        draft.revoke(name, None, size=draw(st.sampled_from([None, 32])), now=now)
                    except VersionNotFound:
                        continue
    counter = draw(st.none() | st.integers(1, FULL_COUNT))
    return draft.build(generation=draw(st.integers(1, FULL_COUNT)), counter=counter, now=now)


@given(keyrings())
def test_what_a_draft_builds_is_read_back(built: Keyring) -> None:
    data = content(built)
    with parsed(data) as again:
        assert again.metadata == built.metadata
        assert content(again) == data
        for each in built.metadata.keys:
            for v in each.versions:
                if v.state is not VersionState.REVOKED:
                    assert again.view(each.name, v.version) == built.view(each.name, v.version)
                    assert again.view(each.name, v.version).nbytes == v.size
    built.close()


@given(keyrings())
def test_what_is_read_is_what_would_be_written(built: Keyring) -> None:
    with parsed(content(built)) as again:
        sources: list[memoryview | int] = [
            again.view(each.name, v.version)
            for each in again.metadata.keys
            for v in each.versions
            if v.state is not VersionState.REVOKED
        ]
        written = compose(again.metadata, again.lineage, sources)
        assert content(written) == content(built)
        written.close()
    built.close()


def test_the_layout_is_the_one_that_is_documented() -> None:
    """Written down here once more, so that a change of the format is noticed."""
    draft = Draft(None).create("web", owner="team", purpose="cookies", size=16, now=NOW)
    built = draft.build(generation=1, counter=7, now=NOW)
    assert content(built)[:HEAD_SIZE] == GOOD[:HEAD_SIZE]
    assert built.lineage is not None
    assert content(built)[HEAD_SIZE:] == bytes(built.lineage) + bytes(built.view("web", 1))
    assert built.lineage.nbytes == 32
    built.close()


def test_an_empty_keyring_is_one() -> None:
    with parsed(spelled(metadata())) as keyring:
        assert keyring.metadata.keys == ()


# --- any bytes


@pytest.mark.promise(10)
@given(st.binary(max_size=300))
@example(b"")
@example(MAGIC)
@example(MAGIC + b"0\n")
@example(MAGIC + b"99999999\n")
@example(MAGIC + b"2\n[]")
@example(MAGIC + b"4000\n" + b"[" * 4000)
def test_any_bytes(data: bytes) -> None:
    for candidate in (data, MAGIC + data, spelled({}) + data):
        refused(candidate)


@pytest.mark.promise(10)
@given(
    st.recursive(st.none() | st.integers() | st.text() | st.booleans() | st.floats(), lambda s: st.lists(s))
)
def test_any_value_in_any_field(value: object) -> None:
    for place in (
        metadata(key(), generation=value),
        metadata(key(), counter=value),
        metadata(key(), written=value),
        metadata(key(), keys=value),
        metadata({**key(), "name": value}),
        metadata(key("web", version(size=value))),
        metadata(key("web", version(changed=value))),
        metadata(key("web", {**version(), "state": value})),
    ):
        try:
            data = spelled(place, b"k" * 16)
        except UnicodeEncodeError:
            continue  # JSON cannot say it
        try:
            with parsed(data) as keyring:
                assert content(keyring) == data
        except KeyringInvalid:
            continue


@pytest.mark.promise(10)
def test_every_changed_bit_of_the_head_is_refused_or_read_as_it_stands() -> None:
    """A flip may turn one valid metadata into another; it may never be read as something that is written differently."""
    data = spelled(
        metadata(
            key("mail", version(1, "revoked"), version(2, "retired"), version(3)),
            key("web", version(1, "active"), version(2)),
            counter=7,
        ),
        b"k" * 64,
    )
    size = len(data) - 32 - 64
    read = 0
    for bit in range(size * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            with parsed(bytes(changed)) as keyring:
                kept = [
                    keyring.view(each.name, v.version)
                    for each in keyring.metadata.keys
                    for v in each.versions
                    if v.state is not VersionState.REVOKED
                ]
                again = compose(keyring.metadata, keyring.lineage, list(kept))
                assert content(again) == changed
                again.close()
                read += 1
        except KeyringInvalid:
            continue
    assert 0 < read < size * 8  # both happen, so the loop tests both


@pytest.mark.promise(10)
def test_every_other_length_is_refused() -> None:
    for end in range(len(GOOD)):
        refused(GOOD[:end])
    for more in (b"\0", b"\n", b"k", b"k" * 16, GOOD):
        assert "as long as" in refused(GOOD + more)


@pytest.mark.parametrize(
    "head",
    [
        b"unsealerd-keyring-v1\n",
        b"unsealerd-keyring-v3\n",
        b"unsealerd-keyring-v2\r\n",
        b"\xef\xbb\xbf" + MAGIC,
        MAGIC + b"0%d\n",
        MAGIC + b"+%d\n",
        MAGIC + b" %d\n",
        MAGIC + b"%d \n",
        MAGIC + b"%d\r\n",
        MAGIC + b"-%d\n",
        MAGIC + b"0x%x\n",
        MAGIC + b"1_000\n",
        MAGIC + b"\n",
        MAGIC + b"\xd9\xa3\n",  # an Arabic three
        MAGIC + b"9" * 9 + b"\n",
        MAGIC + b"9" * 5000 + b"\n",
    ],
)
def test_no_other_head_is_read(head: bytes) -> None:
    text = GOOD[len(MAGIC) :].partition(b"\n")[2]
    if b"%" in head:
        head %= len(text) - 32 - 16
    refused(head + text)


@pytest.mark.parametrize(
    "respelled",
    [
        lambda text: text.replace(b",", b", ", 1),
        lambda text: text.replace(b":", b" :", 1),
        lambda text: text + b"\n",
        lambda text: b" " + text,
        lambda text: text.replace(b"web", b"\\u0077eb"),
        lambda text: text.replace(b'"counter":7', b'"counter":7,"counter":7'),
        lambda text: text.replace(b'"counter":7', b'"counter":7.0'),
        lambda text: text.replace(b'"counter":7', b'"counter":07'),
        lambda text: text.replace(b'"counter":7,"generation":1', b'"generation":1,"counter":7'),
        lambda text: text.replace(b'"size":16', b'"size":1.6e1'),
        lambda text: text.replace(b'"size":16', b'"size":"16"'),
        lambda text: text.replace(b'"changed":null,', b""),
        lambda text: text.replace(b'"changed":null', b'"changed":NaN'),
        lambda text: text.replace(b'"changed":null', b'"changed":false'),
        lambda text: text.replace(b'"counter":7,', b""),
        lambda text: text.replace(b'"primary"', b'"PRIMARY"'),
        lambda text: text.replace(b'"team"', b'"\xff"'),
        lambda text: text.replace(b'"team"', b'"\\ud800"'),
        lambda text: text.replace(b'"team"', b'"te\\am"'),
        lambda text: text.replace(b'"team"', b"null"),
    ],
)
def test_the_metadata_has_one_spelling(respelled: Callable[[bytes], bytes]) -> None:
    text = GOOD[len(MAGIC) : HEAD_SIZE].partition(b"\n")[2]
    changed = respelled(text)
    assert changed != text
    assert "metadata" in refused(MAGIC + b"%d\n" % len(changed) + changed + LINEAGE + b"k" * 16)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (metadata(key(), color=1), "unknown field"),
        (metadata(key(color=1)), "unknown field"),
        (metadata(key("web", version(color=1))), "unknown field"),
        (metadata(key("web", version(1), version(2))), "not the newest"),
        (metadata(key("web", version(1), version(2, "active"))), "not the newest"),
        (metadata(key("web", version(2))), "numbered"),
        (metadata(key("web", version(1, "retired"), version(3))), "numbered"),
        (metadata(key("web", version(1, "retired"), version(1))), "numbered"),
        (metadata(key("web", version(0))), "numbered"),
        (metadata(key(versions=[])), "numbered"),
        (metadata(key("web"), key("mail")), "sorted"),
        (metadata(key("web"), key("web")), "sorted"),
        (metadata(key(""), key("web")), "not the name"),
        (metadata(key("../web")), "not the name"),
        (metadata(key("..")), "not the name"),
        (metadata(key("a/b")), "not the name"),
        (metadata(key("Web")), "not the name"),
        (metadata(key("web\n")), "not the name"),
        (metadata(key("w" * 65)), "not the name"),
        (metadata(key(owner="a\x1b[2J")), "cannot be printed"),
        (metadata(key(purpose="a\nb")), "cannot be printed"),
        (metadata(key(), generation=0), "out of range"),
        (metadata(key(), generation=-1), "out of range"),
        (metadata(key(), generation=FULL_COUNT + 1), "out of range"),
        (metadata(key(), counter=0), "out of range"),
        (metadata(key(), counter=FULL_COUNT + 1), "out of range"),
        (metadata(key(), written=-1), "out of range"),
        (metadata(key(), written=LAST_TIME + 1), "out of range"),
        (metadata(key("web", version(size=0))), "out of range"),
        (metadata(key("web", version(size=-16))), "out of range"),
        (metadata(key("web", version(1, "revoked", size=MAX_BYTES + 1))), "out of range"),
        (metadata(key("web", version(created=-1))), "out of range"),
        (metadata(key("web", version(created=LAST_TIME + 1))), "out of range"),
        (metadata(key("web", version(1, "retired", changed=-1))), "out of range"),
        (metadata(key("web", version(1, "active", retires=10**30))), "out of range"),
        (metadata(key("web", version(changed=NOW))), "do not fit"),
        (metadata(key("web", version(1, "retired", changed=None))), "do not fit"),
        (metadata(key("web", version(retires=NOW))), "do not fit"),
        (metadata(key("web", version(1, "retired", retires=NOW))), "do not fit"),
        (metadata(key("web", version(1, "active", retires=None))), "do not fit"),
        (metadata(key("web", version(size=15))), "as long as"),
        (metadata(key("web", version(size=17))), "as long as"),
        (metadata(key("web", version(1, "revoked"))), "as long as"),
        (metadata(key("web", version(state="lost"))), "metadata"),
    ],
)
def test_what_no_draft_makes_is_refused(bad: Json, reason: str) -> None:
    assert reason in refused(spelled(bad, b"k" * 16))


def test_sizes_that_only_add_up_are_refused() -> None:
    """A negative size beside a large one would move the slices into the metadata."""
    bad = metadata(key("web", version(1, "retired", size=32), version(2, size=-16)))
    assert "out of range" in refused(spelled(bad, b"k" * 16))


@pytest.mark.promise(11)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_key_of_zeros_is_not_a_key(at: int) -> None:
    data = spelled(
        metadata(
            key("mail", version(1, "active"), version(2)),
            key("web", version(1, "revoked"), version(2, "retired")),
        )
    )
    parts = [b"a" * 16, b"b" * 16, b"c" * 16]
    with parsed(data + b"".join(parts)):
        pass
    parts[at] = bytes(16)
    assert "all zero" in refused(data + b"".join(parts))


# --- whose it is


def test_the_id_is_a_digest_of_the_lineage_and_of_nothing_else() -> None:
    """By openssl: printf unsealerd.io/keyring/v1 | openssl dgst -sha256 -mac HMAC -macopt hexkey:6c6c…"""
    known = "ffd358fb4705927e7d6d74c1b72124120a0607624020cb0ad7f6ad563b44c0c8"
    with parsed(GOOD) as keyring:
        assert keyring.id == known
    with parsed(spelled(metadata(key("other", version(size=17)), generation=9), b"x" * 17)) as other:
        assert other.id == known
    with parsed(spelled(metadata(), lineage=b"l" * 31 + b"m")) as foreign:
        assert foreign.id != known


def test_every_new_keyring_has_a_lineage_of_its_own() -> None:
    one, other = (Draft(None).build(generation=1, counter=None, now=NOW) for _ in range(2))
    assert one.id != other.id
    for keyring in (one, other):
        lineage = keyring.lineage
        assert lineage is not None
        keyring.close()
        with pytest.raises(ValueError):
            bytes(lineage)


@pytest.mark.promise(6)
def test_a_keyring_of_version_1_is_read_and_gets_a_lineage_with_its_next_writing() -> None:
    first = spelled(metadata(key()), b"k" * 16, lineage=b"").replace(b"-v2", b"-v1", 1)
    with parsed(first) as keyring:
        assert keyring.id is None
        assert content(keyring) == first
        assert bytes(keyring.view("web", 1)) == b"k" * 16
        written = Draft(keyring).build(generation=2, counter=None, now=NOW)
        assert written.id is not None
        assert bytes(written.view("web", 1)) == b"k" * 16
        assert content(written).startswith(MAGIC)
        written.close()
    assert "not as long" in refused(spelled(metadata(key()), b"k" * 16).replace(b"-v2", b"-v1", 1))
    assert "not as long" in refused(first.replace(b"-v1", b"-v2", 1))


@pytest.mark.promise(11)
def test_a_lineage_of_zeros_is_nobodys() -> None:
    assert "all zero" in refused(spelled(metadata(key()), b"k" * 16, lineage=bytes(32)))


@pytest.mark.promise(11)
def test_no_key_has_no_bytes() -> None:
    assert "out of range" in refused(spelled(metadata(key("web", version(size=0)))))


# --- limits


def test_a_keyring_is_at_most_so_large(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = Draft(None).create("web", owner="o", purpose="p", size=64, now=NOW)
    built = draft.build(generation=1, counter=None, now=NOW)
    data = content(built)
    built.close()
    monkeypatch.setattr(keyring_format, "MAX_BYTES", len(data))
    draft.build(generation=1, counter=None, now=NOW).close()
    with parsed(data):
        pass
    monkeypatch.setattr(keyring_format, "MAX_BYTES", len(data) - 1)
    refused(data)
    with pytest.raises(KeyringInvalid):
        draft.build(generation=1, counter=None, now=NOW)


@pytest.mark.parametrize(
    ("generation", "counter"), [(FULL_COUNT + 1, 1), (1, FULL_COUNT + 1), (0, None), (1, 0)]
)
def test_what_could_not_be_read_is_not_written(generation: int, counter: int | None) -> None:
    draft = Draft(None).create("web", owner="o", purpose="p", size=64, now=NOW)
    with pytest.raises(KeyringInvalid):
        draft.build(generation=generation, counter=counter, now=NOW)


@pytest.mark.parametrize("name", ["", "../web", "Web", "a b", "w" * 65])
def test_a_name_that_could_not_be_read_is_not_written(name: str) -> None:
    with pytest.raises(KeyringInvalid):
        Draft(None).create(name, owner="o", purpose="p", size=64, now=NOW).build(
            generation=1, counter=None, now=NOW
        )


def test_the_largest_values_are_read() -> None:
    data = spelled(metadata(key(), generation=FULL_COUNT, counter=FULL_COUNT, written=LAST_TIME), b"k" * 16)
    with parsed(data) as keyring:
        assert keyring.metadata.counter == FULL_COUNT


# --- reading


def sample() -> Keyring:
    states = (
        Version(1, VersionState.REVOKED, 16, NOW, NOW, None),
        Version(2, VersionState.RETIRED, 17, NOW, NOW, None),
        Version(3, VersionState.ACTIVE, 18, NOW, NOW, NOW + 9),
        Version(4, VersionState.ACTIVE, 19, NOW, NOW, NOW + 9),
        Version(5, VersionState.PRIMARY, 20, NOW, None, None),
    )
    keys = (Key("gone", "o", "p", states[:1]), Key("old", "o", "p", states[:4]), Key("web", "o", "p", states))
    sources: list[memoryview | int] = [17, 18, 19, 17, 18, 19, 20]
    return compose(Metadata(1, NOW, None, keys), None, sources)


def test_what_verifies_is_primary_first_and_neither_retired_nor_revoked() -> None:
    keyring = sample()
    assert [(u.version, u.view.nbytes) for u in keyring.usable("web")] == [(5, 20), (3, 18), (4, 19)]
    keyring.close()


@pytest.mark.promise(11)
@pytest.mark.parametrize("name", ["old", "gone"])
def test_without_a_primary_nothing_is_used_in_its_place(name: str) -> None:
    keyring = sample()
    with pytest.raises(VersionNotFound):
        keyring.usable(name)
    keyring.close()


def test_a_key_that_is_not_there() -> None:
    keyring = sample()
    with pytest.raises(KeyNotFound):
        keyring.usable("nothing")
    with pytest.raises(KeyNotFound):
        keyring.key("nothing")
    assert keyring.key("web").name == "web"
    keyring.close()


def test_every_key_is_drawn_by_itself() -> None:
    keyring = sample()
    drawn = [bytes(keyring.view("web", n))[:16] for n in (2, 3, 4, 5)]
    drawn += [bytes(keyring.view("old", n))[:16] for n in (2, 3, 4)]
    assert len(set(drawn)) == 7
    keyring.close()


@pytest.mark.promise(1)
def test_closing_wipes_and_what_was_handed_out_is_dead() -> None:
    keyring = sample()
    view = keyring.usable("web")[0].view
    beneath = keyring.buffer.view[:]  # keeps the mapping, to look at it afterwards
    assert any(beneath)
    keyring.close()
    assert not any(beneath)
    with pytest.raises(ValueError, match="released"):
        bytes(view)
    with pytest.raises(KeyNotFound):
        keyring.usable("web")


@pytest.mark.promise(1)
def test_no_key_in_a_text() -> None:
    keyring = sample()
    secret = bytes(keyring.view("web", 5))
    for shown in (repr(keyring), repr(keyring.metadata), repr(keyring.usable("web")), repr(keyring.buffer)):
        assert secret.hex() not in shown
        assert repr(secret)[2:-1] not in shown
    keyring.close()
