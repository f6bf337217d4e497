"""Training of gated blocks whose choices some steps share: gradients, windows that carry a state, runs, recipes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from eventrnn.cells import Cell
from eventrnn.counting.backward import count_backward
from eventrnn.network import Network
from eventrnn.simulation import simulate
from eventrnn.state import HeldGates, State
from eventrnn.training import (
    GateSettings,
    Gating,
    LanguageModelling,
    Model,
    Regularisers,
    Settings,
    Trainer,
    check_gradients,
    run,
)
from eventrnn.training.bptt.gated_products import GatedProduct
from eventrnn.training.recipes.recipe import load_recipe
from eventrnn.training.tasks import carry_state
from eventrnn.weights import GatedBlocks
from support import tolerance
from support.gated import gate_matrices, specified
from support.planting import plant

BLOCK, PERIOD = (4, 8), 3
CELLS = (Cell(), Cell("gru"), Cell("lstm"))


def network_of(units=(9, 8), cell=None, outputs=3, **options) -> Network:
    cell = Cell() if cell is None else cell
    threshold = 0.05 if cell.thresholded else 0.0
    network = Network.random(
        list(units), inputs=5, readout=outputs, rng=np.random.default_rng(3), threshold=threshold, cell=cell
    )
    return gate_matrices(network, **({"block": BLOCK, "period": PERIOD} | options))


def numbers(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def started(network: Network, steps=(2, 0, 1)) -> State:
    """A state of three samples that choose in different steps, with gates that some of them hold."""
    state = State.zeros(network, 3)
    rng = np.random.default_rng(7)
    gates = {}
    for name, held in state.gates.items():
        drawn = rng.uniform(0.5, 2, held.gates.shape) * (rng.random(held.gates.shape) < 0.5)
        gates[name] = HeldGates(drawn.astype(np.float32), np.array(steps))
    return replace(state, gates=gates)


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "rule", "rank"), [(CELLS[0], "linear", 2), (CELLS[1], "softmax", None)])
def test_gradients_are_those_of_differences_and_of_the_specification(cell, rule, rank):
    network = network_of(cell=cell, rule=rule, rank=rank)
    checked = check_gradients(network, batch=2, window=5, directions=2)
    assert checked.ok, checked
    compared = {row.what for row in checked.rows}
    assert {"layers.1 engine: w_rec.gate", "layers.0 engine: w_in.gate_bias", "readout engine: .gate"} < compared


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_gradients_of_a_window_that_holds_gates_are_the_specified_ones(cell, straight_through, threads):
    network = network_of(cell=cell, rule="softmax", rank=2, density=0.3, outputs=20)
    model, x, state = Model(network, threads=threads), numbers(7, 3, 5), started(network)
    output, after, tape = model.forward(x, state, gating=Gating(straight_through))
    d_output = numbers(*output.shape, seed=2)
    for _ in range(2):
        # A second pass back over a tape starts anew.
        found = model.backward(tape, d_output, d_inputs=True)
    single, exact = (
        specified(network, tape, d_output, straight_through, kind, state) for kind in (np.float32, np.float64)
    )
    assert set(found) == set(exact) | {"readout.bias"} == set(model.parameters) | {"inputs"}
    for name, expected in exact.items():
        if not cell.thresholded and name.endswith("threshold"):
            continue
        bound = tolerance.gradient_bound(single[name], expected)
        assert np.abs(found[name] - expected).max() <= bound < np.abs(expected).max() / 100, name
    for name, product in tape.products.items():
        chose = product.choosing
        assert np.array_equal(chose, np.flatnonzero(product.sources == np.arange(21)))
        # Samples choose in their steps 2, 5; 0, 3, 6; and 1, 4.
        assert chose.tolist() == [1, 5, 6, 10, 14, 15, 19], name
        assert not np.delete(product.d_logits, chose, axis=0).any()
        assert after.gates[name].left.tolist() == [1, 2, 0]
        assert np.array_equal(after.gates[name].gates, product.gates[-3:])


def test_a_gradient_that_forgets_shared_steps_is_found(monkeypatch):
    network = network_of(units=(9,))
    assert check_gradients(network, batch=2, window=5, directions=1).ok
    plant(
        monkeypatch,
        GatedProduct,
        "_sum_over_shares",
        {"np.where(fresh[:, None], self.waiting, F32(0))": "np.where(fresh[:, None], step, F32(0))"},
    )
    checked = check_gradients(network, batch=2, window=5, directions=1)
    assert [row.what for row in checked.rows if not row.ok and "engine" in row.what]


def test_windows_that_carry_the_state_have_the_numbers_of_one_window():
    network = network_of(rule="softmax")
    model, x = Model(network), numbers(10, 3, 5)
    whole, end, _ = model.forward(x, started(network))
    state, parts = started(network), []
    for a, b in ((0, 4), (4, 4), (4, 5), (5, 10)):
        part, state, _ = model.forward(x[a:b], state)
        parts.append(part)
    assert np.array_equal(whole, np.concatenate(parts))
    for ours, theirs in zip(end.arrays(), state.arrays(), strict=True):
        assert np.array_equal(ours, theirs)
    result = simulate(model.network(), x, state=started(network))
    assert np.abs(result.output - whole).max() <= tolerance.SHARPEST_MARGIN
    assert all(np.array_equal(held.left, end.gates[name].left) for name, held in result.state.gates.items())
    carried, cleared = carry_state(end, "events"), carry_state(end, "")
    assert carried.gates is end.gates and not carried.cells[0].any()
    assert not any(array.any() for array in cleared.arrays()) and tuple(cleared.gates) == tuple(end.gates)


def test_the_load_balance_is_that_of_the_steps_that_choose():
    network = network_of()
    model, x = Model(network), numbers(6, 3, 5)
    output, _, tape = model.forward(x, started(network))
    penalty = Regularisers(gate_balance=0.25).penalise(model, tape)
    product, found = tape.products["readout"], penalty.d_logits["readout"].reshape(18, -1)
    chose = product.choosing
    assert len(chose) == 6 and found[chose].any() and not np.delete(found, chose, axis=0).any()
    model.backward(tape, numbers(*output.shape), d_logits=penalty.d_logits)
    wrong = {"readout": np.ones((6, 3, found.shape[1]), np.float32)}
    with pytest.raises(ValueError, match="d_logits of readout: got a gradient in a step that does not choose"):
        model.backward(tape, numbers(*output.shape), d_logits=wrong)
    # A window in which no sample chooses has no penalty.
    _, _, quiet = model.forward(x[:1], started(network, (2, 1, 2)))
    nothing = Regularisers(gate_balance=0.25).penalise(model, quiet)
    assert nothing.loss == 0 and not any(each.any() for each in nothing.d_logits.values())
    assert all(np.isfinite(each).all() for each in model.backward(quiet, numbers(1, 3, 3)).values())


def test_operations_of_the_backward_pass_fall_with_the_choices():
    network = network_of()
    model, x = Model(network), numbers(6, 3, 5)
    output, _, tape = model.forward(x, State.zeros(network, 3))
    model.backward(tape, numbers(*output.shape))
    blocks = network.layers[0].w_in.n_blocks
    counted = count_backward(tape.work)["layers.0.w_in"].backward_selection
    # Of six steps, two choose.
    assert counted == 18 * 3 * 5 * 4 + 6 * (2 * 5 * blocks + 2 * blocks)


def test_gates_of_held_steps_that_are_not_finite_are_refused():
    network = network_of(rule="softmax")
    state = started(network, (2, 2, 2))
    with pytest.raises(FloatingPointError, match=r"layers\.0\.w_in: .* the largest gate times the largest input"):
        Model(network).forward(np.full((1, 3, 5), 3e38, np.float32), state)


# --- runs ---------------------------------------------------------------------------------------------------

SYMBOLS, STEPS = 6, 6
TEXT = np.random.default_rng(2).integers(0, SYMBOLS, 400)


def word_network(**options) -> Network:
    network = Network.random(
        [9], symbols=SYMBOLS, embedding=8, readout=SYMBOLS, rng=np.random.default_rng(3), threshold=0.05
    )
    return gate_matrices(network, **({"block": BLOCK, "period": PERIOD} | options))


def trainer_of(network: Network | None = None) -> Trainer:
    settings = Settings(
        steps=STEPS,
        batch=4,
        window=10,
        validate_every=2,
        regularisers=Regularisers(dropconnect=0.3, zoneout=0.2, gate_balance=0.1),
        gates=GateSettings(True, 1.0, 4),
    )
    return Trainer(network or word_network(rank=2, rule="softmax"), LanguageModelling(TEXT, TEXT), settings)


def test_a_resumed_run_has_the_bits_of_the_whole_run(tmp_path):
    expected = trainer_of().run()
    assert {w.gate_period for w in expected.matrices().values()} == {PERIOD}
    left = trainer_of()

    def stop(progress, seconds):
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(left, tmp_path, report=stop, checkpoint_seconds=0)
    # After three windows of ten steps a choice holds for none, and the windows were carried.
    assert left.engine.state.gates["readout"].left.tolist() == [0, 0, 0, 0]
    resumed = trainer_of()
    run(resumed, tmp_path, resume=True)
    assert resumed.engine.state.gates["readout"].gates.any()
    for name, weights in expected.matrices().items():
        found = resumed.network().matrices()[name]
        assert isinstance(found, GatedBlocks), name
        for ours, theirs in zip(weights.arrays().values(), found.arrays().values(), strict=True):
            assert np.array_equal(ours, theirs), name
    with pytest.raises(ValueError, match="gate_period"):
        run(trainer_of(word_network(rank=2, rule="softmax", period=2)), tmp_path, resume=True)
    arrays, kept = resumed.arrays(), resumed.numbers()
    for wrong in (arrays["state.left.readout"].astype(np.int32), None):
        with pytest.raises(ValueError, match=r"state\.left\.readout does not fit; need int64 \(\)"):
            resumed.restore(arrays | {"state.left.readout": wrong}, kept)


def test_training_on_a_gpu_refuses_a_period_by_name():
    pytest.importorskip("numba_cuda")
    words = r"layers\.0\.w_in: got gate_period=3, but in training with the cuda backend every step chooses"
    with pytest.raises(ValueError, match=words):
        Trainer(word_network(), TEXT, Settings(steps=2, batch=4, window=10, backend="cuda"))


def test_training_lowers_the_loss_of_a_text_with_a_rule():
    text = np.arange(600) % SYMBOLS
    settings = Settings(steps=60, batch=4, window=10, learning_rate=3e-2)
    losses = [progress.loss for progress in Trainer(word_network(rule="softmax"), text, settings)]
    assert losses[-1] < losses[0] / 2


def test_a_recipe_names_the_period():
    gates = {"matrices": ["w_in", "w_rec"], "block": [8, 12], "period": 4}
    model = {"hidden": [24], "embedding": 16} | {f"gates.{name}": value for name, value in gates.items()}
    recipe = load_recipe(settings=[(f"model.{name}", value) for name, value in model.items()])
    made = recipe.trainer()[0].model.gated
    assert {w.gate_period for w in made.values()} == {4} and len(made) == 2
    for changes, words in (({"period": 0}, "gates period: got 0"), ({"matrices": []}, "but no matrices")):
        wrong = [(f"model.gates.{name}", value) for name, value in (gates | changes).items()]
        with pytest.raises(ValueError, match=words):
            load_recipe(settings=wrong).trainer()
