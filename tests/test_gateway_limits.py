"""What a peer may cost: sessions, time, connections, memory. Every limit is met on the running gateway."""

import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rigs.gateway import GatewayProcess
from rigs.raw_operator import RawOperator, Refusal, hello
from rigs.server import PATIENCE, wait_for
from rigs.unlock_daemon import UnlockDaemon

from unsealerd.core.age import X25519Identity
from unsealerd.core.session import recipient_tag
from unsealerd.errors import DaemonUnreachable, HostUnreachable, LimitExceeded
from unsealerd.gateway.admission import Admission, peer_address
from unsealerd.gateway.limits import Limits, channel_options
from unsealerd.operator import network
from unsealerd.operator.unlock import unlock

ALICE = X25519Identity.generate()
HELLO = hello(recipient_tag(bytes(32), str(ALICE.recipient)))
TOO_MANY = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "LimitExceeded", "LimitExceeded")
EXPIRED = Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "SessionExpired", "SessionExpired")

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # RFC 9113 section 3.4
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"
SETTINGS_ACK = b"\0\0\0\x04\x01\0\0\0\0"
PING = b"\0\0\x08\x06\0\0\0\0\0" + bytes(8)
GOAWAY_TYPE = 7
ENHANCE_YOUR_CALM = 11


def plain_connection(gateway: GatewayProcess) -> socket.socket:
    return socket.create_connection(("::1", int(gateway.addresses[0].rpartition(":")[2])), PATIENCE)


def handshaken(gateway: GatewayProcess) -> ssl.SSLSocket:
    """A connection on which nothing was said yet but the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=gateway.certificate)
    context.set_alpn_protocols(["h2"])
    plain = plain_connection(gateway)
    try:
        return context.wrap_socket(plain, server_hostname="unsealerd.invalid")
    except OSError:
        plain.close()
        raise


def greet(connection: ssl.SSLSocket) -> None:
    """Say the HTTP/2 preface, and hear the server's."""
    connection.sendall(PREFACE + SETTINGS)
    if not connection.recv(4096):
        raise ConnectionResetError("closed after the handshake")


def tls_connection(gateway: GatewayProcess) -> ssl.SSLSocket:
    """With the HTTP/2 preface said, and the server's heard."""
    connection = handshaken(gateway)
    try:
        greet(connection)
    except OSError:
        connection.close()
        raise
    return connection


def is_dropped(gateway: GatewayProcess, said: bytes = b"") -> bool:
    """Greet, say that, and read to the end. It may come before all was said: the time runs from the handshake on."""
    with handshaken(gateway) as connection:
        with suppress(OSError):
            greet(connection)
            connection.sendall(said)
        return is_closed(connection)


def is_closed(connection: socket.socket) -> bool:
    """Read to the end."""
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


# --- sessions


def test_the_ninth_session_of_a_peer_is_refused(tmp_path: Path) -> None:
    with (
        GatewayProcess(tmp_path) as gateway,
        UnlockDaemon(gateway.runtime_dir, [ALICE.recipient]) as daemon,
        ExitStack() as stack,
    ):
        eight = [stack.enter_context(RawOperator(gateway.host())) for _ in range(8)]
        for operator in eight:
            operator.send(HELLO).receive()
        with RawOperator(gateway.host()) as ninth:
            assert ninth.send(HELLO).refusal() == TOO_MANY
        assert daemon.connections == 8
        # A place that is given up can be had again.
        eight[0].call.cancel()
        assert daemon.wait_for_connections(7)
        with network.connect(gateway.host()) as conversation:
            unlock(conversation, [ALICE])


def test_sessions_are_limited_in_total(tmp_path: Path) -> None:
    with (
        GatewayProcess(tmp_path, ("[::1]:0", "127.0.0.1:0"), sessions=2) as gateway,
        UnlockDaemon(gateway.runtime_dir, [ALICE.recipient]),
        RawOperator(gateway.host()) as first,
        RawOperator(gateway.host(address=gateway.addresses[1])) as second,
        RawOperator(gateway.host()) as third,
    ):
        first.send(HELLO).receive()
        second.send(HELLO).receive()
        assert third.send(HELLO).refusal() == TOO_MANY


def test_streams_of_one_connection_are_limited(tmp_path: Path) -> None:
    """The fifth stream waits at the client, as HTTP/2 has it, and is no load for the server."""
    with (
        GatewayProcess(tmp_path, streams_per_connection=1) as gateway,
        UnlockDaemon(gateway.runtime_dir, [ALICE.recipient]) as daemon,
        RawOperator(gateway.host()) as operator,
    ):
        operator.send(HELLO).receive()
        second = operator.channel.unary_unary("/unsealerd.v1.Unlock/GetStatus", bytes, bytes)
        with pytest.raises(grpc.RpcError) as caught:
            second(b"", timeout=0.5)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert daemon.connections == 1


