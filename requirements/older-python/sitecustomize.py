"""What Python 3.12 took out of configparser, for the setup.py of smartcard 0.3 (openpgp-card.lock) and nothing else."""

import configparser


class _Parser(configparser.ConfigParser):
    def readfp(self, file):  # type: ignore[no-untyped-def]
        self.read_file(file)


if not hasattr(configparser, "SafeConfigParser"):
    configparser.SafeConfigParser = _Parser  # type: ignore[attr-defined]
