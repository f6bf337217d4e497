"""Silence: steps in which nothing is sent have the bits and the counts of whole steps, and are not whole steps."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventrnn.cells import Cell
from eventrnn.counting import audit, count
from eventrnn.cpu import plan
from eventrnn.cpu.engine import LONGEST_CHUNK, RECHECK, CpuEngine
from eventrnn.cpu.silence import silent_steps
from eventrnn.cpu.tables import REST
from eventrnn.events import Events
from eventrnn.network import Network
from eventrnn.simulation import RECORDABLE, Simulator, simulate
from eventrnn.state import FireCounts, State
from eventrnn.testing import ALL_CELLS, EVENT_CELLS
from support.conformance import assert_same, records
from support.gated import gated
from support.silence import check_silence, fixed_points, with_thresholds

UNITS, INPUTS = 100, 6


def quiet_network(
    cell: Cell, *, layers: int = 1, gap: float = 0.1, readout: int | None = 3, units: int = UNITS
) -> Network:
    """A network whose units stay by `gap` below their thresholds while they get nothing."""
    rng = np.random.default_rng(4)
    drawn = Network.random([units] * layers, inputs=INPUTS, readout=readout, rng=rng, cell=cell)

    def biased(layer):
        return replace(layer, bias_in=(0.3 * rng.standard_normal(3 * units)).astype(np.float32))

    drawn = replace(drawn, layers=tuple(map(biased, drawn.layers)))
    return with_thresholds(drawn, (np.maximum(fixed_points(drawn), 0) + gap).astype(np.float32))


def rare_events(steps: int, batch: int, share: float = 0.01) -> Events:
    """Events of all inputs in a share of the steps of each sample."""
    rng = np.random.default_rng(5)
    busy = rng.random((steps, batch, 1)) < share
    return Events.from_dense((busy * rng.standard_normal((steps, batch, INPUTS))).astype(np.float32))


def engine_of(simulator: Simulator) -> CpuEngine:
    assert isinstance(simulator.engine, CpuEngine)
    return simulator.engine


def in_whole_steps(network: Network, fed, **options):
    """A run in which every step is a whole one."""
    healthy = plan.Plan.__init__

    def without_rest(self, *arguments):
        healthy(self, *arguments)
        self.layers[:, REST] = 0

    with patch.object(plan.Plan, "__init__", without_rest):
        return simulate(network, fed, **options)


@given(st.data(), st.integers(1, 2), records)
@settings(max_examples=10)
def test_quiet_networks_have_the_bits_of_the_specification(data, threads, record):
    check_silence("cpu", data, threads, record)


@pytest.mark.parametrize("cell", EVENT_CELLS, ids=str)
@pytest.mark.parametrize(("layers", "batch", "threads"), [(1, 1, 1), (2, 3, 2)])
def test_long_silence_equals_whole_steps(cell, layers, batch, threads):
    network, fed = quiet_network(cell, layers=layers), rare_events(3000, batch)
    expected = in_whole_steps(network, fed, record=RECORDABLE)
    assert all(0 < activity < 0.2 for activity in expected.activity)
    for record in ((), RECORDABLE):
        assert_same(expected, simulate(network, fed, threads=threads, record=record), record)
    network = replace(network, readout=None)
    assert_same(in_whole_steps(network, fed), simulate(network, fed, threads=threads), ())


@pytest.mark.parametrize("threads", [1, 2])
def test_unit_fires_in_the_step_in_which_silence_brings_it_above_its_threshold(threads):
    network = quiet_network(Cell())
    ends = fixed_points(network)
    unit, steps = int(np.argmax(ends)), 100
    assert ends[unit] > 0
    quiet = Events.from_dense(np.zeros((steps, 1, INPUTS), np.float32))
    for limit, fires in ((ends[unit], False), (np.nextafter(ends[unit], np.float32(0)), True)):
        threshold = np.concatenate([layer.threshold for layer in network.layers])
        threshold[unit] = limit
        result = simulate(with_thresholds(network, threshold), quiet, threads=threads)
        assert bool(result.fired[0].total[unit]) == fires
        assert_same(in_whole_steps(with_thresholds(network, threshold), quiet), result, ())


@pytest.mark.parametrize("cell", EVENT_CELLS, ids=str)
def test_silence_starts_from_any_state(cell):
    network, fed = quiet_network(cell), rare_events(80, 2)
    rng = np.random.default_rng(6)
    # Cells above their thresholds and at zeros of either sign; outputs that are zeros of either sign, and no events.
    high = rng.choice(np.array([-0.0, 0.0, 3.0], np.float32), (2, UNITS))
    zeros = np.copysign(np.zeros((2, UNITS), np.float32), rng.standard_normal((2, UNITS)).astype(np.float32))
    state = State((high,), (zeros,))
    expected = simulate(network, fed, state=state, backend="reference", record=RECORDABLE)
    for record in ((), RECORDABLE):
        assert_same(expected, simulate(network, fed, state=state, record=record), record)


def test_silent_steps_are_those_of_the_constants():
    """The engine takes silent steps by factor and addend: with others, its cells decay to another place."""
    network, quiet = quiet_network(Cell(), gap=1), np.zeros((100, 1, INPUTS), np.float32)
    simulator = Simulator(network)
    keep, pull = silent_steps(network)
    engine_of(simulator).silent_steps = keep, pull / 2
    # Halves of all terms are exact.
    assert np.array_equal(simulator.run(quiet).state.cells[0][0], fixed_points(network) / 2)


@pytest.mark.parametrize("cell", ALL_CELLS, ids=str)
def test_cells_with_a_threshold_take_silent_steps(cell):
    drawn = Network.random([20], inputs=INPUTS, rng=np.random.default_rng(0), cell=cell)
    assert bool(engine_of(Simulator(drawn)).plan(1, 1).layers[0, REST]) == cell.thresholded


def test_networks_with_gated_blocks_take_whole_steps():
    drawn = quiet_network(Cell(), readout=None, units=20)
    network = drawn.with_matrices({"layers.0.w_in": gated(drawn.layers[0].w_in.to_dense())})
    simulator, quiet = Simulator(network), np.zeros((20, 1, INPUTS), np.float32)
    # With other constants of silence, the result would be another one.
    engine_of(simulator).silent_steps = silent_steps(network)[0], np.full(20, 9, np.float32)
    expected = simulate(network, quiet, backend="reference", record=RECORDABLE)
    assert_same(expected, simulator.run(quiet, record=RECORDABLE))


def test_long_quiet_inputs_take_few_calls():
    network, steps = quiet_network(Cell()), 60_000
    fed = rare_events(steps, 1, share=0.001)
    for inputs, most in ((fed, 16), (fed.to_dense(), steps // (RECHECK * LONGEST_CHUNK) + 2)):
        simulator = Simulator(network)
        team = engine_of(simulator).team
        with patch.object(team, "run", wraps=team.run) as calls:
            result = simulator.run(inputs)
        assert 1 < calls.call_count <= most
        assert result.fired[0].total.sum() > 0


def test_counts_of_a_quiet_run_agree_with_their_audit():
    network, fed = quiet_network(Cell(variant="paper"), layers=2, units=20), rare_events(60, 2, share=0.1)
    result = simulate(network, fed, record="events")
    assert audit(network, result).agrees
    counts = count(network, simulate(network, fed))
    assert counts == count(network, result)
    # Every unit counts at every step, and no product without events.
    assert counts.gate_ops[0] >= 60 * 2 * 20 * 2
    silent = count(network, simulate(network, Events.from_dense(np.zeros((50, 2, INPUTS), np.float32))))
    assert (silent.total.effective, silent.total.executed, silent.total.weight_bytes) == (0, 0, 0)
    assert silent.gate_ops == (50 * 2 * 20 * 2,) * 2


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_arrays_are_counted_and_converted_alike_however_few_numbers_are_not_zero(share):
    rng = np.random.default_rng(8)
    dense = rng.choice(np.array([-1, 1, 0.5, -3], np.float32), (30, 4, 7)) * (rng.random((30, 4, 7)) < share)
    found, (rows, columns) = Events.from_dense(dense), np.nonzero(dense.reshape(120, 7))
    assert np.array_equal(found.rows(), rows)
    assert np.array_equal(found.indices, columns)
    assert np.array_equal(found.values, dense.reshape(120, 7)[rows, columns])
    counted = FireCounts.of(np.asfortranarray(dense))
    assert np.array_equal(counted.binary, (np.abs(dense) == 1).sum(axis=(0, 1)))
    assert np.array_equal(counted.total, (dense != 0).sum(axis=(0, 1)))
