"""The backward pass over events: against the specification, over formats, modes, threads and noise; its counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventrnn import Cell, Network, State, Surrogate, reference, simulate
from eventrnn.cells import SURROGATES
from eventrnn.counting.backward import count_backward
from eventrnn.training import Model, Noise, thresholds
from eventrnn.training.bptt.kernels import event_lists, spmm, time_loops
from eventrnn.training.bptt.kernels.records import ALL, SEGMENTS, SINGLE
from support.magnitudes import backward_magnitudes
from support.pruned_weights import FORMATS, pruned
from support.tolerance import U32, central_difference, gamma, sharp


@st.composite
def cases(draw, formats=FORMATS):
    """A layer in some format, a window, its noise and upstream gradients of the output, the events and the cells."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # From 43 units on, a row of weights has more than one chunk.
    n, inputs = draw(st.integers(1, 45) | st.sampled_from([86, 100])), draw(st.integers(1, 20))
    steps, batch = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 5, 12]))
    kind = draw(st.sampled_from([*sorted(SURROGATES), "triangle", "boxcar"]))
    cell = Cell(
        variant=draw(st.sampled_from(["evnn", "paper"])),
        surrogate=Surrogate(kind, draw(st.sampled_from([0.5, 1.0])), draw(st.sampled_from([0.5, 2.0, 8.0]))),
    )
    network = Network.random([n], inputs=inputs, rng=rng, threshold=draw(st.sampled_from([0.05, 0.3])), cell=cell)
    form, options = draw(st.sampled_from(formats))
    layer = network.layers[0]
    network = replace(
        network,
        layers=(
            replace(
                layer,
                w_in=pruned(layer.w_in.to_dense(), form, options, rng),
                w_rec=pruned(layer.w_rec.to_dense(), form, options, rng),
                bias_in=rng.normal(0, 0.5, 3 * n).astype(np.float32),
                bias_rec=rng.normal(0, 0.5, 3 * n).astype(np.float32),
            ),
        ),
    )
    x = (rng.normal(size=(steps, batch, inputs)) * (rng.random((steps, batch, inputs)) < 0.4)).astype(np.float32)
    y = (rng.random((batch, n)) * (rng.random((batch, n)) < 0.5)).astype(np.float32)
    state = State((rng.normal(0, 0.3, (batch, n)).astype(np.float32),), (y,))

    def mask(*shape):
        return (rng.random(shape) < 0.5).astype(np.float32) * np.float32(2)

    noise = Noise(
        inputs=mask(draw(st.sampled_from([1, batch])), inputs) if draw(st.booleans()) else None,
        top=mask(draw(st.sampled_from([1, batch])), n) if draw(st.booleans()) else None,
        recurrent=(mask(n, 3 * n),) if draw(st.booleans()) else (),
        zoneout=(rng.random((steps, batch, n)) < 0.3,) if draw(st.booleans()) else (),
    )
    upstream = rng.normal(size=(3, steps, batch, n)).astype(np.float32)
    return network, x, state, noise, upstream


def specification(model: Model, tape, noise: Noise, upstream: np.ndarray):
    """Gradients of `reference.backward` in float64 on the same tape, and the sums of the magnitudes of their terms."""
    layer, cell, p = tape.layers[0], model.cells[0], {}
    for name in ("w_in", "w_rec", "bias_in", "bias_rec", "threshold"):
        p[name] = model.parameters[f"layers.0.{name}"].astype(np.float64)
    dropped = np.ones_like(p["w_rec"]) if not noise.recurrent else noise.recurrent[0]
    p["w_rec"] = p["w_rec"] * dropped
    tapes, rule = [], cell.surrogate
    for t in range(len(layer.v)):
        wide = [getattr(layer, name)[t].astype(np.float64) for name in ("u", "r", "g", "q", "v")]
        if cell.variant == "paper":
            wide[3] = np.zeros_like(wide[3])
        event = (layer.v[t] > layer.threshold).astype(np.float64)
        distance = layer.v[t] - layer.threshold
        slope = reference.cells.surrogate_slope(
            rule.code, distance, np.float32(rule.dampening), np.float32(rule.support)
        ).astype(np.float64)
        before, after = layer.c[t].astype(np.float64), layer.c[t + 1].astype(np.float64)
        y_before, y = layer.y[t].astype(np.float64), layer.y[t + 1].astype(np.float64)
        tapes.append(reference.Tape(*wide[:4], before, y_before, wide[4], event, slope, y, after))
    top = 1 if noise.top is None else noise.top
    d_y, d_cell = (upstream[0] * top + upstream[1]).astype(np.float64), upstream[2].astype(np.float64)
    arguments = (cell, p, layer.x.astype(np.float64), tapes, d_y, np.zeros(d_y.shape), d_cell)
    expected, sizes = reference.backward(*arguments), backward_magnitudes(*arguments)
    for each in (expected, sizes):
        each["w_rec"] = each["w_rec"] * dropped
        each["inputs"] = each.pop("x") * (1 if noise.inputs is None else noise.inputs)
    return expected, sizes


