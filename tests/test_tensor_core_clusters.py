"""Layers on tensor cores in clusters of blocks: tiles, plans, and the kernel as plain Python, within derived bounds."""

from __future__ import annotations

import numpy as np
import pytest

from eventrnn.backend import BackendUnavailable
from eventrnn.bench.networks import at_activity, random_events, random_network
from eventrnn.cuda import tensor_core_loop, tensor_core_tiles
from eventrnn.cuda.kernels.tensor_core_pieces import TILE
from eventrnn.cuda.plan import Chip
from eventrnn.cuda.tensor_core_loop import TileLoop, chunks
from eventrnn.cuda.tensor_core_tiles import (
    Share,
    TilePlan,
    Tiles,
    plan_tiles,
    shares,
    spare_multiprocessors,
    team_table,
)
from support import emulated_gpu
from support.tensor_cores import check_bound, check_goes_on, through_tensor_cores


def install(monkeypatch, blocks: int, own_pairs: int = 1):
    """An emulated GPU on which two clusters of `blocks` blocks are resident, and none of another size.

    own_pairs : pairs of samples per thread in the cell update
    """
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    device = emulated_gpu.install(monkeypatch)
    monkeypatch.setattr(tensor_core_loop, "DRIVE_THREADS", 64)
    monkeypatch.setattr(tensor_core_tiles, "TILE_WARPS", {1: 2, 2: 1})
    # Registers of a thread for two steps of weights; with two pairs of samples per thread, for two steps of two tiles.
    monkeypatch.setattr(tensor_core_tiles, "OWN_REGISTERS", {own_pairs: {1: 239, 2: 230}[own_pairs]})
    monkeypatch.setattr(type(device), "clusters", lambda self, size: 2 if size == blocks else 0)
    return device


def sparse(units: int, batch: int, steps: int, seed: int = 0, **how):
    """A layer and its inputs, (steps, batch, units)."""
    rng = np.random.default_rng(seed)
    how = {"sparsity": 0.8, "format": "block", "block": (1, 32)} | how
    network = random_network(units, 1, variant="evnn", rng=rng, **how)
    inputs = random_events(steps, batch, units, 0.2, rng)
    return at_activity(network, inputs, 0.2), inputs


def words_of(rng, n_pre: int, units: int, share: float) -> np.ndarray:
    """A sparse matrix as float16 words."""
    dense = np.where(rng.random((n_pre, 3 * units)) < share, rng.standard_normal((n_pre, 3 * units)), 0)
    return dense.astype(np.float16).view(np.uint16)


@pytest.mark.parametrize(
    ("n_pre", "units", "share", "even"), [(40, 21, 0.2, False), (17, 32, 0.0, True), (64, 5, 1, True)]
)
def test_fragments_hold_every_weight_once(n_pre, units, share, even):
    words = words_of(np.random.default_rng(n_pre), n_pre, units, share)
    tiles = Tiles.of(words, even=even)
    found = np.zeros((n_pre + 1, TILE * tiles.count), np.uint16)
    lane, word, half = np.ogrid[:32, :4, :2]
    column, row = lane // 4 + 8 * (word % 2), 2 * (lane % 4) + 8 * (word // 2) + half
    for tile in range(tiles.count):
        begin, end = tiles.begins[tile : tile + 2]
        assert not (even and (end - begin) % 2)
        for step in range(begin, end):
            units_of = tiles.rows[step]
            assert len(set(units_of[units_of < n_pre])) == (units_of < n_pre).sum()
            found[units_of[row], TILE * tile + column] += tiles.fragments[step].view(np.uint16).reshape(32, 4, 2)
    assert not found[n_pre].any() and np.array_equal(found[:n_pre, : 3 * units], words)


def test_rows_that_are_loaded_together_lie_in_different_banks():
    # 30 units of each bank: 15 steps without a conflict.
    tiles = Tiles.of(np.ones((240, 3), np.uint16))
    assert all(len(set(eight % 8)) == 8 for eight in tiles.rows.reshape(-1, 8))


