"""Whatever the TPM or the disk does, the daemon ends up locked with its own reason, and an operator can unlock it."""

import json
import shutil
from collections.abc import Iterator

import pytest
from rigs.server import Server
from rigs.tpmproxy import Command, TpmProxy, error

RC_FAILURE = 0x101
RC_RETRY = 0x922
RC_LOCKOUT = 0x921


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        server.start()
        server.ctl("init")
        yield server


def _seal_and_stop(server: Server) -> bytes:
    key = server.key()
    server.ctl("seal")
    server.stop()
    server.reset_tpm()
    return key


def _recover(server: Server, key: bytes, *arguments: str) -> None:
    server.unlock(*arguments)
    assert server.key() == key
    # And the machine is whole again: the next planned reboot needs nobody.
    server.reboot()
    server.assert_unlocked()
    assert server.key() == key


def test_a_changed_pcr_is_named_with_its_number(server: Server) -> None:
    key = _seal_and_stop(server)
    assert server.tpm is not None
    server.tpm.start()
    server.tpm.extend(7)
    server.start()
    server.assert_locked("pcr_mismatch")
    assert "7" in server.status()["lock_detail"]
    server.unlock()
    assert server.key() == key


def test_another_tpm_is_noticed_and_pinned_only_when_told(server: Server) -> None:
    key = _seal_and_stop(server)
    assert server.tpm is not None
    server.tpm.stop()
    shutil.rmtree(server.tpm.directory)
    server.start()
    server.assert_locked("tpm_changed")
    assert server.unlock(expect=None).returncode == 16
    server.assert_locked("tpm_changed")
    _recover(server, key, "--accept-rollback")


def test_a_missing_tpm_is_named_and_the_sealed_copy_still_works_when_it_is_back(server: Server) -> None:
    key = _seal_and_stop(server)
    assert server.tpm is not None
    server.configure(server.config.read_text().replace(server.tpm.tcti, f"swtpm:path={server.base}/none"))
    server.start()
    server.assert_locked("tpm_missing")
    server.stop()
    server.configure()
    server.start()
    server.assert_unlocked()
    assert server.key() == key


def test_without_its_tpm_the_host_is_unlocked_only_when_told_and_changes_nothing(server: Server) -> None:
    key = server.key()
    server.stop()
    assert server.tpm is not None
    server.configure(server.config.read_text().replace(server.tpm.tcti, f"swtpm:path={server.base}/none"))
    server.start()
    assert server.unlock(expect=None).returncode == 16
    server.assert_locked("tpm_missing")
    server.unlock("--accept-rollback")
    assert server.key() == key
    assert server.ctl("key", "rotate", "demo", expect=None).returncode == 16
    assert server.key() == key


@pytest.mark.parametrize(
    ("command", "code", "times", "reason"),
    [
        (Command.UNSEAL, RC_FAILURE, None, "tpm_failed"),
        (Command.LOAD, RC_FAILURE, None, "tpm_failed"),
        (Command.UNSEAL, RC_LOCKOUT, None, "tpm_lockout"),
        (Command.UNSEAL, RC_RETRY, None, "tpm_failed"),
        (Command.NV_INCREMENT, RC_FAILURE, None, "tpm_failed"),
    ],
)
def test_a_tpm_that_answers_errors(
    server: Server, command: Command, code: int, times: int | None, reason: str
) -> None:
    key = _seal_and_stop(server)
    assert server.tpm is not None
    server.tpm.start()
    with TpmProxy(server.tpm) as proxy:
        server.configure(server.config.read_text().replace(server.tpm.tcti, proxy.tcti))
        proxy.answer(command, code, times=times)
        server.start()
        server.assert_locked(reason)
        server.stop()
    server.configure()
    server.start()
    if server.status()["state"] == "locked":
        server.unlock()
    assert server.key() == key


def test_a_tpm_that_says_retry_once_is_asked_again(server: Server) -> None:
    key = _seal_and_stop(server)
    assert server.tpm is not None
    server.tpm.start()
    with TpmProxy(server.tpm) as proxy:
        server.configure(server.config.read_text().replace(server.tpm.tcti, proxy.tcti))
        proxy.answer(Command.UNSEAL, RC_RETRY, times=1)
        server.start()
        server.assert_unlocked()
        assert server.key() == key


def test_a_connection_that_drops_in_the_middle_of_the_unseal(server: Server) -> None:
    _seal_and_stop(server)
    assert server.tpm is not None
    server.tpm.start()
    with TpmProxy(server.tpm) as proxy:
        server.configure(server.config.read_text().replace(server.tpm.tcti, proxy.tcti))
        proxy.drop(Command.UNSEAL, times=None)
        server.start()
        server.assert_locked("tpm_missing")


@pytest.mark.promise(3)
def test_a_counter_that_cannot_be_incremented_after_the_unseal_keeps_the_keys_away(server: Server) -> None:
    """The sealed copy would still work in this boot, so what it opened is not served."""
    key = _seal_and_stop(server)
    assert server.tpm is not None
    server.tpm.start()
    with TpmProxy(server.tpm) as proxy:
        server.configure(server.config.read_text().replace(server.tpm.tcti, proxy.tcti))
        proxy.answer(Command.NV_INCREMENT, RC_FAILURE, times=None)
        server.start()
        server.assert_locked("tpm_failed")
        assert server.ctl("get", "demo", expect=None).returncode == 3
        proxy.clear()
        server.unlock()
        assert server.key() == key


