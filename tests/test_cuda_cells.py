"""Every cell on the GPU: the kernel of the general plan, thread by thread in plain Python, and on a GPU.

The emulation (`support/emulated_gpu.py`) runs the same kernel code with all its votes, barriers and polls.
"""

from __future__ import annotations

import numpy as np
import pytest

from eventrnn.backend import BackendUnavailable
from eventrnn.cells import Cell
from eventrnn.cuda import CudaBackend, matrix, plan, tables
from eventrnn.network import Network
from eventrnn.pruning import nm_mask
from eventrnn.simulation import RECORDABLE, Simulator, simulate
from eventrnn.testing import ALL_CELLS
from eventrnn.weights import convert
from support import emulated_gpu, fake_gpu
from support.conformance import assert_same, assert_same_state, same_bits
from support.ptx import check_ptx, compiler

PLAIN_CELLS = [cell for cell in ALL_CELLS if not cell.thresholded]

# The emulation replaces them.
SINGLE, PRODUCTS = plan.Plan.single, matrix.Matrix.products


def said(value) -> str | None:
    return f"{value.name}-{value.variant}" if isinstance(value, Cell) else None


def case(
    cell: Cell, format: str = "dense", *, units=(9, 6), inputs=5, steps=4, batch=2, storage="float32"
) -> tuple[Network, np.ndarray]:
    """A network of layers of one cell with a read-out, its weights in a format, and inputs of which some are zero."""
    rng = np.random.default_rng(len(format) + sum(units))
    # Of these cells only an EGRU takes a threshold; it then sends few events.
    options = {"threshold": 0.1} if cell.thresholded else {}
    network = Network.random(units, inputs=inputs, readout=4, rng=rng, cell=cell, **options)

    def formatted(weights):
        n, m = weights.shape
        kept = np.repeat(rng.random((n, -(-m // 16))) < 0.6, 16, axis=1)[:, :m] | (format == "dense")
        if format == "nm":
            kept = nm_mask(weights.to_dense(), 2, 4, "pre")
        block, nm = (1, min(m, 16)) if format == "block" else None, (2, 4, "pre") if format == "nm" else None
        dense = (2 * weights.to_dense() * kept).astype(np.float32)
        return convert(dense, format, block=block, nm=nm, storage=storage)

    network = network.with_matrices({name: formatted(w) for name, w in network.matrices().items()})
    x = rng.standard_normal((steps, batch, inputs)) * (rng.random((steps, batch, inputs)) < 0.7)
    return network, x.astype(np.float32)


@pytest.fixture
def emulated(monkeypatch):
    """A fake GPU on which the kernels of layers run as they are, in plain Python."""
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    return emulated_gpu.install(monkeypatch)


@pytest.fixture
def emulated_single_stream(monkeypatch, emulated):
    """The same, with plans for a single stream and the warps that they need."""
    monkeypatch.setattr(plan.Plan, "single", SINGLE)
    monkeypatch.setattr(plan, "_warps", lambda *arguments: 8)
    return emulated


@pytest.mark.parametrize(
    ("cell", "kind"), list(zip(PLAIN_CELLS, (tables.DENSE, tables.MASKED, tables.DENSE), strict=True)), ids=said
)
def test_kernels_of_plain_cells_compile_without_contraction(cell, kind):
    compiled = compiler()
    from eventrnn.cuda.kernels.persistent import layers_kernel

    check_ptx(compiled(layers_kernel((cell.name, cell.variant), (tables.layout_code(kind, False, True),))))


@pytest.mark.parametrize(("storage", "units"), [("float32", 60), ("bfloat16", 61)])
def test_emulated_kernel_of_a_single_stream_has_the_bits_of_the_specification(emulated_single_stream, storage, units):
    network, x = case(ALL_CELLS[0], units=(units,), batch=1, steps=4, storage=storage)
    expected = simulate(network, x, backend="reference", record=RECORDABLE)
    got = simulate(network, x, backend="cuda", record=RECORDABLE)
    assert "single_kernel" in emulated_single_stream.launched
    # More events than a group of terms, and a group that is not full.
    assert np.diff(expected.events[0].indptr).max() > 16
    assert_same(expected, got)


# 250 inputs send more events than a warp looks up together, and 90 gate rows are no whole number of strips.
@pytest.mark.parametrize(("inputs", "storage"), [(250, "bfloat16"), (40, "float32")])
def test_emulated_products_of_rows_have_the_bits_of_the_specification(monkeypatch, emulated, inputs, storage):
    monkeypatch.setattr(matrix.Matrix, "products", PRODUCTS)
    monkeypatch.setattr(matrix, "WARPS", emulated_gpu.WARPS)
    network, x = case(ALL_CELLS[0], "block", units=(30,), inputs=inputs, storage=storage, steps=2)
    expected = simulate(network, x, backend="reference", record=RECORDABLE)
    got = simulate(network, x, backend="cuda", record=RECORDABLE)
    assert "products" in emulated.launched
    assert (np.count_nonzero(x, axis=2).max() > tables.EVENTS_PER_WARP) == (inputs == 250)
    assert_same(expected, got)


@pytest.mark.parametrize(
    ("cell", "format"), list(zip(ALL_CELLS, ("csr", "dense", "dense", "csr", "block"), strict=True)), ids=said
)
def test_emulated_kernel_has_the_bits_of_the_specification(emulated, cell, format):
    network, x = case(cell, format)
    expected = simulate(network, x, backend="reference", record=RECORDABLE)
    got = simulate(network, x, backend="cuda", record=RECORDABLE)
    assert "layers_kernel" in emulated.launched
    assert 0 < np.mean(expected.activity) <= 1
    assert_same(expected, got)


def test_a_run_with_states_leaves_the_table_that_a_graph_reads(emulated):
    network, x = case(Cell("gru"), units=(3,), steps=1, batch=1)
    simulator = Simulator(network, backend="cuda")
    simulator.run(x)
    (run,) = simulator.engine.runs.values()
    before = dict(run.buffers.tables)
    simulator.run(x, record="states")
    assert all(run.buffers.tables[key] is table for key, table in before.items()) and before


@pytest.mark.parametrize("cell", PLAIN_CELLS, ids=said)
def test_runs_steps_and_states_of_plain_cells_go_through_the_engine(monkeypatch, cell):
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    fake_gpu.install(monkeypatch)
    network, x = case(cell, steps=7, batch=3)
    expected = simulate(network, x, backend="reference", record=RECORDABLE)
    simulator = Simulator(network, batch=3, backend="cuda")
    first = simulator.run(x[:3], record=RECORDABLE)
    steps = [simulator.step(each) for each in x[3:]]
    assert same_bits(expected.output, np.concatenate([first.output, steps]))
    assert_same_state(expected.state, simulator.state)
    # Layers of several kinds go one after the other.
    mixed = Network((network.layers[0], case(Cell(), inputs=9)[0].layers[0]), None, None)
    assert_same(
        simulate(mixed, x, backend="reference", record=RECORDABLE),
        simulate(mixed, x, backend="cuda", record=RECORDABLE),
    )


@pytest.mark.parametrize("cell", PLAIN_CELLS, ids=said)
def test_plain_cells_stay_exact_where_tensor_cores_are_allowed(monkeypatch, cell):
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    fake_gpu.install(monkeypatch)
    network, x = case(cell, batch=6)
    result = simulate(network, x, backend=CudaBackend(exact=False))
    assert result.paths["layers.0.w_rec"].endswith(f", exact: tensor cores run EGRU cells only, not {cell.name!r}")
    assert same_bits(simulate(network, x, backend="reference").output, result.output)


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("format", "storage"), [("dense", "float32"), ("csr", "bfloat16"), ("block", "int8"), ("nm", "float32")]
)
@pytest.mark.parametrize("cell", PLAIN_CELLS, ids=said)
def test_plain_cells_on_a_gpu_have_the_bits_of_the_cpu(cell, format, storage):
    # One test for all batches, which share their kernels.
    for batch in (1, 3, 70):
        network, x = case(cell, format, units=(333, 70), inputs=40, steps=30, batch=batch, storage=storage)
        expected = simulate(network, x, record=RECORDABLE)
        assert_same(expected, simulate(network, x, backend="cuda", record=RECORDABLE))
        simulator = Simulator(network, batch=batch, backend="cuda")
        parts = [simulator.run(x[:9]).output, simulator.run(x[9:25]).output, [simulator.step(each) for each in x[25:]]]
        assert same_bits(expected.output, np.concatenate(parts))
        assert_same_state(expected.state, simulator.state)


@pytest.mark.gpu
def test_wide_cells_on_a_gpu_have_the_bits_of_the_cpu():
    # Weights that do not fit in shared memory, and more samples than one group has.
    for batch in (1, 20):
        network, x = case(Cell("lstm"), units=(1536,), inputs=64, steps=5, batch=batch)
        assert_same(simulate(network, x, record=RECORDABLE), simulate(network, x, backend="cuda", record=RECORDABLE))
