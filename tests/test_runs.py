"""Runs in a folder: an interrupted run continues to the same bits, and a different run is refused."""

import io
import json
import os
import signal
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventrnn import Network
from eventrnn import _files as files
from eventrnn.pruning import (
    Blocks,
    Combined,
    DynamicMasks,
    GradualPruning,
    MovementPruning,
    Pruning,
    RegrownMasks,
    StaticMasks,
    ThresholdPruning,
    cubic_schedule,
)
from eventrnn.pruning.schedule import describe
from eventrnn.training import (
    CheckpointError,
    Diverged,
    LanguageModelling,
    Optimiser,
    Settings,
    Stopped,
    Task,
    Trainer,
    load_checkpoint,
    read_log,
    run,
    save_checkpoint,
)
from support.runs import TEXT, bits_of, small_trainer


def _kinds():
    return {
        "adamw": {},
        "adam": {"optimiser": Optimiser("adam", beta1=0.0)},
        "nt-asgd": {"optimiser": Optimiser("nt-asgd", patience=1), "learning_rate": 3.0, "validate_every": 3},
        "epochs": {"epochs": 1, "validate_every": 0},
        "sigmoid": {"thresholds": "sigmoid", "optimiser": Optimiser("sgd", momentum=0.5)},
    }


@given(st.sampled_from(sorted(_kinds())), st.integers(1, 29), st.booleans())
@settings(max_examples=12)
def test_a_saved_run_continues_to_the_samebits_of(tmp_path_factory, kind, stop, pruned):
    def start():
        pruning = GradualPruning(0.6, (1, 1), 0, 20, every=3) if pruned else None
        return small_trainer(pruning=pruning, **_kinds()[kind])

    path = tmp_path_factory.mktemp("saved") / "checkpoint.safetensors"
    whole, first, second = start(), start(), start()
    for progress in first:
        if progress.step == stop:
            break
    save_checkpoint(first, path, notes={"mine": [1, "two"]})
    assert load_checkpoint(second, path) == {"mine": [1, "two"]}
    assert bits_of(first) == bits_of(second)
    for each in (whole, second):
        each.run()
    assert bits_of(whole) == bits_of(second)


class _Fatal:
    """Ends the process as by `kill -9` at the n-th moment: a piece of a file written, a file made durable, linked or
    renamed, or an update done."""

    def __init__(self, at, patch, trainer):
        self.left = at
        for name in ("fsync", "link", "replace"):
            patch.setattr(os, name, self.after(getattr(os, name)))
        patch.setattr(trainer, "step", self.after(trainer.step))
        patch.setattr(files, "open", self.open, raising=False)

    def after(self, function):
        def call(*arguments, **options):
            self.tick()
            return function(*arguments, **options)

        return call

    def tick(self):
        self.left -= 1
        if self.left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def open(self, *arguments, **options):
        file, fatal = io.FileIO(os.fspath(arguments[0]), arguments[1].removesuffix("b"), **options), self

        class Pieces:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

            def write(self, raw):
                for start in range(0, len(raw), 1 << 12):
                    fatal.tick()
                    file.write(raw[start : start + (1 << 12)])

            def __getattr__(self, name):
                return getattr(file, name)

        return Pieces()


def _pruned_while_training():
    """Pruning rules with state of their own: movement scores, masks that change, dense copies of weights."""
    return {
        "nothing": None,
        "movement": MovementPruning(0.6, (1, 1), 2, 20, every=3),
        "dynamic": DynamicMasks(Blocks(0.5, (1, 1)), 0, 20, every=4),
        "regrown": RegrownMasks(0.5, (1, 1), 0, 20, every=4),
    }


def _attempt(folder, at, pruning=None):
    """Continue the run in a process that dies at moment `at`. Returns whether the run came to its end first."""
    with warnings.catch_warnings():
        # The child uses no thread of its parent, because a fork does not copy them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            with pytest.MonkeyPatch.context() as patch:
                trainer = small_trainer(pruning=pruning)
                _Fatal(at, patch, trainer)
                run(trainer, folder, resume=True, checkpoint_seconds=0, log_every=4)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed for another reason"
    return not os.WIFSIGNALED(status)


