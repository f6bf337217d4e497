"""NeuroBench's metrics of three networks are those that its package computes, and each known difference is as is said.

The recorded numbers were computed by NeuroBench 2.3.0 itself, with `neurobench_model`. Where it is installed, it
computes them again.
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest

from eventrnn import Cell, Network, count, simulate
from eventrnn.counting import NEUROBENCH_DIFFERENCES, audit_neurobench, neurobench_metrics, neurobench_model
from eventrnn.pruning import prune
from eventrnn.weights import CSR, Dense, NotAMatrix, convert
from support import gated

needs_neurobench = pytest.mark.skipif(
    find_spec("neurobench") is None or find_spec("torch") is None, reason="compares with neurobench: not installed"
)

# Its packages warn when they are imported.
quietly = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


def network(name: str) -> tuple[Network, np.ndarray]:
    """A network and inputs (steps, samples, …)."""
    rng = np.random.default_rng(5)
    if name == "two layers":
        made = Network.random([12, 7], inputs=5, readout=4, rng=rng, threshold=0.1)
        return made, rng.normal(size=(9, 3, 5)).astype(np.float32)
    if name == "pruned words":
        made = Network.random([16], symbols=6, embedding=16, tied=True, rng=rng, threshold=0.05)
        made = prune(made, 0.5, block=(1, 4))
        return made, rng.integers(0, 6, (9, 2))
    made = Network.random([10], inputs=6, rng=rng, cell=Cell("gru"))
    narrow = {name: convert(w, "csr", storage="int8") for name, w in made.matrices().items()}
    return made.with_matrices(narrow), rng.choice([-1, 0, 1], (8, 2, 6)).astype(np.float32)


RECORDED = {
    "two layers": {
        "Footprint": 4704,
        "ParameterCount": 1176,
        "ConnectionSparsity": 0.0,
        "ActivationSparsity": 0.7797270955165692,
        "SynapticOperations": {"Effective_MACs": 3220.0, "Effective_ACs": 0.0, "Dense": 9351.0},
    },
    "pruned words": {
        "Footprint": 7000,
        "ParameterCount": 1750,
        "ConnectionSparsity": 0.4706,
        "ActivationSparsity": 0.6041666666666666,
        "SynapticOperations": {"Effective_MACs": 5060.0, "Effective_ACs": 0.0, "Dense": 14688.0},
    },
    "binary GRU": {
        "Footprint": 784,
        "ParameterCount": 556,
        "ConnectionSparsity": 0.0042,
        "ActivationSparsity": 0.0,
        "SynapticOperations": {"Effective_MACs": 2086.0, "Effective_ACs": 825.0, "Dense": 3840.0},
    },
}


@pytest.mark.parametrize("name", RECORDED)
def test_metrics_are_the_recorded_ones_of_neurobench(name):
    made, inputs = network(name)
    result = simulate(made, inputs, record="events")
    metrics, total = neurobench_metrics(made, result), count(made, result).total
    assert metrics.as_dict() == RECORDED[name]
    assert (metrics.dense, metrics.effective_macs + metrics.effective_acs) == (total.dense, total.effective)


@needs_neurobench
@quietly
@pytest.mark.parametrize("name", RECORDED)
def test_a_benchmark_of_neurobench_measures_the_same(name):
    import torch
    from neurobench.benchmarks import Benchmark
    from neurobench.metrics import static, workload
    from torch.utils.data import DataLoader, TensorDataset

    made, inputs = network(name)
    result = simulate(made, inputs, record="events")
    audited = audit_neurobench(made, result)
    assert audited.agrees and len(audited.rows) == 7 and audited.differences == NEUROBENCH_DIFFERENCES
    samples = torch.from_numpy(np.moveaxis(inputs, 0, 1).copy())
    last = result.output[-1].argmax(-1)
    loader = DataLoader(TensorDataset(samples, torch.from_numpy(last)), batch_size=len(samples))
    metrics = [
        [static.Footprint, static.ParameterCount, static.ConnectionSparsity],
        [workload.SynapticOperations, workload.ActivationSparsity, workload.ClassificationAccuracy],
    ]
    found = Benchmark(neurobench_model(made), loader, [], [lambda output: output[:, -1].argmax(-1)], metrics).run(True)
    assert found.pop("ClassificationAccuracy") == 1
    assert found == RECORDED[name] == neurobench_metrics(made, result).as_dict()


@needs_neurobench
@quietly
def test_sequences_of_different_lengths_have_no_padding_in_the_audit():
    made, inputs = network("two layers")
    dirty = inputs.copy()
    dirty[4:, 1] = np.nan
    result = simulate(made, dirty, lengths=[9, 4, 0], record="events")
    assert audit_neurobench(made, result).agrees


@pytest.mark.skipif(find_spec("neurobench") is not None, reason="neurobench is installed")
def test_a_model_for_neurobench_says_what_is_missing():
    with pytest.raises(ImportError, match="pip install neurobench"):
        neurobench_model(network("two layers")[0])


# --- the known differences, in the order of NEUROBENCH_DIFFERENCES ----------------------------------------------


def dense_layer(inputs: int, units: int, cell: str = "egru") -> Network:
    """A network of one layer whose weights are all one."""
    made = Network.random([units], inputs=inputs, rng=np.random.default_rng(0), cell=Cell(cell))
    return made.with_matrices({name: Dense(np.ones(w.shape, np.float32)) for name, w in made.matrices().items()})


def test_difference_one_graded_value_makes_a_call_of_macs():
    made = dense_layer(2, 1)
    inputs = np.array([[[1, 1], [0.5, 1]]], np.float32)  # one step of two samples
    result = simulate(made, inputs, record="events")
    metrics, counts = neurobench_metrics(made, result), count(made, result).matrices["layers.0.w_in"]
    assert (counts.graded, counts.binary) == (3, 9)
    assert (metrics.effective_macs, metrics.effective_acs) == (12, 0)
    apart = [neurobench_metrics(made, simulate(made, inputs[:, b : b + 1], record="events")) for b in range(2)]
    assert [(each.effective_macs, each.effective_acs) for each in apart] == [(0, 6), (6, 0)]


def test_difference_element_wise_work_is_in_the_operations_of_a_gru_cell():
    made = dense_layer(25, 5, "gru")
    counts = count(made, simulate(made, np.ones((1, 1, 25), np.float32)))
    of_a_gru_cell = 465  # NeuroBench 2.3.0: `single_layer_MACs` of an nn.GRUCell(25, 5), total=True
    assert counts.total.dense + sum(counts.gate_ops) == of_a_gru_cell


ROUNDED = 16_801_796  # NeuroBench 2.3.0: `single_layer_MACs` of ones (1367, 4097) and an nn.Linear(4097, 3), total=True


def test_difference_float32_sums_are_rounded():
    made = dense_layer(4097, 1)
    result = simulate(made, np.zeros((1367, 1, 4097), np.float32), record="events")
    exact = count(made, result).matrices["layers.0.w_in"].dense
    assert exact == 1367 * 4097 * 3 != ROUNDED == int(np.float32(exact))


@needs_neurobench
@quietly
def test_difference_float32_sums_are_rounded_by_the_package():
    import torch
    from neurobench.metrics.utils.layers import single_layer_MACs

    layer = torch.nn.Linear(4097, 3, bias=False)
    assert single_layer_MACs(torch.ones(1367, 4097), layer, total=True)[0] == ROUNDED
    cell, ones = torch.nn.GRUCell(25, 5), (torch.ones(1, 25), torch.ones(1, 5))
    assert single_layer_MACs(ones, cell, total=True)[0] == 465


def test_difference_zeros_in_a_block_are_executed_and_not_effective():
    dense = np.zeros((4, 12), np.float32)
    dense[:, ::4] = 1
    made = dense_layer(4, 4).with_matrices({"layers.0.w_in": convert(Dense(dense), "block", block=(1, 4))})
    result = simulate(made, np.ones((3, 1, 4), np.float32), record="events")
    total = count(made, result).total
    metrics = neurobench_metrics(made, result)
    assert metrics.effective_macs + metrics.effective_acs == total.effective < total.executed
    assert set(metrics.as_dict()["SynapticOperations"]) == {"Effective_MACs", "Effective_ACs", "Dense"}


def test_difference_operations_are_per_sample():
    made, inputs = network("two layers")
    one, three = (neurobench_metrics(made, simulate(made, x, record="events")) for x in (inputs[:, :1], inputs))
    operations = three.as_dict()["SynapticOperations"]
    assert operations["Dense"] == one.dense == three.dense / 3
    assert operations["Effective_MACs"] * 3 == three.effective_macs


def test_difference_the_footprint_contains_zero_weights():
    made, _ = network("two layers")
    empty = made.with_matrices(
        {name: CSR.from_dense(np.zeros(w.shape, np.float32)) for name, w in made.matrices().items()}
    )
    x = np.zeros((1, 1, 5), np.float32)
    full, none = (neurobench_metrics(each, simulate(each, x, record="events")) for each in (made, empty))
    assert none.footprint == full.footprint and none.connection_sparsity == 1
    assert sum(w.nbytes for w in empty.matrices().values()) < sum(w.nbytes for w in made.matrices().values())


def test_difference_padding_is_not_counted():
    made, inputs = network("two layers")
    dirty = inputs.copy()
    dirty[4:, 1] = 7
    lengths = np.array([9, 4, 9])
    metrics = neurobench_metrics(made, simulate(made, dirty, lengths=lengths, record="events"))
    apart = [
        neurobench_metrics(made, simulate(made, inputs[:n, b : b + 1], record="events")) for b, n in enumerate(lengths)
    ]
    assert metrics.steps == lengths.sum() and metrics.dense == sum(each.dense for each in apart)
    effective = [each.effective_macs + each.effective_acs for each in (metrics, *apart)]
    assert effective[0] == sum(effective[1:])


# --- refusals and the command line ------------------------------------------------------------------------------


def test_what_has_no_metrics_is_refused():
    made, inputs = network("two layers")
    with pytest.raises(ValueError, match="record"):
        neurobench_metrics(made, simulate(made, inputs))
    with pytest.raises(ValueError, match="has no step of a sample"):
        neurobench_metrics(made, simulate(made, inputs[:0], record="events"))
    blocks = gated.network_of()
    for call in (lambda: neurobench_metrics(blocks, None), lambda: neurobench_model(blocks)):
        with pytest.raises(NotAMatrix, match="NeuroBench cannot take gated blocks"):
            call()


@quietly
def test_count_prints_neurobench_and_energies(cli, tmp_path, text):
    from eventrnn import save
    from eventrnn.data.vocabulary import Vocabulary

    vocabulary = Vocabulary.of(text.read_text())
    made = Network.random(
        [8], symbols=len(vocabulary), embedding=4, readout=len(vocabulary), rng=np.random.default_rng(0), threshold=0.1
    )
    save(Network(made.layers, made.embedding, made.readout, {"vocabulary": vocabulary.to_json()}), tmp_path / "a")
    options = ("count", tmp_path / "a", "--text", text, "--symbols", 20)
    code, out, err = cli(*options, "--neurobench", "--energy", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["neurobench"]["SynapticOperations"]["Dense"] == record["total"]["dense"]
    assert record["neurobench"]["agrees"] is (None if find_spec("neurobench") is None else True)
    assert len(record["energies"]) == 8
    code, out, _ = cli(*options, "--neurobench", "--energy", "--memory", "hbm2")
    assert code == 0 and "ConnectionSparsity" in out and "dense int8" in out and "45nm" not in out
    assert out.count(NEUROBENCH_DIFFERENCES[0]) == 1
    code, _, err = cli(*options, "--memory", "dram")
    assert code == 2 and "add --energy" in err
    code, _, err = cli("count", tmp_path / "nothing", "--energy", "--memory", "tape")
    assert code == 2 and "memory: got 'tape', need one of fits, sram_8kb" in err, "before any work"
