"""The CPU engine: all layers and all steps inside one compiled call, state in and state out.

Time runs in chunks that stay in cache. Within a chunk each layer first takes its whole input (no step waits for
another there), then walks its steps: recurrent product, cell update, events. Only units that fired are read.

Threads split the outputs of a product and the units of an update, never a sum, and meet at a spin barrier; so the
bits do not depend on their number. Kernels allocate nothing, but for BLAS. `packing.py` explains the tables.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from eventrnn.backend import HostInputs, as_array, need_on_host
from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.memory import aligned_zeros
from eventrnn.cpu.packing import check_format
from eventrnn.cpu.plan import BLAS_PRODUCT, Choice, Layout, Plan, product_scratch
from eventrnn.cpu.stepper import Stepper
from eventrnn.cpu.tables import PIECES
from eventrnn.cpu.threads import started
from eventrnn.state import FireCounts, Inputs, State, Trace
from eventrnn.weights import MatrixId

if TYPE_CHECKING:
    from eventrnn.network import Network
from eventrnn.cpu.kernels.time_loop import run, step

# A chunk's input drives should fit a share of the L2 cache.
CHUNK_BYTES = 1 << 20

LONGEST_CHUNK = 64

# Chunks between two looks at which way products go.
RECHECK = 16

MOST_PLANS = 4

USUAL_ACTIVITY = 0.1

# More than a machine for this package has; every one spins at the barriers.
MOST_THREADS = 64


class CpuBackend:
    """Numba on this machine's cores; the exact tier."""

    name = "cpu"
    exact = True

    def engine(self, network: Network, *, threads: int = 1) -> CpuEngine:
        """Pack the weights, one window a thread. Cost: one pass over the weights, as much memory again."""
        return CpuEngine(network, threads)


