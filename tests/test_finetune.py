"""A trained GRU becomes an EGRU of the wanted activity that does the task again."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest

from eventrnn import io
from eventrnn._files import read_arrays
from eventrnn.cells import Cell
from eventrnn.data.vocabulary import Vocabulary
from eventrnn.events import Events
from eventrnn.network import Network
from eventrnn.pruning import prune
from eventrnn.simulation import simulate
from eventrnn.training import (
    CheckpointError,
    Classification,
    FineTuning,
    LanguageModelling,
    Settings,
    Trainer,
    Tuning,
    at_activity,
    fine_tune,
    read_log,
    run,
)
from eventrnn.weights import NotAMatrix
from support import gated
from support.conformance import same_bits

STEPS, INPUTS, CLASSES = 10, 4, 3


def drawn(samples: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences, labels and lengths: the class is the input with the most pulses."""
    rng = np.random.default_rng(seed)
    labels, lengths = rng.integers(0, CLASSES, samples), rng.integers(6, STEPS + 1, samples)
    rates = np.where(np.arange(INPUTS) == labels[:, None], 0.7, 0.1)
    inputs = (rng.random((samples, STEPS, INPUTS)) < rates[:, None]).astype(np.float32)
    return inputs, labels, lengths


TRAIN, VALID = drawn(240, 0), drawn(80, 1)


def task(lengths: bool = True) -> Classification:
    options = {"read": "mean"} | ({"lengths": TRAIN[2]} if lengths else {})
    return Classification(TRAIN[0], TRAIN[1], VALID if lengths else VALID[:2], **options)


@pytest.fixture(scope="module")
def trained() -> Network:
    """A GRU that does the task."""
    start = Network.random([16], inputs=INPUTS, readout=CLASSES, cell=Cell("gru"), rng=np.random.default_rng(0))
    trainer = Trainer(start, task(), Settings(epochs=8, batch=20, learning_rate=1e-2))
    network = trainer.run()
    assert trainer.task.evaluate(trainer.model)["accuracy"] > 0.9
    return network


def test_fine_tune_reaches_the_activity_and_does_the_task_again(trained):
    told = []
    result = fine_tune(trained, task(), activity=0.1, epochs=6, batch=20, report=lambda *each: told.append(each))
    assert {layer.cell for layer in result.network.layers} == {Cell("egru")}
    assert result.given["activity"] == 1 and result.given["accuracy"] > 0.9
    for figures in (result.start, result.tuned):
        assert 0.05 < figures["activity"] <= 0.1 and figures["effective_per_step"] < result.given["effective_per_step"]
    assert result.tuned["accuracy"] > max(0.85, result.start["accuracy"])
    assert [each[:2] for each in told] == [(k, 6) for k in range(1, 7)]
    again = fine_tune(trained, task(), activity=0.1, epochs=6, batch=20)
    assert all(same_bits(*pair) for pair in zip(result.network.arrays(), again.network.arrays(), strict=True))


@pytest.mark.parametrize("options", [{"block": (1, 4)}, {}])
def test_fine_tune_keeps_what_is_pruned_and_its_format(trained, options):
    pruned = prune(trained, 0.5, exempt=("readout",), **options)
    result = fine_tune(pruned, task(False), activity=0.2, epochs=2, batch=40).network
    for name, weights in pruned.matrices().items():
        found = result.matrices()[name]
        assert found.name == weights.name and not found.to_dense()[~weights.kept()].any()
    # An EGRU may be given another activity.
    other = fine_tune(result, task(False), activity=0.05, epochs=1, batch=40)
    assert other.given["activity"] > 0.1 and other.tuned["activity"] <= 0.05


def test_fine_tune_takes_a_model_of_a_text():
    rng = np.random.default_rng(0)
    text = np.tile(np.arange(6), 200)
    network = Network.random([12], symbols=6, embedding=5, readout=6, cell=Cell("gru", "before"), rng=rng)
    result = fine_tune(network, LanguageModelling(text, text[:200]), activity=0.3, epochs=2, batch=5, window=20)
    assert result.network.layers[0].cell == Cell("egru", "paper")
    assert result.tuned["bits"] < result.start["bits"] and result.tuned["activity"] <= 0.3


