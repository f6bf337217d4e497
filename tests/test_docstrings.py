"""The examples in docstrings run, and print what they say."""

import doctest
import importlib
import warnings
from pathlib import Path

import numpy as np
import pytest

import eventrnn

PACKAGE = Path(eventrnn.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if "    >>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    given = {"np": np, "eventrnn": eventrnn, **vars(module)}
    with warnings.catch_warnings():
        # A gate never pays at the size of an example.
        warnings.filterwarnings("ignore", message="gated blocks: the gate of")
        failed, tried = doctest.testmod(module, extraglobs=given)
    assert tried and not failed


def test_there_are_examples():
    assert len(MODULES) >= 10
