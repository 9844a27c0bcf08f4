"""Runs in the guest: takes commands as JSON lines on a virtio-serial port, and answers each on a line.

Commands run side by side. The service manager ends it by SIGKILL, at the very end of a shutdown.
"""

import json
import os
import select
import subprocess
import threading
import time

PORT = "/dev/virtio-ports/unsealerd.agent"
_POLL = 0.05  # seconds, while the driver is not loaded yet


def main() -> None:
    while not os.path.exists(PORT):
        select.select([], [], [], _POLL)
    port = os.open(PORT, os.O_RDWR)
    lock = threading.Lock()

    def say(message: dict[str, object]) -> None:
        with lock:
            data = b"\n" + json.dumps(message).encode() + b"\n"
            while data:
                data = data[os.write(port, data) :]

    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        say({"boot": file.read().strip(), "uptime": time.monotonic()})
    pending = b""
    while True:
        chunk = os.read(port, 65536)
        if not chunk:  # nobody holds the other end
            select.select([], [], [], _POLL)
            continue
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                threading.Thread(target=lambda text=line: say(answer(text)), daemon=True).start()


def answer(line: bytes) -> dict[str, object]:
    try:
        asked = json.loads(line)
    except ValueError:
        return {"id": None, "rc": -1, "out": "", "err": "not JSON"}  # the rest of a line to the boot before
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", asked["sh"]],
            input=asked.get("stdin", ""),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=asked["timeout"],
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"id": asked["id"], "rc": 124, "out": "", "err": "did not end in time"}
    return {"id": asked["id"], "rc": done.returncode, "out": done.stdout, "err": done.stderr}


if __name__ == "__main__":
    main()
