"""The CUDA engine. Packing, plans and compilation need no GPU; the tests that need one are marked `gpu`.

On a GPU the conformance suite of `test_backends.py` runs over this backend too.
"""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventrnn import cells
from eventrnn.backend import BackendUnavailable
from eventrnn.bench.networks import at_activity, random_events, random_network
from eventrnn.cuda import CudaBackend, tables
from eventrnn.cuda.cluster_plan import (
    CLUSTER_WARPS,
    ClusterShape,
    cluster_plan,
    strips_of,
    units_per_lane_of,
)
from eventrnn.cuda.packing import CompactStrips, GroupedStrips, Strips, check_format, pack, per_strip, stored_mask
from eventrnn.cuda.plan import MAX_WARPS, Chip, LayerShape, blocks_from, plan, tile_width
from eventrnn.network import Network
from eventrnn.simulation import Simulator, simulate
from eventrnn.state import State
from eventrnn.testing import weights as weights_of
from eventrnn.weights import CSR, STORAGES, convert
from support.ptx import check_ptx, compiler

H100 = Chip(132, 232_448, {16: 7, 8: 15, 6: 17, 5: 22, 4: 31, 3: 39, 2: 64, 1: 132})


# --- packing ------------------------------------------------------------------------------------------------


def unpack(strips: Strips) -> np.ndarray:
    """The (n_pre, gates * units) matrix of strips, zero where nothing is stored, in the type of the values."""
    n_pre, gates, units = strips.shape
    dense = np.zeros((strips.tiles * gates, n_pre, strips.width), strips.values.dtype)
    if strips.kind == tables.DENSE:
        rows = strips.starts[:-1, None] + np.arange(n_pre * strips.width)
        dense[:] = strips.values[rows].reshape(dense.shape)
    else:
        stored, rank = stored_mask(strips)
        at = strips.starts[:-1, None, None] + strips.table[:, :, 1:] + rank
        dense[stored] = strips.values[np.broadcast_to(at, stored.shape)[stored]]
    by_tile = dense.reshape(strips.tiles, gates, n_pre, strips.width).transpose(2, 1, 0, 3)
    return by_tile.reshape(n_pre, gates, strips.tiles * strips.width)[:, :, :units].reshape(n_pre, gates * units)


def decoded(strips: Strips) -> np.ndarray:
    matrix = unpack(strips)
    return (matrix.astype(np.uint32) << 16).view(np.float32) if matrix.dtype == np.uint16 else matrix


@given(data=st.data(), gates=st.sampled_from([1, 3]), units=st.integers(1, 70), n_pre=st.integers(1, 40))
def test_strips_hold_every_weight_once(data, gates, units, n_pre):
    weights = data.draw(weights_of((n_pre, gates * units)))
    width = data.draw(st.integers(1, 32))
    strips = pack(weights, gates, width)
    assert np.array_equal(decoded(strips), weights.to_dense())
    assert (strips.starts[:-1] * strips.values.itemsize % 16 == 0).all()
    if strips.kind != tables.DENSE:
        bits = np.unpackbits(np.ascontiguousarray(strips.table[:, :, 0]).view(np.uint8))
        assert bits.sum() == weights.kept().sum()


@given(data=st.data(), units=st.integers(1, 70), n_pre=st.integers(1, 40))
def test_tile_memory_holds_what_kernels_load(data, units, n_pre):
    strips = pack(data.draw(weights_of((n_pre, 3 * units))), 3, data.draw(st.integers(1, 32)))
    size, lengths = strips.values.itemsize, np.diff(strips.starts)
    table = 0 if strips.kind == tables.DENSE else 8 * n_pre
    by_tile = lengths.reshape(-1, 3).sum(axis=1)
    assert strips.tile_bytes(1)[0] - (by_tile.max() + tables.LANES) * size in range(16)
    assert strips.tile_bytes(strips.tiles)[0] - (by_tile.sum() + tables.LANES) * size in range(16)
    assert strips.tile_bytes(2)[1] - 6 * table in range(16)


