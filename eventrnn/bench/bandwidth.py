"""Read bandwidth: which weights a run of the CPU engine reads, and a probe that only reads the same weights.

This is the only file of the benchmarks that knows the plan and the packed tables of the CPU engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from eventrnn._integers import ceil_div
from eventrnn.backend import INTEGERS
from eventrnn.bench.kernels.probes import read_rows, read_through
from eventrnn.counting.counts import events_by_matrix
from eventrnn.cpu import engine as cpu
from eventrnn.cpu.engine import CpuEngine
from eventrnn.cpu.packing import PADDING
from eventrnn.cpu.plan import BY_STRIPS, FORMAT, KernelPolicy, Plan
from eventrnn.cpu.single_product import Product
from eventrnn.cpu.tables import (
    BLAS,
    BLOCKS,
    DENSE_FROM,
    END,
    FEW_BLOCKS,
    IN,
    IN_END,
    INDEX,
    ITEMSIZE,
    KIND,
    MASKED,
    PARTIAL,
    PARTIAL_END,
    PITCH,
    POINTERS,
    REC,
    REC_GATED,
    ROW_TILE,
    ROW_TILES,
    ROWS,
    SINGLE_TILES,
    SMALL_PANEL_BITS,
    STORAGE,
    WIDTH,
)
from eventrnn.events import Events
from eventrnn.network import Network
from eventrnn.simulation import Simulation, simulate
from eventrnn.weights import Weights


class ByUnits(KernelPolicy):
    """Selects kernels that read the weights unit by unit, as a probe does: the same bytes as others."""

    def select_kernel(self, weights: Weights, rows: int, activity: float) -> str:
        found = super().select_kernel(weights, rows, activity)
        return FORMAT if found == BY_STRIPS else found

    @staticmethod
    def served(plan: Plan) -> bool:
        """Whether a plan has such kernels only."""
        return {BY_STRIPS, INTEGERS}.isdisjoint(plan.kernel_by_matrix.values())


def product_reads(product: Product) -> list[Reads]:
    """The weight rows that a run of one product reads."""
    # Several column tiles take turns within a step. A single one is read in one call for all steps, as in the engine.
    per_chunk = 1 if product.span[1] - product.span[0] > 1 else product.steps
    return [_reads(product.plan, product.span, product.events, product.batch, per_chunk)]


@dataclass(frozen=True)
class Reads:
    """The weight rows that a run reads from one matrix, in groups. A group reads a row at most once.

    Attributes
    ----------
    windows     : indices of the matrix's windows in the engine's plan; every group reads all of them
    indptr, ids : ids[indptr[g] : indptr[g + 1]] are the units whose rows group g reads
    per_chunk   : groups per chunk of time
    nbytes      : bytes of values and indices of all these rows, over all threads
    """

    windows: range
    indptr: np.ndarray
    ids: np.ndarray
    per_chunk: int
    nbytes: int


def rows_read(engine: CpuEngine, network: Network, simulation: Simulation) -> list[Reads]:
    """The rows that the engine reads in a recorded run, in its order: per layer the input product, then the recurrent.

    The input product reads a row once per chunk of time, the recurrent product once per step of the batch (see
    `propagate_all` in cpu/kernels/spmm.py). Needs record="events".
    """
    batch, chunk = simulation.batch, engine.chunk_steps(simulation.batch)
    plan, received = engine.plan(simulation.steps, batch), events_by_matrix(network, simulation)
    total, found = simulation.steps * batch, []
    for k, layer in enumerate(plan.layers[:-1]):
        # Drive rows before a partial chunk with a kernel of its own.
        whole = total if layer[PARTIAL] == layer[IN] else total - total % (chunk * batch)
        spans = [
            (IN, IN_END, "w_in", chunk * batch, range(whole)),
            (PARTIAL, PARTIAL_END, "w_in", chunk * batch, range(whole, total)),
            (REC, REC_GATED, "w_rec", batch, range(total)),
            (REC_GATED, END, "w_rec", batch, range(total)),
        ]
        for first, last, name, rows, within in spans:
            if layer[first] != layer[last] and within:
                events, per_chunk = received[f"layers.{k}.{name}"][1], chunk * batch // rows
                found.append(_reads(plan, (int(layer[first]), int(layer[last])), events, rows, per_chunk, within))
    return found


def _reads(
    plan: Plan, span: tuple[int, int], events: Events, rows: int, per_chunk: int, within: range | None = None
) -> Reads:
    """The rows read by groups of so many drive rows; those not `within` some drive rows (default: all) read none."""
    total, units = events.shape[0] * events.shape[1], events.shape[2]
    some = range(total) if within is None else within
    windows = [window for part in plan.column_tiles for window in part[slice(*span)]]
    kind = windows[0][KIND]
    groups = []
    for at in range(0, total, rows):
        last = min(at + rows, total)
        if at not in some:
            groups.append(np.zeros(0, np.int32))
            continue
        sent = events.indices[events.indptr[at] : events.indptr[last]]
        if kind == ROW_TILES and len(sent) >= windows[0][DENSE_FROM] * (last - at):
            sent = np.arange(units, dtype=np.int32)
        if kind == SINGLE_TILES:
            # All units of a panel in which one is active.
            panels = np.arange(units, dtype=np.int32) >> SMALL_PANEL_BITS
            sent = np.flatnonzero(np.isin(panels, sent >> SMALL_PANEL_BITS)).astype(np.int32)
        groups.append(np.unique(sent) if kind in (ROW_TILES, SINGLE_TILES) else sent)
    ids = np.concatenate([*groups, np.zeros(0, np.int32)])
    per_unit = np.sum([_unit_bytes(plan, window, units) for window in windows], axis=0)
    return Reads(range(*span), np.cumsum([0, *map(len, groups)]), ids, per_chunk, int(per_unit[ids].sum()))


def _unit_bytes(plan: Plan, window: np.ndarray, units: int) -> np.ndarray:
    """Bytes of values and indices of each unit in a window, (units,): what is read with the unit."""
    kind, size, p0 = window[KIND], ITEMSIZE[window[STORAGE]], window[POINTERS]
    if kind in (ROWS, ROW_TILES, BLAS):
        return np.full(units, window[WIDTH] * size)
    if kind in (BLOCKS, FEW_BLOCKS):
        first, last, _ = plan.pools.pointers[p0 : p0 + 3 * units].reshape(units, 3).T
        return (last - first) * (window[WIDTH] * size + 4)
    if kind == SINGLE_TILES:
        first = plan.pools.pointers[p0 : p0 + ceil_div(units, 1 << SMALL_PANEL_BITS) + 1]
        positions = plan.pools.index[window[INDEX] :].view(np.uint16)[first[0] : first[-1]]
        panels = np.repeat(np.arange(len(first) - 1), np.diff(first))
        unit = (panels << SMALL_PANEL_BITS) + positions // ROW_TILE
        return np.bincount(unit, minlength=units) * (size + 2)
    stored = np.diff(plan.pools.pointers[p0 : p0 + units + 1])
    return stored * size + 2 * window[PITCH] if kind == MASKED else stored * (size + 2)


def probes(plan: Plan, reads: Sequence[Reads]) -> dict[str, Callable[[], object]]:
    """Two runs that only read, with the threads of the plan: "probe" and "probe straight".

    The first reads the given rows in their order. The second reads as many bytes of the same weights sequentially; it
    can be faster, because short rows cost more than their bytes.
    """
    workers = ThreadPoolExecutor(plan.n_threads)
    pools = plan.pools[:3]

    def share(part: int) -> None:
        for at in range(max(-(-(len(r.indptr) - 1) // r.per_chunk) for r in reads)):
            for r in reads:
                start, stop = (min(k * r.per_chunk, len(r.indptr) - 1) for k in (at, at + 1))
                for window in r.windows:
                    read_rows(plan.column_tiles[part, window], *pools, r.indptr, r.ids, start, stop)

    amount, pool = sum(r.nbytes for r in reads) // 4, len(plan.pools.values) - PADDING

    def straight(part: int) -> None:
        first, last = (pool * k // plan.n_threads for k in (part, part + 1))
        read_through(plan.pools.values, first, last, amount // plan.n_threads)

    def run(share: Callable[[int], None]) -> Callable[[], object]:
        # With one thread there is no hand-over to a thread pool, as in the engine.
        return (lambda: share(0)) if plan.n_threads == 1 else (lambda: list(workers.map(share, range(plan.n_threads))))

    return {"probe": run(share), "probe straight": run(straight)}


def first_call() -> dict:
    """Seconds of the first simulation in this process, and whether its kernels came from the cache."""
    network = Network.random([8], inputs=4, rng=np.random.default_rng(0))
    started = time.perf_counter()
    simulate(network, np.zeros((1, 1, 4), np.float32))
    seconds = time.perf_counter() - started
    hits = sum(cpu.run.stats.cache_hits.values())
    return {"first_call_seconds": seconds, "kernels_from_cache": bool(hits), "kernel_cache": cpu.run.stats.cache_path}
