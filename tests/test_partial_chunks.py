"""The last chunk of a run may have fewer steps than others, and kernels of its own, within the same call."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrnn.cpu import engine as cpu
from eventrnn.cpu.plan import FORMAT, TILED, KernelPolicy
from eventrnn.cpu.tables import IN, INPUTS, PARTIAL, PITCH, VALUES
from eventrnn.network import Network
from eventrnn.simulation import RECORDABLE, Simulator
from eventrnn.state import State
from support.conformance import assert_same, cases, in_format
from support.layouts import simulated

STEPS, CHUNK, BATCH = 19, 8, 2


class ByRows(KernelPolicy):
    """Selects TILED from some drive rows on."""

    def __init__(self, least: int):
        super().__init__()
        self.least = least

    def select_kernel(self, weights, rows, activity):
        return TILED if rows >= self.least else FORMAT


@pytest.fixture
def engine(monkeypatch):
    """An engine that selects TILED for whole chunks and FORMAT for the three steps that remain of a run."""
    monkeypatch.setattr(cpu, "LONGEST_CHUNK", CHUNK)
    monkeypatch.setattr(cpu, "PARTIAL_FROM", 0)
    network = Network.random([24], inputs=9, readout=5, rng=np.random.default_rng(0), threshold=0.02)
    return cpu.CpuEngine(in_format(network, "dense"), 1, ByRows(CHUNK * BATCH))


def ran(engine: cpu.CpuEngine, steps: int = STEPS):
    inputs = np.random.default_rng(1).standard_normal((steps, BATCH, 9), dtype=np.float32)
    return engine.run(engine.prepare(inputs), State.zeros(engine.network, BATCH), record_states=True)


def test_a_partial_chunk_has_kernels_of_its_own_in_the_same_call(engine):
    with patch.object(engine.team, "run", wraps=engine.team.run) as calls:
        first = ran(engine)
        # One chunk tells the activity, and the others follow; what may be the only run packs each matrix once.
        assert calls.call_count == 2
        plan = engine.plan(STEPS, BATCH, partial=False)
        assert plan.kernel_by_matrix == plan.kernel_at_the_end
        assert len(plan.packed.spans) == 3
        again = ran(engine)
        assert calls.call_count == 3
    plan = engine.plan(STEPS, BATCH)
    assert plan.kernel_by_matrix == {"layers.0.w_in": TILED, "layers.0.w_rec": FORMAT, "readout": TILED}
    assert plan.kernel_at_the_end == dict.fromkeys(plan.kernel_by_matrix, FORMAT)
    assert again.paths == plan.kernel_at_the_end
    assert np.array_equal(first.output, again.output)
    assert np.array_equal(first.states[0], again.states[0])


@pytest.mark.parametrize("column", [IN, PARTIAL])
def test_the_kernels_of_a_plan_are_those_that_run(engine, column):
    ran(engine)
    expected = ran(engine)
    plan = engine.plan(STEPS, BATCH)
    # Without the weights of one kernel, just its steps change.
    tile = plan.column_tiles[0, plan.layers[0, column]]
    plan.pools.values[tile[VALUES] :][: plan.layers[0, INPUTS] * tile[PITCH]] = 0
    whole = STEPS - STEPS % CHUNK
    same = (ran(engine).states[0] == expected.states[0]).all(axis=(1, 2))
    assert same[:whole].all() == (column == PARTIAL)
    assert not same[whole]


def test_weights_are_packed_once_per_kernel(engine):
    """Runs of any number of steps share the packed weights."""
    ran(engine)
    ran(engine)
    packed = engine.plan(STEPS, BATCH).packed
    assert packed.spans.keys() == {
        ("layers.0.w_in", (TILED, 0.5)),
        ("layers.0.w_in", (FORMAT, 0.0)),
        ("layers.0.w_rec", (FORMAT, 0.0)),
        ("readout", (TILED, 0.5)),
        ("readout", (FORMAT, 0.0)),
    }
    for steps in (1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, STEPS):
        ran(engine, steps)
    # Those of the first run were replaced.
    assert {id(plan.packed) for plan in engine.plans.values()} == {id(packed)}


def test_a_small_matrix_has_one_kernel(engine, monkeypatch):
    w_in, _, readout = (each.stored for each in engine.network.matrices().values())
    assert w_in > readout
    monkeypatch.setattr(cpu, "PARTIAL_FROM", w_in)
    plan = cpu.CpuEngine(engine.network, 1, engine.policy).plan(STEPS, BATCH)
    assert plan.kernel_at_the_end == plan.kernel_by_matrix | {"layers.0.w_in": FORMAT}
    monkeypatch.setattr(cpu, "PARTIAL_FROM", w_in + 1)
    plan = cpu.CpuEngine(engine.network, 1, engine.policy).plan(STEPS, BATCH)
    assert plan.kernel_at_the_end == plan.kernel_by_matrix


def test_few_copies_of_the_weights_are_kept(engine):
    for least in range(1, 12):
        engine.policy = ByRows(least)
        with patch.object(engine.policy, "dense_activity_threshold", return_value=least):
            ran(engine, least)
    assert len({id(plan.packed) for plan in engine.plans.values()}) == cpu.MOST_PACKED


@given(cases(max_steps=20), st.integers(1, 8), st.integers(1, 30), st.integers(1, 2))
def test_any_kernels_of_partial_chunks_give_the_same_bits(case, chunk, least, threads):
    with patch.object(cpu, "LONGEST_CHUNK", chunk), patch.object(cpu, "PARTIAL_FROM", 0):
        tested: Simulator = case.simulator(threads=threads)
        assert isinstance(tested.engine, cpu.CpuEngine)
        tested.engine.policy = ByRows(least)
        first = tested.run(case.inputs, record=RECORDABLE)
        tested.state = case.state
        again = tested.run(case.inputs, record=RECORDABLE)
    assert_same(simulated(case, backend="reference"), first)
    assert_same(first, again)
