"""Each promise of the design has a test that says so, and no test is left out or waits for time to pass."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PROMISES = range(1, 12)
LEFT_OUT = {"skip", "skipif", "skipIf", "skipTest", "xfail", "importorskip", "expectedFailure"}
SLEEPS_ON_PURPOSE = {
    "powercut.py": "the instant at which the power is cut is drawn at random",
    "busy.py": "the work that is cut off pauses at random, so that the cut also finds what lies between two changes",
}
"""One sleep each, of the machine test: an instant is not a condition that could be waited for."""
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def files() -> list[Path]:
    found = sorted(TESTS.rglob("*.py"))
    assert len(found) > 20
    return found


def promise_of(node: ast.expr) -> Iterator[int]:
    """The numbers of the promise marks in an expression: a decorator, or what `pytestmark` is."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.promise":
            (number,) = call.args
            value = ast.literal_eval(number)
            assert value in PROMISES, f"there is no promise {value}"
            yield int(value)


def promises_in(source: str) -> dict[int, list[str]]:
    """By promise, the tests that prove it."""
    proofs: dict[int, list[str]] = {}
    tree = ast.parse(source)
    everywhere: list[int] = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            ast.unparse(target) == "pytestmark" for target in node.targets
        ):
            everywhere.extend(promise_of(node.value))
    pending: list[tuple[ast.stmt, list[int]]] = [(node, everywhere) for node in tree.body]
    while pending:
        node, inherited = pending.pop()
        if not isinstance(node, Definition):
            continue
        own = [*inherited, *(number for mark in node.decorator_list for number in promise_of(mark))]
        if isinstance(node, ast.ClassDef):
            if node.name.startswith("Test"):
                pending.extend((inner, own) for inner in node.body)
        elif node.name.startswith("test_"):
            for number in own:
                proofs.setdefault(number, []).append(node.name)
    return proofs


def faults_in(source: str) -> list[str]:
    """What no test may do, with its line."""
    faults: list[str] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr=name) | ast.Name(id=name) if name in LEFT_OUT:
                faults.append(f"{node.lineno}: {name}")
            case ast.ImportFrom(names=names, module=module):
                imported = {alias.name for alias in names}
                if imported & LEFT_OUT or (module == "time" and "sleep" in imported):
                    faults.append(f"{node.lineno}: {ast.unparse(node)}")
            case ast.Attribute(value=ast.Name(id="time"), attr="sleep"):
                faults.append(f"{node.lineno}: time.sleep")
            case _:
                continue
    return faults


# --- the readers read


@pytest.mark.parametrize(
    ("source", "proofs"),
    [
        ("@pytest.mark.promise(3)\ndef test_a(): ...", {3: ["test_a"]}),
        ("@pytest.mark.promise(3)\nasync def test_a(): ...", {3: ["test_a"]}),
        ("pytestmark = pytest.mark.promise(3)\ndef test_a(): ...\ndef helper(): ...", {3: ["test_a"]}),
        ("pytestmark = [pytest.mark.promise(3)]\nclass TestX:\n    def test_a(self): ...", {3: ["test_a"]}),
        ("@pytest.mark.promise(3)\nclass TestX:\n    def test_a(self): ...", {3: ["test_a"]}),
        (
            "@pytest.mark.promise(1)\n@pytest.mark.promise(2)\ndef test_a(): ...",
            {1: ["test_a"], 2: ["test_a"]},
        ),
        ("pytestmark = pytest.mark.promise(3)", {}),
        ("@pytest.mark.promise(3)\ndef helper(): ...", {}),
        ("# pytest.mark.promise(3)\ndef test_a(): ...", {}),
    ],
)
def test_a_mark_is_seen_on_a_test_and_nowhere_else(source: str, proofs: dict[int, list[str]]) -> None:
    assert {number: sorted(names) for number, names in promises_in(source).items()} == {
        number: sorted(names) for number, names in proofs.items()
    }


@pytest.mark.parametrize(
    "source", ["@pytest.mark.promise(12)\ndef test_a(): ...", "pytestmark = pytest.mark.promise(0)"]
)
def test_a_promise_that_is_not_one(source: str) -> None:
    with pytest.raises(AssertionError):
        promises_in(source)


@pytest.mark.parametrize(
    "source",
    [
        "pytest." + "skip('x')",
        "@pytest.mark." + "skipif(True)\ndef test_a(): ...",
        "@pytest.mark." + "xfail\ndef test_a(): ...",
        "pytest." + "importorskip('grpc')",
        "from unittest import " + "skip",
        "time." + "sleep(1)",
        "from time import " + "sleep",
    ],
)
def test_a_fault_is_seen(source: str) -> None:
    assert len(faults_in(source)) == 1


# --- what they find


@pytest.mark.parametrize("promise", PROMISES)
def test_every_promise_has_a_test(promise: int) -> None:
    proofs = [
        f"{file.name}::{name}" for file in files() for name in promises_in(file.read_text()).get(promise, [])
    ]
    assert proofs, f"nothing proves promise {promise}"


def test_no_test_is_left_out_and_none_sleeps() -> None:
    found = {file.name: faults for file in files() if (faults := faults_in(file.read_text()))}
    for name in SLEEPS_ON_PURPOSE:
        (only,) = found.pop(name)
        assert only.endswith(": time.sleep")
    assert found == {}


def test_every_test_file_is_collected() -> None:
    """A file with tests under another name would never run."""
    lost = [
        file.name
        for file in files()
        if not file.name.startswith("test_")
        and any(
            isinstance(n, Definition) and n.name.startswith("test_") for n in ast.parse(file.read_text()).body
        )
    ]
    assert lost == []


def test_no_two_tests_of_a_file_have_one_name() -> None:
    """The second would silently take the place of the first."""
    for file in files():
        names = [n.name for n in ast.parse(file.read_text()).body if isinstance(n, Definition)]
        assert len(names) == len(set(names)), file.name
