"""Drills on a real daemon: an operator proves that the backup opens to them, and nothing else happens."""

import base64
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator

import pytest
from rigs.raw_operator import RawOperator
from rigs.server import Server, wait_for
from rigs.team import Team

from unsealerd.client.connection import Connection
from unsealerd.core.age import X25519Identity
from unsealerd.core.session import recipient_tag
from unsealerd.errors import (
    AuditUnwritable,
    BadAnswer,
    BadMessage,
    BadRequest,
    NotAnOperator,
    NotInitialised,
    NotLocked,
)
from unsealerd.model import Purpose, State
from unsealerd.operator.hosts import fetch_certificate, make_host
from unsealerd.proto import unlock_pb2 as pb


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(tpm=False) as server:
        server.start()
        yield server


def unlocked(team: Team) -> Team:
    """Initialised, with its gateway up."""
    team.reload()
    team.server.ctl("init")
    team.server.start_gateway()
    return team


@pytest.fixture
def team(server: Server) -> Team:
    """Two of three."""
    return unlocked(Team(server))


@pytest.fixture(params=[1, 2], ids=["one is enough", "two are needed"])
def either(server: Server, request: pytest.FixtureRequest) -> Team:
    return unlocked(Team(server, threshold=request.param))


def files(server: Server) -> dict[str, bytes]:
    """Of the state, but for the log and what a drill is to change."""
    return {
        path.name: path.read_bytes()
        for path in server.state.iterdir()
        if path.is_file() and path.name not in ("audit.jsonl", "proofs.json")
    }


def proven(server: Server) -> dict[str, int | None]:
    return {operator["name"]: operator["proven"] for operator in server.status()["operators"]}


def test_a_drill_changes_nothing_but_when_the_operator_was_proven(either: Team) -> None:
    team = either
    server = team.server
    before = files(server), server.status()["generation"], server.key()
    assert proven(server) == {"alice": None, "bob": None, "carol": None}
    started = int(time.time())
    outcome = team.drill("alice")  # unlocked, from far away
    assert (outcome.state, len(outcome.accepted), outcome.refused) == (State.UNLOCKED, 1, ())
    assert outcome.operators_answered == ()
    server.power_cut()
    assert team.drill_here("bob").state is State.LOCKED  # locked, at the console
    status = server.status()
    assert status["state"] == "locked"
    assert status["shares"]["present"] == 0
    times = proven(server)
    assert times["carol"] is None
    for name in ("alice", "bob"):
        assert started <= (times[name] or 0) <= time.time()
    assert team.unlock("alice", "carol").state is State.UNLOCKED
    assert proven(server)["carol"] is not None  # an answer that is accepted is a proof, too
    assert before[2] == server.key()
    assert {name: data for name, data in before[0].items() if name != "keyring.age"}.items() <= files(
        server
    ).items()
    events = [record for record in server.audit() if record["event"].startswith("drill")]
    assert [(r["event"], r["operators"]) for r in events] == [
        ("drill_answer", ["alice"]),
        ("drill", ["alice"]),
        ("drill_answer", ["bob"]),
        ("drill", ["bob"]),
    ]


def test_two_drills_in_a_row_leave_the_files_alone(team: Team) -> None:
    before = files(team.server)
    for name in ("alice", "bob", "carol"):
        team.drill(name)
    assert files(team.server) == before
    for name in ("alice", "bob", "carol"):
        team.drill_here(name)
    assert files(team.server) == before


def test_a_drill_with_the_wrong_key_proves_nothing(team: Team) -> None:
    server = team.server
    other = X25519Identity.generate()
    team.identities["eve"] = other
    with pytest.raises(NotAnOperator):
        team.drill("eve")
    other.recipient = team.identities["alice"].recipient  # type: ignore[assignment]
    with pytest.raises(BadAnswer):
        team.drill("eve")
    assert proven(server)["alice"] is None
    assert not (server.state / "proofs.json").exists()
    assert server.events()[-1] == "drill_refused"
    assert server.audit()[-1]["operators"] == ["alice"]


def test_while_unlocked_there_are_drills_only(team: Team) -> None:
    with pytest.raises(NotLocked):
        team.unlock("alice")
    with pytest.raises(NotLocked):
        team.unlock_here("alice")