def agree(model: Model, gradients: dict, tape, noise: Noise, upstream: np.ndarray) -> None:
    """Demand that every gradient is within its bound of the specification's, and that pruned weights have none."""
    expected, sizes = specification(model, tape, noise, upstream)
    steps, batch, n = tape.layers[0].v.shape
    # In each step, a path through all steps meets a product of 3N terms, sixteen lanes, and 80 scalar roundings. The
    # values u, r, g and v are those of the tape. The sums over rows come last.
    roundings = steps * (3 * n + 112) + steps * batch + len(model.parameters["layers.0.w_in"])
    for name in ("w_in", "w_rec", "bias_in", "bias_rec", "threshold", "inputs"):
        gradient = gradients[name if name == "inputs" else f"layers.0.{name}"]
        mask = model.masks.get(f"layers.0.{name}", np.ones(1))
        error = np.abs(gradient - expected[name] * mask)
        assert (error <= gamma(roundings, U32) * sizes[name].max()).all(), name


@settings(max_examples=60)
@given(cases(), st.sampled_from(["auto", "dense", "sparse"]), st.sampled_from([1, 2]))
def test_backward_equals_specification_within_bounds(case, mode, threads):
    network, x, state, noise, upstream = case
    model = Model(network, backward=mode, threads=threads)
    _, _, tape = model.forward(x, state, noise)
    further = {"d_events": (upstream[1],), "d_cells": (upstream[2],)}
    gradients = model.backward(tape, upstream[0], **further, d_inputs=True)
    agree(model, gradients, tape, noise, upstream)
    mask = np.random.default_rng(x.size).random(x.shape) < 0.3
    some = model.backward(tape, upstream[0], **further, d_inputs=mask)["inputs"]
    assert not some[~mask].any()
    # The requested gradients decide which products "auto" selects.
    if mode != "auto":
        assert np.array_equal(some, np.where(mask, gradients["inputs"], 0))


@settings(max_examples=40)
@given(cases())
def test_sparse_forward_equals_engine_on_one_and_two_threads(case):
    network, x, state, noise, upstream = case
    one, two = (Model(network, backward="sparse", threads=threads) for threads in (1, 2))
    tapes = [model.forward(x, state, noise)[2] for model in (one, two)]
    every, stored = (
        model.backward(tape, upstream[0], d_inputs=True, stored=which)
        for model, tape, which in ((one, tapes[0], False), (two, tapes[1], True))
    )
    for name, gradient in every.items():
        mask = one.masks.get(name)
        assert np.array_equal(gradient if mask is None else gradient[mask], stored[name]), name
        if mask is not None:
            assert not gradient[~mask].any()
    if not (noise.recurrent or noise.zoneout):
        run = simulate(network, tapes[0].layers[0].x, state=state, record=("events", "states"))
        assert np.array_equal(tapes[0].layers[0].y[1:], run.events[0].to_dense())
        assert np.array_equal(tapes[0].layers[0].c[1:], run.states[0])


