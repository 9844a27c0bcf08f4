"""unsealctl in this process: what is typed, what is printed."""

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from unsealerd.cli.main import run


@dataclass(frozen=True, slots=True)
class Result:
    code: int
    raw: bytes
    err: str

    @property
    def out(self) -> str:
        return self.raw.decode()

    @property
    def json(self) -> dict[str, object]:
        """The one object on stdout."""
        value = json.loads(self.raw)
        assert isinstance(value, dict)
        assert self.raw.count(b"\n") == 1
        return value

    def refused(self, code: int, name: str = "") -> "Result":
        """This is an error as every error is: its code, one line, a hint, and nothing that only a
        programmer reads.
        """
        assert self.code == code, (self.code, self.err)
        lines = self.err.splitlines()
        assert len(lines) == 2, self.err
        assert lines[0].startswith("unsealctl: ")
        assert lines[1].startswith("hint: ")
        assert "Traceback" not in self.err
        if name:
            assert self.json["error"] == name
            assert lines[0] == f"unsealctl: {self.json['detail']}"
        return self


class _Stream(io.TextIOWrapper):
    terminal = False

    def isatty(self) -> bool:
        return self.terminal


class Ctl:
    """Runs command lines against a configuration in a directory."""

    def __init__(self, directory: Path) -> None:
        self.state_dir = directory / "state"
        self.runtime_dir = directory / "run"
        self.state_dir.mkdir()
        self.runtime_dir.mkdir()
        self.config = directory / "unsealerd.toml"
        self.config.write_text(
            f'[daemon]\nstate_dir = "{self.state_dir}"\nruntime_dir = "{self.runtime_dir}"\n[tpm]\ntcti = "none"\n'
        )

    def __call__(self, *arguments: str, stdin: bytes = b"", terminal: bool = False) -> Result:
        """Run with ``--config``, which stands before the command."""
        return self.bare("--config", str(self.config), *arguments, stdin=stdin, terminal=terminal)

    def bare(self, *arguments: str, stdin: bytes = b"", terminal: bool = False) -> Result:
        """Run exactly these words."""
        out, err = _Stream(io.BytesIO(), encoding="utf-8"), _Stream(io.BytesIO(), encoding="utf-8")
        given = _Stream(io.BytesIO(stdin), encoding="utf-8")
        out.terminal = err.terminal = given.terminal = terminal
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "stdin", given),
        ):
            code = run(arguments)
        out.flush()
        err.flush()
        assert isinstance(out.buffer, io.BytesIO)
        assert isinstance(err.buffer, io.BytesIO)
        return Result(int(code), out.buffer.getvalue(), err.buffer.getvalue().decode())
