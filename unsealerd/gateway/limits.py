"""What one peer, and all of them together, may cost the gateway.

A peer that has not yet answered anything costs a connection (measured: 80 KiB once TLS stands, less before) and at most
one message. Every figure here is enforced: by gRPC, or by `unsealerd.gateway.admission` and the session itself.

One cost is not gRPC's to limit: until a peer acknowledges the server's settings, HTTP/2's own defaults hold, and gRPC keeps 16
MiB of header fields for who sends them at full speed (measured: 20 MB for a connection, at times more). `settings_seconds` and
`connections` bound how long and how often, and MemoryMax= of the service unit the whole: what is then restarted holds nothing.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    message_bytes: int = 16 << 10
    metadata_bytes: int = 8 << 10
    connections: int = 128
    """All TCP connections of one listening address, those in the TLS handshake too."""
    streams_per_connection: int = 4
    sessions: int = 64
    sessions_per_peer: int = 8
    """A peer is an IPv4 address or an IPv6 /64, since an end site has all of a /64 to choose from (RFC 6177)."""
    handshake_seconds: float = 10
    settings_seconds: float = 3
    """From the TLS handshake to the peer's acknowledgement of the HTTP/2 settings."""
    hello_seconds: float = 10
    """From the start of a stream to its first message."""
    session_seconds: float = 120
    daemon_seconds: float = 30
    """For one answer of the daemon. An unlock writes the backup anew and waits for the TPM."""
    idle_seconds: float = 30
    """A connection without a stream."""
    connection_seconds: float = 180
    """Any connection; more than a session, so that none is cut."""
    keepalive_seconds: float = 20
    """Silence after which the peer must show that it is there."""
    keepalive_timeout_seconds: float = 10
    ping_interval_seconds: float = 10
    """A client that pings more often..."""
    ping_strikes: int = 2
    """...and so many times is cut off."""
    stop_seconds: float = 5
    """What running sessions get when the gateway is told to stop."""


def channel_options(limits: Limits) -> list[tuple[str, int]]:
    """The part that gRPC enforces, as its channel arguments (grpc/impl/channel_arg_names.h)."""

    def milliseconds(seconds: float) -> int:
        return round(seconds * 1000)

    return [
        ("grpc.max_receive_message_length", limits.message_bytes),
        ("grpc.max_metadata_size", limits.metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.metadata_bytes),
        ("grpc.max_concurrent_streams", limits.streams_per_connection),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.server_handshake_timeout_ms", milliseconds(limits.handshake_seconds)),
        ("grpc.max_connection_idle_ms", milliseconds(limits.idle_seconds)),
        ("grpc.max_connection_age_ms", milliseconds(limits.connection_seconds)),
        ("grpc.max_connection_age_grace_ms", milliseconds(limits.session_seconds)),
        ("grpc.keepalive_time_ms", milliseconds(limits.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", milliseconds(limits.keepalive_timeout_seconds)),
        # What a missing answer to the keep-alive's ping really waits for; a minute, if it is not said.
        ("grpc.http2.ping_timeout_ms", milliseconds(limits.keepalive_timeout_seconds)),
        ("grpc.http2.settings_timeout", milliseconds(limits.settings_seconds)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", milliseconds(limits.ping_interval_seconds)),
        ("grpc.http2.max_ping_strikes", limits.ping_strikes),
        # Windows that grow with a peer's measured bandwidth would let the peer choose how much is buffered.
        ("grpc.http2.bdp_probe", 0),
        # A second process must not share the port unnoticed.
        ("grpc.so_reuseport", 0),
    ]
