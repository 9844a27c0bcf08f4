"""k of n on a real daemon behind a real gateway: who answers, when, from where, and what is left of it."""

import shutil
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from rigs.memory import copies
from rigs.raw_operator import RawOperator, hello
from rigs.server import Server, wait_for
from rigs.team import Team

from unsealerd.core.age import X25519Identity, decrypt, parse_header
from unsealerd.core.session import recipient_tag
from unsealerd.core.sharing import Backup
from unsealerd.errors import AgeMacInvalid, AgeNoMatch, BackupDamaged, BadAnswer, NotAnOperator, Rollback
from unsealerd.model import State
from unsealerd.operator.hosts import fetch_certificate, make_host
from unsealerd.proto import unlock_pb2 as pb


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(tpm=False) as server:
        yield server


def locked(team: Team) -> Team:
    """Initialised, restarted, locked, with its gateway up."""
    server = team.server
    server.start()
    server.ctl("init")
    server.remembered = server.key()
    server.power_cut()
    server.start_gateway()
    return team


@pytest.fixture
def team(server: Server) -> Team:
    """Two of alice, bob and carol."""
    return locked(Team(server))


def shares(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.status()["shares"]
    return found


def test_two_of_three_from_different_places(team: Team) -> None:
    server = team.server
    assert shares(server) == {
        "present": 0,
        "needed": 2,
        "answered": [],
        "missing": ["alice", "bob", "carol"],
        "require": [],
        "seconds_left": None,
    }
    first = team.unlock("carol")
    assert (first.state, first.shares_present, first.shares_needed) == (State.LOCKED, 1, 2)
    assert (first.operators_answered, first.operators_missing) == (("carol",), ("alice", "bob"))
    assert first.seconds_left is not None
    assert 1700 < first.seconds_left <= 1800
    status = shares(server)
    assert (status["present"], status["answered"], status["missing"]) == (1, ["carol"], ["alice", "bob"])
    assert 1700 < status["seconds_left"] <= 1800
    second = team.unlock_here("bob")
    assert (second.state, second.operators_answered, second.seconds_left) == (State.UNLOCKED, (), None)
    assert server.key() == server.remembered
    assert shares(server)["answered"] == []
    share, intent, done = (
        next(r for r in server.audit() if r["event"] == event)
        for event in ("unlock_share", "unlock", "unlocked")
    )
    assert (share["operators"], share["present"], share["needed"]) == (["carol"], 1, 2)
    assert "127.0.0.1" in share["peer"]
    for record in (intent, done):
        assert (record["operators"], record["completed_by"]) == (["bob", "carol"], ["bob"])
    assert server.events().index("unlock_share") < server.events().index("unlock")


def test_both_in_one_session(team: Team) -> None:
    outcome = team.unlock("alice", "bob")
    assert outcome.state is State.UNLOCKED
    assert len(outcome.accepted) == 2


def test_one_operator_who_answers_twice_is_still_one(team: Team) -> None:
    for _ in range(3):
        outcome = team.unlock("alice")
        assert (outcome.state, outcome.shares_present) == (State.LOCKED, 1)
    assert team.unlock("bob").state is State.UNLOCKED


@pytest.mark.promise(10)
def test_a_hostile_answer_is_named_and_spoils_nothing(team: Team) -> None:
    server = team.server
    team.unlock("alice")

    class Impostor(X25519Identity):
        """Offers carol's recipient, and has another key."""

    impostor = Impostor.generate()
    real, impostor.recipient = impostor.recipient, team.identities["carol"].recipient  # type: ignore[assignment]
    assert real != impostor.recipient
    with pytest.raises(BadAnswer):
        team.unlock("carol", with_key=impostor)
    refused = [record for record in server.audit() if record["event"] == "unlock_refused"]
    assert [(record["operators"], record["error"]) for record in refused] == [(["carol"], "BadAnswer")]
    assert shares(server)["answered"] == ["alice"]
    team.identities["mallory"] = impostor
    outcome = team.unlock("mallory", "bob")  # the same beside a good one
    assert outcome.state is State.UNLOCKED
    assert [name for _, name in outcome.refused] == ["BadAnswer"]
    share = [record for record in server.audit() if record["event"] == "unlock_share"][-1]
    assert (share["operators"], share["refused"]) == (["bob"], ["carol"])


def test_a_stranger_learns_no_names(team: Team) -> None:
    """Not even one who knows an operator's recipient, and is asked."""
    team.unlock("alice")
    team.identities["eve"] = X25519Identity.generate()
    with pytest.raises(NotAnOperator):
        team.unlock("eve")
    address, nonce = team.server.address, bytes(32)
    with RawOperator(make_host("x", address, fetch_certificate(address), added=0)) as eve:
        challenge = eve.send(hello(recipient_tag(nonce, str(team.identities["bob"].recipient)))).receive()
        share = pb.Share(question=0, x=bytes(31) + b"\5")
        eve.send(pb.Answer(session=challenge.challenge.session, shares=[share]))
        result = eve.receive().result
    assert [outcome.result for outcome in result.outcomes] == ["BadAnswer"]
    assert (result.shares_present, list(result.answered), list(result.missing)) == (1, [], [])
    assert not result.HasField("seconds_left")
    assert shares(team.server)["answered"] == ["alice"]


def test_a_required_group_must_be_among_them(server: Server) -> None:
    team = locked(Team(server, require=["security"], groups={"carol": ["security"]}))
    assert shares(server)["require"] == ["security"]
    team.unlock("alice")
    outcome = team.unlock("bob")
    assert (outcome.state, outcome.shares_present, outcome.shares_needed) == (State.LOCKED, 2, 3)
    assert outcome.operators_missing == ("carol",)
    status = shares(server)
    assert (status["require"], status["missing"]) == (["security"], ["carol"])
    assert team.unlock("carol").state is State.UNLOCKED
    assert server.key() == server.remembered


def test_one_of_them_has_a_passphrase(server: Server) -> None:
    team = Team(server)
    team.give_passphrase("carol", b"correct horse battery")
    team.write()
    locked(team)
    assert team.drill("carol").accepted == ("passphrase:carol",)
    team.unlock("bob")
    right = team.passphrases["carol"]
    team.passphrases["carol"] = (right[0], b"incorrect horse")
    with pytest.raises(BadAnswer):
        team.unlock("carol")
    team.passphrases["carol"] = right
    assert team.unlock_here("carol").state is State.UNLOCKED
    assert server.key() == server.remembered
    key = team.identities.pop("carol")
    team.passphrases.clear()
    team.identities["carol"] = key
    with pytest.raises(NotAnOperator):  # the recipient is no name for them: nobody is to learn it
        team.drill("carol")


@pytest.mark.promise(1)
def test_the_window_ends_and_the_shares_are_gone(server: Server) -> None:
    team = locked(Team(server, window="1s"))
    assert team.unlock("alice").seconds_left in (1, None)  # None: it was over before the answer was
    wait_for(lambda: "unlock_shares_dropped" in server.events(), "the end of the window")
    assert shares(server)["answered"] == []
    dropped = next(r for r in server.audit() if r["event"] == "unlock_shares_dropped")
    assert (dropped["operators"], dropped["detail"]) == (["alice"], "the window is over")
    for secret in team.secrets().values():
        assert copies(server.pid, secret) == []
    assert team.unlock("bob").state is State.LOCKED  # alice's does not count any more
    assert team.unlock("alice", "carol").state is State.UNLOCKED


@pytest.mark.promise(1)
@pytest.mark.promise(6)
def test_a_kill_during_the_gathering_loses_the_shares_and_nothing_else(team: Team) -> None:
    server = team.server
    team.unlock("alice")
    files = {file.name: file.read_bytes() for file in server.state.iterdir() if file.name == "keyring.age"}
    server.stop(signal.SIGKILL)
    for secret in team.secrets().values():
        for file in server.state.iterdir():
            assert file.is_dir() or secret not in file.read_bytes()
    server.start()
    assert shares(server)["answered"] == []
    assert (server.state / "keyring.age").read_bytes() == files["keyring.age"]
    assert team.unlock("bob").state is State.LOCKED
    assert team.unlock("carol").state is State.UNLOCKED
    assert server.key() == server.remembered


@pytest.mark.promise(1)
@pytest.mark.promise(8)
def test_no_share_secret_or_file_key_is_in_memory(team: Team) -> None:
    """While they are gathered (in secret memory, which nothing else can read), after the unlock, and after a lock."""
    server = team.server
    secrets = team.secrets()
    assert len(secrets) == 7

    def search(when: str) -> None:
        for name, secret in secrets.items():
            for pid in (server.pid, server.gateway_pid):
                assert copies(pid, secret) == [], f"{name}, {when}"

    team.unlock("alice")
    search("while one is there")
    team.unlock("bob")
    search("after the unlock")
    secrets |= {f"new {name}": secret for name, secret in team.secrets().items()}
    assert len(set(secrets.values())) == 14  # all drawn anew by the write
    search("after the write")
    server.ctl("lock")
    search("after the lock")
    team.drill("carol")
    search("after a drill")


def test_another_backup_makes_the_shares_void(team: Team) -> None:
    """Somebody puts another file in its place: what was given for the one before is wiped, and counts for nothing."""
    server = team.server
    spare = (server.state / "keyring.age").read_bytes()
    team.unlock("alice")
    team.unlock("bob")
    server.power_cut()
    team.unlock("alice")
    (server.state / "keyring.age").write_bytes(spare)
    assert shares(server)["answered"] == []
    assert team.unlock("bob").state is State.LOCKED
    assert team.unlock("carol").state is State.UNLOCKED  # without a TPM nobody notices an older backup


def test_a_changed_list_is_damage_and_blames_nobody(team: Team) -> None:
    """The file is changed so that every share opens, and the whole does not: only the MAC can tell."""
    server = team.server
    path = server.state / "keyring.age"
    data = path.read_bytes()
    first = parse_header(data).stanzas[0]
    bent = type(first)(first.type, first.args, first.body.replace(b'"groups":[]', b'"groups":["x"]', 1))
    assert bent.body != first.body
    path.write_bytes(data.replace(first.encode(), bent.encode()))
    assert team.unlock("alice").state is State.LOCKED
    with pytest.raises(BackupDamaged):
        team.unlock("bob")
    assert shares(server)["answered"] == []
    assert server.status()["state"] == "locked"
    path.write_bytes(data)
    assert team.unlock("alice", "bob").state is State.UNLOCKED


def test_a_reload_while_shares_are_there(team: Team) -> None:
    """Who is no operator any more does not count, and is not asked."""
    server = team.server
    team.unlock("alice")
    team.names = ["bob", "carol"]
    assert team.reload() == {"generation": None, "added": [], "removed": ["alice"], "pending": None}
    assert shares(server)["answered"] == []
    with pytest.raises(NotAnOperator):
        team.unlock("alice")
    assert shares(server)["missing"] == ["bob", "carol"]
    team.unlock("bob")
    assert team.unlock("carol").state is State.UNLOCKED


# --- who may open, written anew


def test_a_removed_operators_key_opens_no_later_backup_and_every_earlier_one(server: Server) -> None:
    team = Team(server, threshold=1)
    server.start()
    server.ctl("init")
    before = (server.state / "keyring.age").read_bytes()
    server.ctl("key", "rotate", "demo")
    assert (server.state / "keyring.age.previous").exists()
    team.names = ["bob", "carol"]
    generation = server.status()["generation"]
    assert team.reload() == {"generation": generation + 1, "added": [], "removed": ["alice"], "pending": None}
    after = (server.state / "keyring.age").read_bytes()
    assert not (server.state / "keyring.age.previous").exists()
    alice = [team.identities["alice"]]
    with pytest.raises(AgeNoMatch):
        decrypt(after, alice)
    decrypt(before, alice).close()  # an earlier copy: nothing can be done about it, and `reload` says so
    assert team.reload() == {"generation": generation + 1, "added": [], "removed": [], "pending": None}
    team.names = ["alice", "bob", "carol"]
    assert team.reload() == {"generation": generation + 2, "added": ["alice"], "removed": [], "pending": None}
    assert (server.state / "keyring.age.previous").exists()  # it opens to nobody who may not open this one


def test_an_operator_removed_by_a_restart_finds_no_spare_either(server: Server) -> None:
    """A plain backup does not say whom it was written for: the first write after a start leaves nothing beside it."""
    team = Team(server, threshold=1)
    locked(team)
    server.stop()
    team.names = ["bob", "carol"]
    team.write()
    server.start()
    assert team.unlock_here("bob").state is State.UNLOCKED
    assert not (server.state / "keyring.age.previous").exists()
    server.ctl("key", "rotate", "demo")  # from then on the daemon knows
    assert (server.state / "keyring.age.previous").exists()


def test_a_threshold_writes_the_backup_anew(server: Server) -> None:
    team = Team(server, threshold=1)
    server.start()
    server.ctl("init")
    alone = (server.state / "keyring.age").read_bytes()
    team.threshold = 2
    assert team.reload()["generation"] == 2
    together = (server.state / "keyring.age").read_bytes()
    assert not (server.state / "keyring.age.previous").exists()  # it would open to one
    assert server.json("backup", "verify")["operators"] == ["alice", "bob", "carol"]
    for name in team.names:
        with pytest.raises(AgeMacInvalid):
            decrypt(together, [team.identities[name]])
        decrypt(alone, [team.identities[name]]).close()
    team.window = "5m"
    assert team.reload()["generation"] == 2  # nothing in the backup depends on it
    team.require = ("carol",)
    assert team.reload()["generation"] == 3
    team.groups = {"bob": ["night"]}
    assert team.reload()["generation"] == 4
    sharing = Backup.of(parse_header((server.state / "keyring.age").read_bytes())).sharing
    assert sharing is not None
    assert (sharing.rules.threshold, sharing.rules.require) == (2, ("carol",))
    assert [operator.groups for operator in sharing.rules.operators] == [(), ("night",), ()]
    team.threshold, team.require, team.groups = 1, (), {}
    assert team.reload()["generation"] == 5
    decrypt((server.state / "keyring.age").read_bytes(), [team.identities["alice"]]).close()
    assert (server.state / "keyring.age.previous").exists()


def test_a_threshold_that_was_raised_while_the_daemon_was_off(server: Server) -> None:
    """It opens as the backup says, and is written anew as the configuration says; the one before is not left beside it."""
    team = Team(server, threshold=1)
    locked(team)
    server.stop()
    team.threshold = 2
    team.write()
    server.start()
    assert team.unlock("alice").state is State.UNLOCKED
    assert not (server.state / "keyring.age.previous").exists()
    server.power_cut()
    assert team.unlock("alice").state is State.LOCKED
    assert team.unlock("bob").state is State.UNLOCKED


def test_a_backup_whose_list_is_broken_is_damage_from_the_start(team: Team) -> None:
    server = team.server
    server.stop()
    path = server.state / "keyring.age"
    path.write_bytes(path.read_bytes().replace(b"-> unsealerd-operators 1", b"-> unsealerd-operators 2"))
    server.start()
    server.assert_locked("backup_damaged")
    assert shares(server)["present"] == 0
    with pytest.raises(BackupDamaged):
        team.unlock("alice")


# --- with a TPM


@pytest.mark.promise(9)
def test_an_older_backup_is_accepted_only_if_everybody_says_so() -> None:
    with Server() as server:
        team = Team(server)
        server.start()
        server.ctl("init")
        old = server.base / "old"
        shutil.copytree(server.state, old)
        server.ctl("key", "rotate", "demo")
        server.stop()
        shutil.copy(old / "keyring.age", server.state / "keyring.age")
        server.start()
        server.start_gateway()
        team.unlock("alice", accept_rollback=True)
        with pytest.raises(Rollback):
            team.unlock("bob")
        server.assert_locked("rollback")
        assert shares(server)["answered"] == ["alice", "bob"]  # nobody cancels what the others gave
        assert team.unlock("bob", accept_rollback=True).state is State.UNLOCKED
        unlocks = [record for record in server.audit() if record["event"] == "unlock"]
        assert [record.get("accept_rollback") for record in unlocks] == [None, True]
        key = server.key()
        server.reboot()  # the sealed copy knows nothing of operators
        server.assert_unlocked()
        assert server.key() == key
