"""`scripts/recover` opens what the package writes, without the package. The plain backup with `age` itself: test_age_stock.py."""

import itertools
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from rigs.openpgpcard import PIN as OPENPGP_PIN
from rigs.openpgpcard import OpenPgpCard
from rigs.pcscd import READER, Pcscd
from rigs.pivcard import PIN as CARD_PIN
from rigs.pivcard import PivCard
from rigs.softhsm import MODULE, SoftHsm
from rigs.softhsm import PIN as TOKEN_PIN

from unsealerd.core.age import P256Identity, X25519Identity, encrypt_under
from unsealerd.core.draft import Draft
from unsealerd.core.keyring import parse
from unsealerd.core.passphrase import Parameters, derive
from unsealerd.core.rules import KnownOperator, Rules
from unsealerd.core.secret import SecretBuffer
from unsealerd.core.sharing import wrap

RECOVER = Path(__file__).resolve().parent.parent / "scripts" / "recover"
OPENSC = "opensc-pkcs11.so"
PASSPHRASE = "correct horse battery staple"
CHEAP = "argon2id$v=19$m=65536,t=2,p=1$AAECAwQFBgcICQoLDA0ODw"

Private = X25519Identity | ec.EllipticCurvePrivateKey


def recover(
    *arguments: str | Path, expect: int = 0, cwd: Path | None = None
) -> "subprocess.CompletedProcess[bytes]":
    """In an interpreter that cannot see the package: isolated, and not in the checkout."""
    done = subprocess.run(
        [sys.executable, "-I", RECOVER, *arguments],
        capture_output=True,
        check=False,
        timeout=60,
        stdin=subprocess.DEVNULL,
        cwd=cwd or "/",
    )
    assert done.returncode == expect, done
    return done


def refused(*arguments: str | Path) -> str:
    """One line on stderr, and nothing on stdout."""
    done = recover(*arguments, expect=1)
    assert done.stdout == b""
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("recover: ")
    return line


def p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def identity_of(private: Private) -> X25519Identity | P256Identity:
    return private if isinstance(private, X25519Identity) else P256Identity(private)


def key_file(path: Path, private: Private) -> Path:
    if isinstance(private, X25519Identity):
        path.write_text(f"# a test\n{private.encode()}\n")
    else:
        path.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


@dataclass(frozen=True, slots=True)
class Made:
    """A backup with its keys in files NAME.key, and what must come out of it."""

    folder: Path
    plaintext: bytes
    key: bytes

    @property
    def backup(self) -> Path:
        return self.folder / "backup.age"

    def share(self, name: str, *how: str | Path) -> Path:
        path = self.folder / f"{name}.share"
        path.unlink(missing_ok=True)
        recover("share", self.backup, name, *(how or ("--key", self.folder / f"{name}.key")), "-o", path)
        return path

    def opens(self, shares: Sequence[Path]) -> None:
        keyring = self.folder / "keyring"
        keyring.unlink(missing_ok=True)
        recover("open", self.backup, *shares, "-o", keyring)
        assert keyring.read_bytes() == self.plaintext
        assert recover("keys", keyring, "--key", "web").stdout == self.key


def write_backup(folder: Path, rules: Rules) -> Made:
    draft = Draft(None)
    for name, size in (("api", 16), ("web", 32)):
        draft.create(name, owner="o", purpose="p", size=size, now=1)
    draft.rotate("web", size=32, overlap=100, now=2)
    draft.create("old", owner="o", purpose="p", size=64, now=2)
    keyring = draft.build(generation=7, counter=None, now=3)
    with SecretBuffer.random(16) as file_key:
        data = encrypt_under(wrap(rules, file_key), keyring.buffer.view, file_key)
    (folder / "backup.age").write_bytes(data)
    (primary, *_) = keyring.usable("web")
    made = Made(folder, bytes(keyring.buffer.view), bytes(primary.view))
    keyring.close()
    return made


def make(
    folder: Path,
    privates: dict[str, Private],
    *,
    threshold: int = 1,
    require: tuple[str, ...] = (),
    groups: dict[str, tuple[str, ...]] | None = None,
) -> Made:
    operators = []
    for name, private in privates.items():
        key_file(folder / f"{name}.key", private)
        operators.append(KnownOperator(name, identity_of(private).recipient, (groups or {}).get(name, ())))
    return write_backup(folder, Rules(tuple(operators), threshold, require))


