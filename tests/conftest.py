"""Hypothesis profiles: `--hypothesis-profile=ci` draws more; `dev` is the default."""

from hypothesis import settings

settings.register_profile("dev", max_examples=30, deadline=None, print_blob=True)
settings.register_profile("ci", max_examples=150, deadline=None, print_blob=True)
settings.load_profile("dev")
