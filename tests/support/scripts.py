"""The scripts in experiments/, as modules of a test."""

import importlib
import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def script(name, monkeypatch):
    """Import a script as a fresh module; it can import the other scripts."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    own = (
        "records",
        "result_lines",
        "claim_lines",
        "activity_claims",
        "pruning_claims",
        "ptb_figures",
        "ptb_measures",
        "ptb_tuning",
        "ptb_arrangement",
    )
    for each in (name, *own):
        monkeypatch.delitem(sys.modules, each, raising=False)
    return importlib.import_module(name)