def test_backward_masks_gradients_for_the_layer_below():
    """In a stack, the input gradient of an upper layer is computed only where the lower layer can use it."""
    rng = np.random.default_rng(7)
    cell = Cell(surrogate=Surrogate("triangle", 0.7, 6.0))
    network = Network.random([40, 33, 20], symbols=9, embedding=12, readout=9, rng=rng, threshold=0.1, cell=cell)
    symbols = rng.integers(0, 9, (12, 5))
    noise = Noise(words=(rng.random(9) < 0.7).astype(np.float32) * np.float32(2))
    sparse, dense = (Model(network, backward=mode) for mode in ("sparse", "dense"))
    output, _, tape = sparse.forward(symbols, State.zeros(network, 5), noise)
    dense.forward(symbols, State.zeros(network, 5), noise)
    d_output = rng.normal(size=output.shape).astype(np.float32)
    ours = sparse.backward(tape, d_output)
    work = tape.work
    theirs = dense.backward(tape, d_output)
    assert 0 < tape.support < 1
    for k in (1, 2):
        assert 0 < work[f"layers.{k}.w_in"].dots.sum() < 60 * len(work[f"layers.{k}.w_in"].dots)
    for name, gradient in theirs.items():
        # Two float32 evaluations of one sum; 12 steps of products of up to 3 * 40 terms, three layers of them.
        assert np.abs(ours[name] - gradient).max() <= gamma(3 * 12 * 400, U32) * np.abs(gradient).max(), name
    unread = noise.words == 0
    assert not ours["embedding"][unread].any() and ours["embedding"][~unread].any()


@settings(max_examples=25)
@given(cases(), st.sampled_from(["sparse", "dense"]))
def test_count_backward_equals_brute_force(case, mode):
    network, x, state, noise, upstream = case
    model = Model(network, backward=mode)
    _, _, tape = model.forward(x, state, noise)
    model.backward(tape, upstream[0], d_inputs=True)
    layer, cell, counts = tape.layers[0], model.cells[0], count_backward(tape.work)
    steps, batch, n = layer.v.shape
    rule, paper = cell.surrogate, cell.variant == "paper"
    slope = reference.cells.surrogate_slope(
        rule.code, layer.v - layer.threshold, np.float32(rule.dampening), np.float32(rule.support)
    )
    has_path = (layer.v > layer.threshold) | (slope != 0)
    assert tape.support == np.count_nonzero(has_path) / has_path.size
    for name in ("w_in", "w_rec"):
        weights = model.parameters[f"layers.0.{name}"]
        kept = model.masks.get(f"layers.0.{name}", np.ones(weights.shape, bool))
        pattern = model._engines[0].patterns[name]
        effective = made = dense = 0
        for t in range(steps):
            for b in range(batch):
                sent = layer.x[t, b] if name == "w_in" else layer.y[t, b]
                # The products of step t give the gradients of the inputs of step t and of the events of step t - 1.
                wanted = np.ones(len(weights), bool)
                if name == "w_rec":
                    wanted = has_path[t - 1, b] if t else layer.y[0, b] != 0 if paper else np.zeros(n, bool)
                dense += weights.size * (1 + (name == "w_in" or t > 0 or paper))
                for j in range(len(weights)):
                    effective += int(kept[j].sum()) * (int(sent[j] != 0) + int(wanted[j]))
                    stored = int((pattern.units == j).sum()) * pattern.width
                    row = weights.shape[1] if pattern.layout in (ALL, SINGLE) else stored
                    dot = weights.shape[1] if pattern.layout == ALL else stored
                    made += row * int(sent[j] != 0) + dot * int(wanted[j])
        assert counts[f"layers.0.{name}"].backward_effective == effective
        assert counts[f"layers.0.{name}"].backward_dense == dense
        assert counts[f"layers.0.{name}"].backward_executed == (made if mode == "sparse" else dense)


@pytest.mark.parametrize("variant", ["evnn", "paper"])
def test_gradient_of_selected_inputs_of_a_long_window(variant):
    """The window has more rows than one chunk of the kernel."""
    steps, batch, inputs, units = 2 * time_loops.WINDOW_ROWS // 12 + 1, 12, 37, 30
    rng = np.random.default_rng(5)
    network = Network.random([units], inputs=inputs, rng=rng, threshold=0.1, cell=Cell(variant=variant))
    x = (rng.normal(size=(steps, batch, inputs)) * (rng.random((steps, batch, inputs)) < 0.2)).astype(np.float32)
    upstream = np.zeros((3, steps, batch, units), np.float32)
    upstream[0] = rng.normal(size=upstream[0].shape)
    mask, found = rng.random(x.shape) < 0.15, []
    # Threads do not synchronise within the window, so that one can be far ahead of another.
    for threads in (1, 2, 2, 2):
        model = Model(network, backward="sparse", threads=threads)
        _, _, tape = model.forward(x, State.zeros(network, batch))
        every = model.backward(tape, upstream[0], d_inputs=True)
        agree(model, every, tape, Noise(), upstream)
        some = model.backward(tape, upstream[0], d_inputs=mask)["inputs"]
        assert np.array_equal(some, np.where(mask, every["inputs"], 0))
        assert tape.layers[0].work["w_in"].dots.sum() == mask.sum()
        found.append(some)
    assert all(np.array_equal(found[0], each) for each in found[1:])
    dense = Model(network, backward="dense")
    _, _, tape = dense.forward(x, State.zeros(network, batch))
    assert not dense.backward(tape, upstream[0], d_inputs=mask)["inputs"][~mask].any()


