"""What one peer, and all peers together, may cost."""

import msgspec


class Limits(msgspec.Struct, frozen=True):
    """Limits of one Varlink server. One connection costs at most 400 KB (buffers, both ways), an idle one 3 KB."""

    connections: int = 1024  # in total
    connections_per_uid: int = 256
    reserved: int = (
        256  # of them, for callers to whom the policy grants something: users are cheap (user namespaces)
    )
    message_bytes: int = 128 * 1024  # one message without its NUL: 64 KiB in base64 fit
    message_seconds: float = 10.0  # from the first byte of a message to its last
    outgoing_bytes: int = (
        256 * 1024
    )  # waiting to be sent, before nothing more is read; a stream is dropped there
    stall_seconds: float = 30.0  # how long it may stay above that
    messages_per_turn: int = 32  # of one connection, before the others have their turn
    read_bytes: int = 16 * 1024  # in one read
    accepts_per_turn: int = 1  # so that who connects in a loop takes turns with those who are connected
    retry_seconds: float = 1.0  # until the next accept after running out of descriptors
