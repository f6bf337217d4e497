"""Tasks: order of reading, losses and their gradients, validation, and the check of a user's own task."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrnn import Cell, Network, State
from eventrnn.training import (
    Batch,
    Classification,
    LanguageModelling,
    Model,
    Regression,
    Settings,
    Task,
    Trainer,
    check_gradients,
    cross_entropy,
    evaluate,
    squared_error,
)
from eventrnn.training.tasks import carry_state
from support.tolerance import U32, gamma


def _net(**changes):
    options = {"symbols": 8, "embedding": 5, "readout": 8, "threshold": 0.1, "rng": np.random.default_rng(0)} | changes
    return Network.random([20, 16], **options)


@given(st.integers(20, 300), st.integers(1, 7), st.integers(1, 12))
def test_windows_of_an_epoch_read_every_symbol_of_every_stream_once(length, batch, window):
    text = np.arange(length)
    task, at, seen = LanguageModelling(text), 0, []
    while at < task.length(batch):
        part = task.batch(at, 3, batch, window)
        assert part.taken == len(part.inputs) <= window and part.carried == "state"
        assert np.array_equal(part.inputs[1:], part.targets[:-1]), "a target is the next symbol"
        seen.append(part.targets)
        at += part.taken
    streams = text[: length // batch * batch].reshape(batch, -1)
    assert np.array_equal(np.concatenate(seen).T, streams[:, 1:])


def test_validation_equals_the_reading_of_the_event_engine():
    network, text = _net(), np.random.default_rng(1).integers(0, 8, 600)
    for batch in (1, 3):
        figures = LanguageModelling(text, text, valid_batch=batch).evaluate(Model(network))
        pieces = text[: len(text) // batch * batch].reshape(batch, -1)
        by_engine = np.mean([evaluate(network, piece) for piece in pieces])
        # BLAS in training, ascending sums in the engine: within the roundings of a softmax over sums of 16.
        assert abs(figures["bits"] - by_engine) <= gamma(400, U32) * 8
        assert 0 < figures["activity"] < 1
        assert abs(figures["perplexity"] - 2 ** figures["bits"]) <= gamma(8, U32) * figures["perplexity"]


def test_cells_are_zeroed_between_windows_as_in_evnn():
    network, text = _net(), np.random.default_rng(1).integers(0, 8, 600)
    task = LanguageModelling(text, text, carry="events")
    task.check(network, 4, 10)
    assert task.batch(0, 0, 4, 10).carried == "events"
    state = State((np.ones((2, 3), np.float32),), (np.full((2, 3), 2, np.float32),))
    kept = {carry: carry_state(state, carry) for carry in ("state", "events", "")}
    assert [(s.cells[0].max(), s.outputs[0].max()) for s in kept.values()] == [(1, 2), (0, 2), (0, 0)]
    wiped, carried = task.evaluate(Model(network)), LanguageModelling(text, text).evaluate(Model(network))
    assert wiped["bits"] != carried["bits"]
    Trainer(network, task, Settings(steps=5, batch=4, window=10)).run()


def _sequences(kind, rng, count=12, steps=6, **options):
    inputs = rng.normal(size=(count, steps, 4)).astype(np.float32)
    if kind is Classification:
        return kind(inputs, rng.integers(0, 3, count), **options)
    return kind(inputs, rng.normal(size=(count, 3)).astype(np.float32), **options)


@pytest.mark.parametrize("kind", [Classification, Regression])
def test_an_epoch_shuffles_every_sequence_once_and_depends_on_its_place_alone(kind):
    task = _sequences(kind, np.random.default_rng(0))
    epochs = []
    for epoch in (0, 1, 0):
        parts = [task.batch(at, epoch, 5, 0) for at in (0, 5, 10)]
        assert [part.taken for part in parts] == [5, 5, 2]
        epochs.append(np.concatenate([part.inputs for part in parts], axis=1))
    assert np.array_equal(epochs[0], epochs[2]) and not np.array_equal(epochs[0], epochs[1])
    for epoch in epochs:
        assert {x.tobytes() for x in np.moveaxis(epoch, 1, 0)} == {x.tobytes() for x in task.inputs}


@pytest.mark.parametrize("kind", [Classification, Regression])
@pytest.mark.parametrize("read", ["last", "mean"])
def test_lengths_read_out_where_a_sequence_ends(kind, read):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 7, 12)
    task = _sequences(kind, rng, read=read, lengths=lengths)
    part, output = task.batch(0, 0, 12, 0), rng.normal(size=(6, 12, 3)).astype(np.float32)
    _, d_output = task.loss(output, part)
    for b, end in enumerate(part.extra):
        used = d_output[:, b].any(axis=1)
        assert used.tolist() == [t == end - 1 if read == "last" else t < end for t in range(6)]
    shorter = output.copy()
    for b, end in enumerate(part.extra):
        shorter[end:, b] = 99
    assert task.loss(shorter, part)[0] == task.loss(output, part)[0]


@pytest.mark.parametrize("kind", [Classification, Regression])
@pytest.mark.parametrize("read", ["last", "mean"])
def test_validation_reads_out_where_a_sequence_ends(kind, read):
    rng = np.random.default_rng(0)
    lengths, padded = rng.integers(1, 6, 12), _sequences(kind, rng).inputs.copy()
    targets = _sequences(kind, rng).targets
    other = padded.copy()
    for k, end in enumerate(lengths):
        other[k, end:] = 7
    model = Model(Network.random([7], inputs=4, readout=3, threshold=0.1, rng=rng))
    figures = [
        kind(padded, targets, (x, targets, lengths), read=read, lengths=lengths).evaluate(model)
        for x in (padded, other)
    ]
    assert figures[0]["loss"] == figures[1]["loss"], "padding is not read out"
    with pytest.raises(ValueError, match="valid: got 2 entries"):
        kind(padded, targets, (padded, targets), lengths=lengths)
    with pytest.raises(ValueError, match="valid: got 3 entries"):
        kind(padded, targets, (padded, targets, lengths))
    with pytest.raises(ValueError, match="valid lengths"):
        kind(padded, targets, (padded, targets, lengths + 6), lengths=lengths)


@pytest.mark.parametrize("variant", ["evnn", "paper"])
@pytest.mark.parametrize("kind", [Classification, Regression])
def test_check_gradients_passes_correct_code(kind, variant):
    network = Network.random(
        [7], inputs=4, readout=3, threshold=0.1, rng=np.random.default_rng(0), cell=Cell(variant=variant)
    )
    report = check_gradients(network, _sequences(kind, np.random.default_rng(2), read="mean"), directions=2)
    assert report.ok and all(row.sharp for row in report.rows), str(report)
    assert len(report.rows) == 1 + 6 + 5
    assert check_gradients(_net(), LanguageModelling(np.arange(300) % 8), directions=1).ok


def test_check_gradients_detects_wrong_loss_and_surrogate(monkeypatch):
    network = Network.random([7], inputs=4, readout=3, threshold=0.1, rng=np.random.default_rng(0))

    class Off(Regression):
        def loss(self, output, batch):
            loss, d_output = super().loss(output, batch)
            return loss, d_output * np.float32(1.1)

    rng = np.random.default_rng(2)
    wrong = check_gradients(network, Off(_sequences(Regression, rng).inputs, rng.normal(size=(12, 3))), directions=2)
    assert [row.what for row in wrong.rows if not row.ok] == ["Off.loss"] and "WRONG" in str(wrong)

    from eventrnn import cells

    true_step = cells.surrogate_step
    monkeypatch.setattr(cells, "surrogate_step", lambda *arguments: 1.5 * true_step(*arguments))
    wrong = check_gradients(network, directions=2)
    assert not wrong.ok and all("smoothed" in row.what for row in wrong.rows if not row.ok)


class Parity(Task):
    """A task of a user: the number of ones so far, divided by the length of the window. No sequence occurs twice."""

    def check(self, network, batch, window):
        if network.layers[0].inputs != 1:
            raise ValueError("network: parity reads one input")

    def length(self, batch):
        return 10

    def batch(self, at, epoch, batch, window):
        x = np.random.default_rng([epoch, at]).integers(0, 2, (window, batch, 1)).astype(np.float32)
        return Batch(x, x.cumsum(axis=0) / window, taken=1)

    def loss(self, output, batch):
        return squared_error(output, batch.targets)


def test_a_user_task_without_validation_trains_and_continues():
    network = Network.random([12], inputs=1, readout=1, threshold=0.1, rng=np.random.default_rng(0))
    trainer = Trainer(network, Parity(), Settings(steps=60, batch=8, window=12, learning_rate=1e-2))
    progress = list(trainer)
    assert progress[-1].loss < progress[0].loss / 2 and progress[-1].epoch == 6
    assert not progress[-1].validation and not trainer.best
    with pytest.raises(ValueError, match="parity"):
        Trainer(_net(), Parity(), Settings())


def test_classification_learns_and_counts_its_operations():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(60, 5, 4)).astype(np.float32)
    labels = inputs[:, :, :3].sum(axis=1).argmax(axis=1)
    task = Classification(inputs, labels, (inputs, labels), read="mean")
    network = Network.random([32], inputs=4, readout=3, threshold=0.1, rng=rng)
    progress = list(Trainer(network, task, Settings(epochs=25, batch=10, learning_rate=1e-2)))
    assert progress[-1].validation["accuracy"] > 0.9 and progress[-1].step == 150
    assert all(a.operations < b.operations for a, b in zip(progress[:-1], progress[1:], strict=True))
    # An event costs its fan-out forward and in the weight gradient; at most every unit has a path back.
    dense = 150 * 10 * 5 * 3 * (4 * 96 + 32 * 96)
    assert 0 < progress[-1].operations < dense


def test_losses_by_hand():
    loss, gradient = cross_entropy(np.zeros((2, 1, 4), np.float32), np.array([[1], [3]]))
    assert abs(loss - np.log(4)) <= gamma(8, U32)
    assert gradient.tolist() == [[[0.125, -0.375, 0.125, 0.125]], [[0.125, 0.125, 0.125, -0.375]]]
    loss, gradient = squared_error(np.array([[1.0, 3.0]], np.float32), np.array([[2.0, 1.0]]))
    assert loss == 2.5 and gradient.tolist() == [[-1.0, 2.0]]
    # Logits whose difference is beyond float32.
    loss, gradient = cross_entropy(np.array([[3e38, -3e38, 0], [0, 3e38, 3e38]], np.float32), np.array([1, 2]))
    assert abs(loss - (2 * float(np.float32(3e38)) + np.log(2)) / 2) <= gamma(8, U32) * loss
    assert np.abs(gradient - np.array([[0.5, -0.5, 0], [0, 0.25, -0.25]])).max() <= gamma(8, U32)
    with pytest.raises(ValueError, match="targets"):
        squared_error(np.zeros((2, 1), np.float32), np.zeros(2))
    with pytest.raises(ValueError, match="targets"):
        cross_entropy(np.zeros((2, 4), np.float32), np.array([0, 4]))


def test_tasks_refuse_invalid_arguments():
    text, rng = np.arange(100) % 8, np.random.default_rng(0)
    with pytest.raises(ValueError, match="too few"):
        Trainer(_net(), LanguageModelling(text), Settings(batch=10, window=20))
    with pytest.raises(ValueError, match="valid"):
        LanguageModelling(text, text[:1])
    with pytest.raises(ValueError, match="carry"):
        LanguageModelling(text, carry="cells")
    with pytest.raises(ValueError, match="symbol"):
        Trainer(_net(), LanguageModelling(text, text + 1), Settings(batch=2, window=5))
    task = _sequences(Classification, rng)
    narrow = Network.random([7], inputs=4, readout=2, threshold=0.1, rng=rng)
    with pytest.raises(ValueError, match="need classes 0..1"):
        Trainer(narrow, task, Settings())
    with pytest.raises(ValueError, match="read-out"):
        Trainer(replace(narrow, readout=None), task, Settings())
    with pytest.raises(ValueError, match="read"):
        Classification(task.inputs, task.targets, read="first")
    with pytest.raises(ValueError, match="lengths"):
        Classification(task.inputs, task.targets, lengths=np.full(12, 7))
    with pytest.raises(ValueError, match="as many sequences"):
        Regression(task.inputs, np.zeros((3, 3)))


def _refused_in_check(network, inputs, valid, message):
    """Demand that invalid inputs are refused before training, both as training data and as validation data."""
    targets = np.zeros(len(inputs), int)
    for task in (Classification(inputs, targets), Classification(valid, targets[: len(valid)], (inputs, targets))):
        with pytest.raises(ValueError, match=message):
            Trainer(network, task, Settings(steps=1, batch=2))


@pytest.mark.parametrize("bad", [-1, -8, 8])
def test_symbols_out_of_range_are_refused_at_any_position(bad):
    symbols = np.random.default_rng(0).integers(0, 8, (6, 5))
    wrong = symbols.copy()
    wrong[4, 2] = bad
    _refused_in_check(_net(), wrong, symbols, rf"inputs: got symbol {bad} at \(sequence, step\) \(4, 2\), need 0..7")
    _refused_in_check(_net(), symbols / 2, symbols, "need whole numbers 0..7")
    _refused_in_check(_net(), symbols[:, :, None], symbols, "need symbols")
    with pytest.raises(ValueError, match=rf"inputs: got symbol {bad} at \(step, sample\) \(2, 4\), need 0..7"):
        Model(_net()).forward(wrong.T, State.zeros(_net(), 6))
    with pytest.raises(ValueError, match="whole numbers"):
        Model(_net()).forward(symbols.T / 2, State.zeros(_net(), 6))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_non_finite_inputs_are_refused_at_any_position(bad):
    network = Network.random([7], inputs=4, readout=3, rng=np.random.default_rng(0), threshold=0.1)
    inputs = np.random.default_rng(0).normal(size=(300, 5, 4))
    wrong = inputs.copy()
    wrong[290, 3, 1] = bad
    _refused_in_check(network, wrong, inputs, r"\(290, 3, 1\), need finite")
    _refused_in_check(network, inputs[:, :, :3], inputs, r"need numbers \(S, T, 4\)")
    with pytest.raises(ValueError, match=r"need \(T, B, 4\) numbers"):
        Model(network).forward(np.zeros((5, 2, 3), np.float32), State.zeros(network, 2))


@pytest.mark.parametrize("variant", ["evnn", "paper"])
def test_the_check_passes_a_pruned_network_and_catches_a_mask_that_is_not_kept(monkeypatch, variant):
    from eventrnn.pruning import prune

    rng = np.random.default_rng(0)
    pruned = prune(
        Network.random([8], inputs=4, readout=3, threshold=0.1, rng=rng, cell=Cell(variant=variant)), 0.6, block=(2, 2)
    )
    assert Model(pruned).masks
    report = check_gradients(pruned, _sequences(Regression, rng), directions=2)
    assert report.ok, str(report)
    backward = Model.backward

    def leaking(self, *arguments, **options):
        gradients = backward(self, *arguments, **options)
        return gradients | {"layers.0.w_rec": gradients["layers.0.w_rec"] + np.float32(1)}

    monkeypatch.setattr(Model, "backward", leaking)
    wrong = check_gradients(pruned, directions=2)
    assert [row.what for row in wrong.rows if not row.ok] == ["layers.0 engine: w_rec"]


@pytest.mark.parametrize(("units", "window"), [(8, 6), (256, 3), (8, 40)])
def test_the_check_catches_a_wrong_gradient_of_w_rec_however_large_the_network(monkeypatch, units, window):
    network = Network.random([units], inputs=4, readout=3, threshold=0.1, rng=np.random.default_rng(0))
    options = {"directions": 1, "batch": 2, "window": window}
    right = check_gradients(network, **options)
    assert all(row.ok and row.sharp for row in right.rows if "engine" in row.what), str(right)
    backward = Model.backward

    def off(self, *arguments, **more):
        gradients = backward(self, *arguments, **more)
        # An error of a thousandth of the largest entry, in another entry.
        w_rec = gradients["layers.0.w_rec"]
        w_rec[0, 0] += np.abs(w_rec).max() / 1000
        return gradients

    monkeypatch.setattr(Model, "backward", off)
    wrong = check_gradients(network, **options)
    assert not wrong.ok and [row.what for row in wrong.rows if not row.ok] == ["layers.0 engine: w_rec"]


def test_check_gradients_without_a_sharp_row_fails():
    from eventrnn.training.gradcheck import GradientCheck, Row

    blind = Row("layers.0 engine: w_rec", error=0.0, allowed=1.0, size=2.0)
    seen = Row("layers.0 engine: w_in", error=0.0, allowed=1e-6, size=2.0)
    zero = Row("layers.0 engine: threshold", error=0.0, allowed=1e-6, size=0.0)
    assert GradientCheck((seen, zero)).ok
    for rows in ((blind, seen), (zero,), (blind,)):
        report = GradientCheck(rows)
        assert not report.ok and "smaller network or window" in str(report)
    assert GradientCheck((blind, seen)).coarse == ("layers.0 engine: w_rec",)