@pytest.mark.parametrize("variant", ["evnn", "paper"])
@pytest.mark.parametrize("form", [0, 5])
def test_backward_batch_larger_than_a_tile(variant, form):
    """Tiles of a step, of a strip of drives and of a window, of which none is full."""
    steps, batch, inputs, units = 9, 2 * event_lists.TILE_ROWS + 7, event_lists.TILE_ROWS + 9, 90
    assert steps * batch > spmm.STRIP_ROWS > units
    rng = np.random.default_rng(6)
    network = Network.random([units], inputs=inputs, rng=rng, threshold=0.1, cell=Cell(variant=variant))
    layer = network.layers[0]
    w_in, w_rec = (pruned(w.to_dense(), *FORMATS[form], rng) for w in (layer.w_in, layer.w_rec))
    network = replace(network, layers=(replace(layer, w_in=w_in, w_rec=w_rec),))
    x = (rng.normal(size=(steps, batch, inputs)) * (rng.random((steps, batch, inputs)) < 0.1)).astype(np.float32)
    upstream, found = rng.normal(size=(3, steps, batch, units)).astype(np.float32), []
    for threads in (1, 2):
        model = Model(network, backward="sparse", threads=threads)
        _, _, tape = model.forward(x, State.zeros(network, batch))
        run = simulate(network, x, record=("events", "states"))
        assert np.array_equal(tape.layers[0].y[1:], run.events[0].to_dense())
        assert np.array_equal(tape.layers[0].c[1:], run.states[0])
        further = {"d_events": (upstream[1],), "d_cells": (upstream[2],)}
        found.append(model.backward(tape, upstream[0], **further, d_inputs=True))
        agree(model, found[-1], tape, Noise(), upstream)
    assert all(np.array_equal(gradient, found[1][name]) for name, gradient in found[0].items())


@pytest.mark.parametrize("units", [1, 16, 17])
@pytest.mark.parametrize("variant", ["evnn", "paper"])
def test_backward_more_threads_than_unit_groups(variant, units):
    """A thread without units does not change the lists of other threads, even if a step has several tiles."""
    rng = np.random.default_rng(units)
    for steps, batch, inputs in ((3, 81, 1), (4, 161, 43)):
        network = Network.random([units], inputs=inputs, rng=rng, threshold=0.05, cell=Cell(variant=variant))
        x = (rng.normal(size=(steps, batch, inputs)) * (rng.random((steps, batch, inputs)) < 0.4)).astype(np.float32)
        mask, upstream = rng.random(x.shape) < 0.3, np.zeros((3, steps, batch, units), np.float32)
        upstream[0] = rng.normal(size=upstream[0].shape)
        found = []
        for threads in (1, 2, 3):
            model = Model(network, backward="sparse", threads=threads)
            for _ in range(3):
                _, _, tape = model.forward(x, State.zeros(network, batch))
                found.append(model.backward(tape, upstream[0], d_inputs=mask))
        agree_inputs = model.backward(tape, upstream[0], d_inputs=True)
        agree(model, agree_inputs, tape, Noise(), upstream)
        for each in found[1:]:
            assert all(np.array_equal(gradient, each[name]) for name, gradient in found[0].items())


