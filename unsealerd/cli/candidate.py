"""What a device says of the key that somebody wants to become an operator with, and the configuration lines for it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from unsealerd.cli import terminal
from unsealerd.cli.events import show
from unsealerd.cli.output import printable
from unsealerd.cli.prompts import TerminalPrompts
from unsealerd.cli.stderr import note
from unsealerd.errors import AccessDenied, AttestationInvalid, BadRequest, IdentityInvalid

if TYPE_CHECKING:
    from unsealerd.operator.cards.attestation import Attestation
    from unsealerd.operator.cards.policies import PinPolicy, TouchPolicy
    from unsealerd.operator.identities.piv import PivIdentity

MIN_PASSPHRASE = 16
"""Characters. What is shorter than a sentence is guessed from a copy of the disk."""
_MAX_CA_BYTES = 1 << 20
T = TypeVar("T")

_NOT_SAID = "the device does not say"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A recipient, and everything that its device says of the key."""

    recipient: str
    device: str
    kdf: str | None = None
    pin: str | None = None
    """When the device wants the PIN, in a word or two; None: it does not say."""
    touch: str | None = None
    """When it wants a touch."""
    is_hardware: bool = False
    attestation: "Attestation | None" = None
    unattested: str = ""
    """Why there is no attestation, where there could be one."""

    def rows(self) -> list[tuple[str, str]]:
        """For people."""
        rows = [("device", self.device), ("recipient", self.recipient)]
        if self.is_hardware:
            rows += [
                (label, _NOT_SAID if policy is None else f"policy {policy}")
                for label, policy in (("PIN", self.pin), ("touch", self.touch))
            ]
        if self.attestation is not None:
            rows.append(("attestation", _worded(self.attestation)))
        elif self.unattested:
            rows.append(("attestation", f"none: {self.unattested}"))
        return rows

    def facts(self) -> dict[str, object]:
        """For programs."""
        facts: dict[str, object] = {"device": self.device, "passphrase": self.kdf}
        facts["pin_policy"] = self.pin
        facts["touch_policy"] = self.touch
        found = self.attestation
        facts["attestation"] = None
        if found is not None:
            facts["attestation"] = {
                "anchor": found.anchor.value,
                "serial": found.serial,
                "issuer": found.issuer,
                "firmware": None
                if found.firmware is None
                else ".".join(str(part) for part in found.firmware),
            }
        return facts


def of_piv(serial: str | None, slot: int, ca_file: str | None) -> Candidate:
    """The key of the one PIV card. With a CA, anything but a whole chain is `AttestationInvalid`."""
    from unsealerd.operator.identities import piv

    ca = None if ca_file is None else _read(Path(ca_file))
    identity = _only(piv.find(serial, slot, prompts=TerminalPrompts(), on_event=show))
    attestation, why_not = _attested(identity, ca)
    pin, touch = (_policy(policy) for policy in identity.policies() or (None, None))
    return Candidate(
        str(identity.recipient),
        identity.device,
        pin=pin,
        touch=touch,
        is_hardware=True,
        attestation=attestation,
        unattested=why_not,
    )


def of_openpgp(serial: str) -> Candidate:
    """The decryption key of the one OpenPGP card."""
    from unsealerd.operator.identities import openpgp

    identity = _only(openpgp.find(serial or None, prompts=TerminalPrompts(), on_event=show))
    touch = None if identity.touch is None else "always" if identity.touch else "never"
    # OpenPGP card 3.4, section 7.2.2: for decryption a PIN holds until the card is reset.
    return Candidate(str(identity.recipient), identity.device, pin="once", touch=touch, is_hardware=True)


def of_token(uri: str) -> Candidate:
    """The key that a PKCS#11 URI names. The interface has no word for policies."""
    from unsealerd.operator.identities import pkcs11

    identity = _only(pkcs11.find(uri, prompts=TerminalPrompts(), on_event=show))
    return Candidate(str(identity.recipient), identity.device, is_hardware=True)


