"""Hypothesis profiles: `--hypothesis-profile=ci` draws more, `few` less; `dev` is the default."""

import importlib

import pytest
from hypothesis import settings

from eventrnn.backend import BackendUnavailable
from eventrnn.cpu import crossover
from support.crossover_map import invented_map

settings.register_profile("dev", max_examples=30, deadline=None, print_blob=True)
settings.register_profile("ci", max_examples=100, deadline=None, print_blob=True)
# For a GPU, whose kernels are compiled anew for every mixture of formats.
settings.register_profile("few", max_examples=6, deadline=None, print_blob=True)
settings.load_profile("dev")


def pytest_configure(config):
    """A drawn network prints at length when a test fails: that must not hide the failure behind a warning."""
    config.addinivalue_line("filterwarnings", "ignore:Generating overly large repr")


def pytest_collection_modifyitems(items):
    """What needs a GPU is skipped where there is none, with the reason that the library gives."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    try:
        importlib.import_module("eventrnn.cuda.device").current_device()
    except BackendUnavailable as error:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=str(error)))


@pytest.fixture(scope="session", autouse=True)
def _crossover_map(tmp_path_factory):
    """No test measures this machine, and none touches the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVENTRNN_CACHE", str(tmp_path_factory.mktemp("cache")))
        crossover.save(invented_map())
        yield