def test_who_says_nothing_is_sent_away_before_the_daemon_hears_of_it(tmp_path: Path) -> None:
    with (
        GatewayProcess(tmp_path, hello_seconds=0.3) as gateway,
        UnlockDaemon(gateway.runtime_dir, [ALICE.recipient]) as daemon,
        RawOperator(gateway.host()) as operator,
    ):
        assert operator.open().refusal() == EXPIRED
        assert daemon.peers == []


def test_who_never_answers_is_sent_away(tmp_path: Path) -> None:
    assert any(sent_away_after(seconds, tmp_path) for seconds in (0.5, 5, 40)), "it never was asked"


def sent_away_after(seconds: float, tmp_path: Path) -> bool:
    """False: the time was over before the challenge came, on a machine that was busy with other things."""
    with (
        GatewayProcess(tmp_path, session_seconds=seconds) as gateway,
        UnlockDaemon(gateway.runtime_dir, [ALICE.recipient]) as daemon,
        RawOperator(gateway.host()) as operator,
    ):
        operator.send(HELLO)
        try:
            operator.receive()
        except grpc.RpcError:
            return False
        assert operator.refusal() == EXPIRED
        assert daemon.wait_for_connections(0)
    return True


def test_a_daemon_that_never_answers_does_not_hold_the_operator(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path, daemon_seconds=0.3) as gateway, socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(gateway.runtime_dir / "unlock"))
        silent.listen()
        with RawOperator(gateway.host()) as operator:
            assert operator.send(HELLO).refusal().name == "DaemonUnreachable"


# --- connections


def test_a_connection_without_a_handshake_is_closed(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path, handshake_seconds=0.3) as gateway, plain_connection(gateway) as connection:
        assert is_closed(connection)


def test_a_connection_without_a_stream_is_closed(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path, idle_seconds=0.3, keepalive_seconds=600) as gateway:
        assert is_dropped(gateway, SETTINGS_ACK)


def test_no_connection_lives_for_ever(tmp_path: Path) -> None:
    with GatewayProcess(
        tmp_path, connection_seconds=0.5, session_seconds=0.3, idle_seconds=600, keepalive_seconds=600
    ) as gateway:
        assert is_dropped(gateway, SETTINGS_ACK)


def test_who_does_not_answer_a_ping_is_dropped(tmp_path: Path) -> None:
    with GatewayProcess(
        tmp_path, keepalive_seconds=1, keepalive_timeout_seconds=0.3, idle_seconds=600
    ) as gateway:
        # It reads, and so sees the ping, and says nothing.
        assert is_dropped(gateway, SETTINGS_ACK)


def test_who_does_not_acknowledge_the_settings_is_dropped(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path, settings_seconds=0.5, idle_seconds=600) as gateway:
        assert is_dropped(gateway)


def test_who_pings_too_often_is_told_to_calm_down(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path) as gateway, tls_connection(gateway) as connection:
        connection.sendall(PING * 6)
        heard = b""
        while data := connection.recv(65536):
            heard += data
    assert ENHANCE_YOUR_CALM in [code for kind, code in _frames(heard) if kind == GOAWAY_TYPE]


def _frames(data: bytes) -> Iterator[tuple[int, int]]:
    """Type of each HTTP/2 frame, and the error code if it is a GOAWAY: RFC 9113 sections 4.1 and 6.8."""
    while len(data) >= 9:
        size, kind = int.from_bytes(data[:3], "big"), data[3]
        yield kind, int.from_bytes(data[13:17], "big") if kind == GOAWAY_TYPE else -1
        data = data[9 + size :]


def test_connections_are_limited_also_before_their_handshake(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path, connections=20) as gateway, ExitStack() as stack:
        half_open = [stack.enter_context(plain_connection(gateway)) for _ in range(20)]
        with pytest.raises(OSError, match=r"EOF|reset|closed|Broken"):
            stack.enter_context(tls_connection(gateway))
        half_open[0].close()

        # The gateway learns of the end of a connection when it gets to it: try until there is a place.
        end = time.monotonic() + PATIENCE
        while True:
            try:
                tls_connection(gateway).close()
                break
            except OSError:
                assert time.monotonic() < end, "no place after one was given up"


def test_an_idle_peer_costs_constant_memory(tmp_path: Path) -> None:
    """120 half-open and 120 idle TLS connections, none of which says more; and no growth when they come again."""
    count = 120
    with GatewayProcess(tmp_path, handshake_seconds=600, settings_seconds=600, idle_seconds=600) as gateway:
        with (
            UnlockDaemon(gateway.runtime_dir, [ALICE.recipient]),
            network.connect(gateway.host()) as conversation,
        ):
            unlock(conversation, [ALICE])

        def descriptors() -> int:
            return len(os.listdir(f"/proc/{gateway.pid}/fd"))

        idle = descriptors()

        def growth(connect: Callable[[GatewayProcess], socket.socket]) -> int:
            """KiB for each of so many connections at once, when those before are gone."""
            wait_for(lambda: descriptors() <= idle + 2, "the end of the connections before")
            before = gateway.rss_kib
            with ExitStack() as stack:
                for _ in range(count):
                    stack.enter_context(connect(gateway))
                # Handled in order: when this one is answered, so are those before it.
                tls_connection(gateway).close()
                return (gateway.rss_kib - before) // count

        assert growth(plain_connection) < 60  # measured: 20
        assert growth(tls_connection) < 160  # measured: 80
        for _ in range(3):
            assert growth(tls_connection) < 40  # what the first ones used is used again


