"""Profiles of Hypothesis, the conditions under which tests are skipped, and fixtures that several modules use.

`--hypothesis-profile=ci` draws more examples than the default, `dev`; `few` draws fewer.
"""

import importlib
import sys

import pytest
from hypothesis import settings

from eventrnn.backend import BackendUnavailable
from eventrnn.cpu import crossover
from support.crossover_map import invented_map
from support.texts import TEXT

settings.register_profile("dev", max_examples=30, deadline=None, print_blob=True)
settings.register_profile("ci", max_examples=100, deadline=None, print_blob=True)
# A profile for GPUs, where kernels are compiled for every mixture of formats.
settings.register_profile("few", max_examples=6, deadline=None, print_blob=True)
settings.load_profile("dev")


def pytest_configure(config):
    """Make a warning of Hypothesis no error: it concerns the length of a drawn network in the report of a failure."""
    config.addinivalue_line("filterwarnings", "ignore:Generating overly large repr")


def pytest_collection_modifyitems(items):
    """Skip tests that need a GPU where there is none, with the library's own reason."""
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
    """Keep the tests from measuring this machine and from touching the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVENTRNN_CACHE", str(tmp_path_factory.mktemp("cache")))
        crossover.save(invented_map())
        yield


@pytest.fixture
def cli(monkeypatch, capsys):
    """A function that runs a command: cli("bench", "inference") returns (exit code, stdout, stderr)."""
    # Imported here, because the command line takes long to import and few tests need it.
    from eventrnn.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["eventrnn", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def text(tmp_path):
    """A file with the text `TEXT`."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path
