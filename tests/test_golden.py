"""Recorded runs of the published code (EvNN 0.2, float64), which nobody here wrote."""

from pathlib import Path

import numpy as np
import pytest

from eventrnn import reference
from eventrnn.cells import Cell, Surrogate
from support import tolerance

FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))

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


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def recorded(request):
    with np.load(request.param) as file:
        return dict(file)


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


def test_three_runs_are_there():
    assert len(FILES) == 3


def test_outputs_cells_and_events(recorded):
    _, _, tapes = replay(recorded)
    assert np.array_equal([tape.event for tape in tapes], recorded["o"])
    assert np.abs(np.array([tape.y for tape in tapes]) - recorded["y"]).max() <= tolerance.GOLDEN
    assert np.abs(np.array([tape.c for tape in tapes]) - recorded["h"]).max() <= tolerance.GOLDEN
    # Neither silence nor saturation: the recording exercises the threshold.
    assert 0 < recorded["o"].mean() < 1


def test_every_gradient(recorded):
    cell, parameters, tapes = replay(recorded)
    gradients = reference.backward(cell, parameters, recorded["x"], tapes, recorded["grad_y"], recorded["grad_h"])
    assert {name for name in recorded if name.startswith("d_")} == set(GRADIENTS.values())
    for ours, theirs in GRADIENTS.items():
        assert gradients[ours].shape == recorded[theirs].shape
        assert np.abs(gradients[ours] - recorded[theirs]).max() <= tolerance.GOLDEN, theirs
        assert np.abs(recorded[theirs]).max() > 0, theirs
