"""Training of cells without thresholds, the GRU and the LSTM: gradients, PyTorch, noise, masks, runs and copies.

The gradients of all cells are compared with finite differences and with the specification by `check_gradients`.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

from eventrnn import cells, reference
from eventrnn.cells import Cell
from eventrnn.network import Network
from eventrnn.pruning import BlockDiagonal, GradualPruning, StaticMasks, prune
from eventrnn.simulation import simulate
from eventrnn.state import State
from eventrnn.training import (
    LanguageModelling,
    Model,
    Noise,
    Optimiser,
    Regression,
    Regularisers,
    Settings,
    Trainer,
    check_gradients,
    evaluate,
    run,
)
from eventrnn.training.thresholds import RULES
from eventrnn.weights import GatedBlocks
from support import tolerance
from support.plain_cells import (
    TORCH_NAMES,
    bounded,
    each_cell,
    numbers,
    random_network,
    said,
    torch_module,
    torch_order,
)
from support.planting import plant

SYMBOLS, STEPS = 6, 8


def word_network(cell: Cell, units=(9, 8), seed=3, **options) -> Network:
    sizes = {"symbols": SYMBOLS, "embedding": 4, "readout": SYMBOLS} | options
    return Network.random(list(units), **sizes, rng=np.random.default_rng(seed), cell=cell)


def trainer(cell: Cell, changes=None, **options) -> Trainer:
    text = np.random.default_rng(2).integers(0, SYMBOLS, 300)
    settings = {"steps": STEPS, "batch": 4, "window": 10, "learning_rate": 1e-2} | (changes or {})
    return Trainer(word_network(cell), LanguageModelling(text, text), Settings(**settings), **options)


NOISE = Regularisers(
    dropconnect=0.3, dropout_input=0.2, dropout_between=0.3, dropout_top=0.3, dropout_words=0.1, zoneout=0.3
)


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "rule", "edits"),
    [
        (Cell("gru"), "gru_backward", {"d_g * rec_g * r * (ONE - r)": "d_g * g * r * (ONE - r)"}),
        (Cell("gru", "before"), "gru_before_backward", {"u * d_h": "(ONE - u) * d_h"}),
        (Cell("lstm"), "lstm_backward", {"d_c * g * i * (ONE - i)": "d_c * i * i * (ONE - i)"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_adjoint_of_a_rule_is_found(monkeypatch, cell, rule, edits):
    network = random_network(cell, units=(5,), inputs=4, readout=3)
    assert check_gradients(network, directions=2).ok
    # The specification calls the rule; compiled kernels keep the right one, so that two comparisons fail.
    plant(monkeypatch, cells, rule, edits)
    wrong = {row.kind for row in check_gradients(network, directions=2).rows if not row.ok}
    assert wrong == {f"layers.0 {cell.name} cell", "layers.0 engine"}


# 17 units: a whole vector and one unit.
@each_cell
def test_gradients_are_those_of_finite_differences_and_of_the_specification(cell):
    checked = check_gradients(random_network(cell, units=(17, 5), inputs=4, readout=3), directions=3)
    assert checked.ok, checked
    assert any(row.what.startswith(f"layers.0 {cell.name} cell: w_rec") for row in checked.rows)


@each_cell
def test_plain_and_event_layers_are_trained_together(cell):
    below = random_network(cell, units=(6,), inputs=4)
    middle = Network.random([7], inputs=6, rng=np.random.default_rng(1), threshold=0.05)
    above = random_network(cell, units=(5,), inputs=7, readout=3)
    network = Network(below.layers + middle.layers + above.layers, readout=above.readout)
    checked = check_gradients(network, directions=2)
    assert checked.ok, checked


def specified(network: Network, x: np.ndarray, d_output: np.ndarray, kind: type) -> dict[str, np.ndarray]:
    """Gradients of sum(d_output * output of the last layer), from the zero state, by the specification."""
    tapes, parameters, sent = [], [], [x.astype(kind)]
    for layer in network.layers:
        parameters.append(reference.layer_parameters(layer, kind))
        zero = np.zeros((x.shape[1], layer.units), kind)
        tapes.append(reference.forward(layer.cell, parameters[-1], sent[-1], zero, zero))
        sent.append(np.array([tape.y for tape in tapes[-1]]))
    d_y, found = d_output.astype(kind), {}
    for k in reversed(range(len(network.layers))):
        cell = network.layers[k].cell
        gradients = reference.backward(cell, parameters[k], sent[k], tapes[k], d_y, np.zeros_like(d_y))
        found |= {f"layers.{k}.{name}": value for name, value in gradients.items() if name not in ("x", "c", "y")}
        d_y = gradients["x"]
    return found | {"inputs": d_y}


@pytest.mark.torch
@pytest.mark.parametrize("cell", [Cell("gru"), Cell("lstm")], ids=said)
def test_gradients_are_those_of_pytorch(cell):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    network, x, d_output = random_network(cell), numbers(5, 3, 5), numbers(5, 3, 9, seed=2)
    module = torch_module(network)
    inputs = torch.from_numpy(x.astype(np.float64)).requires_grad_()
    (module(inputs)[0] * torch.from_numpy(d_output.astype(np.float64))).sum().backward()
    expected = {"inputs": inputs.grad.numpy()}
    for k in range(len(network.layers)):
        for theirs, ours in TORCH_NAMES.items():
            gradient = np.empty_like(getattr(module, f"{theirs}_l{k}").grad.numpy().T)
            gradient[..., torch_order(cell, 9)] = getattr(module, f"{theirs}_l{k}").grad.numpy().T
            expected[f"layers.{k}.{ours}"] = gradient
    model = Model(network)
    _, _, tape = model.forward(x, State.zeros(network, 3))
    trained = model.backward(tape, d_output, d_inputs=True)
    single, exact = (specified(network, x, d_output, kind) for kind in (np.float32, np.float64))
    for name, theirs in expected.items():
        bound = tolerance.gradient_bound(single[name], exact[name])
        assert np.abs(trained[name] - theirs).max() <= bound < np.abs(theirs).max() / 100, name
        assert np.abs(exact[name] - theirs).max() <= tolerance.gradient_bound(single[name], exact[name], tolerance.U64)


@pytest.mark.filterwarnings("ignore:gated blocks")  # matrices this small cost more with a gate
@each_cell
@pytest.mark.parametrize("rank", [None, 2])
def test_gradients_of_gated_blocks_are_those_of_the_specification(cell, rank):
    network, rng = random_network(cell, units=(9, 8)), np.random.default_rng(0)
    options = {"block": (4, 8), "density": 0.5, "gate_rule": "softmax", "rank": rank, "rng": rng}
    gated = {
        name: GatedBlocks.from_weights(weights, **options)
        for name, weights in network.matrices().items()
        if not (cell.reset_first and name.endswith("w_rec"))
    }
    network = network.with_matrices(gated)
    x, d_output, model = numbers(5, 3, 5), numbers(5, 3, 8, seed=2), Model(network)
    output, _, tape = model.forward(x, State.zeros(network, 3))
    found = model.backward(tape, d_output, d_inputs=True)
    single, exact = (specified(network, x, d_output, kind) for kind in (np.float32, np.float64))
    assert set(found) == set(exact) and {f"{name}.gate" for name in gated} < set(found)
    for name, expected in exact.items():
        bound = tolerance.gradient_bound(single[name], expected)
        assert np.abs(found[name] - expected).max() <= bound, name
        assert bound < np.abs(expected).max() / 100 or name.endswith("threshold")
    result = simulate(network, x).output
    assert np.abs(result - output).max() <= tolerance.SHARPEST_MARGIN


@each_cell
@pytest.mark.parametrize("noisy", [False, True])
def test_gradients_are_those_of_the_loss(cell, noisy):
    rng = np.random.default_rng(0)
    network = random_network(cell, units=(6, 5), inputs=4, readout=3)
    model, task = Model(network), Regression(numbers(12, 6, 4), numbers(12, 3), read="mean")
    part, state = task.batch(0, 0, 5, 0), State.zeros(network, 5)
    noise = replace(NOISE, dropout_words=0).draw(model, 6, 5, seed=1, step=0) if noisy else None
    output, _, tape = model.forward(part.inputs, state, noise)
    loss, d_output = task.loss(output, part)
    gradients = model.backward(tape, d_output)
    for name, value in model.parameters.items():
        if name.endswith("threshold"):
            assert not gradients[name].any()
            continue
        way = rng.normal(size=value.shape).astype(np.float32)
        way /= np.linalg.norm(way)
        before, found = value.copy(), {}
        for h in (-2, -1, 1, 2):
            value[...] = before + np.float32(h * 2.0**-6) * way
            found[h] = task.loss(model.forward(part.inputs, state, noise)[0], part)[0]
        value[...] = before
        once, twice = (found[1] - found[-1]) * 2**5, (found[2] - found[-2]) * 2**4
        # Truncation as in `tolerance.central_difference`; float32 losses are off by some 400 roundings.
        bound = abs(twice - once) + 3 * tolerance.gamma(400, tolerance.U32) * (loss + 1) * 2**6
        assert abs(np.vdot(gradients[name].astype(np.float64), way) - once) <= bound, name


# --- the forward pass ---------------------------------------------------------------------------------------


@each_cell
@pytest.mark.parametrize("threads", [1, 2])
def test_the_engine_has_the_outputs_of_the_trained_network(cell, threads):
    network = random_network(cell, units=(18, 9), readout=4)
    model, x = Model(network, threads=threads), numbers(5, 3, 5)
    trained = model.network()
    assert {layer.cell for layer in trained.layers} == {cell}
    _, after, tape = model.forward(x, State.zeros(network, 3))
    bare = replace(trained, readout=None)
    result = simulate(bare, x)
    # The state goes on: a window, and the same in two parts.
    _, half, first = model.forward(x[:2], State.zeros(network, 3))
    _, _, second = model.forward(x[2:], half)
    parts = np.concatenate([part.layers[-1].y[1:] for part in (first, second)])
    for t, each in enumerate(bounded(bare, x)):
        bound = tolerance.engine_and_trainer(each.error)
        assert (np.abs(result.output[t] - tape.layers[-1].y[t + 1]) <= bound).all()
        assert (np.abs(result.output[t] - parts[t]) <= bound).all()
    assert tape.activity == 1 and np.array_equal(after.outputs[-1], tape.layers[-1].y[-1])
    # It can be trained on, from its weights.
    assert all(np.array_equal(Model(trained).parameters[name], value) for name, value in model.parameters.items())


def test_a_gru_state_with_other_cells_than_outputs_is_refused():
    network = random_network(Cell("gru"))
    state = State.zeros(network, 1)
    state.cells[1][0, 2] = 0.5
    with pytest.raises(ValueError, match="state of layer 1: got cell 0.5 and output 0.0 at sample 0, unit 2"):
        Model(network).forward(np.zeros((1, 1, 5), np.float32), state)


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_of_thresholds_does_not_matter(rule):
    model = Model(random_network(Cell("lstm")), thresholds=rule)
    model.apply_masks()
    assert not any(layer.threshold.any() for layer in model.network().layers)


@each_cell
def test_held_units_keep_their_cell(cell):
    network, x = random_network(cell, units=(18,)), numbers(4, 3, 5)
    model, held = Model(network), np.random.default_rng(0).random((4, 3, 18)) < 0.5
    layer = model.forward(x, State.zeros(network, 3), Noise(zoneout=(held,)))[2].layers[0]
    before, after = layer.c[:-1], layer.c[1:]
    assert np.array_equal(before[held], after[held]) and (before[~held] != after[~held]).all()
    if cell.name == "lstm":
        # The output gate acts as ever.
        assert (layer.y[2:][held[1:]] != layer.y[1:-1][held[1:]]).any()
    nobody = model.forward(x, State.zeros(network, 3), Noise(zoneout=(np.zeros_like(held),)))[2].layers[0]
    assert np.array_equal(nobody.y, model.forward(x, State.zeros(network, 3))[2].layers[0].y)


@each_cell
def test_dropped_connections_are_those_of_every_gate(cell):
    network, x = random_network(cell, units=(9,)), numbers(4, 3, 5)
    scale = (np.random.default_rng(0).random((9, 9 * cell.gates)) < 0.7) / np.float32(0.7)
    noise = Noise(recurrent=(scale.astype(np.float32),))
    dropped = Model(network).forward(x, State.zeros(network, 3), noise)[0]
    model = Model(network)
    model.parameters["layers.0.w_rec"] *= noise.recurrent[0]
    assert np.array_equal(dropped, model.forward(x, State.zeros(network, 3))[0])
    with pytest.raises(ValueError, match=rf"noise recurrent\[0\]: got shape \(9, 9\), need \(9, {9 * cell.gates}\)"):
        model.forward(x, State.zeros(network, 3), Noise(recurrent=(np.ones((9, 9), np.float32),)))


# --- operations, masks, runs --------------------------------------------------------------------------------


@each_cell
def test_counts_of_a_window_are_those_of_its_events_and_kept_weights(cell):
    network = prune(random_network(cell, units=(9, 8), readout=3), 0.5, exempt=("readout",))
    model, x = Model(network), numbers(4, 3, 5)
    x[1] = 0
    _, _, tape = model.forward(x, State.zeros(network, 3))
    stored = model.backward(tape, numbers(4, 3, 3), stored=True)
    for name, work in tape.work.items():
        weights = network.matrices()[name]
        sent = x if name == "layers.0.w_in" else tape.layers[0].y[1:] if "w_in" in name else None
        if sent is None:
            sent = tape.layers[int(name[7])].y[:-1]
        assert np.array_equal(work.fired, np.count_nonzero(sent, axis=(0, 1)))
        assert np.array_equal(work.kept, weights.fan_out()) and stored[name].shape == (weights.nnz,)
        first = cell.reset_first or not name.endswith("w_rec")
        wanted = 0 if name == "layers.0.w_in" else (4 if first else 3) * 3
        assert work.input_gradient_rows == wanted and (work.active_pairs == wanted).all()


@each_cell
def test_pruned_weights_stay_zero_while_their_gates_train(cell):
    whole = trainer(cell, pruning=GradualPruning(0.5, start=1, end=4, every=1, gates="each", exempt=("readout",)))
    network = whole.run()
    for name in ("layers.0.w_in", "layers.1.w_rec"):
        weights = network.matrices()[name].to_dense()
        assert [int((part == 0).sum()) for part in np.split(weights, cell.gates, axis=1)] == [
            weights.size // cell.gates // 2
        ] * cell.gates
    diagonal = trainer(cell, pruning=StaticMasks(BlockDiagonal(2), exempt=("readout",))).run()
    w_rec = diagonal.layers[1].w_rec.to_dense().reshape(2, 4, cell.gates, 2, 4)
    assert w_rec[0, :, :, 0].all() and not w_rec[0, :, :, 1].any() and not w_rec[1, :, :, 0].any()


@each_cell
def test_a_run_learns_and_the_engine_reads_a_text_as_the_trainer_does(cell):
    # The next symbol is the last one plus one.
    text = np.arange(400) % SYMBOLS
    task = LanguageModelling(text, text, valid_batch=1)
    # The rule of the thresholds that an event network had before.
    network = word_network(cell, metadata={"thresholds": "clamped", "corpus": "none"})
    made = Trainer(network, task, Settings(steps=60, batch=4, window=10, learning_rate=5e-2))
    trained = made.run()
    assert trained.metadata == {"corpus": "none"} and {layer.cell for layer in trained.layers} == {cell}
    figures, bits = task.evaluate(made.model), evaluate(trained, text)
    # BLAS in training, ascending sums in the engine: within the roundings of a softmax over sums of 9.
    assert abs(figures["bits"] - bits) <= tolerance.gamma(400, tolerance.U32) * 9
    assert 2 * bits < evaluate(network, text)


@each_cell
@pytest.mark.parametrize(
    "optimiser",
    [Optimiser("adamw"), Optimiser("sgd", momentum=0.9), Optimiser("nt-asgd", patience=1)],
    ids=lambda rule: rule.kind,
)
def test_a_resumed_run_and_a_copy_have_the_bits_of_the_whole_run(cell, optimiser, tmp_path):
    changes = {"optimiser": optimiser, "regularisers": NOISE, "validate_every": 2, "clip_layers": 0.5}
    whole = trainer(cell, changes)
    expected = whole.run()
    started = trainer(cell, changes)
    for _ in range(3):
        started.step()
    twin = copy.deepcopy(started)
    for each in (started, twin):
        for _ in range(STEPS - 3):
            each.step()
            if each._validation_due():
                each.validate()
        for name, weights in expected.matrices().items():
            assert np.array_equal(weights.to_dense(), each.network().matrices()[name].to_dense()), name
    folder, left = tmp_path / "run", trainer(cell, changes)

    def stop(progress, seconds):
        if progress.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(left, folder, report=stop, checkpoint_seconds=0)
    resumed = trainer(cell, changes)
    run(resumed, folder, resume=True)
    for name, weights in expected.matrices().items():
        assert np.array_equal(weights.to_dense(), resumed.network().matrices()[name].to_dense()), name
