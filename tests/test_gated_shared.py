"""Choices of gated blocks that some steps share: which steps choose, what a state holds, counts, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from eventrnn import reference_products
from eventrnn.counting import audit, count, count_per_step
from eventrnn.cpu.single_product import Product
from eventrnn.events import Events
from eventrnn.folding import fold
from eventrnn.network import Network
from eventrnn.reference import weight_arrays
from eventrnn.simulation import RECORDABLE, Simulator, simulate
from eventrnn.state import HeldGates, State
from eventrnn.testing import Divergence, assert_equivalent
from eventrnn.weights import gate_cost
from support.conformance import assert_same, assert_same_state
from support.gated import gated, network_of

RNG = np.random.default_rng(3)
X = RNG.standard_normal((11, 3, 5)).astype(np.float32)
NAMES = ("layers.0.w_in", "layers.0.w_rec", "layers.1.w_in", "layers.1.w_rec", "readout")


def joined(states: list[State]) -> State:
    """Samples side by side."""
    parts = zip(*(state.arrays() for state in states), strict=True)
    return states[0].with_arrays([np.concatenate(each) for each in parts])


# --- which steps choose -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_inputs_that_stay_for_a_period_choose_as_in_every_step(backend):
    # Only the matrix of the inputs has gates, so that nothing else changes within a period.
    network = Network.random([6], inputs=5, readout=4, rng=np.random.default_rng(0), threshold=0.05)
    w_in, runs = 3 * network.layers[0].w_in.to_dense(), []
    for period in (1, 4):
        own = network.with_matrices({"layers.0.w_in": gated(w_in, density=0.3, period=period)})
        runs.append(simulate(own, np.repeat(X[:3], 4, axis=0), backend=backend, record=RECORDABLE))
    assert np.array_equal(runs[0].output, runs[1].output)
    # Of inputs that change, the steps between two choices have other blocks.
    every, shared = (
        simulate(network.with_matrices({"layers.0.w_in": gated(w_in, density=0.3, period=period)}), X)
        for period in (1, 4)
    )
    assert np.array_equal(every.output[0], shared.output[0])
    assert not np.array_equal(every.output[1], shared.output[1])


def test_a_step_between_two_choices_has_the_gates_of_the_last_one():
    blocks = weight_arrays("w", gated(np.ones((5, 6)), density=0.5, period=3), np.float32)
    held, x = HeldGates.zeros(3, 9), X.copy()
    held = replace(held, left=np.array([0, 1, 2]))
    for t in range(7):
        step = reference_products.gates_of_step(blocks, x[t], held)
        assert np.array_equal(step.fresh, [t % 3 == 0, t % 3 == 1, t % 3 == 2])
        expected = reference_products.block_gates(blocks, x[t])
        assert all(np.array_equal(step.gates[b], expected[b] if step.fresh[b] else held.gates[b]) for b in range(3))
        held = step


def test_silent_steps_choose_and_count_as_others():
    # No unit and no input sends anything: the biases of the gates choose.
    network, x = network_of(period=4), np.zeros((10, 2, 5), np.float32)
    silent = tuple(replace(layer, threshold=np.full_like(layer.threshold, 9)) for layer in network.layers)
    network = replace(network, layers=silent)
    expected = simulate(network, x, backend="reference", record=RECORDABLE)
    assert not any(expected.activity)
    for threads in (1, 2):
        assert_same(expected, simulate(network, x, threads=threads, record=RECORDABLE))
    assert all(held.left.tolist() == [2, 2] and held.gates.any() for held in expected.state.gates.values())
    counts = count(network, expected)
    assert counts.matrices["readout"].selection == 2 * 3 * 2 * network.matrices()["readout"].kept_blocks
    assert audit(network, expected, counts).agrees


# --- what a state holds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_streams_that_are_joined_choose_in_steps_of_their_own(threads):
    network, alone = network_of(period=4), []
    states = [State.zeros(network, 1), simulate(network, X[:3, 1:2]).state, simulate(network, X[:6, 2:]).state]
    assert [state.gates["readout"].left.tolist() for state in states] == [[0], [1], [2]]
    together = Simulator(network, batch=3, state=joined(states), threads=threads)
    result = together.run(X, record=RECORDABLE)
    for b, state in enumerate(states):
        alone.append(Simulator(network, state=state))
        assert np.array_equal(alone[b].run(X[:, b : b + 1]).output[:, 0], result.output[:, b])
    assert_same_state(joined([each.state for each in alone]), together.state)
    assert_same(Simulator(network, batch=3, state=joined(states), backend="reference").run(X), result, record=())
    counts = count(network, result)
    assert audit(network, result, counts).agrees
    fresh = count_per_step(network, result)["readout"]["selection"][:, 0] > 12
    assert np.array_equal(fresh, np.arange(11) % 4 == 0)


def test_a_reset_and_a_state_that_is_set_choose_anew_or_go_on():
    network = network_of(period=4)
    simulator, other = Simulator(network, batch=3), Simulator(network, batch=3)
    first = simulator.run(X[:6])
    other.state = simulator.state
    assert np.array_equal(simulator.run(X[6:]).output, other.run(X[6:]).output)
    simulator.reset()
    assert np.array_equal(simulator.run(X[:6]).output, first.output)
    # A caller's edit of a state does not reach the simulator.
    state = simulator.state
    state.gates["readout"].gates[:] = 0
    assert simulator.state.gates["readout"].gates.any()


def test_windows_that_carry_events_only_keep_held_gates():
    network, window = network_of(period=3), {"carry": "events", "window": 4}
    whole = Simulator(network, batch=3, **window).run(X, record="events")
    assert_same(Simulator(network, batch=3, backend="reference", **window).run(X, record="events"), whole, {"events"})
    assert whole.state.gates["readout"].left.tolist() == [1, 1, 1]
    assert audit(network, whole).agrees


@pytest.mark.parametrize("how", ["run", "step"])
def test_a_call_that_raises_leaves_held_gates_as_they_were(how):
    # The second input is too large for the largest gate, 9 of 9 blocks.
    weights = gated(np.ones((5, 6)), density=0.01, period=5)
    network = Network.random([2], inputs=5, rng=np.random.default_rng(0)).with_matrices({"layers.0.w_in": weights})
    simulators = [Simulator(network, backend=backend) for backend in ("cpu", "reference")]
    for each in simulators:
        getattr(each, how)(X[0, :1] if how == "step" else X[:1, :1])
    before = [each.state for each in simulators]
    assert_same_state(*before)
    large = np.full((1, 5), 3e38, np.float32)
    for each, state in zip(simulators, before, strict=True):
        with pytest.raises(FloatingPointError, match=r"layers\.0\.w_in: .* the largest gate times the largest input"):
            getattr(each, how)(large if how == "step" else large[None])
        assert_same_state(each.state, state)


# --- what is refused ----------------------------------------------------------------------------------------


def changed_gates(state: State, **changes) -> State:
    return replace(state, gates={**state.gates, "readout": replace(state.gates["readout"], **changes)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: State(s.cells, s.outputs),
            r"state gates: got those of none, need those of layers\.0\.w_in, .*readout",
        ),
        (lambda s: replace(s, gates={**s.gates, "w": s.gates["readout"]}), r"got those of .*readout, w, need those of"),
        (
            lambda s: replace(s, gates=3),
            r"state gates: got 3 \(int\), need a mapping of names of matrices to HeldGates",
        ),
        (lambda s: replace(s, gates=dict.fromkeys(s.gates)), r"gates of layers\.0\.w_in: got NoneType, need HeldGates"),
        (
            lambda s: changed_gates(s, left=np.array([0, 1, 3])),
            "gates of readout, left: got 0 to 3, need 0 to 2",
        ),
        (lambda s: changed_gates(s, left=np.array([0, -1, 0])), "left: got -1 to 0, need 0 to 2"),
        (lambda s: changed_gates(s, left=np.zeros(2, int)), r"left: got int64 \(2,\), need whole numbers \(3,\)"),
        (lambda s: changed_gates(s, left=np.zeros(3)), r"left: got float64 \(3,\)"),
        (lambda s: changed_gates(s, left=None), "left: got NoneType"),
        (lambda s: changed_gates(s, gates=np.zeros((3, 2))), r"readout: got float64 \(3, 2\), need float \(3, 8\)"),
        (lambda s: changed_gates(s, gates=np.full((3, 8), np.nan)), "gates of readout: got nan at"),
    ],
)
def test_a_state_that_holds_other_gates_is_refused_by_name(change, words):
    network = network_of(period=3)
    state = State.zeros(network, 3)
    assert tuple(state.gates) == NAMES
    with pytest.raises((ValueError, TypeError), match=words):
        Simulator(network, batch=3, state=change(state))
    with pytest.raises(ValueError, match="need those of none"):
        Simulator(network_of(), batch=3, state=state)


def test_engines_refuse_gates_of_other_shapes():
    network = network_of(period=3)
    simulator, state = Simulator(network, batch=3), State.zeros(network, 3)
    for wrong in (changed_gates(state, left=np.zeros(2, np.int64)), State(state.cells, state.outputs)):
        for call in (simulator.engine.stepper, lambda s: simulator.engine.run(simulator.engine.prepare(X), s)):
            with pytest.raises(ValueError, match="state gates"):
                call(wrong)


def test_what_chooses_in_every_step_refuses_a_period_by_name():
    words = Network.random([6], symbols=4, embedding=5, readout=4, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"fold: layers\.0\.w_in has gate_period=2: .* earlier symbols"):
        fold(words.with_matrices({"layers.0.w_in": gated(words.layers[0].w_in, period=2)}))
    square = gated(np.ones((4, 12)), period=2)
    with pytest.raises(ValueError, match="weights: got GatedBlocks.*every 2 steps.* has no step before it"):
        Product(square, Events.from_dense(np.ones((1, 1, 4), np.float32)))


# --- cost and comparison ------------------------------------------------------------------------------------


def test_a_gate_that_steps_share_costs_each_of_them_a_share():
    options = {"block": (32, 32), "density": 0.5}
    every, shared = gate_cost((1536, 4608), **options), gate_cost((1536, 4608), **options, period=4)
    assert (every.gate, shared.gate, shared.products) == (1.5, 0.375, every.products)
    assert shared.pays and not every.pays
    assert "a matrix 1536x4608, used for 4 steps, costs 37.5% of the matrix" in str(shared)
    # 1536 / (4 * side^2) < 0.5 from 28 on, and 1536 / side^2 from 56 on, whose padding costs too much.
    assert (every.smallest_block, shared.smallest_block) == (57, 28)
    with pytest.raises(ValueError, match="period: got 0, need a whole number"):
        gate_cost((1536, 4608), **options, period=0)
    weights = gated(np.ones((4, 6)), period=4)
    assert weights.gate_cost.period == 4
    assert repr(weights).endswith("3 of 6 blocks per input, linear gate every 4 steps, 24 weights)")
    made = weights.with_numbers(np.ones((4, 6)), weights.gate, weights.gate_bias)
    assert made.gate_period == weights.stored_as("int8").gate_period == 4


def test_selection_of_a_run_falls_with_the_period():
    found = {}
    for period in (1, 2, 11):
        network = network_of(period=period)
        found[period] = count(network, simulate(network, X, record="events"))
        step = count_per_step(network, simulate(network, X, record="events"))["layers.0.w_in"]
        assert int(step["selection"].sum()) == found[period].matrices["layers.0.w_in"].selection
    assert found[1].total.selection > found[2].total.selection > found[11].total.selection
    # The logits of inputs that are all active, once in 11 steps, and a product per unit and executed block.
    w_in = found[11].matrices["layers.0.w_in"]
    blocks = network.matrices()["layers.0.w_in"]
    assert w_in.selection == 3 * (5 * blocks.n_blocks + 2 * blocks.kept_blocks) + w_in.executed // 2


def test_runs_that_hold_other_gates_in_the_end_are_told_apart():
    network = network_of(period=4)
    same = [Simulator(network, batch=3), Simulator(network, batch=3, backend="reference")]
    assert assert_equivalent(*same, X) == 11 * 3 * 19
    later = replace(network.matrices()["layers.1.w_rec"], gate_period=5)
    other = Simulator(network.with_matrices({"layers.1.w_rec": later}), batch=3)
    with pytest.raises(
        Divergence, match=r"layers\.1\.w_rec held steps differ first at step 1, layer 1, sample 0: 3 and 4"
    ):
        assert_equivalent(Simulator(network, batch=3), other, X[:1])
    zeros = State.zeros(network, 3)
    started = replace(zeros, gates=same[0].state.gates)
    with pytest.raises(ValueError, match=r"start with different gates of layers\.0\.w_in; make them with the same"):
        assert_equivalent(Simulator(network, batch=3), Simulator(network, batch=3, state=started), X)
