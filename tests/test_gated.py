"""Gated blocks: the bits of the specification, by hand and drawn; counts by brute force; what is refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventrnn import cells, cli, io, pruning, reference, reference_products
from eventrnn.cells import Cell
from eventrnn.counting import audit, count, count_per_step
from eventrnn.counting.gated import gates_of_active
from eventrnn.cpu.crossover import AutoBackend
from eventrnn.events import Events
from eventrnn.io.evnn import to_evnn
from eventrnn.io.model_file import encoded
from eventrnn.network import Network, Readout
from eventrnn.simulation import RECORDABLE, Simulator, simulate
from eventrnn.testing import ALL_CELLS, gated_blocks
from eventrnn.training.evaluation import evaluate_text
from eventrnn.weights import CSR, FORMATS, BlockCSR, Dense, GatedBlocks, convert, gate_cost
from support import tolerance
from support.conformance import (
    assert_same,
    assert_same_state,
    cases,
    part,
    records,
    same_bits,
    steps_of,
)
from support.counting import count_executed
from support.crossover_map import invented_map
from support.gated import check_gated, gated, network_of

MIXED = ("gated", "dense", "csr", "block", "nm")


# --- the product by hand ------------------------------------------------------------------------------------


def by_hand(weights: GatedBlocks, x: np.ndarray) -> tuple[np.ndarray, set[int], np.ndarray]:
    """Drive of one input (n_pre,) without bias, its chosen blocks, and their gates, in float64 and in plain loops."""
    (r, c), (_, columns) = weights.block, weights.grid
    gate = weights.gate.astype(np.float64)
    if weights.gate_out is not None:
        gate = gate @ weights.gate_out
    logits = [float(b) for b in weights.gate_bias]
    for b in range(weights.n_blocks):
        logits[b] += sum(float(gate[j, b]) * float(x[j]) for j in range(len(x)))
    ranked = sorted(range(weights.n_blocks), key=lambda b: (-logits[b], b))
    chosen = set(ranked[: weights.kept_blocks])
    values = {b: np.exp(logits[b] - logits[ranked[0]]) if weights.gate_rule == "softmax" else logits[b] for b in chosen}
    mean = sum(values.values()) / weights.n_blocks
    gates = np.array([values[b] / mean if b in chosen else 0.0 for b in range(weights.n_blocks)])
    dense, drive = weights.blocks.to_dense().astype(np.float64), np.zeros(weights.shape[1])
    for j in range(len(x)):
        for i in range(weights.shape[1]):
            drive[i] += dense[j, i] * gates[j // r * columns + i // c] * float(x[j])
    return drive, chosen, gates


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("rule", ["linear", "softmax"])
def test_product_of_small_whole_numbers_is_that_worked_out_by_loops(rule, rank):
    # Gates, inputs and weights are eighths, so that logits are exact; they are positive.
    rng = np.random.default_rng(4)
    for shape, block in (((4, 6), (2, 2)), ((5, 7), (2, 3)), ((3, 2), (3, 1))):
        weights = gated(rng.integers(-3, 4, shape), block=block, density=0.4, rule=rule)
        bias = rng.integers(20, 28, weights.n_blocks).astype(np.float32)
        gate = rng.integers(-8, 9, (shape[0], rank or weights.n_blocks)).astype(np.float32) / 8
        out = None if rank is None else rng.integers(-2, 3, (rank, weights.n_blocks)).astype(np.float32) / 4
        weights = replace(weights, gate=gate, gate_out=out, gate_bias=bias)
        arrays = reference.weight_arrays("w", weights, np.float64)
        for x in rng.integers(-2, 3, (20, shape[0])).astype(np.float64):
            drive, chosen, gates = by_hand(weights, x)
            found = reference_products.block_gates(arrays, x[None])[0]
            assert set(np.flatnonzero(found)) == chosen
            assert len(chosen) == weights.kept_blocks
            got = reference.propagate(arrays, x[None], np.zeros(shape[1]))[0]
            error = tolerance.gate_error(weights.kept_blocks)
            assert (np.abs(found - gates) <= error * gates).all()
            terms = np.abs(weights.blocks.to_dense()).T @ np.abs(x) * gates.max()
            assert (np.abs(got - drive) <= (error + 2 * (len(x) + 2) * tolerance.U64) * terms).all()


def test_of_equal_logits_the_lowest_blocks_are_chosen_and_their_mean_over_all_is_one():
    weights = replace(gated(np.ones((4, 8)), block=(2, 2), density=0.4), gate=np.zeros((4, 8), np.float32))
    weights = replace(weights, gate_bias=np.array([1, 2, 1, 2, 2, 1, 1, 0], np.float32))
    assert weights.kept_blocks == 4
    arrays = reference.weight_arrays("w", weights, np.float32)
    gates = reference_products.block_gates(arrays, np.zeros((1, 4), np.float32))[0]
    # Ratios 1/2, 1, 1, 1 of the chosen logits 1, 2, 2, 2; the first of three ones is chosen.
    assert np.array_equal(gates, np.float32([0.5, 1, 0, 1, 1, 0, 0, 0]) * (np.float32(8) / np.float32(3.5)))


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize(("block_rows", "rows"), [(1, 32), (5, 35), (16, 32), (40, 40), (70, 70)])
def test_logits_are_sums_of_parts_of_whole_blocks(rank, block_rows, rows):
    rng = np.random.default_rng(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        options = {"block": (block_rows, 4), "density": 1.0, "gate_rule": "softmax", "rank": rank, "rng": rng}
        weights = GatedBlocks.from_weights(rng.standard_normal((70, 8)), **options)
    # The third row is silent beyond its first part, and the last row is silent.
    x = rng.standard_normal((4, 70)).astype(np.float32)
    x[1, rng.random(70) < 0.7] = x[2, 3:] = x[3] = 0
    start = weights.gate_bias if rank is None else np.zeros(rank, np.float32)

    def summed(values, parts):
        total = None
        for inputs in parts:
            one = start.copy() if total is None else np.zeros_like(start)
            for j in inputs:
                one = cells.fma(weights.gate[j], values[j], one)
            total = one if total is None else total + one
        return total

    arrays = reference.weight_arrays("w", weights, np.float32)
    found = reference_products.propagate_parts(arrays, x, start)
    in_parts = [range(first, min(first + rows, 70)) for first in range(0, 70, rows)]
    assert same_bits(found, np.array([summed(values, in_parts) for values in x]))
    assert len(in_parts) == 1 or not same_bits(found, np.array([summed(values, [range(70)]) for values in x]))
    # Counts find the choice of a run from its events by another way.
    assert same_bits(gates_of_active("w", weights, x), reference_products.block_gates(arrays, x))


@pytest.mark.parametrize(
    ("density", "blocks", "kept"),
    [(0.07, 100, 7), (np.float32(0.1), 10, 1), (0.1, 10, 1), (1.0, 7, 7), (1e-9, 7, 1)],
)
def test_kept_blocks_round_the_density_as_it_is_written_up(density, blocks, kept):
    assert gated(np.ones((1, blocks)), block=(1, 1), density=density).kept_blocks == kept


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formats", [("gated",), MIXED], ids="+".join)
@given(data=st.data(), threads=st.integers(1, 3), record=records)
def test_runs_have_the_bits_of_the_specification(formats, data, threads, record):
    # Cells whose reset gate comes before the product need another format for their recurrent weights.
    kinds = ALL_CELLS if formats == MIXED else [cell for cell in ALL_CELLS if not cell.reset_first]
    check_gated("cpu", kinds, formats, data, threads, record)


@given(data=st.data(), threads=st.integers(1, 3))
def test_chunks_single_steps_and_single_samples_have_the_bits_of_one_run(data, threads):
    case = data.draw(cases(formats=("gated",), cells=[Cell()], max_units=60, max_steps=100))
    steps = steps_of(case.inputs)
    whole = case.simulator().run(case.inputs, record=RECORDABLE)
    cut = data.draw(st.integers(0, steps))
    chunked = case.simulator(threads=threads)
    parts = [chunked.run(part(case.inputs, slice(a, b))) for a, b in ((0, cut), (cut, steps))]
    assert np.array_equal(whole.output, np.concatenate([p.output for p in parts]))
    assert_same_state(whole.state, chunked.state)
    stepped = case.simulator(threads=threads)
    dense = case.inputs.to_dense() if isinstance(case.inputs, Events) else case.inputs
    for t in range(steps):
        assert np.array_equal(stepped.step(dense[t]), whole.output[t])
    assert_same_state(whole.state, stepped.state)


@pytest.mark.parametrize("period", [1, 3])
def test_samples_of_different_lengths_have_the_bits_of_runs_of_their_own(period):
    network = network_of(period=period)
    x = np.random.default_rng(1).standard_normal((9, 3, 5)).astype(np.float32)
    lengths = [4, 9, 0]
    whole = simulate(network, x, lengths=lengths, record="events")
    for b, steps in enumerate(lengths):
        own = simulate(network, x[:steps, b : b + 1], record="events")
        assert same_bits(whole.output[:steps, b], own.output[:, 0])
        assert all(held.left[b] == own.state.gates[name].left[0] for name, held in whole.state.gates.items())
    counts = count(network, whole)
    apart = [count(network, simulate(network, x[:n, b : b + 1], record="events")) for b, n in enumerate(lengths)]
    for name, matrix in counts.matrices.items():
        assert matrix == sum((each.matrices[name] for each in apart[1:]), apart[0].matrices[name])
    assert counts.matrices["readout"].chosen == 13 * network.matrices()["readout"].kept_blocks
    assert audit(network, whole, counts).agrees


@pytest.mark.parametrize("block", [(128, 128), (32, 300), (50, 64)])
def test_wide_blocks_and_many_drive_rows_equal_the_specification(block):
    # Blocks of several register tiles and pieces, block rows and columns that are cut, more rows than go together.
    rng = np.random.default_rng(2)
    network = Network.random([150], inputs=130, readout=300, rng=rng, threshold=0.1)
    network = network.with_matrices({name: gated(w, block=block) for name, w in network.matrices().items()})
    x = (rng.standard_normal((3, 70, 130)) * (rng.random((3, 70, 130)) < 0.4)).astype(np.float32)
    expected = simulate(network, x[:, :4], backend="reference", record=RECORDABLE)
    for threads in (1, 3):
        assert_same(expected, simulate(network, x[:, :4], threads=threads, record=RECORDABLE))
    assert np.array_equal(simulate(network, x).output[:, :4], expected.output)


@pytest.mark.parametrize("rule", ["linear", "softmax"])
@pytest.mark.parametrize("blocks", [(3, 5), (2, 2)])
def test_all_blocks_with_equal_gates_are_the_layer_without_gates(rule, blocks):
    rng = np.random.default_rng(5)
    network = Network.random([21, 10], inputs=7, readout=6, rng=rng, threshold=0.05)
    x = rng.standard_normal((30, 2, 7)).astype(np.float32)
    matrices = {name: gated(w, block=blocks, density=1.0, rule=rule) for name, w in network.matrices().items()}
    equal = {
        name: replace(w, gate=np.zeros_like(w.gate), gate_bias=np.full_like(w.gate_bias, 0.1))
        for name, w in matrices.items()
    }
    expected = simulate(network, x, record=RECORDABLE)
    assert expected.activity[1] > 0.02
    assert_same(expected, simulate(network.with_matrices(equal), x, threads=2, record=RECORDABLE))


@pytest.mark.parametrize("period", [1, 3])
def test_auto_runs_gated_blocks_as_they_are_stored(period):
    network, x = network_of(period=period), np.random.default_rng(1).standard_normal((9, 3, 5)).astype(np.float32)
    for exact in (True, False):
        result = simulate(network, x, backend=AutoBackend(exact, invented_map()), record=RECORDABLE)
        assert set(result.paths.values()) == {"stored"}
        assert_same(simulate(network, x, record=RECORDABLE), result)


@pytest.mark.parametrize("period", [1, 3])
def test_copies_of_a_simulator_go_on_with_the_same_bits(period):
    network, x = network_of(period=period), np.random.default_rng(1).standard_normal((9, 1, 5)).astype(np.float32)
    simulator = Simulator(network)
    simulator.run(x[:4])
    others = [copy.deepcopy(simulator), pickle.loads(pickle.dumps(simulator))]
    expected = simulator.run(x[4:]).output
    assert all(np.array_equal(other.run(x[4:]).output, expected) for other in others)


# --- counts -------------------------------------------------------------------------------------------------


def brute_counts(weights: GatedBlocks, x: np.ndarray, gates: np.ndarray, fresh: bool) -> dict[str, int]:
    """The counts of an input (n_pre,) with gates (blocks,), in loops over units and blocks; fresh: whether it chose."""
    (r, c), (_, columns) = weights.block, weights.grid
    dense, fired = weights.blocks.to_dense(), np.flatnonzero(x)
    stored = {
        (row, int(column))
        for row in range(weights.grid[0])
        for column in weights.indices[weights.indptr[row] : weights.indptr[row + 1]]
    }
    n = {
        "dense": dense.size,
        "effective": 0,
        "executed": 0,
        "weight_bytes": 4 * weights.gate.shape[1] * len(fired) if fresh else 4 * weights.kept_blocks,
        "selection": weights.gate.shape[1] * len(fired) + 2 * weights.kept_blocks if fresh else 0,
        "chosen": weights.kept_blocks,
        "binary": 0,
    }
    if fresh and weights.gate_out is not None:
        n["weight_bytes"] += 4 * weights.gate_out.size
        n["selection"] += weights.gate_out.size
    blocks = set()
    for j in fired:
        mine = [b for b in stored if b[0] == j // r and gates[b[0] * columns + b[1]] != 0]
        for row, column in mine:
            blocks.add((row, column))
            n["executed"] += c
            n["effective"] += int(np.count_nonzero(dense[j, column * c : (column + 1) * c]))
            n["weight_bytes"] += c * weights.values.itemsize + 4
            n["selection"] += 1
        n["weight_bytes"] += 4 * (bool(mine) and weights.storage == "int8")
    return n | {"blocks": len(blocks), "graded": n["effective"]}


@settings(max_examples=8)
@given(case=cases(formats=MIXED, cells=[Cell()], max_units=8, max_batch=2, max_steps=3))
def test_counts_equal_brute_force(case):
    simulation = case.simulator().run(case.inputs, record="events")
    counts, per_step = count(case.network, simulation), count_per_step(case.network, simulation)
    below = simulation.inputs.to_dense()
    for k in range(len(case.network.layers)):
        sent = simulation.events[k].to_dense()
        carried = np.concatenate([case.state.outputs[k][None], sent[:-1]])
        check_brute(case, counts, per_step, f"layers.{k}.w_in", below)
        check_brute(case, counts, per_step, f"layers.{k}.w_rec", carried)
        below = sent
    if case.network.readout is not None:
        check_brute(case, counts, per_step, "readout", below)
    assert audit(case.network, simulation, counts).agrees


def check_brute(case, counts, per_step, name, sent):
    weights = case.network.matrices()[name]
    if not isinstance(weights, GatedBlocks):
        rows = sent.reshape(-1, weights.shape[0])
        assert counts.matrices[name].executed == sum(count_executed(weights, x) for x in rows)
        return
    total: dict[str, int] = {}
    arrays, held = reference.weight_arrays("w", weights, np.float32), case.state.gates.get(name)
    gates = [None] * sent.shape[1] if held is None else list(held.gates)
    left = [0] * sent.shape[1] if held is None else held.left.tolist()
    for t, b in np.ndindex(sent.shape[:2]):
        fresh = left[b] == 0
        if fresh:
            gates[b], left[b] = reference_products.block_gates(arrays, sent[t, b][None])[0], weights.gate_period
        left[b] -= 1
        for quantity, value in brute_counts(weights, sent[t, b], gates[b], fresh).items():
            assert per_step[name][quantity][t, b] == value, (name, quantity, t, b)
            total[quantity] = total.get(quantity, 0) + value
    assert total == {quantity: getattr(counts.matrices[name], quantity) for quantity in total}


def test_counts_of_gated_blocks_need_recorded_events():
    network, x = network_of(), np.ones((3, 1, 5), np.float32)
    with pytest.raises(ValueError, match=r'layers\.0\.w_in: which of its gated blocks .* run with record="events"'):
        count(network, simulate(network, x))
    run = simulate(network, x, record="events")
    wrong = count(network, run)
    readout = replace(wrong.matrices["readout"], blocks=wrong.matrices["readout"].blocks + 1)
    assert not audit(network, run, replace(wrong, matrices={**wrong.matrices, "readout": readout})).agrees


def test_texts_are_evaluated_and_counted():
    rng = np.random.default_rng(0)
    network = Network.random([8], symbols=5, embedding=4, readout=5, rng=rng, threshold=0.05)
    network = network.with_matrices({name: gated(w) for name, w in network.matrices().items()})
    symbols = rng.integers(0, 5, 40)
    figures = evaluate_text(network, symbols)
    run = simulate(network, symbols[:-1, None], record="events")
    total = count(network, run).total
    assert figures["executed_ops_per_step"] == total.executed / 39
    assert figures["selection_ops_per_step"] == total.selection / 39 > 0
    plain = network.with_matrices({name: w.blocks for name, w in network.matrices().items()})
    assert "selection_ops_per_step" not in evaluate_text(plain, symbols)


# --- what a gate costs --------------------------------------------------------------------------------------


def test_cost_of_a_gate_is_density_plus_the_share_of_the_gate():
    cost = gate_cost((1536, 4608), block=(128, 128), density=0.5)
    assert (cost.blocks, cost.kept) == (432, 216)
    assert (cost.gate, cost.products, cost.padding) == (0.09375, 0.5, 0)
    assert cost.pays and "costs 9.4% of the matrix" in str(cost) and "together 59.4%" in str(cost)
    # 1536 / side^2 < 0.5 from 56 on, and padding asks for no more here.
    assert not gate_cost((1536, 4608), block=(55, 55), density=0.5).pays
    assert cost.smallest_block is not None
    assert gate_cost((1536, 4608), block=(cost.smallest_block,) * 2, density=0.5).pays
    assert all(not gate_cost((1536, 4608), block=(n, n), density=0.5).pays for n in range(1, cost.smallest_block))
    assert gate_cost((1536, 4608), block=(128, 128), density=1.0).smallest_block is None


def test_a_gate_of_two_factors_costs_its_rank_per_input_and_block():
    cost = gate_cost((1536, 4608), block=(32, 32), density=0.5, rank=16)
    assert cost.blocks == 6912
    assert cost.gate == 16 * (1536 + 6912) / (1536 * 4608)
    assert cost.pays and "the gate of rank 16 of 32x32 blocks" in str(cost)
    weights = GatedBlocks.from_weights(
        np.ones((96, 288)), block=(16, 16), density=0.5, rng=np.random.default_rng(0), rank=3
    )
    assert (weights.gate.shape, weights.gate_out.shape) == ((96, 3), (3, 108))
    assert repr(weights).endswith("54 of 108 blocks per input, linear gate of rank 3, 27648 weights)")


def test_blocks_that_do_not_divide_are_padded_and_reported():
    cost = gate_cost((10, 30), block=(4, 16), density=0.5)
    assert cost.padding == 1 - 300 / (3 * 2 * 64)
    assert "21.9% of the blocks is padding, because 4x16 does not divide 10x30" in str(cost)


def test_a_gate_that_costs_more_than_it_saves_is_a_warning_with_numbers():
    with pytest.warns(UserWarning, match=r"costs 150\.0% of the matrix.*blocks pay from 16x16 on"):
        GatedBlocks.from_weights(np.ones((96, 288)), block=(8, 8), density=0.5, rng=np.random.default_rng(0))
    with pytest.warns(UserWarning, match="no square block pays at density 1"):
        GatedBlocks.from_weights(np.ones((96, 288)), block=(8, 8), density=1, rng=np.random.default_rng(0))


# --- the record ---------------------------------------------------------------------------------------------


@given(st.tuples(st.integers(1, 12), st.integers(1, 20)).flatmap(gated_blocks))
def test_records_keep_blocks_storage_and_sizes(weights):
    weights.check(full=True)
    weights.check_index()
    inner = weights.blocks
    assert inner.values is weights.values
    assert np.array_equal(weights.fan_out(), inner.fan_out())
    assert (weights.nnz, weights.stored, weights.storage) == (inner.nnz, inner.stored, inner.storage)
    out = 0 if weights.gate_out is None else weights.gate_out.nbytes
    assert weights.nbytes == inner.nbytes + weights.gate.nbytes + weights.gate_bias.nbytes + out
    assert np.array_equal(weights.row_bytes(), inner.row_bytes() + 4 * weights.gate.shape[1])
    gate = {name: getattr(weights, name) for name in ("gate", "gate_bias", "gate_out", "gate_rule", "density")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        again = GatedBlocks.from_weights(inner, block=weights.block, **gate)
    assert again.storage == weights.storage
    assert np.array_equal(again.blocks.to_dense(), inner.to_dense())
    for storage in ("bfloat16", "int8"):
        assert np.array_equal(weights.stored_as(storage).floats(), inner.stored_as(storage).floats())


@settings(max_examples=15)
@given(case=cases(formats=MIXED, max_units=9))
def test_model_files_keep_every_bit(tmp_path_factory, case):
    path = tmp_path_factory.mktemp("models") / "model.evr"
    io.save(case.network, path)
    again = io.load(path)
    for name, weights in case.network.matrices().items():
        other = again.matrices()[name]
        assert (type(other), other.options()) == (type(weights), weights.options())
        pairs = zip(weights.arrays().items(), other.arrays().items(), strict=True)
        assert all(a == b and same_bits(x, y) for (a, x), (b, y) in pairs)
    assert encoded(again) == path.read_bytes()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"density": 0}, ValueError, r"density: got 0, need a share of kept blocks in \(0, 1\]"),
        ({"density": 1.01}, ValueError, r"density: got 1\.01, need"),
        ({"density": float("nan")}, ValueError, "density: got nan, need"),
        ({"density": True}, ValueError, "density: got True, need"),
        ({"block": (9, 2)}, ValueError, "block: 9x2 is larger than the matrix 4x6"),
        ({"block": (0, 2)}, ValueError, "block: got"),
        ({"gate_period": 0}, ValueError, "gate_period: got 0, need a whole number 1 to 2147483647"),
        ({"gate_period": 1.5}, ValueError, r"gate_period: got 1\.5, need a whole number"),
        ({"gate_rule": "tanh"}, ValueError, "gate_rule: got 'tanh', need one of linear, softmax"),
        ({"rng": None}, ValueError, "gate: give gate and gate_bias, or an rng"),
        ({"gate": np.ones((4, 6))}, ValueError, "gate: give gate and gate_bias, or an rng"),
        ({"rng": None, "gate": np.ones((4, 5)), "gate_bias": np.ones(6)}, TypeError, r"gate: got .* shape \(4, 6\)"),
        ({"rng": None, "gate": np.ones((4, 6)), "gate_bias": np.ones(5)}, TypeError, r"gate_bias: got .* shape \(6,\)"),
        ({"rng": None, "gate": np.full((4, 6), np.nan), "gate_bias": np.ones(6)}, ValueError, "gate: got nan at"),
        ({"rank": 0}, ValueError, "rank: got 0, need a whole number >= 1"),
        (
            {"rng": None, "gate": np.ones((4, 6)), "gate_bias": np.ones(6), "rank": 2},
            ValueError,
            "rank: got 2, but only",
        ),
        ({"gate_out": np.ones((2, 6))}, ValueError, "gate_out: got one together with an rng"),
        (
            {"rng": None, "gate": np.ones((4, 3)), "gate_bias": np.ones(6), "gate_out": np.ones((2, 6))},
            TypeError,
            r"gate: got .* shape \(4, 2\)",
        ),
        (
            {"rng": None, "gate": np.ones((4, 1)), "gate_bias": np.ones(6), "gate_out": np.ones((0, 6))},
            ValueError,
            r"gate_out: got shape \(0, 6\), need \(rank, blocks\) with a rank >= 1",
        ),
        (
            {"rng": None, "gate": np.ones((4, 1)), "gate_bias": np.ones(6), "gate_out": 1.0},
            ValueError,
            "gate_out: got float64",
        ),
        ({"rng": 3}, TypeError, "rng: got 3 .*need a numpy Generator"),
    ],
)
def test_wrong_arguments_are_refused_by_name(changes, error, words):
    options = {"block": (2, 2), "density": 0.5, "rng": np.random.default_rng(0)} | changes
    with pytest.raises(error, match=words):
        GatedBlocks.from_weights(np.ones((4, 6)), **options)


def test_gates_that_are_not_finite_are_refused_by_a_network():
    network = network_of()
    weights = network.matrices()["readout"]
    bad = replace(weights, gate_bias=np.full_like(weights.gate_bias, np.inf))
    with pytest.raises(ValueError, match="readout gate_bias: got inf at"):
        network.with_matrices({"readout": bad})


def test_no_conversion_drops_a_gate():
    weights = gated(np.ones((4, 6)))
    for name in FORMATS:
        options = {"block": {"block": (2, 2)}, "nm": {"nm": (2, 2, "post")}}.get(name, {})
        with pytest.raises(TypeError, match="convert its `blocks`, the matrix without gates"):
            convert(weights, name, **options)
    with pytest.raises(ValueError, match=r"'gated', which needs a gate: GatedBlocks\.from_weights"):
        convert(np.ones((4, 6)), "gated")
    for make in (
        weights.to_dense,
        weights.places,
        lambda: CSR.from_weights(weights),
        lambda: BlockCSR.from_weights(weights, block=(2, 2)),
    ):
        with pytest.raises(TypeError, match="gated blocks have no equal matrix"):
            make()
    with pytest.raises(TypeError, match="which have a gate already"):
        GatedBlocks.from_weights(weights, block=(2, 2), density=0.5, rng=np.random.default_rng(0))


def test_what_needs_a_matrix_refuses_gated_blocks_by_name():
    network = network_of(units=(6,))
    x = np.ones((3, 2, 5), np.float32)
    words = r"layers\.0\.w_in: {} cannot take gated blocks"
    with pytest.raises(TypeError, match=words.format("the blas backend")):
        simulate(network, x, backend="blas")
    with pytest.raises(TypeError, match=words.format("pruning without training")):
        pruning.prune(network, 0.5)
    with pytest.raises(TypeError, match=words.format("a dense network")):
        network.dense()
    with pytest.raises(TypeError, match="w_in: the layout of EvNN cannot take gated blocks"):
        to_evnn(network.layers[0])
    layer = Network.random([6], inputs=5, rng=np.random.default_rng(0), cell=Cell(variant="paper")).layers[0]
    with pytest.raises(ValueError, match="w_rec: got gated blocks, but egru/paper multiplies"):
        replace(layer, w_rec=gated(layer.w_rec))
    table = np.ones((4, 6), np.float32)
    readout = Readout(gated(np.ones((6, 4))), np.zeros(4, np.float32), tied=True)
    square = Network.random([6], symbols=4, embedding=6, readout=4, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="readout: tied, but its weights are not the transposed embedding"):
        replace(square, embedding=table, readout=readout)


@pytest.mark.parametrize("command", [["prune"], ["convert", "--to", "csr"]], ids=lambda words: words[0])
def test_commands_refuse_gated_blocks_of_a_model_file_in_a_line(command, tmp_path, monkeypatch, capsys):
    path = tmp_path / "model.evr"
    io.save(network_of(units=(6,)), path)
    monkeypatch.setattr("sys.argv", ["eventrnn", *command, str(path), "--out", str(tmp_path / "made.evr")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "the matrix without gates" in capsys.readouterr().err
    assert not (tmp_path / "made.evr").exists()


def test_repr_names_the_gate():
    assert repr(gated(np.ones((4, 6)))) == "GatedBlocks(4x6 2x2, 3 of 6 blocks per input, linear gate, 24 weights)"
    padded = repr(gated(np.ones((5, 6))))
    assert padded == "GatedBlocks(5x6 2x2, 5 of 9 blocks per input, linear gate, 16.7% padding, 30 weights)"
    assert isinstance(gated(Dense(np.ones((4, 6), np.float32))).blocks, BlockCSR)
