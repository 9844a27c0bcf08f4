"""Who may open another session: so many in total, so many for each peer. No I/O."""

import contextlib
import ipaddress
import urllib.parse
from collections import Counter
from collections.abc import Iterator

from unsealerd.errors import LimitExceeded
from unsealerd.gateway.limits import Limits

_SITE_BITS = 64


def peer_address(peer: str) -> str:
    """The address in what gRPC calls a peer (``ipv4:192.0.2.1:43``, ``ipv6:%5B::1%5D:43``), without the port.

    What has no address, such as a Unix socket, is returned as it is.
    """
    scheme, _, rest = peer.partition(":")
    if scheme not in ("ipv4", "ipv6"):
        return peer
    host = urllib.parse.unquote(rest).rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return peer
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)


def _peer_key(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4:
        return address
    return str(ipaddress.ip_network((parsed, _SITE_BITS), strict=False))


class Admission:
    """Counts what is under way. Memory: one entry for each peer that has a session."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._peers: Counter[str] = Counter()

    @contextlib.contextmanager
    def admit(self, address: str) -> Iterator[None]:
        """Hold a place until the block ends. Raises `LimitExceeded`."""
        key = _peer_key(address)
        if self._peers[key] >= self._limits.sessions_per_peer:
            raise LimitExceeded("sessions of this peer")
        if self._peers.total() >= self._limits.sessions:
            if not self._peers[key]:
                del self._peers[key]
            raise LimitExceeded("sessions")
        self._peers[key] += 1
        try:
            yield
        finally:
            self._peers[key] -= 1
            if not self._peers[key]:
                del self._peers[key]
