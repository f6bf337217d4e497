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
    Regularisers,
    Settings,
    Stopped,
    Task,
    Trainer,
    load_checkpoint,
    read_log,
    run,
    save_checkpoint,
    split_checkpoint,
)
from eventrnn.training.checkpoint import previous

TEXT = np.random.default_rng(5).integers(0, 6, 900) // 2 * 2 + np.arange(900) % 2
NOISE = Regularisers(0.3, 0.1, 0.2, 0.1, 0.1, 0.1, activity_rate=0.5, temporal_activation=0.1)


def _trainer(seed=0, text=TEXT, pruning=None, layers=(12, 9), **changes):
    network = Network.random(
        list(layers), symbols=8, embedding=5, readout=8, threshold=0.1, rng=np.random.default_rng(1)
    )
    options = {"steps": 30, "batch": 4, "window": 8, "window_jitter": 2.0, "learning_rate": 1e-2, "validate_every": 7}
    chosen = Settings(**(options | {"regularisers": NOISE, "seed": seed} | changes))
    return Trainer(network, LanguageModelling(text[:700], text[700:]), chosen, pruning=pruning)


def _bits(trainer):
    return {name: array.tobytes() for name, array in trainer.arrays().items()} | {"rest": trainer.numbers()}


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
def test_a_saved_run_continues_to_the_same_bits(tmp_path_factory, kind, stop, pruned):
    def start():
        pruning = GradualPruning(0.6, (1, 1), 0, 20, every=3) if pruned else None
        return _trainer(pruning=pruning, **_kinds()[kind])

    path = tmp_path_factory.mktemp("saved") / "checkpoint.safetensors"
    whole, first, second = start(), start(), start()
    for progress in first:
        if progress.step == stop:
            break
    save_checkpoint(first, path, notes={"mine": [1, "two"]})
    assert load_checkpoint(second, path) == {"mine": [1, "two"]}
    assert _bits(first) == _bits(second)
    for each in (whole, second):
        each.run()
    assert _bits(whole) == _bits(second)


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
                trainer = _trainer(pruning=pruning)
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

    straight = _trainer(pruning=pruning())
    run(straight, tmp_path / "straight", checkpoint_seconds=0, log_every=4)
    rng, kills, folder = np.random.default_rng(7), 0, tmp_path / "killed"
    while kills < 20:
        if _attempt(folder, int(rng.integers(1, 25)), pruning()):
            break
        kills += 1
    assert kills == 20, "the run ended before it was killed often enough"
    assert _attempt(folder, 1_000_000, pruning())
    ended = _trainer(pruning=pruning())
    load_checkpoint(ended, folder / "checkpoint.safetensors")
    assert _bits(ended) == _bits(straight)
    logs = (read_log(tmp_path / name) for name in ("straight", "killed"))
    lines = [[{k: v for k, v in line.items() if k != "seconds"} for line in log] for log in logs]
    assert lines[0] == lines[1], "the log is that of the uninterrupted run"
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["checkpoint.safetensors", "log.jsonl", "previous-checkpoint.safetensors"]


def test_damaged_checkpoint_falls_back_to_the_previous(tmp_path):
    trainer = _trainer()
    run(trainer, tmp_path, checkpoint_seconds=0)
    path = tmp_path / "checkpoint.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(_trainer(), path)
    again = _trainer()
    with pytest.warns(UserWarning, match="kept as damaged-checkpoint.safetensors"):
        run(again, tmp_path, resume=True)
    assert _bits(again) == _bits(trainer)
    previous(path).write_bytes(b"nothing")
    path.write_bytes(raw[:50])
    with pytest.raises(CheckpointError, match="damaged"):
        run(_trainer(), tmp_path, resume=True)


