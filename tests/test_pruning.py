"""Pruning at once: exact counts, whole blocks, smallest first, masks that only shrink, kept weights unchanged."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrnn import CSR, BlockCSR, Network
from eventrnn.pruning import block_scores, cubic_schedule, magnitude_mask, prune
from eventrnn.pruning.magnitude import STATISTICS, magnitude_masks
from support.tolerance import U64, gamma


@st.composite
def cases(draw):
    shape = draw(st.tuples(st.integers(1, 30), st.integers(1, 40)))
    block = (draw(st.integers(1, shape[0])), draw(st.integers(1, shape[1])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dense = rng.normal(size=shape).astype(np.float32) * (rng.random(shape) < draw(st.sampled_from([0.3, 1.0])))
    blocks = -(-shape[0] // block[0]) * -(-shape[1] // block[1])
    sparsity = draw(st.integers(0, blocks - 1)) / blocks
    return dense.astype(np.float32), block, sparsity, draw(st.sampled_from(STATISTICS))


def _kept_blocks(mask, block):
    rows, columns = (-(-size // b) for size, b in zip(mask.shape, block, strict=True))
    tiles = [
        [mask[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]] for c in range(columns)]
        for r in range(rows)
    ]
    assert all(tile.all() or not tile.any() for row in tiles for tile in row), "a block is cut"
    return np.array([[tile.all() for tile in row] for row in tiles])


@given(cases())
def test_prune_removes_exactly_the_smallest_blocks(case):
    dense, block, sparsity, statistic = case
    mask = magnitude_mask(dense, sparsity, block=block, statistic=statistic)
    kept = _kept_blocks(mask, block)
    assert (~kept).sum() == round(sparsity * kept.size)
    scores = block_scores(dense, block, statistic)
    if kept.any() and not kept.all():
        assert scores[~kept].max() <= scores[kept].min()


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=60), st.data())
def test_equal_scores_are_pruned_in_order_of_position(values, data):
    count = data.draw(st.integers(0, len(values) - 1))
    mask = magnitude_mask(np.array([values], np.float32), count / len(values))
    order = np.argsort(np.abs(values), kind="stable")
    assert np.array_equal(np.flatnonzero(~mask[0]), np.sort(order[: round(count / len(values) * len(values))]))


@given(cases())
def test_masks_only_shrink_and_pruning_again_changes_nothing(case):
    dense, block, sparsity, statistic = case
    mask = magnitude_mask(dense, sparsity, block=block, statistic=statistic)
    again = magnitude_mask(dense * mask, sparsity, block=block, statistic=statistic, within=mask)
    assert np.array_equal(mask, again)
    blocks = _kept_blocks(mask, block).size
    more = min(sparsity + 1 / blocks, (blocks - 1) / blocks)
    assert (magnitude_mask(dense, more, block=block, statistic=statistic, within=mask) <= mask).all()


@given(cases())
def test_scores_equal_their_definitions(case):
    dense, block, _, _ = case
    rules = {"max": np.max, "mean": np.mean, "l2": lambda tile: np.sqrt(np.sum(tile**2))}
    for statistic, rule in rules.items():
        scores = block_scores(dense, block, statistic)
        for (r, c), score in np.ndenumerate(scores):
            # A block at an edge is scored by the weights that it has.
            tile = np.abs(dense.astype(np.float64))[
                r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]
            ]
            assert abs(score - rule(tile)) <= gamma(2 * tile.size + 4, U64) * tile.sum()


@pytest.mark.parametrize("statistic", ["max", "mean"])
def test_blocks_at_an_edge_are_ranked_by_the_weights_they_have(statistic):
    rng = np.random.default_rng(0)
    dense, importance = rng.normal(size=(32, 100)), -1 - rng.random((32, 100))
    importance[:, 96:] -= 5
    masks = magnitude_masks({"a": dense}, 0.5, block=(1, 16), statistic=statistic, importance={"a": importance})
    assert not masks["a"][:, 96:].any() and masks["a"][:, :96].any()


def test_global_scope_ranks_all_matrices_in_their_own_scale():
    rng = np.random.default_rng(0)
    matrices = {"a": rng.normal(size=(20, 20)), "b": 100 * rng.normal(size=(20, 20))}
    matrices["b"][:10] /= 1000
    masks = magnitude_masks(matrices, 0.5, scope="global")
    assert sum(int(mask.sum()) for mask in masks.values()) == 400
    assert masks["a"].mean() > 0.4 and not masks["b"][:10].all()
    with pytest.raises(ValueError, match="scope"):
        magnitude_masks(matrices, 0.5, scope="layer")


@pytest.mark.parametrize("block", [(1, 1), (1, 4), (3, 5)])
def test_scope_column_leaves_every_column_as_much(block):
    rng = np.random.default_rng(0)
    # Magnitudes of columns that differ by far, values of equal magnitude, and a column of zeros.
    dense = rng.integers(-3, 4, (24, 30)) * np.float32(10) ** rng.integers(-3, 3, 30)
    dense[:, 7] = 0
    mask = magnitude_masks({"readout": dense}, 0.75, block=block, scope="column", statistic="l2")["readout"]
    blocks = mask[:: block[0], :: block[1]]
    kept = len(blocks) - round(0.75 * len(blocks))
    assert (blocks.sum(axis=0) == kept).all()
    for column, wanted in enumerate(blocks.T):
        part = dense[:, column * block[1] : (column + 1) * block[1]]
        alone = magnitude_mask(part, 0.75, block=(block[0], part.shape[1]), statistic="l2")
        assert np.array_equal(wanted, alone[:: block[0], 0])
    further = magnitude_masks({"readout": dense}, 0.9, scope="column", within={"readout": mask})["readout"]
    assert (further <= mask).all() and further.any(axis=0).all()
    # The tied matrix is ranked as the read-out that it is.
    tied = magnitude_masks({"embedding": dense.T}, 0.75, block=block, scope="column", statistic="l2")["embedding"]
    assert np.array_equal(tied, mask.T)


def test_schedule():
    at = cubic_schedule(0.8, 10, 50, initial=0.2)
    assert [at(0), at(10), at(50), at(99)] == [0.2, 0.2, 0.8, 0.8]
    values = [at(k) for k in range(60)]
    assert values == sorted(values)
    assert at(30) == 0.2 * 0.5**3 + 0.8 * (1 - 0.5**3)
    for start, end in ((5, 5), (6, 5), (-1, 5)):
        with pytest.raises(ValueError, match="start"):
            cubic_schedule(0.5, start, end)


def test_prune_changes_only_the_named_matrices():
    network = Network.random([20, 12], symbols=30, embedding=16, readout=30, rng=np.random.default_rng(0))
    pruned = prune(network, 0.75, block=(2, 8), names=("layers.0.w_rec", "layers.1.w_in"))
    for name, weights in pruned.matrices().items():
        before = network.matrices()[name]
        if name in ("layers.0.w_rec", "layers.1.w_in"):
            assert isinstance(weights, BlockCSR) and weights.block == (2, 8)
            dense, kept = weights.to_dense(), weights.to_dense() != 0
            assert np.array_equal(dense[kept], before.to_dense()[kept]) and kept.mean() < 0.3
        else:
            assert weights is before
    assert isinstance(prune(network, 0.5).layers[0].w_in, CSR)
    tied = Network.random([16], symbols=30, embedding=16, tied=True, rng=np.random.default_rng(0))
    assert prune(tied, 0.5).readout is tied.readout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"sparsity": 0.5, "block": (1, 1000)}, "larger than the matrix"),
        ({"sparsity": 0.5, "block": (0, 4)}, "block"),
        ({"sparsity": 0.9, "block": (8, 24)}, "leaves nothing"),
        ({"sparsity": 0.5, "names": ("layers.9.w_in",)}, "layers.9.w_in"),
        ({"sparsity": 0.5, "statistic": "median"}, "statistic"),
    ],
)
def test_pruning_refuses_invalid_arguments(arguments, message):
    network = Network.random([8], inputs=8, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match=message):
        prune(network, **arguments)
