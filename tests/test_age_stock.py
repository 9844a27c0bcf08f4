"""Both directions against the distribution's own `age` and `age-keygen`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unsealerd.core.age import P256Identity, ScryptIdentity, X25519Identity, decrypt, encrypt, parse_recipient
from unsealerd.core.secret import SecretBuffer
from unsealerd.errors import AgeNoMatch

SIZES = [0, 1, 65535, 65536, 65537, 131072, 200_000]
PASSPHRASE = "correct horse battery staple"

# `age` asks for a passphrase on the terminal only: this gives it one, and answers every prompt.
TERMINAL = """
import os, pty, sys
pid, terminal = pty.fork()
if pid == 0:
    os.execvp("age", ["age", *sys.argv[2:]])
seen = b""
while True:
    try:
        got = os.read(terminal, 1024)
    except OSError:
        break
    if not got:
        break
    seen += got
    if seen.rstrip().endswith(b":"):
        os.write(terminal, sys.argv[1].encode() + b"\\n")
        seen = b""
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def run(*command: str | Path, stdin: bytes = b"") -> bytes:
    return subprocess.run(command, input=stdin, capture_output=True, check=True, timeout=60).stdout


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key file of `age-keygen`."""
    path = tmp_path_factory.mktemp("age") / "key.txt"
    run("age-keygen", "-o", path)
    return path


@pytest.fixture(scope="module")
def identity(key_file: Path) -> X25519Identity:
    return X25519Identity.parse(key_file.read_text().splitlines()[-1])


def test_age_keygen_names_the_same_recipient(key_file: Path, identity: X25519Identity) -> None:
    assert run("age-keygen", "-y", key_file).decode().strip() == str(identity.recipient)
    assert str(parse_recipient(str(identity.recipient))) == str(identity.recipient)


def test_age_keygen_reads_our_identities() -> None:
    ours = X25519Identity.generate()
    assert run("age-keygen", "-y", stdin=ours.encode().encode()).decode().strip() == str(ours.recipient)


@pytest.mark.promise(2)
@pytest.mark.parametrize("size", SIZES)
def test_age_opens_what_we_write(size: int, key_file: Path, identity: X25519Identity) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    plaintext = os.urandom(size)
    hardware = P256Identity(ec.generate_private_key(ec.SECP256R1()))
    with SecretBuffer.random(16) as file_key:
        data = encrypt(memoryview(plaintext), file_key, [hardware.recipient, identity.recipient])
    assert run("age", "-d", "-i", key_file, stdin=data) == plaintext
    if size:
        assert plaintext not in data or size < 8


@pytest.mark.parametrize("armor", [(), ("-a",)], ids=["binary", "armored"])
@pytest.mark.parametrize("size", SIZES)
def test_we_open_what_age_writes(size: int, armor: tuple[str, ...], identity: X25519Identity) -> None:
    plaintext = os.urandom(size)
    stranger = str(X25519Identity.generate().recipient)
    data = run("age", *armor, "-r", stranger, "-r", str(identity.recipient), stdin=plaintext)
    with decrypt(data, [identity]) as opened:
        assert bytes(opened.view) == plaintext


@pytest.mark.promise(2)
def test_nobody_else_opens_it(identity: X25519Identity, tmp_path: Path) -> None:
    stranger = X25519Identity.generate()
    (tmp_path / "stranger.txt").write_text(stranger.encode())
    with SecretBuffer.random(16) as file_key:
        data = encrypt(memoryview(b"secret"), file_key, [identity.recipient])
    with pytest.raises(AgeNoMatch):
        decrypt(data, [stranger])
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run("age", "-d", "-i", tmp_path / "stranger.txt", stdin=data)
    assert b"no identity matched" in caught.value.stderr


@pytest.mark.parametrize("armor", [(), ("-a",)], ids=["binary", "armored"])
def test_we_open_what_age_encrypts_with_a_passphrase(armor: tuple[str, ...], tmp_path: Path) -> None:
    """The way in which `age` protects a key file."""
    (tmp_path / "plain").write_bytes(b"AGE-SECRET-KEY-...\n")
    out = tmp_path / "out.age"
    run(sys.executable, "-c", TERMINAL, PASSPHRASE, "-p", *armor, "-o", str(out), str(tmp_path / "plain"))
    with decrypt(out.read_bytes(), [ScryptIdentity(PASSPHRASE.encode())]) as opened:
        assert bytes(opened.view) == b"AGE-SECRET-KEY-...\n"
