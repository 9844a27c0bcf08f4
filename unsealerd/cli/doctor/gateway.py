"""The gateway: can it be reached from here, and does it have the key that operators pinned?"""

from collections.abc import Iterator

from unsealerd.cli.doctor.finding import Finding, fail, ok, refused
from unsealerd.cli.doctor.subject import Subject
from unsealerd.errors import UnsealerdError

_SECONDS = 5.0  # for each step of a connection to this machine
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - what the configuration says, not where anything listens


def check(subject: Subject) -> Iterator[Finding]:
    from unsealerd.core.tlskey import fingerprint
    from unsealerd.gateway.identity import load_certificate
    from unsealerd.operator.hosts import fetch_certificate

    try:
        own = fingerprint(load_certificate(subject.config.daemon.state_dir / "gateway"))
    except UnsealerdError as err:
        yield refused("gateway", err)
        return
    for listen in subject.config.gateway.listen:
        address = near(listen)
        try:
            found = fingerprint(fetch_certificate(address, _SECONDS).encode())
        except UnsealerdError as err:
            yield refused("gateway", err)
            continue
        if found == own:
            yield ok("gateway", f"{address} answers with this host's key")
        else:
            yield fail(
                "gateway",
                f"what answers at {address} has another key than this host",
                "which process listens there? `ss -tlnp`; after a new key: systemctl restart unsealerd-gateway",
            )


def near(listen: str) -> str:
    """The address to use from this machine: one that means "everywhere" is no destination."""
    host, _, port = listen.rpartition(":")
    return f"{_ANYWHERE.get(host, host)}:{port}"
