"""EvNN's packing of a layer, in and out."""

from pathlib import Path

import numpy as np
import pytest

from eventrnn import io
from eventrnn.cells import Cell, Surrogate
from eventrnn.network import Network
from eventrnn.simulation import simulate
from eventrnn.state import State

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))


@pytest.fixture(params=GOLDEN, ids=lambda file: file.stem)
def recorded(request):
    with np.load(request.param) as arrays:
        return dict(arrays)


def test_evnn_parameters_arrive_where_they_belong(recorded):
    layer = io.from_evnn(recorded)
    for here, there in (
        (layer.w_in.values, "kernel"),
        (layer.w_rec.values, "recurrent_kernel"),
        (layer.bias_in, "bias"),
        (layer.bias_rec, "recurrent_bias"),
        (layer.threshold, "threshold"),
    ):
        assert np.array_equal(here, recorded[there].astype(np.float32))
    rule = layer.cell.surrogate
    assert (rule.kind, rule.dampening, rule.support) == ("triangle", recorded["gamma"], recorded["support"])
    assert layer.cell.variant == "evnn"


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_imported_layer_fires_as_the_published_code_did(recorded, backend):
    assert np.array_equal(events_of(io.from_evnn(recorded), recorded, backend), recorded["o"])


def test_recorded_events_detect_swapped_gates(recorded):
    def swapped(array):
        z, r, g = np.split(array, 3, axis=-1)
        return np.concatenate([r, z, g], axis=-1)

    wrong = recorded | {k: swapped(recorded[k]) for k in ("kernel", "recurrent_kernel", "bias", "recurrent_bias")}
    assert not np.array_equal(events_of(io.from_evnn(wrong), recorded, "cpu"), recorded["o"])


def events_of(layer, recorded, backend):
    y0 = recorded["y0"].astype(np.float32)
    run = simulate(
        Network((layer,)),
        recorded["x"],
        state=State((np.zeros_like(y0),), (y0,)),
        backend=backend,
        record="events",
    )
    return run.events[0].to_dense() != 0


def test_to_evnn_and_back(recorded):
    layer = io.from_evnn(recorded)
    exported = io.to_evnn(layer)
    assert exported["dampening_factor"].shape == exported["pseudo_derivative_support"].shape == (1,)
    again = io.from_evnn(exported)
    assert io.to_evnn(again).keys() == exported.keys()
    for name, array in io.to_evnn(again).items():
        assert array.dtype == np.float32 and np.array_equal(array, exported[name]), name


def test_to_evnn_refuses_unsupported_networks():
    rng = np.random.default_rng(0)
    for cell in (Cell(variant="paper"), Cell(surrogate=Surrogate("gaussian"))):
        with pytest.raises(ValueError, match="EvNN has 'evnn' with 'triangle'"):
            io.to_evnn(Network.random([3], rng=rng, inputs=2, cell=cell).layers[0])


def test_from_evnn_separates_threshold_and_surrogate():
    arrays = {
        "kernel": np.zeros((2, 9)),
        "recurrent_kernel": np.zeros((3, 9)),
        "bias": np.zeros(9),
        "recurrent_bias": np.zeros(9),
    }
    layer = io.from_evnn(arrays, threshold=0.25, dampening=0.5, support=2.0)
    assert layer.threshold.tolist() == [0.25] * 3
    assert (layer.cell.surrogate.dampening, layer.cell.surrogate.support) == (0.5, 2.0)
    assert io.from_evnn(arrays, threshold=[0.1, 0.2, 0.3]).cell.surrogate == Surrogate()
    for change, message in (
        ({"kernel": np.zeros((2, 6))}, r"kernel: got shape \(2, 6\), need \(2, 9\)"),
        ({"kernel": np.zeros(9)}, r"kernel: got shape \(9,\)"),
        ({"recurrent_kernel": np.zeros((4, 9))}, r"recurrent_kernel: got shape \(4, 9\), need \(4, 12\)"),
        ({"recurrent_kernel": np.float64(1)}, r"recurrent_kernel: got shape \(\)"),
        ({"bias": np.zeros(3)}, r"bias: got shape \(3,\), need \(9,\)"),
        ({"recurrent_bias": np.full(9, np.nan)}, "recurrent_bias: got nan at position"),
        ({"kernel": np.full((2, 9), 1e300)}, "kernel as float32: got inf at position"),
    ):
        with pytest.raises(ValueError, match=message):
            io.from_evnn(arrays | change, threshold=0.25)
    with pytest.raises(ValueError, match="threshold: got shape"):
        io.from_evnn(arrays, threshold=[0.1, 0.2])
    with pytest.raises(ValueError, match="arrays: no thr or threshold among bias, kernel"):
        io.from_evnn(arrays)
