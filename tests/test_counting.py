"""Counts: equal to brute force for every format, the two ends of the range, per step, audit, energy."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrnn import Network, State, audit, cells, count, count_per_step, energy, simulate
from eventrnn.counting.energy import ENERGY_TABLES, compare_energy
from eventrnn.testing import ALL_CELLS, networks
from eventrnn.weights import convert
from support.counting import count_executed, count_multiplications


def _inputs(network, rng, steps, batch):
    if network.embedding is not None:
        return rng.integers(0, len(network.embedding), (steps, batch))
    size = network.layers[0].inputs
    values = rng.choice([-1.0, 0.0, 0.0, 0.5, 1.0, 1.5], (steps, batch, size))
    return values.astype(np.float32)


@given(st.data())
def test_counts_equal_brute_force(data):
    """Counts equal those of the specification run on counting numbers, with every product multiplied out."""
    network = data.draw(networks(cells=ALL_CELLS, max_units=9))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    steps, batch = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    inputs = _inputs(network, rng, steps, batch)
    simulation = simulate(network, inputs, record="events")
    counts, per_step = count(network, simulation), count_per_step(network, simulation)
    for name, matrix in network.matrices().items():
        sent = _sent(network, simulation, name)
        dense = matrix.to_dense()
        brute = {"dense": 0, "effective": 0, "executed": 0, "graded": 0}
        for t in range(steps):
            for b in range(batch):
                all_of_them, effective = count_multiplications(dense, sent[t, b][None])
                graded = count_multiplications(dense, (sent[t, b] * (np.abs(sent[t, b]) != 1))[None])[1]
                executed = count_executed(matrix, sent[t, b])
                here = {"dense": all_of_them, "effective": effective, "executed": executed, "graded": graded}
                for quantity, value in here.items():
                    brute[quantity] += value
                    assert per_step[name][quantity][t, b] == value, (name, quantity, t, b)
        for quantity, value in brute.items():
            assert getattr(counts.matrices[name], quantity) == value, (name, quantity)
        assert counts.matrices[name].graded + counts.matrices[name].binary == counts.matrices[name].effective
        assert per_step[name]["binary"].sum() == counts.matrices[name].binary
    assert audit(network, simulation, counts).agrees


def _sent(network, simulation, name):
    """The presynaptic values of a matrix at each step, (steps, batch, n_pre)."""
    if name == "readout":
        return simulation.events[-1].to_dense()
    k = int(name.split(".")[1])
    if name.endswith("w_in"):
        return (simulation.inputs if k == 0 else simulation.events[k - 1]).to_dense()
    return np.concatenate([simulation.initial.outputs[k][None], simulation.events[k].to_dense()[:-1]])


def _network(threshold, **changes):
    network = Network.random([12, 7], inputs=5, readout=4, rng=np.random.default_rng(0), **changes)
    layers = tuple(replace(x, threshold=np.full(x.units, threshold, np.float32)) for x in network.layers)
    return replace(network, layers=layers)


def test_a_silent_run_costs_nothing_and_an_active_dense_layer_costs_dense():
    network = _network(1e6)
    silent = count(network, simulate(network, np.zeros((6, 2, 5), np.float32)))
    assert (silent.total.effective, silent.total.executed, silent.total.weight_bytes) == (0, 0, 0)
    assert silent.total.dense == 6 * 2 * (5 * 36 + 12 * 36 + 12 * 21 + 7 * 21 + 7 * 4)
    assert silent.reduction == float("inf")
    active = _network(0.0)
    layers = tuple(replace(x, bias_in=np.full(3 * x.units, 9, np.float32)) for x in active.layers)
    active = replace(active, layers=layers)
    first = simulate(active, np.ones((6, 2, 5), np.float32))
    again = simulate(active, np.ones((6, 2, 5), np.float32), state=first.state)
    counts = count(active, again)
    assert again.activity == (1.0, 1.0)
    assert counts.total.effective == counts.total.executed == counts.total.dense
    assert counts.matrices["layers.0.w_in"].binary == counts.matrices["layers.0.w_in"].effective


def test_counts_do_not_depend_on_splits_threads_or_backend():
    network = _network(0.05)
    x = np.random.default_rng(1).normal(size=(9, 3, 5)).astype(np.float32)
    whole = simulate(network, x)
    first = simulate(network, x[:4])
    second = simulate(network, x[4:], state=first.state)
    assert count(network, first) + count(network, second) == count(network, whole)
    for changes in ({"threads": 2}, {"backend": "reference"}):
        assert count(network, simulate(network, x, **changes)) == count(network, whole)
    with pytest.raises(ValueError, match="same network"):
        count(network, whole) + count(network, simulate(network, x[:, :1]))


@pytest.mark.parametrize("variant", ["evnn", "paper"])
def test_element_wise_work_and_state_bytes(variant):
    from eventrnn import Cell

    network = _network(0.05, cell=Cell(variant=variant))
    simulation = simulate(network, np.ones((9, 3, 5), np.float32), record="events")
    counts = count(network, simulation)
    for k, n in enumerate((12, 7)):
        carried = np.count_nonzero(_sent(network, simulation, f"layers.{k}.w_rec"))
        expected = 27 * n * 3 if variant == "evnn" else 27 * n * 2 + carried
        assert counts.gate_ops[k] == expected
        assert counts.state_bytes[k] == 27 * n * (12 if variant == "evnn" else 16)


def test_bytes_of_each_format():
    network = _network(0.05)
    x = np.random.default_rng(1).normal(size=(9, 3, 5)).astype(np.float32)
    for form, block, each in (("dense", None, 4), ("csr", None, 8), ("block", (1, 4), 5)):
        other = network.with_matrices({k: convert(w, form, block=block) for k, w in network.matrices().items()})
        counts = count(other, simulate(other, x))
        for matrix in counts.matrices.values():
            assert matrix.weight_bytes == each * matrix.executed


@pytest.mark.parametrize("form", ["dense", "csr", "block"])
def test_bytes_of_narrow_weights(form):
    network = _network(0.05)
    x = np.random.default_rng(1).normal(size=(9, 3, 5)).astype(np.float32)
    index = {"dense": 0, "csr": 4, "block": 1}[form]
    simulation = simulate(network, x)
    for storage, size in (("bfloat16", 2), ("int8", 1)):
        block = (1, 4) if form == "block" else None
        matrices = {k: convert(w, form, block=block, storage=storage) for k, w in network.matrices().items()}
        other = count(network.with_matrices(matrices), simulation)
        fired = {"readout": simulation.fired[1], "layers.0.w_in": simulation.input_fired}
        for name, sent in fired.items():
            matrix = other.matrices[name]
            scales = 4 * int(sent.total.sum()) if storage == "int8" else 0
            assert matrix.weight_bytes == (size + index) * matrix.executed + scales


def test_audit_detects_a_wrong_count():
    network = _network(0.05)
    simulation = simulate(network, np.ones((9, 3, 5), np.float32), record="events")
    counts = count(network, simulation)
    assert audit(network, simulation).agrees
    wrong = dict(counts.matrices)
    wrong["readout"] = replace(wrong["readout"], executed=wrong["readout"].executed + 1)
    report = audit(network, simulation, replace(counts, matrices=wrong))
    assert not report.agrees and "DIFFERS" in str(report)
    with pytest.raises(ValueError, match="record"):
        audit(network, simulate(network, np.ones((9, 3, 5), np.float32)))


@pytest.mark.parametrize("cell", ALL_CELLS, ids=repr)
def test_audit_does_not_take_the_element_wise_work_from_the_table_that_is_counted_from(cell, monkeypatch):
    network = Network.random([6], inputs=4, rng=np.random.default_rng(0), cell=cell)
    simulation = simulate(network, np.ones((9, 3, 4), np.float32), record="events")
    assert audit(network, simulation).agrees
    right = cell.equations
    for wrong in ({"multiplications": right.multiplications + 1}, {"reset_first": not right.reset_first}):
        monkeypatch.setitem(cells.EQUATIONS[cell.name], cell.variant, replace(right, **wrong))
        differing = {(row[1], row[4]) for row in audit(network, simulation).rows if row[2] != row[3]}
        assert ("gate_ops", "equations") in differing and {source for _, source in differing} == {"equations"}


@pytest.mark.parametrize("process", ENERGY_TABLES)
def test_energy_is_the_table_times_the_counts(process):
    network = _network(0.05)
    counts = count(network, simulate(network, np.ones((9, 3, 5), np.float32)))
    total, table = counts.total, ENERGY_TABLES[process]
    parts = energy(counts, process=process, memory="dram")
    macs, mac = total.executed - total.binary, table.multiply["float32"] + table.add["float32"]
    assert parts["arithmetic_pj"] == macs * mac + total.binary * table.add["float32"]
    assert parts["gates_pj"] == sum(counts.gate_ops) * table.multiply["float32"]
    assert parts["weights_pj"] == total.weight_bytes / 8 * table.memory["dram"]
    assert parts["state_pj"] == sum(counts.state_bytes) / 8 * table.memory["sram_32kb"]
    assert parts["total_pj"] == sum(value for name, value in parts.items() if name != "total_pj")
    dense = energy(counts, process=process, engine="dense")
    assert dense["arithmetic_pj"] == total.dense * mac
    # A dense engine reads each of the weights once per step, for all three samples.
    assert dense["weights_pj"] == 4 * total.dense / 3 / 8 * table.memory["sram_1mb"]
    narrow = energy(counts, process=process, engine="dense-int8")
    assert narrow["arithmetic_pj"] == total.dense * (table.multiply["int8"] + table.add["int32"])
    assert narrow["weights_pj"] == dense["weights_pj"] / 4 and narrow["state_pj"] == dense["state_pj"] / 4
    for wrong in ({"memory": "float32"}, {"process": "3nm"}, {"engine": "gpu"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            energy(counts, **wrong)


def test_energies_of_engines_are_compared_with_weights_where_they_fit():
    network = Network.random([40], inputs=30, readout=4, rng=np.random.default_rng(0), threshold=0.05)
    network = network.with_matrices({name: convert(w, "csr") for name, w in network.matrices().items()})
    simulation = simulate(network, np.ones((5, 2, 30), np.float32))
    entries = sum(w.shape[0] * w.shape[1] for w in network.matrices().values())
    records = {(r["process"], r["engine"]): r for r in compare_energy(network, simulation)}
    assert set(records) == {(p, e) for p in ENERGY_TABLES for e in ("events", "events-int8", "dense", "dense-int8")}
    found = {engine: (records["7nm", engine]["memory"], records["7nm", engine]["bytes"]) for _, engine in records}
    assert entries == 8_560 and found["dense"] == ("sram_1mb", 4 * entries)
    assert found["dense-int8"] == ("sram_32kb", entries)
    assert found["events"] == ("sram_1mb", sum(w.nbytes for w in network.matrices().values()))
    narrow = network.with_matrices({name: w.stored_as("int8") for name, w in network.matrices().items()})
    expected = energy(count(narrow, simulation), process="7nm", memory="sram_1mb", engine="events-int8")
    assert expected.items() <= records["7nm", "events-int8"].items()
    for record in records.values():
        assert record["per_step_pj"] == record["total_pj"] / 10
    assert {r["process"] for r in compare_energy(network, simulation, memory="hbm2")} == {"7nm"}
    with pytest.raises(ValueError, match="memory: got 'rom'"):
        compare_energy(network, simulation, memory="rom")


def test_a_dense_engine_executes_everything():
    network = _network(0.05)
    x = np.random.default_rng(1).normal(size=(9, 3, 5)).astype(np.float32)
    simulation = simulate(network, x, backend="blas", record="events")
    counts = count(network, simulation)
    assert simulation.backend == "blas" and not simulation.exact
    assert counts.total.executed == counts.total.dense > counts.total.effective
    assert counts.total.weight_bytes == 4 * counts.total.dense
    assert audit(network, simulation, counts).agrees


def test_starting_outputs_that_vanish_in_float32_are_not_counted():
    network = _network(0.05)
    state = State.zeros(network, 2)
    state.outputs[0][:] = 1
    tiny = State(state.cells, (np.full((2, 12), 1e-60), np.full((2, 7), 1 + 1e-12)))
    simulation = simulate(network, np.ones((3, 2, 5), np.float32), state=tiny, record="events")
    assert audit(network, simulation).agrees
    assert count_per_step(network, simulation)["layers.0.w_rec"]["effective"][0].sum() == 0
    assert (count_per_step(network, simulation)["layers.1.w_rec"]["binary"][0] > 0).all()
