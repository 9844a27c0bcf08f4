"""The gateway's file: the one that the package installs says the defaults, and every mistake is one clear error."""

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from unsealerd.config import Daemon
from unsealerd.errors import ConfigInvalid
from unsealerd.gateway.settings import DEFAULT_PATH, Settings, load, parse
from unsealerd.tomlfile import MAX_FILE_BYTES

SHIPPED = Path(__file__).parents[1] / "packaging" / "gateway.toml"


def test_the_file_of_the_package_says_the_defaults() -> None:
    assert load(SHIPPED) == Settings()
    shown, settings = re.subn(r"(?m)^#(\w+ = )", r"\1", SHIPPED.read_text())
    assert settings == len(Settings.__struct_fields__)
    assert parse(shown.encode()) == Settings()


def test_the_defaults_are_the_daemons() -> None:
    settings, daemon = Settings(), Daemon()
    assert (settings.state_dir, settings.runtime_dir) == (daemon.state_dir, daemon.runtime_dir)
    assert Path("/etc/unsealerd/gateway.toml") == DEFAULT_PATH


def test_a_file_is_read_as_it_says(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text('listen = ["a:1", "[::1]:2"]\nstate_dir = "/a"\nruntime_dir = "/b"\n')
    settings = load(path)
    assert settings.listen == ("a:1", "[::1]:2")
    assert settings.identity_dir == Path("/a/gateway")
    assert settings.socket == Path("/b/unlock")


MISTAKES = [
    ("listen = '[::]:8750'", ["listen"]),
    ("listen = []", ["listen", "empty"]),
    *((f"listen = ['{bad}']", ["listen", bad]) for bad in ("", ":1", "a", "a:", "a:b", "a:65536")),
    *((f"listen = ['{bad}']", ["listen"]) for bad in ("::1:80", "[]:80", "a:-1", "a:+1", "a: 1")),
    ("listen = [8750]", ["listen[0]"]),
    ("state_dir = 1", ["state_dir"]),
    ("state_dir = ''", ["state_dir"]),
    ("state_dir = 'var/lib'", ["state_dir", "var/lib", "absolute"]),
    ("runtime_dir = './run'", ["runtime_dir", "absolute"]),
    ('runtime_dir = "/a\\u0000b"', ["runtime_dir"]),
    ("port = 8750", ["port"]),
    # What belongs to the other file.
    ("[gateway]\nlisten = ['[::]:8750']", ["gateway"]),
    ("[daemon]\nstate_dir = '/a'", ["daemon"]),
    ("[[operator]]\nname = 'alice'", ["operator"]),
    ("[", ["not TOML"]),
]


@pytest.mark.promise(10)
@pytest.mark.parametrize(("text", "said"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_line_with_the_place(text: str, said: list[str]) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        parse(text.encode())
    detail = caught.value.detail
    for words in said:
        assert words in detail
    assert "\n" not in detail
    assert "$" not in detail
    assert len(detail) < 400


def test_a_file_that_is_not_there_or_without_end(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    with pytest.raises(ConfigInvalid, match=f"{path}: No such file"):
        load(path)
    path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigInvalid, match="larger than"):
        load(path)


@pytest.mark.promise(10)
@given(st.binary(max_size=200))
@example(b"\xef\xbb\xbflisten = []")
@example(b"a = " + b"[" * 50000)
def test_any_bytes(data: bytes) -> None:
    with contextlib.suppress(ConfigInvalid):
        assert isinstance(parse(data), Settings)
