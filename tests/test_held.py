"""Edits in place of a network's arrays: refused while a simulator has packed them, and seen by the next run."""

import gc
import pickle
from dataclasses import replace

import numpy as np
import pytest

from eventrnn import CSR, NM, BlockCSR, Cell, Dense, GatedBlocks, Network, Simulator, simulate
from eventrnn._arrays import hold
from eventrnn.cpu import step_table
from support.gated import gated

FORMATS = {
    "dense": Dense.from_dense,
    "csr": CSR.from_dense,
    "block": lambda dense: BlockCSR.from_dense(dense, block=(1, 8)),
    "nm": lambda dense: NM.from_dense(dense, 2, 4),
    "gated": lambda dense: gated(dense, block=(4, 8), rule="softmax"),
}
# Cells with dense matrices.
PLAIN = ("gru", "lstm")

SYMBOLS = np.random.default_rng(1).integers(0, 7, (20, 2))


def network_of(name: str) -> Network:
    """A network whose matrices have that format, with half of the weights of every group of four; or of that cell."""
    sizes = {"symbols": 7, "embedding": 8, "readout": 8, "rng": np.random.default_rng(0)}
    if name in PLAIN:
        return Network.random([16], **sizes, cell=Cell(name))
    made = Network.random([16], **sizes, threshold=0.05)

    def pruned(dense):
        dense[:, 2::4] = dense[:, 3::4] = 0
        return FORMATS[name](dense)

    return made.with_matrices({each: pruned(weights.to_dense()) for each, weights in made.matrices().items()})


def values_of(network: Network) -> dict[str, np.ndarray]:
    """The arrays of numbers of a network by name."""
    layer, readout = network.layers[0], network.readout
    named = {name: weights.values for name, weights in network.matrices().items()}
    for name, weights in network.matrices().items():
        if isinstance(weights, GatedBlocks):
            named |= {f"{name} gate": weights.gate, f"{name} gate_bias": weights.gate_bias}
    named |= {"bias_in": layer.bias_in, "bias_rec": layer.bias_rec}
    if layer.cell.thresholded:
        named["threshold"] = layer.threshold
    return named | {"embedding": network.embedding, "readout.bias": readout.bias}


def anew(network: Network) -> Network:
    """A network of copies of the arrays."""
    matrices = {
        name: replace(weights, **{key: array.copy() for key, array in weights.arrays().items()})
        for name, weights in network.matrices().items()
    }
    copy = network.with_matrices(matrices)
    layer = copy.layers[0]
    vectors = {name: getattr(layer, name).copy() for name in ("bias_in", "bias_rec", "threshold")}
    readout = replace(copy.readout, bias=copy.readout.bias.copy())
    return replace(copy, layers=(replace(layer, **vectors),), embedding=copy.embedding.copy(), readout=readout)


@pytest.mark.parametrize("name", [*FORMATS, *PLAIN])
def test_an_edit_is_refused_while_a_simulator_exists_and_allowed_afterwards(name):
    network = network_of(name)
    simulator, second = Simulator(network, batch=2), Simulator(network)
    before = simulator.run(SYMBOLS).output
    del second
    for array in network.arrays():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    simulator.reset()
    assert np.array_equal(simulator.run(SYMBOLS).output, before)
    del simulator
    gc.collect()
    for array in values_of(network).values():
        array[...] = 0
    assert not simulate(network, SYMBOLS).output.any()


@pytest.mark.parametrize("name", [*FORMATS, *PLAIN])
def test_an_edit_between_two_runs_is_seen(name):
    network = network_of(name)
    before = simulate(network, SYMBOLS).output
    for edited in values_of(network).values():
        kept = edited.copy()
        edited[...] = edited[::-1] * np.float32(0.5) + np.float32(0.25)
        after = simulate(network, SYMBOLS).output
        assert np.array_equal(after, simulate(anew(network), SYMBOLS).output)
        assert not np.array_equal(after, before)
        edited[...] = kept
    assert np.array_equal(simulate(network, SYMBOLS).output, before)


@pytest.mark.parametrize("edited", ["values", "bias_in", "threshold", "readout.bias", "readout"])
def test_a_number_that_an_edit_made_nan_is_refused_by_the_run(edited):
    network = network_of("dense")
    named = values_of(network) | {"values": network.layers[0].w_in.values}
    named[edited][...] = np.nan
    with pytest.raises((FloatingPointError, ValueError), match="not finite|got nan"):
        simulate(network, SYMBOLS)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("csr", "indices", "outside"),
        ("csr", "indptr", "indptr"),
        ("block", "indices", "outside"),
        ("block", "indptr", "indptr"),
    ],
)
def test_an_index_that_an_edit_made_wrong_is_refused_by_the_run(name, array, message):
    network = network_of(name)
    getattr(network.layers[0].w_rec, array)[-1] = 1000
    with pytest.raises(ValueError, match=message):
        simulate(network, SYMBOLS)


def test_codes_of_nm_weights_cannot_be_edited():
    codes = NM.from_dense(np.eye(4, dtype=np.float32), 1, 4, "pre").codes.copy()
    weights = NM(codes, np.ones(4, np.float32), (4, 4), 1, 4, "pre")
    assert weights.fan_out().tolist() == [1, 1, 1, 1]
    codes[...] = 0
    for each in (weights, pickle.loads(pickle.dumps(weights)), replace(weights)):
        with pytest.raises(ValueError, match="read-only"):
            each.codes[...] = 0
        assert each.fan_out().tolist() == [1, 1, 1, 1]


class Owner:
    """What holds arrays."""


def test_arrays_are_held_together_with_what_they_are_views_of_and_only_as_long_as_needed():
    flat, own = np.zeros(12), np.zeros(3)
    views, constant = [flat[:6].reshape(2, 3), flat[6:]], np.zeros(2)
    constant.flags.writeable = False
    first, second = Owner(), Owner()
    hold(first, [*views, own, constant])
    hold(second, [views[1]])
    with pytest.raises(ValueError, match="read-only"):
        flat[0] = 1
    del first
    own[...] = 1
    views[0][...] = 1
    with pytest.raises(ValueError, match="read-only"):
        flat[6] = 1
    with pytest.raises(ValueError, match="read-only"):
        views[1][0] = 1
    del second
    flat[...] = 1
    views[0][...] = 2
    views[1][...] = 3
    assert not constant.flags.writeable


def test_kernels_read_a_copy_of_symbols():
    simulator = Simulator(network_of("dense"), batch=2)
    # The events of the used rows of the embedding first, then of the whole embedding.
    for _ in range(2):
        assert not np.shares_memory(simulator.engine.prepare(SYMBOLS).values, SYMBOLS)
    simulator.step(SYMBOLS[0])
    assert np.array_equal(simulator._stepper.arrays[step_table.INPUT_ROW_OF], SYMBOLS[0])
