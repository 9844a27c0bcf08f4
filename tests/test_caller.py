"""The caller's identity: what is believed, and when it stops being true."""

import errno
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unsealerd.daemon import caller as caller_module
from unsealerd.daemon.caller import Caller, Peer, credential_unit, peer_uid, unit_of
from unsealerd.errors import CallerChanged

PATIENCE = 60.0  # seconds

# --- the unit


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        # cgroup v2
        ("0::/system.slice/web.service\n", "web.service"),
        ("0::/system.slice/web.service", "web.service"),
        ("0::/system.slice/web.service/sub/group\n", "web.service"),
        ("0::/system.slice/system-web.slice/web@1.service\n", "web@1.service"),
        ("0::/a.slice/a-b.slice/a-b-c.slice/x.service/y.service\n", "x.service"),
        ("0::/init.scope\n", "init.scope"),
        ("0::/machine.slice/machine-web.scope/system.slice/web.service\n", "machine-web.scope"),
        ("0::/system.slice/dbus.socket\n", "dbus.socket"),
        ("0::/system.slice/srv.mount\n", "srv.mount"),
        ("0::/system.slice/dev-sda2.swap\n", "dev-sda2.swap"),
        ("0::/web.service\n", "web.service"),
        # a user's own unit is not the system's unit of that name
        (
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/web.service\n",
            "user@1000.service",
        ),
        ("0::/user.slice/user-1000.slice/session-3.scope\n", "session-3.scope"),
        # escaped, as systemd's cg_escape() writes names that cgroupfs uses itself
        ("0::/system.slice/_cpu.service\n", "cpu.service"),
        ("0::/_a.slice/_web.service\n", "web.service"),
        ("0::/system.slice/__web.service\n", "_web.service"),
        ("0::/system.slice/a\\x2db.service\n", "a\\x2db.service"),
        # no unit
        ("0::/\n", None),
        ("0::/system.slice\n", None),
        ("0::/system.slice/\n", None),
        ("0::/docker/0123/system.slice/web.service\n", None),
        ("0::/system.slice/web\n", None),
        ("0::/system.slice/web.target\n", None),
        ("0::/system.slice/web.service (deleted)\n", None),
        ("0::/system.slice/web@.service\n", None),
        ("0::/system.slice/@x.service\n", None),
        ("0::/system.slice/.service\n", None),
        ("0::/system.slice/web .service\n", None),
        ("0::/system.slice/wéb.service\n", None),
        ("0::/system.slice//web.service\n", None),
        ("0::/system.slice/" + "x" * 248 + ".service\n", None),
        ("0::/.slice/web.service\n", None),
        ("0::system.slice/web.service\n", None),
        # outside of our cgroup namespace
        ("0::/../system.slice/web.service\n", None),
        ("0::/system.slice/../web.service\n", None),
        ("0::/system.slice/web.service/..\n", None),
        # cgroup v1
        ("5:devices:/system.slice/other.service\n1:name=systemd:/system.slice/web.service\n", "web.service"),
        ("1:name=systemd:/system.slice/web.service\n0::/\n", "web.service"),
        ("5:devices:/system.slice/web.service\n", None),
        ("5:devices:/system.slice/web.service\n0::/\n", None),
        ("1:name=other:/system.slice/web.service\n", None),
        # hybrid: both must say the same
        ("1:name=systemd:/system.slice/web.service\n0::/system.slice/web.service\n", "web.service"),
        ("1:name=systemd:/system.slice/web.service\n0::/system.slice/x.service\n", None),
        ("1:name=systemd:/\n0::/system.slice/web.service\n", None),
        ("1:name=systemd:/system.slice/web.service\n0::/docker/x\n", None),
        # nonsense
        ("", None),
        ("\n\n", None),
        ("web.service", None),
        ("0:::/system.slice/web.service\n", None),
        ("0:cpu:/system.slice/web.service\n", None),
    ],
)
def test_the_unit_is_the_first_below_the_slices(text: str, unit: str | None) -> None:
    assert unit_of(text.encode()) == unit


