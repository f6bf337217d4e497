"""Training on a GPU: what its engine refuses, what it leaves behind when something fails, and options that it must not
ignore. On a fake GPU everywhere, and marked `gpu` on one."""

from __future__ import annotations

import gc
import weakref
from dataclasses import fields, replace

import numpy as np
import pytest

from eventrnn import Cell, Network, State
from eventrnn.backend import BackendUnavailable
from eventrnn.cli import app
from eventrnn.pruning import GradualPruning, prune
from eventrnn.training import (
    Classification,
    LanguageModelling,
    Model,
    Optimiser,
    Regularisers,
    Schedule,
    Settings,
    Trainer,
)
from eventrnn.training.regularisers import RATES, STRENGTHS
from support import fake_training
from support.cuda_runs import SYMBOLS, cuda_settings, symbol_text
from support.gated import gate_matrices


@pytest.fixture(params=["fake", pytest.param("gpu", marks=pytest.mark.gpu)])
def gpu(request, monkeypatch):
    """A fake GPU, or the real one; the value says which."""
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    if request.param == "fake":
        fake_training.install(monkeypatch)
    return request.param


def test_an_exception_of_the_loss_leaves_the_trainer_usable(gpu):
    class Failing(LanguageModelling):
        def loss(self, output, batch):
            if self._fails:
                raise KeyError("a loss of one's own")
            return super().loss(output, batch)

    straight, failed = (Trainer(_network(), Failing(symbol_text()), cuda_settings()) for _ in range(2))
    straight.task._fails = failed.task._fails = False
    assert straight.step() == failed.step()
    failed.task._fails = True
    with pytest.raises(KeyError, match="of one's own"):
        failed.step()
    failed.task._fails = False
    assert failed.step() == straight.step()
    for name, array in straight.arrays().items():
        assert np.array_equal(failed.arrays()[name], array), name


class Changed(LanguageModelling):
    """The text, with windows that a function changes."""

    def __init__(self, change):
        super().__init__(symbol_text())
        self._change = change

    def batch(self, at, epoch, batch, window):
        return self._change(super().batch(at, epoch, batch, window))


def test_windows_that_do_not_fit_are_refused_before_anything_changes(gpu):
    trainer = Trainer(_network(), Changed(lambda b: b), cuda_settings())
    trainer.step()
    before = {name: array.copy() for name, array in trainer.arrays().items()}
    for change, words in (
        (lambda b: replace(b, targets=b.targets - 100), r"targets: got shape \(4, 3\), need \(4, 3\) classes below 9"),
        (lambda b: replace(b, targets=b.targets[:1]), r"targets: got shape \(1, 3\), need \(4, 3\) classes"),
        (lambda b: replace(b, targets=b.targets + 0.5), "targets: got float64"),
        (lambda b: replace(b, inputs=b.inputs + SYMBOLS), "inputs: got symbol"),
        (lambda b: replace(b, inputs=b.inputs * 1.0), "inputs: got float64"),
        (lambda b: replace(b, inputs=b.inputs[:0], targets=b.targets[:0]), "inputs: got shape .* at least one step"),
    ):
        trainer.task._change = change
        with pytest.raises(ValueError, match=words):
            trainer.step()
        assert all(np.array_equal(array, before[name]) for name, array in trainer.arrays().items())
    trainer.task._change = lambda b: b
    assert trainer.step().step == 2


def test_numbers_and_states_are_checked_as_on_the_cpu(gpu):
    network = Network.random([6], inputs=3, readout=2, threshold=0.1, rng=np.random.default_rng(3))
    numbers = np.zeros((4, 2, 3), np.float32)
    task = Classification(np.moveaxis(numbers, 0, 1), np.array([0, 1]))
    trainer = Trainer(network, task, cuda_settings(batch=2))
    state, infinite = State.zeros(network, 2), numbers.copy()
    infinite[1, 0, 2] = np.inf
    with trainer.engine.evaluating() as model:
        for inputs, before, words in (
            (infinite, state, r"inputs: got inf at position \(1, 0, 2\)"),
            (numbers[:, :, :2], state, r"inputs: got shape \(4, 2, 2\), need \(T, B, 3\)"),
            (numbers, State.zeros(network, 1), r"state cells: got arrays of shape \[\(1, 6\)\], need \[\(2, 6\)\]"),
        ):
            with pytest.raises(ValueError, match=words):
                model.forward(inputs, before)
        model.forward(numbers, state)


