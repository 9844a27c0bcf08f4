"""After a seal and an unseal, with the TPM still open, the process holds no copy of the file key outside secret memory."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rigs.memory import copies
from rigs.swtpm import SoftwareTpm
from rigs.tpmhost import FILE_KEY, Host

from unsealerd.tpm.esys import Esys

MASK = 0xA5

# The environment that the daemon runs in: freed memory is overwritten, and CPython's own allocator is not used.
HYGIENE = {
    "LD_BIND_NOW": "1",
    "PYTHONMALLOC": "malloc",
    "GLIBC_TUNABLES": "glibc.malloc.perturb=165:glibc.malloc.tcache_count=0",
}

# Draws a file key and seals it; after a line of input (the TPM was reset) unseals it. Says the key masked: its own
# bytes would be found. `keep` is the control: a copy that the scan has to find.
CHILD = """
import sys
from unsealerd.core.secret import SecretBuffer
from unsealerd.model import SealKind
from unsealerd.tpm.device import Tpm

def say(key):
    print(bytes(byte ^ 0xA5 for byte in key.view).hex(), flush=True)

tcti, keep = sys.argv[1], sys.argv[2] == "keep"
tpm = Tpm.open(tcti)
tpm.enrol()
with SecretBuffer.random(16) as key:
    copy = tpm.seal(key, kind=SealKind.REBOOT, pcrs=[7], counter=1, extra_resets=0, created=1, deadline=2**40)
    say(key)
sys.stdin.readline()
with tpm.unseal(copy, 2) as key:
    kept = bytes(key.view) if keep else None  # before the line that has the scan begin
    say(key)
sys.stdin.readline()
"""


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[SoftwareTpm]:
    with SoftwareTpm(tmp_path / "tpm") as running:
        yield running


@pytest.mark.promise(1)
@pytest.mark.parametrize("keep", [False, True], ids=["clean", "control"])
def test_no_copy_of_the_file_key_stays(tpm: SoftwareTpm, keep: bool) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, tpm.tcti, "keep" if keep else ""],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **HYGIENE},
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        masked = bytes.fromhex(child.stdout.readline())
        key = bytes(byte ^ MASK for byte in masked)
        assert copies(child.pid, key) == []  # after the seal
        tpm.reset()
        child.stdin.write("go\n")
        child.stdin.flush()
        assert bytes.fromhex(child.stdout.readline()) == masked
        found = copies(child.pid, key)
        assert bool(found) is keep, found  # after the unseal
        child.stdin.write("end\n")
    assert child.returncode == 0


@pytest.mark.promise(1)
def test_what_the_library_was_lent_is_overwritten(tpm: SoftwareTpm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own structures are zero when they are given back, whatever the allocator does with freed memory."""
    host = Host(tpm)
    call, owned = Esys.call, Esys.owned
    lent: list[Any] = []
    returned: list[bytes] = []

    def watching_call(esys: Esys, command: str, *arguments: Any) -> None:
        call(esys, command, *arguments)
        if command == "Create":
            assert FILE_KEY in bytes(esys.ffi.buffer(arguments[4]))
            lent.append(esys.ffi.buffer(arguments[4]))

    def watching_owned(esys: Esys, pointer: Any) -> Any:
        def give_back(structure: Any) -> None:
            if esys.ffi.typeof(structure).cname.startswith("struct TPM2B_SENSITIVE_DATA"):
                returned.append(bytes(esys.ffi.buffer(structure)))
            esys.lib.Esys_Free(structure)

        if esys.ffi.typeof(pointer).item.cname.startswith("struct TPM2B_SENSITIVE_DATA"):
            assert FILE_KEY in bytes(esys.ffi.buffer(pointer[0]))
            return esys.ffi.gc(pointer[0], give_back)
        return owned(esys, pointer)

    monkeypatch.setattr(Esys, "call", watching_call)
    monkeypatch.setattr(Esys, "owned", watching_owned)
    copy = host.seal()
    tpm.reset()
    assert host.unseal(copy) == FILE_KEY
    assert [bytes(structure).strip(b"\0") for structure in lent] == [b""]
    assert [structure.strip(b"\0") for structure in returned] == [b""]
