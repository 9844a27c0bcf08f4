"""`scripts/recover` on files that somebody has made to harm who opens them: one line, no escape sequence, no traceback."""

import base64
import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

RECOVER = Path(__file__).resolve().parent.parent / "scripts" / "recover"
ESCAPE = "\x1b]0;owned\x07\x1b[2J"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("recover_script", str(RECOVER))
    spec = importlib.util.spec_from_loader("recover_script", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["recover_script"] = module  # its dataclasses look themselves up there
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = written
    return module


def base(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


def backup(listed: bytes, stanzas: int = 1) -> bytes:
    """Whose list of operators says this."""
    text = base(listed)
    lines = [text[i : i + 64] for i in range(0, len(text), 64)]
    lines += [""] if not lines or len(lines[-1]) == 64 else []
    header = "age-encryption.org/v1\n-> unsealerd-operators 1\n" + "\n".join(lines) + "\n"
    header += f"-> X25519 {base(bytes(32))}\n{base(bytes(32))}\n" * stanzas
    return f"{header}--- {base(bytes(32))}\n".encode() + bytes(64)


def operator(**facts: object) -> dict[str, object]:
    return {"name": "a", "recipient": "age1x", "groups": [], "kdf": None, "share": None, **facts}


def listing(*operators: object, threshold: object = 1, require: object = ()) -> bytes:
    return json.dumps({"threshold": threshold, "require": require, "operators": operators}).encode()


LISTS = {
    "escape in a name": listing(operator(name=ESCAPE)),
    "escape in a required name": listing(operator(share="AAAA"), require=[ESCAPE]),
    "escape in a group": listing(operator(groups=[ESCAPE])),
    "a name that is a number": listing(operator(name=3)),
    "a recipient that is a list": listing(operator(recipient=[])),
    "a group that is a number": listing(operator(groups=[1])),
    "parameters that are a number": listing(operator(kdf=5)),
    "a share that is a number": listing(operator(share=5)),
    "nested deeply": b"[" * 200_000,
    "a huge number": b'{"threshold":' + b"9" * 5000 + b',"require":[],"operators":[]}',
    "not an object": b"[]",
    "null": b"null",
    "an operator that is a number": listing(5),
    "threshold 0": listing(operator(), threshold=0),
    "threshold -1": listing(operator(share="AAAA"), threshold=-1, require=["a"]),
    "threshold true": listing(operator(), threshold=True),
    "more than there are": listing(operator(share="AAAA"), threshold=2),
    "a text for the operators": json.dumps({"threshold": 1, "require": [], "operators": "a"}).encode(),
    "a text for the required": listing(operator(), require="a"),
}


def one_line(script: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Refused in a line that is fit for a terminal."""
    before, sys.argv = sys.argv, ["recover", *map(str, arguments)]
    try:
        assert script.main() == 1
    finally:
        sys.argv = before
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("recover: ")
    assert line.isprintable()
    assert len(line) < 1000
    return str(line)


@pytest.mark.promise(10)
@pytest.mark.parametrize("listed", LISTS.values(), ids=LISTS)
def test_a_list_of_operators(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, listed: bytes
) -> None:
    path = tmp_path / "backup.age"
    path.write_bytes(backup(listed))
    one_line(script, capsys, "show", path)


@pytest.mark.promise(10)
@pytest.mark.parametrize(
    "asked", ["m=1,t=1,p=0", "m=65536,t=2,p=0", "m=999999999,t=2,p=1", "m=65536,t=99999,p=1"]
)
def test_what_a_passphrase_may_cost(
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
) -> None:
    path = tmp_path / "backup.age"
    path.write_bytes(backup(listing(operator(kdf=f"argon2id$v=19${asked}${'A' * 22}"))))
    monkeypatch.setattr(script, "ask", lambda _: b"a passphrase")
    assert "is not from" in one_line(script, capsys, "share", path, "a", "--passphrase")


def version(**facts: object) -> dict[str, object]:
    return {"version": 1, "state": "primary", "size": 2, **facts}


def metadata(*versions: object, name: object = "web", generation: object = 1) -> bytes:
    return json.dumps({"generation": generation, "keys": [{"name": name, "versions": versions}]}).encode()


KEYRINGS = {
    "escape in a name": metadata(version(), name=ESCAPE),
    "escape in a state": metadata(version(state=ESCAPE)),
    "a negative size": metadata(version(size=-5), version(version=2, size=7)),
    "a size that is a text": metadata(version(size="2")),
    "a version that is a list": metadata(version(version=[])),
    "a generation that is a text": metadata(version(), generation=ESCAPE),
    "a list": b"[]",
    "nested deeply": b"[" * 200_000,
}


@pytest.mark.promise(10)
@pytest.mark.parametrize("said", KEYRINGS.values(), ids=KEYRINGS)
def test_a_keyring(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, said: bytes
) -> None:
    path = tmp_path / "keyring"
    head: bytes = script.KEYRING_FIRST_LINE + b"%d\n" % len(said)
    path.write_bytes(head + said + bytes(script.LINEAGE) + b"ab")
    assert "metadata is damaged" in one_line(script, capsys, "keys", path)


@pytest.mark.promise(10)
@pytest.mark.parametrize("said", [b"[]", b"[" * 200_000, b'{"format":1}', b"\xff", b"5"])
def test_a_share(script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, said: bytes) -> None:
    path = tmp_path / "backup.age"
    path.write_bytes(
        backup(listing(operator(share="AAAA"), operator(name="b", share="AAAA"), threshold=2), 2)
    )
    (tmp_path / "share").write_bytes(said)
    one_line(script, capsys, "open", path, tmp_path / "share")
