"""Training on a GPU: on a fake one everywhere, whose kernels are the real ones in plain Python, and marked `gpu` on
one.

Gradients are compared with the specification in float64 on the forward pass that the engine has left; updates, noise
and resumed runs in every bit.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from eventrnn import Cell, Dense, Network, State, Surrogate
from eventrnn.backend import BackendUnavailable
from eventrnn.cells import SURROGATES
from eventrnn.pruning import (
    Combined,
    DynamicMasks,
    GradualPruning,
    GroupLasso,
    MovementPruning,
    RegrownMasks,
    StaticMasks,
    ThresholdPruning,
)
from eventrnn.pruning.patterns import Blocks
from eventrnn.testing import ALL_CELLS
from eventrnn.training import (
    Batch,
    Classification,
    Diverged,
    LanguageModelling,
    Model,
    Optimiser,
    Regularisers,
    Settings,
    SoftTargets,
    Task,
    Trainer,
)
from support import fake_training
from support.cuda_runs import SYMBOLS, cuda_settings, symbol_text, updated
from support.texts import TEXT
from support.tolerance import soft_target_error
from support.training_specification import Specification, read

PRECISIONS = ("float32", "bfloat16", "tf32")

NOISE = Regularisers(
    dropconnect=0.5, dropout_input=0.3, dropout_between=0.3, dropout_top=0.4, dropout_words=0.2, zoneout=0.3
)


@pytest.fixture(params=["fake", pytest.param("gpu", marks=pytest.mark.gpu)])
def gpu(request, monkeypatch):
    """A fake GPU, or the real one; the value says which."""
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    if request.param == "fake":
        fake_training.install(monkeypatch)
    return request.param


class Given(Task):
    """Windows with given inputs, whose loss has a given gradient."""

    def __init__(self, inputs: np.ndarray, d_output: np.ndarray):
        self.inputs, self.d_output = inputs, d_output

    def check(self, network, batch, window):
        return None

    def length(self, batch):
        return 1000

    def batch(self, at, epoch, batch, window):
        return Batch(self.inputs, self.inputs, taken=1, carried="state")

    def loss(self, output, batch):
        assert output.shape == self.d_output.shape and np.isfinite(output).all()
        return float((output.astype(np.float64) * self.d_output).sum()), self.d_output


@st.composite
def updates(draw):
    """A network, a task with one window, settings of one update, and the state before it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    units = draw(st.sampled_from([(5,), (6, 4), (3, 7)]))
    surrogate, cells = Surrogate(draw(st.sampled_from(sorted(SURROGATES))), 0.7, 2.0), []
    for cell in draw(st.lists(st.sampled_from(ALL_CELLS), min_size=len(units), max_size=len(units))):
        cells.append(replace(cell, surrogate=surrogate) if cell.thresholded else cell)
    events = all(cell.thresholded for cell in cells)
    symbols, readout = draw(st.booleans()), draw(st.sampled_from(["own", "tied", "none"]))
    shape = {"symbols": SYMBOLS, "embedding": units[-1] if readout == "tied" else 4} if symbols else {"inputs": 3}
    shape |= {"tied": True} if symbols and readout == "tied" else {"readout": None if readout == "none" else 5}
    network = _of_cells(cells, list(units), rng, **shape)
    biases = [rng.normal(0, 0.5, (2, cell.gates * n)).astype(np.float32) for cell, n in zip(cells, units, strict=True)]
    layers = zip(network.layers, biases, strict=True)
    network = replace(network, layers=tuple(replace(each, bias_in=b[0], bias_rec=b[1]) for each, b in layers))
    steps, batch = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    inputs = rng.integers(0, SYMBOLS, (steps, batch)) if symbols else rng.normal(size=(steps, batch, 3))
    outputs = units[-1] if network.readout is None else len(network.readout.bias)
    task = Given(
        inputs if symbols else inputs.astype(np.float32),
        rng.normal(size=(steps, batch, outputs)).astype(np.float32),
    )
    some = {name: getattr(NOISE, name) for name in ("dropconnect", "dropout_input", "dropout_top", "zoneout")}
    some |= {"dropout_words": 0.2} if symbols else {}
    some |= {"dropout_between": 0.3} if len(units) > 1 else {}
    rates = {name: rate for name, rate in some.items() if draw(st.booleans())}
    strengths = {"activation": 1.0, "temporal_activation": 1.0}
    strengths |= {"activity_rate": 2.0, "state": 0.5} if events else {}
    rates |= {name: strength for name, strength in strengths.items() if draw(st.booleans())}
    chosen = Settings(
        steps=10,
        batch=batch,
        window=steps,
        clip=1e9,
        seed=draw(st.sampled_from([0, 7, 2**63 + 5])),
        activity_cost=draw(st.sampled_from([0.0, 0.5])) if events else 0.0,
        thresholds=draw(st.sampled_from(["positive", "clamped", "sigmoid", "fixed"])),
        backend="cuda",
        precision=draw(st.sampled_from(PRECISIONS)),
        regularisers=Regularisers(**rates, mask_sharing=draw(st.sampled_from(["time", "batch"]))),
    )
    start, sent = [], []
    for cell, n in zip(cells, units, strict=True):
        start.append(rng.normal(0, 0.3, (batch, n)).astype(np.float32))
        fired = (rng.random((batch, n)) * (rng.random((batch, n)) < 0.5)).astype(np.float32)
        sent.append(start[-1] if cell.equations.single_state else fired)
    return network, task, chosen, State(tuple(start), tuple(sent))