def test_at_activity_sets_every_layer_without_padding():
    rng = np.random.default_rng(0)
    network = Network.random([40, 30], inputs=5, rng=rng, threshold=0.2)
    x, lengths = rng.normal(size=(20, 8, 5)).astype(np.float32), np.array([20, 3, 5, 20, 11, 1, 7, 20])
    for inputs, ends in ((x, lengths), (Events.from_dense(x), None)):
        made = at_activity(network, inputs, 0.1, lengths=ends)
        for found in simulate(made, inputs, lengths=ends).activity:
            assert 0.08 < found <= 0.1
        for one, other in zip(network.layers, made.layers, strict=True):
            kept = other.threshold > 0
            moved = (other.threshold - one.threshold)[kept]
            assert np.ptp(moved) <= np.finfo(np.float32).eps
    with pytest.raises(ValueError, match="layer 0 has the cell 'gru', which has no thresholds"):
        at_activity(Network.random([3], inputs=5, rng=rng, cell=Cell("gru")), x, 0.1)


def reader() -> tuple[Network, LanguageModelling]:
    """A small network of symbols, and its text. An epoch has 12 updates of 5 streams and 20 steps."""
    text = np.tile(np.arange(6), 200)
    network = Network.random([12], symbols=6, embedding=5, readout=6, cell=Cell("gru"), rng=np.random.default_rng(0))
    return network, LanguageModelling(text, text[:200])


READING = Tuning(activity=0.3, epochs=2, batch=5, window=20)


def test_a_fine_tuning_that_is_killed_goes_on_with_the_same_bits(tmp_path):
    network, text = reader()
    whole = FineTuning(network, text, READING)
    run(whole, tmp_path / "whole", log_every=1)
    result = whole.result()
    assert whole.steps_done == 24
    direct = fine_tune(network, text, activity=0.3, epochs=2, batch=5, window=20)
    assert direct.tuned == result.tuned and direct.given == result.given and direct.start == result.start

    class Killed(Exception):
        """Ends a run as a signal does that cannot be caught: nothing is saved."""

    # In an epoch, before and after the thresholds are set between two, and at the last update.
    for stop in (5, 12, 13, 24):
        folder = tmp_path / f"at {stop}"

        def killing(progress, seconds, stop=stop):
            if progress.step == stop:
                raise Killed

        with pytest.raises(Killed):
            run(FineTuning(network, text, READING), folder, log_every=1, checkpoint_seconds=0, report=killing)
        again = FineTuning(network, text, READING)
        run(again, folder, resume=True, log_every=1)
        assert again.result().tuned == result.tuned and again.steps_done == 24
        assert all(same_bits(*p) for p in zip(again.result().network.arrays(), result.network.arrays(), strict=True))
        logs = [[{**line, "seconds": 0} for line in read_log(each)] for each in (folder, tmp_path / "whole")]
        assert logs[0] == logs[1] and len(logs[0]) == 24
        # A run whose updates are all done gives its result again.
        ended = FineTuning(network, text, READING)
        run(ended, folder, resume=True, log_every=1)
        assert ended.result().tuned == result.tuned
    other = replace(network, embedding=network.embedding + np.float32(1))
    for changed, words in (
        (FineTuning(other, text, READING), "given: "),
        (FineTuning(network, text, replace(READING, activity=0.2)), "activity: 0.3 in the checkpoint, 0.2 now"),
        (FineTuning(network, text, replace(READING, epochs=3)), "settings.epochs: 2 in the checkpoint, 3 now"),
    ):
        with pytest.raises(CheckpointError, match=words):
            run(changed, folder, resume=True)
    with pytest.raises(RuntimeError, match="epoch 1 of 2 is not done"):
        FineTuning(network, text, READING).result()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"activity": 0}, ValueError, "activity: got 0"),
        ({"epochs": 0}, ValueError, "epochs: got 0"),
        (
            {"network": Network.random([3], inputs=4, readout=3, cell=Cell("lstm"), rng=np.random.default_rng(0))},
            ValueError,
            "has the cell 'lstm', need 'gru'",
        ),
        ({"network": gated.network_of(inputs=4)}, NotAMatrix, "fine_tune cannot take gated blocks"),
        ({"task": None}, TypeError, "task: got None"),
    ],
)
def test_fine_tune_wrong_arguments_are_refused_before_any_work(trained, change, error, match):
    with pytest.raises(error, match=match):
        fine_tune(**({"network": trained, "task": task(), "activity": 0.1} | change))