def test_a_host_without_a_backup_has_nothing_to_drill(server: Server) -> None:
    with pytest.raises(NotInitialised):
        Team(server).drill_here("alice")


@pytest.mark.promise(10)
def test_a_drill_never_unlocks_whatever_is_said(either: Team) -> None:
    """The purpose is fixed by the hello: there is no way to make its answer count for an unlock."""
    team = either
    server = team.server
    server.power_cut()
    alice = team.identities["alice"]
    nonce = bytes(32)
    host = make_host("x", server.address, fetch_certificate(server.address), added=0)
    for purpose, tags_for in (
        (pb.PURPOSE_DRILL, Purpose.DRILL),
        (pb.PURPOSE_UNLOCK, Purpose.DRILL),  # somebody on the way changes the purpose
        (pb.PURPOSE_DRILL, Purpose.UNLOCK),
        (pb.PURPOSE_UNSPECIFIED, Purpose.DRILL),  # or drops it
        (7, Purpose.DRILL),
    ):
        tag = recipient_tag(nonce, str(alice.recipient), tags_for)
        hello = pb.Hello(version=1, nonce=nonce, tags=[tag], purpose=purpose)  # type: ignore[arg-type]
        with RawOperator(host) as operator:
            operator.send(hello)
            if (purpose, tags_for) != (pb.PURPOSE_DRILL, Purpose.DRILL):
                assert operator.refusal().name == ("BadMessage" if purpose == 7 else "NotAnOperator")
                continue
            challenge = operator.receive().challenge
            shares = []
            for number, question in enumerate(challenge.questions):
                with alice.exchange(question.point) as x:
                    shares.append(pb.Share(question=number, x=bytes(x.view)))
            operator.send(pb.Answer(session=challenge.session, shares=shares, accept_rollback=True))
            result = operator.receive().result
            assert "accepted" in [outcome.result for outcome in result.outcomes]
            assert (result.state, result.shares_present) == (pb.STATE_LOCKED, 0)
            assert not result.answered
    server.assert_locked("unexpected_reboot")
    # The client's name for a parameter that is not the interface's.
    with pytest.raises(BadRequest), Connection(server.run_dir / "admin") as admin:
        admin.call(
            "io.unsealerd.Unlock.Hello",
            {"version": 1, "nonce": "", "tags": [], "peer": "", "purpose": "destroy"},
        )


def test_the_backup_of_now_is_what_counts(either: Team) -> None:
    """Who was added but is not in the backup yet cannot prove anything, and who was removed neither."""
    team = either
    server = team.server
    dave = team.identities["dave"] = X25519Identity.generate()
    team.names = ["bob", "carol", "dave"]
    team.reload()
    assert team.drill("dave").accepted == (str(dave.recipient),)
    with pytest.raises(NotAnOperator):
        team.drill("alice")
    assert set(proven(server)) == {"bob", "carol", "dave"}


def test_who_is_removed_is_forgotten(team: Team) -> None:
    server = team.server
    team.drill("alice", "bob")
    recorded = json.loads((server.state / "proofs.json").read_text())
    assert set(recorded) == {str(team.identities[name].recipient) for name in ("alice", "bob")}
    team.names = ["bob", "carol"]
    team.reload()
    assert set(json.loads((server.state / "proofs.json").read_text())) == {
        str(team.identities["bob"].recipient)
    }
    team.names = ["alice", "bob", "carol"]
    team.reload()
    assert proven(server)["alice"] is None
    server.power_cut()
    assert proven(server)["bob"] is not None  # it outlives the daemon


def test_few_proven_operators_are_a_warning(team: Team) -> None:
    server = team.server

    def warned() -> bool:
        return any("were proven within 90 days" in warning for warning in server.status()["warnings"])

    for name in team.names[: team.threshold + 1]:
        assert warned()
        team.drill(name)
    assert not warned()
    proofs = server.state / "proofs.json"
    old = {recipient: time - 91 * 86400 for recipient, time in json.loads(proofs.read_text()).items()}
    server.stop()
    proofs.write_text(json.dumps(old))
    server.start()
    assert warned()


