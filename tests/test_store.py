"""Files that are whole or absent: their modes, what stands in the way, and what is kept of the generation before."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from unsealerd.daemon.store import BACKUP, MAX_BACKUP_BYTES, PREVIOUS, BackupStore, DurableDirectory
from unsealerd.errors import BackupDamaged, NotInitialised, StorageFailed

LIMIT = 1000
NAME = "file"


@pytest.fixture
def directory(tmp_path: Path) -> DurableDirectory:
    return DurableDirectory(tmp_path)


@pytest.fixture
def store(directory: DurableDirectory) -> BackupStore:
    return BackupStore(directory)


def names(directory: DurableDirectory) -> set[str]:
    return {path.name for path in directory.path.iterdir()}


# --- a file


def test_what_is_written_is_read(directory: DurableDirectory) -> None:
    for data in (b"one", b"", b"three" * 100):
        directory.write(NAME, data)
        assert directory.read(NAME, LIMIT) == data
        assert names(directory) == {NAME}


def test_a_file_is_its_owners_alone_whatever_the_umask(directory: DurableDirectory) -> None:
    before = os.umask(0)
    try:
        directory.write(NAME, b"x")
    finally:
        os.umask(before)
    assert (directory.path / NAME).stat().st_mode & 0o7777 == 0o600


def test_what_is_not_there_is_none(directory: DurableDirectory) -> None:
    assert directory.read(NAME, LIMIT) is None
    assert directory.modified(NAME) is None
    directory.remove(NAME)


def test_a_file_that_is_too_large_is_refused(directory: DurableDirectory) -> None:
    directory.write(NAME, bytes(LIMIT))
    assert directory.read(NAME, LIMIT) == bytes(LIMIT)
    directory.write(NAME, bytes(LIMIT + 1))
    with pytest.raises(StorageFailed, match="larger"):
        directory.read(NAME, LIMIT)


def test_remove_removes(directory: DurableDirectory) -> None:
    directory.write(NAME, b"x")
    directory.remove(NAME)
    assert names(directory) == set()


@pytest.mark.promise(6)
def test_the_order_of_a_write(directory: DurableDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content is durable before it has the name, and the name before the call returns."""
    directory.write(NAME, b"old")
    steps: list[str] = []

    def noted(step: str, call: Callable[..., object]) -> Callable[..., object]:
        def note(*args: object, **kwargs: object) -> object:
            what = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else str(args[0])
            steps.append(f"{step} {Path(what).name if what != str(directory.path) else 'directory'}")
            return call(*args, **kwargs)

        return note

    for call in ("fsync", "link", "rename"):
        monkeypatch.setattr(os, call, noted(call, getattr(os, call)))
    directory.write(NAME, b"new", keep_previous="before")
    assert steps == ["fsync file.new", "link file", "rename file.new", "fsync directory"]
    steps.clear()
    directory.remove(NAME)
    assert steps == ["fsync directory"]


@pytest.mark.promise(6)
def test_what_a_crash_left_is_no_obstacle(directory: DurableDirectory) -> None:
    (directory.path / f"{NAME}.new").write_bytes(b"half")
    directory.write(NAME, b"whole")
    assert directory.read(NAME, LIMIT) == b"whole"
    assert names(directory) == {NAME}


