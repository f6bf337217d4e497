"""What a simulator takes for a step or a state, and what it hands out: checked, converted, and independent of it."""

from __future__ import annotations

import numpy as np
import pytest

from eventrnn.backend import get_backend
from eventrnn.cpu import engine as cpu
from eventrnn.network import Network
from eventrnn.simulation import Simulator, simulate
from eventrnn.state import State
from support.conformance import assert_same_state
from support.small_runs import drawn, inputs


def test_editing_what_a_simulator_hands_out_changes_nothing():
    network, x = drawn(), inputs(8)
    whole, simulator = simulate(network, x), Simulator(network, batch=2)
    first = simulator.run(x[:3], record=("events", "states"))
    kept = first.state.copy()
    second = simulator.run(x[3:5])
    assert_same_state(second.initial, kept)
    for state in (first.state, second.initial, second.state, simulator.state):
        for array in (*state.cells, *state.outputs):
            array[...] = 7
    for array in (first.output, *first.states):
        array[...] = 7
    simulator.step(x[5])
    for array in (*simulator.state.cells, *simulator.state.outputs):
        array[...] = 7
    assert np.array_equal(simulator.run(x[6:]).output, whole.output[6:])


@pytest.mark.parametrize("symbols", [False, True])
def test_reading_the_state_between_steps_keeps_the_stepper(symbols):
    network, x = drawn(symbols), inputs(5, symbols)
    simulator = Simulator(network, batch=2)
    simulator.step(x[0])
    stepper = simulator._stepper
    for t in range(1, 5):
        simulator.step(x[t])
        assert_same_state(simulator.state, simulate(network, x[: t + 1]).state)
    assert simulator._stepper is stepper


LAYOUTS = {
    "float64": lambda x: x.astype(np.float64),
    "columns": np.asfortranarray,
    "reversed": lambda x: x[::-1].copy()[::-1],
    "read-only": lambda x: np.frombuffer(x.tobytes(), np.float32).reshape(x.shape),
    "big-endian": lambda x: x.astype(">f4"),
    "list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_takes_numbers_of_every_layout(layout):
    network, x = drawn(), inputs(5)
    simulator = Simulator(network, batch=2)
    found = np.stack([simulator.step(LAYOUTS[layout](each)) for each in x])
    assert np.array_equal(found, simulate(network, x).output)
    before = simulator.state
    for bad, message in [
        (np.full((2, 6), 1e300), r"inputs as float32: got inf at position \(0, 0\)"),
        (np.full((2, 6), np.nan), r"inputs: got nan at position \(0, 0\)"),
        (np.zeros((2, 5)), r"inputs: got float64 \(2, 5\), need numbers \(batch, 6\)"),
        (np.zeros((1, 6)), "inputs: got a batch of 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            simulator.step(bad)
    assert_same_state(simulator.state, before)


# The engine of the reference has no stepper; a step is a run of one step there.
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_messages_of_a_step_describe_the_array_that_was_given(backend):
    simulator, words = (Simulator(drawn(symbols), batch=2, backend=backend) for symbols in (False, True))
    for one, bad, message in [
        (simulator, np.zeros(6, np.float32), r"got float32 \(6,\), need .*\(batch, 6\)"),
        (simulator, inputs(1), r"got float32 \(1, 2, 6\), need .*\(batch, 6\)"),
        (simulator, np.full((2, 6), np.inf, np.float32), r"got inf at position \(0, 0\)"),
        (words, np.array([3, 7]), r"got symbol 7 at \(1,\); need 0\.\.4"),
        (words, np.array([[3, 4]]), r"got int64 \(1, 2\), need .*\(batch,\), the symbols"),
    ]:
        with pytest.raises(ValueError, match="inputs: " + message):
            one.step(bad)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_of_little_work_takes_one_thread(batch, monkeypatch):
    network, x = drawn(), inputs(5)[:, :batch]
    expected = simulate(network, x).output
    for most in (0, cpu.MOST_ALONE):
        monkeypatch.setattr(cpu, "MOST_ALONE", most)
        simulator = Simulator(network, batch=batch, threads=3)
        assert np.array_equal(np.stack([simulator.step(each) for each in x]), expected)
        assert (simulator._stepper is None) == (most == 0)


def test_a_state_is_checked_when_it_is_set():
    network, simulator = drawn(), Simulator(drawn(), batch=2)
    simulator.step(inputs(1)[0])
    before = simulator.state
    for bad, error, message in [
        (State.zeros(network, 3), ValueError, r"state cells of layer 0: got float32 \(3, 24\), need float \(2, 24\)"),
        (State.zeros(Network(network.layers[:1]), 2), ValueError, "state: got 1 layers, the network has 2"),
        ((before.cells, before.outputs), TypeError, "state: got a tuple, need a State"),
        (
            State(before.cells, tuple(y + np.inf for y in before.outputs)),
            ValueError,
            "state outputs of layer 0: got inf",
        ),
        (State(before.cells, tuple(y.tolist() for y in before.outputs)), ValueError, "outputs of layer 0: got list"),
    ]:
        with pytest.raises(error, match=message):
            simulator.state = bad
        with pytest.raises(error, match=message):
            Simulator(network, batch=2, state=bad)
    assert_same_state(simulator.state, before)
    given = before.copy()
    simulator.state = given
    given.cells[0][...] = 9
    assert_same_state(simulator.state, before)
    with pytest.raises(AttributeError):
        simulator.batch = 3
    with pytest.raises(AttributeError):
        simulator.network = network


def test_an_engine_refuses_a_state_of_another_batch():
    network, x = drawn(), inputs(3)
    engine = get_backend("cpu").engine(network)
    with pytest.raises(ValueError, match=r"state cells: got arrays of shape .*, need .* for this batch and network"):
        engine.run(engine.prepare(x), State.zeros(network, 1))
