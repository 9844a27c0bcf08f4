"""The main loop as an administrator sees it: initialise, reboot, power cut, unlock at the console."""

import hmac
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator

import pytest
from rigs.server import Server, wait_for


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def unlocked(server: Server) -> Server:
    server.start()
    server.ctl("init")
    return server


def test_a_new_server_is_uninitialised_and_init_makes_the_declared_keys(server: Server) -> None:
    server.start()
    status = server.status()
    assert list(status)[:9] == [
        *("state", "lock_reason", "since", "generation", "keys", "tpm", "seal", "sessions", "shares")
    ]
    assert (status["state"], status["lock_reason"]) == ("uninitialised", "first_boot")
    server.ctl("init")
    status = server.status()
    assert (status["state"], status["lock_reason"], status["generation"]) == ("unlocked", None, 1)
    assert status["keys"] == ["demo"]
    assert len(server.key()) == 32


def test_init_refuses_to_replace_a_keyring(unlocked: Server) -> None:
    before = unlocked.key()
    refused = unlocked.ctl("init", expect=None)
    assert refused.returncode == 8
    assert b"hint:" in refused.stderr
    assert unlocked.key() == before


def test_init_without_an_operator_is_refused_and_can_be_repeated(server: Server) -> None:
    server.operators = {}
    server.configure()
    server.start()
    assert server.ctl("init", expect=None).returncode == 17
    assert server.status()["state"] == "uninitialised"
    server.operators = {"alice": str(server.identity.recipient)}
    server.configure()
    server.send(signal.SIGHUP)
    wait_for(lambda: "reloaded" in server.log_text(), "the reload")
    server.ctl("init")
    server.assert_unlocked()


def test_the_mac_is_hmac_sha256_of_the_key(unlocked: Server) -> None:
    signed = unlocked.ctl("sign", "demo", stdin=b"message").stdout.decode().strip()
    assert signed == hmac.digest(unlocked.key(), b"message", "sha256").hex()
    assert unlocked.ctl("verify", "demo", "--mac", signed, stdin=b"message").returncode == 0
    assert unlocked.ctl("verify", "demo", "--mac", signed, stdin=b"massage", expect=None).returncode == 1


@pytest.mark.promise(3)
def test_a_planned_reboot_gives_the_same_key_once(unlocked: Server) -> None:
    key = unlocked.key()
    unlocked.reboot()
    unlocked.assert_unlocked()
    assert unlocked.key() == key
    assert not (unlocked.state / "sealed.json").exists()
    unsealed = next(record for record in unlocked.audit() if record["event"] == "unsealed")
    assert unsealed["destroyed"] == "sealed_copy_used"


def test_planned_reboots_in_a_row(unlocked: Server) -> None:
    key = unlocked.key()
    generations = [unlocked.reboot().status()["generation"] for _ in range(3)]
    assert generations == sorted(set(generations))
    assert unlocked.key() == key


@pytest.mark.promise(3)
def test_a_disk_copied_between_seal_and_boot_opens_nothing_later(unlocked: Server) -> None:
    unlocked.ctl("seal")
    unlocked.stop()
    image = unlocked.base / "image"
    shutil.copytree(unlocked.state, image)
    unlocked.reset_tpm()
    unlocked.start()
    unlocked.assert_unlocked()
    unlocked.stop()

    def put_back() -> None:
        shutil.rmtree(unlocked.state)
        shutil.copytree(image, unlocked.state)
        unlocked.start()

    put_back()  # on the same boot, after it was used
    unlocked.assert_locked("sealed_copy_used")
    unlocked.stop()
    unlocked.reset_tpm()
    put_back()  # on a later boot
    unlocked.assert_locked("sealed_copy_used")


