"""Pruning during training: masks on schedule, masked weights, the order of calls from the trainer, checkpoints."""

import inspect
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrnn import CSR, BlockCSR, Network
from eventrnn.pruning import (
    BlockDiagonal,
    Blocks,
    Combined,
    DynamicMasks,
    GradualPruning,
    GroupLasso,
    MovementPruning,
    NofM,
    RegrownMasks,
    StaticMasks,
    ThresholdPruning,
    after_training,
    block_scores,
    iterative_pruning,
    legal,
)
from eventrnn.pruning.methods import METHODS, training_schedule
from eventrnn.pruning.threshold import shrink
from eventrnn.training import LanguageModelling, Settings, Trainer
from support.tolerance import U32, gamma

STEPS = 12
RULES = {
    "gradual": lambda: GradualPruning(0.6, (2, 4), 1, 6, every=2),
    "gradual, each gate": lambda: GradualPruning(0.6, (2, 4), 1, 6, every=2, gates="each"),
    "movement": lambda: MovementPruning(0.6, (1, 2), 2, 7, every=2),
    "threshold": lambda: ThresholdPruning((2, 4), 1, 3, 8, every=2, sparsity=0.6),
    "threshold, dense": lambda: ThresholdPruning((2, 4), 1, 3, 8, every=2, sparsity=0.6, dense=True),
    "static": lambda: StaticMasks(NofM(2, 4, "pre"), 2),
    "static diagonal": lambda: StaticMasks(BlockDiagonal(2), 2),
    "dynamic 4:8 both": lambda: DynamicMasks(NofM(4, 8, "both"), 1, 8, every=3),
    "dynamic blocks": lambda: DynamicMasks(Blocks(0.6, (2, 4)), 0, 8, every=2, decay=0.01),
    "regrown": lambda: RegrownMasks(0.6, (1, 4), 1, 9, every=3, share=0.5),
    "lasso": lambda: GroupLasso(2.5, (2, 4), 1, 8),
    "lasso, every third step": lambda: GroupLasso(2.5, (2, 4), 1, 8, every=3),
    "lasso, threshold": lambda: Combined(
        GroupLasso(0.2, (2, 4), 0, 6), ThresholdPruning((2, 4), 1, 3, 8, every=2, sparsity=0.6)
    ),
}


def network(seed=0, units=(16, 12)):
    return Network.random(list(units), symbols=6, embedding=8, readout=6, rng=np.random.default_rng(seed))


def trainer(pruning, start=None, steps=STEPS):
    text = np.random.default_rng(1).integers(0, 6, 500)
    settings = Settings(steps=steps, batch=3, window=5, learning_rate=1e-2, seed=3)
    return Trainer(start or network(), text, settings, pruning=pruning)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_trains_with_its_masks_and_leaves_exempt_matrices_alone(name):
    rule = RULES[name]()
    for part in getattr(rule, "parts", (rule,)):
        part.exempt = ("layers.1.w_in", "readout")
    run = trainer(rule)
    run.run()
    names = ("layers.0.w_in", "layers.0.w_rec", "layers.1.w_rec")
    assert set(run.model.masks) == set(names)
    for matrix, weights in run.model.parameters.items():
        if matrix in names:
            mask = run.model.masks[matrix]
            assert 0 < mask.sum() < mask.size and not weights[~mask].any()
        elif weights.ndim == 2:
            assert weights.all()


@pytest.mark.parametrize("name", RULES)
def test_the_share_and_the_pattern_are_the_requested_ones(name):
    rule = RULES[name]()
    settings = repr(rule)
    run = trainer(rule)
    run.run()
    assert repr(rule) == settings == repr(RULES[name]())  # the text by which a checkpoint identifies a rule
    for mask in run.model.masks.values():
        if name == "static":
            assert legal(mask, 2, 4, "pre")
        elif name == "static diagonal":
            assert 2 * mask.sum() == mask.size
        elif name == "dynamic 4:8 both":
            assert legal(mask, 4, 8, "both")
        elif name not in ("lasso", "lasso, every third step"):
            # Blocks at an edge are smaller, so that a share of blocks is only nearly that share of weights.
            r, c = rule.parts[1].block if isinstance(rule, Combined) else getattr(rule, "block", (2, 4))
            grids = np.split(mask, 3, axis=1) if "gate" in name and mask.shape[1] % 3 == 0 else [mask]
            for grid in grids if mask.shape[1] != 6 else ():
                kept = block_scores(grid.astype(np.float32), (r, c)) > 0
                assert (~kept).sum() == round(0.6 * kept.size)


