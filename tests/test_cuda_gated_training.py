"""Training of gated blocks on a GPU: on a fake one everywhere, whose kernels are the real ones in plain Python, and
marked `gpu` on one.

Gradients are compared with the specification; in every precision each array of a window follows from those before it;
counts, choices and figures of runs are those of the CPU.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from eventrnn import Cell, Network, State
from eventrnn.backend import BackendUnavailable
from eventrnn.pruning import GradualPruning
from eventrnn.training import (
    Classification,
    Diverged,
    GateSettings,
    LanguageModelling,
    Model,
    Regularisers,
    Trainer,
)
from support import fake_training, tolerance
from support.cuda_runs import SYMBOLS, cuda_settings, symbol_text, updated
from support.gated import gate_matrices, specified
from support.gated_training import Links, operands

CELLS = {"egru": Cell(), "paper": Cell(variant="paper"), "gru": Cell("gru"), "before": Cell("gru", "before")}
CELLS |= {"lstm": Cell("lstm")}


@pytest.fixture(params=["fake", pytest.param("gpu", marks=pytest.mark.gpu)])
def gpu(request, monkeypatch):
    """A fake GPU, or the real one; the value says which."""
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    if request.param == "fake":
        fake_training.install(monkeypatch)
    return request.param


def network_of(cell: Cell, units=(6, 5), **options) -> Network:
    rng, threshold = np.random.default_rng(5), 0.05 * cell.thresholded
    sizes = {"symbols": SYMBOLS, "embedding": 4, "readout": SYMBOLS}
    return gate_matrices(Network.random(list(units), rng=rng, cell=cell, threshold=threshold, **sizes), **options)


def text_of() -> LanguageModelling:
    return LanguageModelling(symbol_text(), symbol_text()[:12], valid_batch=2)


class Known(LanguageModelling):
    """The text, with a given gradient of the output."""

    def __init__(self, d_output: np.ndarray):
        super().__init__(symbol_text())
        self._d_output = d_output

    @property
    def is_cross_entropy_of_steps(self) -> bool:
        return False

    def loss(self, output, batch):
        return float((output.astype(np.float64) * self._d_output).sum()), self._d_output


@pytest.mark.parametrize(
    ("name", "straight_through"),
    [("egru", False), ("paper", True), ("gru", True), ("before", False), ("lstm", False), ("lstm", True)],
)
def test_gradients_are_those_of_the_specification(gpu, name, straight_through):
    options = {"rule": "softmax", "rank": 2} if straight_through else {}
    network = network_of(CELLS[name], **options)
    d_output = np.random.default_rng(1).normal(size=(4, 3, SYMBOLS)).astype(np.float32)
    chosen = cuda_settings(clip=1e9, gates=GateSettings(straight_through))
    trainer = Trainer(network, Known(d_output), chosen)
    batch, model = trainer.task.batch(0, 0, 3, 4), Model(network)
    _, found = updated(trainer.engine, batch, 0)
    _, _, tape = model.forward(batch.inputs, State.zeros(network, 3))
    single, exact = (specified(network, tape, d_output, straight_through, kind) for kind in (np.float32, np.float64))
    inputs = [each.pop("inputs") for each in (single, exact)]
    for each, d_inputs in zip((single, exact), inputs, strict=True):
        each["embedding"] = np.zeros(model.parameters["embedding"].shape)
        np.add.at(each["embedding"], batch.inputs.reshape(-1), d_inputs.reshape(-1, 4))
    assert found.keys() == exact.keys() | {"readout.bias"}
    for parameter, expected in exact.items():
        bound = tolerance.gradient_bound(single[parameter], expected)
        assert np.abs(found[parameter] - expected).max() <= bound, parameter


@pytest.mark.parametrize(
    ("precision", "name", "options", "gates"),
    [
        ("bfloat16", "lstm", {"rule": "softmax", "rank": 2}, GateSettings(True, 1.0, 3)),
        ("tf32", "egru", {"density": 0.3, "block": (2, 7)}, GateSettings()),
    ],
    ids=["bfloat16", "tf32"],
)
def test_every_array_of_a_window_follows_from_those_before_it(gpu, precision, name, options, gates):
    network, balance = network_of(CELLS[name], **options), 0.5 * gates.straight_through
    regularisers = Regularisers(dropout_input=0.3, dropout_between=0.3, gate_balance=balance)
    chosen = cuda_settings(clip=1e9, precision=precision, gates=gates, regularisers=regularisers)
    trainer = Trainer(network, text_of(), chosen)
    engine = trainer.engine
    # The second update is captured as a graph.
    for step in range(2):
        links = [Links(engine, matrix, 4, 3, step) for matrix in engine.sizes.gated]
        with engine.evaluating():
            # The parameters are sent when they are needed.
            pass
        before = {key: links[0].before(key) for key in trainer.model.parameters}
        result, _ = updated(engine, trainer.task.batch(4 * step, 0, 3, 4), step)
        assert not result.fault
        for each in links:
            each.check(before, balance > 0)


def test_runs_have_the_figures_and_masks_of_the_cpu_and_go_on_with_the_same_bits(gpu):
    """All options together: noise, a density that falls, straight-through, load balance, pruning, clipping by layer."""

    def trainer(**options):
        regularisers = Regularisers(dropconnect=0.3, dropout_top=0.3, zoneout=0.2, dropout_words=0.2, gate_balance=0.1)
        gates, pruning = GateSettings(True, 1.0, 3), GradualPruning(0.5, block=(3, 4), start=0, end=3, every=2)
        changes = {"regularisers": regularisers, "gates": gates, "clip_layers": 0.5, "weight_decay": 0.1, **options}
        network = network_of(CELLS["lstm"], rank=2, rule="softmax")
        return Trainer(network, text_of(), cuda_settings(**changes), pruning=pruning)

    ours, theirs, resumed = trainer(), trainer(backend="cpu", precision=""), trainer()
    for step in range(4):
        got, expected = ours.step(), theirs.step()
        counted = ("activity", "support", "operations", "sparsity")
        assert [getattr(got, name) for name in counted] == [getattr(expected, name) for name in counted]
        # Shares of at most 9 blocks in 12 rows, and their sums.
        assert abs(got.penalty - expected.penalty) <= tolerance.gamma(1000, tolerance.U32) * expected.penalty
        if step == 1:
            ours.validate(), theirs.validate()
            arrays = {name: array.copy() for name, array in ours.arrays().items()}
            resumed.restore(arrays, json.loads(json.dumps(ours.numbers())))
    for _ in range(2):
        resumed.step()
    for name, mask in theirs.model.masks.items():
        assert np.array_equal(ours.model.masks[name], mask)
    assert ours.numbers() == resumed.numbers()
    assert all(np.array_equal(array, resumed.arrays()[name]) for name, array in ours.arrays().items())
    assert {w.n_blocks for w in ours.network().matrices().values()} == {w.n_blocks for w in ours.model.gated.values()}


@pytest.mark.parametrize("rule", ["linear", "softmax"])
def test_equal_logits_choose_the_lowest_blocks_and_all_of_them_have_gates_of_one(gpu, rule):
    zeros = np.array([0.0, -0.0], np.float32)
    for density, gate in ((0.5, None), (1.0, np.float32(1))):
        network = network_of(CELLS["gru"], units=(6,), rule=rule, density=density)
        even = {
            name: replace(w, gate=np.zeros_like(w.gate), gate_bias=zeros[np.arange(w.n_blocks) % 2])
            for name, w in network.matrices().items()
        }
        trainer = Trainer(
            network.with_matrices(even), text_of(), cuda_settings(precision="bfloat16", batch=2, window=2)
        )
        trainer.step()
        for name, sizes in trainer.engine.sizes.gated.items():
            memory, shape = trainer.engine.memory, (4, sizes.pitch)
            chosen = operands(trainer.engine, memory["chosen", name], shape)
            kept = trainer.model.gated[name].kept_blocks
            assert (chosen[:, :kept] == 1).all() and not chosen[:, kept:].any()
            if gate is not None:
                gates = operands(trainer.engine, memory["gates", name], shape)
                assert (gates[:, : sizes.blocks] == gate).all()


@pytest.mark.parametrize("own_loss", [False, True])
def test_gates_that_are_not_finite_change_nothing_and_are_named(gpu, own_loss):
    network = network_of(CELLS["lstm"])
    w_rec = network.layers[1].w_rec
    # The two chosen logits cancel.
    cancelling = np.array([1, -1] + [-2] * (w_rec.n_blocks - 2), np.float32)
    broken = replace(w_rec, gate=np.zeros_like(w_rec.gate), gate_bias=cancelling, density=2 / w_rec.n_blocks)
    network = network.with_matrices({"layers.1.w_rec": broken})
    task = Known(np.ones((4, 3, SYMBOLS), np.float32)) if own_loss else text_of()
    messages = []
    for options in ({"precision": "bfloat16"}, {"backend": "cpu", "precision": ""}):
        trainer = Trainer(network, task, cuda_settings(**options))
        before = {name: array.copy() for name, array in trainer.arrays().items()}
        with pytest.raises(
            Diverged, match=r"layers\.1\.w_rec: the gates of its blocks are not finite.*cancel"
        ) as error:
            trainer.step()
        messages.append(str(error.value))
        assert all(np.array_equal(array, before[name]) for name, array in trainer.arrays().items())
        if not own_loss:
            with pytest.raises(Diverged, match=r"layers\.1\.w_rec: .* in the validation after step 0"):
                trainer.validate()
    assert messages[0] == messages[1]


def test_validations_may_multiply_their_rows_in_parts(gpu, monkeypatch):
    figures = []
    for at_once in (1024, 5):
        monkeypatch.setattr("eventrnn.cuda.training.gated_sizes.ROWS_AT_ONCE", at_once)
        trainer = Trainer(network_of(CELLS["lstm"]), text_of(), cuda_settings())
        figures.append((trainer.validate()["bits"], trainer.engine.nbytes))
    (whole, larger), (parts, smaller) = figures
    # Products of other numbers of rows may be rounded otherwise: 10 steps of sums of up to 24 terms.
    assert abs(whole - parts) <= tolerance.gamma(10 * 24, tolerance.U32) * whole
    assert smaller < larger


def test_inputs_that_need_no_gradient_train_the_gates_that_read_them(gpu):
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(6, 3, 5)).astype(np.float32), rng.integers(0, 2, 6)
    network = gate_matrices(Network.random([6], inputs=5, readout=2, rng=rng, threshold=0.05))
    made = ({}, {"backend": "cpu", "precision": ""})
    ours, theirs = (Trainer(network, Classification(x, labels), cuda_settings(batch=3, **each)) for each in made)
    for _ in range(2):
        got, expected = ours.step(), theirs.step()
        assert (got.operations, got.activity) == (expected.operations, expected.activity)
    for trainer in (ours, theirs):
        with trainer.engine.reading():
            assert (trainer.model.parameters["layers.0.w_in.gate"] != network.layers[0].w_in.gate).any()


def test_no_option_of_gates_is_ignored(gpu):
    def ended(gates=None, **regularisers) -> bytes:
        options = {"gates": gates or GateSettings(), "regularisers": Regularisers(**regularisers)}
        settings = cuda_settings(batch=2, window=2, **options)
        trainer = Trainer(network_of(CELLS["gru"], units=(6,)), text_of(), settings)
        trainer.step(), trainer.step()
        with trainer.engine.reading():
            return b"".join(array.tobytes() for array in trainer.model.parameters.values())

    # The second update has another density with another number of steps.
    gates = [GateSettings(), GateSettings(True), GateSettings(False, 1.0, 1), GateSettings(False, 1.0, 3)]
    runs = [ended(each) for each in gates] + [ended(gate_balance=0.5)]
    assert len(set(runs)) == len(runs)
    assert ended() == runs[0]


def test_more_blocks_than_a_gpu_can_count_are_refused(gpu, monkeypatch):
    monkeypatch.setattr("eventrnn.cuda.training.gated_sizes.MOST_BLOCKS", 3)
    with pytest.raises(ValueError, match=r"layers\.0\.w_in: got 10 blocks, but training on a GPU takes at most 3"):
        Trainer(network_of(CELLS["egru"]), text_of(), cuda_settings())
