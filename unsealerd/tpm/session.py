"""Sessions with the TPM: salted to the storage root key, with parameter encryption.

The salt is encrypted to the storage root key, whose name was compared with the pinned one, so only that TPM derives the
session's keys. With them the library checks an HMAC over every answer, and both sides encrypt the first parameter
(AES-128-CFB), so what sits on the bus can neither read a secret nor forge an answer (part 1, 19 and 21).
"""

import contextlib
import enum
from collections.abc import Iterator
from typing import Any

from unsealerd.tpm.esys import NONE, Esys
from unsealerd.tpm.policy import ALG_SHA256
from unsealerd.tpm.response import TpmResponse

_ALG_AES = 0x0006
_ALG_CFB = 0x0043
_AES_BITS = 128
_ALL_ATTRIBUTES = 0xFF


class SessionKind(enum.IntEnum):
    """TPM_SE (part 2, 6.11)."""

    HMAC = 0x00
    POLICY = 0x01
    TRIAL = 0x03


class Use(enum.IntFlag):
    """TPMA_SESSION (part 2, 8.4), as needed by the next command."""

    AUTHORISE = 0x00
    CONTINUE = 0x01
    DECRYPT = 0x20  # the TPM decrypts the command's first parameter
    ENCRYPT = 0x40  # the TPM encrypts the answer's first parameter
    AUDIT = 0x80  # nothing is authorised or encrypted; the HMAC alone is wanted


class Session:
    """One session. `tr` is the library's handle of it."""

    def __init__(self, esys: Esys, tr: int) -> None:
        self._esys = esys
        self.tr = tr
        self._ends = False

    def using(self, use: Use, *, last: bool = False) -> int:
        """The session's handle, made ready for one command.

        With `last` the TPM ends the session itself when the command succeeds, which saves the flush.
        """
        self._ends = last
        attributes = use if last else use | Use.CONTINUE
        self._esys.call("TRSess_SetAttributes", self.tr, int(attributes), _ALL_ATTRIBUTES)
        return self.tr

    def end(self) -> None:
        """Flush it, unless its last command has ended it."""
        if not self._ends:
            self._esys.flush(self.tr)

    def drop(self) -> None:
        """Flush it after a failure. If even that fails, the first error says it better."""
        with contextlib.suppress(TpmResponse):
            self._esys.flush(self.tr)


@contextlib.contextmanager
def salted(esys: Esys, kind: SessionKind, key: int) -> Iterator[Session]:
    """A session salted to `key`, gone from the TPM afterwards however it goes."""
    symmetric: Any = esys.ffi.new("TPMT_SYM_DEF *")
    symmetric.algorithm = _ALG_AES
    symmetric.keyBits.aes = _AES_BITS
    symmetric.mode.aes = _ALG_CFB
    found = esys.ffi.new("ESYS_TR *")
    esys.call(
        "StartAuthSession",
        key,
        NONE,
        NONE,
        NONE,
        NONE,
        esys.ffi.NULL,  # the library draws the nonce
        int(kind),
        symmetric,
        ALG_SHA256,
        found,
    )
    session = Session(esys, int(found[0]))
    try:
        yield session
    except BaseException:
        session.drop()
        raise
    session.end()


@contextlib.contextmanager
def loaded(esys: Esys, tr: int) -> Iterator[int]:
    """A transient object, flushed afterwards however it goes."""
    try:
        yield tr
    except BaseException:
        with contextlib.suppress(TpmResponse):
            esys.flush(tr)
        raise
    esys.flush(tr)