@pytest.mark.parametrize("way", _pruned_while_training())
def test_twenty_kills_at_random_moments_and_during_saves_change_no_bit(tmp_path, way):
    def pruning():
        return _pruned_while_training()[way]

    straight = small_trainer(pruning=pruning())
    run(straight, tmp_path / "straight", checkpoint_seconds=0, log_every=4)
    rng, kills, folder = np.random.default_rng(7), 0, tmp_path / "killed"
    while kills < 20:
        if _attempt(folder, int(rng.integers(1, 25)), pruning()):
            break
        kills += 1
    assert kills == 20, "the run ended before it was killed often enough"
    assert _attempt(folder, 1_000_000, pruning())
    ended = small_trainer(pruning=pruning())
    load_checkpoint(ended, folder / "checkpoint.safetensors")
    assert bits_of(ended) == bits_of(straight)
    logs = (read_log(tmp_path / name) for name in ("straight", "killed"))
    lines = [[{k: v for k, v in line.items() if k != "seconds"} for line in log] for log in logs]
    assert lines[0] == lines[1], "the log is that of the uninterrupted run"
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["checkpoint.safetensors", "log.jsonl", "previous-checkpoint.safetensors"]


def test_a_run_in_use_is_refused(tmp_path):
    def again(progress, seconds):
        with pytest.raises(ValueError, match=f"run is in use by process {os.getpid()}"):
            run(small_trainer(), tmp_path / "run", resume=True)

    run(small_trainer(steps=2), tmp_path / "run", report=again)
    assert [line["step"] for line in read_log(tmp_path / "run")] == [2]


def test_a_run_goes_on_with_another_number_of_threads_and_says_so(tmp_path):
    two, one = (small_trainer(backward="sparse", threads=threads, steps=9) for threads in (2, 1))
    for _ in range(4):
        two.step()
    save_checkpoint(two, tmp_path / "c")
    with pytest.warns(UserWarning, match="threads: 2 in the checkpoint, 1 now: the run goes on, but products"):
        load_checkpoint(one, tmp_path / "c")
    assert bits_of(two) == bits_of(one)
    one.run()
    assert one.steps_done == 9


def test_a_signed_checkpoint_of_other_arrays_is_refused_before_anything_changes(tmp_path):
    trainer, other = small_trainer(), small_trainer()
    arrays = trainer.arrays()
    arrays.pop("state.cells.1")
    trainer.arrays = lambda: arrays
    save_checkpoint(trainer, tmp_path / "c")
    before = bits_of(other)
    with pytest.raises(CheckpointError, match="holds no state of this run: arrays: state.cells.1 does not fit"):
        load_checkpoint(other, tmp_path / "c")
    assert bits_of(other) == before


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch": 5}, "settings.batch: 4 in the checkpoint, 5 now"),
        ({"learning_rate": 0.5}, "settings.learning_rate: 0.01 in the checkpoint, 0.5 now"),
        ({"optimiser": Optimiser("adam")}, "settings.optimiser.kind: adamw in the checkpoint, adam now"),
        ({"text": TEXT[::-1]}, "data"),
        ({"layers": (12, 10)}, r"model.layers.1.bias_in: \[27\] in the checkpoint, \[30\] now"),
        ({"pruning": GradualPruning(0.5, end=9)}, "pruning"),
    ],
)
def test_another_run_is_refused_with_what_changed(tmp_path, changed, words):
    save_checkpoint(small_trainer(), tmp_path / "c")
    other = small_trainer(**changed)
    before = bits_of(other)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(other, tmp_path / "c")
    assert bits_of(other) == before
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(other, tmp_path / "none")


