"""Layouts of the CPU engine that it does not choose for small networks: forced on them, they give the same bits."""

from __future__ import annotations

import mmap
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eventrnn.cells import CELLS, Cell
from eventrnn.cpu import engine as cpu
from eventrnn.cpu import memory, packing, plan
from eventrnn.cpu.kernels.tile_products import SMALL_PANEL_ROWS
from eventrnn.cpu.tables import (
    BLOCKS,
    FEW_BLOCKS,
    HIGH,
    INDEX,
    KIND,
    LOW,
    POINTERS,
    SCATTER,
    SMALL_PANEL_BITS,
    WIDTH,
)
from eventrnn.network import Network
from eventrnn.simulation import RECORDABLE, Simulator, simulate
from eventrnn.weights import FORMATS, STORAGES, convert
from support.conformance import assert_same, cases, in_format
from support.layouts import FEW, FORCED, INDICES, MANY, MASKS, NEVER, TILES, check_layout, forced, simulated

# Any values of the constants together.
CONSTANTS = st.fixed_dictionaries(
    {
        "SHARED_EVENTS": st.sampled_from((0, NEVER)),
        "DENSE_ACTIVITY_THRESHOLD": st.sampled_from((0, 0.3, 2)),
        "MASKED_FROM": st.sampled_from((0, 0.2, 2)),
        "FILL": st.sampled_from((-NEVER, NEVER)),
        "WIDEST_SCATTER": st.sampled_from((16, 48, 1 << 16)),
        "FEW_SEGMENTS": st.sampled_from((0, 2, NEVER)),
        "STRIP_TERMS": st.sampled_from((0, NEVER)),
        "PREFETCHED_BYTES": st.sampled_from((0, NEVER)),
        "LARGE_PAGE": st.sampled_from((1 << 12, 1 << 21)),
        "BLOCK_TILE_BYTES": st.sampled_from((1 << 8, 1 << 20)),
        "AVX512": st.booleans(),
    }
)


@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("layout", FORCED)
@given(data=st.data(), threads=st.integers(1, 3))
def test_every_layout_gives_the_bits_of_the_specification(backend, layout, data, threads):
    check_layout(backend, layout, data, threads)


@pytest.mark.parametrize(("block", "kind"), [((1, 64), BLOCKS), ((2, 4), BLOCKS), ((3, 5), SCATTER), ((1, 1), SCATTER)])
def test_block_width_decides_the_layout(block, kind):
    network = in_format(Network.random([24], inputs=9, rng=np.random.default_rng(0)), "block", block)
    with forced({**INDICES, "STRIP_TERMS": NEVER}):
        engine = cpu.CpuEngine(network, 1)
        assert {int(window[KIND]) for window in engine.plan(5, 1).column_tiles[0]} == {kind}
        widths = {int(window[WIDTH]) for window in engine.plan(5, 1).column_tiles[0]}
    assert widths == {block[1] if kind == BLOCKS else 1}


@pytest.mark.parametrize("threads", [1, 2])
def test_tiles_of_block_segments_share_the_columns_and_give_equal_bits(threads):
    # 99 units: the gates of a thread begin and end within blocks.
    rng = np.random.default_rng(3)
    network = in_format(Network.random([99], inputs=40, rng=rng, threshold=0.05), "block", (1, 64))
    x = rng.standard_normal((8, 3, 40), dtype=np.float32)
    with forced({**MANY, "BLOCK_TILE_BYTES": 1 << 13}):
        engine = cpu.CpuEngine(network, threads)
        tiles = engine.plan(8, 3).column_tiles
        got = simulate(network, x, threads=threads, record=RECORDABLE)
    for share in tiles:
        low, high = share[share[:, HIGH] > share[:, LOW]][:, [LOW, HIGH]].T
        # The tiles of the input come first; those of the recurrent matrix begin at the same position.
        begins = np.flatnonzero(low == low[0])
        assert len(begins) == 2 and begins[1] > 1
        follows = np.delete(np.arange(1, len(low)), begins[1] - 1)
        assert (low[follows] == high[follows - 1]).all()
    assert_same(simulate(network, x, backend="reference", record=RECORDABLE), got)


@pytest.mark.parametrize("backend", ["cpu"])
@given(case=cases(), threads=st.integers(1, 3), constants=CONSTANTS)
def test_any_mix_of_layouts_gives_the_bits_of_the_specification(backend, case, threads, constants):
    with forced(constants):
        got = simulated(case, threads=threads, backend=backend)
    assert_same(simulated(case, backend="reference"), got)