# --- one operator is enough


def test_a_plain_backup_with_a_key_file(tmp_path: Path) -> None:
    made = make(
        tmp_path, {"alice": X25519Identity.generate(), "bob": p256(), "carol": X25519Identity.generate()}
    )
    shown = recover("show", made.backup).stdout.decode()
    assert "any one" in shown
    assert "#2  p256tag" in shown
    for number, name in (("1", "alice"), ("2", "bob"), ("3", "carol")):
        share = tmp_path / f"{name}.share"
        recover("share", made.backup, number, "--key", tmp_path / f"{name}.key", "-o", share)
        made.opens([share])
    assert "does not open" in refused("share", made.backup, "1", "--key", tmp_path / "carol.key")
    assert "does not open" in refused("share", made.backup, "2", "--key", tmp_path / "alice.key")


def test_a_plain_backup_by_recipient(tmp_path: Path) -> None:
    """With --x the recipient is needed, and names the stanza."""
    private = p256()
    made = make(tmp_path, {"alice": X25519Identity.generate(), "bob": private})
    recipient = str(identity_of(private).recipient)
    point = recover("point", made.backup, recipient).stdout
    x = tmp_path / "x.bin"
    x.write_bytes(derived_by_openssl(tmp_path, "bob", point))
    recover("share", made.backup, recipient, "--x", x, "-o", tmp_path / "bob.share")
    made.opens([tmp_path / "bob.share"])
    assert "recipient" in refused("share", made.backup, "2", "--x", x)
    assert "no operator" in refused("point", made.backup, str(identity_of(p256()).recipient))


def derived_by_openssl(folder: Path, name: str, point: bytes) -> bytes:
    """The Diffie-Hellman by a tool that is not ours either."""
    peer = folder / "peer.der"
    peer.write_bytes(point)
    return subprocess.run(
        [
            "openssl",
            "pkeyutl",
            "-derive",
            "-inkey",
            folder / f"{name}.key",
            "-peerkey",
            peer,
            "-peerform",
            "DER",
        ],
        check=True,
        capture_output=True,
    ).stdout


def test_an_encrypted_pem_file(tmp_path: Path) -> None:
    private = p256()
    made = make(tmp_path, {"bob": private})
    path = tmp_path / "bob.key"
    path.write_bytes(
        private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(PASSPHRASE.encode()))
    )
    done = answered(
        ["share", str(made.backup), "1", "--key", str(path), "-o", str(tmp_path / "s")], PASSPHRASE
    )
    assert done == 0
    made.opens([tmp_path / "s"])


def test_an_encrypted_age_key_file_is_named(tmp_path: Path) -> None:
    made = make(tmp_path, {"alice": X25519Identity.generate()})
    assert "age -d" in refused("share", made.backup, "1", "--key", made.backup)


# --- a passphrase

_TERMINAL = """
import os, pty, sys
pid, terminal = pty.fork()
if pid == 0:
    os.execv(sys.executable, [sys.executable, "-I", *sys.argv[2:]])
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


def answered(arguments: Sequence[str], passphrase: str) -> int:
    """Run with a terminal on which somebody types the passphrase whenever they are asked; the exit code."""
    command = [sys.executable, "-c", _TERMINAL, passphrase, str(RECOVER), *arguments]
    return subprocess.run(command, check=False, timeout=60, capture_output=True).returncode


@pytest.mark.parametrize("threshold", [1, 2])
def test_a_passphrase(tmp_path: Path, threshold: int) -> None:
    alice = derive(memoryview(PASSPHRASE.encode()), Parameters.parse(CHEAP))
    bob = p256()
    key_file(tmp_path / "bob.key", bob)
    rules = Rules(
        (
            KnownOperator("alice", alice.recipient, kdf=CHEAP),
            KnownOperator("bob", identity_of(bob).recipient),
        ),
        threshold,
    )
    made = write_backup(tmp_path, rules)
    assert CHEAP in recover("show", made.backup).stdout.decode()
    ours = tmp_path / "alice.share"
    command = ["share", str(made.backup), "alice", "--passphrase", "-o", str(ours)]
    assert answered(command, PASSPHRASE + "r") == 1
    assert not ours.exists()
    assert answered(command, PASSPHRASE) == 0
    made.opens([ours] if threshold == 1 else [made.share("bob"), ours])
    assert "no passphrase" in refused("share", made.backup, "bob", "--passphrase")


# --- k of n


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two of three, on both curves, and one of them from `security`, which two are in."""
    folder = tmp_path_factory.mktemp("three")
    made = make(
        folder,
        {"alice": X25519Identity.generate(), "bob": p256(), "carol": X25519Identity.generate()},
        threshold=2,
        require=("security", "bob"),
        groups={"alice": ("security", "berlin"), "bob": ("security",)},
    )
    for name in ("alice", "bob", "carol"):
        made.share(name)
    return made