# --- the command ------------------------------------------------------------------------------------------------


def test_fine_tune_on_the_command_line(cli, tmp_path, trained):
    io.save(trained, tmp_path / "gru.safetensors")
    names = ("inputs", "labels", "lengths")
    held = {f"valid_{name}": array for name, array in zip(names, VALID, strict=True)}
    np.savez(tmp_path / "task.npz", **dict(zip(names, TRAIN, strict=True)), **held)
    out = tmp_path / "egru.safetensors"
    options = ("--data", tmp_path / "task.npz", "--read", "mean", "--epochs", 2, "--activity", 0.2, "--batch", 20)
    code, found, err = cli("fine-tune", tmp_path / "gru.safetensors", "--out", out, *options, "--json")
    assert code == 0, err
    figures = json.loads(found)
    assert figures["tuned"]["activity"] <= 0.2 and set(figures["given"]) == set(figures["tuned"])
    assert io.load(out).layers[0].cell == Cell("egru")
    code, found, err = cli("fine-tune", out, "--out", out, *options, "--force")
    assert code == 0 and "fine-tuned" in found, err


def test_fine_tune_a_text_on_the_command_line(cli, tmp_path, text):
    vocabulary = Vocabulary.of(text.read_text())
    sizes = {"symbols": len(vocabulary), "embedding": 4, "readout": len(vocabulary)}
    network = Network.random([8], rng=np.random.default_rng(0), cell=Cell("gru"), **sizes)
    io.save(replace(network, metadata={"vocabulary": vocabulary.to_json()}), tmp_path / "gru.safetensors")
    options = ("--text", text, "--epochs", 1, "--batch", 4, "--window", 16, "--out", tmp_path / "a", "--json")
    code, found, err = cli("fine-tune", tmp_path / "gru.safetensors", *options)
    assert code == 0, err
    assert json.loads(found)["tuned"]["bits"] > 0
    assert "vocabulary" in io.load(tmp_path / "a").metadata


def test_fine_tune_of_an_imported_model_of_words_is_stopped_and_resumed(cli, tmp_path, text, monkeypatch):
    from eventrnn.training.recipes import fine_tuning

    words = ("<eos>", "brown", "dog", "fox", "jumps", "lazy", "over", "quick", "the")
    (tmp_path / "words.txt").write_text("\n".join(words) + "\n")
    model = tmp_path / "gru.safetensors"
    rng = np.random.default_rng(0)
    io.save(Network.random([8], symbols=9, embedding=4, readout=9, cell=Cell("gru"), rng=rng), model)
    task = ("--text", text, "--vocabulary", tmp_path / "words.txt", "--epochs", 2, "--batch", 4, "--window", 16)
    code, _, err = cli("fine-tune", model, "--out", tmp_path / "whole", *task)
    assert code == 0 and "fine-tuning 100% epoch 2 of 2" in err and "thresholds set, perplexity" in err, err
    note, seen = fine_tuning._note, []

    def interrupting(progress, run):
        if not seen and progress.step == 11:
            seen.append(os.kill(os.getpid(), signal.SIGINT))
        return note(progress, run)

    monkeypatch.setattr(fine_tuning, "_note", interrupting)
    out, folder = tmp_path / "part", tmp_path / "part.run"
    code, found, err = cli("fine-tune", model, "--out", out, *task, "--json")
    assert code == 130 and not found and not out.exists()
    assert f"stopped after step 11, saved in {folder}" in err and f"eventrnn fine-tune --resume {folder}" in err
    for options, said in (
        (("--resume", folder, "--batch", 5), "resume: continues the run unchanged; leave out --batch"),
        (("--resume", folder, model), "leave out MODEL"),
        (("--resume", tmp_path), "resume: "),
        ((model, "--out", out, *task), "already holds config.toml"),
    ):
        code, _, err = cli("fine-tune", *options)
        assert code == 2 and said in err, err
    code, _, err = cli("train", "--resume", folder)
    assert code == 2 and f"continue it with: eventrnn fine-tune --resume {folder}" in err
    # The run keeps the model.
    model.unlink()
    (tmp_path / "words.txt").unlink()
    code, found, err = cli("fine-tune", "--resume", folder, "--json")
    assert code == 0 and json.loads(found)["steps"] == 2 * 9, err
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert Vocabulary.from_json(io.load(out).metadata["vocabulary"]).symbols == words
    code, _, err = cli("report", folder, "--json")
    assert code == 0, err


