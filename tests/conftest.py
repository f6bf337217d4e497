"""Hypothesis profiles: `--hypothesis-profile=ci` draws more; `dev` is the default."""

from hypothesis import settings

settings.register_profile("dev", max_examples=30, deadline=None, print_blob=True)
settings.register_profile("ci", max_examples=100, deadline=None, print_blob=True)
settings.load_profile("dev")


def pytest_configure(config):
    """A drawn network prints at length when a test fails: that must not hide the failure behind a warning."""
    config.addinivalue_line("filterwarnings", "ignore:Generating overly large repr")
