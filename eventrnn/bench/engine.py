"""The engine from within: one product by itself, which rows a run reads, and a probe that only reads them.

With `kernels.py`, all of the benchmark that knows how the engine packs and walks weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from eventrnn import cpu
from eventrnn.bench.kernels import products
from eventrnn.cpu import CpuEngine
from eventrnn.events import Events
from eventrnn.network import Layer, Network, Simulation, simulate
from eventrnn.observe import senders
from eventrnn.packing import (
    BLOCKS,
    EVERY_FROM,
    ITEMSIZE,
    KIND,
    MASKED,
    PITCH,
    POINTERS,
    ROW_TILES,
    ROWS,
    STORAGE,
    WIDTH,
)
from eventrnn.plan import BIAS_REC, END, IN, REC, REC_GATED, Plan, product_scratch
from eventrnn.traverse import read_rows
from eventrnn.weights import Dense, Weights


class Product:
    """One matrix and the events that arrive: drive[b] = sum over fired j of weights[j] * value[b, j], a step.

    weights : (N, 3N), any format; packed as the engine packs recurrent weights for that batch
    events  : (steps, batch, N)
    """

    def __init__(self, weights: Weights, events: Events, threads: int = 1):
        self.weights, self.events, self.threads = weights, events, threads
        self.steps, self.batch, n = events.shape
        zeros = np.zeros(3 * n, np.float32)
        unused = Dense(np.zeros((1, 3 * n), np.float32))
        network = Network((Layer(unused, weights, zeros, zeros, np.zeros(n, np.float32)),))
        engine = CpuEngine(network, threads)
        self.plan, self.pitch, self.n = engine.plan(1, self.batch), engine.pitch, n
        layer = self.plan.layers[0]
        self.span = int(layer[REC]), int(layer[END])
        self.drive = np.zeros(self.batch * self.pitch, np.float32)
        self.arguments = (
            *(
                *self.span,
                self.plan.values,
                self.plan.index,
                self.plan.pointers,
                engine.layout.biases,
                int(layer[BIAS_REC]),
            ),
            *(n, events.indices, events.values, events.indptr[:-1].copy(), np.diff(events.indptr)),
        )
        self.scratch = product_scratch(threads, n, self.batch, engine.pieces)
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def run(self, start: int = 0, stop: int | None = None) -> None:
        """Every step from `start` to `stop` (all), inside one compiled call a thread; threads never wait."""
        stop = self.steps if stop is None else stop

        def share(part: int) -> None:
            products(
                self.plan.windows[part], *self.arguments, start, stop, self.batch,
                *(each[part] for each in self.scratch), self.drive, self.pitch,
            )  # fmt: skip

        if self.pool is None:
            share(0)
        else:
            list(self.pool.map(share, range(self.threads)))

    def result(self, t: int) -> np.ndarray:
        """The drives of step t, (batch, 3N)."""
        self.run(t, t + 1)
        drives, layout = self.drive.reshape(self.batch, self.pitch), self.plan.layout
        result = np.zeros((self.batch, 3 * self.n), np.float32)
        for segment in (each for part in range(self.threads) for each in layout.segments(0, part, 0, 3)):
            width = segment.stop - segment.start
            result[:, segment.start : segment.stop] = drives[:, segment.position : segment.position + width]
        return result

    def reads(self) -> list[Reads]:
        """What a run reads."""
        # Many windows take turns within a step; of a single one the probe, like us, needs one call for all steps.
        per_chunk = 1 if self.span[1] - self.span[0] > 1 else self.steps
        return [_reads(self.plan, self.span, self.events, self.batch, per_chunk)]


@dataclass(frozen=True)
class Reads:
    """The weight rows that a run reads from one matrix, in groups; a group reads a row once.

    Attributes
    ----------
    windows     : of the engine's plan, each read by every group
    indptr, ids : units read by each group
    per_chunk   : groups in a chunk of time
    nbytes      : values and indices of all these rows, over all threads
    """

    windows: range
    indptr: np.ndarray
    ids: np.ndarray
    per_chunk: int
    nbytes: int


def rows_read(engine: CpuEngine, network: Network, simulation: Simulation) -> list[Reads]:
    """What the engine reads in a recorded run, in its order: a layer's chunk of inputs, then its recurrent steps.

    An input product shares rows over its chunk, a recurrent one over the batch of a step (see `propagate_all`).
    """
    batch, chunk = simulation.batch, engine.chunk_steps(simulation.batch)
    plan, received = engine.plan(simulation.steps, batch), senders(network, simulation)
    return [
        _reads(plan, (int(layer[a]), int(layer[b])), received[f"layers.{k}.{name}"][1], rows, chunk * batch // rows)
        for k, layer in enumerate(plan.layers)
        for a, b, name, rows in (
            (IN, REC, "w_in", chunk * batch),
            (REC, REC_GATED, "w_rec", batch),
            (REC_GATED, END, "w_rec", batch),
        )
        if layer[a] != layer[b]
    ]


def _reads(plan: Plan, span: tuple[int, int], events: Events, rows: int, per_chunk: int) -> Reads:
    total, units = events.shape[0] * events.shape[1], events.shape[2]
    windows = [window for part in plan.windows for window in part[slice(*span)]]
    shared = windows[0][KIND] == ROW_TILES
    groups = []
    for at in range(0, total, rows):
        last = min(at + rows, total)
        sent = events.indices[events.indptr[at] : events.indptr[last]]
        if windows[0][KIND] == ROW_TILES and len(sent) >= windows[0][EVERY_FROM] * (last - at):
            sent = np.arange(units, dtype=np.int32)
        groups.append(np.unique(sent) if shared else sent)
    ids = np.concatenate([*groups, np.zeros(0, np.int32)])
    per_unit = np.sum([_unit_bytes(plan, window, units) for window in windows], axis=0)
    return Reads(range(*span), np.cumsum([0, *map(len, groups)]), ids, per_chunk, int(per_unit[ids].sum()))


def _unit_bytes(plan: Plan, window: np.ndarray, units: int) -> np.ndarray:
    """Bytes of values and indices that a window holds of each unit, (units,): what is read when it fires."""
    kind, size, p0 = window[KIND], ITEMSIZE[window[STORAGE]], window[POINTERS]
    if kind in (ROWS, ROW_TILES):
        return np.full(units, window[WIDTH] * size)
    if kind == BLOCKS:
        first, last, _ = plan.pointers[p0 : p0 + 3 * units].reshape(units, 3).T
        return (last - first) * (window[WIDTH] * size + 4)
    stored = np.diff(plan.pointers[p0 : p0 + units + 1])
    return stored * size + 2 * window[PITCH] if kind == MASKED else stored * (size + 2)


def probe(plan: Plan, reads: Sequence[Reads]) -> Callable[[], object]:
    """A run that reads those rows, with as many threads as the plan has, and does nothing else."""
    workers = ThreadPoolExecutor(plan.parts)
    pools = plan.values, plan.index, plan.pointers

    def share(part: int) -> None:
        for at in range(max(-(-(len(r.indptr) - 1) // r.per_chunk) for r in reads)):
            for r in reads:
                start, stop = (min(k * r.per_chunk, len(r.indptr) - 1) for k in (at, at + 1))
                for window in r.windows:
                    read_rows(plan.windows[part, window], *pools, r.indptr, r.ids, start, stop)

    # One thread reads without the hand-over to a pool, as the engine does.
    return (lambda: share(0)) if plan.parts == 1 else (lambda: list(workers.map(share, range(plan.parts))))


def first_call() -> dict:
    """Seconds until the first answer of the cpu engine in this process, and whether kernels came from the cache."""
    network = Network.random([8], inputs=4, rng=np.random.default_rng(0))
    started = time.perf_counter()
    simulate(network, np.zeros((1, 1, 4), np.float32))
    seconds = time.perf_counter() - started
    hits = sum(cpu.run.stats.cache_hits.values())
    return {"first_call_seconds": seconds, "kernels_from_cache": bool(hits), "kernel_cache": cpu.run.stats.cache_path}
