"""Rules of the house that a linter can check."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "eventrnn").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SCRIPTS = sorted((ROOT / "experiments").rglob("*.py"))
CUDA_DOOR = ROOT / "eventrnn" / "cuda" / "device.py"
OPTIONAL = ("torch", "matplotlib", "hypothesis", "cupy", "numba.cuda", "numba_cuda", "pooch", "joblib", "dask")


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def place(path, node):
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def imported(path):
    """Every name that a file imports, in full, wherever the import stands."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def run_python(code):
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_only_one_file_opens_the_door_to_cuda():
    packages = re.compile(r"(numba\.cuda|numba_cuda|cupy|cuda)\b")

    def opens(path) -> bool:
        # Asked for by name, a package that somebody else has imported is another door.
        asked = [
            node.slice.value
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)
        ]
        return any(packages.match(str(name)) for name in (*imported(path), *asked))

    assert [path for path in PACKAGE if opens(path)] == [CUDA_DOOR]


def test_no_arithmetic_is_left_to_the_compilers_discretion():
    loose = {"fastmath", "fast", "reassoc", "contract", "arcp", "afn", "nnan", "ninf", "nsz"}
    found = []
    for path in PACKAGE + SCRIPTS:
        for node in ast.walk(tree(path)):
            name = {ast.keyword: "arg", ast.Constant: "value", ast.Attribute: "attr", ast.Name: "id"}.get(type(node))
            if name and getattr(node, name) in loose:
                found.append(f"{path.relative_to(ROOT)}: {ast.unparse(node)}")
    assert not found


def test_no_file_is_longer_than_600_lines():
    # A file should hold one idea in up to about 500 lines. At 600 it is time to look for the second idea.
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in PACKAGE + TESTS + SCRIPTS
    }
    assert not {name: lines for name, lines in lengths.items() if lines > 600}


def test_no_test_module_imports_another():
    shared = re.compile(r"(test_\w+|conftest)\b")
    assert not [f"{path.name}: {name}" for path in TESTS for name in imported(path) if shared.match(name)]


def test_nothing_is_left_to_do():
    marks = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error", "x" + "fail")))
    found = [path.relative_to(ROOT) for path in PACKAGE + TESTS + SCRIPTS if marks.search(path.read_text())]
    assert not found


def test_import_is_light():
    """It compiles nothing and brings in no package but numpy, scipy and the model file's."""
    heavy = (*OPTIONAL, "numba", "llvmlite", "rich", "typer", "threadpoolctl")
    code = f"import json, sys, eventrnn; print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    assert run_python(code) == []


def test_no_module_needs_an_optional_package_to_be_imported():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in PACKAGE]
    # Bridges to a package, and what draws examples, are imported by those who have it.
    bridges = re.compile(r"eventrnn\.(cuda|torch|testing)\b")
    code = f"""
import importlib, json, sys
for name in {[name for name in names if not bridges.match(name)]}:
    importlib.import_module(name)
print(json.dumps([name for name in {OPTIONAL} if name in sys.modules]))
"""
    assert run_python(code) == []


def is_number(node):
    """A number, or arithmetic on numbers."""
    if isinstance(node, ast.UnaryOp):
        return is_number(node.operand)
    if isinstance(node, ast.BinOp):
        return is_number(node.left) and is_number(node.right)
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


COMPARERS = {"approx", "allclose", "isclose", "assert_allclose", "assert_almost_equal", "assert_array_almost_equal"}


def test_tolerances_live_in_one_file():
    found = []
    for path in TESTS:
        if path.name == "tolerance.py":
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.keyword) and node.arg in ("atol", "rtol", "abs", "rel") and is_number(node.value):
                found.append(place(path, node.value))
            # Without a tolerance given, these bring their own.
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in COMPARERS:
                found.append(place(path, node))
            if isinstance(node, ast.Compare):
                bounds = [n for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, float)]
                found += [place(path, n) for n in bounds if 0 < abs(n.value) < 0.001]
    assert not found


def public(body):
    return [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")]


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_public_is_documented(path):
    module = tree(path)
    assert ast.get_docstring(module) or not module.body
    assert not [place(path, node) for node in public(module.body) if not ast.get_docstring(node)]


def test_recorded_runs_are_here():
    recorded = {file.name for file in (ROOT / "tests" / "golden").glob("*.npz")}
    assert recorded == {"evnn_a.npz", "evnn_b.npz", "evnn_zero_threshold.npz"}