@pytest.mark.parametrize("batch", [4, 64, 300])
def test_plans_keep_the_limits_of_the_chip(batch):
    chip = Chip(132, 232_448, {1: 132, 2: 66, 8: 15, 9: 9, 16: 7})
    tiles = Tiles.of(words_of(np.random.default_rng(0), 333, 333, 0.1))
    plan = plan_tiles(tiles, 20, batch, chip)
    assert plan.shared <= chip.shared_bytes and plan.threads <= 1024 and plan.held % 2 == 0
    assert 2 * plan.pairs * plan.clusters(batch) >= batch
    each = shares(tiles.units, plan.blocks)
    assert sum(share.count for share in each) == tiles.units and min(share.count for share in each) > 0
    assert plan.threads >= plan.pairs * max(share.count for share in each)
    for share in each:
        for gate, owned in enumerate(share.tiles):
            first = gate * tiles.units + share.first
            assert owned.start * TILE <= first and first + share.count <= owned.stop * TILE


@pytest.mark.parametrize(("senders", "pairs"), [(1, 4), (2, 1), (4, 2)])
def test_teams_have_all_outputs_of_a_block_once(senders, pairs):
    sizes = {"blocks": 3, "pairs": pairs, "own_pairs": 1, "held": 0, "held_tiles": 0, "shared": 0}
    plan = TilePlan(**sizes, threads=512, senders=senders)
    teams, rows = team_table(Share(48, 70, ()), plan), []
    for warp in range(0, 16, senders):
        first, size, threads, number = teams[warp]
        assert threads == 32 * -(-size // 4 // 32) and number == 1 + warp // senders
        # Warps without cells do not wait for the team.
        assert teams[warp : warp + senders, 2].tolist() == [threads * (k < threads // 32) for k in range(senders)]
        rows += range(first, first + size, 4 * pairs)
    assert rows[:70] == [4 * pairs * unit for unit in range(48, 118)] and 4 * pairs * len(rows) - 280 * pairs < 16


def test_input_products_of_many_weights_leave_them_multiprocessors():
    chip, tiles = Chip(132, 232_448, {8: 15, 16: 7}), Tiles.of(words_of(np.random.default_rng(0), 512, 512, 0.05))
    few, many = (plan_tiles(tiles, steps, 32, chip) for steps in (100, 10_000))
    assert spare_multiprocessors(many, 32, 132) > spare_multiprocessors(few, 32, 132) > 0
    assert spare_multiprocessors(many, 128, 132) == 0


def test_no_plan_where_weights_do_not_fit_or_streams_are_too_many():
    chip, tiles = Chip(132, 4_000, {1: 132, 2: 66}), Tiles.of(words_of(np.random.default_rng(0), 128, 128, 1.0))
    assert plan_tiles(tiles, 20, 4, chip) is None
    assert plan_tiles(tiles, 20, 4, Chip(132, 232_448, {})) is None
    assert plan_tiles(tiles, 20, 4, Chip(132, 232_448, {1: 132, 2: 66})) is not None
    assert plan_tiles(tiles, 20, 100_000, Chip(132, 232_448, {1: 132, 2: 66})) is None


# Two blocks; one block, whose tiles are held in part; three blocks, two clusters, a tile of two gates, teams of two.
@pytest.mark.parametrize(
    ("precision", "units", "batch", "blocks", "own_pairs", "senders", "how"),
    [
        ("bfloat16", 21, 1, 2, 1, 1, {"block": (1, 8)}),
        ("bfloat16", 24, 3, 1, 2, 1, {"format": "csr", "block": None, "sparsity": 0.0}),
        ("float16", 40, 9, 3, 2, 1, {"block": (4, 4)}),
        ("float16", 40, 9, 2, 1, 2, {"block": (4, 4)}),
    ],
)
def test_emulated_clusters_are_within_the_bound(monkeypatch, precision, units, batch, blocks, own_pairs, senders, how):
    device = install(monkeypatch, blocks, own_pairs)
    monkeypatch.setattr(tensor_core_tiles, "SENDERS", senders)
    network, inputs = sparse(units, batch, 4, **how)
    check_bound(precision, network, inputs.to_dense(), clusters=True)
    assert device.launched.count("tensor_cluster") == device.launched.count("drives of tiles") == 1


def test_input_products_side_by_side_with_the_steps_change_nothing(monkeypatch):
    device, results = install(monkeypatch, 2), []
    network, inputs = sparse(21, 3, 4, block=(1, 8))
    for multiprocessors in (2, 64):
        device.multiprocessors = multiprocessors
        monkeypatch.setattr(tensor_core_loop, "FIRST_STEPS", 1)
        device.launched.clear()
        results.append(through_tensor_cores(network, 3).run(inputs, record=("states",)))
        # Steps 0, 1 and 2, and 3, whose drives go where those of step 0 were.
        assert device.launched.count("tensor_cluster") == (3 if multiprocessors > 2 else 1)
    assert np.array_equal(*(each.states[0] for each in results))


def test_chunks_grow_up_to_the_longest():
    def sizes(*asked):
        found = chunks(*asked)
        assert [step for part in found for step in part] == list(range(asked[0]))
        return [len(part) for part in found]

    assert sizes(1000, 1000, True) == [67, 134, 268, 531] and sizes(1000, 300, True) == [67, 134, 268, 266, 265]
    assert sizes(90, 1000, True) == [90] and sizes(90, 40, True) == [30, 30, 30] and sizes(3, 1, True) == [1, 1, 1]
    assert sizes(1000, 600, False) == [500, 500] and sizes(5, 8, False) == [5]


def test_batch_sizes_share_the_weights_on_the_device(monkeypatch):
    install(monkeypatch, 2)
    layer = through_tensor_cores(sparse(24, 1, 1)[0], 1).engine.packed.tensors[0]
    one, three, four = (layer.loop(batch) for batch in (1, 3, 4))
    assert (one.plan.pairs, three.plan.pairs) == (1, 2)
    assert three is four and one.w_in is four.w_in


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("units", "batch", "how"),
    [
        (300, 1, {}),
        (300, 3, {"format": "csr", "block": None}),
        (333, 21, {"block": (4, 8)}),
        (512, 64, {}),
        (270, 130, {"format": "dense", "block": None, "sparsity": 0.0}),
    ],
)
def test_clusters_on_a_gpu_are_within_the_bound(precision, units, batch, how):
    network, inputs = sparse(units, batch, 20, **how)
    check_bound(precision, network, inputs.to_dense(), clusters=True)


@pytest.mark.gpu
def test_clusters_on_a_gpu_go_on_where_a_state_stands(monkeypatch):
    network, inputs = sparse(300, 5, 40)
    launched, launch = [], TileLoop._run_clusters

    def counted(*arguments) -> None:
        launched.append(arguments)
        launch(*arguments)

    def shorten() -> None:
        launched.clear()
        # Where the GPU has no room for input products beside the clusters, buffers are what ends a chunk.
        monkeypatch.setattr(tensor_core_loop, "FIRST_STEPS", 3)
        monkeypatch.setattr(tensor_core_loop, "DRIVE_BYTES", 1 << 17)

    monkeypatch.setattr(TileLoop, "_run_clusters", counted)
    check_goes_on(network, inputs.to_dense(), shorten)
    assert len(launched) > 4, "some of the four runs have several chunks"


@pytest.mark.gpu
def test_layers_of_clusters_on_a_gpu_read_the_layer_below():
    rng = np.random.default_rng(1)
    network = random_network(300, 2, sparsity=0.8, format="block", block=(1, 32), variant="evnn", rng=rng)
    inputs = random_events(20, 9, 300, 0.2, rng)
    network = at_activity(network, inputs, 0.2)
    check_bound("float16", network, inputs.to_dense(), clusters=True)