@given(st.binary())
def test_any_cgroup_text_gives_a_unit_or_none(text: bytes) -> None:
    found = unit_of(text)
    assert found is None or found.endswith((".service", ".scope", ".socket", ".mount", ".swap"))


@pytest.mark.parametrize(
    ("address", "found"),
    [
        (b"\x00b2f00a1d/unit/web.service/session-key", ("web.service", "session-key")),
        (b"\x000123456789abcdef/unit/web@1.service/a.b", ("web@1.service", "a.b")),
        (b"b2f00a1d/unit/web.service/key", None),
        (b"\x00/unit/web.service/key", None),
        (b"\x000123456789abcdef0/unit/web.service/key", None),
        (b"\x00XYZ/unit/web.service/key", None),
        (b"\x00b2f/user/web.service/key", None),
        (b"\x00b2f/unit/web.service", None),
        (b"\x00b2f/unit//key", None),
        (b"\x00b2f/unit/web.service/", None),
        (b"\x00b2f/unit/web.service/key/more", None),
        (b"\x00b2f/unit/web.target/key", None),
        (b"\x00b2f/unit/w\xe9b.service/key", None),
        (b"\x00b2f/unit/web.service/\xff", None),
        (b"\x00b2f/unit/web.service/key\n", ("web.service", "key\n")),
        (b"", None),
    ],
)
def test_systemd_says_for_which_unit_it_connects(address: bytes, found: tuple[str, str] | None) -> None:
    assert credential_unit(address) == found


# --- the peer


class Claim(socket.socket):
    """A socket that says what the test wants about its peer's credentials."""

    claimed: tuple[int, int, int] = (0, 0, 0)  # pid, uid, gid
    address: bytes | str = ""

    def getsockopt(self, level: int, option: int, size: int = 0) -> int | bytes:  # type: ignore[override]
        if (level, option) == (socket.SOL_SOCKET, socket.SO_PEERCRED):
            return struct.pack("iII", *self.claimed)
        return super().getsockopt(level, option, size) if size else super().getsockopt(level, option)

    def getpeername(self) -> bytes | str:
        return self.address


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def claim(sock: socket.socket, pid: int, uid: int, address: bytes | str = "") -> Claim:
    found = Claim(fileno=os.dup(sock.fileno()))
    found.claimed = (pid, uid, uid)
    found.address = address
    return found


def descriptors() -> set[str]:
    """Of this process. Some are of other threads, and may be closed meanwhile."""
    return set(os.listdir("/proc/self/fd"))


def fake_proc(directory: Path, cgroup: str, uid: int | None = None) -> Path:
    """A /proc in which this process is in `cgroup`. Returns the cgroup file."""
    own = directory / str(os.getpid())
    own.mkdir()
    (own / "status").write_text(f"Name:\tx\nUid:\t{os.getuid() if uid is None else uid}\t7\t7\t7\n")
    (own / "cgroup").write_text(cgroup)
    return own / "cgroup"


def test_the_kernel_says_who_it_is(pair: tuple[socket.socket, socket.socket]) -> None:
    peer = Peer.of(pair[0])
    try:
        with open("/proc/self/cgroup", "rb") as own:
            unit = unit_of(own.read())
        assert peer.caller == Caller(
            uid=os.getuid(),
            gid=os.getgid(),
            groups=frozenset(os.getgroups()) | {os.getgid()},
            pid=os.getpid(),
            unit=unit,
            via_systemd=False,
        )
        assert peer_uid(pair[0]) == os.getuid()
        peer.check()
    finally:
        peer.close()