def test_the_state_of_a_gru_is_checked_as_on_the_cpu(gpu):
    network = Network.random([6], inputs=3, readout=2, cell=Cell("gru"), rng=np.random.default_rng(3))
    numbers = np.zeros((4, 2, 3), np.float32)
    trainer = Trainer(network, Classification(np.moveaxis(numbers, 0, 1), np.array([0, 1])), cuda_settings(batch=2))
    zeros = State.zeros(network, 2)
    differing = State((zeros.cells[0] + np.float32(1),), zeros.outputs)
    with trainer.engine.evaluating() as model:
        for each in (model, Model(network)):
            with pytest.raises(ValueError, match=r"state of layer 0: got cell 1.0 and output 0.0"):
                each.forward(numbers, differing)


def test_windows_of_evaluations_are_dropped_in_the_order_of_their_last_use(gpu, monkeypatch):
    monkeypatch.setattr("eventrnn.cuda.training.evaluation.MOST_WINDOWS", 2)
    trainer = Trainer(_network(), LanguageModelling(symbol_text()), cuda_settings())
    with trainer.engine.evaluating() as model:
        for steps in (3, 2, 3, 1):
            model.forward(np.zeros((steps, 1), int), State.zeros(trainer.model.template, 1))
        assert list(model.windows) == [(3, 1), (1, 1)]


@pytest.mark.parametrize("gates", [False, True])
def test_larger_windows_take_the_place_of_smaller_ones(gpu, gates):
    network = gate_matrices(_network(), block=(2, 2)) if gates else _network()
    trainer = Trainer(network, LanguageModelling(symbol_text()), cuda_settings())
    engine = trainer.engine
    # The second update is captured as a graph.
    for _ in range(2):
        trainer.step()
    before, old = engine.state, weakref.ref(engine.memory)
    gc.disable()
    try:
        with engine.device.on_stream():
            engine._grow(40, 3)
        assert old() is None, "the old memory must be freed at once"
    finally:
        gc.enable()
    assert engine.capacity == (48, 3) and not engine.programs
    for ours, theirs in zip(engine.state.cells + engine.state.outputs, before.cells + before.outputs, strict=True):
        assert np.array_equal(ours, theirs)


def test_a_window_for_which_memory_is_missing_changes_nothing(monkeypatch):
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    device = fake_training.install(monkeypatch)
    straight, short = (Trainer(_network(), LanguageModelling(symbol_text()), cuda_settings()) for _ in range(2))
    straight.step(), short.step()
    room, device.room = device.room, 1000
    with pytest.raises(MemoryError, match=r"cuda: [\d,]+ bytes are needed and 1,000 are free"):
        short.engine._grow(400, 3)
    # The statement may be too low: something else may take the memory meanwhile.
    monkeypatch.setattr(device, "need", lambda needed: None)
    # Large enough for the arrays that were there.
    device.room = max(array.nbytes for array in short.engine.memory.arrays.values())
    with pytest.raises(MemoryError), device.on_stream():
        short.engine._grow(400, 3)
    device.room = room
    assert short.engine.capacity == (4, 3) and short.step() == straight.step()
    for name, array in straight.arrays().items():
        assert np.array_equal(short.arrays()[name], array), name


