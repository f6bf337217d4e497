"""Public names are imported when they are first used, and are the same for a type checker and for a program."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import eventrnn

SOURCE = Path(eventrnn.__file__).read_text(encoding="utf-8")

#: module and name of every import that a type checker sees
STATIC = re.findall(r"^    from eventrnn\.(\S+) import (\w+) as \2$", SOURCE, re.MULTILINE)

#: every module that a type checker sees without an import of its own
STATIC_MODULES = re.findall(r"^    from eventrnn import (\w+) as \1$", SOURCE, re.MULTILINE)


def test_every_name_is_that_of_its_module_for_programs_and_type_checkers():
    assert len(STATIC) > 25 and eventrnn.__all__ == [name for _, name in STATIC]
    for module, name in STATIC:
        assert getattr(eventrnn, name) is getattr(import_module(f"eventrnn.{module}"), name)
    names = {}
    exec("from eventrnn import *", names)
    assert {name for _, name in STATIC} <= set(names) & set(dir(eventrnn))


def test_modules_need_no_import_of_their_own():
    assert len(STATIC_MODULES) > 10 and set(STATIC_MODULES) == eventrnn._MODULES <= set(dir(eventrnn))
    code = (
        "import eventrnn as er; print(er.io.load is er.load, er.pruning.prune.__name__, er.training.Settings.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "prune", "Settings"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'eventrnn' has no attribute 'simulat'"):
        _ = eventrnn.simulat  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["trian"]])
def test_the_list_of_commands_waits_for_no_compiler(arguments):
    """Nor does the completion of a shell, which asks for the same."""
    code = "\n".join(
        [
            "import json, sys",
            "from eventrnn.cli import main",
            "try: main()",
            "except SystemExit: print(json.dumps(sorted({each.partition('.')[0] for each in sys.modules})))",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert "typer" in imported and not imported & {"numba", "scipy", "torch", "matplotlib", "rich"}