# Plain Python is too slow to look for a smaller example.
@settings(
    max_examples=12,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(updates(), st.integers(0, 1000))
def test_an_update_agrees_with_the_specification(gpu, case, step):
    network, task, chosen, state = case
    trainer = Trainer(network, task, chosen)
    engine = trainer.engine
    before = {name: array.copy() for name, array in trainer.model.parameters.items()}
    engine.state = state
    batch = task.batch(0, 0, chosen.batch, chosen.window)
    noise = chosen.regularisers.draw(trainer.model, *batch.inputs.shape[:2], seed=chosen.seed, step=step)
    # The second time, the work is a graph.
    for _ in range(2):
        engine.state = state
        for name, array in before.items():
            trainer.model.parameters[name][...] = array
        result, found = updated(engine, batch, step)
        assert not result.fault
        check = Specification(engine, before, batch.inputs, task.d_output, state, noise)
        check.check_forward()
        check.check_gradients(found)
    for k, tape in enumerate(check.tapes):
        assert np.array_equal(engine.state.cells[k], tape.c[-1])
        assert np.array_equal(engine.state.outputs[k], tape.y[-1])
    assert result.activity == sum((tape.y[1:] != 0).sum() for tape in check.tapes) / sum(t.v.size for t in check.tapes)


@pytest.mark.parametrize("cells", [("gru", "egru"), ("lstm", "gru-before"), ("egru", "lstm")], ids="-".join)
def test_plain_cells_train_as_on_the_cpu(gpu, cells):
    """Figures of updates, counts among them, and validations; and a resumed run has the bits of the whole one."""
    text = symbol_text()
    made = [Cell("gru", "before") if name == "gru-before" else Cell(name) for name in cells]
    network = _of_cells(made, [6, 5], np.random.default_rng(5), symbols=SYMBOLS, embedding=4, readout=SYMBOLS)

    def trainer(**options):
        task = LanguageModelling(text, text[:12], valid_batch=2)
        return Trainer(network, task, cuda_settings(regularisers=NOISE, **options))

    ours, theirs, resumed = trainer(), trainer(backend="cpu", precision=""), trainer()
    for step in range(3):
        got, expected = ours.step(), theirs.step()
        counted = ("activity", "support", "operations", "sparsity")
        assert [getattr(got, name) for name in counted] == [getattr(expected, name) for name in counted]
        assert ours.validate()["activity"] == theirs.validate()["activity"]
        if step == 1:
            arrays = {name: array.copy() for name, array in ours.arrays().items()}
            resumed.restore(arrays, json.loads(json.dumps(ours.numbers())))
    resumed.step(), resumed.validate()
    assert ours.numbers() == resumed.numbers()
    assert all(np.array_equal(array, resumed.arrays()[name]) for name, array in ours.arrays().items())


@pytest.mark.parametrize("sharing", ["time", "batch"])
def test_masks_are_those_of_the_cpu(gpu, sharing):
    network, text = _network(), symbol_text()
    chosen = cuda_settings(regularisers=replace(NOISE, mask_sharing=sharing), seed=2**63 + 5)
    trainer = Trainer(network, LanguageModelling(text), chosen)
    for step in range(2):
        trainer.step()
        for mask in chosen.regularisers.masks(trainer.model):
            drawn = mask.draw(chosen.seed, step, chosen.window, chosen.batch)
            kept = ~drawn if mask.name == "zoneout" else drawn != 0
            columns = trainer.engine.sizes.layers[mask.layer].units if mask.name == "recurrent" else drawn.shape[-1]
            padded = -(-columns // 8) * 8
            there = read(trainer.engine, ("mask", mask.name, mask.layer), (kept.size // columns, padded))
            assert np.array_equal(there[:, :columns], kept.reshape(-1, columns)), mask


OPTIMISERS = {
    "adamw": Optimiser(),
    "adam without first moment": Optimiser(kind="adam", beta1=0.0, bias_rate=0.5, decay_biases=True),
    "sgd": Optimiser(kind="sgd", threshold_rate=0.0),
    "momentum": Optimiser(kind="sgd", momentum=0.9, bias_rate=0.0),
    "nt-asgd": Optimiser(kind="nt-asgd", patience=1),
}


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_update_rules_have_the_bits_of_the_cpu(gpu, kind):
    task = LanguageModelling(symbol_text())
    trainer = Trainer(_network(), task, cuda_settings(optimiser=OPTIMISERS[kind], clip=1e9))
    host = Model(_network())
    rule = OPTIMISERS[kind].build(host.parameters, trainer.settings.weight_decay)
    if kind == "nt-asgd":
        for each, parameters in ((trainer.optimiser, trainer.model.parameters), (rule, host.parameters)):
            # The third validation is the first that is worse than an earlier one.
            assert [each.validated(loss, parameters) for loss in (1.0, 2.0, 3.0)] == [False, False, True]
    for step in range(3):
        _, gradients = updated(trainer.engine, task.batch(4 * step, 0, 3, 4), step)
        rule.step(host.parameters, gradients, 0.01)
        host.apply_masks()
        with trainer.engine.reading():
            for name, expected in host.parameters.items():
                assert np.array_equal(trainer.model.parameters[name], expected), name
            for name, expected in rule.arrays().items():
                assert np.array_equal(trainer.optimiser.arrays()[name], expected), name
    assert trainer.optimiser.numbers() == rule.numbers()


def test_clipping_scales_all_gradients_together(gpu):
    found = []
    for limits in ({"clip": 1e9}, {"clip": 0.01}, {"clip": 1e9, "clip_layers": 1e-4}):
        trainer = Trainer(_network(), LanguageModelling(symbol_text()), cuda_settings(**limits))
        found.append(updated(trainer.engine, trainer.task.batch(0, 0, 3, 4), 0))
    free, together, layers = found
    factor = np.float32(0.01 / free[0].norm)
    assert together[0].norm == free[0].norm and together[0].norms == free[0].norms
    for name, gradient in free[1].items():
        assert np.array_equal(together[1][name], gradient * factor)
        if not name.startswith("layers"):
            assert np.array_equal(layers[1][name], gradient)
    assert layers[0].norm < free[0].norm


@pytest.mark.parametrize("kind", ["adamw", "nt-asgd"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(gpu, kind):
    def trainer():
        options = {"optimiser": OPTIMISERS[kind], "regularisers": NOISE, "precision": "bfloat16", "window_jitter": 2.0}
        return Trainer(
            _network(), LanguageModelling(symbol_text(), symbol_text()[:12], valid_batch=2), cuda_settings(**options)
        )

    def go_on(trainer, updates):
        for _ in range(updates):
            trainer.step()
            trainer.validate()

    whole, first, second = trainer(), trainer(), trainer()
    go_on(whole, 4)
    go_on(first, 2)
    arrays = {name: array.copy() for name, array in first.arrays().items()}
    second.restore(arrays, json.loads(json.dumps(first.numbers())))
    go_on(second, 2)
    assert whole.arrays().keys() == second.arrays().keys()
    for name, array in whole.arrays().items():
        assert np.array_equal(array, second.arrays()[name]), name
    assert whole.numbers() == second.numbers()


PRUNINGS = {
    "gradual": lambda: GradualPruning(0.5, block=(1, 2), start=0, end=3, every=2),
    "regrown": lambda: RegrownMasks(0.5, block=(1, 2), start=0, end=4, every=2),
    "dynamic": lambda: DynamicMasks(Blocks(0.5, (1, 2)), start=0, end=3, every=1),
    "movement": lambda: MovementPruning(0.5, block=(1, 2), start=1, end=4, every=2),
    "threshold": lambda: ThresholdPruning((1, 2), start=0, ramp=1, end=4, every=1, sparsity=0.5, dense=True),
    "static": lambda: StaticMasks(Blocks(0.5, (1, 2)), start=1),
    "lasso": lambda: Combined(GroupLasso(0.5, block=(1, 2), start=0, end=3), GradualPruning(0.3, start=1, end=4)),
}


def _tied_pruning():
    return GradualPruning(0.5, (1, 3), start=0, end=3, every=2, names=("embedding", "layers.1.w_in"), scope="column")


@pytest.mark.parametrize("kind", [*PRUNINGS, "tied"])
def test_pruning_gives_the_masks_of_the_cpu(gpu, kind):
    pruning, start = PRUNINGS.get(kind, _tied_pruning), _network()
    if kind == "tied":
        rng = np.random.default_rng(5)
        start = Network.random([6, 5], symbols=SYMBOLS, embedding=5, tied=True, threshold=0.1, rng=rng)
    trainers = [
        Trainer(start, LanguageModelling(symbol_text()), cuda_settings(**options), pruning=pruning())
        for options in ({}, {"backend": "cpu", "precision": ""})
    ]
    for _ in range(6):
        ours, theirs = (trainer.step() for trainer in trainers)
        assert ours.sparsity == theirs.sparsity and ours.operations == theirs.operations
    on_gpu, on_cpu = (trainer.model.masks for trainer in trainers)
    assert on_gpu.keys() == on_cpu.keys() and on_gpu
    for name, mask in on_gpu.items():
        assert np.array_equal(mask, on_cpu[name])
        with trainers[0].engine.reading():
            assert not trainers[0].model.parameters[name][~mask].any()


def test_the_best_parameters_are_those_of_their_validation(gpu):
    trainer = Trainer(
        _network(), LanguageModelling(symbol_text(), symbol_text()[:40], valid_batch=2), cuda_settings(steps=5)
    )
    found = []
    for _ in range(4):
        trainer.step()
        value = trainer.validate()["bits"]
        with trainer.engine.reading():
            found.append((value, {name: array.copy() for name, array in trainer.model.parameters.items()}))
    value, expected = min(found, key=lambda each: each[0])
    assert trainer.best_value == value and trainer.best.keys() == expected.keys()
    assert all(np.array_equal(trainer.best[name], array) for name, array in expected.items())


def test_programs_are_dropped_in_the_order_of_their_last_use(gpu, monkeypatch):
    monkeypatch.setattr("eventrnn.cuda.training.engine.MOST_PROGRAMS", 2)
    engine = Trainer(_network(), LanguageModelling(symbol_text()), cuda_settings()).engine
    first = engine.program(2, 3)
    engine.program(3, 3)
    assert engine.program(2, 3) is first
    engine.program(4, 3)
    assert list(engine.programs) == [(2, 3, False), (4, 3, False)]


def test_evaluation_reads_the_parameters_it_is_given(gpu):
    trainer = Trainer(_network(), LanguageModelling(symbol_text(), symbol_text()[:40], valid_batch=2), cuda_settings())
    trainer.step()
    others = {name: array + np.float32(0.25) for name, array in trainer.model.parameters.items()}
    inputs, targets = trainer.task.batch(0, 0, 2, 5).inputs, trainer.task.batch(0, 0, 2, 5).targets
    state, figures = State.zeros(trainer.model.template, 2), []
    for parameters in (None, others, None):
        with trainer.engine.evaluating(parameters) as model:
            nats, after, activity = model.score(inputs, targets, state)
            output, same, tape = model.forward(inputs, state)
        assert output.shape == (5, 2, SYMBOLS) and np.array_equal(activity, tape.layer_activity)
        assert tape.activity == np.rint(activity * [60, 50]).sum() / 110
        assert all(np.array_equal(a, b) for a, b in zip(after.outputs, same.outputs, strict=True))
        figures.append((nats, *activity))
    assert figures[0] == figures[2] != figures[1]
    with pytest.raises(ValueError, match="targets: got shape"), trainer.engine.evaluating() as model:
        model.score(inputs, targets + SYMBOLS, state)


def test_tasks_with_a_loss_of_their_own_train(gpu):
    rng = np.random.default_rng(3)
    sequences, labels = rng.normal(size=(7, 4, 3)).astype(np.float32), rng.integers(0, 5, 7)
    held_out = sequences[:3], labels[:3], np.array([4, 2, 3])
    task = Classification(sequences, labels, held_out, lengths=np.array([4, 4, 3, 2, 4, 1, 4]))
    network = Network.random([6], inputs=3, readout=5, rng=rng, threshold=0.1)
    trainer = Trainer(network, task, cuda_settings(epochs=2))
    progress = list(trainer)
    # Seven sequences are batches of three, three and one.
    assert len(progress) == 6 and np.isfinite([each.loss for each in progress]).all()
    host = Model(trainer.network())
    figures, expected = progress[-1].validation, task.evaluate(host)
    assert figures["activity"] == expected["activity"] and figures["accuracy"] == expected["accuracy"]


class OnHost(LanguageModelling):
    """The same loss by the kernel of the CPU. Notes the largest ratio of the teacher's rest and that of the softmax."""

    def loss(self, output, batch):
        shares = np.exp(output.astype(np.float64))
        shares /= shares.sum(axis=2, keepdims=True)
        named = np.take_along_axis(shares, batch.soft.symbols.astype(np.int64), axis=2).sum(axis=2)
        self.amplified = float(((1 - batch.soft.probabilities.sum(axis=2)) / (1 - named)).max())
        return super().loss(output, batch)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_soft_targets_have_the_loss_and_the_gradient_of_the_cpu(gpu, weight):
    text, kept, rng = symbol_text(), 4, np.random.default_rng(8)
    symbols = rng.permuted(np.tile(np.arange(SYMBOLS), (len(text), 1)), axis=1)[:, :kept]
    soft = SoftTargets(symbols, rng.dirichlet(np.ones(kept + 1), len(text))[:, :kept], weight)
    tasks = LanguageModelling(text, soft=soft), OnHost(text, soft=soft)
    start = _network()
    layers = tuple(replace(layer, threshold=np.zeros_like(layer.threshold)) for layer in start.layers)
    bias = rng.normal(size=SYMBOLS).astype(np.float32)
    start = replace(start, layers=layers, readout=replace(start.readout, bias=bias))
    start = start.with_matrices({name: Dense(8 * w.to_dense()) for name, w in start.matrices().items()})
    fused, apart = (Trainer(start, task, cuda_settings()).engine for task in tasks)
    assert fused.fused and not apart.fused
    assert fused.nbytes - apart.nbytes == 3 * 4 * kept * 8, "an int32 and a float32 per step, sample and symbol"
    # The second time, the work is a graph. The third window is smaller.
    for at, steps in ((0, 4), (4, 4), (8, 3)):
        (ours, found), (theirs, expected) = (
            updated(engine, engine.task.batch(at, 0, 3, steps), at, rate=0.0) for engine in (fused, apart)
        )
        # Both sides are within the bound. A loss is a mean of logarithms of shares, of magnitude below 8.
        bound = 2 * soft_target_error(SYMBOLS, tasks[1].amplified)
        assert abs(ours.loss - theirs.loss) <= 8 * bound
        # Sums over rows, of which each has the bound divided by their number; outputs are below 1.
        for name in ("readout.bias", "readout"):
            assert np.abs(found[name] - expected[name]).max() <= bound, name
            assert np.abs(expected[name]).max() > 100 * bound, "the bound tells right from wrong"
    window = fused.task.batch(0, 0, 3, 4)
    for other, words in (
        (replace(soft.streams(3).steps(0, 4), weight=0.25), "soft: got 4 targets of weight 0.25 .* need 4 of weight"),
        (soft.streams(3).steps(0, 3), r"for each of \(3, 3\)"),
        (None, "soft: got 0 targets"),
    ):
        with pytest.raises(ValueError, match=words):
            updated(fused, replace(window, soft=other), 0)


def test_soft_targets_of_weight_zero_have_the_bits_of_none(gpu):
    text = symbol_text()
    zero = SoftTargets(np.zeros((len(text), 1), int), np.ones((len(text), 1)), 0.0)
    trainers = [Trainer(_network(), LanguageModelling(text, soft=soft), cuda_settings()) for soft in (None, zero)]
    for _ in range(3):
        one, two = (trainer.step() for trainer in trainers)
        assert one.loss == two.loss
    one, two = (trainer.arrays() for trainer in trainers)
    assert (
        all(np.array_equal(one[name], two[name]) for name in one)
        and trainers[0].engine.nbytes == trainers[1].engine.nbytes
    )


def test_a_window_that_fails_changes_nothing(gpu):
    trainer = Trainer(_network(), LanguageModelling(symbol_text()), cuda_settings())
    trainer.step()
    trainer.model.parameters["readout.bias"][2] = np.float32(np.inf)
    before = {name: array.copy() for name, array in trainer.arrays().items()}
    with pytest.raises(Diverged, match="the loss is (nan|inf) at step 2; the largest gradient"):
        trainer.step()
    for name, array in trainer.arrays().items():
        assert np.array_equal(array, before[name]), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threads": 2}, "threads: got 2, but the cuda backend"),
        ({"backward": "sparse"}, "backward: got 'sparse', but the cuda backend"),
        ({"precision": "float16"}, "precision: got 'float16', need one of bfloat16, tf32, float32"),
        ({"backend": "cpu", "precision": "tf32"}, "precision: got 'tf32', but the cpu"),
        ({"backend": "blas"}, "backend: got 'blas', need one of cpu, cuda"),
    ],
)
def test_settings_that_a_backend_does_not_have_are_refused_by_name(gpu, changes, words):
    with pytest.raises(ValueError, match=words):
        Trainer(_network(), LanguageModelling(symbol_text()), cuda_settings(**changes))


@pytest.mark.gpu
def test_a_killed_run_of_the_command_line_goes_on_with_the_same_bits(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    sizes = ["--hidden=24", "--hidden=16", "--embedding=8", "--batch=4", "--window=10", "--steps=40"]
    noise = [f"--set=training.regularisers.{name}=0.2" for name in ("dropconnect", "dropout_input", "dropout_words")]
    often = ["--set=training.window_jitter=2", "--set=training.validate_every=10", "--set=run.checkpoint_seconds=0"]

    def start(*arguments):
        command = [sys.executable, "-m", "eventrnn", "train", "--json", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def ended(run):
        out, err = run.communicate()
        return run.returncode, out, err

    models = [tmp_path / name for name in ("straight", "killed")]
    runs = [start(f"--out={model}", f"--text={text}", "--backend=cuda", *sizes, *noise, *often) for model in models]
    checkpoint = tmp_path / "killed.run" / "checkpoint.safetensors"
    while not checkpoint.exists() and runs[1].poll() is None:
        time.sleep(0.001)
    runs[1].kill()
    code, out, err = ended(runs[0])
    assert code == 0, err
    assert "GPU memory 100%" in err and "bytes for the run" in err
    assert json.loads(out)["steps"] == 40 and json.loads(out)["perplexity_valid"] > 1
    assert ended(runs[1])[0] == -9, "the run ended before it was killed"
    code, _, err = ended(start(f"--resume={tmp_path / 'killed.run'}"))
    assert code == 0, err
    assert models[1].read_bytes() == models[0].read_bytes()


def test_too_little_memory_is_refused_with_the_bytes(monkeypatch):
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    device = fake_training.install(monkeypatch, room=1000)
    with pytest.raises(MemoryError, match=r"cuda: [\d,]+ bytes are needed and 1,000 are free"):
        Trainer(_network(), LanguageModelling(symbol_text()), cuda_settings())
    assert not device.allocated


def _of_cells(cells, units, rng, **shape) -> Network:
    """A network with a cell of its own in each layer."""
    cell = cells[0]
    network = Network.random(units, rng=rng, threshold=0.1 * cell.thresholded, cell=cell, **shape)
    layers = list(network.layers)
    for k, cell in enumerate(cells):
        if k and cell != cells[0]:
            options = {"inputs": units[k - 1], "threshold": 0.1 * cell.thresholded, "cell": cell}
            layers[k] = Network.random([units[k]], rng=rng, **options).layers[0]
    return replace(network, layers=tuple(layers))


def _network() -> Network:
    rng = np.random.default_rng(5)
    return Network.random([6, 5], symbols=SYMBOLS, embedding=4, readout=SYMBOLS, threshold=0.1, rng=rng)
