"""The gRPC server: each network message is one call on the unlock socket, each stream one connection to it.

Messages are handled as bytes and parsed in `translate`, so that a malformed one is answered with `BadMessage` and not with
whatever the library makes of it.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NoReturn

import grpc
import grpc.aio
from grpc.aio import EOF  # type: ignore[attr-defined]  # the stubs lack it

from unsealerd.core.conversation import ERROR_METADATA, AnswerCall, HelloCall
from unsealerd.core.tlskey import fingerprint
from unsealerd.errors import ConfigInvalid, SessionExpired, UnsealerdError
from unsealerd.gateway import status, translate
from unsealerd.gateway.admission import Admission, peer_address
from unsealerd.gateway.daemonlink import DaemonLink
from unsealerd.gateway.identity import TlsIdentity
from unsealerd.gateway.limits import Limits, channel_options
from unsealerd.proto import unlock_pb2

_SERVICE = unlock_pb2.DESCRIPTOR.services_by_name["Unlock"].full_name

_Context = grpc.aio.ServicerContext[bytes, bytes]

log = logging.getLogger("unsealerd.gateway")


class Gateway:
    def __init__(self, socket: Path, identity: TlsIdentity, limits: Limits) -> None:
        """``socket``: the daemon's unlock socket. It need not be there yet."""
        self._socket = socket
        self._identity = identity
        self._fingerprint = fingerprint(identity.certificate)
        self._limits = limits
        self._admission = Admission(limits)
        # Twice the sessions: beyond them, but not without end, a peer is told by name that it is one too many.
        self._server = grpc.aio.server(
            options=channel_options(limits), maximum_concurrent_rpcs=2 * limits.sessions, compression=None
        )
        handlers = {
            "Session": grpc.stream_stream_rpc_method_handler(self._session),
            "GetStatus": grpc.unary_unary_rpc_method_handler(self._get_status),
        }
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(_SERVICE, handlers)])

    async def start(self, addresses: Sequence[str]) -> list[str]:
        """Listen, and give the addresses with the ports that were bound. Raises `ConfigInvalid`."""
        pair = (self._identity.key, self._identity.certificate)
        try:
            credentials = grpc.ssl_server_credentials([pair])
            bound = []
            for address in addresses:
                port = self._server.add_secure_port(address, credentials)
                bound.append(f"{address.rpartition(':')[0]}:{port}")
        except RuntimeError as err:
            raise ConfigInvalid(f"listen: cannot listen on {address}") from err
        await self._server.start()
        return bound

    async def stop(self) -> None:
        """Take no new session, give the running ones `Limits.stop_seconds`, then end them."""
        await self._server.stop(self._limits.stop_seconds)

    async def _session(self, _requests: AsyncIterator[bytes], context: _Context) -> None:
        peer = peer_address(context.peer())
        outcome = "left"
        try:
            with self._admission.admit(peer):
                try:
                    async with asyncio.timeout(self._limits.session_seconds):
                        if await self._converse(peer, context):
                            outcome = "answered"
                except TimeoutError as err:
                    raise SessionExpired("too slow") from err
        except UnsealerdError as err:
            outcome = err.name
            await _abort(context, err)
        finally:
            log.info("session peer=%s outcome=%s", peer, outcome)

    async def _converse(self, peer: str, context: _Context) -> bool:
        """Pass messages on until the daemon has judged an answer: True, or the operator has left: False."""
        async with asyncio.timeout(self._limits.hello_seconds):
            data = await context.read()
        # Only who has said something is worth a connection to the daemon.
        if data is EOF:
            return False
        call = translate.request(data, peer)
        with DaemonLink.connect(self._socket, self._limits.daemon_seconds) as link:
            while True:
                match call:
                    case HelloCall():
                        challenge = await link.hello(call)
                        await context.write(translate.challenge(challenge, self._fingerprint))
                    case AnswerCall():
                        await context.write(translate.result(await link.answer(call)))
                        return True
                data = await context.read()
                if data is EOF:
                    return False
                call = translate.request(data, peer)

    async def _get_status(self, _request: bytes, context: _Context) -> bytes:
        try:
            with (
                self._admission.admit(peer_address(context.peer())),
                DaemonLink.connect(self._socket, self._limits.daemon_seconds) as link,
            ):
                return translate.status(await link.status())
        except UnsealerdError as err:
            await _abort(context, err)


async def _abort(context: _Context, err: UnsealerdError) -> NoReturn:
    """End the call with the error's name and no more: the detail stays here, in the log."""
    log.info("refused peer=%s error=%s detail=%r", peer_address(context.peer()), err.name, err.detail)
    await context.abort(status.code(type(err)), err.name, ((ERROR_METADATA, err.name),))
    raise AssertionError("abort raises")
