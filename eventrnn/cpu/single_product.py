"""One sparse product by itself, for benchmarks, for the crossover map, and for tables of input products."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from eventrnn.cells import Cell
from eventrnn.cpu.engine import CpuEngine
from eventrnn.cpu.kernels.products import product_address, update_addresses
from eventrnn.cpu.kernels.spmm import propagate_steps
from eventrnn.cpu.memory import aligned_zeros
from eventrnn.cpu.plan import FORMAT, KernelPolicy, PackedWeights, Plan, Selected, workspace
from eventrnn.cpu.tables import BIAS_IN, IN, IN_END, EventLists, ThreadTables, Workspace
from eventrnn.events import Events
from eventrnn.network import Layer, Network
from eventrnn.weights import CSR, GatedBlocks, Weights


class Product:
    """One matrix and the events that it receives: per step, drive[b] = bias + sum over events j of
    weights[j] * value[b, j].

    weights : (I, G N), in any format; packed as the engine packs the input weights of a layer of N units with G gates,
              for that batch and activity
    events  : (steps, batch, I)
    threads : number of threads
    policy  : selects the kernel; by default the rules of thumb of `KernelPolicy`
    plan    : the plan of another product of the same weights, which saves packing them again
    bias    : (G N,) float32; by default zeros
    cell    : the cell of the layer, which gives G
    """

    def __init__(
        self,
        weights: Weights,
        events: Events,
        threads: int = 1,
        policy: KernelPolicy | None = None,
        plan: Plan | None = None,
        bias: np.ndarray | None = None,
        cell: Cell = Cell(),
    ):
        if isinstance(weights, GatedBlocks) and weights.gate_period > 1:
            raise ValueError(
                f"weights: got {weights!r}, but a product by itself has no step before it whose gates it could share; "
                "give gate_period=1, or run a network"
            )
        self.weights, self.events, self.threads, self.gates = weights, events, threads, cell.gates
        self.steps, self.batch, n_pre = events.shape
        self.n_pre, self.columns = n_pre, weights.shape[1]
        units, zeros = self.columns // cell.gates, np.zeros(self.columns, np.float32)
        unused = CSR(
            np.zeros(units + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32), (units, self.columns)
        )
        given = zeros if bias is None else bias
        network = Network((Layer(weights, unused, given, zeros, np.zeros(units, np.float32), cell),))
        engine = CpuEngine(network, threads, policy)
        if plan is None:
            active = len(events.indices) / max(1, self.steps * self.batch * n_pre)
            w_in, w_rec = network.matrices()
            # The matrix that is not used is not made dense, whatever the policy is.
            kernels = {w_in: engine.policy.select(weights, self.batch, active), w_rec: Selected(FORMAT)}
            packed = PackedWeights(
                network, engine.layout, {name: [each] for name, each in kernels.items()}, product_address
            )
            plan = Plan(network, packed, kernels, kernels, update_addresses)
        self.plan, self.pitch = plan, engine.drive_pitch
        layer = self.plan.layers[0]
        self.span = int(layer[IN]), int(layer[IN_END])
        # As in the engine: a vector across two cache lines takes twice as long to store.
        self.drive = aligned_zeros(self.batch * self.pitch, np.float32)
        self.bias_begin = int(layer[BIAS_IN])
        self.lists = EventLists(events.indices, events.values, events.indptr[:-1].copy(), np.diff(events.indptr))
        blas_columns = engine.drive_pitch * engine.policy.may_blas
        shared = workspace(threads, n_pre, self.batch, engine.max_segments, blas_columns, engine.gated_blocks)
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
                tables, *self.span, self.bias_begin, self.n_pre, self.lists, start, stop, self.batch, self.drive
            )

        if self.pool is None:
            share(0)
        else:
            list(self.pool.map(share, range(self.threads)))

    def result(self, t: int) -> np.ndarray:
        """The drives of step t, (batch, G N)."""
        self.run(t, t + 1)
        drives, layout = self.drive.reshape(self.batch, self.pitch), self.plan.layout
        result = np.zeros((self.batch, self.columns), np.float32)
        for segment in (each for thread in range(self.threads) for each in layout.segments(0, thread, 0, self.gates)):
            width = segment.stop - segment.start
            result[:, segment.start : segment.stop] = drives[:, segment.position : segment.position + width]
        return result