def test_a_checkpoint_of_a_version_without_a_setting_goes_on_with_its_default(tmp_path):
    trainer = small_trainer()
    identity = trainer.identity()
    del identity["settings"]["optimiser"]["embedding_rate"], identity["settings"]["patience"]
    trainer.identity = lambda: identity
    save_checkpoint(trainer, tmp_path / "c")
    load_checkpoint(small_trainer(), tmp_path / "c")
    with pytest.raises(CheckpointError, match="settings.patience: 0 in the checkpoint, 3 now"):
        load_checkpoint(small_trainer(patience=3), tmp_path / "c")
    # The version without it drew other noise.
    del identity["settings"]["backend"]
    save_checkpoint(trainer, tmp_path / "c")
    with pytest.raises(CheckpointError, match="settings.backend"):
        load_checkpoint(small_trainer(), tmp_path / "c")


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run(small_trainer(steps=2), tmp_path)
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds a run"):
        run(small_trainer(steps=2), tmp_path)
    assert content == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("way", _pruned_while_training())
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_request_finishes_the_update_saves_and_resumes(tmp_path, number, way):
    def interrupt(progress, seconds):
        if progress.step == 11:
            os.kill(os.getpid(), number)

    def start():
        return small_trainer(pruning=_pruned_while_training()[way])

    handler = signal.getsignal(number)
    straight, stopped = start(), start()
    straight.run()
    with pytest.raises(Stopped, match="after step 11, saved"):
        run(stopped, tmp_path, report=interrupt)
    assert signal.getsignal(number) is handler
    again = start()
    run(again, tmp_path, resume=True)
    assert bits_of(again) == bits_of(straight)


def test_non_finite_loss_stops_with_a_report(tmp_path):
    trainer = small_trainer()

    step = trainer.step

    def spoiled():
        if trainer.steps_done == 9:
            trainer.model.parameters["readout"][:] = np.inf
        return step()

    trainer.step = spoiled
    with np.errstate(all="ignore"), pytest.raises(Diverged) as caught:
        run(trainer, tmp_path, checkpoint_seconds=0)
    words = str(caught.value)
    assert "nan at step 10" in words and "checkpoint.safetensors, step 9" in words
    assert trainer.largest.split(" ")[0] in trainer.model.parameters and trainer.largest in words
    again = small_trainer()
    load_checkpoint(again, tmp_path / "checkpoint.safetensors")
    assert again.steps_done == 9


def test_non_finite_gradient_is_named():
    trainer = small_trainer(steps=5)
    backward = trainer.model.backward

    def spoiled(*arguments, **options):
        gradients = backward(*arguments, **options)
        gradients["layers.1.w_rec"][0, 0] = np.nan
        return gradients

    trainer.model.backward = spoiled
    before = {name: value.copy() for name, value in trainer.model.parameters.items()}
    with pytest.raises(Diverged, match=r"gradient of layers.1.w_rec is not finite at step 1"):
        trainer.step()
    assert all(np.array_equal(before[name], trainer.model.parameters[name]) for name in before)


def test_the_best_validation_is_kept_and_patience_stops():
    trainer = small_trainer(steps=400, validate_every=2, patience=3, learning_rate=0.3)
    values = [p.validation["bits"] for p in trainer if p.validation]
    assert len(values) < 200 and trainer.finished and trainer.best_value == min(values)
    assert values.index(min(values)) == len(values) - 4
    network = trainer.network(best=True)
    assert np.array_equal(network.embedding, trainer.best["embedding"])
    assert not np.array_equal(network.embedding, trainer.model.parameters["embedding"])


def test_a_full_disk_leaves_the_checkpoints_as_they_were(tmp_path, monkeypatch):
    trainer = small_trainer()
    path = tmp_path / "c"
    for _ in range(2):
        trainer.step()
        save_checkpoint(trainer, path)
    content = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(trainer, path)
    assert content == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_the_log_has_means_and_every_validation(tmp_path):
    steps = []
    run(small_trainer(steps=10), tmp_path, log_every=4, report=lambda p, s: steps.append(p))
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == [4, 7, 10]
    # Added one after the other, as the log does; `sum` of Python 3.12 and later rounds otherwise.
    first, second, third, fourth = (p.loss for p in steps[:4])
    assert lines[0]["loss"] == (first + second + third + fourth) / 4
    assert [bool(line["validation"]) for line in lines] == [False, True, True]
    assert json.loads(json.dumps(lines)) == lines


