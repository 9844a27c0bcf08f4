"""A host as the TPM sees it: it boots, it seals, it unseals."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from unsealerd.core.secret import SecretBuffer
from unsealerd.model import SealKind
from unsealerd.tpm import commands, template
from unsealerd.tpm.device import Tpm
from unsealerd.tpm.esys import NONE, PASSWORD, RH_OWNER, Connection, Esys
from unsealerd.tpm.parent import PERSISTENT_HANDLE
from unsealerd.tpm.pin import TpmPin
from unsealerd.tpm.sealed import SealedCopy

from .swtpm import SoftwareTpm

FILE_KEY = bytes.fromhex("c0ffee00112233445566778899aabbcc")  # nothing else on the bus looks like it
NOW = 1_800_000_000  # Unix seconds


def no_pause(seconds: float) -> None:
    """For retries in tests: nothing gets better by waiting."""


class Host:
    """A software TPM and the pin made on it. `tcti` may lead through a proxy."""

    def __init__(self, tpm: SoftwareTpm, tcti: str | None = None) -> None:
        self.tpm = tpm
        self.tcti = tpm.tcti if tcti is None else tcti
        with Tpm.open(self.tcti, pause=no_pause) as device:
            self.pin: TpmPin = device.enrol()

    @contextmanager
    def device(self) -> Iterator[Tpm]:
        """The TPM, open and attached."""
        with Tpm.open(self.tcti, pause=no_pause) as device:
            device.attach(self.pin)
            yield device

    def seal(
        self,
        *,
        kind: SealKind = SealKind.REBOOT,
        pcrs: Sequence[int] = (7,),
        extra_resets: int = 0,
        deadline: int = 0,
    ) -> SealedCopy:
        with self.device() as device, SecretBuffer.copy_of(FILE_KEY) as key:
            return seal(device, key, kind=kind, pcrs=pcrs, extra_resets=extra_resets, deadline=deadline)

    def unseal(self, copy: SealedCopy, now: int = NOW) -> bytes:
        """The file key, as ordinary bytes for the test to compare."""
        with self.device() as device, device.unseal(copy, now) as key:
            return bytes(key.view)

    def use(self, copy: SealedCopy, now: int = NOW) -> bytes:
        """Unseal, then increment the counter, as the daemon does."""
        with self.device() as device, device.unseal(copy, now) as key:
            device.increment()
            return bytes(key.view)


def seal(
    device: Tpm,
    key: SecretBuffer,
    *,
    kind: SealKind = SealKind.REBOOT,
    pcrs: Sequence[int] = (7,),
    extra_resets: int = 0,
    deadline: int = 0,
) -> SealedCopy:
    """Seal at the counter's present value."""
    return device.seal(
        key,
        kind=kind,
        pcrs=pcrs,
        counter=device.counter(),
        extra_resets=extra_resets,
        created=NOW,
        deadline=deadline,
    )


def persist(tpm: SoftwareTpm, public: bytes | None = None) -> None:
    """Keep a primary key at the usual place, as a platform does."""
    connection = Connection(tpm.tcti)
    try:
        with pytest.MonkeyPatch.context() as patch, Esys(connection) as esys:
            if public is not None:
                patch.setattr(template, "storage_root_key", lambda: public)
            key = commands.create_primary(esys)
            kept = esys.ffi.new("ESYS_TR *")
            esys.call("EvictControl", RH_OWNER, key, PASSWORD, NONE, NONE, PERSISTENT_HANDLE, kept)
            esys.flush(key)
    finally:
        connection.close()