def test_a_peer_of_many_groups(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crowded(Claim):
        def getsockopt(self, level: int, option: int, size: int = 0) -> int | bytes:  # type: ignore[override]
            if option == caller_module.SO_PEERGROUPS:
                raise OSError(errno.ERANGE, "more than there is room for")
            return super().getsockopt(level, option, size)

    with Crowded(fileno=os.dup(pair[0].fileno())) as crowded:
        assert caller_module._peer_groups(crowded) == frozenset(os.getgroups())


def test_a_peer_closes_what_it_opened(pair: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    fake_proc(tmp_path, "0::/system.slice/web.service\n")
    before = descriptors()
    peer = Peer.of(pair[0], proc=str(tmp_path))
    assert len(descriptors() - before) == 2
    peer.close()
    peer.close()
    assert descriptors() <= before
    # Its descriptors may mean something else by now: it vouches for nobody any more.
    with pytest.raises(CallerChanged):
        peer.check()
    os.unlink(tmp_path / str(os.getpid()) / "cgroup")
    with pytest.raises(CallerChanged):
        Peer.of(pair[0], proc=str(tmp_path))
    assert descriptors() <= before


@pytest.mark.parametrize(
    ("now", "changed"),
    [
        ("0::/system.slice/web.service\n", False),
        ("0::/system.slice/web.service/delegated\n", False),
        ("0::/system.slice/web.servicex\n", True),
        ("0::/system.slice/other.service\n", True),
        ("0::/system.slice/web.servic", True),
        ("0::/\n", True),
        ("", True),
    ],
)
def test_moving_to_another_unit_is_noticed(
    pair: tuple[socket.socket, socket.socket], tmp_path: Path, now: str, changed: bool
) -> None:
    cgroup = fake_proc(tmp_path, "0::/system.slice/web.service\n")
    peer = Peer.of(pair[0], proc=str(tmp_path))
    try:
        assert peer.caller.unit == "web.service"
        peer.check()
        cgroup.write_text(now)
        for _ in range(2):
            if changed:
                with pytest.raises(CallerChanged):
                    peer.check()
            else:
                peer.check()
        cgroup.write_text("0::/system.slice/other.service\n")
        with pytest.raises(CallerChanged):
            peer.check()
    finally:
        peer.close()


def test_who_has_no_unit_does_not_get_one_by_moving(
    pair: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    cgroup = fake_proc(tmp_path, "0::/user.slice\n")
    peer = Peer.of(pair[0], proc=str(tmp_path))
    try:
        cgroup.write_text("0::/system.slice/web.service\n")
        peer.check()
        assert peer.caller.unit is None
    finally:
        peer.close()


CONNECTOR = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
if sys.argv[2] == "hand on" and os.fork() == 0:
    sock.recv(1)
    os._exit(0)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["alone", "hand on"])
@pytest.mark.parametrize("pinned_by", ["socket", "number"])
def test_the_end_of_the_process_is_noticed(
    tmp_path: Path, how: str, pinned_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a zombie, after it was reaped, and also if a child keeps the connection."""
    if pinned_by == "number":
        monkeypatch.setattr(caller_module, "SO_PEERPIDFD", 9999)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        arguments = [sys.executable, "-c", CONNECTOR, str(tmp_path / "s"), how]
        with subprocess.Popen(arguments, stdin=subprocess.PIPE) as process:
            sock, _ = listener.accept()
            peer = Peer.of(sock)
            try:
                assert peer.caller.pid == process.pid
                peer.check()
                assert process.stdin is not None
                process.stdin.close()
                # Ended, not reaped: a zombie still has its cgroup.
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
                with pytest.raises(CallerChanged):
                    peer.check()
                with pytest.raises(CallerChanged):
                    Peer.of(sock)
                process.wait(PATIENCE)
                with pytest.raises(CallerChanged):
                    peer.check()
                with pytest.raises(CallerChanged):
                    Peer.of(sock)
            finally:
                peer.close()
                sock.close()


def test_a_socket_that_was_passed_on_stays_its_makers(tmp_path: Path) -> None:
    """SO_PEERCRED is who connected; who holds the socket now does not count."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with socket.socket(socket.AF_UNIX) as mine:
            mine.connect(str(tmp_path / "s"))
            user = "import socket, sys; socket.socket(fileno=int(sys.argv[1])).send(b'x')"
            fd = str(mine.fileno())
            subprocess.run([sys.executable, "-c", user, fd], pass_fds=[mine.fileno()], check=True)
            sock, _ = listener.accept()
            with sock:
                assert sock.recv(1) == b"x"
                peer = Peer.of(sock)
                assert peer.caller.pid == os.getpid()
                peer.close()


def test_without_a_pidfd_of_the_socket_the_number_must_be_the_same_users(
    pair: tuple[socket.socket, socket.socket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller_module, "SO_PEERPIDFD", 9999)  # as a kernel before 6.5
    before = descriptors()
    with claim(pair[0], os.getpid(), os.getuid()) as sock:
        peer = Peer.of(sock)
        peer.check()
        peer.close()
    with claim(pair[0], os.getpid(), os.getuid() + 1) as sock, pytest.raises(CallerChanged):
        Peer.of(sock)
    assert descriptors() <= before


@pytest.mark.parametrize("pid", [0, -1])
def test_a_process_that_is_not_visible_is_nobody(pair: tuple[socket.socket, socket.socket], pid: int) -> None:
    with claim(pair[0], pid, os.getuid()) as sock, pytest.raises(CallerChanged):
        Peer.of(sock)


ADDRESS = b"\x00b2f00a1d/unit/other.service/session-key"


@pytest.mark.parametrize(
    ("uid", "address", "asked", "believed"),
    [
        (0, ADDRESS, True, True),
        (1000, ADDRESS, True, False),  # anybody can bind such an address
        (0, ADDRESS, False, False),  # only where credentials are read
        (0, "/run/other/unit/other.service/session-key", True, False),
        (0, b"\x00something", True, False),
    ],
)
def test_only_root_is_believed_to_read_a_credential(
    pair: tuple[socket.socket, socket.socket],
    tmp_path: Path,
    uid: int,
    address: bytes | str,
    asked: bool,
    believed: bool,
) -> None:
    cgroup = fake_proc(tmp_path, "0::/system.slice/other.service\n", uid)
    with claim(pair[0], os.getpid(), uid, address) as sock:
        peer = Peer.of(sock, credentials=asked, proc=str(tmp_path))
    try:
        assert peer.caller.via_systemd is believed
        assert peer.caller.unit == "other.service"
        assert peer.credential == ("session-key" if believed else None)
        assert bool(peer.caller.groups) is not believed
        cgroup.write_text("0::/system.slice/third.service\n")
        if believed:  # systemd's helper is in whatever cgroup it is
            peer.check()
        else:
            with pytest.raises(CallerChanged):
                peer.check()
    finally:
        peer.close()


@pytest.mark.promise(7)
@pytest.mark.parametrize(
    ("cgroup", "unit", "believed"),
    [
        ("0::/system.slice/other.service\n", "other.service", True),
        ("0::/a.slice/a-b.slice/other.service/.control\n", "other.service", True),
        ("1:name=systemd:/\n0::/system.slice/other.service\n", "other.service", True),
        ("0::/\n", "other.service", True),  # nothing is told, as in some containers
        ("0::/system.slice/payload.service\n", "payload.service", False),
        ("0::/machine.slice/machine-x.scope/payload/system.slice/other.service\n", "machine-x.scope", False),
        ("0::/user.slice/user-0.slice/user@0.service/app.slice/other.service\n", "user@0.service", False),
        ("1:name=systemd:/\n0::/system.slice/payload.service\n", None, False),
        ("1:name=systemd:/system.slice/other.service\n0::/system.slice/payload.service\n", None, False),
        ("0::/../other.service\n", None, False),
        ("0::/init.scope\n", "init.scope", False),
        ("", None, False),
    ],
)
def test_root_in_another_unit_does_not_read_that_units_credential(
    pair: tuple[socket.socket, socket.socket], tmp_path: Path, cgroup: str, unit: str | None, believed: bool
) -> None:
    """Root without capabilities, in a container that was given the socket, can bind the address of any unit."""
    fake_proc(tmp_path, cgroup, 0)
    with claim(pair[0], os.getpid(), 0, ADDRESS) as sock:
        peer = Peer.of(sock, credentials=True, proc=str(tmp_path))
    try:
        assert (peer.caller.via_systemd, peer.caller.unit) == (believed, unit)
        assert peer.credential == ("session-key" if believed else None)
    finally:
        peer.close()


def test_running_out_of_descriptors_is_not_the_callers_fault(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(*_: object) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    before = descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", no_more)
        with pytest.raises(OSError, match="too many"):
            Peer.of(pair[0])
    assert descriptors() <= before
