"""The specification against recorded runs of the published code (EvNN 0.2, float64)."""

import numpy as np
import pytest

from eventrnn import reference
from support import tolerance
from support.recorded_runs import FILES, GRADIENTS, check_outputs, replay


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def recorded(request):
    with np.load(request.param) as file:
        return dict(file)


def test_reference_outputs_cells_and_events_equal_recorded_runs(recorded):
    check_outputs(recorded)


def test_reference_gradients_equal_recorded_runs(recorded):
    cell, parameters, tapes = replay(recorded)
    gradients = reference.backward(cell, parameters, recorded["x"], tapes, recorded["grad_y"], recorded["grad_h"])
    assert {name for name in recorded if name.startswith("d_")} == set(GRADIENTS.values())
    for ours, theirs in GRADIENTS.items():
        assert gradients[ours].shape == recorded[theirs].shape
        assert np.abs(gradients[ours] - recorded[theirs]).max() <= tolerance.GOLDEN, theirs
        assert np.abs(recorded[theirs]).max() > 0, theirs