def tied_network(symbols=6, width=12):
    rng = np.random.default_rng(2)
    return Network.random([16, width], symbols=symbols, embedding=width, tied=True, rng=rng)


@pytest.mark.parametrize("rule", [GradualPruning, MovementPruning])
@pytest.mark.parametrize("block", [(1, 1), (1, 3)])
def test_a_tied_matrix_trains_with_one_mask_and_each_symbol_keeps_as_much(rule, block):
    def run():
        named = ("embedding", "layers.0.w_rec")
        return trainer(rule(0.75, block, 1, 6, every=2, names=named, scope="column"), tied_network())

    whole = run()
    whole.run()
    masks = whole.model.masks
    assert set(masks) == {"embedding", "layers.0.w_rec"} and masks["embedding"].shape == (6, 12)
    assert (masks["embedding"].sum(axis=1) == 3).all() and not whole.model.parameters["embedding"][
        ~masks["embedding"]
    ].any()
    assert (masks["embedding"].reshape(6 // block[1], block[1], 12).std(axis=1) == 0).all()
    trained = whole.network()
    assert not trained.embedding[~masks["embedding"]].any() and trained.readout.tied
    # Into the formats of the masks, and from there on with the same masks.
    stored = after_training(trained, tied_network(), masks, Blocks(0.75, block))
    assert np.array_equal(stored.embedding, trained.embedding)
    assert isinstance(stored.readout.weights, CSR if block == (1, 1) else BlockCSR)
    further = trainer(None, stored)
    assert all(np.array_equal(further.model.masks[name], mask) for name, mask in masks.items())
    assert not further.run().embedding[~masks["embedding"]].any()
    again = after_training(further.network(), stored, {}, Blocks(0.5))
    assert again.readout.tied and type(again.readout.weights) is type(stored.readout.weights)
    # A run that continues from arrays.
    first, second = run(), run()
    for _ in range(4):
        first.step()
    second.restore({name: array.copy() for name, array in first.arrays().items()}, first.numbers())
    second.run()
    assert all(np.array_equal(second.arrays()[name], array) for name, array in whole.arrays().items())


def test_a_tied_matrix_is_refused_where_it_cannot_be_pruned():
    with pytest.raises(ValueError, match="RegrownMasks does not prune the matrix of a tied"):
        trainer(RegrownMasks(0.6, (1, 4), 1, 9, every=3, names=("embedding",)), tied_network())
    with pytest.raises(ValueError, match="no read-out is tied to the embedding; name 'readout'"):
        trainer(GradualPruning(0.6, names=("embedding",)))
    assert "embedding" not in GradualPruning(0.6).matrices(trainer(None, tied_network()).model.parameters)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_continues_from_its_arrays(name):
    whole = trainer(RULES[name]())
    whole.run()
    first, second = RULES[name](), RULES[name]()
    run = trainer(first)
    for _ in range(5):
        run.step()
    second.restore({key: array.copy() for key, array in first.arrays().items()})
    sent = pickle.loads(pickle.dumps(run))
    # The trainer as after a checkpoint: all of it continues but the rule, which is restored.
    run.pruning = second
    run.run()
    sent.run()
    for matrix, weights in whole.model.parameters.items():
        assert np.array_equal(weights, run.model.parameters[matrix]), matrix
        assert np.array_equal(weights, sent.model.parameters[matrix]), f"pickled: {matrix}"


def test_straight_through_moves_dense_weights_as_if_none_were_masked():
    rule = DynamicMasks(NofM(1, 4), 0, 4, every=2)
    dense = {"a.w_in": np.arange(16, dtype=np.float32).reshape(2, 8) - 8}
    shown, masks = {name: array.copy() for name, array in dense.items()}, {}
    rng = np.random.default_rng(0)
    for step in range(5):
        changed = rule.update(step, shown, masks)
        mask = rule._shadow.masks["a.w_in"]
        assert legal(mask, 1, 4, "post") and not shown["a.w_in"][~mask].any()
        assert np.array_equal(shown["a.w_in"][mask], dense["a.w_in"][mask])
        assert changed == (step == 4) and (not masks) == (step < 4)
        if step in (0, 2, 4):
            assert np.array_equal(mask, NofM(1, 4).mask("a.w_in", dense["a.w_in"]))
        # Whole numbers, so that sums are exact in any order.
        move = rng.integers(-9, 10, (2, 8)).astype(np.float32)
        shown["a.w_in"] += move
        dense["a.w_in"] += move
    assert np.array_equal(masks["a.w_in"], mask)


def test_pruned_weights_stay_pruned():
    for name in RULES:
        early = StaticMasks(Blocks(0.5, (1, 1)))
        run = trainer(early)
        run.run()
        before = {matrix: mask.copy() for matrix, mask in run.model.masks.items()}
        pruned = run.model.network()
        pruned = pruned.with_matrices({n: CSR.from_dense(w.to_dense()) for n, w in pruned.matrices().items()})
        again = trainer(RULES[name](), pruned)
        again.run()
        for matrix, mask in again.model.masks.items():
            assert not (mask & ~before[matrix]).any(), (name, matrix)


def validated(pruning, **changes):
    """A training run that validates every few updates."""
    text = np.random.default_rng(1).integers(0, 6, 700)
    settings = Settings(**{"steps": 16, "batch": 3, "window": 5, "validate_every": 2, "seed": 3} | changes)
    return Trainer(network(), LanguageModelling(text[:600], text[600:], valid_batch=2), settings, pruning=pruning)


def test_validation_sees_masked_weights_and_no_best_is_older_than_the_final_masks(monkeypatch):
    for rule in (DynamicMasks(Blocks(0.6, (1, 1)), 0, 8, every=4), GradualPruning(0.6, (1, 1), 0, 8, every=2)):
        run, seen = validated(rule), []
        evaluate = run.task.evaluate

        def watched(model, run=run, seen=seen, evaluate=evaluate):
            share = np.mean([np.mean(w == 0) for name, w in model.parameters.items() if name.endswith("w_rec")])
            figures = evaluate(model)
            seen.append((run.steps_done, share, figures["bits"]))
            return figures

        monkeypatch.setattr(type(run.task), "evaluate", lambda task, model, watched=watched: watched(model))
        run.run()
        monkeypatch.undo()
        assert all(share > 0.3 for step, share, _ in seen if step > 2)
        final = [bits for step, _, bits in seen if step > rule.end]
        assert run.best_value == min(final) and all((w == 0).mean() > 0.5 for n, w in run.best.items() if "w_rec" in n)


def test_a_run_does_not_stop_early_nor_start_where_masks_would_not_be_final():
    impatient = validated(GradualPruning(0.6, (1, 1), 0, 12), patience=1, learning_rate=1e-9)
    impatient.run()
    assert impatient.steps_done > 12
    with pytest.raises(ValueError, match="ends at step 500, but training has 80 steps"):
        validated(GradualPruning(0.6, (1, 1), 0, 500), epochs=2)


def test_regrown_masks_keep_their_number_and_grow_where_the_gradient_is_largest():
    rule = RegrownMasks(0.5, (1, 1), 0, 10, every=2, share=0.5)
    rng = np.random.default_rng(0)
    parameters, masks = {"x.w_in": rng.normal(size=(6, 8)).astype(np.float32)}, {}
    assert rule.update(0, parameters, masks) and masks["x.w_in"].sum() == 24
    parameters["x.w_in"] *= masks["x.w_in"]
    rule.after_step(0, parameters, masks, {}, 0.1)
    assert not rule.update(1, parameters, masks)
    rule.after_step(1, parameters, masks, {}, 0.1)
    before = masks["x.w_in"]
    assert not rule.update(2, parameters, masks) and not masks  # every weight must have its gradient
    gradient = rng.normal(size=(6, 8)).astype(np.float32)
    weights = parameters["x.w_in"].copy()
    parameters["x.w_in"] -= gradient
    rule.after_step(2, parameters, masks, {"x.w_in": gradient}, 0.1)
    after, count = masks["x.w_in"], int(0.5 * (1 + np.cos(np.pi * 0.2)) / 2 * 24)
    assert after.sum() == 24 and (after & ~before).sum() == (before & ~after).sum() == count > 0
    grown = after & ~before
    assert np.abs(gradient)[grown].min() >= np.abs(gradient)[~before & ~grown].max()
    assert not parameters["x.w_in"][grown].any() and not parameters["x.w_in"][~after].any()
    moved = np.abs(weights - gradient)
    assert moved[before & ~after].max() <= moved[before & after].min()


@given(st.integers(0, 99), st.sampled_from([(1, 1), (2, 3), (4, 4)]), st.floats(0.01, 5))
def test_the_proximal_step_minimises_its_objective(seed, block, amount):
    rng = np.random.default_rng(seed)
    before = rng.normal(size=(7, 8)).astype(np.float32)
    after = before.copy()
    shrink(after, block, amount)
    norms, left = (block_scores(array, block, "l2") for array in (before, after))
    assert np.all(np.abs(left - np.maximum(norms - amount, 0)) <= gamma(80, U32) * (norms + amount))
    assert not left[norms <= amount].any()
    # Within a block only the length changes.
    big = norms.max() > amount
    if block == (1, 1) and big:
        assert np.array_equal(np.sign(after)[after != 0], np.sign(before)[after != 0])


def test_group_lasso_takes_its_step_after_the_optimiser_and_prunes_what_reached_zero():
    rule = GroupLasso(2.0, (1, 2), 0, 3, scaled=False)
    parameters = {"x.w_in": np.array([[3, 4, 0.1, 0.1, 1, 0]], np.float32)}
    masks = {}
    for step in range(4):
        assert rule.update(step, parameters, masks) == (step == 3)
        rule.after_step(step, parameters, masks, {}, 0.25)
    # Half a unit of length in each of three steps: 5 -> 3.5, 1 -> 0.
    assert np.array_equal(masks["x.w_in"], [[True, True, False, False, False, False]])
    expected = np.array([3, 4]) * 3.5 / 5
    assert np.all(np.abs(parameters["x.w_in"][0, :2] - expected) <= gamma(12, U32) * expected)
    strong = GroupLasso(100.0, (1, 2), 0, 3)
    strong.update(0, parameters, {})
    with pytest.raises(ValueError, match=r"strength 100.0 made all of x.w_in zero at step 0"):
        strong.after_step(0, parameters, {}, {}, 1.0)


def test_a_proximal_step_of_several_updates_takes_the_sum_of_their_rates():
    def left(every, rates):
        rule, parameters = GroupLasso(2.0, (1, 2), 0, len(rates), every=every), {"x.w_in": np.ones((1, 4), np.float32)}
        lengths = []
        for step, rate in enumerate(rates):
            rule.update(step, parameters, {})
            rule.after_step(step, parameters, {}, {}, rate)
            lengths.append(float(np.linalg.norm(parameters["x.w_in"][0, :2])))
        return lengths

    single, joint = (left(every, [0.0625, 0.125, 0.03125, 0.0625, 0.0625]) for every in (1, 3))
    # The last of them is at the end, whatever is left by then.
    for step, before in ((0, np.sqrt(2)), (1, np.sqrt(2)), (2, single[2]), (3, single[2]), (4, single[4])):
        assert abs(joint[step] - before) <= gamma(40, U32) * np.sqrt(2)


def test_thresholds_rise_with_two_slopes_and_the_size_of_the_block():
    weights = {"x.w_in": np.linspace(-1, 1, 400, dtype=np.float32).reshape(20, 20)}
    q = float(np.percentile(np.abs(weights["x.w_in"]), 90))
    rule = ThresholdPruning((1, 1), 10, 30, 70, every=10, growth=0.25)
    slope = 2 * q * 10 / (2 * 20 + 3 * 40)
    at = {step: rule.thresholds(step, weights)["x.w_in"] for step in (10, 20, 30, 70)}
    expected = {10: slope / 10, 20: 11 * slope / 10, 30: (21 + 1.5) * slope / 10, 70: (21 + 1.5 * 41) * slope / 10}
    assert all(abs(at[step] - value) <= gamma(16, U32) * value for step, value in expected.items())
    wide = ThresholdPruning((2, 8), 10, 30, 70, every=10, growth=0.25)
    assert abs(wide.thresholds(70, weights)["x.w_in"] - 2 * at[70]) <= gamma(16, U32) * 2 * at[70]
    # Solved for a share: the last threshold prunes just that of the trained matrix.
    aimed = ThresholdPruning((1, 1), 10, 30, 70, every=10, sparsity=0.7)
    below = np.abs(weights["x.w_in"]) < aimed.thresholds(70, weights)["x.w_in"]
    assert abs(int(below.sum()) - 280) <= 2  # magnitudes come in pairs
    values = [aimed.thresholds(step, weights)["x.w_in"] for step in range(10, 71)]
    assert values == sorted(values)


def test_threshold_masks_only_shrink_and_never_pass_the_share():
    rng = np.random.default_rng(0)
    parameters, masks, kept = {"x.w_rec": rng.normal(size=(16, 48)).astype(np.float32)}, {}, []
    rule = ThresholdPruning((2, 4), 0, 4, 12, every=2, sparsity=0.75)
    for step in range(14):
        rule.update(step, parameters, masks)
        kept.append(masks["x.w_rec"].copy())
        parameters["x.w_rec"] *= masks["x.w_rec"] * np.float32(0.9)  # shrinking weights must not run ahead
    assert all((later <= earlier).all() for earlier, later in zip(kept, kept[1:], strict=False))
    shares = [1 - mask.mean() for mask in kept]
    assert max(shares) == shares[-1] == 0.75 and 0 < shares[4] < 0.75


def test_gates_share_a_mask_or_have_their_own_share():
    net = network(units=(12,))
    from eventrnn.pruning import magnitude_masks

    dense = {name: w.to_dense() for name, w in net.matrices().items()}
    dense["layers.0.w_rec"][:, :12] *= 100
    masks = {gates: magnitude_masks(dense, 0.5, block=(2, 4), gates=gates) for gates in ("all", "each", "shared")}
    parts = {gates: np.split(each["layers.0.w_rec"], 3, axis=1) for gates, each in masks.items()}
    assert parts["all"][0].all() and not parts["all"][1].all()
    assert [part.mean() for part in parts["each"]] == [0.5] * 3
    assert np.array_equal(parts["shared"][0], parts["shared"][2]) and parts["shared"][0].mean() == 0.5
    assert np.array_equal(masks["each"]["readout"], masks["all"]["readout"])


@pytest.mark.parametrize("rewind", [True, False])
def test_iterative_pruning_rewinds_to_early_weights(rewind):
    early, seen = network(units=(12,)), []

    def train(net):
        seen.append(net)
        scaled = {n: w.to_dense() * np.float32(2) for n, w in net.matrices().items()}
        return net.with_matrices({n: CSR.from_dense(w) for n, w in scaled.items()})

    found = list(iterative_pruning(early, train, 0.75, rounds=2, block=(1, 2), rewind=rewind, exempt=("readout",)))
    assert [each.sparsity for each in found] == [0.0, 0.5, 0.75] and len(seen) == 3
    start = early.layers[0].w_rec.to_dense()
    for each, net in zip(found[1:], seen[1:], strict=True):
        weights, kept = net.layers[0].w_rec, net.layers[0].w_rec.kept()
        assert isinstance(weights, BlockCSR) and 1 - kept.mean() == each.sparsity
        grown = np.float32(1) if rewind else np.float32(2) ** each.number
        assert np.array_equal(weights.to_dense(), np.where(kept, start * grown, 0))
    assert found[0].network.layers[0].w_rec.kept().all()


def test_missing_callback_is_reported():
    for rule in (MovementPruning(0.5, end=4), RegrownMasks(0.5, end=4, every=2), GroupLasso(0.1, end=4)):
        parameters, masks = {"x.w_in": np.ones((4, 4), np.float32)}, {}
        rule.update(0, parameters, masks)
        with pytest.raises(RuntimeError, match="must call after_step"):
            rule.update(1, parameters, masks)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DynamicMasks(NofM(2, 4), 5, 4), "start 5 and end 4"),
        (lambda: RegrownMasks(0.5, start=3, end=2), "start 3 and end 2"),
        (lambda: GroupLasso(0.1, start=-1), "start: got -1"),
        (lambda: GroupLasso(0.0), "strength: got 0.0"),
        (lambda: ThresholdPruning(start=0, ramp=9, end=5), "start <= ramp <= end"),
        (lambda: ThresholdPruning(start=5, ramp=5, end=5), "start < end"),
        (lambda: ThresholdPruning(end=9, percentile=0.0), "percentile"),
        (lambda: DynamicMasks(NofM(2, 4), every=0), "every: got 0"),
        (lambda: DynamicMasks(NofM(2, 4), 2, 9, every=8), "every: got 8, need less than 8"),
        (lambda: RegrownMasks(0.5, start=2, end=9, every=7), "every: got 7, need less than 7"),
        (lambda: RegrownMasks(0.5, end=40), "every: got 40"),
        (lambda: DynamicMasks(NofM(2, 4), decay=1.0), "decay"),
        (lambda: RegrownMasks(1.0), "sparsity"),
        (lambda: RegrownMasks(0.5, share=0.0), "share"),
        (Combined, "got no pruning method"),
        (lambda: trainer(ThresholdPruning((2, 4), 0, 2, 8, percentile=100.0, growth=2.0)), "would empty layers.0.w_in"),
        (lambda: trainer(GradualPruning(0.5, end=4, names=("embedding.x",))), "no matrix 'embedding.x'"),
        (lambda: trainer(StaticMasks(NofM(2, 4), exempt=("layers.7",))), "no matrix 'layers.7'"),
        (lambda: trainer(StaticMasks(NofM(2, 4), exempt=("layers.0", "layers.1", "readout"))), "nothing is left"),
        (lambda: trainer(StaticMasks(Blocks(0.5, (64, 64)))), "larger than the matrix"),
        (lambda: trainer(DynamicMasks(NofM(2, 4), 0, STEPS, every=3)), "training has 12 steps"),
        (lambda: list(iterative_pruning(network(), lambda n: n, 0.5, rounds=0)), "rounds: got 0"),
        (lambda: list(iterative_pruning(network(), lambda n: n, 0.99, block=(6, 6))), "leaves nothing"),
        (lambda: Blocks(0.5, statistic="most"), "statistic"),
        (lambda: Blocks(0.5, gates="none"), "gates"),
    ],
)
def test_pruning_rules_refuse_invalid_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", METHODS)
def test_the_options_of_a_method_are_parameters_of_its_implementation(name):
    method = METHODS[name]
    of_patterns = {*inspect.signature(Blocks).parameters, "mask"}
    for option in method.options:
        taken = [option in inspect.signature(each).parameters for each in method.implementations]
        assert any(taken) or option in of_patterns


