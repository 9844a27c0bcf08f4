"""Who reads raw keys: ``key/NAME`` gives the primary version, ``keyset/NAME`` every version that verifies."""

from pathlib import Path

from unsealerd.core.keyring import Usable
from unsealerd.core.secret import SecretBuffer
from unsealerd.daemon.access import Access
from unsealerd.daemon.caller import Peer
from unsealerd.daemon.host import Host
from unsealerd.daemon.keptsockets import KeptSockets
from unsealerd.daemon.keysockets import KeyConnection, KeySockets
from unsealerd.daemon.watch import Event
from unsealerd.errors import Locked, NotInitialised
from unsealerd.model import Operation, State

_HEX = b"0123456789abcdef"


class KeyReader:
    def __init__(self, host: Host, access: Access, runtime_dir: Path, kept: KeptSockets) -> None:
        self._host = host
        self._access = access
        self._primary = KeySockets(runtime_dir / "key", self._serve_primary, kept=kept)
        self._all = KeySockets(runtime_dir / "keyset", self._serve_all, kept=kept)
        host.watchers.add(self._follow_state)

    def follow_configuration(self) -> None:
        """One socket for each declared key. Raises `StorageFailed`."""
        for sockets in (self._primary, self._all):
            sockets.set_names(self._host.config.keys)

    async def close(self) -> None:
        await self._primary.close()
        await self._all.close()

    def _follow_state(self, event: Event) -> None:
        for sockets in (self._primary, self._all):
            if event.event == "unlocked":
                sockets.resume()
            elif event.state is not State.UNLOCKED:
                sockets.pause()

    async def _serve_primary(self, name: str, peer: Peer, connection: KeyConnection) -> None:
        await self._authorise(name, peer)
        connection.send_secret(self._usable(name)[0].view)

    async def _serve_all(self, name: str, peer: Peer, connection: KeyConnection) -> None:
        await self._authorise(name, peer)
        with keyset_lines(self._usable(name)) as lines:
            connection.send_secret(lines.view)

    async def _authorise(self, name: str, peer: Peer) -> None:
        self._usable(name)  # while locked nothing is read, and nothing need be recorded
        await self._access.authorise(peer.caller, name, Operation.READ)

    def _usable(self, name: str) -> tuple[Usable, ...]:
        try:
            return self._host.open_keyring().usable(name)
        except NotInitialised as err:
            raise Locked(err.detail) from err  # the reader waits for the keys to be made


def keyset_lines(versions: tuple[Usable, ...]) -> SecretBuffer:
    """``VERSION HEX`` LF for each version, made in secret memory: no ``bytes`` of it ever exist."""
    heads = [b"%d " % version.version for version in versions]
    lines = SecretBuffer(sum(len(h) + 2 * v.view.nbytes + 1 for h, v in zip(heads, versions, strict=True)))
    at = 0
    for head, version in zip(heads, versions, strict=True):
        lines.view[at : at + len(head)] = head
        at += len(head)
        for byte in version.view:
            lines.view[at] = _HEX[byte >> 4]
            lines.view[at + 1] = _HEX[byte & 15]
            at += 2
        lines.view[at] = 0x0A
        at += 1
    return lines
