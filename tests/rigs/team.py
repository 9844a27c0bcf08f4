"""Several operators of one server, each with a key of their own, who answer from where they are."""

from collections.abc import Mapping, Sequence

from cryptography.hazmat.primitives.asymmetric import ec

from rigs.server import PATIENCE, Server
from unsealerd.client.connection import Connection
from unsealerd.core.age import Identity, P256Identity, X25519Identity, parse_header
from unsealerd.core.passphrase import MIN_MEMORY, MIN_PASSES, Parameters, derive
from unsealerd.core.sharing import Backup
from unsealerd.operator import network
from unsealerd.operator.conversation import VarlinkConversation
from unsealerd.operator.evidence import Offered
from unsealerd.operator.hosts import Host, fetch_certificate, make_host
from unsealerd.operator.identities.passphrase import PassphraseOperator
from unsealerd.operator.prompts import PinRequest
from unsealerd.operator.unlock import Outcome, drill, unlock

TABLE = """
[[operator]]
name = "{name}"
recipient = "{recipient}"
groups = {groups}
"""


class Typed:
    """Somebody who types one passphrase."""

    def __init__(self, passphrase: bytes) -> None:
        self._passphrase = passphrase

    def pin(self, request: PinRequest) -> bytes:
        raise AssertionError("no PIN is asked for here")

    def passphrase(self, what: str) -> bytes:
        return self._passphrase


class Team:
    """Writes the server's configuration; `names` are the operators as they are to be."""

    def __init__(
        self,
        server: Server,
        *,
        threshold: int = 2,
        require: Sequence[str] = (),
        window: str = "30m",
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.server = server
        self.identities: dict[str, Identity] = {
            "alice": X25519Identity.generate(),
            "bob": P256Identity(ec.generate_private_key(ec.SECP256R1())),
            "carol": X25519Identity.generate(),
        }
        self.names = ["alice", "bob", "carol"]
        self.threshold = threshold
        self.require = tuple(require)
        self.window = window
        self.groups = dict(groups or {})
        self.passphrases: dict[str, tuple[str, bytes]] = {}
        """Operators who have one instead of a key: its parameters, and the passphrase."""
        self.write()

    def give_passphrase(self, name: str, passphrase: bytes) -> None:
        parameters = Parameters.make(MIN_MEMORY, MIN_PASSES, 1)
        self.passphrases[name] = str(parameters), passphrase
        self.identities[name] = derive(memoryview(passphrase), parameters)

    def write(self) -> None:
        require = str(list(self.require)).replace("'", '"')
        tables = f'[unlock]\nthreshold = {self.threshold}\nrequire = {require}\nwindow = "{self.window}"\n'
        for name in self.names:
            groups = str(list(self.groups.get(name, ()))).replace("'", '"')
            recipient = self.identities[name].recipient
            tables += TABLE.format(name=name, recipient=recipient, groups=groups)
            if name in self.passphrases:
                tables += f'passphrase = "{self.passphrases[name][0]}"\n'
        self.server.operators = {}
        self.server.tables = tables
        self.server.configure()

    def reload(self) -> dict[str, object]:
        """The configuration as it is to be, over the admin socket."""
        self.write()
        with Connection(self.server.run_dir / "admin", timeout=PATIENCE) as admin:
            return admin.call("io.unsealerd.Admin.Reload")

    def offered(self, name: str) -> Offered:
        """What this operator brings along."""
        if name in self.passphrases:
            return PassphraseOperator(name, Typed(self.passphrases[name][1]))
        return self.identities[name]

    # --- from far away: each time over a new connection

    def unlock(self, *names: str, accept_rollback: bool = False, with_key: Identity | None = None) -> Outcome:
        """``with_key``: another key than that of the operator."""
        identities = [with_key or self.offered(name) for name in names]
        with network.connect(self._host()) as conversation:
            return unlock(conversation, identities, reason="a test", accept_rollback=accept_rollback)

    def drill(self, *names: str) -> Outcome:
        with network.connect(self._host()) as conversation:
            return drill(conversation, [self.offered(name) for name in names])

    def _host(self) -> Host:
        address = self.server.address
        return make_host("server", address, fetch_certificate(address), added=0)

    # --- at the console

    def unlock_here(self, *names: str, accept_rollback: bool = False) -> Outcome:
        with Connection(self.server.run_dir / "admin", timeout=PATIENCE) as admin:
            return unlock(
                VarlinkConversation(admin.call),
                [self.offered(name) for name in names],
                accept_rollback=accept_rollback,
            )

    def drill_here(self, *names: str) -> Outcome:
        with Connection(self.server.run_dir / "admin", timeout=PATIENCE) as admin:
            return drill(VarlinkConversation(admin.call), [self.offered(name) for name in names])

    # --- what an operator can work out from the file: for searches

    def secrets(self, data: bytes | None = None) -> dict[str, bytes]:
        """Of the backup on disk: each operator's secret and share, and the file key."""
        data = data if data is not None else (self.server.state / "keyring.age").read_bytes()
        sharing = Backup.of(parse_header(data)).split
        assert sharing is not None
        found: dict[str, bytes] = {}
        shares = {}
        for index, operator in enumerate(sharing.rules.operators):
            identity, stanza = self.identities[operator.name], sharing.stanzas[index]
            point = identity.recipient.ephemeral(stanza)
            assert point is not None
            with identity.exchange(point) as x, identity.recipient.unwrap(stanza, x) as secret:
                found[f"secret of {operator.name}"] = bytes(secret.view)
                shares[index] = sharing.open_share(index, secret)
            found[f"share of {operator.name}"] = bytes(shares[index].view)
        with sharing.combine(shares) as file_key:
            found["file key"] = bytes(file_key.view)
        for share in shares.values():
            share.close()
        return found
