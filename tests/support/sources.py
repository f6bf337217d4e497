"""What a kernel that was kept on disk is made of."""

from __future__ import annotations

import importlib
import pkgutil
import sys

from eventrnn import _kernel_files as kernel_files


def check_sources(*packages):
    """Check that the files which decide over a kernel that was kept are all that the modules of packages import."""
    for package in map(importlib.import_module, packages):
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(found.name)
            within = kernel_files._imported(found.name)
            for value in vars(module).values():
                # Modules, and functions and classes of other modules; a kernel is a function too.
                name = value.__name__ if isinstance(value, type(sys)) else getattr(value, "__module__", None)
                if str(name).startswith("eventrnn.") and name not in kernel_files.KEEPERS:
                    assert name in within, f"{found.name} uses {name}"
            assert not {each for each in within if each.startswith(("eventrnn.cli", "eventrnn.io"))}
            assert found.name in within
