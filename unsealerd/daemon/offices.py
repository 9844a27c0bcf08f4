"""The offices of the ``admin`` and the ``unlock`` socket: opened when somebody knocks, or a moment after the start.

The keys are served first. Nobody can do without what is loaded here for long: a package that is replaced while the daemon runs
must not give it half of its program from before and half from after, so `Offices.load` follows the start in any case.
"""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from unsealerd.core.auditchain import Facts
from unsealerd.core.secret import SecretBuffer, SecretMemoryKind
from unsealerd.daemon.host import Host
from unsealerd.daemon.varlink import Info, VarlinkServer

if TYPE_CHECKING:
    from unsealerd.daemon.unlocking import Conversations

ADMIN = "admin"
UNLOCK = "unlock"
LABELS = (ADMIN, UNLOCK)


class Offices:
    """Used within the event loop."""

    def __init__(
        self,
        host: Host,
        info: Info,
        memory: SecretMemoryKind,
        warnings: list[str],
        monotonic: Callable[[], float],
        reload: Callable[[Facts], Awaitable[None]],
    ) -> None:
        """``warnings`` and ``reload``: as `Report` and `AdminApi` have them."""
        self._host = host
        self._info = info
        self._memory = memory
        self._warnings = warnings
        self._monotonic = monotonic
        self._reload = reload
        self._conversations: Conversations | None = None
        self._servers: dict[str, VarlinkServer] = {}

    def server(self, label: str) -> VarlinkServer:
        """That of one of `LABELS`, made now if it was not before."""
        if not self._servers:
            self._servers = self._open()
        return self._servers[label]

    def _open(self) -> dict[str, VarlinkServer]:
        from unsealerd.daemon.adminapi import AdminApi
        from unsealerd.daemon.report import Report
        from unsealerd.daemon.unlockapi import UnlockApi
        from unsealerd.daemon.unlocking import Conversations

        self._conversations = conversations = Conversations(self._host, self._monotonic)
        console = UnlockApi(self._host, conversations, console=True)
        remote = UnlockApi(self._host, conversations, console=False)
        report = Report(self._host, conversations, self._memory, self._warnings)
        admin = AdminApi(self._host, report, self._reload)
        return {
            ADMIN: VarlinkServer(
                [admin.interface(), console.interface()], self._info, on_disconnect=console.forget
            ),
            UNLOCK: VarlinkServer([remote.interface()], self._info, on_disconnect=remote.forget),
        }

    def load(self) -> None:
        """What a locked host needs only for an unlock, so that it is loaded before anybody replaces it on the disk."""
        from unsealerd.core.age import FILE_KEY_SIZE, X25519Identity

        with SecretBuffer.random(
            FILE_KEY_SIZE
        ) as file_key:  # the library of the ciphers loads its parts at their first use
            X25519Identity.generate().recipient.wrap(file_key)
        if self._host.config.tpm.tcti is not None:
            import unsealerd.tpm.device  # noqa: F401 - whether there is a TPM is found where it is used

    def close(self) -> None:
        if self._conversations is not None:
            self._conversations.close()
