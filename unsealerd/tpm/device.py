"""`Tpm`: everything that the daemon asks of the TPM."""

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import BadRequest, NotInitialised, SealRefused, TpmFailed
from unsealerd.model import LockReason, SealKind
from unsealerd.tpm import commands, counter, facts, parent, seal
from unsealerd.tpm.esys import Connection, Esys
from unsealerd.tpm.facts import TpmFacts
from unsealerd.tpm.pin import TpmPin
from unsealerd.tpm.policy import PCR_COUNT
from unsealerd.tpm.response import Remedy, TpmResponse, as_error, from_tpm, remedy
from unsealerd.tpm.sealed import SealedCopy
from unsealerd.tpm.session import SessionKind, salted

_T = TypeVar("_T")

# The library itself sends a command up to five times when the TPM says "retry"; these come on top.
_ATTEMPTS = 5
_FIRST_PAUSE = 0.02  # seconds; doubled each time: 0.3 s in all


class _Anchors(msgspec.Struct, frozen=True):
    """What the names in the pin were found to stand for: two handles of the library, as `Esys.save` gives them."""

    parent: bytes
    counter: bytes


class Tpm:
    """One TPM, open. Its methods may be called from any thread, one runs at a time, and each of them blocks.

    Every method raises `TpmMissing` (nothing answers any more), `TpmLockout` or `TpmFailed` besides what it names. After
    any of them the object can go on being used: the next call opens the device again. `counter`, `increment`, `seal`,
    `unseal` and `proof_of_destruction` need `enrol` or `attach` first (`NotInitialised`).
    """

    def __init__(self, tcti: str, pause: Callable[[float], None]) -> None:
        self._tcti = tcti
        self._pause = pause
        self._lock = threading.RLock()
        self._connection: Connection | None = Connection(tcti)
        self._reclaim_due = False
        self._pin: TpmPin | None = None
        self._anchors: _Anchors | None = None

    @classmethod
    def open(cls, tcti: str, *, pause: Callable[[float], None] = time.sleep) -> Self:
        """Open ``device:/dev/tpmrm0`` or ``swtpm:path=/…``.

        `pause` waits between retries. Raises `TpmMissing` at once if nothing is there, `ConfigInvalid` if the text
        names no TPM, `NotInstalled` without tpm2-pytss.
        """
        return cls(tcti, pause)

    def close(self) -> None:
        with self._lock:
            self._forget()
            self._disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- which TPM

    def enrol(self) -> TpmPin:
        """Make the counter and pin this TPM; the object is then attached to it."""

        def operation(esys: Esys) -> tuple[TpmPin, _Anchors]:
            handle, key = parent.choose(esys)
            try:
                index_handle, index_name = counter.create(esys, key)
                pin = TpmPin(handle, esys.name(key).hex(), index_handle, index_name.hex())
                return pin, _Anchors(esys.save(key), esys.save(counter.attach(esys, pin)))
            except BaseException:
                parent.let_go(esys, handle, key)
                raise

        with self._lock:
            self._forget()
            self._pin, self._anchors = self._run(operation)
            return self._pin

    def attach(self, pin: TpmPin) -> None:
        """Find what was pinned. Raises `TpmChanged` if it is not there, or something else is in its place."""
        with self._lock:
            self._forget()
            self._anchors = self._run(lambda esys: _find(esys, pin))
            self._pin = pin

    def facts(self, pcrs: Sequence[int] = ()) -> TpmFacts:
        """`pcrs`: those whose values are wanted. Raises `BadRequest`."""
        handle = None if self._pin is None else self._pin.parent_handle
        chosen = _checked(pcrs) if pcrs else ()
        return self._run(lambda esys: facts.read(esys, handle, chosen))

    def pcrs(self, indices: Sequence[int]) -> dict[int, bytes]:
        """Values of the SHA-256 bank, as the TPM says without an HMAC. Raises `BadRequest`."""
        chosen = _checked(indices)
        return self._run(lambda esys: commands.read_pcrs(esys, None, chosen))

    # --- the counter

    def counter(self) -> int:
        def operation(esys: Esys) -> int:
            key, index = self._restore(esys)
            with salted(esys, SessionKind.HMAC, key) as session:
                return commands.read_counter(esys, session, index, last=True)

        return self._run(operation)

    def increment(self) -> int:
        """Add exactly one; returns the new value.

        A retry looks first whether the increment took place although its answer was lost: two increments would make
        the backup look older than it is.
        """
        before: int | None = None

        def operation(esys: Esys) -> int:
            nonlocal before
            key, index = self._restore(esys)
            with salted(esys, SessionKind.HMAC, key) as session:
                current = commands.read_counter(esys, session, index)
                if before is None:
                    before = current
                if current == before:
                    commands.increment(esys, session, index, last=True)
            return before + 1

        return self._run(operation)

    # --- the sealed copy

    def seal(
        self,
        secret: SecretBuffer,
        *,
        kind: SealKind,
        pcrs: Sequence[int],
        counter: int,
        extra_resets: int,
        created: int,
        deadline: int,
    ) -> SealedCopy:
        """Seal the file key (16 bytes) to the next boot.

        `counter` is the value at which it opens; `extra_resets` more resets than one are let pass (no meaning for
        kexec); `created` and `deadline` are Unix seconds, a `deadline` of 0 is none. Raises `BadRequest` for no PCR at all,
        and for values out of range.
        """
        chosen = _checked(pcrs)
        if len(secret) != seal.FILE_KEY_SIZE:
            raise BadRequest(f"a file key has {seal.FILE_KEY_SIZE} bytes")
        if min(counter, extra_resets, created, deadline) < 0:
            raise BadRequest("a negative value cannot be sealed to")

        def operation(esys: Esys) -> SealedCopy:
            key, _ = self._restore(esys)
            return seal.seal(
                esys,
                key,
                self._counter_name(),
                secret,
                kind=kind,
                pcrs=chosen,
                counter=counter,
                extra_resets=extra_resets,
                created=created,
                deadline=deadline,
            )

        return self._run(operation)

    def unseal(self, copy: SealedCopy, now: int) -> SecretBuffer:
        """The file key (16 bytes). `now` in Unix seconds. Raises `SealRefused` with the reason."""
        return seal.open_payload(self._release(copy), now)

    def proof_of_destruction(self, copy: SealedCopy) -> LockReason:
        """Ask for a used copy again and require the refusal: returns its reason.

        The reason comes from the counter as the TPM states it with its HMAC; an error alone could be forged. Raises
        `TpmFailed` if the TPM gives the secret once more (it is wiped; a lease that is over changes nothing about that).
        """
        try:
            payload = self._release(copy)
        except SealRefused as err:
            return err.reason
        payload.close()
        raise TpmFailed("the TPM gave a used sealed copy again")

    def _release(self, copy: SealedCopy) -> SecretBuffer:
        def operation(esys: Esys) -> SecretBuffer:
            key, index = self._restore(esys)
            return seal.release(esys, key, index, self._counter_name(), copy)

        return self._run(operation)

    # --- the machinery

    def _counter_name(self) -> bytes:
        if self._pin is None:
            raise NotInitialised("the TPM was not pinned")
        return bytes.fromhex(self._pin.counter_name)

    def _restore(self, esys: Esys) -> tuple[int, int]:
        """ESYS_TR of the storage root key and of the counter; looked up again if they went missing."""
        if self._pin is None:
            raise NotInitialised("the TPM was not pinned")
        if self._anchors is None:
            self._anchors = _find(esys, self._pin)
        return esys.restore(self._anchors.parent), esys.restore(self._anchors.counter)

    def _run(self, operation: Callable[[Esys], _T]) -> _T:
        """Run one operation in a context of its own, and again, with new sessions, while a retry may cure it."""
        with self._lock:
            attempt = 0
            while True:
                attempt += 1
                try:
                    with Esys(self._connected()) as esys:
                        try:
                            return operation(esys)
                        finally:
                            self._reclaim_due |= esys.leaked
                except TpmResponse as err:
                    if not self._prepare_retry(err) or attempt == _ATTEMPTS:
                        raise as_error(err) from err
                self._pause(_FIRST_PAUSE * 2 ** (attempt - 1))

    def _prepare_retry(self, response: TpmResponse) -> bool:
        """Put things in order after a failure. Is there a chance that the same works now?"""
        if from_tpm(response.code) is None:
            # Not the TPM's word: a broken connection, or an answer that is not well formed or not authentic.
            self._disconnect()
            return False
        match remedy(response.code):
            case Remedy.RETRY:
                return True
            case Remedy.RENEW:
                self._reclaim_due = True
                return True
            case Remedy.NONE:
                return False

    def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = Connection(self._tcti)
        if self._reclaim_due:
            self._anchors = None
            with Esys(self._connection) as esys:
                esys.reclaim()
            self._reclaim_due = False
        return self._connection

    def _disconnect(self) -> None:
        """Close the device. What was loaded ends with it behind a resource manager; else it is flushed at the return."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._anchors = None
        self._reclaim_due = True

    def _forget(self) -> None:
        """Detach: flush the storage root key if it is a transient object."""
        if self._anchors is not None and self._connection is not None and self._pin is not None:
            with Esys(self._connection) as esys:
                parent.let_go(esys, self._pin.parent_handle, esys.restore(self._anchors.parent))
        self._pin, self._anchors = None, None


def _find(esys: Esys, pin: TpmPin) -> _Anchors:
    key = parent.attach(esys, pin)
    try:
        return _Anchors(esys.save(key), esys.save(counter.attach(esys, pin)))
    except BaseException:
        parent.let_go(esys, pin.parent_handle, key)
        raise


def _checked(indices: Sequence[int]) -> tuple[int, ...]:
    """PCR numbers, ascending. Raises `BadRequest` for none at all: such a copy would open in any state."""
    chosen = tuple(sorted(set(indices)))
    if not chosen:
        raise BadRequest("a sealed copy needs at least one PCR")
    if not all(0 <= index < PCR_COUNT for index in chosen):
        raise BadRequest(f"a PCR has a number from 0 to {PCR_COUNT - 1}")
    return chosen
