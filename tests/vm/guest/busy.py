"""Rotates, or seals and disarms, without a pause, and tells each step that is done on the console, until the power is cut.

Beside each seal it keeps what somebody would have who copied the disk at that moment.
"""

import hashlib
import json
import os
import pathlib
import random
import shutil
import socket
import sys
import time

STATE = pathlib.Path("/var/lib/unsealerd")
STALE = pathlib.Path("/root/stale")


def main(what: str) -> None:
    console = os.open("/dev/ttyS0", os.O_WRONLY | os.O_NOCTTY)
    admin = socket.socket(socket.AF_UNIX)
    admin.connect("/run/unsealerd/admin")

    def call(method: str, **parameters: object) -> None:
        admin.sendall(
            json.dumps({"method": f"io.unsealerd.Admin.{method}", "parameters": parameters}).encode() + b"\0"
        )
        answer = b""
        while not answer.endswith(b"\0"):
            answer += admin.recv(65536) or sys.exit("the daemon is gone")
        if "error" in json.loads(answer[:-1]):
            sys.exit(answer.decode())

    def tell(text: str) -> None:
        os.write(console, f"\nbusy: {text}.\n".encode())

    number = 0
    while True:
        number += 1
        if what == "rotate":
            call("RotateKey", name="web-sessions")
            tell(f"rotated {newest()}")
        else:
            call("Seal", kind="reboot")
            tell(f"sealed {number}")
            keep(number)
            time.sleep(
                random.uniform(0, 0.5)
            )  # sometimes the cut finds a copy that is good for the next boot
            if number % 3 == 0:
                call("Disarm")
                tell(f"disarmed {number}")


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


main(sys.argv[1])