@pytest.mark.promise(3)
def test_a_sealed_copy_is_refused_without_the_reboot_and_after_one_too_many(unlocked: Server) -> None:
    unlocked.ctl("seal")
    unlocked.stop()
    image = unlocked.base / "image"
    shutil.copytree(unlocked.state, image)
    unlocked.start()  # the daemon was restarted, the machine was not
    unlocked.assert_locked("not_the_next_boot")
    unlocked.stop()
    unlocked.reset_tpm()
    unlocked.reset_tpm()
    shutil.rmtree(unlocked.state)
    shutil.copytree(image, unlocked.state)
    unlocked.start()
    unlocked.assert_locked("not_the_next_boot")


def test_a_kexec_does_not_reset_the_tpm(unlocked: Server) -> None:
    key = unlocked.key()
    unlocked.ctl("seal", "--kind", "kexec")
    unlocked.stop()
    unlocked.start()
    unlocked.assert_unlocked()
    assert unlocked.key() == key


def test_a_kexec_copy_is_refused_after_a_reset(unlocked: Server) -> None:
    unlocked.ctl("seal", "--kind", "kexec")
    unlocked.stop()
    unlocked.reset_tpm()
    unlocked.start()
    unlocked.assert_locked("not_the_next_boot")


def test_a_change_after_the_seal_is_in_what_the_next_boot_opens(unlocked: Server) -> None:
    unlocked.ctl("seal")
    unlocked.ctl("key", "rotate", "demo")
    key = unlocked.key()
    unlocked.stop()
    unlocked.reset_tpm()
    unlocked.start()
    unlocked.assert_unlocked()
    assert unlocked.key() == key


@pytest.mark.promise(2)
def test_a_power_cut_leaves_it_locked_until_the_operator_unlocks(unlocked: Server) -> None:
    key = unlocked.key()
    unlocked.power_cut()
    unlocked.assert_locked("unexpected_reboot")
    unlocked.unlock()
    unlocked.assert_unlocked()
    assert unlocked.key() == key


@pytest.mark.promise(11)
def test_a_reader_waits_while_locked_and_gets_the_key_at_the_unlock(unlocked: Server) -> None:
    key = unlocked.key()
    unlocked.power_cut()
    with socket.socket(socket.AF_UNIX) as reader:
        reader.connect(str(unlocked.run_dir / "key" / "demo"))
        reader.setblocking(False)
        with pytest.raises(BlockingIOError):
            reader.recv(64)
        unlocked.unlock()
        reader.settimeout(60)
        received = b""
        while data := reader.recv(64):
            received += data
    assert received == key


@pytest.mark.promise(11)
def test_a_reader_that_waits_while_the_daemon_stops_sees_an_error_and_no_end(unlocked: Server) -> None:
    unlocked.ctl("lock")
    with socket.socket(socket.AF_UNIX) as reader:
        reader.connect(str(unlocked.run_dir / "key" / "demo"))
        unlocked.stop()
        reader.settimeout(60)
        with pytest.raises(ConnectionResetError):
            reader.recv(64)


def test_lock_wipes_and_says_so_even_after_a_restart_of_the_daemon(unlocked: Server) -> None:
    unlocked.ctl("lock")
    unlocked.assert_locked("locked_by_admin")
    assert unlocked.ctl("sign", "demo", stdin=b"x", expect=None).returncode == 3
    unlocked.stop()
    unlocked.start()
    unlocked.assert_locked("locked_by_admin")
    unlocked.power_cut()
    unlocked.assert_locked("unexpected_reboot")


@pytest.mark.promise(3)
def test_lock_destroys_a_sealed_copy(unlocked: Server) -> None:
    unlocked.ctl("seal")
    image = unlocked.base / "image"
    shutil.copytree(unlocked.state, image)
    unlocked.ctl("lock")
    assert not (unlocked.state / "sealed.json").exists()
    unlocked.stop()
    unlocked.reset_tpm()
    shutil.rmtree(unlocked.state)
    shutil.copytree(image, unlocked.state)
    unlocked.start()
    unlocked.assert_locked("sealed_copy_used")


