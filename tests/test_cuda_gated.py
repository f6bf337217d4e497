"""Gated blocks on the GPU: the kernels thread by thread in plain Python, and on a GPU; their packed layout."""

from __future__ import annotations

import importlib
import pickle
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrnn.backend import BackendUnavailable
from eventrnn.cells import Cell
from eventrnn.cuda import tables
from eventrnn.network import Network
from eventrnn.reference_products import gates_of_logits
from eventrnn.simulation import RECORDABLE, Simulator, simulate
from eventrnn.testing import gated_blocks
from eventrnn.weights import GatedBlocks, convert
from support import emulated_gpu
from support.conformance import assert_same, assert_same_state, same_bits
from support.ptx import check_ptx, compiler, merged_tuples

CELLS = [Cell(), Cell("gru"), Cell("lstm")]


def said(value) -> str | None:
    return value.name if isinstance(value, Cell) else None


def case(
    cell: Cell,
    *,
    units=(9,),
    inputs=5,
    readout: int | None = 4,
    steps=2,
    batch=2,
    storage="float32",
    gated=("w_in", "w_rec", "readout"),
    **options,
) -> tuple[Network, np.ndarray]:
    """A network with gated blocks in the matrices of these roles, and inputs of which some are zero.

    options : those of `GatedBlocks.from_weights`
    """
    rng = np.random.default_rng(sum(units) + batch)
    threshold = {"threshold": 0.1} if cell.thresholded else {}
    network = Network.random(units, inputs=inputs, readout=readout, rng=rng, cell=cell, **threshold)
    block = options.pop("block", (3, 4))
    matrices = {}
    for name, weights in network.matrices().items():
        stored = convert(2 * weights.to_dense(), "dense", storage=storage)
        matrices[name] = stored
        if name.role in gated:
            with warnings.catch_warnings():
                # Small gates do not pay.
                warnings.simplefilter("ignore", UserWarning)
                options = {"density": 0.4, "gate_rule": "linear"} | options
                fitting = min(block[0], weights.shape[0]), min(block[1], weights.shape[1])
                matrices[name] = GatedBlocks.from_weights(stored, block=fitting, rng=rng, **options)
    x = rng.standard_normal((steps, batch, inputs)) * (rng.random((steps, batch, inputs)) < 0.7)
    return network.with_matrices(matrices), x.astype(np.float32)


@pytest.fixture
def emulated(monkeypatch):
    """A fake GPU on which the kernels run as they are, in plain Python."""
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    return emulated_gpu.install(monkeypatch)