@pytest.mark.parametrize("units", [1, 15, 16, 17, 31, 33])
@pytest.mark.parametrize("variant", CELLS["egru"])
def test_threads_without_units_give_equal_bits(variant, units):
    # A thread owns whole vectors of units: of three threads, one or two own none.
    rng = np.random.default_rng(units)
    drawn = Network.random([units], inputs=7, readout=units, rng=rng, threshold=0.05, cell=Cell(variant=variant))
    owned = np.diff(plan.Layout(drawn, 3).unit_bounds[0])
    assert owned.sum() == units
    assert (owned == 0).any() == (units <= 32)
    drawn = drawn.with_matrices(
        {key: convert((3 * w.to_dense() * (rng.random(w.shape) < 0.6)), "dense") for key, w in drawn.matrices().items()}
    )
    x = rng.standard_normal((6, 2, 7)).astype(np.float32)
    narrow = (1, min(3, units))
    for storage in STORAGES:
        expected = simulate(
            in_format(drawn, "dense", storage=storage).dense(), x, backend="reference", record=RECORDABLE
        )
        assert units == 1 or 0.02 < expected.activity[0] < 0.98
        ways = [("dense", None), ("csr", None), ("block", narrow), ("block", (1, min(16, units)))]
        for constants in ({**FEW, **INDICES}, {**MANY, **MASKS}, {**MANY, **TILES}):
            for name, block in ways:
                with forced(constants):
                    got = simulate(in_format(drawn, name, block, storage=storage), x, threads=3, record=RECORDABLE)
                assert_same(expected, got)
            whole = in_format(drawn, "nm", nm=(2, 2, "pre"), storage=storage)
            with forced(constants):
                assert_same(expected, simulate(whole, x, threads=3, record=RECORDABLE))
    assert set(FORMATS) == {"nm", *(name for name, _ in ways)}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("units", [128, 129, 379])
@pytest.mark.parametrize("batch", [3, SMALL_PANEL_ROWS + 1])
@pytest.mark.parametrize("name", ["dense", "csr"])
def test_panels_of_units_give_the_bits_of_the_specification(name, batch, units, storage):
    # A unit next to each edge fires, and one sample is silent.
    rng = np.random.default_rng(units)
    network = in_format(Network.random([40], inputs=units, rng=rng, threshold=0.02, readout=33), name, storage=storage)
    x = rng.standard_normal((5, batch, units)).astype(np.float32) * (rng.random((5, batch, units)) < 0.2)
    edges = np.arange(0, units, 1 << SMALL_PANEL_BITS)
    x[:, :, np.concatenate([edges, np.minimum(edges + (1 << SMALL_PANEL_BITS), units) - 1])] = 1
    x[:, 1] = 0
    expected = simulate(network, x, backend="reference", record=RECORDABLE)
    with forced({**MANY, **TILES, "DENSE_ACTIVITY_THRESHOLD": 2}):
        for threads in (1, 2):
            assert_same(expected, simulate(network, x, threads=threads, record=RECORDABLE))


# --- wider than an index ------------------------------------------------------------------------------------


