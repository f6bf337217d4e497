"""Helpers that several test modules share. Test modules import from here, never from each other."""

import pkgutil

import pytest

# A failed `assert` in a helper shows its operands, as one in a test module does.
pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)))