def shares_of(made: Made, *names: str) -> list[Path]:
    return [made.folder / f"{name}.share" for name in names]


def test_enough_shares_open(three: Made) -> None:
    for names in (("alice", "bob"), ("bob", "alice"), ("carol", "bob"), ("carol", "alice", "bob")):
        three.opens(shares_of(three, *names))


def test_too_few_shares_do_not(three: Made) -> None:
    assert "1 of 2 shares" in refused("open", three.backup, *shares_of(three, "bob"))
    assert "1 of 2 shares" in refused("open", three.backup, *shares_of(three, "bob", "bob"))
    assert "'bob' must be" in refused("open", three.backup, *shares_of(three, "alice", "carol"))


def test_who_is_needed_is_shown(three: Made) -> None:
    lines = recover("show", three.backup).stdout.decode().splitlines()
    assert lines[:3] == [
        "2 of 3 operators are needed",
        "among them must be: security (alice, bob)",
        "among them must be: bob",
    ]
    assert [line.split()[1] for line in lines[3:]] == ["alice", "bob", "carol"]
    assert "group berlin" in lines[3]


def test_every_set_that_is_large_enough(tmp_path: Path) -> None:
    """Three of four: all four sets of three open, and no set of two does."""
    names = ("a", "b", "c", "d")
    made = make(tmp_path, {name: X25519Identity.generate() for name in names}, threshold=3)
    shares = {name: made.share(name) for name in names}
    for enough in itertools.combinations(names, 3):
        made.opens([shares[name] for name in enough])
    for two in itertools.combinations(names, 2):
        refused("open", made.backup, *(shares[name] for name in two))


def test_a_wrong_share(three: Made, tmp_path: Path) -> None:
    alice, bob = shares_of(three, "alice", "bob")
    facts = json.loads(alice.read_text())
    forged = tmp_path / "forged"
    forged.write_text(json.dumps(facts | {"share": bytes(16).hex()}))
    assert "one is wrong" in refused("open", three.backup, forged, bob)
    forged.write_text(json.dumps(facts | {"share": "00"}))
    assert "16 bytes" in refused("open", three.backup, forged, bob)
    forged.write_text(json.dumps(facts | {"backup": "00" * 32}))
    assert "another backup" in refused("open", three.backup, forged, bob)
    for text in ("", "{}", "[]", "null", '{"format": "unsealerd-share-v1"}', "\xff"):
        forged.write_text(text)
        refused("open", three.backup, forged, bob)


def test_a_share_says_nothing_of_the_others(three: Made) -> None:
    facts = json.loads(shares_of(three, "carol")[0].read_text())
    assert facts["require"] == {}
    assert set(facts) == {"format", "backup", "operator", "x", "share", "require"}


# --- stock tools and hardware


def test_softhsm(tmp_path: Path) -> None:
    private = p256()
    made = make(tmp_path, {"alice": X25519Identity.generate(), "bob": private}, threshold=2)
    hsm = SoftHsm.make(tmp_path / "hsm")
    hsm.add_token("ops")
    hsm.add_key("ops", "unlock", b"\x03", private)
    point, x = tmp_path / "point.der", tmp_path / "x.bin"
    recover("point", made.backup, "bob", "-o", point)
    subprocess.run(
        [
            *(
                "pkcs11-tool",
                "--module",
                MODULE,
                "--token-label",
                "ops",
                "--login",
                "--pin",
                TOKEN_PIN.decode(),
            ),
            *("--derive", "--mechanism", "ECDH1-DERIVE", "--id", "03"),
            *("--input-file", point, "--output-file", x),
        ],
        env=hsm.environment,
        check=True,
        capture_output=True,
        timeout=60,
    )
    made.opens([made.share("bob", "--x", x), made.share("alice")])


