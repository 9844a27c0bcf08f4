"""A change of the keyring: rotation, overlap, expiry and revocation, against a small model of what must come of them."""

import contextlib
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from unsealerd.core.draft import Change, Draft
from unsealerd.core.keyring import Keyring, parse
from unsealerd.core.lifecycle import HOST_TABLE, VERSION_TABLE, HostEvent, VersionEvent
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import KeyNotFound, VersionNotFound
from unsealerd.model import State, VersionState

NOW = 1_800_000_000
PRIMARY, ACTIVE, RETIRED, REVOKED = (
    VersionState.PRIMARY,
    VersionState.ACTIVE,
    VersionState.RETIRED,
    VersionState.REVOKED,
)


def created(*names: str) -> Keyring:
    draft = Draft(None)
    for name in names or ("web",):
        draft.create(name, owner="team", purpose="cookies", size=32, now=NOW)
    return draft.build(generation=1, counter=None, now=NOW)


def built(draft: Draft) -> Keyring:
    return draft.build(generation=2, counter=None, now=NOW)


def states(keyring: Keyring, name: str = "web") -> list[VersionState]:
    return [version.state for version in keyring.key(name).versions]


def secret(keyring: Keyring, version: int, name: str = "web") -> bytes:
    return bytes(keyring.view(name, version))


# --- create


def test_create_makes_one_version_of_the_size_asked_for() -> None:
    draft = Draft(None).create("web", owner="team", purpose="cookies", size=48, now=NOW)
    keyring = built(draft)
    (version,) = keyring.key("web").versions
    assert (version.version, version.state, version.size, version.created) == (1, PRIMARY, 48, NOW)
    assert (version.changed, version.retires) == (None, None)
    assert len(secret(keyring, 1)) == 48
    assert draft.changes == [Change("created", "web", 1)]
    keyring.close()


def test_create_of_what_is_there_changes_nothing() -> None:
    keyring = created()
    draft = Draft(keyring).create("web", owner="team", purpose="cookies", size=64, now=NOW + 5)
    again = built(draft)
    assert draft.changes == []
    assert again.metadata.keys == keyring.metadata.keys
    assert secret(again, 1) == secret(keyring, 1)


def test_create_follows_owner_and_purpose() -> None:
    draft = Draft(created()).create("web", owner="other", purpose="cookies", size=32, now=NOW)
    assert draft.changes == [Change("described", "web", 0)]
    assert built(draft).key("web").owner == "other"


@pytest.mark.promise(11)
@pytest.mark.parametrize("left", ["active", "retired", "nothing"])
def test_create_makes_a_primary_where_none_is_left(left: str) -> None:
    """A key that nothing declared lost its primary; declared again, it is served again, and not by an old version."""
    keyring = created()
    draft = Draft(keyring)
    if left != "nothing":
        draft.rotate("web", size=None, overlap=60 if left == "active" else 0, now=NOW)
        draft.revoke("web", 2, size=None, now=NOW)
    else:
        draft.revoke("web", None, size=None, now=NOW)
    without = built(draft)
    with pytest.raises(VersionNotFound):
        without.usable("web")
    draft = Draft(without).create("web", owner="team", purpose="cookies", size=32, now=NOW)
    again = built(draft)
    newest = again.key("web").versions[-1]
    assert newest.state is PRIMARY
    assert newest.version == len(without.key("web").versions) + 1
    assert draft.changes == [Change("rotated", "web", newest.version)]
    assert again.usable("web")[0].version == newest.version


def test_keys_are_sorted_whatever_the_order_of_making() -> None:
    keyring = created("web", "api", "mail", "a.b", "a-b", "a0")
    assert [key.name for key in keyring.metadata.keys] == sorted(["web", "api", "mail", "a.b", "a-b", "a0"])


# --- rotate and expire


def test_rotate_keeps_the_old_version_for_the_overlap() -> None:
    keyring = created()
    draft = Draft(keyring).rotate("web", size=64, overlap=60, now=NOW + 100)
    after = built(draft)
    assert states(after) == [ACTIVE, PRIMARY]
    old, new = after.key("web").versions
    assert (old.changed, old.retires, new.created, new.size) == (NOW + 100, NOW + 160, NOW + 100, 64)
    assert secret(after, 1) == secret(keyring, 1)
    assert secret(after, 2)[:32] != secret(after, 1)
    assert [u.version for u in after.usable("web")] == [2, 1]
    assert draft.changes == [Change("rotated", "web", 2)]