def flood(connection: ssl.SSLSocket, frames: int) -> bool:
    """HEADERS without END_HEADERS, continued without end (RFC 9113 section 10.5.1). False: the peer cut it off."""
    field = b"\0\x04aaaa\x7f\xc1\x3d" + b"b" * 8000  # a literal, not indexed: RFC 7541 section 6.2.2
    head = len(field).to_bytes(3, "big")
    try:
        connection.sendall(head + b"\x01\0\0\0\0\x01" + field)
        for _ in range(frames):
            connection.sendall(head + b"\x09\0\0\0\0\x01" + field)
    except OSError:
        return False
    return True


def test_a_flood_of_headers_is_not_kept(tmp_path: Path) -> None:
    """From six peers, 16 MiB each: gRPC's read buffers are all that stays (measured: 3 to 25 MB together)."""
    with GatewayProcess(tmp_path, idle_seconds=600, keepalive_seconds=600) as gateway, ExitStack() as stack:
        peers = [stack.enter_context(tls_connection(gateway)) for _ in range(6)]
        base = gateway.rss_kib
        for peer in peers:
            peer.sendall(SETTINGS_ACK)
            assert flood(peer, 2048), "cut off"
        assert gateway.rss_kib - base < 48 << 10
        with network.connect(gateway.host()) as conversation, pytest.raises(DaemonUnreachable):
            unlock(conversation, [ALICE])


def test_a_flood_of_headers_before_the_settings_is_cut_off(tmp_path: Path) -> None:
    """Until the peer has acknowledged the limit, HTTP/2's own applies. See `unsealerd.gateway.limits`."""
    with GatewayProcess(tmp_path, settings_seconds=0.5) as gateway, handshaken(gateway) as connection:
        with suppress(OSError):  # the time runs already
            greet(connection)
        assert not flood(connection, 1 << 20), "8 GiB"
        wait_for(lambda: serves(gateway), "an honest operator, who may be too slow for such settings")


def serves(gateway: GatewayProcess) -> bool:
    """Whether it takes an operator's hello, and says that there is no daemon."""
    with network.connect(gateway.host()) as conversation:
        try:
            unlock(conversation, [ALICE])
        except DaemonUnreachable:
            return True
        except HostUnreachable:
            return False
    raise AssertionError("there is a daemon")


# --- the parts without a process


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.1:50000", "192.0.2.1"),
        ("ipv6:%5B2001:db8::1%5D:50000", "2001:db8::1"),
        ("ipv6:[2001:db8::1]:50000", "2001:db8::1"),
        ("ipv6:%5B::ffff:192.0.2.1%5D:50000", "192.0.2.1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:50000", "fe80::1"),
        ("unix:", "unix:"),
        ("ipv4:nonsense", "ipv4:nonsense"),
    ],
)
def test_a_peer_is_its_address(peer: str, address: str) -> None:
    assert peer_address(peer) == address


def test_all_of_an_ipv6_site_is_one_peer() -> None:
    admission = Admission(Limits(sessions_per_peer=1))
    with admission.admit("2001:db8:0:1::1"):
        with pytest.raises(LimitExceeded), admission.admit("2001:db8:0:1:ffff::2"):
            pass
        with admission.admit("2001:db8:0:2::1"), admission.admit("192.0.2.1"), admission.admit("192.0.2.2"):
            pass


@given(st.lists(st.sampled_from(["192.0.2.1", "192.0.2.2", "2001:db8::1", "unix:"]), max_size=60))
def test_places_are_counted_exactly(peers: list[str]) -> None:
    limits = Limits(sessions=10, sessions_per_peer=4)
    admission = Admission(limits)
    held: list[str] = []
    with ExitStack() as stack:
        for peer in peers:
            allowed = len(held) < limits.sessions and held.count(peer) < limits.sessions_per_peer
            try:
                stack.enter_context(admission.admit(peer))
            except LimitExceeded:
                assert not allowed
            else:
                assert allowed
                held.append(peer)
    assert not admission._peers, "nothing is remembered of who is gone"


def test_no_limit_of_grpc_is_left_out() -> None:
    options = dict(channel_options(Limits()))
    assert options["grpc.max_receive_message_length"] == 16 << 10
    assert options["grpc.max_concurrent_streams"] == 4
    assert all(value >= 0 for value in options.values())
