"""Who may do what: nothing by default, and exactly what a rule says."""

import grp
import os
import pwd

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unsealerd.config import parse
from unsealerd.core.policy import NOTHING, Grant, Policy, Subject
from unsealerd.daemon import machine
from unsealerd.model import Operation

pytestmark = pytest.mark.promise(7)

READ, SIGN, VERIFY = frozenset({Operation.READ}), frozenset({Operation.SIGN}), frozenset({Operation.VERIFY})
EVERYBODY = [
    Subject(0, frozenset({0}), None),
    Subject(1000, frozenset({1000, 27}), "web.service"),
    Subject(None, frozenset(), "web.service"),
    Subject(None, frozenset(), None),
]


def policy(*grants: Grant) -> Policy:
    return Policy({"web": grants})


@pytest.mark.parametrize("subject", EVERYBODY)
def test_nothing_is_granted_by_default(subject: Subject) -> None:
    assert Policy({}).operations(subject, "web") == NOTHING
    assert policy().operations(subject, "web") == NOTHING


@pytest.mark.parametrize("subject", EVERYBODY)
def test_a_grant_is_for_one_key(subject: Subject) -> None:
    granted = policy(Grant(READ, unit="web.service"), Grant(READ, uid=0), Grant(READ, gid=27))
    for other in ("mail", "web2", "we", "WEB", ""):
        assert granted.operations(subject, other) == NOTHING


def test_a_unit_is_granted_as_a_unit() -> None:
    granted = policy(Grant(READ, unit="web.service"))
    assert granted.operations(Subject(1000, frozenset({1000}), "web.service"), "web") == READ
    assert granted.operations(Subject(None, frozenset(), "web.service"), "web") == READ
    for unit in (None, "", "web", "web.service2", "Web.service", "other.service", "web@1.service"):
        assert granted.operations(Subject(0, frozenset({0}), unit), "web") == NOTHING


def test_a_user_is_granted_as_a_user() -> None:
    granted = policy(Grant(SIGN, uid=1000))
    assert granted.operations(Subject(1000, frozenset(), None), "web") == SIGN
    # Neither root, nor a group of that number, nor a credential, whose uid is not the unit's.
    for subject in (Subject(0, frozenset({1000}), None), Subject(None, frozenset({1000}), None)):
        assert granted.operations(subject, "web") == NOTHING


def test_root_is_uid_zero_and_not_an_unknown_uid() -> None:
    granted = policy(Grant(SIGN, uid=0), Grant(VERIFY, gid=0))
    assert granted.operations(Subject(0, frozenset(), None), "web") == SIGN
    assert granted.operations(Subject(1000, frozenset({0}), None), "web") == VERIFY
    assert granted.operations(Subject(None, frozenset(), "web.service"), "web") == NOTHING


def test_any_group_of_the_caller_counts() -> None:
    granted = policy(Grant(VERIFY, gid=27))
    assert granted.operations(Subject(1000, frozenset({1000, 27}), None), "web") == VERIFY
    assert granted.operations(Subject(27, frozenset({1000}), None), "web") == NOTHING


def test_grants_add_up() -> None:
    granted = policy(Grant(READ, unit="web.service"), Grant(SIGN, uid=1000), Grant(VERIFY, gid=27))
    assert granted.operations(Subject(1000, frozenset({27}), "web.service"), "web") == READ | SIGN | VERIFY
    assert granted.operations(Subject(1000, frozenset({28}), "web.service"), "web") == READ | SIGN


def test_a_grant_that_names_nobody_is_for_nobody() -> None:
    for subject in EVERYBODY:
        assert policy(Grant(READ)).operations(subject, "web") == NOTHING


@given(
    st.lists(
        st.builds(
            Grant,
            st.frozensets(st.sampled_from(Operation)),
            st.none() | st.sampled_from(["a.service", "b.service"]),
            st.none() | st.integers(0, 3),
            st.none() | st.integers(0, 3),
        )
    ),
    st.builds(
        Subject,
        st.none() | st.integers(0, 3),
        st.frozensets(st.integers(0, 3)),
        st.none() | st.sampled_from(["a.service", "b.service"]),
    ),
)
def test_every_operation_comes_from_a_grant_that_fits(grants: list[Grant], subject: Subject) -> None:
    for operation in policy(*grants).operations(subject, "web"):
        assert any(
            operation in g.operations
            and (
                (g.unit is not None and g.unit == subject.unit)
                or (g.uid is not None and g.uid == subject.uid)
                or (g.gid is not None and g.gid in subject.gids)
            )
            for g in grants
        )


# --- from the configuration to numbers


def configured(*rules: str) -> tuple[Policy, tuple[str, ...]]:
    text = '[key.web]\nowner = "o"\npurpose = "p"\n'
    for who in rules:
        text += f'[[key.web.allow]]\n{who}\noperations = ["read"]\n'
    return machine.policy_of(parse(text.encode()))


def test_names_are_looked_up() -> None:
    me, mine = pwd.getpwuid(os.getuid()), grp.getgrgid(os.getgid())
    found, missing = configured(f'user = "{me.pw_name}"', f'group = "{mine.gr_name}"')
    assert missing == ()
    assert found.operations(Subject(me.pw_uid, frozenset(), None), "web") == READ
    assert found.operations(Subject(None, frozenset({mine.gr_gid}), None), "web") == READ


def test_numbers_are_taken_as_they_are() -> None:
    """A container's user has a number and no name."""
    found, missing = configured('user = "61234"', 'group = "61235"', 'unit = "61236.service"')
    assert missing == ()
    assert found.operations(Subject(61234, frozenset(), None), "web") == READ
    assert found.operations(Subject(1, frozenset({61235}), None), "web") == READ
    assert found.operations(Subject(61235, frozenset({61234, 61236}), None), "web") == NOTHING


@pytest.mark.parametrize("who", ["user", "group"])
@pytest.mark.parametrize(
    "name", ["no-such-account-anywhere", "-1", "+5", "0x0", "0 ", " 0", "\u0660", "1_0", "1e3"]
)
def test_a_name_that_does_not_exist_grants_nothing_and_is_told(who: str, name: str) -> None:
    found, missing = configured(f'{who} = "{name}"', 'unit = "web.service"')
    assert missing == (f"web: {name}",)
    for subject in (Subject(0, frozenset({0}), None), Subject(5, frozenset({5, 10}), None)):
        assert found.operations(subject, "web") == NOTHING
    assert found.operations(Subject(5, frozenset(), "web.service"), "web") == READ


def test_a_number_beyond_all_users_grants_nothing() -> None:
    found, _ = configured('user = "18446744073709551616"', 'user = "4294967296"')
    assert found.operations(Subject(0, frozenset({0}), None), "web") == NOTHING


def test_a_key_without_rules_is_known_and_closed() -> None:
    found, missing = configured()
    assert (found.keys(), missing) == (("web",), ())
    for subject in EVERYBODY:
        assert found.operations(subject, "web") == NOTHING