def test_rotate_without_an_overlap_retires_at_once() -> None:
    after = built(Draft(created()).rotate("web", size=None, overlap=0, now=NOW))
    assert states(after) == [RETIRED, PRIMARY]
    assert [u.version for u in after.usable("web")] == [2]
    assert after.key("web").versions[1].size == 32  # as the one before


@pytest.mark.parametrize(("late", "state"), [(-1, ACTIVE), (0, RETIRED), (1, RETIRED)])
def test_the_overlap_ends_to_the_second(late: int, state: VersionState) -> None:
    rotated = built(Draft(created()).rotate("web", size=None, overlap=60, now=NOW))
    draft = Draft(rotated).expire(NOW + 60 + late)
    assert states(built(draft)) == [state, PRIMARY]
    assert draft.changes == ([Change("retired", "web", 1)] if state is RETIRED else [])


def test_overlaps_end_one_by_one() -> None:
    draft = Draft(created("mail", "web"))
    draft.rotate("web", size=None, overlap=60, now=NOW).rotate("web", size=None, overlap=10, now=NOW + 1)
    draft.rotate("mail", size=None, overlap=5, now=NOW)
    after = built(Draft(built(draft)).expire(NOW + 11))
    assert states(after) == [ACTIVE, RETIRED, PRIMARY]
    assert states(after, "mail") == [RETIRED, PRIMARY]


def test_two_rotations_in_one_change_draw_two_keys() -> None:
    keyring = created()
    draft = Draft(keyring)
    draft.rotate("web", size=None, overlap=60, now=NOW).rotate("web", size=None, overlap=60, now=NOW)
    after = built(draft)
    assert states(after) == [ACTIVE, ACTIVE, PRIMARY]
    assert len({secret(after, n) for n in (1, 2, 3)}) == 3


# --- revoke


@pytest.mark.promise(1)
def test_revoking_destroys_the_bytes_and_keeps_the_record() -> None:
    keyring = built(Draft(created()).rotate("web", size=None, overlap=60, now=NOW))
    gone, kept = secret(keyring, 1), secret(keyring, 2)
    draft = Draft(keyring).revoke("web", 1, size=32, now=NOW + 7)
    after = built(draft)
    assert states(after) == [REVOKED, PRIMARY]
    assert (after.key("web").versions[0].changed, after.key("web").versions[0].retires) == (NOW + 7, None)
    assert gone not in bytes(after.buffer.view)
    assert secret(after, 2) == kept
    assert draft.changes == [Change("revoked", "web", 1)]
    with pytest.raises(KeyError):
        after.view("web", 1)


def test_a_revoked_primary_is_replaced_at_once() -> None:
    draft = Draft(created()).revoke("web", 1, size=48, now=NOW)
    after = built(draft)
    assert states(after) == [REVOKED, PRIMARY]
    assert after.key("web").versions[1].size == 48
    assert draft.changes == [Change("revoked", "web", 1), Change("rotated", "web", 2)]


@pytest.mark.promise(11)
def test_a_revoked_primary_without_a_replacement_leaves_nothing_to_use() -> None:
    rotated = built(Draft(created()).rotate("web", size=None, overlap=60, now=NOW))
    after = built(Draft(rotated).revoke("web", 2, size=None, now=NOW))
    assert states(after) == [ACTIVE, REVOKED]
    with pytest.raises(VersionNotFound):
        after.usable("web")
    assert Draft(after).primary_created("web") is None


def test_revoking_what_is_not_primary_makes_nothing_new() -> None:
    rotated = built(Draft(created()).rotate("web", size=None, overlap=0, now=NOW))
    assert states(built(Draft(rotated).revoke("web", 1, size=32, now=NOW))) == [REVOKED, PRIMARY]


def test_only_a_revoked_primary_is_replaced() -> None:
    rotated = built(Draft(created()).rotate("web", size=None, overlap=60, now=NOW))
    without = built(Draft(rotated).revoke("web", 2, size=None, now=NOW))
    assert states(built(Draft(without).revoke("web", 1, size=32, now=NOW))) == [REVOKED, REVOKED]


@pytest.mark.parametrize(("size", "last"), [(None, []), (32, [PRIMARY])])
def test_revoking_all(size: int | None, last: list[VersionState]) -> None:
    draft = (
        Draft(created())
        .rotate("web", size=None, overlap=60, now=NOW)
        .rotate("web", size=None, overlap=0, now=NOW)
    )
    after = built(Draft(built(draft)).revoke("web", None, size=size, now=NOW))
    assert states(after) == [REVOKED] * 3 + last


