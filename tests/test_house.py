"""Rules of this project that no linter has: imports, compiled code, sizes, documentation and tests."""

import ast
import importlib
import io
import json
import re
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "eventrnn").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SCRIPTS = sorted((ROOT / "experiments").rglob("*.py"))
CUDA_IMPORTS = ROOT / "eventrnn" / "cuda" / "device.py"
OPTIONAL = (
    "torch",
    "matplotlib",
    "hypothesis",
    "cupy",
    "numba.cuda",
    "numba_cuda",
    "pooch",
    "joblib",
    "dask",
    "distributed",
    "optuna",
    "executorlib",
    "mpi4py",
    "neurobench",
)


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


def functions(path):
    """Every function and method of a file, nested ones included."""
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


# --- imports ------------------------------------------------------------------------------------------------


def test_cuda_packages_are_imported_by_one_file():
    packages = re.compile(r"(numba\.cuda|numba_cuda|cupy|cuda)\b")

    def imports_cuda(path) -> bool:
        # `sys.modules["cupy"]` reaches a package as an import does.
        subscripts = [
            node.slice.value
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)
        ]
        return any(packages.match(str(name)) for name in (*imported(path), *subscripts))

    assert [path for path in PACKAGE if imports_cuda(path)] == [CUDA_IMPORTS]


def test_test_modules_import_no_other_test_module():
    shared = re.compile(r"(test_\w+|conftest)\b")
    assert not [f"{path.name}: {name}" for path in TESTS for name in imported(path) if shared.match(name)]


def test_import_eventrnn_compiles_nothing():
    """`import eventrnn` compiles nothing and imports numpy, scipy and safetensors, but no other package."""
    heavy = (*OPTIONAL, "numba", "llvmlite", "rich", "typer", "threadpoolctl")
    code = f"import json, sys, eventrnn; print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    assert run_python(code) == []


def test_modules_import_without_optional_packages():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in PACKAGE]
    # These modules exist for users of an optional package.
    bridges = re.compile(
        r"eventrnn\.(cuda|testing|torch|_figure|counting\.neurobench_layers|training\.data_parallel\.(engine|worker))\b"
    )
    code = f"""
import importlib, json, sys
for name in {[name for name in names if not bridges.match(name)]}:
    importlib.import_module(name)
print(json.dumps([name for name in {OPTIONAL} if name in sys.modules]))
"""
    assert run_python(code) == []


@pytest.mark.parametrize(("name", "package", "extra"), [("testing", "hypothesis", "test"), ("torch", "torch", "torch")])
def test_a_module_for_users_of_a_package_names_it_where_it_is_missing(name, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"eventrnn.{name}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"eventrnn\.{name} needs .*: pip install 'eventrnn\[{extra}\]'"):
        importlib.import_module(f"eventrnn.{name}")


# --- compiled code ------------------------------------------------------------------------------------------


def test_no_compiler_flag_loosens_arithmetic():
    loose = {"fastmath", "fast", "reassoc", "contract", "arcp", "afn", "nnan", "ninf", "nsz"}
    found = []
    for path in PACKAGE + SCRIPTS:
        for node in ast.walk(tree(path)):
            name = {ast.keyword: "arg", ast.Constant: "value", ast.Attribute: "attr", ast.Name: "id"}.get(type(node))
            if name and getattr(node, name) in loose:
                found.append(f"{path.relative_to(ROOT)}: {ast.unparse(node)}")
    assert not found


def decorator_name(node) -> str:
    """`compiled` for each of @compiled, @jit.compiled and @compiled(...)."""
    call = node.func if isinstance(node, ast.Call) else node
    return getattr(call, "attr", getattr(call, "id", ""))


def is_signature(node) -> bool:
    """Whether a function is one of the signatures of `typing.overload`, whose body is `...` alone."""
    return isinstance(node, ast.FunctionDef) and [ast.unparse(each) for each in node.body] == ["..."]


#: Decorators of functions that Numba compiles, on a CPU and on a GPU.
COMPILING = {
    *("compiled", "inlined", "allocating", "intrinsic", "overload", "register_jitable", "njit", "jit", "vectorize"),
    *("guvectorize", "cfunc", "device_function", "kernel", "internal", "called_by_address", "allocating_by_address"),
}


def test_compiled_functions_live_in_kernels_folders():
    # `cuda/device.py` defines the decorators for GPUs and compiles nothing else.
    outside = [path for path in PACKAGE if "kernels" not in path.parts and path != CUDA_IMPORTS]
    found = [
        place(path, function)
        for path in outside
        for function in functions(path)
        if COMPILING & {decorator_name(each) for each in function.decorator_list} and not is_signature(function)
    ]
    assert not found


# --- sizes and types ----------------------------------------------------------------------------------------


def test_constants_are_assigned_once():
    """A column of a table that has the name of a flag silently changes the flag."""
    for path in PACKAGE:
        named = Counter(
            each.id
            for statement in tree(path).body
            if isinstance(statement, ast.Assign)
            for target in statement.targets
            for each in ast.walk(target)
            if isinstance(each, ast.Name) and each.id.isupper()
        )
        assert [name for name, count in named.items() if count > 1] == [], path


def test_no_file_is_longer_than_600_lines():
    # A file should hold one idea in up to about 500 lines. At 600 it is time to look for the second idea.
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in PACKAGE + TESTS + SCRIPTS
    }
    assert not {name: lines for name, lines in lengths.items() if lines > 600}


