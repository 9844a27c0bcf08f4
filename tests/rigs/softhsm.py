"""Tokens of SoftHSM2 in a folder of their own. SoftHSM2 never blocks a PIN: lock-out is for the emulated cards."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

MODULE = "/usr/lib/softhsm/libsofthsm2.so"
PIN = b"648219"
SO_PIN = "87654321"


@dataclass(frozen=True, slots=True)
class SoftHsm:
    """The module reads SOFTHSM2_CONF when it is initialised: set it in every process that is to see these tokens."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "SoftHsm":
        (folder / "tokens").mkdir(parents=True)
        hsm = cls(folder)
        hsm.config.write_text(
            f"directories.tokendir = {folder}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n"
        )
        return hsm

    @property
    def config(self) -> Path:
        return self.folder / "softhsm2.conf"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SOFTHSM2_CONF": str(self.config)}

    def uri(self, **attributes: str) -> str:
        path = ";".join(f"{name.replace('_', '-')}={value}" for name, value in attributes.items())
        return f"pkcs11:{path}?module-path={MODULE}"

    def add_token(self, label: str) -> None:
        self._run(
            "softhsm2-util",
            "--init-token",
            "--free",
            "--label",
            label,
            "--pin",
            PIN.decode(),
            "--so-pin",
            SO_PIN,
        )

    def add_key(
        self, token: str, label: str, identifier: bytes, private: ec.EllipticCurvePrivateKey, *options: str
    ) -> None:
        """Import a private key that may derive, and its public half. ``options``: of pkcs11-tool, for both."""
        file = self.folder / f"{label}.der"
        name = ("--label", label, "--id", identifier.hex(), "--usage-derive", *options)
        file.write_bytes(private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()))
        self.tool(token, "--write-object", str(file), "--type", "privkey", *name)
        public = private.public_key()
        file.write_bytes(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
        self.tool(token, "--write-object", str(file), "--type", "pubkey", *name)
        file.unlink()

    def tool(self, token: str, *arguments: str) -> None:
        """OpenSC's pkcs11-tool, logged in."""
        login = ("--token-label", token, "--login", "--pin", PIN.decode())
        self._run("pkcs11-tool", "--module", MODULE, *login, *arguments)

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, env=self.environment, capture_output=True, check=False, timeout=60)
        assert done.returncode == 0, done