@pytest.mark.parametrize("kind", ["text", "events", "sequences", "gated"])
def test_the_memory_that_is_stated_holds_updates_and_validations(gpu, kind):
    """Of a run with masks, too: arrays, not what CUDA itself takes for programs."""
    from eventrnn.cuda.cublas import WORKSPACE_BYTES
    from eventrnn.cuda.training.engine import SMALL_ARRAYS

    text = symbol_text()
    if kind == "sequences":
        task = Classification(text.reshape(30, 5), text[:30], valid=(text[:28].reshape(4, 7), text[:4]))
    else:
        task = LanguageModelling(text, text[:41], valid_batch=2, carry="events" if kind == "events" else "state")
    network = _network() if kind == "gated" else prune(_network(), 0.5, names=("layers.0.w_in", "readout"))
    if kind == "gated":
        network = gate_matrices(network, rank=2, block=(2, 2))
    trainer = Trainer(network, task, cuda_settings())
    engine = trainer.engine
    assert f"{engine.nbytes:,} bytes for the run" in engine.memory_use
    trainer.step(), trainer.validate()
    evaluator = engine.evaluator
    assert evaluator.capacity == task.evaluation_window(SYMBOLS)
    there = engine.parameters
    named = [*engine.memory.arrays.values(), *evaluator.memory.arrays.values(), *there.masks.values()]
    named += [there.values, there.gradients, there.operands, there.chunks, there.squares, *there.states.values()]
    named += [there.kept[name] for name in there.gated]
    small = [there.scales, there.numbers, there.results, there.segments]
    small += [array for name, array in there.kept.items() if name not in there.gated]
    held = sum(array.nbytes for array in named)
    workspaces = WORKSPACE_BYTES * (len(network.layers) + 2)
    assert held <= engine.nbytes - SMALL_ARRAYS - workspaces <= 1.01 * held
    assert sum(array.nbytes for array in small) + 512 * len(named) < SMALL_ARRAYS


@pytest.mark.gpu
def test_the_memory_that_is_stated_is_what_the_device_holds():
    """At a size where large arrays count, all arrays that CuPy has given out since the start of the run."""
    import cupy

    rng = np.random.default_rng(0)
    network = Network.random([256, 192], symbols=2000, embedding=192, tied=True, rng=rng, threshold=0.1)
    text, pool = rng.integers(0, 2000, 20_000), cupy.get_default_memory_pool()
    gc.collect()
    before = pool.used_bytes()
    task = LanguageModelling(text, text[:9000], valid_batch=32)
    settings = cuda_settings(batch=16, window=32, precision="bfloat16", window_jitter=3.0)
    pruning = GradualPruning(0.5, end=2, every=1, names=("layers.0.w_rec",))
    trainer = Trainer(network, task, settings, pruning=pruning)
    stated = trainer.engine.nbytes
    for _ in range(4):
        trainer.step(), trainer.validate()
    held = pool.used_bytes() - before
    # The masks of a run that prunes are asked for when they come.
    masks = sum(array.nbytes for array in trainer.engine.parameters.masks.values())
    assert masks > 0 and 0.5 * stated < held <= stated + masks


def test_a_run_whose_validation_does_not_fit_is_refused(monkeypatch):
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    device = fake_training.install(monkeypatch)
    text = symbol_text()

    def trainer(valid):
        return Trainer(_network(), LanguageModelling(text, valid, valid_batch=2), cuda_settings())

    alone, both = trainer(None).engine.nbytes, trainer(text).engine.nbytes
    assert both > alone
    monkeypatch.setattr(device, "room", both - 1)
    trainer(None)
    with pytest.raises(MemoryError, match=rf"{both:,} bytes are needed and {both - 1:,} are free"):
        trainer(text)


