"""Runs pcscd in a network of its own and hands out connections to its virtual reader. Standard library only.

A virtual reader listens on TCP, on all addresses. So pcscd runs in a network namespace that holds nothing but its
loopback; this program, inside of it, connects to the reader and passes the connection out by a Unix socket.

    argv     control descriptor, listening descriptor, then the command of pcscd
    control  ← {"pid": N}      ← "start" | "PORT"      → {"pid": N} | "ok" with a descriptor | "no"
"""

import array
import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_PR_SET_PDEATHSIG = 1
_LISTEN_FDS_START = 3  # sd_listen_fds(3)


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


def start(listener: int, command: list[str]) -> "subprocess.Popen[bytes]":
    def prepare() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.dup2(listener, _LISTEN_FDS_START)
        os.environ["LISTEN_FDS"] = "1"
        os.environ["LISTEN_PID"] = str(os.getpid())

    return subprocess.Popen(command, preexec_fn=prepare, pass_fds=(_LISTEN_FDS_START,))


def connect(port: int) -> socket.socket | None:
    with contextlib.suppress(OSError):
        return socket.create_connection(("127.0.0.1", port), timeout=5)
    return None


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    listener, command = int(sys.argv[2]), sys.argv[3:]
    loopback_up()
    process = start(listener, command)
    control.sendall(json.dumps({"pid": process.pid}).encode())
    while request := control.recv(64).decode():
        if request == "start":
            process.kill()
            process.wait()
            process = start(listener, command)
            control.sendall(json.dumps({"pid": process.pid}).encode())
            continue
        connection = connect(int(request))
        if connection is None:
            control.sendall(b"no")
            continue
        rights = array.array("i", [connection.fileno()])
        control.sendmsg([b"ok"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        connection.close()
    process.kill()
    process.wait()


if __name__ == "__main__":
    main()
