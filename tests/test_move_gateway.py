"""At an upgrade the gateway's settings move to its own file: both files say what the one said, or nothing is changed."""

import subprocess
import tomllib
from pathlib import Path

import pytest

from unsealerd import config
from unsealerd.errors import ConfigInvalid
from unsealerd.gateway import settings

PROGRAM = Path(__file__).parents[1] / "packaging" / "move_gateway.py"
SHIPPED = (PROGRAM.parent / "gateway.toml").read_text()
EARLIER = """\
# The configuration of unsealerd, its gateway and unsealctl: unsealerd.toml(5). What begins with # is an example or a default.

[tpm]
#pcrs = [7]

[gateway]
# Where operators reach this host.
#listen = ["[::]:8750"]

# Who may unlock: at least one, before `unsealctl init`.
[[operator]]
name = "alice"
recipient = "age1alice"
"""


class Upgrade:
    """The two files in a directory, and what the program does to them."""

    def __init__(self, directory: Path) -> None:
        self.config = directory / "unsealerd.toml"
        self.gateway = directory / "gateway.toml"

    def run(self, text: str, gateway: str | None = SHIPPED) -> subprocess.CompletedProcess[str]:
        self.config.write_bytes(text.encode())
        self.config.chmod(0o640)
        if gateway is not None:
            self.gateway.write_text(gateway)
            self.gateway.chmod(0o644)
        done = subprocess.run(
            ["/usr/bin/python3", "-I", PROGRAM, self.config, self.gateway],
            capture_output=True,
            text=True,
            check=False,
            umask=0o077,
        )
        assert sorted(path.name for path in self.config.parent.iterdir()) == [
            "gateway.toml",
            "unsealerd.toml",
        ]
        return done

    def moved(self, text: str, gateway: str | None = SHIPPED) -> settings.Settings:
        """Both programs can read their files afterwards; what the gateway reads."""
        done = self.run(text, gateway)
        assert (done.returncode, done.stderr) == (0, "")
        before = tomllib.loads(text)
        before.pop("gateway", None)
        assert tomllib.loads(self.config.read_text()) == before
        config.load(self.config)
        assert self.config.stat().st_mode & 0o777 == 0o640
        assert self.gateway.stat().st_mode & 0o777 == 0o644
        return settings.load(self.gateway)


@pytest.fixture
def upgrade(tmp_path: Path) -> Upgrade:
    return Upgrade(tmp_path)


def test_the_file_as_it_was_installed(upgrade: Upgrade) -> None:
    assert upgrade.moved(EARLIER) == settings.Settings()
    assert upgrade.gateway.read_text() == SHIPPED
    # The comments of the table went with it, those of the next one stayed.
    assert "listen" not in upgrade.config.read_text()
    assert "# Who may unlock" in upgrade.config.read_text()


def test_a_setting_and_its_comments_move(upgrade: Upgrade) -> None:
    text = EARLIER.replace(
        '#listen = ["[::]:8750"]', 'listen = [\n  "10.0.0.1:1", # the inner net\n  "[::1]:2",\n]'
    )
    assert upgrade.moved(text).listen == ("10.0.0.1:1", "[::1]:2")
    assert "# the inner net" in upgrade.gateway.read_text()
    assert upgrade.gateway.read_text().startswith(SHIPPED)
    once = upgrade.config.read_text(), upgrade.gateway.read_text()
    done = upgrade.run(*once)
    assert (done.returncode, done.stdout) == (0, "")
    assert (upgrade.config.read_text(), upgrade.gateway.read_text()) == once


@pytest.mark.parametrize(
    "text",
    [
        "[gateway]\nlisten = ['a:1']",
        "[gateway]\r\nlisten = ['a:1']\r\n[tpm]\r\n",
        " [ gateway ] # here\n\n\nlisten = ['a:1']\n\n[tpm]\n",
        "['gateway']\nlisten = ['a:1']\n",
    ],
)
def test_tables_of_every_shape(upgrade: Upgrade, text: str) -> None:
    assert upgrade.moved(text).listen == ("a:1",)


def test_moved_directories_are_known_to_both(upgrade: Upgrade) -> None:
    daemon = '[daemon]\nstate_dir = "/srv/ä\\\\u"\nruntime_dir = "/run/u"\n'
    found = upgrade.moved(daemon + "[gateway]\nlisten = ['a:1']\n")
    assert (found.listen, found.state_dir, found.runtime_dir) == (("a:1",), Path("/srv/ä\\u"), Path("/run/u"))
    found = upgrade.moved(daemon)
    assert (found.state_dir, found.runtime_dir) == (Path("/srv/ä\\u"), Path("/run/u"))


def test_settings_that_are_there_stay(upgrade: Upgrade) -> None:
    assert upgrade.moved("[gateway]\nlisten = ['a:1']\n", "listen = ['b:2']\n").listen == ("b:2",)


def test_a_file_that_is_not_there_is_made(upgrade: Upgrade) -> None:
    assert upgrade.moved("[gateway]\nlisten = ['a:1']\n", None).listen == ("a:1",)


def test_a_file_that_has_nothing_to_move_is_not_touched(upgrade: Upgrade) -> None:
    text = "[tpm]\r\npcrs = [7]"
    done = upgrade.run(text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert upgrade.config.read_bytes() == text.encode()
    # A mistake is for the daemon to name.
    assert upgrade.run("[gateway]\nlisten = ").returncode == 0
    assert upgrade.config.read_text() == "[gateway]\nlisten = "


@pytest.mark.parametrize(
    ("text", "gateway"),
    [
        ("gateway.listen = ['a:1']\n", SHIPPED),
        ("gateway = { listen = ['a:1'] }\n", SHIPPED),
        ("gateway = 1\n", SHIPPED),
        ("[gateway]\nlisten = ['a:1']\n[gateway.more]\na = 1\n", SHIPPED),
        ('[gateway]\nlisten = [\n"""\n[x]\n""", "a:1"]\n', SHIPPED),
        ("[gateway]\nlisten = ['a:1']\n", "listen = \n"),
    ],
)
def test_what_cannot_be_moved_is_said_and_changes_nothing(upgrade: Upgrade, text: str, gateway: str) -> None:
    done = upgrade.run(text, gateway)
    assert (done.returncode, done.stdout) == (1, "")
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert (upgrade.config.read_text(), upgrade.gateway.read_text()) == (text, gateway)
    if gateway == SHIPPED:
        with pytest.raises(ConfigInvalid, match=r"gateway\.toml"):
            config.load(upgrade.config)
