"""The gateway: does its file agree with the daemon's, can it be reached from here, has it the key that operators pinned?"""

from collections.abc import Iterator

from unsealerd.cli.doctor.files import gateway_file
from unsealerd.cli.doctor.finding import Finding, fail, ok, refused
from unsealerd.cli.doctor.subject import Subject
from unsealerd.errors import UnsealerdError

_SECONDS = 5.0  # for each step of a connection to this machine
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - what the configuration says, not where anything listens


def check(subject: Subject) -> Iterator[Finding]:
    from unsealerd.core.tlskey import fingerprint
    from unsealerd.gateway import settings
    from unsealerd.gateway.identity import load_certificate
    from unsealerd.operator.hosts import fetch_certificate

    path, daemon = gateway_file(subject), subject.config.daemon
    try:
        configured = settings.load(path)
        own = fingerprint(load_certificate(daemon.state_dir / "gateway"))
    except UnsealerdError as err:
        yield refused("gateway", err)
        return
    for name, its, daemons in (
        ("state_dir", configured.state_dir, daemon.state_dir),
        ("runtime_dir", configured.runtime_dir, daemon.runtime_dir),
    ):
        if its != daemons:
            yield fail(
                "gateway",
                f"{name} is {its} in {path}, and {daemons} for the daemon",
                "say the same in both files; systemctl restart unsealerd-gateway",
            )
    for listen in configured.listen:
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
