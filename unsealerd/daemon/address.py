"""Network addresses, as limits count them: as the gateway does, which has its own."""

import ipaddress

_SITE_BITS = 64


def site_of(address: str) -> str:
    """What one peer is for a limit: an IPv4 address, or the /64 that one subscriber has of IPv6.

    What is no address, such as the name of a Unix socket, is returned as it is.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4:
        return str(parsed)
    return str(ipaddress.ip_network((parsed.packed, _SITE_BITS), strict=False))