MOST_PARAMETERS, MOST_KERNEL_PARAMETERS = 12, 20


def test_no_function_takes_too_many_parameters():
    found = []
    for path in PACKAGE:
        most = MOST_KERNEL_PARAMETERS if "kernels" in path.parts else MOST_PARAMETERS
        for function in functions(path):
            given = function.args
            names = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
            found += [f"{place(path, function)} {function.name}: {len(names)}"] if len(names) > most else []
    assert not found


def test_type_checker_skips_at_most_three_patterns():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    assert settings["include"] == ["eventrnn"]
    assert len(settings["ignore"]) <= 3


# --- prose --------------------------------------------------------------------------------------------------


def test_no_unfinished_code():
    marks = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error", "x" + "fail")))
    found = [path.relative_to(ROOT) for path in PACKAGE + TESTS + SCRIPTS if marks.search(path.read_text())]
    assert not found


def public(body):
    return [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")]


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_public_names_have_docstrings(path):
    module = tree(path)
    assert ast.get_docstring(module) or not module.body
    documented = [node for node in public(module.body) if not is_signature(node)]
    assert not [place(path, node) for node in documented if not ast.get_docstring(node)]


def prose(path):
    """(line, text) of every comment and docstring of a file."""
    text = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield node.body[0].lineno, docstring


def test_files_named_in_comments_and_docstrings_exist():
    sources = PACKAGE + TESTS + SCRIPTS
    existing = [f"/{path.relative_to(ROOT).as_posix()}" for path in sources]
    missing = []
    for path in sources:
        for line, text in prose(path):
            named = re.findall(r"[\w./]*\w\.py\b", text)
            wrong = [name for name in named if not any(each.endswith(f"/{name}") for each in existing)]
            missing += [f"{path.relative_to(ROOT)}:{line}: {name}" for name in wrong]
    assert not missing


# --- tests --------------------------------------------------------------------------------------------------


def is_number(node):
    """A number, or arithmetic on numbers."""
    if isinstance(node, ast.UnaryOp):
        return is_number(node.operand)
    if isinstance(node, ast.BinOp):
        return is_number(node.left) and is_number(node.right)
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


COMPARERS = {"approx", "allclose", "isclose", "assert_allclose", "assert_almost_equal", "assert_array_almost_equal"}


def test_tolerances_are_numbers_of_one_file_only():
    found = []
    for path in TESTS:
        if path.name == "tolerance.py":
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.keyword) and node.arg in ("atol", "rtol", "abs", "rel") and is_number(node.value):
                found.append(place(path, node.value))
            # Without a given tolerance, these functions use a default of their own.
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in COMPARERS:
                found.append(place(path, node))
            if isinstance(node, ast.Compare):
                bounds = [n for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, float)]
                found += [place(path, n) for n in bounds if 0 < abs(n.value) < 0.001]
    assert not found


def test_tests_that_need_torch_are_marked():
    found = []
    for path in TESTS:
        for function in functions(path):
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            needs = any(ast.unparse(call).startswith("pytest.importorskip('torch'") for call in calls)
            marked = any(ast.unparse(each) == "pytest.mark.torch" for each in function.decorator_list)
            found += [place(path, function)] if needs and not marked else []
    assert not found


def test_recorded_runs_are_complete():
    recorded = {file.name for file in (ROOT / "tests" / "golden").glob("*.npz")}
    assert recorded == {"evnn_a.npz", "evnn_b.npz", "evnn_zero_threshold.npz"}
