"""N:M masks along either axis and both: valid, of the largest magnitude, and counted correctly."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eventrnn import NM
from eventrnn.pruning import NofM, legal, mask_diversity, nm_mask, transposable_mask
from eventrnn.pruning.nm import TRANSPOSABLE_METHODS, from_tiles, regular_tiles, to_tiles
from eventrnn.pruning.patterns import parse_nm
from eventrnn.weights import convert
from support.tolerance import GREEDY_FACTOR, U64, gamma

# Group sizes of every kind: two and four, one that is enumerated, powers of two, and sizes that divide no matrix.
GROUPS = ((1, 2), (1, 4), (2, 4), (3, 4), (2, 5), (5, 7), (4, 8), (7, 8), (8, 8), (8, 16), (3, 17))


@st.composite
def matrices(draw, largest=40):
    shape = draw(st.tuples(st.integers(1, largest), st.integers(1, largest)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(("normal", "few values", "half zero", "zero", "tiny")))
    dense = rng.normal(size=shape)
    if kind == "few values":
        dense = rng.integers(-2, 3, shape)
    elif kind == "half zero":
        dense *= rng.random(shape) < 0.5
    elif kind == "tiny":
        dense *= 1e-42
    return (dense * (kind != "zero")).astype(np.float32)


def kept_weight(dense, mask):
    """The magnitude that a mask keeps; exact for the drawn sizes, whose float32 terms are summed in float64."""
    return float(np.abs(dense, dtype=np.float64)[mask].sum())


def by_groups(mask, m, axis):
    lines = mask if axis == "post" else mask.T
    return [line[k : k + m] for line in lines for k in range(0, len(line), m)]


@given(matrices(), st.sampled_from(GROUPS), st.sampled_from(("post", "pre")))
def test_each_group_keeps_its_largest(dense, nm, axis):
    n, m = nm
    before = dense.copy()
    mask = nm_mask(dense, n, m, axis, threads=2)
    assert np.array_equal(dense, before) and legal(mask, n, m, axis)
    for kept, values in zip(by_groups(mask, m, axis), by_groups(np.abs(dense), m, axis), strict=True):
        assert kept.sum() == min(n, len(kept))
        if not kept.all():
            assert values[kept].min() >= values[~kept].max()
    again = nm_mask(dense * mask, n, m, axis)
    assert np.array_equal(dense * again * mask, dense * mask)


# A regression: the padding of a tile took the place of a weight.
@example(np.array([[0.126, -0.132, 0.64], [0.105, -0.536, 0.362]], np.float32), (3, 4), "greedy", 1)
@given(matrices(), st.sampled_from(GROUPS), st.sampled_from(TRANSPOSABLE_METHODS), st.integers(1, 3))
def test_transposable_masks_are_legal_in_rows_and_columns(dense, nm, method, threads):
    n, m = nm
    before = dense.copy()
    mask = transposable_mask(dense, n, m, method=method, threads=threads)
    assert mask.shape == dense.shape and np.array_equal(dense, before)
    for axis in ("post", "pre"):
        assert max(int(group.sum()) for group in by_groups(mask, m, axis)) <= n
    assert legal(mask, n, m, "both") and dense[mask].all()
    # No non-zero weight is pruned where its row and its column may hold one more.
    for kept, weights in zip(to_tiles(mask, m), to_tiles(np.abs(dense), m), strict=True):
        kept, weights = kept.reshape(m, m), weights.reshape(m, m)
        room = np.outer(kept.sum(axis=1) < n, kept.sum(axis=0) < n)
        assert not (room & ~kept & (weights > 0)).any()


@given(matrices(), st.sampled_from(GROUPS), st.sampled_from(TRANSPOSABLE_METHODS))
def test_transposable_masks_of_masked_weights_are_the_same(dense, nm, method):
    n, m = nm
    once = dense * transposable_mask(dense, n, m, method=method)
    assert np.array_equal(once, once * transposable_mask(once, n, m, method=method))


@given(matrices(24), st.sampled_from([(n, m) for n, m in GROUPS if m <= 8]))
def test_threads_and_storage_order_change_nothing(dense, nm):
    for method in TRANSPOSABLE_METHODS:
        one = transposable_mask(dense, *nm, method=method)
        assert np.array_equal(one, transposable_mask(np.asfortranarray(dense), *nm, method=method, threads=5))


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from(("normal", "integers")))
def test_exact_is_the_best_of_all_masks_of_4x4(seed, n, kind):
    rng = np.random.default_rng(seed)
    dense = (rng.normal(size=(4, 4)) if kind == "normal" else rng.integers(0, 4, (4, 4))).astype(np.float32)
    bits = (np.arange(1 << 16)[:, None] >> np.arange(16) & 1).astype(bool).reshape(-1, 4, 4)
    allowed = bits[(bits.sum(axis=1) <= n).all(axis=1) & (bits.sum(axis=2) <= n).all(axis=1)]
    best = (allowed * np.abs(dense, dtype=np.float64)).sum(axis=(1, 2)).max()
    bound = gamma(16, U64) * np.abs(dense).sum()
    assert abs(kept_weight(dense, transposable_mask(dense, n, 4, method="exact")) - best) <= bound
    # The same tile within zeros is solved as a flow, which larger tiles use.
    wide = np.zeros((5, 5), np.float32)
    wide[:4, :4] = dense
    assert abs(kept_weight(wide, transposable_mask(wide, n, 5, method="exact")) - best) <= bound


@pytest.mark.parametrize(("n", "m", "tiles"), [(4, 8, 12), (1, 8, 6), (6, 8, 6), (3, 5, 12), (8, 16, 2)])
def test_exact_agrees_with_an_integer_program(n, m, tiles):
    from scipy.optimize import Bounds, LinearConstraint, milp

    rng = np.random.default_rng(m)
    sums = np.concatenate([np.kron(np.eye(m), np.ones(m)), np.kron(np.ones(m), np.eye(m))])
    for _ in range(tiles):
        # Whole numbers, so that both sums are exact.
        dense = rng.integers(-1000, 1001, (m, m)).astype(np.float32)
        magnitude, limits = np.abs(dense).ravel().astype(np.float64), LinearConstraint(sums, -np.inf, n)
        solved = milp(-magnitude, integrality=np.ones(m * m), bounds=Bounds(0, 1), constraints=limits)
        assert solved.success
        assert kept_weight(dense, transposable_mask(dense, n, m, method="exact")) == round(-solved.fun)


@given(matrices(33), st.sampled_from(GROUPS))
def test_no_method_beats_the_exact_one_and_greedy_keeps_its_factor(dense, nm):
    n, m = nm
    masks = {method: transposable_mask(dense, n, m, method=method) for method in TRANSPOSABLE_METHODS}
    total = kept_weight(dense, np.ones(dense.shape, bool))
    slack = gamma(4 * dense.size, U64) * total
    kept = {method: kept_weight(dense, mask) for method, mask in masks.items()}
    assert max(kept.values()) <= kept["exact"] + slack
    assert total - kept["greedy"] <= GREEDY_FACTOR * (total - kept["exact"]) + slack


def test_a_transposable_mask_tiles_the_matrix_in_two_dimensions():
    # Two neighbouring columns of large weights. A mask that folded each row into a square would keep both of them.
    dense = np.full((8, 8), 0.01, np.float32)
    dense[:, 3:5] = 1
    mask = transposable_mask(dense, 4, 8)
    assert mask[:, 3].sum() == mask[:, 4].sum() == 4
    stored = NofM(4, 8, "both").store("readout", np.where(mask, dense, np.float32(0)))
    assert isinstance(stored, NM) and stored.axis == "post"
    back = stored.transposed()
    assert (back.axis, back.n, back.m) == ("pre", 4, 8) and np.array_equal(back.to_dense(), stored.to_dense().T)
    # The transposed matrix, as the backward pass reads it, is N:M along its own outputs, too.
    assert np.array_equal(convert(back, "nm", nm=(4, 8, "post")).to_dense(), stored.to_dense().T)


@given(matrices(), st.sampled_from([2, 3, 8]))
def test_tiles_round_trip(dense, m):
    stack = to_tiles(dense, m)
    assert np.array_equal(from_tiles(stack, m, dense.shape), dense)
    assert np.array_equal(stack[0].reshape(m, m)[: dense.shape[0], : dense.shape[1]], dense[:m, :m])


def test_number_of_transposable_masks():
    assert mask_diversity(2, 4) == {
        "structured": 6**4,
        "transposable": 90,
        "transposable_formula": 144,
        "unstructured": 12870,
    }
    assert mask_diversity(2, 4, 8)["structured"] == 6**16 == 2_821_109_907_456
    assert mask_diversity(2, 4, 8)["transposable"] == 90**4
    eight = mask_diversity(4, 8)
    assert (eight["transposable"], eight["transposable_formula"]) == (116_963_796_250, 17_557_585_920_000)
    # Without repetition these are Latin rectangles of one row: permutation matrices.
    assert [regular_tiles(1, m) for m in (2, 3, 6)] == [2, 6, 720]
    for n, m in ((1, 3), (2, 3), (2, 4), (3, 4)):
        bits = (np.arange(1 << m * m)[:, None] >> np.arange(m * m) & 1).reshape(-1, m, m)
        counted = ((bits.sum(axis=1) == n).all(axis=1) & (bits.sum(axis=2) == n).all(axis=1)).sum()
        assert regular_tiles(n, m) == counted
    with pytest.raises(ValueError, match="side: got 6, need a multiple of m, 4"):
        mask_diversity(2, 4, 6)


def test_nm_text_is_read_with_its_axis():
    assert parse_nm("2:4") == parse_nm("2:4:post") == (2, 4, "post")
    assert parse_nm("4:8:pre") == (4, 8, "pre")
    assert parse_nm("4:8:both") == (4, 8, "both")


@pytest.mark.parametrize("text", ["", "4", "4:", "4:8:", "4:8::both", "4:8:pre:both", "4:8:both:pre", "-4:8", "4x8"])
def test_other_nm_text_is_refused(text):
    with pytest.raises(ValueError, match=f"nm: got '{text}', need N:M or N:M:AXIS"):
        parse_nm(text)


def test_nm_text_with_an_axis_that_is_not_allowed_is_refused():
    with pytest.raises(ValueError, match="nm axis: got 'both', need one of post, pre"):
        parse_nm("4:8:both", ("post", "pre"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: nm_mask(w, 5, 4), "got 5:4, need n of each m"),
        (lambda w: nm_mask(w, 0, 4), "got 0:4"),
        (lambda w: nm_mask(w, 2, 64), "2 <= m <= 32"),
        (lambda w: nm_mask(w, 2, 4, "both"), "nm axis"),
        (lambda w: transposable_mask(w, 9, 8), "got 9:8"),
        (lambda w: transposable_mask(w, 4, 8, method="best"), "method: got 'best', need one of exact, greedy"),
        (lambda w: transposable_mask(w, 4, 8, threads=0), "threads: got 0"),
        (lambda w: transposable_mask(w[0], 4, 8), r"got float32 \(8,\), need numbers \(n_pre, n_post\)"),
        (lambda w: transposable_mask(np.where(w > 1, np.nan, w), 4, 8), "nan"),
        (lambda w: NofM(2, 4, "up"), "nm axis"),
        (lambda w: NofM(2, 4, method="worst"), "method"),
    ],
)
def test_masks_refuse_invalid_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32) + 2)
