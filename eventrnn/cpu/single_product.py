"""One sparse product by itself, for benchmarks and for the crossover map."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from eventrnn.cpu.engine import CpuEngine
from eventrnn.cpu.kernels.spmm import propagate_steps
from eventrnn.cpu.plan import KernelPolicy, Plan, workspace
from eventrnn.cpu.tables import BIAS_REC, END, REC, EventLists, ThreadTables, Workspace
from eventrnn.events import Events
from eventrnn.network import Layer, Network
from eventrnn.weights import Dense, Weights


class Product:
    """One matrix and the events that it receives: per step, drive[b] = sum over events j of weights[j] * value[b, j].

    weights : (N, 3N), in any format; packed as the engine packs recurrent weights for that batch and activity
    events  : (steps, batch, N)
    threads : number of threads
    policy  : selects the kernel; by default the rules of thumb of `KernelPolicy`
    plan    : the plan of another product of the same weights, which saves packing them again
    """

    def __init__(
        self,
        weights: Weights,
        events: Events,
        threads: int = 1,
        policy: KernelPolicy | None = None,
        plan: Plan | None = None,
    ):
        self.weights, self.events, self.threads = weights, events, threads
        self.steps, self.batch, n = events.shape
        zeros = np.zeros(3 * n, np.float32)
        unused = Dense(np.zeros((1, 3 * n), np.float32))
        network = Network((Layer(unused, weights, zeros, zeros, np.zeros(n, np.float32)),))
        engine = CpuEngine(network, threads, policy)
        engine.activity[1] = len(events.indices) / max(1, self.steps * self.batch * n)
        self.plan, self.pitch, self.n = plan or engine.plan(1, self.batch), engine.drive_pitch, n
        layer = self.plan.layers[0]
        self.span = int(layer[REC]), int(layer[END])
        self.drive = np.zeros(self.batch * self.pitch, np.float32)
        self.bias_begin = int(layer[BIAS_REC])
        self.lists = EventLists(events.indices, events.values, events.indptr[:-1].copy(), np.diff(events.indptr))
        blas_columns = engine.drive_pitch * engine.policy.may_blas
        shared = workspace(threads, n, self.batch, engine.max_segments, blas_columns, engine.gated_blocks)
        workspaces = [Workspace(*(each[thread] for each in shared)) for thread in range(threads)]
        self.tables = [
            ThreadTables(tiles, self.plan.pools, scratch, self.pitch)
            for tiles, scratch in zip(self.plan.column_tiles, workspaces, strict=True)
        ]
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def run(self, start: int = 0, stop: int | None = None) -> None:
        """Run the steps `start` to `stop` (default: all) in one compiled call per thread; threads never wait."""
        stop = self.steps if stop is None else stop

        def share(thread: int) -> None:
            tables = self.tables[thread]
            propagate_steps(
                tables, *self.span, self.bias_begin, self.n, self.lists, start, stop, self.batch, self.drive
            )

        if self.pool is None:
            share(0)
        else:
            list(self.pool.map(share, range(self.threads)))

    def result(self, t: int) -> np.ndarray:
        """The drives of step t, (batch, 3N)."""
        self.run(t, t + 1)
        drives, layout = self.drive.reshape(self.batch, self.pitch), self.plan.layout
        result = np.zeros((self.batch, 3 * self.n), np.float32)
        for segment in (each for thread in range(self.threads) for each in layout.segments(0, thread, 0, 3)):
            width = segment.stop - segment.start
            result[:, segment.start : segment.stop] = drives[:, segment.position : segment.position + width]
        return result