@pytest.mark.promise(6)
@pytest.mark.parametrize("call", ["fsync", "link", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_write_that_fails_leaves_what_was_there(
    directory: DurableDirectory, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    directory.write(NAME, b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StorageFailed, match=os.strerror(code)):
            directory.write(NAME, b"new", keep_previous="before")
    assert directory.read(NAME, LIMIT) == b"old"
    assert f"{NAME}.new" not in names(directory)
    directory.write(NAME, b"new", keep_previous="before")
    assert (directory.read(NAME, LIMIT), directory.read("before", LIMIT)) == (b"new", b"old")


# --- what stands in the way


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_replaced_and_not_written_through(directory: DurableDirectory, there: bool) -> None:
    other = directory.path / "other"
    if there:
        other.write_bytes(b"precious")
    for name in (NAME, f"{NAME}.new"):
        (directory.path / name).symlink_to(other)
    directory.write(NAME, b"new")
    assert directory.read(NAME, LIMIT) == b"new"
    assert not (directory.path / NAME).is_symlink()
    assert other.exists() == there
    assert not there or other.read_bytes() == b"precious"


def test_a_link_is_not_read(directory: DurableDirectory) -> None:
    (directory.path / "other").write_bytes(b"precious")
    (directory.path / NAME).symlink_to(directory.path / "other")
    with pytest.raises(StorageFailed):
        directory.read(NAME, LIMIT)


@pytest.mark.parametrize("name", [NAME, f"{NAME}.new"])
def test_a_directory_in_the_way_is_said(directory: DurableDirectory, name: str) -> None:
    (directory.path / name / "x").mkdir(parents=True)
    with pytest.raises(StorageFailed):
        directory.write(NAME, b"x")
    assert names(directory) == {name}


@pytest.mark.promise(10)
def test_a_directory_is_no_file_and_no_descriptor_is_lost(directory: DurableDirectory) -> None:
    (directory.path / NAME).mkdir()
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(StorageFailed):
            directory.read(NAME, LIMIT)
    assert set(os.listdir("/proc/self/fd")) <= before
    with pytest.raises(StorageFailed):
        directory.remove(NAME)


@pytest.mark.promise(10)
def test_a_pipe_in_place_of_a_file_does_not_stop_the_daemon(directory: DurableDirectory) -> None:
    os.mkfifo(directory.path / NAME)
    with pytest.raises(StorageFailed, match="not a regular file"):
        directory.read(NAME, LIMIT)


def test_a_directory_that_is_gone(directory: DurableDirectory) -> None:
    directory.path.rmdir()
    with pytest.raises(StorageFailed):
        directory.write(NAME, b"x")
    with pytest.raises(StorageFailed):
        directory.remove(NAME)
    assert directory.read(NAME, LIMIT) is None


# --- the backup


def test_there_is_none_at_first(store: BackupStore) -> None:
    assert not store.present()
    assert (store.written_at, store.signature()) == (None, None)
    with pytest.raises(NotInitialised):
        store.read()


def test_the_generation_before_is_kept(store: BackupStore, directory: DurableDirectory) -> None:
    for generation in (b"1", b"2", b"3"):
        store.write(generation, forget_previous=False)
    assert (store.read(), directory.read(PREVIOUS, LIMIT)) == (b"3", b"2")
    assert names(directory) == {BACKUP, PREVIOUS}


@pytest.mark.promise(1)
def test_bytes_that_are_to_be_destroyed_are_in_no_generation(
    store: BackupStore, directory: DurableDirectory
) -> None:
    for generation in (b"1", b"2"):
        store.write(generation, forget_previous=False)
    (directory.path / f"{BACKUP}.new").write_bytes(b"of a crash")
    store.write(b"3", forget_previous=True)
    assert names(directory) == {BACKUP}
    assert store.read() == b"3"


@pytest.mark.promise(6)
def test_a_spare_alone_is_damage_and_not_a_new_host(store: BackupStore, directory: DurableDirectory) -> None:
    store.write(b"1", forget_previous=False)
    store.write(b"2", forget_previous=False)
    (directory.path / BACKUP).unlink()
    assert store.present()
    with pytest.raises(BackupDamaged, match="missing"):
        store.read()


@pytest.mark.promise(10)
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nothing")])
def test_what_is_no_backup_is_damage(
    store: BackupStore, directory: DurableDirectory, make: Callable[[Path], None]
) -> None:
    make(directory.path / BACKUP)
    with pytest.raises(BackupDamaged):
        store.read()


def test_a_backup_that_is_too_large_is_damage(store: BackupStore, directory: DurableDirectory) -> None:
    with (directory.path / BACKUP).open("wb") as file:
        file.truncate(MAX_BACKUP_BYTES + 1)
    with pytest.raises(BackupDamaged, match="larger"):
        store.read()


def test_only_what_this_process_wrote_or_opened_verifies(
    store: BackupStore, directory: DurableDirectory
) -> None:
    directory.write(BACKUP, b"of somebody")
    with pytest.raises(BackupDamaged):
        store.verify()
    store.opened(b"of somebody")
    assert store.verify() == b"of somebody"
    store.write(b"ours", forget_previous=False)
    assert store.verify() == b"ours"
    directory.write(BACKUP, b"Ours")
    with pytest.raises(BackupDamaged):
        store.verify()


@pytest.mark.promise(6)
def test_a_write_that_failed_is_not_what_is_known(
    store: BackupStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(b"old", forget_previous=False)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(StorageFailed):
        store.write(b"new", forget_previous=False)
    assert store.verify() == b"old"


def test_the_signature_changes_with_every_write(store: BackupStore) -> None:
    seen = set()
    for _ in range(3):
        store.write(b"same", forget_previous=False)
        seen.add(store.signature())
    assert len(seen) == 3
    assert store.written_at is not None