@pytest.mark.parametrize("name", METHODS)
def test_a_training_schedule_ends_in_the_first_half_of_the_training(name):
    options = {"exempt": ("layers.0",), "every": 2}
    schedule = training_schedule(name, Blocks(0.5, (1, 2)), 20, options)
    if METHODS[name].schedule is None:
        assert schedule is None
        return
    assert schedule.end == 10
    assert all(part.exempt == ("layers.0",) for part in getattr(schedule, "parts", (schedule,)))
    with pytest.raises(ValueError, match="steps: got 1, but masks change between the shares 0 and 0.5"):
        training_schedule(name, Blocks(0.5, (1, 2)), 1, options)


@pytest.mark.parametrize(("since", "until", "fewest"), [(0.2, 0.3, 10), (0.28, 0.29, 101), (0.0, 0.5, 2)])
def test_a_training_that_is_too_short_for_masks_is_told_how_long_it_must_be(since, until, fewest):
    """Whatever the shares are in floating point."""
    options = {"since": since, "until": until}
    with pytest.raises(ValueError, match=rf"shares {since:g} and {until} of the training; give at least {fewest}$"):
        training_schedule("magnitude", Blocks(0.5, (1, 2)), 1, options)
    schedule = training_schedule("magnitude", Blocks(0.5, (1, 2)), fewest, options)
    assert schedule.start < schedule.end < fewest


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.schedule])
def test_masks_change_between_the_shares_of_the_training_that_are_given(name):
    schedule = training_schedule(name, Blocks(0.5, (1, 2)), 100, {"since": 0.3, "until": 0.8, "every": 2})
    assert (schedule.start >= 30, schedule.end) == (True, 80)
    with pytest.raises(ValueError, match=r"steps: got 2, but .* shares 0.3 and 0.4 of the training; give at least 10"):
        training_schedule(name, Blocks(0.5, (1, 2)), 2, {"since": 0.3, "until": 0.4})
    with pytest.raises(ValueError, match="since: got 0.5, need less than until, which is 0.5"):
        training_schedule(name, Blocks(0.5, (1, 2)), 100, {"since": 0.5})


def test_a_long_gradual_schedule_has_a_hundred_changes_and_a_short_one_ten():
    for steps, every in ((20, 1), (400, 10), (2000, 10), (3998, 20), (20_000, 100)):
        schedule = training_schedule("magnitude", Blocks(0.5), steps, {})
        assert schedule.every == every
    lasso, threshold = training_schedule("lasso", Blocks(0.5), 20_000, {}).parts
    assert (lasso.every, threshold.every) == (50, 100)
    masks = training_schedule("magnitude", NofM(2, 4), 100, {"since": 0.25})
    assert masks.start == masks.end == 25
