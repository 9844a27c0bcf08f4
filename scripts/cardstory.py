"""The story that `scripts/demo --card` plays: an unexpected reboot, a smart card with its PIN, and two of three operators."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from story import MESSAGE, PATIENCE, PROGRAMS, ROOT, Story, free_port, gateway, perform

sys.path.append(str(ROOT / "tests"))  # the emulated card is a part of the tests

from rigs.pcscd import Pcscd
from rigs.pivcard import PivCard, Vendor
from rigs.terminal import Typed, at_terminal

RECOVER = str(ROOT / "scripts" / "recover")
CARD_PIN = "739104"
WRONG_PIN = "000000"
PASSPHRASE = "one of the passphrases that nobody should use"  # noqa: S105 - it is
PIN_QUESTION = "tries left): "


class CardStory:
    """The story with a person at a terminal, who types PINs and passphrases."""

    def __init__(self, story: Story, service: Pcscd, card: PivCard) -> None:
        self.story = story
        self.service = service
        self.card = card
        story.environment |= service.environment

    def typed(self, *arguments: str, answers: tuple[tuple[str, str], ...], expect: int = 0) -> Typed:
        """A command, and what somebody answers on the terminal; what is typed is shown by nobody."""
        story = self.story
        print(f"   $ {' '.join(arguments)}".replace(str(story.base) + "/", ""))
        done = at_terminal((PROGRAMS / arguments[0], *arguments[1:]), *answers, environment=story.environment)
        lines = [line for line in done.screen.splitlines() if line.strip()] + done.err.splitlines()
        print(textwrap.indent("\n".join(lines), "     "))
        if done.code != expect:
            story.fail(f"{' '.join(arguments)}: exit {done.code}, expected {expect}\n{done.all}")
        if any(secret in done.all for _, secret in answers):
            story.fail("a PIN or passphrase was shown")
        return done

    @contextmanager
    def waiting_service(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX) as service:
            service.connect(str(self.story.base / "run" / "key" / "demo"))
            service.setblocking(False)
            try:
                service.recv(64)
            except BlockingIOError:
                self.story.check(True, "a service that connects to run/key/demo waits")
            else:
                self.story.fail("a locked host gave a service an answer")
            service.settimeout(PATIENCE)
            yield service


def play(story: Story) -> None:
    with Pcscd() as service:
        card = PivCard(pin=CARD_PIN.encode(), vendor=Vendor())
        service.insert(card)
        told = CardStory(story, service, card)
        identity = _operators(told)
        tpm, daemon, reachable = _server(told)
        key, mac = _drill(told)
        story.end(daemon, signal.SIGKILL)
        story.end(reachable)
        story.end(tpm, signal.SIGKILL)
        tpm = _power_cut(told, identity, key, mac)
        _last_resort(told, identity, key)
        for process in reversed(story.running.copy()):
            story.end(process)


def _operators(told: CardStory) -> str:
    story = told.story
    story.begin(
        "Three operators, each with what they have",
        "alice has a PIV card, such as a YubiKey: here it is a card in software, behind the real PC/SC service and "
        "driver. bob has a key file, carol a passphrase. Only public parts go to the server. The card says which "
        "policies its key has, and that it was made inside.",
    )
    seen = told.service.run("opensc-tool", "--name").stdout.strip().splitlines()[-1]
    story.check(
        "Personal Identity Verification" in seen, f"OpenSC, which is not ours, says what it sees: {seen}"
    )
    (story.base / "operator").mkdir()
    identity = str(story.base / "operator" / "bob.txt")
    story.run("age-keygen", "-o", identity)
    ca = story.base / "operator" / "vendor-ca.pem"
    ca.write_bytes(told.card.vendor.pem)
    alice = story.run(
        *(
            "unsealctl",
            "operator",
            "add",
            "alice",
            "--piv",
            "--group",
            "security",
            "--attestation-ca",
            str(ca),
        )
    )
    print(textwrap.indent(alice.stderr.decode().rstrip(), "     "))
    story.check(b"verified up to" in alice.stderr, "the key was made inside of the card, its vendor says")
    bob = story.run("unsealctl", "operator", "add", "bob", "--key-file", identity)
    carol = told.typed(
        *("unsealctl", "operator", "add", "carol", "--passphrase"),
        answers=(("for you): ", PASSPHRASE), ("again: ", PASSPHRASE)),
    )
    lines = alice.stdout.decode() + bob.stdout.decode() + carol.out
    print(textwrap.indent(lines.rstrip(), "     "))
    _configure(story, lines)
    return identity


def _configure(story: Story, operators: str) -> None:
    story.config.write_text(
        textwrap.dedent(f"""\
            [daemon]
            state_dir = "{story.state}"
            runtime_dir = "{story.base / "run"}"
            [tpm]
            tcti = "swtpm:path={story.tpm_socket}"
            [unlock]
            threshold = 2
            require = ["security"]
            [key.demo]
            owner = "demo@example.com"
            purpose = "to show how it works"
            [[key.demo.allow]]
            user = "{os.getuid()}"
            operations = ["read", "sign", "verify"]
        """)
        + operators
    )
    story.configure_gateway(free_port())


def _address(story: Story) -> tuple[str, int]:
    line = next(line for line in story.gateway_config.read_text().splitlines() if line.startswith("listen"))
    host, _, port = line.split('"')[1].rpartition(":")
    return f"{host}:{port}", int(port)


def _server(
    told: CardStory,
) -> tuple["subprocess.Popen[bytes]", "subprocess.Popen[bytes]", "subprocess.Popen[bytes]"]:
    story = told.story
    story.begin(
        "The server: two of the three must agree, one of them from the group `security`",
        "The file key of the backup is split. Nobody opens it alone, on this server or with a copy of its disk.",
    )
    (story.base / "tpmstate").mkdir()
    tpm = story.power_on()
    daemon = story.daemon()
    story.ctl("init")
    address, port = _address(story)
    reachable = gateway(story, port)
    story.run("unsealctl", "host", "add", "web1", address, "--yes")
    story.check(
        story.status()["state"] == "unlocked", "initialised; alice has compared the words and added the host"
    )
    return tpm, daemon, reachable


def _drill(told: CardStory) -> tuple[bytes, str]:
    story = told.story
    story.begin(
        "A drill",
        "Before it counts, alice proves that her card opens the backup. Nothing is unlocked or changed by it; the server "
        "remembers when.",
    )
    done = told.typed("unsealctl", "drill", "web1", "-i", "piv:", answers=((PIN_QUESTION, CARD_PIN),))
    story.check("proven" in done.out, done.out.splitlines()[0])
    print(textwrap.indent(story.ctl("operator", "list").stdout.decode().rstrip(), "     "))
    mac = story.ctl("sign", "demo", stdin=MESSAGE).stdout.decode().strip()
    return story.ctl("get", "demo", show=False).stdout, mac


def _power_cut(told: CardStory, identity: str, key: bytes, mac: str) -> "subprocess.Popen[bytes]":
    story = told.story
    story.begin("A power cut", "Nothing was sealed, so nothing on the machine opens the backup.")
    tpm = story.power_on()
    story.daemon()
    gateway(story, _address(story)[1])
    status = story.status()
    story.check(status["lock_reason"] == "unexpected_reboot", f"locked: {status['lock_reason']}", status)
    with told.waiting_service() as waiting:
        story.begin(
            "bob answers",
            "He is one of two. Whoever has stolen his key file, and the disk, is no further than this.",
        )
        done = story.run("unsealctl", "unlock", "web1", "-i", identity, "--reason", "power cut in row 7")
        print(textwrap.indent(done.stdout.decode().rstrip(), "     "))
        story.check(b"1 of 2" in done.stdout, "one share of two, and the host stays locked")
        story.check(story.status()["state"] == "locked", "locked")
        _alice(told)
        received = bytearray()
        while data := waiting.recv(64):
            received += data
    story.check(bytes(received) == key, "the service that waited has got the same key")
    story.ctl("verify", "demo", "--mac", mac, stdin=MESSAGE, show=False)
    story.check(True, "the MAC from before the power cut still verifies")
    return tpm


def _alice(told: CardStory) -> None:
    story = told.story
    story.begin(
        "alice, somewhere else, answers with her card",
        "The device, the key and the tries that are left are shown before the PIN is asked for. A wrong PIN costs a try "
        "and tells the server nothing. The PIN goes into the card in one exclusive connection, and is kept nowhere.",
    )
    refused = told.typed(*("unsealctl", "unlock", "web1"), answers=((PIN_QUESTION, WRONG_PIN),), expect=19)
    story.check("2" in refused.err, "a wrong PIN: refused by the card")
    done = told.typed("unsealctl", "unlock", "web1", answers=((PIN_QUESTION, CARD_PIN),))
    print(textwrap.indent(done.out.rstrip(), "     "))
    story.check(story.status()["state"] == "unlocked", "unlocked")
    log = "".join(path.read_text(errors="replace") for path in story.base.glob("*.log"))
    story.check(CARD_PIN not in log, "no log has the PIN")


def _last_resort(told: CardStory, identity: str, key: bytes) -> None:
    story, base = told.story, told.story.base
    story.begin(
        "The last resort: without this program",
        "Machine and program are gone; there is a copy of the backup, the card and the key file. OpenSC's pkcs11-tool lets "
        "the card do its part, and one script that needs only Python and its cryptography package puts the shares together.",
    )
    vault = str(base / "vault.age")
    story.ctl("backup", "export", vault)
    print(textwrap.indent(story.run(RECOVER, "show", vault).stdout.decode().rstrip(), "     "))
    story.run(RECOVER, "point", vault, "alice", "-o", str(base / "point.der"))
    print("   $ pkcs11-tool --login --derive --mechanism ECDH1-DERIVE --id 03 -i point.der -o x.bin")
    told.service.run(
        *(
            "pkcs11-tool",
            "--module",
            "opensc-pkcs11.so",
            "--login",
            "--pin",
            CARD_PIN,
            "--id",
            "03",
            "--derive",
        ),
        *("--mechanism", "ECDH1-DERIVE", "-i", str(base / "point.der"), "-o", str(base / "x.bin")),
    )
    story.run(RECOVER, "share", vault, "alice", "--x", str(base / "x.bin"), "-o", str(base / "alice.share"))
    story.run(RECOVER, "share", vault, "bob", "--key", identity, "-o", str(base / "bob.share"))
    shares = [str(base / "alice.share"), str(base / "bob.share")]
    refused = story.run(RECOVER, "open", vault, shares[1], "-o", str(base / "none"), expect=1)
    story.check(b"1 of 2" in refused.stderr, "one share alone does not open it")
    story.run(RECOVER, "open", vault, *shares, "-o", str(base / "keyring"))
    found = story.run(RECOVER, "keys", str(base / "keyring"), "--key", "demo").stdout
    story.check(found == key, "it is the key")


def main() -> int:
    for program in ("pcscd", "opensc-tool", "pkcs11-tool"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is missing: start this as scripts/demo --card, which installs it")
    return perform(
        "unsealerd with operators who have smart cards, and of whom two must agree. This demo plays an unexpected reboot "
        "with the real programs and the real PC/SC stack. Card and TPM are software ones, in a temporary directory and a "
        "PC/SC service of its own: cards and readers of this machine are not touched.",
        play,
    )


if __name__ == "__main__":
    raise SystemExit(main())
