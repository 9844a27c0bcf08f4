"""Any bytes on a Varlink socket: named errors, or the end of the connection, and the server lives."""

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rigs.toyserver import ToyServer, frame, toy_server

from unsealerd.daemon.varlink import Limits

METHODS = ("Sign", "Echo", "Add", "Refuse", "Note", "Big", "Count", "Absent", "NoSuch")
NAMES = (
    *(f"org.example.toy.{name}" for name in METHODS),
    "org.varlink.service.GetInfo",
    "org.varlink.service.GetInterfaceDescription",
)

quick = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToyServer]:
    # A small read buffer, so that messages are split and moved about.
    limits = Limits(message_bytes=9000, read_bytes=700, messages_per_turn=3, outgoing_bytes=20_000)
    with toy_server(tmp_path_factory.mktemp("toy") / "toy", limits) as server:
        yield server


def conversation(toy: ToyServer, pieces: list[bytes]) -> list[bytes]:
    """Send all pieces and then the end; return all messages that came back."""
    answer = b""
    with toy.wire() as wire:
        try:
            for piece in pieces:
                wire.sock.sendall(piece)
            wire.sock.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # closed after an error
        try:
            while more := wire.sock.recv(65536):
                answer += more
        except ConnectionResetError:
            pass  # closed before it had read everything
    *messages, rest = answer.split(b"\0")
    assert rest == b"", "half a message came back"
    return messages


def check_answer(message: bytes) -> None:
    found = json.loads(message)
    assert set(found) <= {"parameters", "error", "continues"}
    assert isinstance(found["parameters"], dict)
    if "error" in found:
        interface, _, name = found["error"].rpartition(".")
        assert interface in ("org.example.toy", "org.varlink.service")
        assert name.isalpha()


def check_alive(toy: ToyServer, caplog: pytest.LogCaptureFixture) -> None:
    with toy.wire() as wire:
        assert wire.call("Echo", {"text": "lives"}) == {"parameters": {"text": "lives"}}
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@quick
@pytest.mark.promise(10)
@given(st.lists(st.binary(max_size=2000), max_size=5))
def test_any_bytes(toy: ToyServer, caplog: pytest.LogCaptureFixture, pieces: list[bytes]) -> None:
    messages = conversation(toy, pieces)
    for message in messages:
        check_answer(message)
    assert messages or b"\0" not in b"".join(pieces), "what was a message is answered"
    check_alive(toy, caplog)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3)
    ),
    max_leaves=8,
)
envelopes = st.fixed_dictionaries(
    {},
    optional={
        "method": st.sampled_from(NAMES) | st.text(max_size=30) | json_values,
        "parameters": st.fixed_dictionaries(
            {},
            optional={
                "text": json_values,
                "message": st.text(max_size=20) | st.just("aGFsbG8="),
                "size": st.integers(-5, 3000),
                "upto": st.integers(-5, 50),
                "pair": st.fixed_dictionaries({"left": st.integers(), "right": st.integers()}) | json_values,
            },
        )
        | json_values,
        "oneway": st.booleans() | json_values,
        "more": st.booleans(),
        "upgrade": st.booleans(),
        "unknown": json_values,
    },
)


@quick
@pytest.mark.promise(10)
@given(st.lists(envelopes, min_size=1, max_size=8), st.data())
def test_almost_calls(
    toy: ToyServer, caplog: pytest.LogCaptureFixture, calls: list[dict[str, object]], data: st.DataObject
) -> None:
    wire = b"".join(
        json.dumps(call, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\0" for call in calls
    )
    damaged = bytearray(wire)
    for at in data.draw(st.lists(st.integers(0, len(wire) - 1), max_size=2)):
        damaged[at] = data.draw(st.integers(0, 255))
    for message in conversation(toy, [bytes(damaged)]):
        check_answer(message)
    check_alive(toy, caplog)


@quick
@given(
    st.lists(
        st.builds(lambda size: ("Echo", {"text": "x" * size}), st.integers(0, 3000))
        | st.builds(lambda size: ("Big", {"size": size}), st.integers(0, 9000))
        | st.builds(lambda left: ("Add", {"pair": {"left": left, "right": 1}}), st.integers(-(2**62), 2**62))
        | st.just(("Refuse", {})),
        min_size=1,
        max_size=12,
    ),
    st.data(),
)
def test_how_the_bytes_are_split_does_not_matter(
    toy: ToyServer,
    caplog: pytest.LogCaptureFixture,
    calls: list[tuple[str, dict[str, object]]],
    data: st.DataObject,
) -> None:
    wire = b"".join(frame(method, parameters) for method, parameters in calls)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=10)))
    pieces = [wire[start:end] for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    expected: list[dict[str, object]] = []
    for method, parameters in calls:
        match method, parameters:
            case "Echo", {"text": text}:
                expected.append({"parameters": {"text": text}})
            case "Big", {"size": int(size)}:
                expected.append({"parameters": {"text": "x" * size}})
            case "Add", {"pair": {"left": int(left)}}:
                expected.append({"parameters": {"sum": left + 1}})
            case _:
                expected.append({"error": "org.example.toy.AccessDenied", "parameters": {}})
    assert [json.loads(message) for message in conversation(toy, pieces)] == expected
    check_alive(toy, caplog)


def test_the_fuzzed_server_keeps_nothing(toy: ToyServer, tmp_path: Path) -> None:
    toy.thread.until(lambda: not toy.server.connections)
    assert not toy.server._per_uid
