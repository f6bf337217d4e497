"""Cells without thresholds, the GRU and the LSTM: worked steps, PyTorch, counts, pruning, and refusals.

The conformance suite (`test_backends.py`, `test_ragged.py`) draws them among the other cells; `test_plain_training.py`
trains them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from eventrnn.cells import EQUATIONS, Cell, Surrogate
from eventrnn.counting import audit, count
from eventrnn.io import to_evnn
from eventrnn.network import Layer, Network
from eventrnn.pruning import BlockDiagonal, Blocks, magnitude_masks, prune, prune_to
from eventrnn.simulation import Simulator, simulate
from eventrnn.state import State
from eventrnn.training import LanguageModelling, Model, Regularisers, Settings, Trainer
from eventrnn.weights import BlockCSR, Dense, MatrixId
from support import tolerance
from support.plain_cells import bounded, each_cell, numbers, random_network, said, torch_module
from support.worked_steps import check_gru_step, check_lstm_step

# --- one step, by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["after", "before"])
def test_gru_step_by_hand(variant):
    check_gru_step(variant)


def test_lstm_step_by_hand():
    check_lstm_step()


@each_cell
def test_a_unit_without_any_drive_is_silent_and_its_zero_is_positive(cell):
    rows = cell.gates
    zeros = np.zeros(rows, np.float32)
    w_in, w_rec = Dense(np.full((1, rows), -1, np.float32)), Dense(np.zeros((1, rows), np.float32))
    # A candidate of -0 comes from a bias of -0.
    network = Network((Layer(w_in, w_rec, -zeros, zeros, zeros[:1], cell),))
    for backend in ("reference", "cpu", "blas"):
        run = simulate(network, np.array([0, 0, 2, 0], np.float32)[:, None, None], backend=backend, record="events")
        assert run.events[0].to_dense()[:, 0, 0].astype(bool).tolist() == [False, False, True, True]
        assert not np.signbit(run.output[:2]).any()


def test_an_output_of_minus_one_is_a_binary_event():
    # Saturated gates: the GRU takes over its candidate, -1, at once.
    zeros = np.zeros((1, 3), np.float32)
    bias = np.array([-100, 0, -100], np.float32)
    network = Network((Layer(Dense(zeros), Dense(zeros), bias, zeros[0], zeros[0, :1], Cell("gru")),))
    for backend in ("reference", "cpu", "blas"):
        run = simulate(network, np.zeros((4, 1, 1), np.float32), backend=backend, record="events")
        assert (run.output == -1).all()
        assert run.fired[0].binary.tolist() == [4] and run.fired[0].graded.tolist() == [0]
        assert audit(network, run).agrees


# --- PyTorch ------------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("cell", [Cell("gru"), Cell("lstm")], ids=said)
def test_outputs_are_those_of_pytorch(cell):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    network, x = random_network(cell), numbers(5, 3, 5)
    module = torch_module(network)
    with torch.no_grad():
        expected, last = module(torch.from_numpy(x.astype(np.float64)))
    run, bound = simulate(network, x), bounded(network, x)
    for t, each in enumerate(bound):
        assert (np.abs(run.output[t] - expected[t].numpy()) <= each.error).all()
    assert max(each.error.max() for each in bound) <= tolerance.SHARPEST_MARGIN
    # PyTorch's state is ours: h, and for the LSTM h and c.
    theirs = last if cell.name == "lstm" else (last, last)
    for ours, parts in zip((run.state.outputs, run.state.cells), theirs, strict=True):
        size = max(np.abs(part).max() for part in ours)
        for part, expected_part in zip(ours, parts.numpy(), strict=True):
            assert np.abs(part - expected_part).max() <= tolerance.SHARPEST_MARGIN * max(1, size)


# --- counts, pruning ----------------------------------------------------------------------------------------


@each_cell
def test_counts_are_those_of_the_definitions(cell):
    network = prune(random_network(cell, units=(8, 6), readout=3), 0.5)
    x = numbers(7, 2, 5)
    run = simulate(network, x, record="events")
    counts, rows = count(network, run), 14
    assert run.activity == (1.0, 1.0)
    # The zero state sends nothing into the first step.
    carried = [rows * n - 2 * n for n in (8, 6)]
    products = {"after": 3, "before": 2, "standard": 3}[cell.variant]
    first = cell.variant == "before"
    assert list(counts.gate_ops) == [
        rows * n * products + first * sent for n, sent in zip((8, 6), carried, strict=True)
    ]
    assert list(counts.state_bytes) == [rows * n * (16 if first else 12) for n in (8, 6)]
    assert counts.matrices["layers.1.w_in"].dense == rows * 8 * cell.gates * 6
    assert counts.matrices["layers.0.w_rec"].effective == (rows - 2) * network.layers[0].w_rec.nnz
    assert audit(network, run, counts).agrees


@each_cell
def test_each_gate_is_pruned_by_the_same_share(cell):
    network = prune(random_network(cell, units=(8,), inputs=6), 0.5, gates="each")
    for name, weights in network.matrices().items():
        assert name.gates == cell.gates
        kept = np.split(weights.to_dense() != 0, cell.gates, axis=1)
        assert {int(part.sum()) for part in kept} == {kept[0].size // 2}
    shared = prune(random_network(cell, units=(8,), inputs=6), 0.5, gates="shared").layers[0].w_in.to_dense()
    assert len({(part != 0).tobytes() for part in np.split(shared, cell.gates, axis=1)}) == 1


@each_cell
@pytest.mark.parametrize("pattern", [None, Blocks(0.5, gates="each")], ids=["prune", "prune_to"])
def test_gates_are_those_of_the_cell_when_matrices_are_named(cell, pattern):
    # The rows of 9 units and 4 gates can also be divided by 3. A name that the caller writes states no number of gates.
    network, names = random_network(cell, units=(9,), inputs=6), ("layers.0.w_in",)
    if pattern is None:
        pruned = prune(network, 0.5, gates="each", names=names)
    else:
        pruned = prune_to(network, pattern, names=names)
    kept = np.split(pruned.layers[0].w_in.to_dense() != 0, cell.gates, axis=1)
    assert [int(part.sum()) for part in kept] == [27] * cell.gates
    assert pruned.layers[0].w_rec is network.layers[0].w_rec


@each_cell
def test_every_gate_has_a_diagonal_of_its_own(cell):
    network = random_network(cell, units=(8,), inputs=6)
    pruned = prune_to(network, BlockDiagonal(2))
    for name, weights in pruned.matrices().items():
        old, n_pre = network.matrices()[name].to_dense(), weights.shape[0]
        assert isinstance(weights, BlockCSR) and weights.block == (n_pre // 2, 4)
        assert weights.stored == weights.nnz == old.size // 2
        for gate, kept in zip(*(np.split(w, cell.gates, axis=1) for w in (old, weights.to_dense())), strict=True):
            assert np.array_equal(kept[: n_pre // 2, :4], gate[: n_pre // 2, :4]) and not kept[: n_pre // 2, 4:].any()
            assert np.array_equal(kept[n_pre // 2 :, 4:], gate[n_pre // 2 :, 4:]) and not kept[n_pre // 2 :, :4].any()
    # The parts of a recurrent matrix are cells of their own: what one half is told does not reach the other.
    x, halves = np.zeros((4, 2, 6), np.float32), (slice(0, 4), slice(4, 8))
    x[1, 0, :3] = 3
    run = simulate(pruned, x, record="events").events[0].to_dense()
    reached = [bool((run[:, 0, half] != run[:, 1, half]).any()) for half in halves]
    assert reached == [True, False]
    counts = count(pruned, simulate(pruned, x, record="events")).matrices["layers.0.w_rec"]
    assert 2 * counts.executed <= counts.dense and counts.executed == counts.effective


def test_a_diagonal_that_a_matrix_cannot_have_is_refused():
    dense = numbers(6, 32)
    with pytest.raises(ValueError, match=r"parts: got 7, but layers.0.w_in has 6 inputs and 8 outputs per gate"):
        BlockDiagonal(7).mask(MatrixId("layers.0.w_in", 4), dense)
    with pytest.raises(ValueError, match="layers.0.w_in: this name does not state the number of gates"):
        BlockDiagonal(2).mask("layers.0.w_in", dense)
    with pytest.raises(ValueError, match="the 32 gate rows of layers.0.w_in are not those of 3 gates"):
        BlockDiagonal(2).mask(MatrixId("layers.0.w_in", 3), dense)
    # Groups that the parts do not divide differ by at most one unit.
    mask = BlockDiagonal(4).mask("readout", numbers(6, 9))
    assert [len(set(map(bytes, each))) for each in (mask, mask.T)] == [4, 4]
    assert set(mask.sum(axis=0)) == {1, 2} and set(mask.sum(axis=1)) == {2, 3}


def test_names_that_state_no_gates_are_refused_where_gates_matter():
    dense = numbers(6, 36)
    for gates in ("each", "shared"):
        with pytest.raises(ValueError, match="layers.0.w_in: this name does not state the number of gates; take it"):
            magnitude_masks({"layers.0.w_in": dense}, 0.5, gates=gates)
    with pytest.raises(ValueError, match="gates: the 36 gate rows of layers.0.w_in are not those of 5 gates"):
        magnitude_masks({MatrixId("layers.0.w_in", 5): dense}, 0.5, gates="each")
    for gates in (3, 4):
        mask = magnitude_masks({MatrixId("layers.0.w_in", gates): dense}, 0.5, gates="each")["layers.0.w_in"]
        assert {int(part.sum()) for part in np.split(mask, gates, axis=1)} == {108 // gates}
    assert magnitude_masks({"layers.0.w_in": dense}, 0.5)["layers.0.w_in"].sum() == 108


def test_a_larger_lstm_forgets_no_state():
    # The cell of an LSTM may exceed 1; the state after a run has both parts, and a run from it goes on.
    network, x = random_network(Cell("lstm")), numbers(30, 2, 5)
    network = replace(network, layers=tuple(replace(each, bias_in=each.bias_in + 2) for each in network.layers))
    whole, simulator = simulate(network, x), Simulator(network, batch=2)
    parts = [simulator.run(x[:11]), simulator.run(x[11:])]
    assert np.array_equal(whole.output, np.concatenate([part.output for part in parts]))
    assert max(np.abs(part).max() for part in whole.state.cells) > 1 > np.abs(whole.output).max()


# --- refusals -----------------------------------------------------------------------------------------------


@each_cell
def test_thresholds_and_surrogates_are_refused(cell):
    with pytest.raises(ValueError, match=f"surrogate: got Surrogate.*'boxcar'.*{cell.name!r} have no threshold"):
        replace(cell, surrogate=Surrogate("boxcar"))
    options = {"inputs": 2, "rng": np.random.default_rng(0), "cell": cell}
    with pytest.raises(
        ValueError, match=f"threshold: got 0.3, but a cell {cell.name!r} has no thresholds; leave it out"
    ):
        Network.random([3], threshold=0.3, **options)
    layer = Network.random([3], threshold=0, **options).layers[0]
    with pytest.raises(ValueError, match=r"threshold: got 0.5 at unit 1, but a cell .* give zeros"):
        replace(layer, threshold=np.array([0, 0.5, 0], np.float32))
    edited = Network((layer,))
    layer.threshold[0] = 1
    with pytest.raises(ValueError, match="threshold of layer 0: a cell .* has none; set it back to zeros"):
        simulate(edited, np.zeros((1, 1, 2), np.float32))


def test_names_and_variants_of_the_cells():
    assert [Cell(name).variant for name in EQUATIONS] == ["evnn", "after", "standard"]
    assert [Cell(name).gates for name in EQUATIONS] == [3, 3, 4]
    assert Cell("gru", "") == Cell("gru") == Cell("gru", "after")
    for variant in ("paper", None):
        with pytest.raises(ValueError, match=f"variant: got {variant!r}, need one of after, before"):
            Cell("gru", variant)
    with pytest.raises(ValueError, match="w_rec: got shape"):
        replace(random_network(Cell("gru")).layers[0], cell=Cell("lstm"))
    assert repr(random_network(Cell("lstm")).layers[0]).startswith("Layer(9 lstm/standard units, w_in=Dense(5x36")


def test_a_gru_whose_cells_are_not_its_outputs_is_refused():
    network = random_network(Cell("gru"))
    state = State.zeros(network, 1)
    state.cells[1][0, 2] = 0.5
    with pytest.raises(ValueError, match="state of layer 1: got cell 0.5 and output 0.0 at sample 0, unit 2"):
        simulate(network, np.zeros((1, 1, 5), np.float32), state=state)
    simulator = Simulator(network)
    with pytest.raises(ValueError, match="give the outputs as cells"):
        simulator.state = state
    assert not simulator.state.cells[1].any()


@each_cell
def test_what_needs_events_above_a_threshold_is_refused_by_name(cell):
    network = random_network(cell, units=(3,), readout=2)
    x = np.zeros((1, 1, 5), np.float32)
    named = f"layer 0 has the cell {cell.name!r}, whose units have no threshold; "
    with pytest.raises(ValueError, match=f"carry: got 'events', but {named}use carry='state'"):
        simulate(network, x, carry="events", window=1)
    text = Network.random([3], symbols=4, embedding=2, readout=4, rng=np.random.default_rng(0), cell=cell)
    symbols = np.random.default_rng(1).integers(0, 4, 100)
    for options, instead in (
        ({"activity_cost": 0.1}, "leave it out"),
        ({"backward": "sparse"}, "use backward='auto'"),
        ({"regularisers": Regularisers(activity_rate=0.1)}, "leave it out"),
        ({"regularisers": Regularisers(state=0.1)}, "leave it out"),
    ):
        with pytest.raises(ValueError, match=f": got .*, but {named}{instead}"):
            Trainer(text, symbols, Settings(steps=2, batch=2, window=5, **options))
    with pytest.raises(ValueError, match=f"carry: got 'events', but {named}use carry='state'"):
        Trainer(text, LanguageModelling(symbols, carry="events"), Settings(steps=2, batch=2, window=5))
    output, _, tape = Model(network).forward(x, State.zeros(network, 1))
    with pytest.raises(ValueError, match=f"activity_cost: got 0.1, but {named}leave it out"):
        Model(network).backward(tape, output, activity_cost=0.1)
    with pytest.raises(ValueError, match=f"layer: got the cell {cell.name!r}; a layer of EvNN has the cell 'egru'"):
        to_evnn(network.layers[0])
