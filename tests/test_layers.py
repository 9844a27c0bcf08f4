"""Folders are processes: who imports whom is read from the sources, and what that costs from fresh interpreters."""

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from unsealerd.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "unsealerd"
PROCESSES = ("daemon", "gateway", "operator", "client", "watch")
SHARED = {
    "watch": {"client"}
}  # the library of every local program that speaks with the daemon; the command uses it too
COMPUTED = "?"  # a module whose name is not written down where it is imported
VOCABULARY = frozenset({"errors", "model", "tomlfile", "config", "notify", "keyringid"})


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module, with its whole name, and where."""

    module: str
    line: int

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    @property
    def part(self) -> str | None:
        """The folder or module of this package that it is, or None."""
        names = self.module.split(".")
        return names[1] if names[0] == "unsealerd" and len(names) > 1 else None


def imports_of(source: str) -> list[Import]:
    """Every import, also within functions and for the type checker, and every module that is imported by its name."""
    found: list[Import] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found.extend(Import(alias.name, node.lineno) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                assert level == 0, "imports say the whole name"
                # `from unsealerd import errors` imports unsealerd.errors.
                found.extend(Import(f"{module}.{alias.name}", node.lineno) for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="__import__"), args=[first, *_]
            ):
                name = str(first.value) if isinstance(first, ast.Constant) else COMPUTED
                found.append(Import(name, node.lineno))
            case _:
                continue
    return found


def sources(*parts: str) -> list[Path]:
    """The files of these folders and modules of the package; all of them without any."""
    if not parts:
        return sorted(PACKAGE.rglob("*.py"))
    files = [file for part in parts for file in sorted((PACKAGE / part).rglob("*.py"))]
    return files + [PACKAGE / f"{part}.py" for part in parts if (PACKAGE / f"{part}.py").exists()]


def imports(*parts: str) -> list[tuple[str, Import]]:
    found = [
        (f"{file.relative_to(ROOT)}:{each.line}", each)
        for file in sources(*parts)
        for each in imports_of(file.read_text())
    ]
    assert found, "there is something to look at"
    return found


def importers(name: str) -> set[str]:
    """The folders and modules of the package that import what begins with `name`."""
    return {
        file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for file in sources()
        for each in imports_of(file.read_text())
        if each.module == name or each.module.startswith(f"{name}.")
    }


# --- the walker sees what it is to see


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import grpc", "grpc"),
        ("import grpc.aio as g", "grpc.aio"),
        ("def f():\n    import grpc", "grpc"),
        ("from unsealerd import daemon", "unsealerd.daemon"),
        ("from unsealerd.daemon import host", "unsealerd.daemon.host"),
        ("if TYPE_CHECKING:\n    from unsealerd.tpm.device import Tpm", "unsealerd.tpm.device.Tpm"),
        ("importlib.import_module('tpm2_pytss')", "tpm2_pytss"),
        ("__import__('grpc')", "grpc"),
        ("importlib.import_module(name)", COMPUTED),
    ],
)
def test_every_way_to_import_is_seen(source: str, module: str) -> None:
    assert module in {each.module for each in imports_of(source)}


def test_only_the_table_of_commands_imports_what_is_not_written_there() -> None:
    """And what it imports are the files of the command."""
    assert {where.partition(":")[0] for where, each in imports() if each.module == COMPUTED} == {
        "unsealerd/cli/command.py"
    }
    assert all(lazy.place.startswith("unsealerd.cli.") for lazy in COMMANDS.values())


# --- folders


@pytest.mark.parametrize("process", PROCESSES)
def test_processes_do_not_import_each_other(process: str) -> None:
    others = {*PROCESSES, "cli"} - {process} - SHARED.get(process, set())
    assert [where for where, each in imports(process) if each.part in others] == []


@pytest.mark.parametrize("part", ["core", "tpm", "proto", *sorted(VOCABULARY)])
def test_what_is_shared_imports_no_process(part: str) -> None:
    allowed = {
        "core": {"core", "errors", "model"},
        "tpm": {"tpm", "core", "errors", "model"},
        "proto": {"proto"},
    }
    parts = {each.part for _, each in imports(part) if each.top == "unsealerd"}
    assert parts <= allowed.get(part, VOCABULARY - {part})


@pytest.mark.promise(8)
def test_the_tpm_is_the_daemons_and_the_operators() -> None:
    assert importers("unsealerd.tpm") <= {"daemon", "operator", "tpm"}
    assert "daemon" in importers("unsealerd.tpm")


@pytest.mark.promise(8)
def test_each_heavy_library_has_its_folder() -> None:
    assert importers("grpc") == {"gateway", "operator"}
    assert importers("google") == {"gateway", "operator", "proto"}
    assert importers("unsealerd.proto") == {"gateway", "operator"}
    assert importers("tpm2_pytss") <= {"tpm"}
    assert importers("click") == importers("rich") == {"cli"}
    assert importers("systemd") <= {"daemon"}
    assert importers("ssl") == {"gateway", "operator", "watch"}


@pytest.mark.promise(8)
def test_the_name_of_the_tpm_library_stands_in_one_folder() -> None:
    """However it is loaded there."""
    named = {
        file.relative_to(PACKAGE).parts[0]
        for file in sources()
        for node in ast.walk(ast.parse(file.read_text()))
        if (isinstance(node, ast.Constant) and str(node.value).split(".")[0] == "tpm2_pytss")
        or (isinstance(node, ast.Import | ast.ImportFrom) and "tpm2_pytss" in ast.unparse(node))
    }
    assert named == {"tpm"}


@pytest.mark.promise(8)
def test_the_gateway_has_nothing_that_opens_a_backup() -> None:
    """What it shares with the daemon is the shape of the messages and the fingerprint of its own key."""
    used = {each.module for _, each in imports("gateway") if each.part == "core"}
    assert {module.split(".")[2] for module in used} == {"conversation", "tlskey"}


def test_the_command_asks_the_daemon_and_is_not_one() -> None:
    assert {each.part for _, each in imports("cli")} & {"daemon", "tpm", "proto"} == set()


def test_a_service_imports_the_standard_library_and_the_vocabulary() -> None:
    for where, each in imports("client"):
        if each.top == "unsealerd":
            assert each.part in {"client", "errors", "model"}, where
        else:
            assert each.top in sys.stdlib_module_names, where


# --- the core: no I/O, no clock

PURE = {
    "base64": "bytes in, bytes out",
    "binascii": "bytes in, bytes out",
    "collections": "types",
    "contextlib": "control flow",
    "cryptography": "arithmetic; its generator is the kernel's",
    "dataclasses": "types",
    "enum": "types",
    "functools": "control flow",
    "hashlib": "bytes in, bytes out",
    "hmac": "bytes in, bytes out",
    "msgspec": "bytes in, values out",
    "re": "text in, text out",
    "typing": "types",
}
EXCEPTIONS = {
    # Secret memory is what the core is allowed to ask the kernel for.
    "secret.py": {"ctypes", "errno", "mmap", "os"},
    "sharedsecret.py": {"ctypes", "fcntl", "mmap", "os", "stat"},
    # Random bytes come from the kernel wherever they are needed: a caller who may pass them in may pass them in twice.
    "blinding.py": {"os"},
    "stream.py": {"os"},
    # The word list is data of an installed package, which is found and read as a file.
    "words.py": {"importlib", "pathlib"},
}
SYSTEM_CALLS = {
    "secret.py": {"ftruncate", "close", "strerror"},
    "sharedsecret.py": {
        *("memfd_create", "MFD_CLOEXEC", "MFD_ALLOW_SEALING"),
        *("ftruncate", "fstat", "close", "strerror"),
    },
    "blinding.py": {"urandom"},
    "stream.py": {"urandom"},
}


def test_the_core_imports_nothing_that_has_a_clock_or_reaches_out() -> None:
    unknown = {
        f"{file.name}: {each.top}"
        for file in sources("core")
        for each in imports_of(file.read_text())
        if each.top != "unsealerd"
        and each.top not in PURE
        and each.top not in EXCEPTIONS.get(file.name, set())
    }
    assert unknown == set()


def test_no_exception_of_the_core_is_out_of_date() -> None:
    used: dict[str, set[str]] = {}
    for file in sources("core"):
        used.setdefault(file.name, set()).update(each.top for each in imports_of(file.read_text()))
    assert set().union(*used.values()) >= set(PURE)
    for name, modules in EXCEPTIONS.items():
        assert modules <= used[name]


def test_the_core_makes_no_other_system_call() -> None:
    for file in sources("core"):
        tree = ast.parse(file.read_text())
        calls = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
        }
        assert calls <= SYSTEM_CALLS.get(file.name, set()), file
        called = {
            n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert called & {"open", "print", "input", "exec", "eval", "breakpoint"} == set(), file


def test_nothing_runs_when_a_module_is_imported() -> None:
    """No state and no I/O: a module holds definitions, and constants made by pure expressions."""
    allowed = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
    )
    for file in sources():
        if file.name.endswith("_pb2.py"):
            continue  # generated
        for node in ast.parse(file.read_text()).body:
            text = ast.unparse(node)
            match node:
                case ast.Expr(value=ast.Constant()):
                    continue  # a docstring
                case ast.If() if text.startswith(("if TYPE_CHECKING", "if __name__ == '__main__'")):
                    continue
                case _:
                    assert isinstance(node, allowed), f"{file}: {text[:80]}"


# --- what is loaded, in a fresh interpreter


def loaded(module: str) -> set[str]:
    """The modules that importing `module` loads, beyond those of the interpreter's own start."""
    code = (
        "import sys; before = set(sys.modules)\n"
        f"import {module}\n"
        "print('\\n'.join(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def families(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def third_party(modules: set[str]) -> set[str]:
    return families(modules) - set(sys.stdlib_module_names) - {"unsealerd"}


def test_a_service_loads_no_third_party_module() -> None:
    modules = loaded("unsealerd.client")
    assert third_party(modules) == set()
    assert (
        families(modules) & {"asyncio", "ssl", "http", "urllib", "logging", "dataclasses", "inspect"} == set()
    )
    assert {m for m in modules if m.startswith("unsealerd")} == {
        "unsealerd",
        "unsealerd.client",
        "unsealerd.client.client",
        "unsealerd.client.connection",
        "unsealerd.errors",
        "unsealerd.model",
    }


@pytest.mark.promise(8)
def test_the_daemon_loads_no_network_library_and_nothing_that_it_may_not_need() -> None:
    """Before it is ready, and locked: a start is almost all imports."""
    modules = loaded("unsealerd.daemon.app")
    assert third_party(modules) <= {"msgspec", "typing_extensions"}
    later = {
        "random",
        "secrets",
        "tempfile",
        "http",
        "urllib.request",
        "unsealerd.tpm",
        "unsealerd.proto",
        "unsealerd.cli",
        "unsealerd.core.session",
        "unsealerd.core.words",
        "unsealerd.daemon.adminapi",
        "unsealerd.daemon.report",
        "unsealerd.daemon.unlockapi",
        "unsealerd.daemon.unlocking",
    }
    assert modules & later == set()


def test_what_a_start_loads_has_no_dataclass() -> None:
    """Making one compiles source: twenty times the price of a Struct, and a third of what the daemon's own modules cost."""
    for modules in (loaded("unsealerd.daemon.app"), loaded("unsealerd.tpm.device")):
        own = {module for module in modules if module.startswith("unsealerd.")}
        assert own
        for module in own:
            file = ROOT / f"{module.replace('.', '/')}.py"
            assert not file.exists() or "@dataclass" not in file.read_text(), file


def test_the_daemons_first_modules_load_nothing() -> None:
    """They may run twice: once to set up the environment, and once in it."""
    modules = loaded("unsealerd.daemon.main")
    assert modules <= {
        "gc",
        "unsealerd",
        "unsealerd.daemon",
        "unsealerd.daemon.hygiene",
        "unsealerd.daemon.main",
    }


def test_the_command_loads_its_parts_when_they_are_used() -> None:
    modules = loaded("unsealerd.cli.main")
    assert third_party(modules) <= {"click"}
    assert families(modules) & {"asyncio", "ssl", "tempfile", "logging"} == set()


def test_an_unlock_loads_no_library_of_another_identity() -> None:
    modules = loaded(
        "unsealerd.cli.unlock, unsealerd.operator.network, unsealerd.operator.unlock, unsealerd.operator.hosts"
    )
    assert third_party(modules) <= {"click", "msgspec", "typing_extensions"}
    assert families(modules) & {"tempfile", "asyncio", "ssl", "smartcard", "pkcs11"} == set()


@pytest.mark.promise(8)
def test_the_watcher_has_no_network_and_the_notifier_no_configuration() -> None:
    """The one is root and reads the admin socket; the other reaches the network and knows what it is handed."""
    watcher = loaded("unsealerd.watch.main")
    assert third_party(watcher) <= {"msgspec", "typing_extensions"}
    assert families(watcher) & {"ssl", "http", "urllib", "asyncio"} <= {"urllib"}
    assert "urllib.request" not in watcher
    notifier = loaded("unsealerd.watch.notify")
    assert third_party(notifier) == set()
    assert {module for module in notifier if module.startswith("unsealerd.")} == {
        "unsealerd.errors",
        "unsealerd.model",
        "unsealerd.watch",
        "unsealerd.watch.event",
        "unsealerd.watch.notify",
    }


def test_the_gateway_loads_neither_the_tpm_nor_secret_memory() -> None:
    modules = loaded("unsealerd.gateway.server")
    assert "grpc" in modules
    assert modules & {"unsealerd.core.secret", "unsealerd.core.keyring", "tpm2_pytss"} == set()


def test_the_operators_tool_does_not_load_the_tpm_library() -> None:
    assert "tpm2_pytss" not in families(loaded("unsealerd.operator.unlock, unsealerd.operator.evidence"))
