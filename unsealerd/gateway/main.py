"""unsealerd-gateway [--config FILE]: what operators reach over the network.

Exit codes: 0 stopped by SIGTERM or SIGINT; 2 wrong usage; 69 there is no TLS key yet, or it cannot be read; 78 the configuration
is wrong (sysexits.h).
"""

import argparse
import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from unsealerd import __version__
from unsealerd.errors import ConfigInvalid, Fault, UnsealerdError
from unsealerd.gateway import identity, settings
from unsealerd.gateway.limits import Limits
from unsealerd.gateway.settings import Settings
from unsealerd.notify import notify

EX_USAGE = 2
EX_UNAVAILABLE = 69
EX_CONFIG = 78

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38

_HINTS = {
    "ConfigInvalid": "correct the file, or name another one with --config",
    "NotInitialised": "run `unsealctl init` on this host first",
    "IdentityInvalid": "put the files of STATE_DIR/gateway back as they were; a new key must be pinned by every operator",
    "StorageFailed": "look at the disk: mount options, `journalctl -k`",
    "AccessDenied": "the gateway's user must be able to read STATE_DIR/gateway",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _Parser(prog="unsealerd-gateway", description="The gRPC gateway of unsealerd.")
    parser.add_argument("--config", type=Path, default=settings.DEFAULT_PATH, metavar="FILE")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return serve(settings.load(options.config), Limits())
    except UnsealerdError as err:
        print(f"unsealerd-gateway: {err.name}: {err.detail}", file=sys.stderr)
        print(
            f"hint: {_HINTS.get(err.name, 'the journal has more: journalctl -u unsealerd-gateway')}",
            file=sys.stderr,
        )
        return EX_CONFIG if err.fault is Fault.CONFIGURATION else EX_UNAVAILABLE


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EX_USAGE, f"{self.prog}: {message}\nhint: see {self.prog} --help\n")


def serve(configured: Settings, limits: Limits) -> int:
    """Until SIGTERM or SIGINT. Raises `NotInitialised`, `AccessDenied`, `StorageFailed`, `IdentityInvalid`, `ConfigInvalid`."""
    _harden()
    tls = identity.load(configured.identity_dir)
    # gRPC for Python cannot be told a lowest version of TLS. But every suite of TLS 1.2 names the kind of key that the server
    # signs with (RFC 5246 section A.5), and the only one left here needs RSA where our key is on P-256: no
    # TLS 1.2 handshake can succeed. The suites of TLS 1.3 (RFC 8446 section B.4) are not chosen by this variable.
    os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES256-GCM-SHA384"
    # The library writes a line of its own for each failed handshake: the network would fill the log.
    os.environ["GRPC_VERBOSITY"] = "NONE"
    from unsealerd.gateway.server import Gateway

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        gateway = Gateway(configured.socket, tls, limits)
        try:
            bound = await gateway.start(configured.listen)
        except ConfigInvalid:
            identity.check(configured.identity_dir)  # gRPC says of a bad key what it says of a bad address
            raise
        for address in bound:
            logging.info("listening on %s", address)
        notify(READY=1)
        await stop.wait()
        notify(STOPPING=1)
        await gateway.stop()

    asyncio.run(run())
    return os.EX_OK


def _harden() -> None:
    """No core dump and no debugger without privilege, no privilege by exec: prctl(2). Both are extras: no error if refused."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


if __name__ == "__main__":
    raise SystemExit(main())
