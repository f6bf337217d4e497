"""Hypothesis profiles: `--hypothesis-profile=ci` draws more, `few` less; `dev` is the default."""

import importlib

import pytest
from hypothesis import settings

from eventrnn.backend import BackendUnavailable
from eventrnn.cpu import crossover
from eventrnn.cpu.crossover import Crossover

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


def invented_map() -> Crossover:
    """A crossover map of round numbers, in which every way is the fastest somewhere. Nothing is measured for it."""
    times = {}
    for units in crossover.UNITS:
        weight = 1e-10 * 3 * units * units
        shared = {
            "panels": [[weight * (0.5 + 0.3 * rows * a) for a in crossover.ACTIVITY] for rows in crossover.ROWS],
            "every": [[weight * (0.6 + 0.05 * rows)] * len(crossover.ACTIVITY) for rows in crossover.ROWS],
            "blas": [[weight * (0.5 + 0.06 * rows)] * len(crossover.ACTIVITY) for rows in crossover.ROWS],
        }
        rows = [[weight * rows * a for a in crossover.ACTIVITY] for rows in crossover.EACH_ROWS]
        times |= {f"{way}/{units}": table for way, table in (shared | {"rows": rows}).items()}
        for way, price in (("single", 3.0), ("block4", 2.0), ("block16", 1.2), ("block64", 1.0)):
            for density in crossover.DENSITY:
                times[f"{way}/{units}/{density}"] = [[price * density * x for x in line] for line in rows]
    return Crossover(times)


@pytest.fixture(scope="session", autouse=True)
def _crossover_map(tmp_path_factory):
    """No test measures this machine, and none touches the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVENTRNN_CACHE", str(tmp_path_factory.mktemp("cache")))
        crossover.save(invented_map())
        yield