class CpuEngine:
    """A network packed for `run`; keeps its scratch between calls, so one engine serves one run at a time.

    Weights are packed at the first run of each kind. Which way a product goes, `choice` says from how many drives it
    has and how active its senders were so far; looked at again every `RECHECK` chunks of time.
    """

    dense = False

    def __init__(self, network: Network, threads: int, choice: Choice | None = None):
        if not 1 <= threads <= MOST_THREADS:
            raise ValueError(f"threads: got {threads}, need 1 to {MOST_THREADS}; more than the cores only wait")
        for name, weights in network.matrices().items():
            check_format(name, weights)
        self.network, self.parts, self.choice = network, threads, choice or Choice()
        self.host_inputs = HostInputs(network)
        self.units = [layer.units for layer in network.layers]
        self.output_size = self.units[-1] if network.readout is None else network.readout.weights.shape[1]
        self.plans: dict[tuple, Plan] = {}
        self.layout = Layout(network, threads)
        self.threshold = np.concatenate([layer.threshold for layer in network.layers])
        self.pitch, self.pieces = self.layout.pitch, self.layout.pitch // min(PIECES)
        self.pool = started(threads - 1) if threads > 1 else None
        self.scratch_batch = 0
        # Of the input, then of each layer: events a unit and step. Until something is known, as published networks.
        self.activity = [USUAL_ACTIVITY] * (len(self.units) + 1)

    def plan(self, steps: int, batch: int) -> Plan:
        """The weights as a run of that size wants them."""
        many, last = min(steps, self.chunk_steps(batch)) * batch, len(self.units)
        matrices, rows, active = self.network.matrices(), {}, {}
        for name in map(MatrixId, matrices):
            k = last if name.layer is None else name.layer + name.recurrent
            rows[name], active[name] = batch if name.recurrent else many, self.activity[k]
        picks = {name: self.choice.pick(w, rows[name], active[name]) for name, w in matrices.items()}
        every_from = {name: self.choice.every_from(rows[name]) for name in matrices}
        key = (*picks.values(), *every_from.values())
        if key not in self.plans:
            while len(self.plans) >= MOST_PLANS:
                del self.plans[next(iter(self.plans))]
            self.plans[key] = Plan(self.network, self.layout, picks, every_from)
        return self.plans[key]

    def chunk_steps(self, batch: int) -> int:
        """Time steps that go through a layer together."""
        return max(1, min(LONGEST_CHUNK, CHUNK_BYTES // (4 * batch * self.pitch)))

    def _scratch(self, batch: int) -> tuple[np.ndarray, ...]:
        if batch != self.scratch_batch:
            chunk = self.chunk_steps(batch)
            rows, widest = chunk * batch, max(self.units)
            if rows * self.pitch > np.iinfo(np.int32).max:
                raise ValueError(
                    f"batch: got {batch}, whose {rows * self.pitch:,} drives are too many; split the batch"
                )
            lists, most = 2 * (rows + batch), rows * max(widest, *(layer.inputs for layer in self.network.layers))
            wide = widest + 2 * LANES * self.parts
            self.scratch = (
                aligned_zeros(rows * self.pitch, np.float32),
                aligned_zeros(batch * self.pitch, np.float32),
                np.zeros(lists * wide, np.int32),
                np.zeros(lists * wide, np.float32),
                np.zeros(lists * self.parts, np.int64),
                np.zeros(lists * self.parts, np.int64),
                np.zeros((self.parts, rows), np.int64),
                np.zeros((self.parts, rows), np.int64),
                np.zeros((self.parts, batch * wide), np.int32),
                np.zeros((self.parts, batch * wide), np.float32),
                *product_scratch(self.parts, most // rows, rows, self.pieces, self.pitch * self.choice.may_blas),
            )
            # Last: without memory for it, the next run must not take the old one for this batch.
            self.chunk, self.scratch_batch = chunk, batch
        return self.scratch

    def prepare(self, inputs: Any) -> Inputs:
        """See `backend.Engine`. Numbers become events."""
        return self.host_inputs.prepare(inputs)

    def run(self, inputs: Inputs, state: State, *, record_events: bool = False, record_states: bool = False) -> Trace:
        """See `backend.Engine`. Memory beyond the outputs does not depend on the number of steps."""
        rows, total = inputs.steps * inputs.batch, sum(self.units)
        table, row_of = inputs.event_table, inputs.rows
        # Copies: the kernel works in place.
        c = np.concatenate([x.ravel() for x in state.cells], dtype=np.float32)
        y = np.concatenate([x.ravel() for x in state.outputs], dtype=np.float32)
        output = np.empty(rows * self.output_size, np.float32)
        events = np.empty(rows * total if record_events else 0, np.float32)
        states = np.empty(rows * total if record_states else 0, np.float32)
        graded, binary = np.zeros(total, np.int64), np.zeros(total, np.int64)
        scratch, layout, paths = self._scratch(inputs.batch), self.layout, {}
        if rows:
            self.activity[0] = float(np.diff(table.indptr)[row_of].mean()) / max(1, inputs.size)
        begin, ahead = 0, self.chunk
        while begin < inputs.steps:
            end = min(inputs.steps, begin + ahead)
            plan = self.plan(end - begin, inputs.batch)
            self._run(
                BLAS_PRODUCT in plan.picks.values(),
                *(plan.layers, plan.windows, plan.values, plan.index, plan.pointers, layout.biases, self.threshold),
                *(plan.readout, layout.starts[-1], table.indptr, table.indices, table.values, row_of),
                *(inputs.steps, begin, end, inputs.batch, self.chunk, layout.edges, layout.bases, self.pitch, *scratch),
                *(c, y, output, events, states, graded, binary),
            )
            fired = self._by_layer(graded + binary)
            self.activity[1:] = [float(f.sum()) / (end * inputs.batch * len(f)) for f in fired]
            paths.update(plan.picks)
            begin, ahead = end, RECHECK * self.chunk
        return Trace(
            output.reshape(inputs.steps, inputs.batch, self.output_size),
            State(self._by_layer(c, inputs.batch), self._by_layer(y, inputs.batch)),
            tuple(map(FireCounts, self._by_layer(graded), self._by_layer(binary))),
            self._by_layer(events, inputs.steps, inputs.batch) if record_events else (),
            self._by_layer(states, inputs.steps, inputs.batch) if record_states else (),
            paths,
        )

    def _run(self, with_blas: bool, *arguments) -> None:
        # The team is ours: BLAS must not bring one of its own.
        limits = threadpool_limits(limits=1, user_api="blas") if with_blas else nullcontext()
        barrier = np.zeros(1, np.int64)
        with limits:
            if self.pool is None:
                run(0, 1, barrier, *arguments)
                return
            # This thread is the first of the team.
            others = [self.pool.submit(run, part, self.parts, barrier, *arguments) for part in range(1, self.parts)]
            run(0, self.parts, barrier, *arguments)
            for other in others:
                other.result()

    def stepper(self, state: State) -> Stepper | None:
        """Single steps on one thread; with more, a step is a run."""
        if self.parts > 1:
            return None
        batch, network = state.batch, self.network
        c, y = (np.concatenate([x.ravel() for x in part]).astype(np.float32) for part in (state.cells, state.outputs))
        scratch, plan, layout = self._scratch(batch), self.plan(1, batch), self.layout
        total, size = sum(self.units), network.layers[0].inputs
        symbols = network.embedding is not None
        numbers = np.array(
            [batch, self.chunk, self.pitch, len(self.units), plan.windows.shape[1], plan.readout, layout.starts[-1]]
        )
        if symbols:
            table = self.host_inputs.symbol_events
            lists = (table.indptr, table.indices, table.values)
        else:
            most = batch * size + LANES
            lists = (np.zeros(batch + 1, np.int64), np.zeros(most, np.int32), np.zeros(most, np.float32))
        before = np.empty_like(c), np.empty_like(y)
        arrays = [
            *(numbers, np.zeros(1, np.int64), plan.layers, plan.windows, plan.values, plan.index, plan.pointers),
            *(layout.biases, self.threshold, layout.edges, layout.bases, *scratch[:10]),
            *(np.zeros(total, np.int64), np.zeros(total, np.int64), np.arange(batch), c, y, *before),
            *(np.zeros(0, np.float32), *scratch[10:], *lists),
        ]

        dense_inputs = HostInputs(network, dense=True)

        def check(inputs) -> np.ndarray:
            need_on_host(inputs)
            prepared = dense_inputs.prepare(as_array(inputs)[None])
            if prepared.batch != batch:
                raise ValueError(f"inputs: got a batch of {prepared.batch}, but the simulator was made for {batch}")
            return prepared.values[0]

        return Stepper(
            step, arrays, c, y, before,
            by_layer=lambda flat: self._by_layer(flat, batch),
            check=check,
            dtype=np.int64 if symbols else np.float32,
            shape=(batch,) if symbols else (batch, size),
            output_shape=(batch, self.output_size),
        )  # fmt: skip

    def _by_layer(self, flat: np.ndarray, *leading: int) -> tuple[np.ndarray, ...]:
        """Views (*leading, N) of each layer's share."""
        rows, parts, at = math.prod(leading), [], 0
        for n in self.units:
            parts.append(flat[at : at + rows * n].reshape(*leading, n))
            at += rows * n
        return tuple(parts)
