"""Who is at the other end of a local socket, as the kernel reports it.

Facts only; the policy decides what they are worth. The process is pinned by a pidfd, so that its number cannot come to
mean another process, and its unit is read from a descriptor of its own ``/proc/PID/cgroup``: such a descriptor
belongs to that very process (proc(5)), and answers ESRCH once the process is gone.

The service must be able to see other users' processes: ``ProtectProc=`` must stay ``default``.
"""

import ctypes
import errno
import os
import re
import select
import socket
import struct
from asyncio.trsock import TransportSocket
from typing import Self

import msgspec

from unsealerd.errors import CallerChanged

SO_PEERGROUPS = 59
SO_PEERPIDFD = 77  # Linux 6.5

_UCRED = struct.Struct("iII")
_CGROUP_BYTES = 16384  # a path is at most 4096, and cgroup v1 has a line for each controller
_MAX_GROUPS = 65536  # NGROUPS_MAX
# systemd's unit_name_is_valid() for plain and instance names; a template ("name@.service") runs nothing.
_UNIT = re.compile(
    r"(?:[A-Za-z0-9:_.\\-]+|[A-Za-z0-9:_.\\-]+@[A-Za-z0-9:_.\\@-]+)\.(?:service|scope|socket|mount|swap)"
)
_SLICE = re.compile(r"[A-Za-z0-9:_.\\-]+\.slice")
_UNIT_NAME_MAX = 255
_NO_DESCRIPTOR = 2**31 - 1
# exec-credential.c: "@%" PRIx64 "/unit/%s/%s"
_CREDENTIAL_ADDRESS = re.compile(rb"\0[0-9a-f]{1,16}/unit/([^/\0]{1,255})/([^/\0]{1,255})")


class Caller(msgspec.Struct, frozen=True):
    """One process as it was when it connected.

    ``groups`` holds every group, the primary one included. ``unit`` is the unit of the *system* service manager;
    a user's own unit shows as ``user@UID.service``. ``via_systemd``: the service manager reads a credential for ``unit``;
    then uid and gid are its own (0), and ``groups`` is empty.
    """

    uid: int
    gid: int
    groups: frozenset[int]
    pid: int
    unit: str | None
    via_systemd: bool = False


def _is_unit(name: str) -> bool:
    return len(name) <= _UNIT_NAME_MAX and _UNIT.fullmatch(name) is not None


def _unit_of_path(path: str) -> str | None:
    """The first component below the slices, if it is a unit."""
    if not path.startswith("/"):
        return None
    for part in path.split("/")[1:]:
        name = part.removeprefix("_")  # systemd's cg_unescape()
        if not _SLICE.fullmatch(name):
            return name if _is_unit(name) else None
    return None


