"""The way to a host: over the network, or at its console."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from unsealerd.cli.app import App
from unsealerd.cli.events import show
from unsealerd.cli.fields import required
from unsealerd.errors import BadRequest, DaemonUnreachable

if TYPE_CHECKING:
    from unsealerd.client.connection import Connection
    from unsealerd.operator.conversation import Conversation


def require_one(host: str | None, local: bool) -> None:
    """Raises `BadRequest` unless exactly one of both names where to go."""
    if local == (host is not None):
        raise BadRequest("either HOST or --local")


@contextmanager
def conversation(app: App, host: str | None) -> Iterator["Conversation"]:
    """With a host that was added, or without a name with this machine.

    Nothing is sent on the network before it is used.
    """
    if host is None:
        yield from _local(app)
        return
    from unsealerd.operator.hosts import Hosts, default_path

    known = Hosts(default_path(), show).find(host)
    from unsealerd.operator import network

    with network.connect(known) as found:
        yield found


def _local(app: App) -> Iterator["Conversation"]:
    """Whether the daemon is there is seen at once; but the connection is made when it is used.

    Somebody may take hours for a passphrase, and the daemon may be restarted meanwhile.
    """
    from unsealerd.operator.conversation import VarlinkConversation

    app.admin().close()
    with ExitStack() as stack:
        admin: list[Connection] = []

        def call(method: str, parameters: dict[str, object]) -> dict[str, object]:
            if not admin:
                admin.append(stack.enter_context(app.admin()))
            return admin[0].call(method, parameters)

        yield VarlinkConversation(call)


def may_be_locked(app: App) -> bool:
    """Whether an answer may be of use to this machine: it is locked, or its daemon is just being restarted."""
    try:
        with app.admin() as admin:
            status = admin.call("io.unsealerd.Unlock.GetStatus")
    except DaemonUnreachable:
        return True
    return required(status, "state", str) == "locked"
