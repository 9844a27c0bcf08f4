"""Blind on the wire: what passes on the network, inside TLS, and on the unlock socket says nothing of the backup."""

import base64
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from rigs.gateway import GatewayProcess
from rigs.taps import TlsTap, UnixTap
from rigs.unlock_daemon import FACTS, UnlockDaemon

from unsealerd.core.age import Identity, P256Identity, X25519Identity, parse_header
from unsealerd.operator import network
from unsealerd.operator.unlock import unlock

WINDOW = 8  # bytes that two sessions may not have in common


@pytest.fixture(scope="module", params=["x25519", "p256"])
def identity(request: pytest.FixtureRequest) -> Identity:
    if request.param == "x25519":
        return X25519Identity.generate()
    return P256Identity(ec.generate_private_key(ec.SECP256R1()))


class Captured:
    """Two sessions of one operator on one backup, and all that passed."""

    def __init__(self, directory: Path, identity: Identity) -> None:
        gateway = GatewayProcess(directory)
        (directory / "daemon").mkdir()
        with (
            UnlockDaemon(directory / "daemon", [identity.recipient]) as daemon,
            UnixTap(gateway.runtime_dir / "unlock", daemon.path) as unlock_socket,
            gateway,
            TlsTap(gateway.state_dir / "gateway", gateway.addresses[0]) as wire,
        ):
            for _ in range(2):
                with network.connect(gateway.host(address=wire.address)) as conversation:
                    unlock(conversation, [identity])
        assert daemon.opened == [daemon.file_key] * 2
        self.backup = daemon.backup
        self.file_key = daemon.file_key
        self.network = [
            bytes(sent + received) for sent, received in zip(wire.sent, wire.received, strict=True)
        ]
        self.local = [
            bytes(sent + received)
            for sent, received in zip(unlock_socket.sent, unlock_socket.received, strict=True)
        ]
        assert len(self.network) == len(self.local) == 2


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory, identity: Identity) -> Captured:
    return Captured(tmp_path_factory.mktemp("wire"), identity)


def encodings(value: bytes) -> Iterator[bytes]:
    """Raw; hex; base64 at its three alignments, without the characters that a neighbour has a part in."""
    yield value
    yield value[::-1]
    yield value.hex().encode()
    yield value.hex().upper().encode()
    for shift in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(bytes(shift) + value)[(0, 2, 3)[shift] : -4]


def secrets_of(identity: Identity, backup: bytes) -> dict[str, bytes]:
    """All of a stanza that would link a session to its backup, in each form that it has."""
    (stanza,) = parse_header(backup).stanzas
    point = identity.recipient.ephemeral(stanza)
    assert point is not None
    found = {
        "ephemeral point": point[-32:],
        "body": stanza.body,
        "header MAC": parse_header(backup).mac,
        "payload": backup[-16:],
    }
    if len(point) == 65:
        public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
        found |= {
            "x coordinate": point[1:33],
            "y coordinate": point[33:],
            "compressed": public.public_bytes(Encoding.X962, PublicFormat.CompressedPoint),
        }
    # What the operator would compute without the blinding.
    with identity.exchange(point) as shared:
        found["shared secret"] = bytes(shared.view)
    return found


@pytest.mark.promise(4)
def test_nothing_of_the_backup_is_on_the_wire(captured: Captured, identity: Identity) -> None:
    secrets = secrets_of(identity, captured.backup) | {"file key": captured.file_key}
    secrets["recipient"] = str(identity.recipient).encode()
    for name, secret in secrets.items():
        for form in encodings(secret):
            assert len(form) >= 10
            for number, stream in enumerate(captured.network + captured.local):
                assert form not in stream, f"{name} in stream {number}"


@pytest.mark.promise(4)
def test_the_search_finds_what_is_there(captured: Captured) -> None:
    """The search itself: the blinded points that were sent are found, on both sockets, by the same means."""
    for stream, plain in zip(captured.local, captured.network, strict=True):
        for question in questions(stream):
            point = base64.b64decode(question["point"])
            assert any(form in stream for form in encodings(point))
            assert any(form in plain for form in encodings(point))


@pytest.mark.promise(4)
def test_two_sessions_on_one_backup_have_nothing_in_common(captured: Captured) -> None:
    """Every value of the one session against every value of the other: no eight bytes in a row are the same."""
    first, second = (set(windows(values(messages(stream)))) for stream in captured.local)
    assert not first & second
    # The same inside TLS, where the frames of HTTP/2 and the host's facts are what the two may share.
    shared = set(windows([captured.network[0]])) & set(windows([captured.network[1]]))
    sent = {window for stream in captured.local for window in windows(values(messages(stream)))}
    assert len(sent) > 150
    assert not shared & sent


def test_the_comparison_finds_what_is_shared(captured: Captured) -> None:
    """The comparison itself: one session against itself, and the facts of the host if they were not left out."""
    (first, _) = captured.local
    assert set(windows(values(messages(first)))) & set(windows(values(messages(first))))
    assert FACTS["boot_id"][:WINDOW].encode() in set(windows([captured.network[0]])) & set(
        windows([captured.network[1]])
    )


def messages(stream: bytes) -> list[Any]:
    return [json.loads(frame) for frame in stream.split(b"\0") if frame]


def questions(stream: bytes) -> list[Any]:
    (challenge,) = (each["parameters"]["challenge"] for each in messages(stream) if "challenge" in str(each))
    found: list[Any] = challenge["questions"]
    return found


# What io.unsealerd.Unlock documents as the same in every session of a host, and what belongs to the protocol.
CONSTANT = {*(str(value) for value in FACTS.values()), "::1", "accepted", "unlocked", "p256", "x25519", ""}
CONSTANT |= {"unlock"}  # the purpose


def values(tree: object) -> Iterator[bytes]:
    """All values of messages, base64 decoded, but for the constants and the names of methods."""
    match tree:
        case dict():
            for value in tree.values():
                yield from values(value)
        case list():
            for value in tree:
                yield from values(value)
        case str() if tree not in CONSTANT and not tree.startswith("io.unsealerd."):
            yield base64.b64decode(tree, validate=True)
        case str() | int() | None:
            return
        case _:
            raise AssertionError(f"{tree!r} in a message")


def windows(parts: Iterable[bytes]) -> Iterator[bytes]:
    for part in parts:
        for start in range(len(part) - WINDOW + 1):
            yield part[start : start + WINDOW]