@given(data=st.data(), units=st.integers(1, 70), n_pre=st.integers(1, 40))
def test_compact_strips_list_the_units_with_a_weight_in_the_strip(data, units, n_pre):
    strips = pack(data.draw(weights_of((n_pre, 3 * units), formats=["csr", "block", "nm"])), 3, tables.LANES)
    compact = CompactStrips.of(strips)
    for strip in range(strips.tiles * 3):
        entries = slice(*compact.begins[strip : strip + 2])
        expected = np.flatnonzero(strips.table[strip, :, 0])
        assert np.array_equal(compact.units[entries], 4 * expected)
        tile, gate = divmod(strip, 3)
        columns = gate * units + np.arange(tile * tables.LANES, min((tile + 1) * tables.LANES, units))
        assert np.array_equal(compact.rows[entries, : len(columns)], unpack(strips)[expected][:, columns])
        assert not compact.rows[entries, len(columns) :].any()
    assert len(compact.units) == compact.begins[-1] == len(compact.rows) - 1


@given(
    data=st.data(),
    units=st.integers(1, 70),
    n_pre=st.integers(1, 40),
    strips_per_group=st.integers(1, tables.STRIPS_PER_GROUP),
)
def test_grouped_strips_find_the_rows_of_a_unit_in_every_strip(data, units, n_pre, strips_per_group):
    strips = pack(data.draw(weights_of((n_pre, units))), 1, tables.LANES)
    grouped = GroupedStrips.of(CompactStrips.of(strips), n_pre, strips_per_group)
    matrix, used = unpack(strips), 0
    for strip in range(strips.tiles):
        group, bit = divmod(strip, strips_per_group)
        columns = matrix[:, strip * tables.LANES : (strip + 1) * tables.LANES]
        for unit, word in enumerate(grouped.index[group].tolist()):
            mask = word & ((1 << tables.STRIPS_PER_GROUP) - 1)
            if not mask >> bit & 1:
                assert not columns[unit].any()
                continue
            row = (word >> tables.STRIPS_PER_GROUP) + (mask & ((1 << bit) - 1)).bit_count()
            assert np.array_equal(grouped.rows[grouped.begins[group] + row, : columns.shape[1]], columns[unit])
            used += 1
    assert used == len(grouped.rows) - 1 == grouped.begins[-1]


def test_wide_blocks_are_runs_and_single_weights_are_not():
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((40, 3 * 50)).astype(np.float32)
    blocks = convert(dense * np.repeat(rng.random((40, 5)) < 0.4, 32, axis=1)[:, :150], "block", block=(1, 32))
    assert pack(blocks, 3, 32).kind == tables.RUNS
    assert pack(CSR.from_dense(dense * (rng.random(dense.shape) < 0.3)), 3, 32).kind == tables.MASKED


def test_vectors_are_ordered_by_strip():
    strips = per_strip(np.arange(1, 11, dtype=np.float32), gates=2, width=3)
    assert strips.shape == (4, 32)
    assert strips[:, :3].tolist() == [[1, 2, 3], [6, 7, 8], [4, 5, 0], [9, 10, 0]]
    assert not strips[:, 3:].any()


def test_unknown_format_is_refused_by_name():
    class Diagonal:
        pass

    with pytest.raises(TypeError, match="w_rec: the cuda backend cannot run format Diagonal; convert to dense, csr"):
        check_format("w_rec", Diagonal())  # pyright: ignore[reportArgumentType]


# --- plans --------------------------------------------------------------------------------------------------


