"""Networks pruned at once: format, storage and results; refitting; budgets of operations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrnn import CSR, NM, BlockCSR, Dense, Network, Simulator, count, load, save, simulate
from eventrnn.counting.counts import events_by_matrix
from eventrnn.pruning import (
    CRITERIA,
    BlockDiagonal,
    Blocks,
    NofM,
    adaprune,
    after_training,
    legal,
    mask_diversity,
    masked,
    prune,
    prune_to,
    prune_to_operations,
    refit,
    with_masks,
)
from eventrnn.testing import assert_equivalent
from eventrnn.weights import STORAGES
from support.tolerance import U32, U64, gamma

PATTERNS = (
    Blocks(0.7),
    Blocks(0.6, (2, 4), "l2", "each"),
    NofM(2, 4),
    NofM(1, 4, "pre"),
    NofM(4, 8, "both"),
    NofM(3, 5),
    BlockDiagonal(2),
    BlockDiagonal(5),
)


def network(seed=0, units=(20, 14), readout=9, threshold=0.2):
    rng = np.random.default_rng(seed)
    return Network.random(list(units), inputs=11, readout=readout, rng=rng, threshold=threshold)


def inputs(seed=0, steps=30, batch=3):
    return np.random.default_rng(seed).normal(size=(steps, batch, 11)) * 2


def narrowed(net, storage):
    return net.with_matrices({name: w.stored_as(storage) for name, w in net.matrices().items()})


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_pruned_network_keeps_its_weights_storage_and_answer(pattern, storage):
    net = narrowed(network(), storage)
    pruned = prune_to(net, pattern, exempt=("layers.1.w_in",))
    for name, weights in pruned.matrices().items():
        before = net.matrices()[name]
        if name == "layers.1.w_in":
            assert weights is before
            continue
        assert weights.storage == storage
        dense, old = weights.to_dense(), before.to_dense()
        kept = dense != 0
        # The weights are unchanged to the bit, including int8 codes and their scales.
        assert np.array_equal(dense[kept], old[kept]) and 0 < kept.sum() < kept.size
        if isinstance(pattern, NofM):
            assert isinstance(weights, NM) and legal(kept, pattern.n, pattern.m, pattern.axis)
        elif isinstance(pattern, BlockDiagonal):
            sides = old.shape[0], old.shape[1] // name.gates
            assert isinstance(weights, CSR if any(side % pattern.parts for side in sides) else BlockCSR)
        else:
            assert isinstance(weights, CSR if pattern.block == (1, 1) else BlockCSR)
    x = inputs()
    assert_equivalent(Simulator(pruned, batch=3), Simulator(pruned.dense(), batch=3), x)
    assert_equivalent(Simulator(pruned, batch=3), Simulator(pruned, batch=3, backend="reference"), x[:6])


@given(st.integers(0, 2**32 - 1), st.sampled_from(PATTERNS), st.tuples(st.integers(5, 33), st.integers(8, 40)))
def test_patterns_store_what_they_mask(seed, pattern, shape):
    rng = np.random.default_rng(seed)
    dense = Dense.from_dense(rng.normal(size=shape).astype(np.float32))
    mask = pattern.mask("readout", dense.to_dense())
    stored = pattern.store("readout", masked(dense, mask))
    stored.check(full=True)
    assert np.array_equal(stored.to_dense(), np.where(mask, dense.to_dense(), 0))
    assert stored.nnz == mask.sum()


def test_ties_and_exemptions():
    rng = np.random.default_rng(0)
    tied = Network.random([16], symbols=30, embedding=16, tied=True, rng=rng)
    assert prune_to(tied, NofM(2, 4)).readout is tied.readout
    with pytest.raises(ValueError, match="tied to the embedding"):
        prune(tied, 0.5, names=("readout",))
    net = network()
    left = prune(net, 0.5, exempt=("layers.0", "readout"))
    assert all(left.matrices()[n] is net.matrices()[n] for n in ("layers.0.w_in", "layers.0.w_rec", "readout"))
    assert isinstance(left.layers[1].w_rec, CSR)
    with pytest.raises(ValueError, match="no layers.8.w_in"):
        with_masks(net, {"layers.8.w_in": np.ones((2, 2), bool)}, Blocks(0.5))
    with pytest.raises(ValueError, match="mask: got shape"):
        masked(net.layers[0].w_in, np.ones((2, 2), bool))


def tied_network(symbols=12, width=8):
    rng = np.random.default_rng(3)
    return Network.random([10, width], symbols=symbols, embedding=width, tied=True, rng=rng, threshold=0.01)


@pytest.mark.parametrize("block", [(1, 1), (1, 4)])
def test_one_mask_prunes_embedding_and_tied_read_out(block, tmp_path):
    net = tied_network()
    pruned = prune(net, 0.75, block=block, names=("embedding", "layers.0.w_in"), scope="column")
    readout = pruned.readout
    assert readout.tied and readout.weights.name == ("csr" if block == (1, 1) else "block")
    assert np.array_equal(readout.weights.to_dense(), pruned.embedding.T)
    kept = pruned.embedding != 0
    assert (kept.sum(axis=1) == 2).all() and np.array_equal(pruned.embedding[kept], net.embedding[kept])
    path = tmp_path / "tied.safetensors"
    save(pruned, path)
    assert load(path).readout.tied and load(path).readout.weights.name == readout.weights.name
    symbols = np.random.default_rng(0).integers(0, 12, (40, 2))
    assert_equivalent(Simulator(pruned, batch=2), Simulator(pruned.dense(), batch=2), symbols)
    run = simulate(pruned, symbols, record="events")
    counts, sent = count(pruned, run).matrices, run.events[-1].to_dense() != 0
    assert counts["readout"].effective == int(sent.sum(axis=(0, 1)) @ kept.sum(axis=0))
    # Of an input, the two values that are left.
    w_in = pruned.layers[0].w_in.to_dense() != 0
    assert counts["layers.0.w_in"].effective == int((kept[symbols].sum(axis=(0, 1)) * w_in.sum(axis=1)).sum())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: prune(network(), 0.5, names=("embedding",)), "no read-out is tied"),
        (lambda: prune(tied_network().untied(), 0.5, names=("embedding",)), "name 'readout'"),
        (lambda: prune_to(tied_network(), NofM(2, 4), names=("embedding",)), "no matrix 'embedding'"),
        (lambda: with_masks(network(), {"embedding": np.ones((2, 2), bool)}, Blocks(0.5)), "no read-out is tied"),
        (lambda: with_masks(tied_network(), {"embedding": np.ones((2, 2), bool)}, Blocks(0.5)), "embedding: got shape"),
    ],
)
def test_a_tied_matrix_is_pruned_only_where_there_is_one(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_after_training_formats_and_storages_are_back():
    net = narrowed(prune_to(network(), NofM(2, 4), names=("layers.0.w_in",)), "bfloat16")
    net = prune(net, 0.5, block=(2, 2), names=("readout",))
    trained = net.dense()
    masks = {"layers.1.w_rec": np.random.default_rng(0).random((14, 42)) < 0.3}
    back = after_training(trained, net, masks, Blocks(0.7))
    kinds = {name: (type(w), w.storage) for name, w in back.matrices().items()}
    assert {storage for _, storage in kinds.values()} == {"bfloat16"}
    expected = {"layers.0.w_in": NM, "layers.0.w_rec": Dense, "layers.1.w_rec": CSR, "readout": BlockCSR}
    assert {name: kinds[name][0] for name in expected} == expected
    assert back.layers[1].w_rec.nnz == masks["layers.1.w_rec"].sum()


# --- refitting ----------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_refitting_finds_the_least_squares(seed, bias):
    rng = np.random.default_rng(seed)
    dense, sent = rng.normal(size=(7, 5)).astype(np.float32), rng.normal(size=(40, 7))
    sent[:, 6] = 0  # a unit that never fired
    mask = rng.random((7, 5)) < 0.5
    weights, shift, fit = refit(dense, mask, sent, bias=bias, tolerance=1e-12)
    assert not weights[~mask].any() and fit.refitted <= fit.masked
    assert np.array_equal(weights[6], np.where(mask[6], dense[6], 0))
    target = sent @ dense.astype(np.float64)
    for k in range(5):
        columns = sent[:, mask[:, k]]
        columns = np.concatenate([columns, np.ones((40, 1))], axis=1) if bias else columns
        best = np.linalg.lstsq(columns, target[:, k], rcond=None)[0] if columns.shape[1] else np.zeros(0)
        ours = np.append(weights[mask[:, k], k], shift[k]) if bias else weights[mask[:, k], k]
        size = np.abs(columns).sum(axis=1) @ np.abs(np.ones(40)) * (1 + np.abs(best).max(initial=0))
        # Rounding to float32 moves a sum of squares by less than its own rounding and that of the weights' squares.
        gap = np.sum((columns @ ours - target[:, k]) ** 2) - np.sum((columns @ best - target[:, k]) ** 2)
        assert gap <= (gamma(64, U32) ** 2 + gamma(4000, U64)) * size**2
    assert not shift.any() or bias


def test_adaprune_makes_up_for_most_of_what_masking_loses():
    net, x = network(units=(24,), threshold=0.1), inputs(steps=200, batch=4)
    pattern = NofM(2, 4)
    refitted, fits = adaprune(net, x, pattern)
    plain = prune_to(net, pattern)
    assert set(fits) == set(net.matrices()) and all(fit.refitted < fit.masked for fit in fits.values())
    fresh = inputs(seed=9, steps=200, batch=4)
    target = simulate(net, fresh).output
    errors = [float(np.mean((simulate(each, fresh).output - target) ** 2)) for each in (refitted, plain)]
    assert errors[0] < errors[1]
    for name, weights in refitted.matrices().items():
        assert isinstance(weights, NM)
        assert np.array_equal(weights.to_dense() != 0, plain.matrices()[name].to_dense() != 0)
    narrow, _ = adaprune(narrowed(net, "int8"), x, pattern, exempt=("readout",))
    assert {w.storage for w in narrow.matrices().values()} == {"int8"}
    masks = {"readout": np.random.default_rng(0).random((24, 9)) < 0.5}
    given_masks, fits = adaprune(net, x, masks, store=Blocks(0.5), bias=False)
    assert set(fits) == {"readout"} and given_masks.layers[0].bias_rec is net.layers[0].bias_rec
    assert not given_masks.readout.weights.to_dense()[~masks["readout"]].any()
    for bad, message in (
        ({"pattern": masks}, "store: got none"),
        ({"pattern": {"readout": masks["readout"][:2]}, "store": Blocks(0.5)}, "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            adaprune(net, x, **bad)


# --- operations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("block", [(1, 1), (2, 4)])
def test_a_budget_of_operations_is_met_and_no_weight_changed(criterion, block):
    net, x = network(threshold=0.1), inputs(steps=60)
    found = prune_to_operations(net, x, 0.4, criterion=criterion, block=block, exempt=("readout",))
    counted = {each: count(each, simulate(each, x)).total.effective / (60 * 3) for each in (net, found.network)}
    assert (counted[net], counted[found.network]) == (found.before, found.measured)
    assert 0 < found.measured <= found.budget == 0.4 * found.before
    for name, weights in found.network.matrices().items():
        before = net.matrices()[name]
        kept = weights.to_dense() != 0
        assert kept.any() and np.array_equal(weights.to_dense()[kept], before.to_dense()[kept])
        assert weights is before if name == "readout" else isinstance(weights, CSR if block == (1, 1) else BlockCSR)


def test_scope_matrix_leaves_every_matrix_the_same_share_of_its_operations():
    net, x = network(threshold=0.1), inputs(steps=60)
    run = simulate(net, x, record="events")
    fired = {name: np.bincount(e.indices, minlength=w.shape[0]) for name, (w, e) in events_by_matrix(net, run).items()}
    spread = {}
    for scope in ("matrix", "global"):
        found = prune_to_operations(net, x, 0.4, scope=scope)
        left = {
            name: float(fired[name] @ w.fan_out()) / float(fired[name] @ net.matrices()[name].fan_out())
            for name, w in found.network.matrices().items()
        }
        spread[scope] = max(left.values()) - min(left.values())
        assert found.measured <= found.budget
    # A weight that more or less is kept makes a difference in a small matrix.
    largest = max(float(each.max()) / float(each @ net.matrices()[name].fan_out()) for name, each in fired.items())
    assert spread["matrix"] <= 2 * largest < spread["global"]


def test_activity_weighted_pruning_prefers_busy_units():
    # Without a recurrence and a read-out, a unit costs as much as its input has non-zero values.
    net = network(units=(20,), readout=None)
    x = inputs(steps=400, batch=1) * (np.random.default_rng(5).random((400, 1, 11)) < np.linspace(0.1, 1, 11))
    kept = {}
    for criterion in ("magnitude", "activity"):
        found = prune_to_operations(net, x, 0.7, criterion=criterion, names=("layers.0.w_in",))
        kept[criterion] = found.network.layers[0].w_in.fan_out()
    busy, quiet = slice(8, None), slice(0, 3)
    assert kept["activity"][busy].sum() < kept["magnitude"][busy].sum()
    assert kept["activity"][quiet].sum() > kept["magnitude"][quiet].sum()
    # Weights of busy units cost more operations each, so that fewer of them have to go.
    assert kept["activity"].sum() > kept["magnitude"].sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.0}, "budget: got 0.0"),
        ({"budget": 1.5}, "budget: got 1.5"),
        ({"budget": 0.5, "criterion": "luck"}, "criterion: got 'luck', need one of magnitude"),
        ({"budget": 0.5, "scope": "layer"}, "scope: got 'layer', need one of matrix, global"),
        ({"budget": 1e-4}, r"budget: got 0.0001, but at least 0\.\d+ of the operations remain"),
        ({"budget": 0.3, "names": ("readout",)}, "those of matrices that are not pruned"),
        ({"budget": 0.3, "block": (1, 99)}, "larger than the matrix"),
        ({"budget": 0.3, "exempt": ("layers.5",)}, "no matrix 'layers.5'"),
    ],
)
def test_impossible_budgets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        prune_to_operations(network(), inputs(), **arguments)


def test_the_reachable_budget_is_reachable():
    net, x, next_to_nothing = network(), inputs(steps=60), 2.0**-20
    with pytest.raises(ValueError, match="at least") as refused:
        prune_to_operations(net, x, next_to_nothing)
    least = float(str(refused.value).partition("at least ")[2].split()[0])
    found = prune_to_operations(net, x, 1.01 * least)
    assert found.measured <= 1.01 * least * found.before
    silent = prune_to_operations(net, x, next_to_nothing, allow_empty=True)
    assert silent.measured <= next_to_nothing * silent.before
    with pytest.raises(ValueError, match="no operations"):
        prune_to_operations(network(readout=None), 0 * x[:2], 0.5)


def test_counts_of_masks_fit_the_masks():
    pattern, shape = NofM(4, 8, "both"), (16, 24)
    mask = pattern.mask("readout", np.random.default_rng(0).normal(size=shape).astype(np.float32))
    assert mask.sum() <= mask.size * 4 // 8
    assert mask_diversity(4, 8, 16)["transposable"] == mask_diversity(4, 8)["transposable"] ** 4