def wide_readout(columns: int, block: tuple[int, int], share: float) -> Network:
    """A few units and very many outputs with a share of the blocks, always including the first and the last block."""
    rng = np.random.default_rng(columns)
    network = Network.random([6], inputs=4, readout=columns, rng=rng, threshold=0.02)
    grid = (-(-6 // block[0]), -(-columns // block[1]))
    kept = rng.random(grid) < share
    kept[:, [0, -1]] = True
    kept = kept.repeat(block[0], axis=0).repeat(block[1], axis=1)[:6, :columns]
    values = rng.standard_normal((6, columns)) * kept
    return network.with_matrices({"readout": convert(values.astype(np.float32), "dense")})


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("columns", "block", "share"),
    # The padding of the last block exceeds the last index.
    [(70_003, (2, 7), 0.5), (140_003, (3, 5), 0.05), (65_536, (1, 7), 0.0), (65_538, (1, 11), 0.0)],
)
def test_more_columns_than_an_index_counts(columns, block, share, threads):
    network = wide_readout(columns, block, share)
    x = np.random.default_rng(1).standard_normal((3, 2, 4)).astype(np.float32)
    expected = simulate(network, x, backend="reference")
    assert expected.activity[0] > 0.2
    for name in ("csr", "block"):
        tested = in_format(network, "dense").with_matrices(
            {"readout": convert(network.matrices()["readout"], name, block=block if name == "block" else None)}
        )
        assert np.array_equal(expected.output, simulate(tested, x, threads=threads).output)


@given(st.integers(2, 40), st.integers(1, 3), st.integers(1, 120))
@example(34, 1, 101)
@example(34, 3, 101)
def test_block_padding_stays_within_the_columns_of_a_thread(units, threads, width):
    # Behind the columns of a thread lie those of other threads or other arrays.
    drawn = Network.random([units], inputs=3, rng=np.random.default_rng(units))
    network = in_format(drawn, "block", (1, min(width, 3 * units)))
    engine = cpu.CpuEngine(network, threads)
    packed, ends = engine.plan(4, 1), [*engine.layout.drive_begins[0, 1:], engine.drive_pitch]
    columns = packed.pools.index.view(np.uint16)
    for part, end in enumerate(ends):
        for inputs, window in zip((3, units), packed.column_tiles[part], strict=True):
            if window[KIND] in (BLOCKS, FEW_BLOCKS):
                pointers = packed.pools.pointers[window[POINTERS] :][: 3 * inputs]
                targets = packed.pools.index[window[INDEX] :][: int(pointers[1::3].max())] + window[WIDTH]
            elif window[KIND] == SCATTER:
                count = int(packed.pools.pointers[window[POINTERS] + inputs])
                targets = window[LOW] + columns[2 * window[INDEX] :][:count].astype(np.int64) + 1
            else:
                continue
            assert targets.max(initial=0) <= end


# --- time, memory, threads ----------------------------------------------------------------------------------


@given(cases(max_steps=20), st.integers(1, 4))
def test_any_chunk_of_time_gives_the_same_bits(case, chunk):
    with patch.object(cpu, "LONGEST_CHUNK", chunk):
        assert_same(simulated(case), simulated(case, backend="reference"))


def test_a_batch_whose_drives_cannot_be_addressed_is_refused():
    engine = cpu.CpuEngine(Network.random([4], inputs=3, rng=np.random.default_rng(0)), 1)
    with pytest.raises(ValueError, match="split the batch"):
        engine._buffers(1 << 30)


def test_run_after_memory_error_succeeds():
    network = Network.random([20], inputs=3, rng=np.random.default_rng(0), threshold=0.02)
    x = np.random.default_rng(1).standard_normal((9, 40, 3)).astype(np.float32)
    simulator = Simulator(network, batch=40)
    simulator.engine._buffers(1)
    with patch.object(cpu, "workspace", side_effect=MemoryError), pytest.raises(MemoryError):
        simulator.run(x)
    assert_same(simulate(network, x, backend="reference", record=RECORDABLE), simulator.run(x, record=RECORDABLE))


def test_a_plan_holds_the_weights_once():
    plan = cpu.CpuEngine(Network.random([4], inputs=3, rng=np.random.default_rng(0)), 1).plan(1, 1)
    assert not any(isinstance(value, packing.PoolBuilder | list) for value in vars(plan).values())


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages")
def test_large_pages_are_requested_and_may_be_refused():
    asked, kinds = [], []

    class Refusing(mmap.mmap):
        def __new__(cls, *arguments, flags=mmap.MAP_SHARED):
            kinds.append(flags)
            return super().__new__(cls, *arguments, flags=flags)

        def madvise(self, option):
            asked.append(option)
            raise OSError(22, "Invalid argument")

    with patch.object(memory, "LARGE_PAGE", 1 << 12), patch.object(memory.mmap, "mmap", Refusing):
        arrays = [memory.aligned_zeros(5_000, np.float32) for _ in range(200)]
    assert asked == [mmap.MADV_HUGEPAGE] * 200
    # The kernel gives no large pages to memory that may be shared between processes.
    assert all(kind & mmap.MAP_PRIVATE and kind & mmap.MAP_ANONYMOUS for kind in kinds)
    places = {zeros.ctypes.data % memory.APART for zeros in arrays}
    assert len(places) > 20 and all(place % 64 == 0 for place in places)
    for k, zeros in enumerate(arrays):
        assert zeros.shape == (5_000,) and not zeros.any()
        zeros[:] = k + 1
    assert all((zeros == k + 1).all() for k, zeros in enumerate(arrays))


@pytest.mark.parametrize("variant", CELLS["egru"])
def test_more_threads_than_cores_finish_with_the_same_bits(variant):
    # A thread that waits must yield its core to the thread for which it waits.
    rng = np.random.default_rng(5)
    network = Network.random([200, 40], inputs=20, readout=150, rng=rng, threshold=0.1, cell=Cell(variant=variant))
    x = rng.standard_normal((60, 2, 20)).astype(np.float32)
    expected = simulate(network, x, record=RECORDABLE)
    assert_same(expected, simulate(network, x, threads=8, record=RECORDABLE))