@pytest.fixture
def card() -> Iterator[tuple[Pcscd, PivCard]]:
    with Pcscd() as service:
        emulated = PivCard()
        service.insert(emulated)
        yield service, emulated


@pytest.mark.xdist_group("pcscd-recover")
def test_a_piv_card(tmp_path: Path, card: tuple[Pcscd, PivCard]) -> None:
    """With OpenSC alone: no program of ours touches the card."""
    service, emulated = card
    made = make(tmp_path, {"alice": emulated.key, "bob": p256()}, threshold=2)
    point, x = tmp_path / "point.der", tmp_path / "x.bin"
    recover("point", made.backup, "alice", "-o", point)
    service.run(
        *("pkcs11-tool", "--module", OPENSC, "--login", "--pin", CARD_PIN.decode()),
        *("--derive", "--mechanism", "ECDH1-DERIVE", "--id", "03"),
        *("--input-file", point, "--output-file", x),
    )
    assert READER in service.run("opensc-tool", "--list-readers").stdout
    made.opens([made.share("alice", "--x", x), made.share("bob")])


@pytest.mark.xdist_group("pcscd-recover")
def test_an_openpgp_card(tmp_path: Path) -> None:
    emulated = OpenPgpCard()
    try:
        with Pcscd() as service:
            service.insert(emulated)
            made = make(tmp_path, {"alice": emulated.key, "bob": p256()}, threshold=2)
            point, x = tmp_path / "point.der", tmp_path / "x.bin"
            recover("point", made.backup, "alice", "-o", point)
            service.run(
                *("pkcs11-tool", "--module", OPENSC, "--login", "--pin", OPENPGP_PIN.decode()),
                *("--derive", "--mechanism", "ECDH1-DERIVE", "--id", "02"),
                *("--input-file", point, "--output-file", x),
            )
            made.opens([made.share("alice", "--x", x), made.share("bob")])
    finally:
        emulated.close()


def test_what_tokens_may_answer(tmp_path: Path) -> None:
    """A whole point, and x without its leading zeros."""
    private = p256()
    made = make(tmp_path, {"bob": private}, threshold=1)
    recipient = str(identity_of(private).recipient)
    x = tmp_path / "x.bin"
    right = derived_by_openssl(tmp_path, "bob", recover("point", made.backup, recipient).stdout)
    x.write_bytes(b"\x04" + right + os.urandom(32))
    recover("share", made.backup, recipient, "--x", x, "-o", tmp_path / "1.share")
    made.opens([tmp_path / "1.share"])
    for wrong in (b"", right[:-1], right + b"\0", bytes(32), os.urandom(65)):
        x.write_bytes(wrong)
        assert "does not open" in refused("share", made.backup, recipient, "--x", x)


def test_a_leading_zero_that_a_token_leaves_out(tmp_path: Path) -> None:
    private = p256()
    recipient = str(identity_of(private).recipient)
    for _ in range(5000):
        made = make(tmp_path, {"bob": private})
        stanza = made.backup.read_bytes().split(b"\n")[1].split()
        if zero_x(private, stanza[3]):
            break
    x = tmp_path / "x.bin"
    right = derived_by_openssl(tmp_path, "bob", recover("point", made.backup, recipient).stdout)
    assert right[0] == 0
    x.write_bytes(right.lstrip(b"\0"))
    recover("share", made.backup, recipient, "--x", x, "-o", tmp_path / "1.share")
    made.opens([tmp_path / "1.share"])


def zero_x(private: ec.EllipticCurvePrivateKey, enc: bytes) -> bool:
    import base64

    point = base64.b64decode(enc + b"=" * (-len(enc) % 4))
    return (
        private.exchange(ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point))[0]
        == 0
    )


# --- the keyring