def of_file(file: str) -> Candidate:
    """The one key in a file."""
    from unsealerd.operator.identities import load_identity

    path = Path(file)
    identity = _only(load_identity(path, lambda each: TerminalPrompts().passphrase(str(each)), show))
    return Candidate(str(identity.recipient), f"key file {path.name}")


def of_passphrase() -> Candidate:
    """A passphrase that is typed twice, or made here. Raises `BadRequest` for one that is too short."""
    from unsealerd.core.passphrase import Parameters, derive
    from unsealerd.core.secret import SecretBuffer
    from unsealerd.core.words import fingerprint_words

    typed = terminal.ask_secret("Passphrase (empty: one is made for you): ")
    if not typed:
        typed = " ".join(fingerprint_words(os.urandom(32)))  # eight words: 88 bits
        terminal.tell(f"The passphrase is: {typed}\n")
    elif len(typed) < MIN_PASSPHRASE:
        raise BadRequest(
            f"a passphrase has at least {MIN_PASSPHRASE} characters; several random words are best"
        )
    if terminal.ask_secret("The same again: ") != typed:
        raise BadRequest("the two are not the same")
    parameters = Parameters.make()
    with SecretBuffer.copy_of(typed.encode()) as passphrase:
        recipient = str(derive(passphrase.view, parameters).recipient)
    note(
        "warning: whoever has a copy of the disk can try passphrases, without anybody noticing; docs/operators.md"
    )
    return Candidate(recipient, "a passphrase", kdf=str(parameters))


def configuration(name: str, groups: Sequence[str], found: Candidate) -> str:
    """The lines for the file, checked as the daemon will check them. Raises `BadRequest`."""
    from unsealerd.config import parse
    from unsealerd.errors import ConfigInvalid

    fields = [("name", _quoted(name)), ("recipient", _quoted(found.recipient))]
    if groups:
        fields.append(("groups", f"[{', '.join(_quoted(group) for group in groups)}]"))
    if found.kdf is not None:
        fields.append(("passphrase", _quoted(found.kdf)))
    lines = "[[operator]]\n" + "".join(f"{key} = {value}\n" for key, value in fields)
    try:
        parse(lines.encode())
    except ConfigInvalid as err:
        raise BadRequest(err.detail) from err
    return f"# {printable(found.device)}\n{lines}"


def _quoted(text: str) -> str:
    """A basic string of TOML, as `repr` of a name that has nothing to escape; the check above refuses any other."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _only(found: Sequence[T]) -> T:
    if len(found) > 1:
        names = "; ".join(str(getattr(each, "device", "a key")) for each in found)
        raise BadRequest(f"there are {len(found)}, say which one: {names}")
    return found[0]


def _attested(identity: "PivIdentity", ca: bytes | None) -> "tuple[Attestation | None, str]":
    """The attestation, or why there is none."""
    try:
        return identity.attest(ca), ""
    except AttestationInvalid as err:
        if ca is not None:
            raise
        # Most PIV cards cannot attest, and a key that was brought in cannot be: the person decides, knowing it.
        return None, err.detail or err.name


def _policy(policy: "PinPolicy | TouchPolicy | None") -> str | None:
    return None if policy is None else policy.name.lower().replace("_", " ")


def _worded(found: "Attestation") -> str:
    from unsealerd.operator.cards.attestation import Anchor

    which = f", serial {found.serial}" if found.serial is not None else ""
    match found.anchor:
        case Anchor.VENDOR:
            return f"the key was made inside of the device{which}; verified up to {found.issuer}"
        case Anchor.DEVICE:
            return (
                f"the device says that the key was made inside of it{which}; its own word only:"
                " --attestation-ca with the vendor's certificate verifies that"
            )


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_CA_BYTES + 1)
    except PermissionError as err:
        raise AccessDenied(f"{path}: {err.strerror}") from err
    except OSError as err:
        raise IdentityInvalid(f"{path}: {err.strerror}") from err
    if len(data) > _MAX_CA_BYTES:
        raise IdentityInvalid(f"{path}: too large for certificates")
    return data