def test_revoking_all_again_says_that_nothing_is_left() -> None:
    after = built(Draft(created()).revoke("web", None, size=None, now=NOW))
    with pytest.raises(VersionNotFound, match="no version left"):
        Draft(after).revoke("web", None, size=32, now=NOW)


@pytest.mark.parametrize("version", [0, 2, -1, 2**70])
def test_revoking_a_version_that_is_not_there_changes_nothing(version: int) -> None:
    keyring = created()
    draft = Draft(keyring)
    with pytest.raises(VersionNotFound):
        draft.revoke("web", version, size=32, now=NOW)
    assert draft.changes == []
    assert built(draft).metadata.keys == keyring.metadata.keys


def test_revoking_twice_is_said() -> None:
    after = built(Draft(created()).revoke("web", 1, size=32, now=NOW))
    with pytest.raises(VersionNotFound):
        Draft(after).revoke("web", 1, size=32, now=NOW)


def test_a_key_without_versions_left_is_rotated_back_to_life() -> None:
    after = built(Draft(created()).revoke("web", None, size=None, now=NOW))
    again = built(Draft(after).rotate("web", size=None, overlap=60, now=NOW))
    assert states(again) == [REVOKED, PRIMARY]
    assert len(secret(again, 2)) == 32


def test_a_version_made_and_revoked_in_one_change_is_never_drawn() -> None:
    after = built(
        Draft(created()).rotate("web", size=None, overlap=60, now=NOW).revoke("web", 2, size=None, now=NOW)
    )
    assert states(after) == [ACTIVE, REVOKED]
    assert secret(after, 1)


def test_keys_that_are_not_there() -> None:
    draft = Draft(created())
    with pytest.raises(KeyNotFound):
        draft.rotate("nothing", size=None, overlap=0, now=NOW)
    with pytest.raises(KeyNotFound):
        draft.revoke("nothing", None, size=None, now=NOW)
    with pytest.raises(KeyNotFound):
        draft.primary_created("nothing")


@pytest.mark.promise(6)
def test_the_keyring_before_is_untouched_by_a_draft() -> None:
    keyring = created()
    before, bytes_before = keyring.metadata, bytes(keyring.buffer.view)
    draft = Draft(keyring).rotate("web", size=None, overlap=0, now=NOW).revoke("web", 1, size=None, now=NOW)
    built(draft).close()
    assert keyring.metadata == before
    assert bytes(keyring.buffer.view) == bytes_before


# --- the tables


def test_nothing_comes_back_from_revoked_and_no_old_version_signs_again() -> None:
    assert not any(state is REVOKED for state, _ in VERSION_TABLE)
    assert PRIMARY not in VERSION_TABLE.values()
    assert all(VERSION_TABLE[state, VersionEvent.REVOKE] is REVOKED for state in (PRIMARY, ACTIVE, RETIRED))


def test_a_host_is_unlocked_from_locked_and_initialised_once() -> None:
    assert {state for (state, _), after in HOST_TABLE.items() if after is State.UNLOCKED} == {
        State.UNINITIALISED,
        State.LOCKED,
    }
    assert State.UNINITIALISED not in HOST_TABLE.values()
    assert [state for state, event in HOST_TABLE if event is HostEvent.INITIALISE] == [State.UNINITIALISED]


# --- any sequence of operations


@dataclass
class Modelled:
    """What the model knows of one version."""

    state: VersionState
    retires: int | None
    data: bytes


NAMES = st.sampled_from(["api", "mail", "web"])
OVERLAPS = st.sampled_from([0, 15, 40])
SIZES = st.integers(16, 40)