def test_an_interrupted_transfer_is_made_up_for(gpu, monkeypatch):
    """Ctrl-C may come while arrays are sent: what was not sent is sent by the next call."""
    trainer = Trainer(_network(), LanguageModelling(symbol_text(), symbol_text()[:12], valid_batch=2), cuda_settings())
    trainer.step()
    others = {name: array + np.float32(0.25) for name, array in trainer.model.parameters.items()}
    parameters, send, left = trainer.engine.parameters, trainer.engine.parameters.send, [3]

    def interrupted(*arguments):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        send(*arguments)

    for name, array in trainer.model.parameters.items():
        array[...] = others[name]
    monkeypatch.setattr(parameters, "send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.validate()
    with trainer.engine.evaluating():
        assert all(np.array_equal(_there(trainer, name), others[name]) for name in others)
    # The same within an evaluation of other parameters.
    left[0] = 3
    with pytest.raises(KeyboardInterrupt), trainer.engine.evaluating({name: others[name] * 2 for name in others}):
        raise AssertionError("was not interrupted")
    assert all(np.array_equal(_there(trainer, name), others[name]) for name in others)


def _there(trainer, name: str) -> np.ndarray:
    """A parameter as it is on the GPU."""
    out = np.empty_like(trainer.model.parameters[name])
    with trainer.engine.device.on_stream():
        trainer.engine.parameters.fetch(name, trainer.engine.parameters.values, out)
    return out


def test_a_given_model_brings_its_own_rules(gpu):
    network = _network()
    trainer = Trainer(
        network, LanguageModelling(symbol_text()), cuda_settings(), model=Model(network, thresholds="sigmoid")
    )
    with trainer.engine.reading():
        before = {name: array.copy() for name, array in trainer.model.parameters.items() if "threshold" in name}
    assert all((logits < 0).any() for logits in before.values())
    trainer.step()
    with trainer.engine.reading():
        # With the bounds of "positive", the rule of the settings, they would be zero.
        for name, logits in before.items():
            assert (trainer.model.parameters[name][logits < 0] < 0).any()
    for options, words in (
        ({"backward": "sparse"}, "backward: got 'sparse', but the cuda"),
        ({"threads": 2}, "threads"),
    ):
        with pytest.raises(ValueError, match=words):
            Trainer(network, LanguageModelling(symbol_text()), cuda_settings(), model=Model(network, **options))


def test_a_loss_beyond_float32_is_that_of_the_cpu(gpu):
    losses = []
    for backend, precision in (("cuda", "float32"), ("cpu", "")):
        trainer = Trainer(
            _network(), LanguageModelling(symbol_text()), cuda_settings(backend=backend, precision=precision)
        )
        bias = trainer.model.parameters["readout.bias"]
        bias[:], bias[0] = np.float32(-3e38), np.float32(3e38)
        losses.append(trainer.step().loss)
    assert losses[0] == losses[1] > float(np.finfo(np.float32).max)


@pytest.mark.parametrize("error", [MemoryError("cuda: 9 bytes are needed"), RuntimeError("the GPU has gone")])
def test_the_command_line_says_how_to_go_on_after_an_error_of_the_gpu(tmp_path, monkeypatch, error):
    def fails(recipe, folder, **options):
        (folder / "checkpoint.safetensors").write_bytes(b"")
        raise error

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text("")
    monkeypatch.setattr("eventrnn.training.recipes.recipe.train", fails)
    with pytest.raises(type(error), match=rf"{error}; the last checkpoint is in .*run; continue with: eventrnn train"):
        app(["train", f"--resume={folder}", f"--out={tmp_path / 'model'}"], standalone_mode=False)


#: options that the engine honours, with a value other than that of `_ended`
HONOURED = {
    "batch": 2,
    "window": 3,
    "window_jitter": 3.0,
    "learning_rate": 0.02,
    "weight_decay": 0.5,
    "clip": 0.01,
    "clip_layers": 0.001,
    "activity_cost": 0.5,
    "seed": 9,
    "thresholds": "fixed",
    "optimiser.kind": "sgd",
    "optimiser.beta1": 0.0,
    "optimiser.beta2": 0.9,
    "optimiser.epsilon": 0.1,
    "optimiser.threshold_rate": 0.0,
    "optimiser.bias_rate": 0.0,
    "optimiser.embedding_rate": 0.0,
    "optimiser.readout_rate": 0.0,
    "optimiser.decay_biases": True,
    "schedule.kind": "step",
    "schedule.constant": 0.0,
    "schedule.warmup": 2,
    "regularisers.dropconnect": 0.5,
    "regularisers.dropout_input": 0.5,
    "regularisers.dropout_between": 0.5,
    "regularisers.dropout_top": 0.5,
    "regularisers.dropout_words": 0.5,
    "regularisers.zoneout": 0.5,
    "regularisers.mask_sharing": "batch",
    "regularisers.activity_rate": 5.0,
    "regularisers.activity_target": 0.9,
    "regularisers.state": 5.0,
    "regularisers.state_margin": 0.9,
    "regularisers.activation": 5.0,
    "regularisers.temporal_activation": 5.0,
}

#: options that are not the engine's, or that another test changes
OTHERS = {
    "steps": "length of the run, counted by the trainer",
    "epochs": "length of the run, counted by the trainer",
    "validate_every": "rhythm of validations, kept by the trainer",
    "patience": "number of validations, counted by the trainer",
    "backward": "refused: test_settings_that_a_backend_does_not_have_are_refused_by_name",
    "threads": "refused: test_settings_that_a_backend_does_not_have_are_refused_by_name",
    "backend": "what is compared",
    "devices": "several GPUs make the updates of one: test_data_parallel.py",
    "precision": "of a GPU only: test_an_update_agrees_with_the_specification",
    "optimiser.momentum": "of sgd: test_update_rules_have_the_bits_of_the_cpu",
    "optimiser.patience": "of nt-asgd: test_update_rules_have_the_bits_of_the_cpu",
    "schedule.final": "factor at the end of the run, computed by the trainer",
    "schedule.every": "of the schedule step, computed by the trainer",
    "schedule.factor": "of the schedule step, computed by the trainer",
    "gates": "of gated blocks: test_no_option_of_gates_is_ignored",
    "regularisers.gate_balance": "of gated blocks, as the option gates",
}


def test_no_option_is_ignored(gpu):
    """Every option changes a run on the GPU, or `OTHERS` says why not."""
    kinds = {"optimiser": Optimiser, "schedule": Schedule, "regularisers": Regularisers}
    names = {each.name for each in fields(Settings)} - kinds.keys()
    names |= {f"{kind}.{each.name}" for kind, record in kinds.items() for each in fields(record)}
    assert names == HONOURED.keys() | OTHERS.keys() and not HONOURED.keys() & OTHERS.keys()
    plain = _ended({})
    for name, value in HONOURED.items():
        assert _ended({name: value}) != plain, f"{name} is ignored"


def _ended(changes: dict) -> bytes:
    """The parameters after two updates, with options by name that differ from the ones here."""
    records: dict[str, dict] = {"": {}, "optimiser": {}, "schedule": {}, "regularisers": {}}
    rates = dict.fromkeys(RATES, 0.2) | dict.fromkeys([name for name in STRENGTHS if name != "gate_balance"], 0.3)
    records["regularisers"] |= rates
    for name, value in changes.items():
        kind, _, option = name.rpartition(".")
        records[kind][option] = value
    network = Network.random([2, 2], symbols=3, embedding=2, readout=3, threshold=0.1, rng=np.random.default_rng(14))
    # Enough units fire for every penalty to count.
    open_layers = tuple(replace(layer, threshold=np.zeros(2, np.float32)) for layer in network.layers)
    chosen = Settings(
        **{"steps": 4, "batch": 1, "window": 2, "backend": "cuda", "precision": "float32", "clip": 10.0} | records[""],
        optimiser=Optimiser(**records["optimiser"]),
        schedule=Schedule(**{"every": 0.2} | records["schedule"]),
        regularisers=Regularisers(**records["regularisers"]),
    )
    trainer = Trainer(replace(network, layers=open_layers), LanguageModelling(np.arange(40) % 3), chosen)
    for _ in range(2):
        trainer.step()
    with trainer.engine.reading():
        return b"".join(array.tobytes() for array in trainer.model.parameters.values())


def _network() -> Network:
    rng = np.random.default_rng(5)
    return Network.random([3, 4], symbols=SYMBOLS, embedding=2, readout=SYMBOLS, threshold=0.1, rng=rng)