def _paths(cgroup_text: bytes) -> tuple[str | None, str | None]:
    """The paths in the two hierarchies that the service manager may use: cgroup v2, and the named one of v1."""
    unified: str | None = None
    named: str | None = None
    try:
        text = cgroup_text.decode("ascii")
    except UnicodeDecodeError:
        return None, None
    for line in text.split("\n"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and controllers == "":
            unified = path
        elif controllers == "name=systemd":
            named = path
    return unified, named


def unit_of(cgroup_text: bytes) -> str | None:
    """The system unit of a process, from its ``/proc/PID/cgroup``, or None.

    As sd_pid_get_unit(3), which reads cgroup v2 (``0::PATH``) or the named v1 hierarchy (``N:name=systemd:PATH``). Where both
    say something they must say the same: a caller in doubt has no unit.
    """
    unified, named = _paths(cgroup_text)
    if "/.." in f"{unified}{named}":
        return None  # outside of our cgroup namespace: the names there are not our service manager's
    if named is None:
        return None if unified is None else _unit_of_path(unified)
    unit = _unit_of_path(named)
    if unified is None or unified == "/" or _unit_of_path(unified) == unit:
        return unit
    return None


def _may_read_for(cgroup_text: bytes, unit: str) -> bool:
    """Whether a root process in this cgroup may be the service manager's, reading a credential for ``unit``.

    The manager reads credentials in a process that it has moved into the unit's cgroup before (exec-invoke.c). A root process
    elsewhere, in a container that was given the socket for instance, is not believed. "/": the hierarchy is not used.
    """
    paths = [path for path in _paths(cgroup_text) if path is not None]
    return bool(paths) and all(
        path == "/" or ("/.." not in path and _unit_of_path(path) == unit) for path in paths
    )


def credential_unit(peer_address: bytes) -> tuple[str, str] | None:
    """(unit, credential) from the address that systemd binds when it connects for ``LoadCredential=``, or None.

    ``\\0RANDOM/unit/UNIT/CREDENTIAL`` (systemd.exec(5)). Anybody can bind such an address: it says something only when
    the peer is root, and where the unit is.
    """
    match = _CREDENTIAL_ADDRESS.fullmatch(peer_address)
    if match is None:
        return None
    try:
        unit, credential = match[1].decode("ascii"), match[2].decode("utf-8")
    except UnicodeDecodeError:
        return None
    return (unit, credential) if _is_unit(unit) else None


def peer_uid(sock: socket.socket | TransportSocket) -> int:
    """The peer's user, without opening anything."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(credentials)[1])


def _peer_groups(sock: socket.socket | TransportSocket) -> frozenset[int]:
    """SO_PEERGROUPS. socket.getsockopt() has room for 256 groups; who has more is asked for through libc."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)
    except OSError as err:
        if err.errno != errno.ERANGE:
            raise
        groups = (ctypes.c_uint32 * _MAX_GROUPS)()
        size = ctypes.c_uint32(ctypes.sizeof(groups))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.getsockopt(
            sock.fileno(), socket.SOL_SOCKET, SO_PEERGROUPS, ctypes.byref(groups), ctypes.byref(size)
        ):
            raise OSError(ctypes.get_errno(), "SO_PEERGROUPS") from err
        raw = bytes(groups)[: size.value]
    return frozenset(struct.unpack(f"{len(raw) // 4}I", raw))


def _pin_by_number(pid: int, uid: int, proc: str) -> int:
    """A pidfd where the socket gives none (before Linux 6.5).

    Between connect and here the number could have been given to another process. It is not pinned unless that process
    runs as the user that connected, so that at worst one process of a user is taken for another of the same user.
    """
    pidfd = os.pidfd_open(pid)
    try:
        with open(f"{proc}/{pid}/status", "rb") as status:
            uids = next(line for line in status if line.startswith(b"Uid:")).split()[1:]
        if uid not in map(int, uids):
            raise CallerChanged("the process number belongs to another user now")
    except BaseException:
        os.close(pidfd)
        raise
    return pidfd


class Peer:
    """A pinned caller: `check` it before each answer, `close` it with the connection."""

    __slots__ = ("_cgroup", "_expected", "_life", "_pidfd", "_room", "caller", "credential")

    def __init__(
        self, caller: Caller, pidfd: int, cgroup: int | None, expected: bytes, credential: str | None
    ) -> None:
        self.caller = caller
        self.credential = credential  # the credential's name when systemd reads it
        self._pidfd = pidfd
        self._cgroup = cgroup
        self._expected = expected
        self._room = bytearray(len(expected) + 1)  # one more, so that a longer text shows
        self._life = select.poll()
        self._life.register(pidfd, select.POLLIN)  # readable once the process has ended, also as a zombie

    @classmethod
    def of(
        cls, sock: socket.socket | TransportSocket, *, credentials: bool = False, proc: str = "/proc"
    ) -> Self:
        """The peer of a connected Unix socket. Raises `CallerChanged` if its process is gone already.

        `credentials`: believe the address of a root peer that says for which unit systemd connects. Keeps two descriptors.
        """
        try:
            return cls._of(sock, credentials, proc)
        except (OSError, StopIteration) as err:
            if isinstance(err, OSError) and err.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise  # ours, not the caller's
            raise CallerChanged("the process behind the connection ended, or /proc hides it") from err

    @classmethod
    def _of(cls, sock: socket.socket | TransportSocket, credentials: bool, proc: str) -> Self:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, gid = _UCRED.unpack(raw)
        try:
            pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        except OSError as err:
            if err.errno != errno.ENOPROTOOPT:
                raise
            pidfd = _pin_by_number(pid, uid, proc)
        cgroup: int | None = None
        try:
            address = sock.getpeername() if credentials and uid == 0 else b""
            found = credential_unit(address) if isinstance(address, bytes) else None
            cgroup = os.open(f"{proc}/{pid}/cgroup", os.O_RDONLY | os.O_CLOEXEC)
            expected = os.pread(cgroup, _CGROUP_BYTES, 0)
            if found is not None and not _may_read_for(expected, found[0]):
                found = None
            if found is not None:
                caller = Caller(uid, gid, frozenset(), pid, found[0], via_systemd=True)
                os.close(cgroup)
                cgroup = None
            else:
                unit = unit_of(expected)
                if unit is None:
                    # Nothing was granted for a unit, so there is nothing to lose by moving: life is all that is checked.
                    os.close(cgroup)
                    cgroup = None
                caller = Caller(uid, gid, _peer_groups(sock) | {gid}, pid, unit)
            peer = cls(caller, pidfd, cgroup, expected, found[1] if found else None)
            # Still alive now: so its number was its own when /proc was opened.
            peer._check_life()
        except BaseException:
            os.close(pidfd)
            if cgroup is not None:
                os.close(cgroup)
            raise
        return peer

    def _check_life(self) -> None:
        if self._life.poll(0):
            raise CallerChanged("the process behind the connection ended")

    def check(self) -> None:
        """Raise `CallerChanged` if the process ended or is in another unit now. Costs about 1 to 4 µs."""
        if self._life.poll(0):
            raise CallerChanged("the process behind the connection ended")
        if self._cgroup is not None:
            try:
                count = os.preadv(self._cgroup, [self._room], 0)
            except OSError as err:
                raise CallerChanged("the process behind the connection ended") from err
            if count != len(self._expected) or not self._room.startswith(self._expected):
                self._check_unit()

    def _check_unit(self) -> None:
        """The cgroup is another one: still of the same unit (a delegated subgroup), or not."""
        assert self._cgroup is not None
        try:
            text = os.pread(self._cgroup, _CGROUP_BYTES, 0)
        except OSError as err:
            raise CallerChanged("the process behind the connection ended") from err
        if unit_of(text) != self.caller.unit:
            raise CallerChanged("the process moved to another unit")
        self._expected = text
        self._room = bytearray(len(text) + 1)

    def close(self) -> None:
        """A second call does nothing."""
        if self._pidfd >= 0:
            self._life.unregister(self._pidfd)
            self._life.register(_NO_DESCRIPTOR, select.POLLIN)  # POLLNVAL: `check` refuses from now on
            os.close(self._pidfd)
            self._pidfd = -1
        if self._cgroup is not None:
            os.close(self._cgroup)
            self._cgroup = None

    def __repr__(self) -> str:
        return f"<Peer {self.caller}>"
