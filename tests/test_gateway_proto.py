"""The generated code is what proto/ gives, and the messages are what the comments there say."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from rigs.gateway import ROOT

from unsealerd.core import session
from unsealerd.gateway.limits import Limits
from unsealerd.proto import unlock_pb2 as pb


def gen_proto(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, root / "scripts" / "gen-proto", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_generated_code_is_up_to_date() -> None:
    result = gen_proto(ROOT, "--check")
    assert result.returncode == 0, result.stdout


def test_a_drift_is_found_and_mended(tmp_path: Path) -> None:
    for name in ("proto", "scripts", "unsealerd/proto"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "proto/unsealerd/v1/unlock.proto"
    source.write_text(source.read_text().replace("string host_name = 5;", "string host_name = 15;"))
    (tmp_path / "unsealerd/proto/stale_pb2.py").touch()
    assert gen_proto(tmp_path, "--check").returncode == 1
    assert gen_proto(tmp_path).returncode == 0
    assert gen_proto(tmp_path, "--check").returncode == 0
    assert sorted(set(os.listdir(tmp_path / "unsealerd/proto")) - {"__pycache__"}) == [
        "__init__.py",
        "unlock_pb2.py",
        "unlock_pb2.pyi",
    ]
    assert gen_proto(tmp_path, "--nonsense").returncode == 2


def test_the_comments_say_what_the_code_holds_to() -> None:
    text = (ROOT / "proto/unsealerd/v1/unlock.proto").read_text()
    limits = Limits()
    for said in (
        f"Messages are at most {limits.message_bytes >> 10} KiB",
        f"at most {limits.session_seconds} seconds long",
        f"within {limits.hello_seconds} seconds",
        f"{session.NONCE_SIZE} random bytes",
        f"1 to {session.MAX_TAGS} different",
        f"its first {session.TAG_SIZE} bytes",
        f"{session.SESSION_ID_SIZE} random bytes",
        f"1 to {session.MAX_QUESTIONS}.",
    ):
        assert said in text


def test_the_place_of_a_tpm_quote_is_kept() -> None:
    """Field 2 of the evidence: an older operator must not mistake something else for it."""
    proto = pb.Evidence.DESCRIPTOR
    assert [field.number for field in proto.fields] == [1]
    assert pb.Evidence.FromString(b"\x12\x01x").WhichOneof("kind") is None