@pytest.mark.parametrize("variant", ["evnn", "paper"])
@pytest.mark.parametrize("mode", ["sparse", "dense", "auto"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_backward_empty_window_gives_zero_gradients(variant, mode, shape):
    network = Network.random([40], inputs=5, rng=np.random.default_rng(0), cell=Cell(variant=variant))
    for threads in (1, 2):
        model = Model(network, backward=mode, threads=threads)
        _, _, tape = model.forward(np.zeros((*shape, 5), np.float32), State.zeros(network, shape[1]))
        gradients = model.backward(tape, np.zeros((*shape, 40), np.float32), d_inputs=True)
        assert gradients["inputs"].shape == (*shape, 5)
        assert not any(gradient.any() for gradient in gradients.values())


def test_a_gradient_that_does_not_fit_the_output_is_refused():
    network = Network.random([4], inputs=5, rng=np.random.default_rng(0))
    model = Model(network)
    _, _, tape = model.forward(np.ones((3, 2, 5), np.float32), State.zeros(network, 2))
    with pytest.raises(ValueError, match=r"d_output: got \(2, 2, 4\), need the output's shape \(3, 2, 4\)"):
        model.backward(tape, np.ones((2, 2, 4), np.float32))


@pytest.mark.parametrize("got", [np.ones((3, 2, 4), bool), np.ones((3, 2, 5)), 1, None, [True], "x"])
def test_a_mask_of_inputs_that_does_not_fit_is_refused(got):
    network = Network.random([4], inputs=5, rng=np.random.default_rng(0))
    model = Model(network)
    _, _, tape = model.forward(np.ones((3, 2, 5), np.float32), State.zeros(network, 2))
    with pytest.raises(ValueError, match=r"d_inputs: got .*, need True, False or"):
        model.backward(tape, np.ones((3, 2, 4), np.float32), d_inputs=got)
    every = model.backward(tape, np.ones((3, 2, 4), np.float32), d_inputs=np.True_)
    assert every["inputs"].shape == (3, 2, 5)
    assert "inputs" not in model.backward(tape, np.ones((3, 2, 4), np.float32), d_inputs=np.False_)


def test_pattern_selects_the_widest_block_segments():
    rng = np.random.default_rng(0)
    for (form, options), expected in zip(
        FORMATS, (ALL, SINGLE, SEGMENTS, SEGMENTS, SINGLE, SEGMENTS, SINGLE), strict=True
    ):
        dense = rng.normal(size=(40, 3 * 40)).astype(np.float32)
        network = Network.random([40], inputs=40, rng=rng)
        weights = pruned(dense, form, options, rng)
        network = replace(network, layers=(replace(network.layers[0], w_in=weights, w_rec=weights),))
        model = Model(network, backward="sparse")
        model.forward(np.zeros((1, 1, 40), np.float32), State.zeros(network, 1))
        pattern = model._engines[0].patterns["w_rec"]
        assert pattern.layout == expected
        if expected == SEGMENTS:
            assert pattern.width == options["block"][1]
            # No segment spans both the gates and the candidate, whose events differ in the paper's variant.
            assert not ((pattern.columns < 80) & (pattern.columns + pattern.valid > 80)).any()


def test_model_follows_changed_masks():
    rng = np.random.default_rng(1)
    network = Network.random([40], inputs=40, rng=rng, threshold=0.05)
    model, x = Model(network, backward="sparse"), rng.random((4, 3, 40), np.float32)
    for density in (0.5, 0.2):
        for name in ("layers.0.w_in", "layers.0.w_rec"):
            model.masks[name] = rng.random((40, 120)) < density
        model.apply_masks()
        _, _, tape = model.forward(x, State.zeros(network, 3))
        run = simulate(model.network(), x, record="events")
        assert np.array_equal(tape.layers[0].y[1:], run.events[0].to_dense())
        kept = model.backward(tape, np.ones((4, 3, 40), np.float32), stored=True)
        assert all(kept[name].shape == (mask.sum(),) for name, mask in model.masks.items())


@pytest.mark.parametrize("rule", ["positive", "clamped", "sigmoid", "fixed"])
def test_thresholds_follow_their_rule(rule):
    rng = np.random.default_rng(2)
    network = Network.random([12], inputs=5, rng=rng, threshold=0.25)
    model = Model(network, thresholds=rule)
    theta = network.layers[0].threshold.astype(np.float64)
    # Through the logit and back: its rounding moves theta by at most a quarter of its size, then 2.5 ulp of sigmoid.
    assert np.abs(model.network().layers[0].threshold - theta).max() <= 8 * U32
    _, _, tape = model.forward(rng.random((5, 2, 5), np.float32), State.zeros(network, 2))
    upstream = np.ones((5, 2, 12), np.float32)
    gradient = model.backward(tape, upstream)["layers.0.threshold"]
    bare = Model(network).backward(Model(network).forward(tape.layers[0].x, State.zeros(network, 2))[2], upstream)
    if rule == "sigmoid":
        for i in range(12):
            logit = np.float64(model.parameters["layers.0.threshold"][i])
            slope = central_difference(lambda h, at=logit: 1 / (1 + np.exp(-(at + h))), 1.0, 8)
            assert sharp(slope, 1.0)
            wanted = bare["layers.0.threshold"][i] * slope.value
            size = np.abs(bare["layers.0.threshold"]).max()
            assert abs(gradient[i] - wanted) <= size * (slope.bound + gamma(8, U32))
    elif rule == "fixed":
        assert not gradient.any()
    else:
        assert np.array_equal(gradient, bare["layers.0.threshold"])
    model.parameters["layers.0.threshold"] += np.float32(5)
    model.apply_masks()
    after = model.network().layers[0].threshold
    highest = {"clamped": 1.0, "sigmoid": 1.0}.get(rule, 6.0)
    assert (after >= 0).all() and (after <= highest).all() and (after > theta).all()


def test_thresholds_start_at_the_given_values():
    drawn = thresholds.initial(0.3, 20_000, rng=np.random.default_rng(0))
    # Beta(9/7, 3) has mean 0.3 and a deviation below a half: five deviations of the mean of 20,000.
    assert abs(drawn.mean() - 0.3) <= 5 * 0.5 / np.sqrt(20_000) and 0 < drawn.min() and drawn.max() < 1
    assert np.array_equal(thresholds.initial(0.5, 3), np.full(3, 0.5, np.float32))
    assert np.array_equal(thresholds.initial([0.1, 0.2], 2), np.array([0.1, 0.2], np.float32))
    for start, units, rng, message in (
        ([0.1], 2, None, "each of 2 units"),
        (-1.0, 2, None, ">= 0"),
        (1.5, 2, np.random.default_rng(0), "between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            thresholds.initial(start, units, rng=rng)


def _scaled_twice(self, k, gradients, dropped, stored):
    gradients[f"layers.{k}.w_rec"] *= dropped > 0


def test_dropout_mask_without_rescaling_is_detected(monkeypatch):
    rng = np.random.default_rng(5)
    network = Network.random([20], inputs=6, rng=rng, threshold=0.05)
    noise = Noise(recurrent=((rng.random((20, 60)) < 0.5).astype(np.float32) * np.float32(2),))
    upstream = rng.normal(size=(3, 5, 4, 20)).astype(np.float32)
    x, model = rng.random((5, 4, 6), np.float32), Model(network)

    def check():
        _, _, tape = model.forward(x, State.zeros(network, 4), noise)
        gradients = model.backward(tape, upstream[0], d_events=(upstream[1],), d_cells=(upstream[2],), d_inputs=True)
        agree(model, gradients, tape, noise, upstream)

    check()
    monkeypatch.setattr(Model, "_drop_back", _scaled_twice)
    with pytest.raises(AssertionError, match="w_rec"):
        check()


def test_backward_refuses_invalid_arguments():
    rng = np.random.default_rng(0)
    network = Network.random([6, 4], inputs=3, rng=rng, threshold=0.1)
    for changes, message in (
        ({"backward": "fast"}, "backward"),
        ({"threads": 0}, "threads"),
        ({"thresholds": "free"}, "thresholds"),
    ):
        with pytest.raises(ValueError, match=message):
            Model(network, **changes)
    with pytest.raises(ValueError, match="sigmoid needs"):
        Model(Network.random([6], inputs=3, rng=rng, threshold=0.0), thresholds="sigmoid")
    model, x, state = Model(network), np.zeros((2, 5, 3), np.float32), State.zeros(network, 5)
    for noise, message in (
        (Noise(inputs=np.ones((2, 3), np.float32)), "inputs"),
        (Noise(between=(None, None)), "between"),
        (Noise(top=np.ones((1, 5), np.float32)), "top"),
        (Noise(recurrent=(np.ones((6, 6), np.float32), None)), "recurrent"),
        (Noise(zoneout=(np.ones((2, 5, 6), np.float32), None)), "zoneout"),
        (Noise(words=np.ones(3, np.float32)), "words"),
    ):
        with pytest.raises(ValueError, match=message):
            model.forward(x, state, noise)