@st.composite
def shapes(draw) -> list[LayerShape]:
    rng, found, inputs = np.random.default_rng(draw(st.integers(0, 99))), [], draw(st.integers(1, 300))
    count = draw(st.integers(1, 4))
    for number in range(count):
        units, dense = draw(st.integers(1, 400)), draw(st.booleans())
        width = tile_width(units, H100.multiprocessors // count, dense)

        def strips(n_pre, units=units, dense=dense, width=width):
            matrix = (rng.standard_normal((n_pre, 3 * units)) * (rng.random((n_pre, 3 * units)) < 0.2)).astype("f4")
            return pack(convert(matrix, "dense" if dense else "csr"), 3, width)

        found.append(LayerShape(units, inputs, strips(inputs) if number else None, strips(units)))
        inputs = units
    return found


@settings(max_examples=20)
@given(shapes=shapes(), batch=st.integers(1, 300))
def test_plans_give_every_tile_of_every_sample_one_owner(shapes, batch):
    found = plan(shapes, batch, H100)
    owners = {}
    for first in range(0, batch, found.groups * found.samples):
        table = blocks_from(found, first, batch)
        assert len(table) <= H100.multiprocessors
        for row in table:
            layer, low = row[tables.LAYER], row[tables.TILE]
            for tile in range(low, low + row[tables.TILES]):
                for sample in range(row[tables.SAMPLE], row[tables.SAMPLE] + row[tables.SAMPLES]):
                    assert owners.setdefault((layer, tile, sample), first) == first
                    owners[layer, tile, sample] = first
    assert len(owners) == sum(shape.tiles for shape in shapes) * batch
    assert found.shared <= H100.shared_bytes
    assert found.warps <= max(MAX_WARPS, 32)


@st.composite
def sparse_shapes(draw) -> list[ClusterShape]:
    rng, found, inputs = np.random.default_rng(draw(st.integers(0, 99))), [], 0
    for _ in range(draw(st.integers(1, 4))):
        units = draw(st.integers(11, 700))

        def columns(n_pre, units=units):
            kept = np.repeat(rng.random((n_pre, -(-3 * units // 32))) < 0.1, 32, axis=1)[:, : 3 * units]
            return CompactStrips.of(
                pack(convert(kept * np.ones(1, np.float32), "block", block=(1, 32)), 1, tables.LANES)
            )

        found.append(ClusterShape(units, columns(inputs) if inputs else None, columns(units)))
        inputs = units
    return found


@settings(max_examples=20)
@given(shapes=sparse_shapes(), batch=st.integers(1, 300))
def test_cluster_plans_give_every_tile_of_every_sample_one_owner(shapes, batch):
    found = cluster_plan(shapes, batch, H100)
    if found is None:
        return
    clusters, owners = {}, {}
    roles = [(shape, matrix) for shape in shapes for matrix in shape.matrices()]
    for first in range(0, batch, found.groups * found.samples):
        table = blocks_from(found, first, batch)
        assert len(table) % found.cluster == 0
        assert len(table) // found.cluster <= H100.clusters[found.cluster]
        for at, row in enumerate(table):
            role = row[tables.LAYER]
            # The blocks of a cluster have the same role and samples, and together all tiles in order.
            same = (first, role, row[tables.SAMPLE], row[tables.SAMPLES], row[tables.AT_Y], row[tables.AT_BARRIERS])
            assert clusters.setdefault((first, at // found.cluster), same) == same
            shape, matrix = roles[role]
            assert row[tables.ALL_TILES] == shape.tiles
            gates = strips_of(shape.units, row[tables.TILE], row[tables.TILES])
            strips = sum(end - begin for begin, end in gates)
            # A warp without a strip would read beyond the table of strips.
            assert found.warps <= min(strips, CLUSTER_WARPS) or strips < found.warps <= CLUSTER_WARPS
            assert not found.single_strips or (found.samples == 1 and strips <= found.warps)
            for tile in range(row[tables.TILE], row[tables.TILE] + row[tables.TILES]):
                for sample in range(row[tables.SAMPLE], row[tables.SAMPLE] + row[tables.SAMPLES]):
                    assert (role, tile, sample) not in owners
                    owners[role, tile, sample] = at
            # Whole chunks of units of every strip fit between the table of units and the rows.
            chunk = 32 * found.units_per_lane[matrix is shape.w_in]
            most = max(int(np.diff(matrix.begins)[begin:end].max(initial=0)) for begin, end in gates)
            assert row[tables.CAPACITY] % chunk == 0 and row[tables.CAPACITY] >= most
            if matrix is shape.w_in or not found.single_strips:
                assert row[tables.AT_UNITS] + 4 * row[tables.CAPACITY] * strips <= row[tables.AT_ROWS]
            else:
                # A lane holds the units of a strip, of one chunk.
                assert 0 < most <= row[tables.CAPACITY] == chunk
        # A role waits for lower layers only, so their blocks come first.
        assert (np.diff(table[:, tables.LAYER]) >= 0).all()
    assert len(owners) == sum(shape.tiles for shape, _ in roles) * batch
    assert found.shared <= H100.shared_bytes


@given(units=st.integers(1, 300), tile=st.integers(0, 9), tiles=st.integers(1, 9))
def test_strips_cover_the_columns_of_their_units(units, tile, tiles):
    first, last = 32 * tile, min(units, 32 * (tile + tiles))
    for gate, (begin, end) in enumerate(strips_of(units, tile, tiles)):
        if first < last:
            assert 0 <= gate * units + first - 32 * begin < 32
            assert 0 <= 32 * end - (gate * units + last) < 32


def test_lanes_gather_the_fewest_units_that_need_no_further_chunk():
    def strip(units):
        return CompactStrips(np.zeros(units, np.int32), np.zeros((units + 1, 32), np.float32), np.array([0, units]))

    assert [units_per_lane_of([strip(units)]) for units in (1, 32, 33, 164, 224, 225, 460)] == [1, 1, 2, 6, 7, 4, 5]
    assert units_per_lane_of([]) == 0


def test_cluster_plans_need_clusters_shared_memory_and_one_storage_type():
    rng = np.random.default_rng(0)
    weights = np.repeat(rng.random((256, 24)) < 0.1, 32, axis=1) * np.ones(1, np.float32)
    wide, narrow = (
        CompactStrips.of(pack(convert(weights, "block", block=(1, 32), storage=storage), 1, tables.LANES))
        for storage in ("float32", "bfloat16")
    )
    shape = ClusterShape(256, None, wide)
    assert cluster_plan([shape], 1, H100) is not None
    assert cluster_plan([shape], 1, Chip(132, 232_448)) is None
    assert cluster_plan([shape], 1, Chip(132, 4_000, H100.clusters)) is None
    assert cluster_plan([shape, ClusterShape(256, wide, wide)], 1, H100) is not None
    assert cluster_plan([shape, ClusterShape(256, wide, narrow)], 1, H100) is None


# One sixth of 1344 units, with a tenth of their weights, does not fit into the shared memory of a block.
@pytest.mark.parametrize(("units", "blocks"), [(768, 6), (1024, 6), (1344, 4)])
def test_sixteen_streams_have_clusters_of_six_blocks_if_those_hold_the_weights(units, blocks):
    begins = units // 10 * np.arange(3 * units // 32 + 1)
    rows = np.broadcast_to(np.zeros(32, np.uint16), (begins[-1] + 1, 32))
    found = cluster_plan(
        [ClusterShape(units, None, CompactStrips(np.zeros(begins[-1], np.int32), rows, begins))], 16, H100
    )
    assert found is not None
    assert (found.cluster, found.samples, found.groups) == (blocks, 1, 16)
    assert bool(found.layers[0].layout_rec & tables.RESIDENT) == found.single_strips == (blocks == 6)


@settings(max_examples=20)
@given(shapes=shapes(), batch=st.integers(1, 40))
def test_shared_memory_arrays_do_not_overlap(shapes, batch):
    for layer in plan(shapes, batch, H100).layers:
        offsets = sorted(offset for field, offset in layer.offsets.items() if field != tables.CAPACITY)
        assert all(offset % 16 == 0 for offset in offsets)
        assert offsets[-1] <= layer.shared <= H100.shared_bytes


def test_too_little_shared_memory_uses_l2_then_is_refused():
    rng = np.random.default_rng(0)
    shape = LayerShape(256, 256, None, pack(convert(rng.standard_normal((256, 768)).astype("f4"), "dense"), 3, 8))
    large, small = (plan([shape], 1, Chip(132, size)).layers[0].layout_rec for size in (232_448, 40_000))
    assert large & tables.RESIDENT and not small & tables.RESIDENT
    with pytest.raises(ValueError, match=r"cuda: a layer of 256 units .* more shared memory than the 9,000 bytes"):
        plan([shape], 1, Chip(132, 9_000))


# --- without a GPU ------------------------------------------------------------------------------------------


def test_naming_the_backend_loads_no_cuda_and_its_absence_is_explained():
    code = "import sys; from eventrnn.backend import get_backend; b = get_backend('cuda'); print(b.name, b.exact, "
    code += "[m for m in sys.modules if m.startswith(('numba_cuda', 'cupy'))])"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "cuda True []"
    network = Network.random([3], inputs=2, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="threads: got 2, but the cuda backend brings its own"):
        CudaBackend().engine(network, threads=2)


def test_error_without_a_gpu_names_the_remedy(monkeypatch):
    device = pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    pytest.importorskip("cupy", reason="needs CuPy")
    monkeypatch.setattr(device.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="no GPU with a working driver is here; pip install"):
        device.Device()


LAYOUTS = [
    tables.layout_code(kind, narrow, resident)
    for kind in (tables.DENSE, tables.MASKED, tables.RUNS)
    for narrow in (False, True)
    for resident in (False, True)
]

MASKED_LAYOUTS = [layout for layout in LAYOUTS if layout & tables.KINDS == tables.MASKED]


@pytest.fixture(scope="module")
def compiled():
    """A compiler of kernels, with or without a GPU."""
    return compiler()


@pytest.mark.parametrize("kind", [tables.DENSE, tables.RUNS])
@pytest.mark.parametrize("variant", ["evnn", "paper"])
def test_kernels_compile_with_every_libnvvm_and_without_contraction(compiled, variant, kind):
    from eventrnn.cuda.kernels.persistent import layers_kernel
    from eventrnn.cuda.kernels.single_stream import single_kernel

    layouts = (tables.layout_code(kind, variant == "evnn", True),)
    for make in (layers_kernel, single_kernel):
        ptx = compiled(make(("egru", variant), layouts))
        check_ptx(ptx)
        assert ".local" not in ptx, "arrays in local memory are slow"


@pytest.mark.parametrize("layout", MASKED_LAYOUTS)
@pytest.mark.parametrize(("blocks", "units_per_lane", "input_units_per_lane"), [(2, 1, 0), (16, 7, 2)])
def test_cluster_kernels_compile_without_contraction(compiled, layout, blocks, units_per_lane, input_units_per_lane):
    from eventrnn.cuda.kernels.cluster import cluster_kernel

    clocked = single = not input_units_per_lane
    ptx = compiled(cluster_kernel(layout, layout, blocks, units_per_lane, input_units_per_lane, single, clocked))
    check_ptx(ptx)
    assert ("%clock64" in ptx) == clocked
    assert ptx.count("st.async.shared::cluster") == blocks


@pytest.mark.parametrize("layout", MASKED_LAYOUTS)
def test_products_compile_for_every_weight_layout(compiled, layout):
    from eventrnn.cuda.kernels.batched_products import products_kernel

    check_ptx(compiled(products_kernel(layout)))


def test_kernel_of_several_layouts_compiles_without_contraction(compiled):
    from eventrnn.cuda.kernels.single_stream import single_kernel

    check_ptx(compiled(single_kernel(("egru", "evnn"), tuple(LAYOUTS[:3]))))


# --- on a GPU -----------------------------------------------------------------------------------------------


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.int32), b.view(np.int32))


def layered(variant: str, format: str, batch: int, storage: str) -> tuple[Network, object]:
    rng = np.random.default_rng(3)
    block = (1, 32) if format == "block" else None
    sparsity = 0.0 if format == "dense" else 0.85
    network = random_network(
        333, 2, sparsity=sparsity, format=format, block=block, variant=variant, rng=rng, dtype=storage
    )
    inputs = random_events(60, batch, 333, 0.1, rng)
    return at_activity(network, inputs, 0.1), inputs


@pytest.mark.gpu
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("format", ["dense", "csr", "block"])
@pytest.mark.parametrize("variant", ["evnn", "paper"])
@pytest.mark.parametrize("batch", [1, 5, 150])
def test_events_states_and_counts_equal_those_of_the_cpu(variant, format, storage, batch):
    network, inputs = layered(variant, format, batch, storage)
    expected = simulate(network, inputs, record=("events", "states"))
    got = simulate(network, inputs, backend="cuda", record=("events", "states"))
    assert all(0.02 < activity < 0.5 for activity in expected.activity)
    for k in range(2):
        assert same_bits(expected.states[k], got.states[k])
        assert same_bits(expected.events[k].to_dense(), got.events[k].to_dense())
        assert np.array_equal(expected.fired[k].graded, got.fired[k].graded)
    assert got.paths["layers.0.w_rec"].endswith(("in shared memory", "in L2"))


@pytest.mark.gpu
def test_reciprocals_powers_and_sigmoids_on_a_gpu_are_rounded_as_on_the_cpu():
    from numba import int64, types

    from eventrnn.cuda.device import current_device
    from eventrnn.cuda.kernels import ptx

    def function(count, x_at, reciprocal_at, exp_at, sigmoid_at):
        k = ptx.cuda.blockIdx.x * int64(ptx.cuda.blockDim.x) + ptx.cuda.threadIdx.x
        if k < count:
            x = ptx.global_float32(x_at)[k]
            ptx.global_float32(reciprocal_at)[k] = ptx.reciprocal(x)
            ptx.global_float32(exp_at)[k] = ptx.exp_float32(x)
            ptx.global_float32(sigmoid_at)[k] = ptx.sigmoid(-x)

    device = current_device()
    kernel = device.kernel(("reciprocals",), lambda: (function, types.void(*[types.int64] * 5)), 256)
    # Every number of two binades, and some of all magnitudes.
    whole = np.arange(1 << 23, dtype=np.int32)
    for first in (np.float32(1), np.float32(1 << 20), None):
        words = whole * 126 + np.float32(1).view(np.int32) if first is None else whole + first.view(np.int32)
        x = device.put(words.view(np.float32))
        found = [device.empty(x.shape, np.float32) for _ in range(3)]
        with device.on_stream():
            device.launch(kernel, len(words) // 256, 256, len(words), x.data.ptr, *(each.data.ptr for each in found))
            reciprocals, powers, sigmoids = (each.get() for each in found)
        in_range = words.view(np.float32) <= 2.0**125
        assert same_bits(reciprocals[in_range], (np.float32(1) / words.view(np.float32))[in_range])
        some = slice(None, None, 97)
        assert same_bits(powers[some], cells.exp_float32(words.view(np.float32)[some]))
        some = words.view(np.float32) <= 96
        some[: len(some) // 2] &= np.arange(len(some) // 2) % 97 == 0
        assert same_bits(sigmoids[some], cells.sigmoid_float32(-words.view(np.float32)[some]))


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [False, True])
def test_a_million_steps_in_one_run_equal_the_same_steps_in_chunks(blocks):
    rng = np.random.default_rng(4)
    network = Network.random([96 if blocks else 48], inputs=8, rng=rng, threshold=0.1)
    network = network.with_matrices({k: CSR.from_dense(3 * w.to_dense()) for k, w in network.matrices().items()})
    if blocks:
        kept = np.repeat(rng.random((96, 9)) < 0.3, 32, axis=1)
        thinned = convert(network.layers[0].w_rec.to_dense() * kept, "block", block=(1, 32))
        network = network.with_matrices({"layers.0.w_rec": thinned})
    x = (rng.standard_normal((1_000_000, 1, 8)) * (rng.random((1_000_000, 1, 8)) < 0.5)).astype(np.float32)
    whole, chunked = simulate(network, x, backend="cuda"), Simulator(network, backend="cuda")
    cuts = [0, *sorted(rng.integers(0, len(x), 300)), len(x)]
    chunks = [chunked.run(x[a:b]).output for a, b in pairwise(cuts)]
    assert same_bits(whole.output, np.concatenate(chunks))
    assert same_bits(whole.state.cells[0], chunked.state.cells[0])
    assert 0.02 < whole.activity[0] < 0.98


@pytest.mark.gpu
def test_out_of_memory_names_the_bytes_and_leaves_the_gpu_usable():
    network = Network.random([64], inputs=8, rng=np.random.default_rng(5))
    engine = CudaBackend().engine(network)
    with pytest.raises(MemoryError, match=r"cuda: [\d,]+ bytes are needed and [\d,]+ are free"):
        engine.device.empty(1 << 46, np.uint8)
    x = np.ones((3, 1, 8), np.float32)
    assert same_bits(simulate(network, x).output, simulate(network, x, backend="cuda").output)


@pytest.mark.gpu
def test_run_in_several_chunks_of_time_equals_one_run(monkeypatch):
    from eventrnn.cuda import engine

    network, inputs = layered("evnn", "block", 3, "bfloat16")
    whole = simulate(network, inputs, backend="cuda")
    monkeypatch.setattr(engine, "RECORD_BYTES", 1 << 18)
    chunked = simulate(network, inputs, backend="cuda")
    assert same_bits(whole.output, chunked.output)
    assert np.array_equal(whole.fired[1].total, chunked.fired[1].total)
    assert isinstance(chunked.state, State)