@given(data=st.data(), gates=st.sampled_from([1, 3]), units=st.integers(1, 40), n_pre=st.integers(1, 20))
def test_strips_hold_the_rows_of_stored_blocks_once(data, gates, units, n_pre):
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    from eventrnn.cuda.gated_matrix import RowStrips

    weights, width = (
        data.draw(gated_blocks((n_pre, gates * units), periods=(1,))),
        data.draw(st.sampled_from([4, 8, 32])),
    )
    strips, dense, (r, _) = RowStrips.of_blocks(weights, gates, width), weights.blocks.to_dense(), weights.block
    found, used = np.zeros((n_pre, gates, len(strips.offsets) // gates * width), np.float32), 0
    values, group = strips.values, 16 // strips.values.itemsize
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    for strip, offsets in enumerate(strips.offsets):
        tile, gate = divmod(strip, gates)
        for row, offset in enumerate(offsets):
            rows = min(r, n_pre - row * r)
            if offset >= 0:
                # By group of rows, column, and row of the group; padding has zeros.
                padded = -(-rows // tables.ROW_GROUP) * tables.ROW_GROUP
                piece = values[offset : offset + padded * width].reshape(-1, width, group)
                piece = piece.transpose(0, 2, 1).reshape(padded, width)
                found[row * r : row * r + rows, gate, tile * width : (tile + 1) * width] = piece[:rows]
                assert not np.any(piece[rows:])
                used += piece.size
    assert np.array_equal(found[:, :, :units].reshape(n_pre, -1), dense)
    assert 0 <= len(values) - used <= tables.LANES
    for stage in (tables.ROWS_STAGE_BYTES, tables.LAYER_STAGE_BYTES):
        assert 8 <= strips.stage_rows(stage) <= stage // (width * strips.values.itemsize)


@pytest.mark.parametrize("which", ["rows", "layer", "layer in pieces that chooses alone"])
def test_kernels_of_gated_blocks_compile_with_every_libnvvm_and_without_contraction(which):
    compiled = compiler()
    from eventrnn.cuda.kernels.gated_kernels import gated_rows_kernel
    from eventrnn.cuda.kernels.gated_loop import gated_layer_kernel

    alone = which.startswith("layer in")
    layer = gated_layer_kernel(("lstm", "standard"), True, False, alone, alone)
    ptx = compiled(gated_rows_kernel(False) if which == "rows" else layer)
    assert any(("feed_ring" if alone else "add_rows") in module for module in compiled.modules)
    check_ptx(ptx)
    assert ".local" not in ptx, "arrays in local memory are slow"


def test_tuples_that_are_assigned_in_two_places_are_found():
    once = """define i32 @f() {
      store {i32, i64} zeroinitializer, {i32, i64}* %"a"
      store {i32, i64} %".1", {i32, i64}* %"a", align 8
      store i32 %".2", i32* %"b"
    }\n"""
    twice = once.replace("store i32 %", 'store [2 x float] %".3", [2 x float]* %"c"\n') * 2
    again = once.replace("store i32", 'store {i32, i64} %".4", {i32, i64}* %"a"\n store i32')
    assert merged_tuples(once) == merged_tuples(twice) == []
    assert merged_tuples(once + again) == ['%"a" of define i32 @f() {']


EMULATED = [
    (Cell(), {"units": (9, 6), "steps": 1, "readout": None}),
    (
        Cell("gru"),
        {"units": (36,), "gate_rule": "softmax", "rank": 2, "block": (5, 18), "storage": "bfloat16", "readout": None}
        | {"batch": 3},
    ),
    # Block rows of whole pieces, of which two stay in shared memory and four are copied ahead.
    (
        Cell("gru"),
        {
            "units": (192,),
            "block": (32, 32),
            "density": 0.6,
            "readout": None,
            "batch": 1,
            "gated": ("w_rec",),
            "steps": 3,
        }
        | {"shared_bytes": 104_000, "stage_bytes": 4096, "resident": 2, "warps": 4, "multiprocessors": 6},
    ),
    # Blocks that compute all logits by themselves. A warp receives several parts, the last one of fewer rows.
    (
        Cell("lstm"),
        {"units": (152,), "block": (32, 152), "rank": 3, "gate_rule": "softmax", "readout": None, "batch": 1}
        | {"gated": ("w_rec",), "steps": 4, "gate_period": 2, "shared_bytes": 190_000, "alone": True, "resident": 3},
    ),
    # Choices that two steps share, in every matrix.
    (Cell("gru"), {"gate_period": 2, "steps": 3, "batch": 2}),
    # Dense weights of one sample.
    (Cell("lstm"), {"units": (70,), "batch": 1, "gated": (), "readout": None, "stage_bytes": 8192}),
    (Cell("lstm"), {"batch": 1, "block": (1, 20), "steps": 3, "shared_bytes": 23_100, "resident": 1}),
]


@pytest.mark.parametrize(("cell", "options"), EMULATED, ids=said)
def test_emulated_kernels_have_the_bits_of_the_specification(monkeypatch, emulated, cell, options):
    from eventrnn.cuda import device_network, gated_layer
    from eventrnn.cuda.kernels import gated_loop

    def places(*given):
        made = place(*given)
        resident.append(made[0][tables.RESIDENT_ROWS])
        in_pieces.append(bool(made[0][tables.IN_PIECES]))
        return made

    def kernel(kind, narrow, stamped, alone, in_pieces):
        kernels.append((alone, in_pieces))
        return made_kernel(kind, narrow, stamped, alone, in_pieces)

    place, resident, in_pieces, options = gated_layer.GatedMatrix.places, [], [], dict(options)
    made_kernel, kernels = gated_layer.gated_layer_kernel, []
    monkeypatch.setattr(gated_layer, "gated_layer_kernel", kernel)
    kept, alone = options.pop("resident", None), options.pop("alone", False)
    monkeypatch.setattr(gated_layer.GatedMatrix, "places", places)
    for name in ("shared_bytes", "multiprocessors"):
        monkeypatch.setattr(type(emulated), name, options.pop(name, getattr(emulated, name)))
    warps = options.pop("warps", emulated_gpu.WARPS)
    monkeypatch.setattr(gated_layer.GatedMatrix, "warps", warps)
    if (stage_bytes := options.pop("stage_bytes", None)) is not None:
        for module in (gated_layer, gated_loop):
            monkeypatch.setattr(module, "LAYER_STAGE_BYTES", stage_bytes)
    monkeypatch.setattr(device_network, "MIN_LOOP_UNITS", 64)
    network, x = case(cell, **options)
    expected = simulate(network, x, backend="reference", record=RECORDABLE)
    got = simulate(network, x, backend="cuda", record=RECORDABLE)
    assert ("gated_rows" in emulated.launched) == isinstance(network.layers[0].w_in, GatedBlocks)
    assert "gated_layer" in emulated.launched
    assert np.any(expected.output)
    assert_same(expected, got)
    # In some cases some block rows stay in shared memory, and others are copied in every step.
    gated = isinstance(network.layers[0].w_rec, GatedBlocks)
    assert any(in_pieces) == any(each[1] for each in kernels) == (warps > emulated_gpu.WARPS) and {
        each[0] for each in kernels
    } == {alone}
    assert max(resident) == (kept or (network.layers[0].w_rec.grid[0] if gated else 2))
    layout = "gated" if gated else "dense strips"
    assert got.paths["layers.0.w_rec"] == f"{layout} {options.get('storage', 'float32')} in L2"


#: arrays in which the products of gated blocks with many rows work
TILE_ARRAYS = {("layers.0.w_in", name) for name in ("inputs", "maxima", "parts", "gates", "left")}


@pytest.mark.parametrize(
    "options",
    [
        {"gate_period": 2, "steps": 4},
        {"storage": "bfloat16", "gate_rule": "softmax", "steps": 3},
        {"rank": 3, "gate_rule": "softmax", "steps": 3},
        # One block row, whose rows are no whole turns of the kernel.
        {"inputs": 40, "block": (40, 64), "steps": 3},
    ],
)
def test_emulated_tiles_of_many_rows_have_the_bits_of_the_specification(monkeypatch, emulated, options):
    from eventrnn.cuda import gated_matrix, row_tiles

    monkeypatch.setattr(gated_matrix, "MIN_TILED_ROWS", 4)
    monkeypatch.setattr(row_tiles, "ROWS_AT_A_TIME", 6)
    sizes = {"units": (22,), "inputs": 28, "readout": None, "block": (16, 64), "density": 0.5, "gated": ("w_in",)}
    network, x = case(Cell("gru"), **(sizes | options))
    expected = simulate(network, x, backend="reference", record=RECORDABLE)
    simulator = Simulator(network, batch=2, backend="cuda")
    first = simulator.run(x[:1]).output
    assert "tile_product" not in emulated.launched
    assert same_bits(expected.output, np.concatenate([first, simulator.run(x[1:]).output]))
    assert_same_state(expected.state, simulator.state)
    assert "tile_product" in emulated.launched
    # The memory is that of the run, so that it is counted and freed with it.
    runs = list(simulator.engine.runs.values())
    assert {len(run.buffers.scratch_arrays.keys() & TILE_ARRAYS) for run in runs} == {0, len(TILE_ARRAYS)}


def test_tiles_of_gated_blocks_take_fewer_rows_where_each_has_many_parts_of_logits(monkeypatch, emulated):
    from eventrnn.cuda import row_tiles

    network, _ = case(Cell("gru"), units=(22,), inputs=64, block=(16, 64), gated=("w_in",))
    w_in = network.layers[0].w_in
    matrix = Simulator(network, batch=2, backend="cuda").engine.packed.w_in[0]
    # Two parts of 32 inputs, and two block columns of four blocks.
    assert matrix._tiles.parts == 2 and w_in.n_blocks == 8
    assert [matrix._tiles.rows_at_a_time(batch) for batch in (1, 3, 4000)] == [2048, 2046, 4000]
    monkeypatch.setattr(row_tiles, "PART_BYTES", 2 * 8 * 4 * 10)
    assert [matrix._tiles.rows_at_a_time(batch) for batch in (1, 3, 4000)] == [10, 9, 4000]
    network, _ = case(Cell("gru"), inputs=40, block=(40, 64), gated=("w_in",))
    matrix = Simulator(network, backend="cuda").engine.packed.w_in[0]
    assert matrix._tiles.parts == 1, "zeros behind the inputs are no part of their own"


def test_emulated_tiles_of_dense_weights_have_the_bits_of_the_specification(monkeypatch, emulated):
    from eventrnn.cuda import row_tiles, run

    monkeypatch.setattr(run, "MIN_TILED_ROWS", 4)
    monkeypatch.setattr(row_tiles, "ROWS_AT_A_TIME", 6)
    network, x = case(Cell("gru"), units=(21,), readout=None, gated=("w_rec",), steps=5)
    expected = simulate(network, x, backend="reference", record=RECORDABLE)
    got = simulate(network, x, backend="cuda", record=RECORDABLE)
    assert_same(expected, got)
    assert emulated.launched.count("tile_product") == 2 and got.paths["layers.0.w_in"] == "tiles float32 in L2"


def test_emulated_runs_and_steps_go_on_with_the_choice_that_steps_share(emulated):
    network, x = case(Cell("lstm"), gate_period=3, steps=5, units=(6,))
    expected = simulate(network, x, backend="reference")
    simulator = Simulator(network, batch=2, backend="cuda")
    parts = [simulator.run(x[:2]).output, [simulator.step(x[2])], simulator.run(x[3:]).output]
    assert same_bits(expected.output, np.concatenate(parts))
    assert_same_state(expected.state, simulator.state)
    assert_same_state(expected.state, pickle.loads(pickle.dumps(simulator.state)))
    assert [held.left.tolist() for held in simulator.state.gates.values()] == [[1, 1]] * 3


@pytest.mark.parametrize("rule", ["linear", "softmax"])
def test_the_choice_of_an_emulated_block_of_threads_is_that_of_the_specification(emulated, rule):
    from eventrnn.cuda.kernels.gated_choice import choose, clear_counts
    from eventrnn.cuda.kernels.ptx import cuda, global_float32, shared_base, shared_float32, shared_int32

    def kernel(logits_at, gates_at, n, kept, softmax):
        thread, base = np.int32(cuda.threadIdx.x), shared_base()
        me = thread & 31, thread >> 5, np.int32(cuda.blockDim.x >> 5)
        # Gates, keys, words, maxima and ratios, of up to 256 blocks each.
        gates, keys = shared_float32(base), shared_int32(base + 1024)
        words, maxima = base + 2048, shared_int32(base + 4352)
        for k in range(thread, n, cuda.blockDim.x):
            gates[k] = global_float32(logits_at)[k]
        maxima[thread & 31] = np.int32(0)
        clear_counts(words, me)
        cuda.syncthreads()
        bad = choose(gates, keys, base + 4608, words, maxima, np.int32(n), np.int32(kept), softmax, me)
        for k in range(thread, n, cuda.blockDim.x):
            global_float32(gates_at)[k] = np.float32(np.nan) if bad else gates[k]

    # The emulation takes functions of the engine.
    kernel.__module__ = choose.py_func.__module__
    run = emulated_gpu.emulated(kernel, 1, 32 * emulated_gpu.WARPS, 8192)
    rng = np.random.default_rng(3)
    drawn = rng.standard_normal(200).astype(np.float32)
    cases = [(drawn[:1], 1), (drawn[:40], 40), (drawn[:70], 20), (drawn, 100), (drawn, 199)]
    # Equal ones, also of the two signs and more than there are threads, and magnitudes that are far apart.
    cases += [(np.zeros(3, np.float32), 2), (np.repeat(drawn[:50], 4), 101), (np.float32([2, -2, 2, -2, 1]), 3)]
    cases += [(np.float32([0.0, -0.0, 1e-45, -1e-45]), 2), (drawn * np.float32(10) ** rng.integers(-30, 30, 200), 61)]
    for logits, kept in cases:
        logits, got = logits.astype(np.float32), np.full(len(logits), np.nan, np.float32)
        blocks = SimpleNamespace(name="w", rule=rule, kept=kept)
        with np.errstate(all="ignore"):
            try:
                expected = gates_of_logits(blocks, logits[None])[0]
            except FloatingPointError:
                expected = np.full(len(logits), np.nan, np.float32)
        run(logits.ctypes.data, got.ctypes.data, len(logits), kept, int(rule == "softmax"))
        assert same_bits(got, expected) or np.all(np.isnan(got) & np.isnan(expected)), (logits, kept)


def test_the_experiment_finds_the_phases_of_an_emulated_layer(monkeypatch, emulated):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "experiments"))
    monkeypatch.delitem(sys.modules, "gated_gpu", raising=False)
    network, x = case(Cell("gru"), batch=1, readout=None, gate_rule="softmax")
    found = importlib.import_module("gated_gpu").phases(network, x)
    assert "gated_layer" in emulated.launched
    assert tuple(found["cycles"]) == tables.PHASES and found["resident_block_rows"] == found["block_rows"] == 3
    assert all(0 <= each["mean"] <= each["largest"] for each in found["cycles"].values())


def cancelling(matrix: str) -> Network:
    """A network whose logits of one matrix are 1 and -1, both chosen, as long as its units are silent."""
    network = Network.random([2], inputs=2, readout=2, rng=np.random.default_rng(0), threshold=0.05)
    weights = network.matrices()[matrix]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        blocks = GatedBlocks.from_weights(
            weights,
            block=(1, weights.shape[1]),
            density=1.0,
            gate=np.zeros((2, 2), np.float32),
            gate_bias=np.array([1, -1], np.float32),
        )
    return network.with_matrices({matrix: blocks})


def check_cancelling(matrix: str) -> None:
    network, x = cancelling(matrix), np.ones((1, 1, 2), np.float32)
    simulator = Simulator(network, backend="cuda")
    with pytest.raises(FloatingPointError, match=f"{matrix}: the gates of its blocks are not finite for some input"):
        simulator.run(x)
    assert_same_state(simulator.state, Simulator(network).state)
    softmax = replace(network.matrices()[matrix], gate_rule="softmax")
    network = network.with_matrices({matrix: softmax})
    assert same_bits(simulate(network, x, backend="cuda").output, simulate(network, x).output)


def test_emulated_gates_that_are_not_finite_stop_a_run_by_the_name_of_the_matrix(emulated):
    check_cancelling("layers.0.w_rec")


def test_blocks_that_do_not_fit_in_shared_memory_are_refused_before_a_run(monkeypatch, emulated):
    network, _ = case(CELLS[1])
    monkeypatch.setattr(type(emulated), "shared_bytes", 5_000)
    with pytest.raises(ValueError, match=r"cuda: gated blocks 3x4 of a matrix .* need [\d,]+ bytes of shared memory"):
        simulate(network, np.zeros((1, 1, 5), np.float32), backend="cuda")


# --- on a GPU -----------------------------------------------------------------------------------------------

# Options of `case`: one and two factors, both rules, blocks of one row and blocks that are cut, storages, and matrices
# of another format in the same layer. They share kernels, whose compilation takes most of the time.
DRAWN = [
    {"block": (32, 20), "units": (150, 70), "batch": 1},
    {"block": (50, 64), "gate_rule": "softmax", "rank": 7, "units": (150, 70), "batch": 3, "storage": "int8"},
    {"block": (7, 45), "units": (70,), "batch": 33, "density": 0.15},
    {"block": (1, 70), "units": (70, 33), "batch": 2, "gated": ("w_rec", "readout")},
    {"block": (16, 16), "units": (70, 33), "batch": 5, "gated": ("w_in",), "gate_rule": "softmax"},
    {"block": (50, 64), "units": (150, 70), "batch": 3, "gate_period": 4, "gate_rule": "softmax"},
    # Tiles of input matrices of one block row, with gates of one factor and of two; layers that choose alone.
    {"block": (40, 64), "units": (64,), "batch": 5, "gate_rule": "softmax"},
    {"block": (40, 64), "units": (64,), "batch": 5, "gate_rule": "softmax", "rank": 5},
    {"block": (32, 64), "units": (320, 150), "batch": 1, "gate_rule": "softmax", "rank": 5, "gate_period": 2},
]


def check_on_a_gpu(network: Network, x: np.ndarray) -> None:
    """One run, runs of chunks and single steps have the bits, the counts and the state of the CPU."""
    expected = simulate(network, x, record=RECORDABLE)
    assert_same(expected, simulate(network, x, backend="cuda", record=RECORDABLE))
    simulator = Simulator(network, batch=x.shape[1], backend="cuda")
    cut, steps = len(x) // 2, len(x) - 3
    parts = [simulator.run(x[:cut]).output, simulator.run(x[cut:steps]).output]
    assert same_bits(expected.output, np.concatenate([*parts, [simulator.step(each) for each in x[steps:]]]))
    assert_same_state(expected.state, simulator.state)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS, ids=said)
