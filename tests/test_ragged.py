"""Sequences of different lengths in one batch: each has the bits, the state and the counts of a run of its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventrnn import simulation as simulation_module
from eventrnn.cells import Cell
from eventrnn.counting import audit, count, count_per_step
from eventrnn.events import Events
from eventrnn.network import Network
from eventrnn.simulation import RECORDABLE, Simulator, simulate
from eventrnn.state import State
from eventrnn.testing import ALL_CELLS
from support.conformance import EXACT, carries, cases, each, fitting, part, same_bits, steps_of, unmodified


def alone(case, b: int, steps: int, **options):
    """The run of one sample by itself, from its own state, over its first steps."""
    sample = slice(b, b + 1)
    state = State(*(tuple(x[sample] for x in arrays) for arrays in (case.state.cells, case.state.outputs)))
    own = part(case.inputs, slice(steps), sample)
    return simulate(case.network, own, state=state, record=RECORDABLE, **options)


def with_garbage(fed, lengths):
    """The inputs with numbers in the padding that no run could take."""
    if isinstance(fed, Events):
        return fed
    padded = fed.copy()
    worst = {"f": np.nan, "b": True}.get(fed.dtype.kind)
    padded[np.arange(len(fed))[:, None] >= lengths] = np.iinfo(fed.dtype).max if worst is None else worst
    return padded


def check_each_alone(case, whole, lengths, **options) -> None:
    """Every sample of a run equals its run alone, and is zero after its end."""
    runs = [alone(case, b, steps, **options) for b, steps in enumerate(lengths)]
    for b, (run, steps) in enumerate(zip(runs, lengths, strict=True)):
        assert same_bits(whole.output[:steps, b], run.output[:, 0])
        assert not whole.output[steps:, b].any()
        for k in range(len(case.network.layers)):
            assert same_bits(whole.states[k][:steps, b], run.states[k][:, 0])
            assert not whole.states[k][steps:, b].any()
            sent = whole.events[k].to_dense()
            assert same_bits(sent[:steps, b], run.events[k].to_dense()[:, 0]) and not sent[steps:, b].any()
            for name in ("cells", "outputs"):
                assert same_bits(getattr(whole.state, name)[k][b], getattr(run.state, name)[k][0])
        assert same_bits(whole.inputs.to_dense()[:steps, b], run.inputs.to_dense()[:, 0])
    assert len(whole.inputs) == sum(len(run.inputs) for run in runs)
    own = [count(case.network, run) for run in runs]
    counts = count(case.network, whole)
    assert counts.sample_steps == sum(lengths) == sum(each.sample_steps for each in own)
    for name, matrix in counts.matrices.items():
        assert matrix == sum((each.matrices[name] for each in own[1:]), own[0].matrices[name])
    assert counts.gate_ops == tuple(map(sum, zip(*(each.gate_ops for each in own), strict=True)))
    assert counts.state_bytes == tuple(map(sum, zip(*(each.state_bytes for each in own), strict=True)))
    assert audit(case.network, whole, counts).agrees
    for name, table in count_per_step(case.network, whole).items():
        for quantity, values in table.items():
            ended = np.arange(len(values))[:, None] >= np.array(lengths)
            assert not values[ended].any(), (name, quantity)


@pytest.mark.parametrize("backend", each(EXACT))
@given(data=st.data(), threads=st.integers(1, 2), carry=carries())
@settings(max_examples=15)
def test_each_sample_equals_a_run_of_its_own(backend, data, threads, carry):
    fast = backend in ("cpu", "cuda")
    size = {"max_units": 40, "max_steps": 60} if fast else {"max_units": 8, "max_steps": 6}
    case = data.draw(cases(cells=ALL_CELLS, **size))
    carry = fitting(carry, case.network)
    lengths = data.draw(st.lists(st.integers(0, steps_of(case.inputs)), min_size=case.batch, max_size=case.batch))
    options = {"threads": threads if backend == "cpu" else 1, **carry}
    fed = with_garbage(case.inputs, np.array(lengths))
    with unmodified(case):
        simulator = case.simulator(backend, **options)
        whole = simulator.run(fed, lengths=np.array(lengths, np.int32), record=RECORDABLE)
    check_each_alone(case, whole, lengths, backend=backend, **carry)
    # Without records the run takes another path through time.
    plain = case.simulator(backend, **options).run(fed, lengths=lengths)
    assert same_bits(plain.output, whole.output)
    assert count(case.network, plain) == count(case.network, whole)
    assert plain.activity == whole.activity


@given(case=cases(max_units=20, max_steps=12), limit=st.sampled_from([1, 700, 4000]), data=st.data())
@settings(max_examples=10)
def test_records_in_several_parts_equal_one_part(case, limit, data):
    lengths = data.draw(st.lists(st.integers(0, steps_of(case.inputs)), min_size=case.batch, max_size=case.batch))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation_module, "RECORD_BYTES", limit)
        whole = case.simulator().run(case.inputs, lengths=lengths, record=RECORDABLE)
    check_each_alone(case, whole, lengths)


def small() -> tuple[Network, np.ndarray]:
    network = Network.random([9, 6], inputs=5, readout=3, rng=np.random.default_rng(1), threshold=0.05)
    return network, np.random.default_rng(2).normal(size=(12, 3, 5)).astype(np.float32)


def test_a_sample_that_has_ended_keeps_its_state_in_later_runs():
    network, x = small()
    simulator = Simulator(network, batch=3)
    first = simulator.run(x[:5], lengths=[5, 2, 5])
    second = simulator.run(x[5:], lengths=[7, 0, 4])
    whole = simulate(network, x, lengths=[12, 2, 9])
    for name in ("cells", "outputs"):
        pairs = zip(getattr(second.state, name), getattr(whole.state, name), strict=True)
        assert all(same_bits(a, b) for a, b in pairs)
    assert same_bits(np.concatenate([first.output, second.output]), whole.output)
    step = simulator.step(x[0])
    assert step.shape == (3, 3)


def test_full_lengths_are_the_plain_run():
    network, x = small()
    plain, given = simulate(network, x), simulate(network, x, lengths=[12, 12, 12])
    assert same_bits(plain.output, given.output)
    assert plain.lengths is None and given.lengths.tolist() == [12, 12, 12]
    assert plain.activity == given.activity and count(network, plain) == count(network, given)


@pytest.mark.parametrize("variant", ["evnn", "paper"])
def test_windows_do_not_wipe_the_cells_of_a_sample_that_has_ended(variant):
    network = Network.random([9], inputs=5, rng=np.random.default_rng(1), threshold=0.05, cell=Cell(variant=variant))
    x = small()[1]
    whole = simulate(network, x, lengths=[12, 4, 0], carry="events", window=4)
    own = simulate(network, x[:4, 1:2], carry="events", window=4)
    assert same_bits(whole.state.cells[0][1], own.state.cells[0][0]) and own.state.cells[0].any()
    assert not whole.state.cells[0][2].any()


def test_an_inexact_backend_leaves_out_the_padding():
    network, x = small()
    run = simulate(network, x, lengths=[12, 3, 7], backend="blas")
    assert not run.output[3:, 1].any() and run.output[:3, 1].any()
    assert count(network, run).total.dense == 22 * (5 * 27 + 9 * 27 + 9 * 18 + 6 * 18 + 6 * 3)


def test_a_run_that_fails_leaves_the_state_as_it_was():
    network, x = small()
    simulator = Simulator(network, batch=3)
    simulator.run(x)
    before = simulator.state
    x[6, 2, 1] = np.nan
    with pytest.raises(ValueError, match=r"inputs: got nan at position \(6, 2, 1\)"):
        simulator.run(x, lengths=[3, 3, 8])
    assert same_bits(simulator.state.cells[0], before.cells[0])
    simulator.run(x, lengths=[3, 3, 6])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([1, 2], r"lengths: got int64 \(2,\), need \(3,\) whole numbers 0\.\.12, one per sample"),
        (7, r"lengths: got int64 \(\), need \(3,\)"),
        ([1, 13, 2], r"lengths: got 13 for sample 1, need 0\.\.12, the steps of the inputs"),
        ([1, 2, -1], r"lengths: got -1 for sample 2, need 0\.\.12"),
        ([1.0, 2.0, 3.0], r"lengths: got float64 \(3,\), need \(3,\) whole numbers"),
        ([True, True, False], r"lengths: got bool \(3,\)"),
        (np.ma.masked_array([1, 2, 3], mask=[0, 1, 0]), "lengths: got a masked array"),
        ("abc", r"lengths: got <U3 \(\)"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(lengths, message):
    network, x = small()
    with pytest.raises(ValueError, match=message):
        simulate(network, x, lengths=lengths)
