"""Private keys in files, as other programs write them: age, age-keygen, openssl, ssh-keygen."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unsealerd.core.age import P256TagRecipient, X25519Identity
from unsealerd.errors import AccessDenied, IdentityInvalid, NotInstalled
from unsealerd.operator.events import Event, KeyFileExposed
from unsealerd.operator.identities import MAX_FILE_BYTES, load_identity

POINT = X25519Identity.generate().recipient.public
PASSPHRASE = b"correct horse"


def never(path: Path) -> bytes:
    raise AssertionError(f"asked for the passphrase of {path}")


def run(*command: str | Path) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout


def write(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


# --- age


def test_a_file_of_age_keygen_is_read(tmp_path: Path) -> None:
    path = tmp_path / "key.txt"
    said = subprocess.run(["age-keygen", "-o", path], check=True, capture_output=True, text=True).stderr
    (identity,) = load_identity(path, never)
    assert str(identity.recipient) == said.removeprefix("Public key:").strip()


def test_a_file_may_hold_several_identities(tmp_path: Path) -> None:
    keys = [X25519Identity.generate() for _ in range(3)]
    text = "# Schlüssel\n\n" + "\r\n".join(key.encode() for key in keys)
    identities = load_identity(write(tmp_path / "keys", text.encode()), never)
    assert [each.recipient for each in identities] == [key.recipient for key in keys]
    for identity, key in zip(identities, keys, strict=True):
        assert identity.exchange(POINT) == key.exchange(POINT)


def encrypted_by_age(path: Path, plain: bytes, *options: str) -> Path:
    """As `age -p` does it, which asks on a terminal: a pseudo-terminal answers."""
    import pty

    source = write(path.with_suffix(".plain"), plain)
    child, terminal = pty.fork()
    if child == 0:
        os.execvp("age", ["age", "-p", *options, "-o", os.fspath(path), os.fspath(source)])
    heard = b""
    try:
        for prompt in (b"autogenerate a secure one):", b"Confirm passphrase:"):
            while prompt not in heard:
                heard += os.read(terminal, 1024)
            os.write(terminal, PASSPHRASE + b"\n")
        while True:
            os.read(terminal, 1024)
    except OSError:
        pass  # EIO: the other end is closed
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return path


@pytest.fixture(scope="module")
def key() -> X25519Identity:
    return X25519Identity.generate()


@pytest.fixture(scope="module", params=[(), ("-a",)], ids=["binary", "armored"])
def encrypted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, key: X25519Identity
) -> bytes:
    path = tmp_path_factory.mktemp("age") / "key.age"
    return encrypted_by_age(path, f"# mine\n{key.encode()}\n".encode(), *request.param).read_bytes()


def test_a_key_file_that_age_encrypted_is_opened(
    tmp_path: Path, encrypted: bytes, key: X25519Identity
) -> None:
    path = write(tmp_path / "key.age", encrypted)
    asked: list[Path] = []

    def ask(path: Path) -> bytes:
        asked.append(path)
        return PASSPHRASE

    (identity,) = load_identity(path, ask)
    assert asked == [path]
    assert identity.recipient == key.recipient
    assert identity.exchange(POINT) == key.exchange(POINT)


def test_a_wrong_passphrase_is_named(tmp_path: Path, encrypted: bytes) -> None:
    with pytest.raises(IdentityInvalid, match="wrong passphrase"):
        load_identity(write(tmp_path / "key.age", encrypted), lambda _: b"wrong")


def test_a_damaged_encrypted_file_is_named(tmp_path: Path, encrypted: bytes) -> None:
    with pytest.raises(IdentityInvalid, match="damaged"):
        load_identity(write(tmp_path / "key.age", encrypted[:-20]), lambda _: PASSPHRASE)


def test_a_file_that_is_encrypted_to_somebody_is_no_key_file(tmp_path: Path, key: X25519Identity) -> None:
    source = write(tmp_path / "plain", key.encode().encode())
    run("age", "-r", str(key.recipient), "-o", tmp_path / "key.age", source)
    with pytest.raises(IdentityInvalid):
        load_identity(tmp_path / "key.age", lambda _: PASSPHRASE)


# --- PEM and OpenSSH


def openssl(path: Path, *options: str) -> Path:
    run(
        "openssl",
        "genpkey",
        "-algorithm",
        "EC",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-out",
        path,
        *options,
    )
    return path


def pkcs8(path: Path) -> Path:
    return openssl(path)


def pkcs8_encrypted(path: Path) -> Path:
    return openssl(path, "-aes-256-cbc", "-pass", f"pass:{PASSPHRASE.decode()}")


def sec1(path: Path) -> Path:
    """With the EC PARAMETERS block before the key."""
    run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-out", path)
    return path


def sec1_encrypted(path: Path) -> Path:
    plain = sec1(path.with_suffix(".plain"))
    run("openssl", "ec", "-in", plain, "-aes256", "-passout", f"pass:{PASSPHRASE.decode()}", "-out", path)
    return path


def openssh(path: Path) -> Path:
    run("ssh-keygen", "-q", "-t", "ecdsa", "-b", "256", "-N", "", "-C", "x", "-f", path)
    return path


def openssh_encrypted(path: Path) -> Path:
    run("ssh-keygen", "-q", "-t", "ecdsa", "-b", "256", "-N", PASSPHRASE.decode(), "-C", "x", "-f", path)
    return path


PLAIN = [pkcs8, sec1, openssh]
ENCRYPTED = [pkcs8_encrypted, sec1_encrypted, openssh_encrypted]


def public_point(path: Path) -> bytes:
    """The public key as the program that made the file sees it: uncompressed SEC 1."""
    if b"OPENSSH" in path.read_bytes():
        pem = run("ssh-keygen", "-e", "-m", "PKCS8", "-f", path.with_suffix(".pub"))
    else:
        pem = run("openssl", "pkey", "-in", path, "-passin", f"pass:{PASSPHRASE.decode()}", "-pubout")
    public = load_pem_public_key(pem)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    return public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


@pytest.mark.parametrize("make", PLAIN)
def test_a_p256_key_file_is_read(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "key")
    (identity,) = load_identity(path, never)
    assert isinstance(identity.recipient, P256TagRecipient)
    assert identity.recipient.uncompressed == public_point(path)


@pytest.mark.parametrize("make", ENCRYPTED)
def test_an_encrypted_p256_key_file_is_opened(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "key")
    (identity,) = load_identity(path, lambda _: PASSPHRASE)
    assert isinstance(identity.recipient, P256TagRecipient)
    assert identity.recipient.uncompressed == public_point(path)


@pytest.mark.parametrize("make", ENCRYPTED)
@pytest.mark.parametrize("passphrase", [b"", b"wrong"])
def test_a_wrong_passphrase_of_a_p256_key_is_named(
    tmp_path: Path, make: Callable[[Path], Path], passphrase: bytes
) -> None:
    with pytest.raises(IdentityInvalid, match="passphrase"):
        load_identity(make(tmp_path / "key"), lambda _: passphrase)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"], "secp384r1; P-256 is needed"),
        (["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:secp256k1"], "secp256k1; P-256 is needed"),
        (["-algorithm", "RSA"], "P-256 is needed"),
        (["-algorithm", "ED25519"], "P-256 is needed"),
        (["-algorithm", "X25519"], "P-256 is needed"),
    ],
)
def test_a_key_of_another_kind_is_named(tmp_path: Path, options: list[str], said: str) -> None:
    path = tmp_path / "key"
    run("openssl", "genpkey", *options, "-out", path)
    path.chmod(0o600)
    with pytest.raises(IdentityInvalid, match=said):
        load_identity(path, never)


def test_a_public_key_is_no_identity(tmp_path: Path) -> None:
    pem = run("openssl", "pkey", "-in", pkcs8(tmp_path / "key"), "-pubout")
    with pytest.raises(IdentityInvalid):
        load_identity(write(tmp_path / "public", pem), never)


def test_what_opens_an_openssh_key_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptography.hazmat.primitives.serialization import ssh

    def without_bcrypt(*_arguments: object) -> bytes:
        raise UnsupportedAlgorithm("Need bcrypt module")  # as the library says it

    path = openssh_encrypted(tmp_path / "key")
    monkeypatch.setattr(ssh, "_bcrypt_kdf", without_bcrypt)
    with pytest.raises(NotInstalled):
        load_identity(path, lambda _: PASSPHRASE)


# --- files


def test_a_key_that_others_may_read_is_reported_and_used(tmp_path: Path, key: X25519Identity) -> None:
    events: list[Event] = []
    path = write(tmp_path / "key", key.encode().encode(), 0o644)
    assert load_identity(path, never, events.append)
    assert events == [KeyFileExposed(path, 0o644)]
    path.chmod(0o600)
    events.clear()
    assert load_identity(path, never, events.append)
    assert events == []


def test_a_key_can_come_from_a_pipe(key: X25519Identity) -> None:
    """Process substitution of a shell: the key is in no file at all."""
    reading, writing = os.pipe()
    os.write(writing, key.encode().encode())
    os.close(writing)
    try:
        (identity,) = load_identity(Path(f"/dev/fd/{reading}"), never)
    finally:
        os.close(reading)
    assert identity.recipient == key.recipient


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_arguments: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(AccessDenied):
        load_identity(tmp_path / "key", never)


@pytest.mark.parametrize("what", ["missing", "directory", "large"])
def test_what_is_no_key_file_is_named(tmp_path: Path, what: str) -> None:
    path = tmp_path / "key"
    match what:
        case "directory":
            path.mkdir()
        case "large":
            write(path, b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(IdentityInvalid, match=str(path)):
        load_identity(path, never)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# only a comment",
        "AGE-PLUGIN-YUBIKEY-1QQPQQQQ",
        "AGE-SECRET-KEY-1",
        "age1qqqq",
        "-----BEGIN EC PRIVATE KEY-----\nMAA=\n-----END EC PRIVATE KEY-----",
        "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----",
        "-----BEGIN AGE ENCRYPTED FILE-----",
        "age-encryption.org/v1\n",
    ],
)
def test_what_holds_no_key_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(IdentityInvalid):
        load_identity(write(tmp_path / "key", text.encode()), lambda _: PASSPHRASE)


def test_no_part_of_a_key_is_in_the_error(tmp_path: Path, key: X25519Identity) -> None:
    text = key.encode()
    for damaged in (text[:-1], text + "Q", text[:-1] + ("Q" if text[-1] != "Q" else "P")):
        with pytest.raises(IdentityInvalid) as caught:
            load_identity(write(tmp_path / "key", damaged.encode()), never)
        assert text[20:28] not in str(caught.value)


_STARTS = [
    b"",
    b"-----BEGIN EC PRIVATE KEY-----\n",
    b"-----BEGIN OPENSSH PRIVATE KEY-----\n",
    b"age-encryption.org/v1\n",
]


@pytest.mark.promise(10)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(_STARTS), st.binary(max_size=200))
def test_any_bytes_are_a_key_or_named(tmp_path: Path, start: bytes, data: bytes) -> None:
    with pytest.raises(IdentityInvalid):
        load_identity(write(tmp_path / "key", start + data), lambda _: PASSPHRASE)