def test_gated_blocks_on_a_gpu_have_the_bits_of_the_cpu(cell):
    for options in DRAWN:
        check_on_a_gpu(*case(cell, inputs=40, readout=30, steps=20, **options))


@pytest.mark.gpu
@pytest.mark.parametrize(("units", "block", "storage"), [(1536, (128, 128), "float32"), (96, (4, 4), "bfloat16")])
def test_wide_gated_blocks_on_a_gpu_have_the_bits_of_the_cpu(units, block, storage):
    # More blocks than threads in the last case.
    for batch in (1, 9):
        sizes = {"units": (units,), "inputs": 64, "readout": None, "steps": 9, "batch": batch}
        options = {"block": block, "storage": storage, "density": 0.5, "gate_rule": "softmax"}
        check_on_a_gpu(*case(Cell("lstm"), **sizes, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_wide_layers_of_which_every_block_computes_all_logits_on_a_gpu_have_the_bits_of_the_cpu(cell):
    sizes = {"units": (1536,), "inputs": 64, "readout": None, "steps": 12, "batch": 1, "block": (128, 128)}
    for options in ({"storage": "float32"}, {"storage": "bfloat16", "gate_period": 4}):
        check_on_a_gpu(*case(Cell(cell), **sizes, **options, rank=16, density=0.5, gate_rule="softmax"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("units", "storage"), [(1536, "float32"), (1350, "float32"), (1024, "bfloat16"), (530, "int8")]
)
def test_wide_dense_layers_of_one_sample_on_a_gpu_have_the_bits_of_the_cpu(units, storage):
    for cell in (Cell("gru"), Cell("lstm")):
        network, x = case(cell, units=(units,), inputs=64, readout=7, steps=9, batch=1, gated=(), storage=storage)
        check_on_a_gpu(network, x)
        assert simulate(network, x, backend="cuda").paths["layers.0.w_rec"].startswith("dense")


@pytest.mark.gpu
@pytest.mark.parametrize("matrix", ["layers.0.w_in", "layers.0.w_rec", "readout"])
def test_gates_on_a_gpu_that_are_not_finite_stop_a_run_by_the_name_of_the_matrix(matrix):
    check_cancelling(matrix)