@pytest.mark.promise(10)
@pytest.mark.parametrize("damage", ["", "{", "[]", "\x00\xff", '{"version": 99}', "deadline"])
def test_a_damaged_sealed_copy(server: Server, damage: str) -> None:
    key = _seal_and_stop(server)
    path = server.state / "sealed.json"
    if damage == "deadline":  # the lease is inside of what the TPM keeps; a change of the file is noticed
        copy = json.loads(path.read_text())
        copy["counter"] += 1
        path.write_text(json.dumps(copy, separators=(",", ":")))
    else:
        path.write_text(damage)
    server.start()
    server.assert_locked("sealed_copy_damaged")
    _recover(server, key)


@pytest.mark.promise(10)
@pytest.mark.parametrize("content", ["", "nonsense", '{"version":1}'])
def test_a_damaged_pin(server: Server, content: str) -> None:
    key = _seal_and_stop(server)
    (server.state / "tpm.json").write_text(content)
    server.start()
    server.assert_locked("tpm_changed")
    _recover(server, key, "--accept-rollback")


def test_a_backup_that_is_gone_is_not_taken_for_a_new_host(server: Server) -> None:
    server.stop()
    saved = (server.state / "keyring.age").read_bytes()
    for name in ("keyring.age", "keyring.age.previous"):
        (server.state / name).unlink(missing_ok=True)
    server.start()
    server.assert_locked("backup_damaged")
    assert server.ctl("init", expect=None).returncode == 8
    (server.state / "keyring.age").write_bytes(saved)
    server.unlock()
    server.assert_unlocked()


@pytest.mark.promise(9)
def test_an_older_backup_is_refused_unless_it_is_told(server: Server) -> None:
    old = (server.state / "keyring.age").read_bytes()
    key = server.key()
    server.ctl("key", "rotate", "demo")
    server.stop()
    (server.state / "keyring.age").write_bytes(old)
    server.start()
    assert server.unlock(expect=None).returncode == 15
    server.assert_locked("rollback")
    _recover(server, key, "--accept-rollback")


@pytest.mark.promise(9)
def test_the_whole_old_disk_is_refused(server: Server) -> None:
    image = server.base / "image"
    shutil.copytree(server.state, image)
    server.ctl("key", "revoke", "demo", "--version", "1")
    server.stop()
    shutil.rmtree(server.state)
    shutil.copytree(image, server.state)
    server.start()
    assert server.unlock(expect=None).returncode == 15
    server.assert_locked("rollback")


@pytest.mark.promise(9)
def test_the_generation_before_is_refused_too(server: Server) -> None:
    """What lies beside the backup as its spare is no way around the counter."""
    server.ctl("key", "rotate", "demo")
    server.stop()
    (server.state / "keyring.age.previous").replace(server.state / "keyring.age")
    server.start()
    assert server.unlock(expect=None).returncode == 15
    server.assert_locked("rollback")


@pytest.mark.promise(6)
def test_a_failing_counter_does_not_undo_a_change_and_is_caught_up_later(server: Server) -> None:
    assert server.tpm is not None
    with TpmProxy(server.tpm) as proxy:
        server.stop()
        server.configure(server.config.read_text().replace(server.tpm.tcti, proxy.tcti))
        server.start()
        server.unlock()
        proxy.answer(Command.NV_INCREMENT, RC_FAILURE, times=None)
        server.ctl("key", "rotate", "demo")
        assert server.status()["tpm"]["counter_behind"]
        # Nothing can be sealed while the counter is stuck: the copy before would not be dead.
        assert server.ctl("seal", expect=None).returncode == 16
        proxy.clear()
        server.ctl("key", "rotate", "demo")
        assert not server.status()["tpm"]["counter_behind"]
        server.ctl("seal")
        server.stop()
        server.reset_tpm()
        server.start()
        server.assert_unlocked()
        shown = server.json("key", "show", "demo")["versions"]
        assert [version["version"] for version in shown] == [1, 2, 3]


@pytest.mark.promise(6)
def test_killed_between_the_write_and_the_counter(server: Server) -> None:
    """The backup is one ahead of the counter then: the next opening completes the step."""
    assert server.tpm is not None
    with TpmProxy(server.tpm) as proxy:
        server.stop()
        server.configure(server.config.read_text().replace(server.tpm.tcti, proxy.tcti))
        server.start()
        server.unlock()
        proxy.replace(Command.NV_INCREMENT, lambda _: _kill(server), times=1)
        server.ctl("key", "rotate", "demo", expect=None)
        server.ended()
    server.configure()
    server.start()
    server.unlock()
    versions = server.json("key", "show", "demo")["versions"]
    assert [version["version"] for version in versions] == [1, 2]


def _kill(server: Server) -> bytes:
    server.kill()
    return error(RC_FAILURE)


@pytest.mark.promise(6)
@pytest.mark.parametrize("command", [Command.NV_INCREMENT, Command.UNSEAL, Command.POLICY_NV])
def test_killed_in_the_middle_of_using_the_sealed_copy(server: Server, command: Command) -> None:
    key = _seal_and_stop(server)
    assert server.tpm is not None
    server.tpm.start()
    with TpmProxy(server.tpm) as proxy:
        server.configure(server.config.read_text().replace(server.tpm.tcti, proxy.tcti))
        proxy.replace(command, lambda _: _kill(server), times=1)
        server.launch()
        server.ended()
    server.configure()
    server.start()
    if server.status()["state"] == "locked":
        server.unlock()
    assert server.key() == key
