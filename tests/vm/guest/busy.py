"""Rotates, or seals and disarms, without a pause, until the power is cut.

What the daemon has answered is noted beside the file system, on the same disk: written past the guest's cache, and not
flushed. Canaries are written there, too, all the time. Beside each seal it keeps what somebody would have who copied the
disk at that moment. Arguments: `rotate` or `seal`; where on the disk the notes are, in bytes; the number of the first canary.
"""

import hashlib
import itertools
import json
import mmap
import os
import pathlib
import random
import select
import shutil
import socket
import sys
import threading
import time

STATE = pathlib.Path("/var/lib/unsealerd")
STALE = pathlib.Path("/root/stale")
DISK = "/dev/vda"
SECTOR = 512
CANARIES, SLOTS = 4096, 1000  # bytes behind the notes; how many
CANARY_PAUSE = 0.08  # seconds; the disk is slow, and others write, too


class Notes:
    """One sector at a time; two threads have one each."""

    def __init__(self, disk: int) -> None:
        self._disk = disk
        self._page = mmap.mmap(-1, mmap.PAGESIZE)  # aligned, as O_DIRECT wants it

    def write(self, text: str, offset: int) -> None:
        self._page[:SECTOR] = text.encode().ljust(SECTOR, b"\0")
        os.pwrite(self._disk, memoryview(self._page)[:SECTOR], offset)


def main(what: str, offset: int, canary: int) -> None:
    disk = os.open(DISK, os.O_WRONLY | os.O_DIRECT)
    notes = Notes(disk)
    threading.Thread(target=canaries, args=(disk, offset + CANARIES, canary), daemon=True).start()
    admin = socket.socket(socket.AF_UNIX)
    admin.connect("/run/unsealerd/admin")

    def step(kind: str, method: str, /, **parameters: object) -> None:
        notes.write(f"begin {kind}\n", offset)
        admin.sendall(
            json.dumps({"method": f"io.unsealerd.Admin.{method}", "parameters": parameters}).encode() + b"\0"
        )
        answer = b""
        while not answer.endswith(b"\0"):
            answer += admin.recv(65536) or sys.exit("the daemon is gone")
        if "error" in json.loads(answer[:-1]):
            sys.exit(answer.decode())
        notes.write(f"done {kind}\n", offset)

    for number in itertools.count(1):
        if what == "rotate":
            step("rotate", "RotateKey", name="web-sessions")
            notes.write(f"version {newest()}\n", offset)
        else:
            step("seal", "Seal", kind="reboot")
            keep(number)
            time.sleep(
                random.uniform(0, 0.5)
            )  # sometimes the cut finds a copy that is good for the next boot
            if number % 3 == 0:
                step("disarm", "Disarm")


def canaries(disk: int, offset: int, first: int) -> None:
    notes = Notes(disk)
    for number in itertools.count(first):
        notes.write(f"{number}\n", offset + number % SLOTS * SECTOR)
        select.select([], [], [], CANARY_PAUSE)


def newest() -> str:
    """The primary version, and a digest of it, as a service gets it."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect("/run/unsealerd/keyset/web-sessions")
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
    version, _, value = data.decode().splitlines()[0].partition(" ")
    return f"{version} {hashlib.sha256(bytes.fromhex(value)).hexdigest()[:16]}"


def keep(number: int) -> None:
    """On the root disk, durably, and without a word to the disk of the state."""
    making, copy = STALE / "making", STALE / str(number)
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    for name in ("sealed.json", "keyring.age"):
        with open(making / name, "xb") as file:
            file.write((STATE / name).read_bytes())
            file.flush()
            os.fsync(file.fileno())
    making.rename(copy)
    for directory in (copy, STALE):
        fd = os.open(directory, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    for old in STALE.iterdir():
        if int(old.name) < number - 3:
            shutil.rmtree(old)


main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