@pytest.mark.promise(10)
def test_a_damaged_record_counts_as_none_and_is_written_anew(server: Server) -> None:
    team = Team(server)
    team.reload()
    server.ctl("init")
    for content in (b"", b"{", b"\xff", b"[]", b'{"a":"b"}', b"[" * 60000, b"x" * 70000):
        server.stop()
        (server.state / "proofs.json").write_bytes(content)
        server.start()
        assert proven(server)["alice"] is None
        team.drill_here("alice")
        assert proven(server)["alice"] is not None
    json.loads((server.state / "proofs.json").read_bytes())


@pytest.mark.promise(7)
def test_no_audit_no_drill(server: Server) -> None:
    """Nothing is recorded as proven when the log cannot say so."""
    team = Team(server)
    team.reload()
    server.ctl("init")
    server.stop()
    with (server.state / "audit.jsonl").open("ab") as log:
        log.write(b"not a record\n")
    server.start()
    with pytest.raises(AuditUnwritable):
        team.drill_here("alice")
    assert not (server.state / "proofs.json").exists()


def test_many_drills_from_one_place_wait_for_their_turn(server: Server) -> None:
    """Points cost time that services need: one peer gets a few of them for each second."""
    team = Team(server)
    team.reload()
    server.ctl("init")
    started = time.monotonic()
    for number in range(4):
        call = drill_hello(team, "alice", f"2001:db8::{number:x}")
        with Connection(server.run_dir / "unlock", timeout=60) as connection:
            connection.call("io.unsealerd.Unlock.Hello", call)
    assert time.monotonic() - started >= 1.4
    before = time.monotonic()
    for _ in range(100):  # who is nobody is told so at once, and keeps nobody waiting
        with Connection(server.run_dir / "unlock", timeout=60) as connection:
            with pytest.raises(BadMessage):
                connection.call("io.unsealerd.Unlock.Hello", {**call, "nonce": "AA=="})
            with pytest.raises(NotAnOperator):
                connection.call("io.unsealerd.Unlock.Hello", {**call, "tags": ["AAAAAAAAAAAAAAAAAAAAAA=="]})
    assert time.monotonic() - before < 50  # half a second for each would be a hundred


def drill_hello(team: Team, name: str, peer: str) -> dict[str, object]:
    """As the gateway hands it on."""
    nonce = os.urandom(32)
    tag = recipient_tag(nonce, str(team.identities[name].recipient), Purpose.DRILL)
    return {
        "version": 1,
        "nonce": base64.b64encode(nonce).decode(),
        "tags": [base64.b64encode(tag).decode()],
        "peer": peer,
        "purpose": "drill",
    }


def calling(server: Server, call: dict[str, object]) -> socket.socket:
    """A connection on which this hello was sent, and no answer was read yet."""
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(60)
    peer.connect(str(server.run_dir / "unlock"))
    peer.sendall(json.dumps({"method": "io.unsealerd.Unlock.Hello", "parameters": call}).encode() + b"\0")
    return peer


@pytest.mark.promise(10)
def test_drills_that_hang_up_lock_nobody_out(server: Server) -> None:
    """Neither a connection nor a turn is held for who is gone; nor do many wait for one peer."""
    team = Team(server)
    team.reload()
    server.ctl("init")

    def held() -> int:
        return len(os.listdir(f"/proc/{server.pid}/fd"))

    before = held()
    for _ in range(300):  # more than there may be connections of one user
        calling(server, drill_hello(team, "alice", "192.0.2.1")).close()
    wait_for(lambda: held() <= before + 1, "that those who hung up are let go")
    with contextlib.ExitStack() as waiting:
        server.send(signal.SIGSTOP)  # so that they are all there at once, however long this takes
        try:
            crowd = [
                waiting.enter_context(calling(server, drill_hello(team, "alice", "192.0.2.1")))
                for _ in range(16)
            ]
        finally:
            server.send(signal.SIGCONT)
        answers = [peer.recv(65536) for peer in reversed(crowd)]
    assert 4 <= sum(b"LimitExceeded" in answer for answer in answers) <= 8
    assert team.drill_here("bob").accepted