def test_the_keys_are_listed_and_written(three: Made, tmp_path: Path) -> None:
    keyring = tmp_path / "keyring"
    recover("open", three.backup, *shares_of(three, "bob", "carol"), "-o", keyring)
    with SecretBuffer.copy_of(keyring.read_bytes()) as plaintext:
        whose = parse(plaintext).id
    assert recover("keys", keyring).stdout.decode().splitlines() == [
        f"keyring {whose}, generation 7",
        "api:1  primary  16 bytes",
        "old:1  primary  64 bytes",
        "web:1  active  32 bytes",
        "web:2  primary  32 bytes",
    ]
    one, two = (recover("keys", keyring, "--key", f"web:{number}").stdout for number in (1, 2))
    assert one != two == three.key
    assert len(one) == 32
    for missing in ("web:3", "nothing", ":1", ""):
        assert "no bytes" in refused("keys", keyring, "--key", missing)
    for damaged in (
        b"",
        three.plaintext[:-1],
        three.plaintext + b"x",
        three.plaintext.replace(b"v2", b"v1", 1),
    ):
        bad = tmp_path / "bad"
        bad.write_bytes(damaged)
        refused("keys", bad)
    first, length, rest = three.plaintext.split(b"\n", 2)
    end = int(length)
    older = tmp_path / "older"  # as it was written before there were lineages
    older.write_bytes(b"%b\n%b\n%b" % (first.replace(b"v2", b"v1"), length, rest[:end] + rest[end + 32 :]))
    assert recover("keys", older).stdout.decode().startswith("keyring of version 1, generation 7\n")
    assert recover("keys", older, "--key", "web:2").stdout == three.key


# --- files


def test_what_is_written_is_private_and_new(three: Made, tmp_path: Path) -> None:
    keyring = tmp_path / "keyring"
    command: tuple[str | Path, ...] = (
        "open",
        three.backup,
        *shares_of(three, "bob", "carol"),
        "-o",
        keyring,
    )
    recover(*command)
    assert stat.S_IMODE(keyring.stat().st_mode) == 0o600
    assert "File exists" in refused(*command)
    assert keyring.read_bytes() == three.plaintext
    target = tmp_path / "elsewhere"
    link = tmp_path / "link"
    link.symlink_to(target)
    refused(*command[:-1], link)
    assert not target.exists()


def test_a_redirected_secret_is_private_too(three: Made, tmp_path: Path) -> None:
    path = tmp_path / "out"
    command: list[str | Path] = [sys.executable, "-I", RECOVER, "share", three.backup, "bob"]
    command += ["--key", three.folder / "bob.key"]
    with path.open("wb") as out:
        subprocess.run(command, stdout=out, check=True, timeout=60)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    three.opens([path, *shares_of(three, "carol")])


def test_nothing_secret_is_shown_on_a_terminal(three: Made) -> None:
    assert answered(["open", str(three.backup), *map(str, shares_of(three, "bob", "carol"))], "") == 1


@pytest.mark.parametrize("at", [0, 22, 30, 200, -1])
def test_a_damaged_backup(three: Made, tmp_path: Path, at: int) -> None:
    data = bytearray(three.backup.read_bytes())
    data[at] ^= 1
    damaged = tmp_path / "damaged.age"
    damaged.write_bytes(data)
    shares = []
    for name in ("bob", "carol"):
        path = tmp_path / f"{name}.share"
        command = ("share", damaged, name, "--key", three.folder / f"{name}.key", "-o", path)
        done = subprocess.run(
            [sys.executable, "-I", RECOVER, *command], capture_output=True, check=False, timeout=60
        )
        assert b"Traceback" not in done.stderr
        if done.returncode == 0:
            shares.append(path)
    if len(shares) == 2:
        refused("open", damaged, *shares)


@pytest.mark.parametrize("size", [0, 10, 22, 100, 700, -17, -1])
def test_a_backup_that_is_cut_off(three: Made, tmp_path: Path, size: int) -> None:
    cut = tmp_path / "cut.age"
    cut.write_bytes(three.backup.read_bytes()[:size])
    if size >= 0:
        refused("show", cut)
    for name in ("bob", "carol"):
        subprocess.run(
            [
                *(sys.executable, "-I", RECOVER, "share", cut, name, "--key", three.folder / f"{name}.key"),
                *("-o", tmp_path / f"{name}.share"),
            ],
            check=False,
            capture_output=True,
            timeout=60,
        )
    if size < 0:
        refused("open", cut, tmp_path / "bob.share", tmp_path / "carol.share")


def test_it_needs_nothing_of_the_package() -> None:
    text = RECOVER.read_text()
    assert "import unsealerd" not in text
    assert "from unsealerd" not in text
    assert os.access(RECOVER, os.X_OK)
    assert "Opens a backup" in recover("--help").stdout.decode()
    assert "No such file" in refused("show", "/nonexistent/backup")
