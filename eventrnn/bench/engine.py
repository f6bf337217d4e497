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
from eventrnn.cpu import BIAS_REC, END, IN, REC, REC_GATED, CpuEngine, Plan
from eventrnn.events import Events
from eventrnn.network import Layer, Network, Simulation, simulate
from eventrnn.observe import senders
from eventrnn.packing import BLOCK_COLUMNS, HIGH, KIND, LOW
from eventrnn.traverse import read_rows, shares_rows
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
        per_step = np.diff(events.indptr[:: self.batch])
        most = int(per_step.max(initial=0))
        self.drive = np.zeros(self.batch * self.pitch, np.float32)
        self.arguments = (
            *(*self.span, self.plan.values, self.plan.index, self.plan.pointers, engine.biases, int(layer[BIAS_REC])),
            *(n, events.indices, events.values, events.indptr[:-1].copy(), np.diff(events.indptr)),
        )
        self.scratch = [
            (np.zeros(n + 2, np.int64), np.zeros(most, np.int32), np.zeros(most, np.float32)) for _ in range(threads)
        ]
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def run(self, start: int = 0, stop: int | None = None) -> None:
        """Every step from `start` to `stop` (all), inside one compiled call a thread; threads never wait."""
        stop = self.steps if stop is None else stop

        def share(part: int) -> None:
            products(
                self.plan.windows[part], *self.arguments, start, stop, self.batch, *self.scratch[part],
                self.drive, self.pitch,
            )  # fmt: skip

        if self.pool is None:
            share(0)
        else:
            list(self.pool.map(share, range(self.threads)))

    def result(self, t: int) -> np.ndarray:
        """The drives of step t, (batch, 3N)."""
        self.run(t, t + 1)
        return self.drive.reshape(self.batch, self.pitch)[:, : 3 * self.n].copy()

    def reads(self) -> list[Reads]:
        """What a run reads."""
        # Many windows take turns within a step; of a single one the probe, like us, needs one call for all steps.
        per_chunk = 1 if self.span[1] - self.span[0] > 1 else self.steps
        return [_reads(self.plan, self.span, self.weights, self.events, self.batch, per_chunk)]


@dataclass(frozen=True)
class Reads:
    """The weight rows that a run reads from one matrix, in groups; a group reads a row once.

    Attributes
    ----------
    windows     : of the engine's plan, each read by every group
    indptr, ids : units read by each group
    per_chunk   : groups in a chunk of time
    nbytes      : values and indices of all these rows, over all threads
    probed      : what the probe reads for them: of block columns, which it does not pick from, every block
    """

    windows: range
    indptr: np.ndarray
    ids: np.ndarray
    per_chunk: int
    nbytes: int
    probed: int


def rows_read(engine: CpuEngine, network: Network, simulation: Simulation) -> list[Reads]:
    """What the engine reads in a recorded run, in its order: a layer's chunk of inputs, then its recurrent steps.

    An input product shares rows over its chunk, a recurrent one over the batch of a step (see `propagate_all`).
    """
    batch, chunk = simulation.batch, engine.chunk_steps(simulation.batch)
    plan, received = engine.plan(simulation.steps, batch), senders(network, simulation)
    return [
        _reads(plan, (int(layer[a]), int(layer[b])), *received[f"layers.{k}.{name}"], rows, chunk * batch // rows)
        for k, layer in enumerate(plan.layers)
        for a, b, name, rows in (
            (IN, REC, "w_in", chunk * batch),
            (REC, REC_GATED, "w_rec", batch),
            (REC_GATED, END, "w_rec", batch),
        )
        if layer[a] != layer[b]
    ]


def _reads(plan: Plan, span: tuple[int, int], weights: Weights, events: Events, rows: int, per_chunk: int) -> Reads:
    total = events.shape[0] * events.shape[1]
    window = plan.windows[0, span[0]]
    columns = int(sum(w[HIGH] - w[LOW] for part in plan.windows for w in part[slice(*span)]))
    groups = [
        np.unique(events.indices[a:b]) if shares_rows(window[KIND], len(part)) else events.indices[a:b]
        for part in (range(at, min(at + rows, total)) for at in range(0, total, rows))
        for a, b in ((events.indptr[part[0]], events.indptr[part[-1] + 1]),)
    ]
    ids = np.concatenate([*groups, np.zeros(0, np.int32)])
    # The paper's variant cuts the row in two.
    share = columns / weights.shape[1]
    nbytes = probed = int(weights.row_bytes()[ids].sum() * share)
    if window[KIND] == BLOCK_COLUMNS:
        probed = int(weights.row_bytes().sum() * share) * len(groups)
    return Reads(range(*span), np.cumsum([0, *map(len, groups)]), ids, per_chunk, nbytes, probed)


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