@pytest.mark.filterwarnings("default")
def test_fine_tune_warns_of_symbols_in_another_order(cli, tmp_path, text):
    own = Vocabulary.of(text.read_text())
    shifted = "".join(own.symbols[(own.symbols.index(c) + 1) % len(own)] for c in text.read_text())
    start = Network.random([8], symbols=28, embedding=8, readout=28, cell=Cell("gru"), rng=np.random.default_rng(0))
    settings = Settings(epochs=6, batch=8, window=20, learning_rate=3e-2)
    io.save(Trainer(start, LanguageModelling(own.encode(shifted)), settings).run(), tmp_path / "gru")
    task = ("--text", text, "--vocabulary", "characters", "--epochs", 1, "--batch", 4, "--window", 16)
    code, _, err = cli("fine-tune", tmp_path / "gru", "--out", tmp_path / "egru", *task)
    assert code == 0 and "see whether the vocabulary has the symbols in the order of the model's training" in err, err


def test_fine_tune_wrong_data_is_refused_by_name(cli, tmp_path, trained):
    model = tmp_path / "gru.safetensors"
    io.save(trained, model)
    x, y = TRAIN[0], TRAIN[1]
    contents = {
        "no_labels": {"inputs": x},
        "both": {"inputs": x, "labels": y, "targets": y},
        "more": {"inputs": x, "labels": y, "mask": y},
        "half": {"inputs": x, "labels": y, "valid_inputs": x},
        "uneven": {"inputs": x, "labels": y[:5]},
        "classes": {"inputs": x, "labels": y + 7},
    }
    for name, arrays in contents.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    np.save(tmp_path / "single.npy", x)
    out = tmp_path / "out"
    for data, words in (
        ("no_labels.npz", "holds inputs; need inputs, and one of labels and targets"),
        ("both.npz", "need inputs, and one of labels and targets"),
        ("more.npz", "holds mask too"),
        ("half.npz", "holds valid_inputs, but no valid_labels"),
        ("uneven.npz", "holds 240 of inputs, 5 of labels"),
        ("classes.npz", "need classes 0..2"),
        ("single.npy", "holds a single array"),
        ("none.npz", "there is no file"),
    ):
        code, _, err = cli("fine-tune", model, "--data", tmp_path / data, "--out", out)
        assert code == 2 and words in err, err
    for options, words in (
        (("--out", out), "give --data the sequences of the task, or --text"),
        (("--data", "bars"), "give --out a model file"),
        (("--data", "bars", "--out", out), "need numbers (S, T, 4)"),
        (("--data", "bars", "--out", out, "--read", "first"), "read: got 'first'"),
        (("--data", "bars", "--out", out, "--vocabulary", "words"), "vocabulary: got words without a text"),
        (("--text", "builtin", "--out", out, "--read", "mean"), "read: got 'mean', but every output of a text counts"),
        (("--text", "builtin", "--out", out), "vocabulary: the model has none"),
        (("--text", "builtin", "--out", out, "--vocabulary", "words"), "the built-in text is read by characters"),
        (("--text", "builtin", "--out", out, "--vocabulary", tmp_path / "no"), "no: No such file or directory"),
        (("--text", "builtin", "--out", out, "--vocabulary", "characters"), "symbols for a network with 4 inputs"),
    ):
        code, _, err = cli("fine-tune", model, *options)
        assert code == 2 and words in err, err
    assert not out.exists()


def test_read_arrays_runs_no_code_and_says_what_is_wrong(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(3))
    np.save(tmp_path / "b.npy", np.arange(3))
    assert read_arrays(tmp_path / "a.npz")["x"].tolist() == read_arrays(tmp_path / "b.npy").tolist() == [0, 1, 2]
    np.save(tmp_path / "c.npy", np.array([{}], object))
    (tmp_path / "d.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    for name in ("c.npy", "d.npz"):
        with pytest.raises(ValueError, match=f"{name}: NumPy cannot read it"):
            read_arrays(tmp_path / name)
