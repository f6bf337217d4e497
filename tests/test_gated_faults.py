"""Gates of blocks that are not finite, or of the wrong shape: refused by cause, matrix and array, state as before."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from eventrnn.network import Network
from eventrnn.simulation import RECORDABLE, Simulator, simulate
from eventrnn.weights import BlockCSR, Dense, GatedBlocks
from support.conformance import assert_same, assert_same_state
from support.gated import gated, network_of


def cancelling(matrix: str) -> Network:
    """A network whose logits of one matrix are 1 and -1, both chosen, as long as its units are silent."""
    network = Network.random([2], inputs=2, readout=2, rng=np.random.default_rng(0), threshold=0.05)
    weights = gated(network.matrices()[matrix], block=(1, network.matrices()[matrix].shape[1]), density=1.0)
    bias = np.array([1, -1], np.float32)
    return network.with_matrices({matrix: replace(weights, gate=np.zeros((2, 2), np.float32), gate_bias=bias)})


@pytest.mark.parametrize("matrix", ["layers.0.w_in", "layers.0.w_rec", "readout"])
def test_logits_that_cancel_stop_a_run_by_the_name_of_the_matrix(matrix):
    network, x = cancelling(matrix), np.ones((3, 1, 2), np.float32)
    words = f"{matrix}: the gates of its blocks are not finite for some input: the logits of the chosen blocks cancel"
    for options in ({}, {"threads": 2}, {"backend": "reference"}):
        simulator = Simulator(network, **options)
        for call in (lambda s=simulator: s.run(x), lambda s=simulator: s.step(x[0])):
            with pytest.raises(FloatingPointError, match=words):
                call()
            # The state is that of before, and the next call finds the same.
            assert_same_state(simulator.state, Simulator(network).state)
    softmax = replace(network.matrices()[matrix], gate_rule="softmax")
    assert np.isfinite(simulate(network.with_matrices({matrix: softmax}), x).output).all()


def test_a_run_goes_on_after_inputs_whose_gates_were_refused():
    weights = gated(np.ones((2, 6)), block=(1, 6), density=1.0)
    weights = replace(weights, gate=np.array([[0, 0], [0, 1]], np.float32), gate_bias=np.array([1, 0], np.float32))
    network = Network.random([2], inputs=2, rng=np.random.default_rng(0)).with_matrices({"layers.0.w_in": weights})
    simulator, good = Simulator(network), np.array([[1, 1]], np.float32)
    with pytest.raises(FloatingPointError, match=r"layers\.0\.w_in"):
        simulator.step(np.array([[1, -1]], np.float32))
    assert np.array_equal(simulator.step(good), simulate(network, good[None]).output[0])


def test_logits_or_scaled_inputs_beyond_float32_stop_a_run():
    network = network_of(units=(4,), density=1.0)
    x = np.full((1, 1, 5), 3e38, np.float32)
    for backend in ("cpu", "reference"):
        with pytest.raises(FloatingPointError, match=r"layers\.0\.w_in: the gates .*: a logit is not finite"):
            simulate(network, x, backend=backend)
    w_in = network.matrices()["layers.0.w_in"]
    # One block has all of the gates, which are as many as there are blocks.
    bias = np.full_like(w_in.gate_bias, -60)
    bias[0] = 0
    w_in = replace(w_in, gate=np.zeros_like(w_in.gate), gate_bias=bias, gate_rule="softmax")
    for backend in ("cpu", "reference"):
        with pytest.raises(
            FloatingPointError, match=r"layers\.0\.w_in: the gates .*: the largest gate times the largest"
        ):
            simulate(network.with_matrices({"layers.0.w_in": w_in}), x, backend=backend)


@pytest.mark.parametrize("threads", [1, 2])
def test_of_several_causes_the_first_is_named_for_every_number_of_threads(threads):
    # Of two samples, the logits of the first cancel, and one of the second is not finite.
    network, x = cancelling("layers.0.w_in"), np.zeros((1, 2, 2), np.float32)
    weights = network.matrices()["layers.0.w_in"]
    network = network.with_matrices({"layers.0.w_in": replace(weights, gate=np.full((2, 2), 10, np.float32))})
    with pytest.raises(FloatingPointError, match="chosen blocks cancel"):
        simulate(network, x, threads=threads)
    x[0, 1] = 3e38
    with pytest.raises(FloatingPointError, match="a logit is not finite"):
        simulate(network, x, threads=threads)


@pytest.mark.parametrize("array", ["gate", "gate_bias", "gate_out"])
def test_a_gate_that_was_edited_to_nan_is_refused_although_its_unit_is_silent(array):
    network = network_of(units=(4,))
    w_in = network.matrices()["layers.0.w_in"]
    if array == "gate_out":
        factors = np.ones((5, 2), np.float32), np.ones((2, w_in.n_blocks), np.float32)
        network = network.with_matrices({"layers.0.w_in": replace(w_in, gate=factors[0], gate_out=factors[1])})
    x = np.zeros((2, 1, 5), np.float32)
    assert simulate(network, x).steps == 2
    getattr(network.matrices()["layers.0.w_in"], array).reshape(-1)[0] = np.nan
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match=rf"layers\.0\.w_in {array}: got nan"):
            simulate(network, x, backend=backend)


def test_the_shape_of_a_gate_is_checked_before_blocks_are_made(monkeypatch):
    def made(*arguments, **options):
        raise AssertionError("blocks were made")

    monkeypatch.setattr(BlockCSR, "from_dense", made)
    monkeypatch.setattr(BlockCSR, "from_weights", made)
    gate, bias = np.zeros((4, 3), np.float32), np.ones(4, np.float32)
    for weights in (np.ones((4, 4)), Dense.from_dense(np.ones((4, 4)))):
        with pytest.raises(TypeError, match=r"gate: got float32 of shape \(4, 3\), need float32 of shape \(4, 4\)"):
            GatedBlocks.from_weights(weights, block=(2, 2), density=0.5, gate=gate, gate_bias=bias)
        with pytest.raises(ValueError, match="gate_rule: got 'sharp'"):
            GatedBlocks.from_weights(weights, block=(2, 2), density=0.5, gate=gate, gate_bias=bias, gate_rule="sharp")


def test_arrays_that_are_none_are_refused_with_the_way_to_make_the_record():
    weights = gated(np.ones((4, 4)), block=(2, 2), density=0.5)
    for array in ("gate", "values"):
        with pytest.raises(TypeError, match="need a NumPy array; from_dense, of gated blocks from_weights, makes"):
            replace(weights, **{array: [1.0]})


def test_logits_of_zero_are_equal_logits():
    for rule in ("linear", "softmax"):
        network = network_of(rule=rule)
        zero = {
            name: replace(w, gate=np.zeros_like(w.gate), gate_bias=np.zeros_like(w.gate_bias))
            for name, w in network.matrices().items()
        }
        ones = {name: replace(w, gate_bias=np.ones_like(w.gate_bias)) for name, w in zero.items()}
        x = np.ones((5, 2, 5), np.float32)
        assert_same(
            simulate(network.with_matrices(zero), x, record=RECORDABLE),
            simulate(network.with_matrices(ones), x, record=RECORDABLE),
        )
