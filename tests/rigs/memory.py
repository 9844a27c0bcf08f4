"""Looking for secrets in the memory of a running process, from outside, as root may."""

import base64
from collections.abc import Iterator
from pathlib import Path

BLOCK = 8  # bytes; vector registers spill to the stack in such pieces


def writable_memory(pid: int) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every writable mapping that can be read. What memfd_secret made cannot: that is its purpose."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            place, mode, _, _, _, *name = line.split(None, 5)
            if "w" not in mode:
                continue
            start, end = (int(part, 16) for part in place.split("-"))
            chunk = 1 << 22
            for offset in range(start, end, chunk):
                try:
                    memory.seek(offset)
                    # An overlap, so that what lies across two chunks is found.
                    yield (name[0] if name else place), memory.read(min(chunk + 256, end - offset))
                except OSError:
                    break


def forms(secret: bytes) -> dict[str, bytes]:
    """The ways in which a secret shows: raw, hex, base64 at its three alignments, and in blocks."""
    found = {"raw": secret, "hex": secret.hex().encode(), "HEX": secret.hex().upper().encode()}
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + secret)
        found[f"base64+{shift}"] = encoded[4 if shift else 0 : -4]
    for at in range(0, len(secret) - BLOCK + 1, BLOCK):
        found[f"block {at}"] = secret[at : at + BLOCK]
    return found


def copies(pid: int, secret: bytes) -> list[str]:
    """Where and in which form the secret is in the process's writable memory."""
    wanted = forms(secret)
    return sorted(
        {
            f"{name}: {form}"
            for name, content in writable_memory(pid)
            for form, needle in wanted.items()
            if needle in content
        }
    )
