"""Distillation: soft targets are those of the teacher at every position, their loss has its gradient, and runs with
them are as exact as others."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrnn import Network, load, save, simulate
from eventrnn.training import (
    CheckpointError,
    LanguageModelling,
    Settings,
    SoftTargets,
    Trainer,
    check_gradients,
    cross_entropy,
    read_log,
    run,
    soft_targets,
)
from support.runs import TEXT, bits_of
from support.texts import reader_of_text
from support.tolerance import U32, gamma, soft_target_error

SYMBOLS = 8
SMALL = ("--hidden", 12, "--embedding", 5, "--batch", 4, "--window", 8)


def _network(seed: int = 1, units: tuple[int, ...] = (12, 9)) -> Network:
    rng = np.random.default_rng(seed)
    return Network.random(list(units), symbols=SYMBOLS, embedding=5, readout=SYMBOLS, threshold=0.1, rng=rng)


def _soft(text: np.ndarray, weight: float = 0.5, top_k: int = 3) -> SoftTargets:
    """Soft targets of a text that no teacher has made."""
    rng = np.random.default_rng(7)
    symbols = rng.permuted(np.tile(np.arange(SYMBOLS), (len(text), 1)), axis=1)[:, :top_k]
    return SoftTargets(symbols, rng.dirichlet(np.ones(top_k + 1), len(text))[:, :top_k], weight)


def _trainer(soft: SoftTargets | None, text: np.ndarray = TEXT[:700], **changes) -> Trainer:
    chosen = {"steps": 20, "batch": 4, "window": 8, "window_jitter": 2.0, "validate_every": 7} | changes
    return Trainer(_network(), LanguageModelling(text, TEXT[700:], soft=soft), Settings(**chosen))


# --- the loss -----------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 5), st.sampled_from([0.0, 0.3, 1.0]), st.data())
def test_loss_with_soft_targets_is_its_definition(size, rows, weight, data):
    """The rest is one class: its probability by the softmax is the sum over all classes without one of their own."""
    kept = data.draw(st.integers(1, size))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(0, 3, (rows, size)).astype(np.float32)
    targets = rng.integers(0, size, rows)
    symbols = rng.permuted(np.tile(np.arange(size), (rows, 1)), axis=1)[:, :kept]
    given_shares = rng.dirichlet(np.ones(kept + (kept < size)), rows)[:, :kept]
    soft = SoftTargets(symbols, given_shares, weight)
    loss, gradient = cross_entropy(logits, targets, soft)

    share = np.exp(logits.astype(np.float64))
    share /= share.sum(axis=1, keepdims=True)
    teacher = soft.probabilities.astype(np.float64)
    rest, row = np.maximum(0, 1 - teacher.sum(axis=1)), np.arange(rows)
    named = np.zeros((rows, size), bool)
    named[row[:, None], symbols] = True
    others = np.where(named, 0, share).sum(axis=1)
    expected, target = np.zeros(rows), np.zeros((rows, size))
    for r in row:
        expected[r] = -(1 - weight) * np.log(share[r, targets[r]])
        expected[r] -= weight * (teacher[r] @ np.log(share[r, symbols[r]]))
        target[r, symbols[r]] += weight * teacher[r]
        if not named[r].all():
            expected[r] -= weight * rest[r] * np.log(others[r])
            target[r] += np.where(named[r], 0, weight * rest[r] * share[r] / others[r])
    target[row, targets] += 1 - weight
    if kept == size:
        # All classes have a probability. What rounding leaves to the rest counts as 1e-9 of the softmax.
        expected -= weight * rest * np.log(1e-9)
        others = np.ones(rows)
    bound = soft_target_error(size, float((rest / others).max()))
    assert abs(loss - expected.mean()) <= bound * max(1, np.abs(np.log(share)).max())
    assert np.abs(gradient - (share - target) / rows).max() <= bound / rows


def test_weight_zero_has_the_bits_of_no_soft_targets():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(30, SYMBOLS)).astype(np.float32), rng.integers(0, SYMBOLS, 30)
    plain = cross_entropy(logits, targets)
    zero = cross_entropy(logits, targets, _soft(targets, 0.0))
    assert zero[0] == plain[0]
    runs = [_trainer(soft) for soft in (None, _soft(TEXT[:700], 0.0), _soft(TEXT[:700], 0.5))]
    for trainer in runs:
        for _ in range(3):
            trainer.step()
    plain, zero, half = map(bits_of, runs)
    assert plain == zero != half
    assert runs[0].identity() == runs[1].identity()


def test_a_softmax_without_a_rest_has_a_finite_loss():
    logits = np.zeros((1, 4), np.float32)
    logits[0, 0] = 3e38
    soft = SoftTargets([[0, 1]], [[0.25, 0.25]], 1.0)
    loss, gradient = cross_entropy(logits, np.array([0]), soft)
    assert np.isfinite(loss) and loss > 1e37 and np.isfinite(gradient).all()


def test_gradients_agree_with_finite_differences():
    text = np.random.default_rng(2).integers(0, SYMBOLS, 60)
    assert check_gradients(_network(), LanguageModelling(text, soft=_soft(text, 0.7))).ok


# --- soft targets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "streams"), [(700, 1), (1100, 2)])
def test_soft_targets_are_the_highest_shares_of_the_teachers_softmax(length, streams, monkeypatch):
    monkeypatch.setattr("eventrnn.training.distillation.SCORES", 100 * streams * SYMBOLS)
    teacher, text = _network(3), np.resize(TEXT, length)
    before, seen = text.copy(), []
    found = soft_targets(teacher, text, top_k=3, weight=0.25, report=lambda done, total: seen.append((done, total)))
    assert np.array_equal(text, before) and seen[-1] == (length, length) and seen[0] == (100 * streams, length)
    assert found.symbols.shape == (length, 3) and found.weight == 0.25
    part = length // streams
    for k in range(streams):
        symbols = text[k * part : (k + 1) * part]
        scores = simulate(teacher, symbols[:, None]).output[:, 0]
        order = np.argsort(-scores, axis=1, kind="stable")[:, :3]
        own = slice(k * part, (k + 1) * part)
        assert np.array_equal(found.symbols[own], order)
        wide = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
        share = np.take_along_axis(wide / wide.sum(axis=1, keepdims=True), order, axis=1)
        assert np.abs(found.probabilities[own] - share).max() <= gamma(36 + SYMBOLS, U32)
    again = soft_targets(teacher, text, top_k=3, threads=2)
    assert found.digest == again.digest, "the number of threads changes no bit"
    every = soft_targets(teacher, text, top_k=SYMBOLS)
    assert np.array_equal(every.symbols[:, :3], found.symbols)
    assert np.array_equal(every.probabilities[:, :3], found.probabilities)
    assert np.array_equal(np.sort(every.symbols, axis=1), np.tile(np.arange(SYMBOLS), (length, 1)))


@pytest.mark.gpu
def test_a_gpu_gives_the_soft_targets_of_the_cpu():
    found = [soft_targets(_network(3), np.resize(TEXT, 1100), top_k=3, backend=each) for each in ("cpu", "cuda")]
    assert found[0].digest == found[1].digest


def test_an_inexact_backend_is_refused():
    with pytest.raises(ValueError, match="backend: got 'blas', .* need an exact one"):
        soft_targets(_network(), TEXT, top_k=3, backend="blas")


def test_of_equal_scores_the_lower_symbol_stands_first():
    rng = np.random.default_rng(0)
    teacher = Network.random([4], symbols=20, embedding=3, readout=20, threshold=0.99, rng=rng)
    found = soft_targets(teacher, np.zeros(3, int), top_k=5)
    assert np.array_equal(found.symbols, np.tile(np.arange(5), (3, 1))), "silent units score every symbol alike"


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_every_window_has_the_soft_targets_of_its_own_positions(batch):
    """Every position names the symbol after it."""
    text = np.random.default_rng(1).integers(0, 500, 203)
    following = np.append(text[1:], 0)
    task = LanguageModelling(text, soft=SoftTargets(following[:, None], np.full((203, 1), 0.5)))
    at = epoch = 0
    rng, whole = np.random.default_rng(0), task.length(batch)
    while epoch < 2:
        window = task.batch(at, epoch, batch, int(rng.integers(1, 12)))
        assert window.soft is not None and np.array_equal(window.soft.symbols[..., 0], window.targets)
        at += window.taken
        epoch, at = (epoch + 1, 0) if at >= whole else (epoch, at)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (([[0, 1]], [[0.5]]), "probabilities: got shape"),
        (([[0, 0]], [[0.5, 0.2]]), "symbols: got one twice"),
        (([[0, -1]], [[0.5, 0.2]]), "symbols: got -1"),
        (([[0.5, 1]], [[0.5, 0.2]]), "symbols: got float64"),
        (([[0, 1]], [[0.5, 0.6]]), "probabilities: got negative ones, or a sum above 1"),
        (([[0, 1]], [[0.5, -0.1]]), "probabilities: got negative ones"),
        (([[0, 1]], [[0.5, np.nan]]), "probabilities: got nan"),
        (([[]], [[]]), "symbols: got|probabilities: got"),
        (([[0]], [[0.5]], 1.5), "weight: got 1.5, need a share in"),
    ],
)
def test_soft_targets_that_are_no_probabilities_are_refused(arrays, words):
    with pytest.raises(ValueError, match=words):
        SoftTargets(*arrays)


def test_soft_targets_of_another_text_or_network_are_refused():
    text = TEXT[:700]
    with pytest.raises(ValueError, match=r"soft: got targets \(699, 3\), need \(700, k\)"):
        LanguageModelling(text, soft=_soft(text[1:]))
    many = SoftTargets(np.full((700, 1), SYMBOLS), np.ones((700, 1)))
    with pytest.raises(ValueError, match="soft targets: got symbol 8, need symbols below 8"):
        _trainer(many)
    with pytest.raises(ValueError, match="top_k: got 9, need a whole number 1 to 8"):
        soft_targets(_network(), text, top_k=9)
    with pytest.raises(ValueError, match="weight: got 2"):
        soft_targets(_network(), text, top_k=3, weight=2)


# --- runs ---------------------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path):
    soft = soft_targets(_network(5), TEXT[:700], top_k=3)
    whole, first = _trainer(soft), _trainer(soft)
    run(whole, tmp_path / "whole")

    def stop(progress, seconds):
        if progress.step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(first, tmp_path / "part", checkpoint_seconds=0.0, report=stop)
    # The soft targets are computed again.
    second = _trainer(soft_targets(_network(5), TEXT[:700], top_k=3))
    run(second, tmp_path / "part", resume=True)
    assert bits_of(whole) == bits_of(second)
    for other in (_soft(TEXT[:700]), replace(soft, weight=0.4), None):
        with pytest.raises(CheckpointError, match="data: soft targets of weight 0.5, top_k 3, .* in the checkpoint"):
            run(_trainer(other), tmp_path / "part", resume=True)


def test_validation_does_not_depend_on_soft_targets():
    plain, taught = _trainer(None), _trainer(_soft(TEXT[:700]))
    assert plain.validate() == taught.validate()


def test_a_training_that_is_stopped_while_the_teacher_reads_has_written_nothing(cli, tmp_path, text, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    teacher, out = tmp_path / "teacher.safetensors", tmp_path / "student.safetensors"
    save(reader_of_text(), teacher)
    monkeypatch.setattr("eventrnn.training.recipes.distillation.soft_targets", stop)
    taught = ("--text", text, *SMALL, "--steps", 3, "--teacher", teacher, "--distillation", 0.5)
    code, _, err = cli("train", "--out", out, *taught)
    assert code == 130 and "stopped before the training began; nothing was written" in err
    assert {path.name for path in tmp_path.iterdir()} == {"teacher.safetensors", text.name}
    # A run that would have been replaced is as it was, and nothing says that it could be continued instead.
    old = tmp_path / "student.safetensors.run"
    old.mkdir()
    (old / "config.toml").write_text("of another run")
    code, _, err = cli("train", "--out", out, *taught, "--force")
    assert code == 130 and "nothing was written" in err and "--resume" not in err
    assert (old / "config.toml").read_text() == "of another run"


def test_a_teacher_on_the_command_line(cli, tmp_path, text, monkeypatch):
    teacher, out = tmp_path / "teacher.safetensors", tmp_path / "student.safetensors"
    assert cli("train", "--out", teacher, "--text", text, *SMALL, "--steps", 20)[0] == 0
    monkeypatch.chdir(tmp_path)
    teaching = ("--set", "distillation.teacher=teacher.safetensors", "--distillation", 0.5, "--top-k", 4)
    code, found, err = cli(
        "train", "--out", out, "--text", text, *SMALL, *teaching, "--steps", 8, "--seed", 1, "--json"
    )
    assert code == 0, err
    assert json.loads(found)["teacher"] == "teacher.safetensors" and json.loads(found)["distillation"] == 0.5
    assert load(out).metadata["teacher"] == "teacher.safetensors" and load(out).metadata["distillation"] == "0.5"
    assert "teacher" not in load(teacher).metadata
    assert "soft targets" in err and "nats with soft targets" in err
    config = (tmp_path / "student.safetensors.run" / "config.toml").read_text()
    assert f'teacher = "{teacher}"' in config and "weight = 0.5" in config and "top_k = 4" in config
    plain = tmp_path / "plain.safetensors"
    assert cli("train", "--out", plain, "--text", text, *SMALL, "--steps", 8, "--seed", 1)[0] == 0
    assert plain.read_bytes() != out.read_bytes()
    losses = [read_log(f"{each}.run")[0]["loss"] for each in (out, plain)]
    assert losses[0] != losses[1]
    # A run that is complete is resumed, which reads the teacher again and changes nothing.
    before = out.read_bytes()
    assert cli("train", "--resume", f"{out}.run")[0] == 0 and out.read_bytes() == before
    for option, value in (("--distillation", 0.4), ("--top-k", 5)):
        with monkeypatch.context() as patched:
            # Before the teacher reads.
            patched.setattr("eventrnn.training.recipes.distillation.soft_targets", None)
            code, _, err = cli("train", "--resume", f"{out}.run", option, value)
        assert code == 2 and f"got {value}, but the run has" in err
    moved = teacher.rename(tmp_path / "moved.safetensors")
    code, _, err = cli("train", "--resume", f"{out}.run")
    assert code == 2 and "teacher: " in err and "teacher.safetensors" in err
    assert cli("train", "--resume", f"{out}.run", "--teacher", moved)[0] == 0
    code, _, err = cli("train", "--resume", f"{out}.run", "--teacher", plain)
    assert code == 2 and "soft targets of weight 0.5" in err and "in the checkpoint" in err

    other = tmp_path / "other.safetensors"
    save(Network.random([6], symbols=5, embedding=4, readout=5, rng=np.random.default_rng(0)), other)
    stranger = tmp_path / "stranger.safetensors"
    # Networks that do not fit the vocabulary of their own file.
    own = load(plain)
    size, rng = len(own.embedding), np.random.default_rng(0)
    mute, fewer, unread = (tmp_path / f"{name}.safetensors" for name in ("mute", "fewer", "unread"))
    for path, network in (
        (mute, Network.random([6], symbols=size, embedding=4, rng=rng)),
        (fewer, Network.random([6], symbols=size - 1, embedding=4, readout=size - 1, rng=rng)),
        (unread, own),
    ):
        save(replace(network, metadata=own.metadata | ({"vocabulary": "{}"} if network is own else {})), path)
    few = tmp_path / "few.txt"
    few.write_text("abcd efgh\n" * 60)
    assert cli("train", "--out", stranger, "--text", few, *SMALL, "--steps", 1)[0] == 0
    for given_options, words in (
        (("--teacher", tmp_path / "nowhere.safetensors", "--distillation", 0.5), "teacher: "),
        (("--teacher", "nobody", "--distillation", 0.5), "no model of that name"),
        (("--teacher", text, "--distillation", 0.5), "teacher: "),
        (("--teacher", other, "--distillation", 0.5), "has no vocabulary"),
        (("--teacher", stranger, "--distillation", 0.5), "has another vocabulary than the network"),
        (("--teacher", mute, "--distillation", 0.5), "teacher: .* needs an embedding and a read-out"),
        (("--teacher", fewer, "--distillation", 0.5), f"teacher: .* reads {size - 1} symbols, but its vocabulary has"),
        (("--teacher", unread, "--distillation", 0.5), "teacher: .* this is no vocabulary"),
        (("--teacher", "", "--distillation", 0.5), "distillation weight: got 0.5 without a teacher"),
        (("--teacher", moved), "teacher: got .* with weight 0"),
        (("--distillation", 0.5), "distillation weight: got 0.5 without a teacher"),
        (("--teacher", moved, "--distillation", 1.5), "distillation weight: got 1.5, need a share in"),
        (("--teacher", moved, "--distillation", 0.5, "--top-k", 0), "top_k: got 0"),
        (("--top-k", 3), "top_k: got 3 without a teacher"),
    ):
        for command in (
            ("train", "--text", text, *SMALL, "--steps", 2),
            ("prune", plain, "--text", text, "--steps", 2, "--batch", 4, "--window", 8),
        ):
            code, _, err = cli(*command, "--out", tmp_path / "none", *given_options)
            assert code == 2, command
            assert _matches(words, err), (command, err)
    assert not (tmp_path / "none").exists() and not (tmp_path / "none.run").exists()
    code, _, err = cli("prune", plain, "--out", tmp_path / "none", "--teacher", moved)
    assert code == 2 and "--teacher: only with training; give --steps" in err


def _matches(words: str, err: str) -> bool:
    before, _, after = words.partition(" .* ")
    return before in err and after in err


def test_pruning_takes_a_teacher(cli, tmp_path, text):
    dense, pruned = tmp_path / "dense.safetensors", [tmp_path / f"{k}.safetensors" for k in range(2)]
    save(reader_of_text(), dense)
    options = ("--text", text, "--steps", 6, "--batch", 4, "--window", 8, "--sparsity", 0.5, "--json")
    for out, taught in zip(pruned, ((), ("--teacher", dense, "--distillation", 1)), strict=True):
        code, stdout, err = cli("prune", dense, "--out", out, *options, *taught)
        assert code == 0 and json.loads(stdout)["steps"] == 6, err
        assert ("soft targets" in err) == bool(taught)
    assert json.loads(stdout)["teacher"] == dense.name
    plain, taught = map(load, pruned)
    assert "teacher" not in plain.metadata and taught.metadata["teacher"] == dense.name
    assert not np.array_equal(plain.embedding, taught.embedding)