def _stopped_run(folder, step=17):
    """A run that was killed after that update, with checkpoints of the last two."""

    class Kill(BaseException):
        pass

    def stop(progress, seconds):
        if progress.step == step:
            raise Kill

    with pytest.raises(Kill):
        run(_trainer(), folder, checkpoint_seconds=0, log_every=4, report=stop)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The files of a killed run, the bits of a run that was left alone, and the lines of its log."""
    straight, folder = _trainer(), tmp_path_factory.mktemp("runs")
    run(straight, folder / "straight", checkpoint_seconds=0, log_every=4)
    files = {path.name: path.read_bytes() for path in _stopped_run(folder / "killed").iterdir()}
    return files, _bits(straight), _lines(folder / "straight")


def _lines(folder):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_log(folder)]


def _written(folder, content):
    folder.mkdir(exist_ok=True)
    for name, raw in content.items():
        (folder / name).write_bytes(raw)
    return folder


def test_a_run_goes_on_from_its_checkpoint_in_parts(tmp_path, stopped):
    content, bits, lines = stopped
    here, there = _written(tmp_path / "here", content), tmp_path / "there"
    raw = content["checkpoint.safetensors"]
    size = len(raw) // 3
    for _ in range(2):
        count = split_checkpoint(here / "checkpoint.safetensors", there, size, beside=["log.jsonl", "no such file"])
    parts = sorted(there.glob("*.part"))
    assert len(parts) == count == -(-len(raw) // size) and b"".join(p.read_bytes() for p in parts) == raw
    with pytest.raises(ValueError, match="holds a run; resume it"):
        run(_trainer(), there)
    whole, index = parts[1].read_bytes(), (there / "parts.json").read_bytes()
    for part, damaged, words in (
        (parts[1], whole[:-1] + bytes([whole[-1] ^ 1]), "checkpoint-0001.part: damaged"),
        (parts[1], None, "checkpoint-0001.part: cannot be read: No such file"),
        (
            there / "parts.json",
            index.replace(b"checkpoint-0001", b"../heckpoint-01"),
            "parts.json: damaged, or no index",
        ),
        (there / "parts.json", b"[]", "parts.json: damaged, or no index of parts"),
    ):
        before = part.read_bytes()
        part.unlink() if damaged is None else part.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=words):
            run(_trainer(), there, resume=True)
        assert not (there / "checkpoint.safetensors").exists()
        part.write_bytes(before)
    again = _trainer()
    run(again, there, resume=True, log_every=4)
    assert _bits(again) == bits and _lines(there) == lines


def test_a_validation_alone_saves_nothing(tmp_path):
    class Kill(BaseException):
        pass

    def stop(progress, seconds):
        if progress.validation:
            raise Kill

    with pytest.raises(Kill):
        run(_trainer(), tmp_path, report=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


WORDS = (b'"eventrnn checkpoint"', b'"version"', b'"sha256"', b'"dtype"', b"data_offsets", b"__metadata__", b"F32")


@pytest.mark.parametrize("at", [0, 1, 8, *WORDS, -1])
def test_a_checkpoint_with_a_flipped_bit_falls_back_to_the_one_before(tmp_path, stopped, at):
    content, bits, lines = stopped
    raw = bytearray(content["checkpoint.safetensors"])
    raw[raw.index(at) + 3 if isinstance(at, bytes) else at] ^= 1
    folder, again = _written(tmp_path / "run", content | {"checkpoint.safetensors": bytes(raw)}), _trainer()
    with pytest.warns(UserWarning, match=r"kept as damaged-checkpoint.safetensors\); .* before it, of step 15"):
        run(again, folder, resume=True, log_every=4)
    assert _bits(again) == bits and _lines(folder) == lines
    assert (folder / "damaged-checkpoint.safetensors").read_bytes() == raw


def test_a_lost_checkpoint_falls_back_to_the_one_before(tmp_path, stopped):
    content, bits, lines = stopped
    folder, again = _written(tmp_path / "run", content), _trainer()
    (folder / "checkpoint.safetensors").unlink()
    with pytest.raises(ValueError, match="holds a run"):
        run(_trainer(), folder)
    with pytest.warns(UserWarning, match="no such file; the run goes on from the checkpoint before it, of step 15"):
        run(again, folder, resume=True, log_every=4)
    assert _bits(again) == bits and _lines(folder) == lines


def test_a_log_without_a_checkpoint_is_kept_when_the_run_starts_anew(tmp_path, stopped):
    content, bits, lines = stopped
    folder, again = _written(tmp_path / "run", {"log.jsonl": content["log.jsonl"]}), _trainer()
    with pytest.warns(UserWarning, match="starts again at its first step; the log is kept as previous-log.jsonl"):
        run(again, folder, resume=True, log_every=4)
    assert _bits(again) == bits and _lines(folder) == lines
    assert (folder / "previous-log.jsonl").read_bytes() == content["log.jsonl"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw.replace(b"{", b"[", 1),
        lambda raw: b"\xa0" + raw[1:],
        lambda raw: raw.replace(b'"step"', b'"stdp"', 1),
        lambda raw: raw.replace(b'"loss"', bytes(6), 1),
        lambda raw: b"[" * 100_000 + raw,
        lambda raw: raw.replace(b'"step": ', b'"step": "', 1),
        lambda raw: b"\n" + raw,
    ],
)
def test_damaged_lines_of_a_log_are_left_out_and_kept_aside(tmp_path, stopped, spoil):
    content, bits, lines = stopped
    spoiled = spoil(content["log.jsonl"])
    folder, again = _written(tmp_path / "run", content | {"log.jsonl": spoiled}), _trainer()
    with pytest.warns(UserWarning, match=r"log.jsonl: damaged in line 1, left out"):
        read = read_log(folder)
    assert [line["step"] for line in read] == [line["step"] for line in lines if line["step"] <= 17][-len(read) :]
    with pytest.warns(UserWarning, match="damaged in line 1, left out; the whole file is kept as damaged-log.jsonl"):
        run(again, folder, resume=True, log_every=4)
    assert _bits(again) == bits and (folder / "damaged-log.jsonl").read_bytes() == spoiled
    assert _lines(folder) == lines[len(lines) - len(read_log(folder)) :]


def test_a_line_that_is_being_written_is_not_read(tmp_path, stopped):
    folder = _written(tmp_path / "run", stopped[0])
    before = read_log(folder)
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 18, "lo')
    assert read_log(folder) == before


def test_a_run_in_use_is_refused(tmp_path):
    def again(progress, seconds):
        with pytest.raises(ValueError, match=f"run is in use by process {os.getpid()}"):
            run(_trainer(), tmp_path / "run", resume=True)

    run(_trainer(steps=2), tmp_path / "run", report=again)
    assert [line["step"] for line in read_log(tmp_path / "run")] == [2]


def test_a_run_goes_on_with_another_number_of_threads_and_says_so(tmp_path):
    two, one = (_trainer(backward="sparse", threads=threads, steps=9) for threads in (2, 1))
    for _ in range(4):
        two.step()
    save_checkpoint(two, tmp_path / "c")
    with pytest.warns(UserWarning, match="threads: 2 in the checkpoint, 1 now: the run goes on, but products"):
        load_checkpoint(one, tmp_path / "c")
    assert _bits(two) == _bits(one)
    one.run()
    assert one.steps_done == 9


def test_a_signed_checkpoint_of_other_arrays_is_refused_before_anything_changes(tmp_path):
    trainer, other = _trainer(), _trainer()
    arrays = trainer.arrays()
    arrays.pop("state.cells.1")
    trainer.arrays = lambda: arrays
    save_checkpoint(trainer, tmp_path / "c")
    before = _bits(other)
    with pytest.raises(CheckpointError, match="holds no state of this run: arrays: state.cells.1 does not fit"):
        load_checkpoint(other, tmp_path / "c")
    assert _bits(other) == before


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
    save_checkpoint(_trainer(), tmp_path / "c")
    other = _trainer(**changed)
    before = _bits(other)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(other, tmp_path / "c")
    assert _bits(other) == before
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(other, tmp_path / "none")


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run(_trainer(steps=2), tmp_path)
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds a run"):
        run(_trainer(steps=2), tmp_path)
    assert content == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("way", _pruned_while_training())
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_request_finishes_the_update_saves_and_resumes(tmp_path, number, way):
    def interrupt(progress, seconds):
        if progress.step == 11:
            os.kill(os.getpid(), number)

    def start():
        return _trainer(pruning=_pruned_while_training()[way])

    handler = signal.getsignal(number)
    straight, stopped = start(), start()
    straight.run()
    with pytest.raises(Stopped, match="after step 11, saved"):
        run(stopped, tmp_path, report=interrupt)
    assert signal.getsignal(number) is handler
    again = start()
    run(again, tmp_path, resume=True)
    assert _bits(again) == _bits(straight)


def test_non_finite_loss_stops_with_a_report(tmp_path):
    trainer = _trainer()

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
    again = _trainer()
    load_checkpoint(again, tmp_path / "checkpoint.safetensors")
    assert again.steps_done == 9


def test_non_finite_gradient_is_named():
    trainer = _trainer(steps=5)
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
    trainer = _trainer(steps=400, validate_every=2, patience=3, learning_rate=0.3)
    values = [p.validation["bits"] for p in trainer if p.validation]
    assert len(values) < 200 and trainer.finished and trainer.best_value == min(values)
    assert values.index(min(values)) == len(values) - 4
    network = trainer.network(best=True)
    assert np.array_equal(network.embedding, trainer.best["embedding"])
    assert not np.array_equal(network.embedding, trainer.model.parameters["embedding"])


def test_a_full_disk_leaves_the_checkpoints_as_they_were(tmp_path, monkeypatch):
    trainer = _trainer()
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
    run(_trainer(steps=10), tmp_path, log_every=4, report=lambda p, s: steps.append(p))
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
def test_a_run_with_every_pruning_rule_continues_to_the_same_bits(tmp_path, way):
    whole, first, second = (_trainer(pruning=way(), steps=11) for _ in range(3))
    for _ in range(6):
        first.step()
    save_checkpoint(first, tmp_path / "c")
    load_checkpoint(second, tmp_path / "c")
    while not second.finished:
        second.step()
    while not whole.finished:
        whole.step()
    assert _bits(whole) == _bits(second)


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