class _Halving(Pruning):
    """A pruning rule of a user, without a repr."""

    def __init__(self, matrix, end=9):
        self.start, self.end, self.matrix, self.sparsity = 1, end, matrix, cubic_schedule(0.5, 0, end)
        self._seen = 0

    def update(self, step, parameters, masks):
        self._seen += 1
        return False


def _ways():
    yield lambda: _Halving(np.arange(3))
    yield lambda: Combined(GradualPruning(0.5, end=9), _Halving(np.arange(3)))
    yield lambda: MovementPruning(0.5, start=2, end=9, every=2)
    yield lambda: StaticMasks(Blocks(0.5))
    yield lambda: DynamicMasks(Blocks(0.5), end=9, every=2)
    yield lambda: RegrownMasks(0.5, end=9, every=2)
    yield lambda: ThresholdPruning(end=9, sparsity=0.5)
    yield lambda: ThresholdPruning(end=9, sparsity=0.5, dense=True)


@pytest.mark.parametrize("way", list(_ways()))
def test_a_run_with_every_pruning_rule_continues_to_the_samebits_of(tmp_path, way):
    whole, first, second = (small_trainer(pruning=way(), steps=11) for _ in range(3))
    for _ in range(6):
        first.step()
    save_checkpoint(first, tmp_path / "c")
    load_checkpoint(second, tmp_path / "c")
    while not second.finished:
        second.step()
    while not whole.finished:
        whole.step()
    assert bits_of(whole) == bits_of(second)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (_Halving(np.arange(3)), _Halving(np.arange(3) + 1)),
        (_Halving(np.arange(3)), _Halving(np.arange(3), end=8)),
        (Combined(_Halving(np.zeros(2))), Combined(_Halving(np.ones(2)))),
        (ThresholdPruning(trained={"w": np.zeros(9)}), ThresholdPruning(trained={"w": np.ones(9)})),
        (DynamicMasks(Blocks(0.5), end=99), DynamicMasks(Blocks(0.6), end=99)),
    ],
)
def test_other_pruning_is_another_run(one, other):
    assert one.digest() == one.digest() != other.digest()
    assert " at 0x" not in one.digest()


def test_user_tasks_differ_by_their_data(tmp_path):
    class Mine(LanguageModelling):
        digest = Task.digest

    network = Network.random([6], symbols=8, embedding=5, readout=8, threshold=0.1, rng=np.random.default_rng(1))
    first, same, other = (
        Trainer(network, Mine(text), Settings(steps=9, batch=4, window=8)) for text in (TEXT, TEXT.copy(), TEXT[::-1])
    )
    first.step()
    save_checkpoint(first, tmp_path / "c")
    load_checkpoint(same, tmp_path / "c")
    with pytest.raises(CheckpointError, match="data"):
        load_checkpoint(other, tmp_path / "c")


def test_descriptions_follow_content_not_addresses():
    def closed(value):
        return lambda: value

    for value, changed in (
        (closed(1), closed(2)),
        ({"a": [np.arange(3)]}, {"a": [np.arange(4)]}),
        (np.array(["a", None], object), np.array(["b", None], object)),
        (np.array(["2020-01-01"], "M8[D]"), np.array(["2020-01-02"], "M8[D]")),
        ({1, 2}, {1, 3}),
        (Settings, Trainer),
    ):
        assert describe(value) == describe(value) != describe(changed)
    assert describe(object()) == describe(object())
    around = _Halving(np.zeros(1))
    around.me = [around]
    assert "_Halving" in describe(around)