def test_disarm_destroys_the_sealed_copy_and_a_second_one_has_nothing_to_do(unlocked: Server) -> None:
    unlocked.ctl("arm", "--for", "15m")
    seal = unlocked.status()["seal"]
    assert seal["sealed"]
    assert seal["deadline"] - seal["created"] == 900
    unlocked.ctl("disarm")
    assert not unlocked.status()["seal"]["sealed"]
    assert not (unlocked.state / "sealed.json").exists()
    assert unlocked.ctl("disarm", expect=None).returncode == 9


def test_a_lease_that_runs_out_while_the_daemon_runs_destroys_the_sealed_copy(unlocked: Server) -> None:
    unlocked.ctl("arm", "--for", "1s")
    wait_for(lambda: not (unlocked.state / "sealed.json").exists(), "the end of the lease")
    assert "lease_expired" in unlocked.events()
    unlocked.assert_unlocked()


def test_a_lease_that_runs_out_while_the_machine_is_off_is_refused(unlocked: Server) -> None:
    for seconds in (6, 60):
        deadline = unlocked.json("arm", "--for", f"{seconds}s")["deadline"]
        unlocked.stop(signal.SIGKILL)  # before the daemon itself ends the lease
        if (unlocked.state / "sealed.json").exists():
            break
        unlocked.start()
        unlocked.unlock()
    unlocked.reset_tpm()
    wait_for(lambda: _now() > deadline, "the end of the lease", 2 * 60)
    unlocked.start()
    unlocked.assert_locked("lease_expired")


def test_a_lease_holds_over_a_reset_that_nobody_announced(unlocked: Server) -> None:
    key = unlocked.key()
    unlocked.ctl("arm", "--for", "1h")
    unlocked.power_cut()
    unlocked.assert_unlocked()
    assert unlocked.key() == key


@pytest.mark.promise(2)
def test_the_distributions_age_opens_the_backup_with_the_operators_key(unlocked: Server) -> None:
    unlocked.ctl("backup", "export", str(unlocked.base / "vault.age"))
    opened = subprocess.run(
        ["age", "-d", "-i", unlocked.identity_file, unlocked.base / "vault.age"],
        capture_output=True,
        check=True,
    ).stdout
    assert opened.startswith(b"unsealerd-keyring-v2\n")
    assert opened.endswith(unlocked.key())


def test_a_backup_that_was_opened_and_encrypted_again_by_age_still_unlocks(unlocked: Server) -> None:
    """The last resort goes both ways: nothing in the file is ours alone."""
    key = unlocked.key()
    unlocked.stop()
    backup = unlocked.state / "keyring.age"
    opened = subprocess.run(
        ["age", "-d", "-i", unlocked.identity_file, backup], capture_output=True, check=True
    )
    recipient = unlocked.operators["alice"]
    again = subprocess.run(["age", "-r", recipient], input=opened.stdout, capture_output=True, check=True)
    backup.write_bytes(again.stdout)
    unlocked.start()
    unlocked.unlock()
    assert unlocked.key() == key


def test_two_daemons_do_not_run_on_one_state_directory(unlocked: Server) -> None:
    with Server(tpm=False) as second:
        second.state = unlocked.state
        second.configure()
        process = second.launch()
        assert process.wait(60) == 70
        assert "another unsealerd" in second.log_text()
    unlocked.assert_unlocked()


def test_without_a_tpm_every_reboot_needs_an_operator_and_status_says_so() -> None:
    with Server(tpm=False) as server:
        server.start()
        server.ctl("init")
        key = server.key()
        assert any("no TPM" in warning for warning in server.status()["warnings"])
        assert server.ctl("seal", expect=None).returncode == 16
        server.assert_unlocked()
        server.power_cut()
        server.assert_locked("unexpected_reboot")
        server.unlock()
        assert server.key() == key


def _now() -> float:
    import time

    return time.time()