class Rings(RuleBasedStateMachine):
    """Edits are drafted, and now and then built and read back from the bytes, as a restart does."""

    @initialize()
    def start(self) -> None:
        self.now = NOW
        self.keyring = Draft(None).build(generation=1, counter=None, now=NOW)
        self.draft = Draft(self.keyring)
        self.model: dict[str, list[Modelled]] = {}
        self.dead: set[bytes] = set()
        self.highest: dict[str, int] = {}

    def teardown(self) -> None:
        if hasattr(self, "keyring"):
            self.keyring.close()

    def _primary(self, name: str) -> Modelled | None:
        found = [v for v in self.model.get(name, []) if v.state is PRIMARY]
        return found[0] if found else None

    def _step_down(self, name: str, overlap: int) -> None:
        old = self._primary(name)
        if old is not None:
            old.state = ACTIVE if overlap else RETIRED
            old.retires = self.now + overlap if overlap else None

    @rule(seconds=st.integers(0, 30))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule(name=NAMES, size=SIZES)
    def create(self, name: str, size: int) -> None:
        self.draft.create(name, owner="o", purpose="p", size=size, now=self.now)
        versions = self.model.setdefault(name, [])
        if self._primary(name) is None:
            versions.append(Modelled(PRIMARY, None, b""))

    @rule(name=NAMES, size=SIZES | st.none(), overlap=OVERLAPS)
    def rotate(self, name: str, size: int | None, overlap: int) -> None:
        if name not in self.model:
            with pytest.raises(KeyNotFound):
                self.draft.rotate(name, size=size, overlap=overlap, now=self.now)
            return
        self.draft.rotate(name, size=size, overlap=overlap, now=self.now)
        self._step_down(name, overlap)
        self.model[name].append(Modelled(PRIMARY, None, b""))

    @rule(name=NAMES, version=st.none() | st.integers(1, 6), size=SIZES | st.none())
    def revoke(self, name: str, version: int | None, size: int | None) -> None:
        versions = self.model.get(name, [])
        hit = [v for n, v in enumerate(versions, 1) if version in (None, n) and v.state is not REVOKED]
        if not hit:
            with pytest.raises((KeyNotFound, VersionNotFound)):
                self.draft.revoke(name, version, size=size, now=self.now)
            return
        self.draft.revoke(name, version, size=size, now=self.now)
        replaced = any(v.state is PRIMARY for v in hit) and size is not None
        for v in hit:
            v.state, v.retires = REVOKED, None
            if v.data:
                self.dead.add(v.data)
        if replaced:
            versions.append(Modelled(PRIMARY, None, b""))

    @rule()
    def expire(self) -> None:
        self.draft.expire(self.now)
        for versions in self.model.values():
            for v in versions:
                if v.state is ACTIVE and v.retires is not None and v.retires <= self.now:
                    v.state, v.retires = RETIRED, None

    @rule()
    def drop(self) -> None:
        """The write fails: the keyring before stays, and the draft is forgotten."""
        self.draft = Draft(self.keyring)
        self.model = {
            key.name: [Modelled(v.state, v.retires, self._data(key.name, v.version)) for v in key.versions]
            for key in self.keyring.metadata.keys
        }
        self.dead = {data for data in self.dead if data not in self._alive()}

    @rule()
    def write(self) -> None:
        before = self.keyring
        generation = before.metadata.generation + 1
        fresh = self.draft.build(generation=generation, counter=None, now=self.now)
        self.keyring = parse(SecretBuffer.copy_of(fresh.buffer.view))
        assert self.keyring.metadata == fresh.metadata
        fresh.close()
        before.close()
        self._compare()
        self.draft = Draft(self.keyring)

    def _data(self, name: str, version: int) -> bytes:
        with contextlib.suppress(KeyError):
            return bytes(self.keyring.view(name, version))
        return b""

    def _alive(self) -> set[bytes]:
        return {v.data for versions in self.model.values() for v in versions if v.data}

    def _compare(self) -> None:
        plain = bytes(self.keyring.buffer.view)
        assert [key.name for key in self.keyring.metadata.keys] == sorted(self.model)
        for key in self.keyring.metadata.keys:
            expected = self.model[key.name]
            assert [(v.state, v.retires) for v in key.versions] == [(v.state, v.retires) for v in expected]
            assert len(key.versions) >= self.highest.get(key.name, 0), "a version number was given back"
            self.highest[key.name] = len(key.versions)
            for v, known in zip(key.versions, expected, strict=True):
                data = self._data(key.name, v.version)
                if known.state is REVOKED:
                    assert data == b""
                    known.data = b""
                    continue
                assert len(data) == v.size
                assert any(data)
                # Kept bytes are the same bytes; new ones were never seen.
                assert not known.data or data == known.data
                assert data not in self.dead
                known.data = data
        assert not any(data in plain for data in self.dead), "revoked bytes are still there"
        assert len(self._alive()) == sum(
            1 for vs in self.model.values() for v in vs if v.state is not REVOKED
        )

    @invariant()
    @precondition(lambda self: hasattr(self, "model"))
    def never_two_primaries(self) -> None:
        for versions in self.model.values():
            assert sum(v.state is PRIMARY for v in versions) <= 1
        for key in self.keyring.metadata.keys:
            assert sum(v.state is PRIMARY for v in key.versions) <= 1


TestAnySequence = Rings.TestCase
TestAnySequence.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
