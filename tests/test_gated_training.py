"""Training of gated blocks: gradients by the specification and by differences, options, counts, runs, refusals.

`test_plain_training.py` has the gradients of gated GRU and LSTM cells.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

from eventrnn import reference, reference_products
from eventrnn.counting.backward import count_backward
from eventrnn.network import Network
from eventrnn.pruning import Blocks, GradualPruning, after_training
from eventrnn.simulation import simulate
from eventrnn.state import State
from eventrnn.training import (
    Diverged,
    GateSettings,
    Gating,
    LanguageModelling,
    Model,
    Noise,
    Regularisers,
    Settings,
    Trainer,
    check_gradients,
    run,
)
from eventrnn.training.bptt import gated_products
from eventrnn.training.bptt.gated_products import GatedMatrix, GatedProduct
from eventrnn.training.checkpoint import CheckpointError
from eventrnn.training.recipes.recipe import load_recipe, train
from eventrnn.weights import GATE_RULES, Dense, GatedBlocks
from support import tolerance
from support.gated import gate_matrices, specified
from support.planting import plant

SYMBOLS, STEPS = 6, 8
# 9 units and blocks of 4 x 8: blocks at the far edges are padded.
BLOCK = (4, 8)


def network_of(units=(9, 8), inputs=5, outputs=3, **options) -> Network:
    network = Network.random(list(units), inputs=inputs, readout=outputs, rng=np.random.default_rng(3), threshold=0.05)
    return gate_matrices(network, **({"block": BLOCK} | options))


def numbers(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def window(network: Network, gating: Gating | None = None, noise: Noise | None = None, threads: int = 1, **options):
    """Model, tape and gradients of a window of 5 steps and 3 samples."""
    model, x = Model(network, threads=threads), numbers(5, 3, network.layers[0].inputs)
    output, _, tape = model.forward(x, State.zeros(network, 3), noise, gating)
    return model, tape, model.backward(tape, numbers(*output.shape, seed=2), d_inputs=True, **options)


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("rule", GATE_RULES)
def test_gradients_are_those_of_differences_and_of_the_specification(rule, rank):
    checked = check_gradients(network_of(rule=rule, rank=rank), batch=2, window=4, directions=2)
    assert checked.ok, checked
    compared = {row.what for row in checked.rows}
    ends = ["", ".gate", ".gate_bias", *([".gate_out"] if rank else [])]
    for end in ends:
        assert {f"layers.0 evnn cell, smoothed: w_rec{end}", f"layers.1 engine: w_in{end}"} < compared
        assert f"readout engine: {end}" in compared


@pytest.mark.parametrize(
    ("method", "right", "wrong"),
    [
        ("input_gradient", "np.einsum('rk,rk->r', d_logits, gates)[:, None] / F32(max(1, gates.shape[1]))", "F32(0)"),
        ("input_gradient", "team.multiply(self._d_inner(d_logits), matrix.gate.T)", "F32(0)"),
        ("gradients", "self._scaled(x, self.gates, column, column + 1)[0]", "x"),
    ],
    ids=["without the normalisation", "without the logits", "without the gates"],
)
def test_a_fault_of_the_backward_pass_is_found(method, right, wrong, monkeypatch):
    network = network_of(units=(9,))
    assert check_gradients(network, batch=2, window=3, directions=1).ok
    plant(monkeypatch, GatedProduct, method, {right: wrong})
    checked = check_gradients(network, batch=2, window=3, directions=1)
    assert [row.what for row in checked.rows if not row.ok and "engine" in row.what]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("straight_through", [False, True])
def test_gradients_with_and_without_straight_through_are_the_specified_ones(
    straight_through, threads, together, monkeypatch
):
    if not together:
        monkeypatch.setattr(gated_products, "TOGETHER", 0)
    # A single chosen block has the gate `blocks` whatever its logit is, and no gradient.
    network = network_of(rule="softmax", rank=2, density=0.3, outputs=20)
    model, tape, found = window(network, Gating(straight_through), threads=threads)
    output, unused = numbers(5, 3, 20, seed=2), 0
    single, exact = (specified(network, tape, output, straight_through, kind) for kind in (np.float32, np.float64))
    assert set(found) == set(exact) | {"readout.bias"} == set(model.parameters) | {"inputs"}
    for name, expected in exact.items():
        bound = tolerance.gradient_bound(single[name], expected)
        assert np.abs(found[name] - expected).max() <= bound < np.abs(expected).max() / 100, name
    for name, product in tape.products.items():
        assert (product.chosen.sum(axis=1) == network.matrices()[name].kept_blocks).all()
        never = ~product.chosen.any(axis=0)
        unused += never.sum()
        assert (found[f"{name}.gate_bias"][never] != 0).all() == (straight_through or not never.any())
    assert unused


def test_logits_of_zero_have_no_gradient_with_the_linear_rule():
    matrix = GatedMatrix(
        *("w", np.ones((4, 4), np.float32), np.zeros((4, 4), np.float32), np.zeros(4, np.float32), None),
        *((2, 2), 2, "linear", True),
    )
    product = GatedProduct(matrix, 1, Model(network_of())._team)
    drives = product.drives(np.ones((1, 4), np.float32), 0)
    # Blocks 0 and 1, the first row of blocks, are chosen with the gate 4 / 2 each.
    assert np.array_equal(drives, [[4, 4, 4, 4]]) and np.array_equal(product.gates, [[2, 2, 0, 0]])
    product.input_gradient(np.ones((1, 4), np.float32), np.ones((1, 4), np.float32), 0)
    assert not product.d_logits.any()


def test_gates_that_are_not_finite_are_refused_and_the_trainer_stays():
    network = word_network()
    w_in = network.layers[0].w_in
    # The two chosen logits cancel.
    cancelling = np.array([1, -1] + [-2] * (w_in.n_blocks - 2), np.float32)
    broken = replace(w_in, gate=np.zeros_like(w_in.gate), gate_bias=cancelling, density=2 / w_in.n_blocks)
    network = network.with_matrices({"layers.0.w_in": broken})
    trainer = Trainer(network, TEXT, Settings(steps=2, batch=4, window=10))
    before = {name: array.copy() for name, array in trainer.model.parameters.items()}
    with pytest.raises(Diverged, match=r"layers\.0\.w_in: the gates of its blocks are not finite.* at step 1"):
        trainer.step()
    assert trainer.steps_done == 0
    assert all(np.array_equal(before[name], array) for name, array in trainer.model.parameters.items())


class Cancelling(LanguageModelling):
    """A text whose validation finds gates that are not finite."""

    def evaluate(self, model):
        raise FloatingPointError("layers.0.w_in: the gates of its blocks are not finite")


def test_gates_that_are_not_finite_in_a_validation_end_the_run_with_its_place(tmp_path):
    trainer = Trainer(word_network(), Cancelling(TEXT, TEXT), Settings(steps=4, batch=4, window=10, validate_every=2))
    words = r"layers\.0\.w_in: .* in the validation after step 2; .*last good checkpoint: .*step 1"
    with pytest.raises(Diverged, match=words):
        run(trainer, tmp_path, checkpoint_seconds=0)


@pytest.mark.parametrize(("steps", "samples"), [(0, 2), (2, 0)])
def test_a_window_without_steps_or_samples_has_gradients_of_zero(steps, samples):
    network = network_of(outputs=20)
    model, x = Model(network), np.zeros((steps, samples, 5), np.float32)
    output, _, tape = model.forward(x, State.zeros(network, samples))
    assert output.shape == (steps, samples, 20)
    found = model.backward(tape, np.zeros_like(output))
    assert set(found) == set(model.parameters) and not any(each.any() for each in found.values())


# --- forward ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", GATE_RULES)
def test_choices_are_those_of_the_logits_and_drives_within_rounding(rule):
    # Eighths, so that logits are exact in any order of summation; they are positive.
    rng = np.random.default_rng(4)
    shape, block, rows = (10, 14), (4, 6), 12
    gate, bias = rng.integers(-8, 9, (10, 9)) / 8, rng.integers(20, 24, 9)
    weights, x = rng.normal(size=shape).astype(np.float32), rng.integers(-1, 2, (rows, 10)).astype(np.float32)
    with pytest.warns(UserWarning, match="square blocks pay from"):
        made = GatedBlocks.from_weights(weights, block=block, density=0.4, gate=gate, gate_bias=bias, gate_rule=rule)
    parameters = {"w": weights, "w.gate": made.gate, "w.gate_bias": made.gate_bias}
    product = GatedProduct(GatedMatrix.of("w", made, parameters, Gating()), rows, Model(network_of())._team)
    drives = np.concatenate([product.drives(x[:5], 0), product.drives(x[5:], 5)])
    arrays, wide = reference.weight_arrays("w", made, np.float64), x.astype(np.float64)
    assert np.array_equal(product.gates != 0, reference_products.block_gates(arrays, wide) != 0)
    gates = np.repeat(reference_products.block_gates(arrays, wide).reshape(rows, 3, 3), 4, axis=1)[:, :10]
    sizes = np.repeat(gates, 6, axis=2)[:, :, :14] * np.abs(wide)[:, :, None] * np.abs(weights)
    error = np.abs(drives - reference.propagate(arrays, wide, np.zeros(14)))
    assert (error <= tolerance.gated_drive_bound(made.kept_blocks, sizes)).all()


def test_the_trained_network_has_the_outputs_of_the_model():
    network = network_of(rule="softmax")
    model = Model(network)
    x = numbers(6, 4, 5)
    output, state, tape = model.forward(x, State.zeros(network, 4))
    result = simulate(model.network(), x, record="events")
    assert all(isinstance(weights, GatedBlocks) for weights in model.network().matrices().values())
    events = [each.to_dense() != 0 for each in result.events]
    assert all(np.array_equal(fired, layer.y[1:] != 0) for fired, layer in zip(events, tape.layers, strict=True))
    assert np.abs(result.output - output).max() <= tolerance.SHARPEST_MARGIN
    assert np.abs(result.state.cells[1] - state.cells[1]).max() <= tolerance.SHARPEST_MARGIN


def test_all_blocks_with_constant_gates_train_as_the_matrices_without_gates():
    network = network_of(density=1.0)
    constant = {
        name: replace(w, gate=np.zeros_like(w.gate), gate_bias=np.ones_like(w.gate_bias))
        for name, w in network.matrices().items()
    }
    plain = network.with_matrices({name: w.blocks for name, w in network.matrices().items()})
    dropped = {f"layers.{k}.w_rec": (numbers(n, 3 * n, seed=n) > 0) * np.float32(2) for k, n in enumerate((9, 8))}
    noise = Noise(recurrent=tuple(dropped.values()))
    (_, tape, found), (_, other, expected) = (
        window(each, noise=noise) for each in (network.with_matrices(constant), plain)
    )
    assert all((product.gates == 1).all() for product in tape.products.values())
    assert all(np.array_equal(a.y != 0, b.y != 0) for a, b in zip(tape.layers, other.layers, strict=True))
    # The specification of the matrices without gates, with dropped weights.
    matrices = {name: Dense(w.to_dense() * dropped.get(name, np.float32(1))) for name, w in plain.matrices().items()}
    specifying = plain.with_matrices(matrices), other, numbers(5, 3, 3, seed=2), False
    single, exact = (specified(*specifying, kind) for kind in (np.float32, np.float64))
    for name, gradient in exact.items():
        bound = tolerance.gradient_bound(single[name], gradient)
        scale = dropped.get(name, 1)
        for each in (found, expected):
            assert np.abs(each[name] - gradient * scale).max() <= 2 * bound < np.abs(gradient).max() / 50, name


# --- counts -------------------------------------------------------------------------------------------------


def test_counts_of_a_window_are_those_of_loops_over_events_and_blocks():
    network = network_of(density=0.3, rule="softmax")
    model = Model(network)
    rng = np.random.default_rng(0)
    model.masks["layers.0.w_rec"] = rng.random((9, 27)) < 0.6
    model.apply_masks()
    x = numbers(5, 3, 5) * (numbers(5, 3, 5, seed=9) > 0)
    output, _, tape = model.forward(x, State.zeros(network, 3))
    model.backward(tape, numbers(*output.shape, seed=2))
    layer, (r, c) = tape.layers[0], BLOCK
    slope = reference.cells.surrogate_slope(
        network.layers[0].cell.surrogate.code, layer.v - layer.threshold, np.float32(0.7), np.float32(1)
    )
    active = (layer.v > layer.threshold) | (slope != 0)
    needed = {"w_in": np.zeros(x.shape, bool), "w_rec": np.concatenate([np.zeros((1, 3, 9), bool), active[:-1]])}
    for name, sent in (("w_in", x), ("w_rec", layer.y[:-1])):
        product, work = layer.products[name], tape.work[f"layers.0.{name}"]
        kept = model.masks.get(f"layers.0.{name}", np.ones((sent.shape[2], 27), bool))
        events = pairs = 0
        for t, b, j in np.ndindex(sent.shape):
            gates = product.gates[t * 3 + b].reshape(-1, 4)[j // r]
            weights = sum(int(kept[j, q * c : (q + 1) * c].sum()) for q in range(4) if gates[q] != 0)
            events += weights * (sent[t, b, j] != 0)
            pairs += weights * needed[name][t, b, j]
        assert (work.of_events, work.of_pairs) == (events, pairs) and events > 0
        assert np.array_equal(work.fired, np.count_nonzero(sent, axis=(0, 1)))
        assert np.array_equal(work.active_pairs, needed[name].sum(axis=(0, 1)))
        counted = count_backward({name: work})[name]
        blocks = product.gates.shape[1]
        assert counted.backward_effective == events + pairs
        assert counted.backward_executed == 2 * 15 * kept.size
        assert counted.backward_selection == 15 * (3 * len(kept) * 4 + 2 * len(kept) * blocks + 2 * blocks)


# --- options ------------------------------------------------------------------------------------------------


def test_the_load_balance_is_the_published_formula_and_its_gradient_reaches_the_gate():
    network = network_of(rank=2)
    model, tape, plain = window(network)
    penalty = Regularisers(gate_balance=0.25).penalise(model, tape)
    total, names = 0.0, list(tape.products)
    assert names == list(penalty.d_logits) and len(names) == 5
    for name, product in tape.products.items():
        rows, blocks = product.logits.shape
        used = product.chosen.sum(axis=0) / product.chosen.sum()

        def balance(logits, used=used, blocks=blocks):
            shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            return 0.25 * blocks * float(used @ shares.mean(axis=0))

        logits = product.logits.astype(np.float64)
        total += balance(logits)
        direction = np.random.default_rng(0).normal(size=logits.shape)
        slope = tolerance.central_difference(
            lambda h, logits=logits, direction=direction: np.array([balance(logits + h * direction)]), 1.0, 50
        )
        found = (penalty.d_logits[name].reshape(rows, blocks) * direction).sum()
        rounding = tolerance.gamma(rows * blocks, tolerance.U32) * np.abs(penalty.d_logits[name]).sum()
        assert abs(found - slope.value[0]) <= slope.bound + rounding
    assert abs(penalty.loss - total) <= tolerance.gamma(200, tolerance.U32) * total
    _, _, pushed = window(network, d_logits=penalty.d_logits)
    added = pushed["readout.gate_bias"] - plain["readout.gate_bias"]
    wanted = penalty.d_logits["readout"].sum(axis=(0, 1))
    assert (
        np.abs(added - wanted).max() <= tolerance.gamma(100, tolerance.U32) * np.abs(plain["readout.gate_bias"]).max()
    )
    # The penalty of a tape does not stay with it.
    _, _, again = window(network)
    assert np.array_equal(again["readout.gate_bias"], plain["readout.gate_bias"])


def test_blocks_that_are_used_alike_have_a_balance_of_one():
    network = network_of(density=1.0)
    even = {
        name: replace(w, gate=np.zeros_like(w.gate), gate_bias=np.ones_like(w.gate_bias))
        for name, w in network.matrices().items()
    }
    model, tape, _ = window(network.with_matrices(even))
    penalty = Regularisers(gate_balance=1.0).penalise(model, tape)
    assert abs(penalty.loss - 5) <= tolerance.gamma(100, tolerance.U32) * 5
    assert all(np.abs(each).max() <= tolerance.U32 for each in penalty.d_logits.values())


def test_the_density_falls_linearly_to_that_of_each_matrix_and_validation_has_the_last_one():
    network = word_network(density=0.25)
    settings = Settings(steps=6, batch=4, window=10, validate_every=3, gates=GateSettings(False, 1.0, 4))
    trainer, seen = Trainer(network, LanguageModelling(TEXT, TEXT), settings), []
    forward = trainer.model.forward

    def recorded(*arguments, **options):
        result = forward(*arguments, **options)
        product = result[2].layers[0].products["w_rec"]
        seen.append((len(arguments) > 3, int(product.chosen[0].sum())))
        return result

    trainer.model.forward = recorded
    for _ in trainer:
        pass
    blocks = network.layers[0].w_rec.n_blocks
    updates = [kept for training, kept in seen if training]
    wanted = [-(-blocks * share // 16) for share in (16, 13, 10, 7, 4, 4)]
    assert updates == wanted
    assert {kept for training, kept in seen if not training} == {network.layers[0].w_rec.kept_blocks}
    assert trainer.network().layers[0].w_rec.density == 0.25


class Worsening(LanguageModelling):
    """A text whose validations become worse all the time."""

    seen = 0

    def evaluate(self, model):
        self.seen += 1
        return {self.figure: float(self.seen)}


def test_no_validation_ends_a_run_while_the_density_still_changes():
    options = {"steps": 9, "batch": 4, "window": 10, "validate_every": 1, "patience": 2}
    for gates, last in ((GateSettings(), 3), (GateSettings(False, 1.0, 5), 6)):
        trainer = Trainer(word_network(), Worsening(TEXT, TEXT), Settings(**options, gates=gates))
        trainer.run()
        assert (trainer.steps_done, trainer.best_value) == (last, 1.0)


# --- runs ---------------------------------------------------------------------------------------------------

TEXT = np.random.default_rng(2).integers(0, SYMBOLS, 400)


def word_network(**options) -> Network:
    network = Network.random(
        [9], symbols=SYMBOLS, embedding=8, readout=SYMBOLS, rng=np.random.default_rng(3), threshold=0.05
    )
    return gate_matrices(network, **({"block": BLOCK} | options))


def trainer_of(network: Network | None = None, **changes) -> Trainer:
    settings = {
        "steps": STEPS,
        "batch": 4,
        "window": 10,
        "validate_every": 2,
        "clip_layers": 0.5,
        "weight_decay": 0.1,
        "regularisers": Regularisers(dropconnect=0.3, dropout_top=0.3, zoneout=0.2, gate_balance=0.1),
        "gates": GateSettings(True, 1.0, 4),
    }
    pruning = GradualPruning(0.5, block=BLOCK, start=1, end=5, every=2, exempt=("readout",))
    return Trainer(
        network or word_network(rank=2, rule="softmax"),
        LanguageModelling(TEXT, TEXT),
        Settings(**settings | changes),
        pruning=pruning,
    )


def test_a_resumed_run_and_a_copy_have_the_bits_of_the_whole_run(tmp_path):
    expected = trainer_of().run()
    left = trainer_of()

    def stop(progress, seconds):
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(left, tmp_path, report=stop, checkpoint_seconds=0)
    resumed = trainer_of()
    run(resumed, tmp_path, resume=True)
    started = trainer_of()
    for _ in range(3):
        started.step()
    twin = copy.deepcopy(started)
    for _ in twin:
        pass
    for each in (resumed, twin):
        for name, weights in expected.matrices().items():
            found = each.network().matrices()[name]
            assert isinstance(found, GatedBlocks), name
            for ours, theirs in zip(weights.arrays().values(), found.arrays().values(), strict=True):
                assert np.array_equal(ours, theirs), name
    with pytest.raises(CheckpointError, match=r"layers\.0\.w_in\.blocks: .*0\.5.*in the checkpoint.* 0\.7"):
        run(trainer_of(word_network(rank=2, rule="softmax", density=0.7)), tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"settings\.gates\.straight_through: True in the checkpoint, False now"):
        run(trainer_of(gates=GateSettings(False, 1.0, 4)), tmp_path, resume=True)


def test_pruned_blocks_are_zero_and_not_stored_and_gates_are_trained():
    network = word_network(rank=2, rule="softmax")
    trained = trainer_of(network).run()
    for name in ("layers.0.w_in", "layers.0.w_rec"):
        before, after = network.matrices()[name], trained.matrices()[name]
        assert len(after.indices) == -(-before.n_blocks // 2) < len(before.indices)
        assert after.kept_blocks == before.kept_blocks and after.gate_rule == "softmax"
        for part in ("gate", "gate_bias", "gate_out"):
            assert (getattr(after, part) != getattr(before, part)).any()
    assert len(trained.readout.weights.indices) == network.readout.weights.n_blocks
    # A network that was pruned stays pruned when it is trained again.
    again = Trainer(trained, TEXT, Settings(steps=2, batch=4, window=10)).run()
    assert np.array_equal(again.layers[0].w_in.kept(), trained.layers[0].w_in.kept())
    assert not np.array_equal(again.layers[0].w_in.values, trained.layers[0].w_in.values)


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_network_that_is_pruned_in_training_keeps_its_gates_and_storage(storage):
    network = word_network(rule="softmax")
    network = network.with_matrices({name: w.stored_as(storage) for name, w in network.matrices().items()})
    trainer = trainer_of(network)
    trained = trainer.run()
    pruned = after_training(trained, network, trainer.model.masks, Blocks(0.5))
    for name, weights in pruned.matrices().items():
        assert isinstance(weights, GatedBlocks) and weights.storage == storage, name
        assert np.array_equal(weights.gate, trained.matrices()[name].gate)
    assert len(pruned.layers[0].w_in.indices) == -(-network.layers[0].w_in.n_blocks // 2)


def test_training_lowers_the_loss_of_a_text_with_a_rule():
    text = np.arange(600) % SYMBOLS
    settings = Settings(steps=60, batch=4, window=10, learning_rate=3e-2)
    losses = [progress.loss for progress in Trainer(word_network(rule="softmax"), text, settings)]
    assert losses[-1] < losses[0] / 2


def test_a_recipe_with_gates_trains_and_reports_what_they_cost(tmp_path):
    model = {
        "hidden": [24],
        "embedding": 16,
        "gates.matrices": ["w_in", "layers.0.w_rec", "readout"],
        "gates.block": [8, 12],
        "gates.rank": 3,
        "gates.rule": "softmax",
    }
    settings = [(f"model.{name}", value) for name, value in model.items()]
    settings += [("training.steps", 2), ("training.batch", 4), ("training.window", 8)]
    settings += [("training.gates.straight_through", True), ("training.regularisers.gate_balance", 0.01)]
    said = []
    recipe = load_recipe(settings=[*settings, ("run.out", str(tmp_path / "model.evr"))])
    figures = train(recipe, tmp_path / "run", report=lambda *stage: said.append(stage))
    costs = {stage: note for stage, _, _, note in said if stage.startswith("gates of ")}
    assert list(costs) == [f"gates of {name}" for name in ("layers.0.w_in", "layers.0.w_rec", "readout")]
    assert "the gate of rank 3 of 8x12 blocks of a matrix 16x72 costs" in costs["gates of layers.0.w_in"]
    assert all("square blocks pay from" in note for note in costs.values())
    costs = {name: w.gate_cost.cost for name, w in recipe.trainer()[0].model.gated.items()}
    assert figures["gate_cost"] == costs
    # The stages of the gates come before the first update.
    assert [stage for stage, *_ in said].index("training") == len(costs)
    assert load_recipe(tmp_path / "run" / "config.toml") == recipe


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"start_density": 1.5, "anneal_steps": 3}, "start_density: got 1.5"),
        ({"start_density": 0.5}, "give both"),
        ({"anneal_steps": 3}, "give both"),
        ({"anneal_steps": -1, "start_density": 0.5}, "anneal_steps: got -1"),
        ({"straight_through": 1}, "straight_through: got 1"),
    ],
)
def test_settings_of_gates_out_of_range_are_refused(settings, words):
    with pytest.raises((ValueError, TypeError), match=words):
        GateSettings(**settings)


def test_settings_that_a_run_would_ignore_are_refused():
    plain = Network.random([6], symbols=SYMBOLS, embedding=4, readout=SYMBOLS, rng=np.random.default_rng(0))
    options = {"steps": 4, "batch": 4, "window": 10}
    for changes, words in (
        ({"gates": GateSettings(straight_through=True)}, "no matrix of the network has gated blocks"),
        ({"regularisers": Regularisers(gate_balance=0.1)}, "gate_balance: got 0.1, but no matrix"),
    ):
        with pytest.raises(ValueError, match=words):
            Trainer(plain, TEXT, Settings(**options, **changes))
    long = Settings(**options, gates=GateSettings(False, 1.0, 4))
    with pytest.raises(ValueError, match="anneal_steps: got 4, but training has 4 updates"):
        Trainer(word_network(), TEXT, long)
    model, tape, _ = window(network_of())
    with pytest.raises(ValueError, match=r"d_logits: got layers\.7\.w_in, which has no gated blocks; have layers\.0"):
        model.backward(tape, numbers(5, 3, 3), d_logits={"layers.7.w_in": numbers(5, 3, 8)})
    with pytest.raises(TypeError, match=r"d_logits: got \[1\] \(list\), need a mapping"):
        model.backward(tape, numbers(5, 3, 3), d_logits=[1])
    with pytest.raises(ValueError, match=r"d_logits of readout: got shape \(5, 3, 1\), need"):
        model.backward(tape, numbers(5, 3, 3), d_logits={"readout": numbers(5, 3, 1)})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gates.matrices": ["w_out"]}, "matrices: got 'w_out', need w_in, w_rec or one of layers.0.w_in"),
        ({"gates.block": [8, 8]}, "but no matrices; name some"),
        ({"gates.density": 0.5}, "model.gates.density: got 0.5, but no matrices; set model.gates.matrices"),
        ({"gates.matrices": ["w_in"], "gates.block": [8]}, r"block: got \[8\], need two numbers"),
        (
            {"gates.matrices": ["w_in"], "hidden": [16], "embedding": 8, "gates.block": [9, 8]},
            r"gates block: got \[9, 8\], which is larger than layers\.0\.w_in, a matrix 8x48",
        ),
        ({"gates.matrices": ["w_in"], "gates.density": 0.0}, "gates density: got 0.0"),
        ({"gates.matrices": ["w_in"], "gates.rule": "hard"}, "gates rule: got 'hard'"),
        ({"gates.matrices": ["readout"], "tied": True, "embedding": 256}, "'readout', which is tied to the embedding"),
    ],
)
def test_gates_of_a_recipe_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        load_recipe(settings=[(f"model.{name}", value) for name, value in changes.items()]).trainer()
