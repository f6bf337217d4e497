"""Recorded runs of the published code (EvNN 0.2, float64): independent of this project."""

from pathlib import Path

import numpy as np

from eventrnn import reference
from eventrnn.cells import Cell, Surrogate
from support import tolerance

FILES = sorted((Path(__file__).parent.parent / "golden").glob("*.npz"))
#: our name of a gradient -> the recorded one
GRADIENTS = {
    "x": "d_x",
    "y": "d_y0",
    "w_in": "d_kernel",
    "w_rec": "d_recurrent_kernel",
    "bias_in": "d_bias",
    "bias_rec": "d_recurrent_bias",
    "threshold": "d_threshold",
}


def replay(recorded):
    cell = Cell(surrogate=Surrogate("triangle", float(recorded["gamma"]), float(recorded["support"])))
    parameters = {
        "w_in": recorded["kernel"],
        "w_rec": recorded["recurrent_kernel"],
        "bias_in": recorded["bias"],
        "bias_rec": recorded["recurrent_bias"],
        "threshold": recorded["threshold"],
    }
    y0 = recorded["y0"]
    return cell, parameters, reference.forward(cell, parameters, recorded["x"], np.zeros_like(y0), y0)


def check_outputs(recorded) -> None:
    """The specification has the events of a recorded run, and its outputs and cells up to rounding."""
    _, _, tapes = replay(recorded)
    assert np.array_equal([tape.event for tape in tapes], recorded["o"])
    assert np.abs(np.array([tape.y for tape in tapes]) - recorded["y"]).max() <= tolerance.GOLDEN
    assert np.abs(np.array([tape.c for tape in tapes]) - recorded["h"]).max() <= tolerance.GOLDEN
    # Some units fire and some do not, so that the recording exercises the threshold.
    assert 0 < recorded["o"].mean() < 1
