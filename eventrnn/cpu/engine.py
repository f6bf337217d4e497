"""The CPU engine: all layers and all steps of a run inside one compiled call, state in and state out.

Time runs in chunks whose drives stay in the cache. Within a chunk, each layer first computes the drives of its whole
input, for which no step waits; then it runs its steps: recurrent product, cell update, events. Only the weights of
units that fired are read.

Threads divide the outputs of a product and the units of an update, never a sum, and synchronise at a spin barrier. The
results are therefore the same bits for every number of threads. Kernels allocate no memory, except for BLAS.
`tables.py` and `packing.py` describe the memory layout.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from eventrnn._exclusive import Use, exclusive
from eventrnn.backend import HostInputs, integer_matrices, merged_paths, step_array
from eventrnn.cpu import step_table
from eventrnn.cpu.kernels.products import product_address, update_addresses
from eventrnn.cpu.kernels.silence import LINE
from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.kernels.time_loop import run, run_address, step, step_of_symbols
from eventrnn.cpu.memory import aligned_zeros
from eventrnn.cpu.packing import check_format
from eventrnn.cpu.plan import (
    BLAS_PRODUCT,
    KernelPolicy,
    Layout,
    PackedWeights,
    Plan,
    Selected,
    fixed_kernel,
    workspace,
)
from eventrnn.cpu.silence import silent_steps
from eventrnn.cpu.stepper import Stepper
from eventrnn.cpu.tables import (
    SEGMENT_WIDTHS,
    EventLists,
    InputEvents,
    NetworkTables,
    RunBuffers,
    RunOutputs,
    RunSize,
)
from eventrnn.cpu.threads import Team
from eventrnn.state import FireCounts, InputKind, Inputs, State, Trace
from eventrnn.weights import Dense, GatedBlocks, MatrixId, Weights

if TYPE_CHECKING:
    from eventrnn.network import Network

# Bytes of a chunk's input drives, which should fit a part of the L2 cache, and of the drives of a wide read-out, which
# are written and read once.
CHUNK_BYTES, READOUT_BYTES = 1 << 20, 4 << 20

# Time steps of a chunk, at most.
LONGEST_CHUNK = 64

# Chunks after which the engine selects kernels again; twice as many, up to the longest, after each stretch of time in
# which at most a share `QUIET` of the rows had events. In silence selecting takes longer than the steps.
RECHECK, LONGEST_RECHECK, QUIET = 16, 256, 1 / 16

# Stored weights of a matrix from which a partial chunk may have another kernel than whole ones. Measured on one Ice
# Lake core: with kernels of their own for the last 10 of 73 steps, 1350 units with 2:4 weights took 1.08 to 1.10 times
# less time, and 512 dense units with 2 of 66 steps 1.05 times. In runs of 64 units a second selection cost more than
# it saved.
PARTIAL_FROM = 1 << 18

# Copies of the packed weights that an engine keeps, each for other kernels.
MOST_PACKED = 4

# Events per unit and step that are assumed until some were counted: typical of published networks. Units without a
# threshold send an event at every step.
USUAL_ACTIVITY = 0.1

# Multiplications of a step up to which one thread makes it faster than several: about 50 microseconds of work, which is
# what waking the other threads costs.
MOST_ALONE = 500_000

# More threads than a machine for this package has cores; each thread spins at the barriers.
MOST_THREADS = 64


class CpuBackend:
    """Numba kernels on the cores of this machine.

    exact : False multiplies the int8 blocks that `takes_integers` admits in integers (`kernels/integer_products.py`);
            everything else stays exact
    """

    name = "cpu"

    def __init__(self, exact: bool = True):
        self.exact = exact

    def engine(self, network: Network, *, threads: int = 1) -> CpuEngine:
        """An engine for a network. The first run packs the weights: one pass over them, and as much memory again.

        Raises ValueError for `exact=False` where no matrix of the network would be multiplied in integers.
        """
        if not self.exact:
            integer_matrices(network)
        return CpuEngine(network, threads, KernelPolicy(self.exact))


class _Product(NamedTuple):
    """What an engine knows of a matrix."""

    name: str
    weights: Weights
    recurrent: bool
    sender: int  # where `CpuEngine.activity` has the activity of its senders
    fixed: Selected | None  # the kernel that no policy selects


class CpuEngine:
    """A network packed for `kernels/time_loop.py`. Its scratch arrays are kept, so an engine serves one run at a time.

    A run that a second thread starts meanwhile waits. A copy of an engine packs the weights again.

    `policy` selects the kernel of each product from its number of drive rows and the activity of its senders so far; it
    is consulted again after every `RECHECK` chunks of time. Each combination of kernels is packed at its first use. The
    first run of an engine may be its only one, and packs no second kernel for a partial chunk at its end.
    """

    dense = False

    def __init__(self, network: Network, threads: int, policy: KernelPolicy | None = None):
        if not 1 <= threads <= MOST_THREADS:
            raise ValueError(f"threads: got {threads}, need 1 to {MOST_THREADS}")
        for name, weights in network.matrices().items():
            check_format(name, weights)
        self.network, self.n_threads, self.policy = network, threads, policy or KernelPolicy()
        self.host_inputs = HostInputs(network)
        self.units = [layer.units for layer in network.layers]
        self.output_size = self.units[-1] if network.readout is None else network.readout.weights.shape[1]
        self.plans: dict[tuple[Selected, ...], Plan] = {}
        self.layout = Layout(network, threads)
        self.threshold = np.concatenate([layer.threshold for layer in network.layers])
        self.drive_pitch = self.layout.drive_pitch
        self.max_segments = self.drive_pitch // min(SEGMENT_WIDTHS)
        gated = [w for w in network.matrices().values() if isinstance(w, GatedBlocks)]
        self.share_rows = int(not gated)
        self.gated_blocks = max((w.n_blocks for w in gated), default=0)
        # The lists of block segments also hold what lies between two factors of a gate.
        self.max_segments = max([self.max_segments, *(w.gate.shape[1] for w in gated if w.gate_out is not None)])
        self.team, self._use = Team(threads), Use("engine")
        # Of an engine for several threads: one for a single thread, for steps of little work.
        self._alone: CpuEngine | None = None
        self.buffers_batch = 0
        # Events per unit and step, of the input and then of each layer.
        usual = [USUAL_ACTIVITY if layer.cell.thresholded else 1.0 for layer in network.layers]
        self.activity = [1 / max(1, network.layers[0].inputs) if network.one_hot else USUAL_ACTIVITY, *usual]
        self._measured = False
        # Every run reads this, also one of a few steps.
        self._products = [
            _Product(name, w, MatrixId(name).recurrent, self._sender(MatrixId(name)), fixed_kernel(network, name, w))
            for name, w in network.matrices().items()
        ]
        # Those that may have another kernel for a partial chunk.
        self._large = [each for each in self._products if not each.recurrent and each.weights.stored >= PARTIAL_FROM]

    def __getstate__(self) -> dict[str, Any]:
        # Tables and steppers hold addresses, so a copy is made anew.
        return {"network": self.network, "threads": self.n_threads, "policy": self.policy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        CpuEngine.__init__(self, **state)

    def plan(self, steps: int, batch: int, *, partial: bool = True) -> Plan:
        """The weights packed with the kernels that the policy selects for a run of so many steps and samples.

        A run that is no whole number of chunks ends with a partial one, which has fewer drive rows. The policy may
        select other kernels for so few; `partial=False` does without them.
        """
        chunk = self.chunk_steps(batch)
        whole, left = self._selected(self._products, min(steps, chunk), batch), steps % chunk if steps > chunk else 0
        at_the_end, key = whole, (*whole.values(),)
        if left and partial and self._large:
            fewer = self._selected(self._large, left, batch)
            at_the_end = whole | {name: each for name, each in fewer.items() if each.kernel != whole[name].kernel}
            key += (*at_the_end.values(),)
        if key not in self.plans:
            kernels = {name: tuple(dict.fromkeys((each, at_the_end[name]))) for name, each in whole.items()}
            packed = next((kept.packed for kept in self.plans.values() if kept.packed.serves(kernels)), None)
            self.plans[key] = Plan(self.network, packed or self._pack(kernels), whole, at_the_end, update_addresses)
        return self.plans[key]

    def _selected(self, products: Sequence[_Product], steps: int, batch: int) -> dict[str, Selected]:
        """The kernels of some matrices for the drive rows of so many steps and samples."""
        return {
            name: fixed or self.policy.select(weights, batch if recurrent else steps * batch, self.activity[sender])
            for name, weights, recurrent, sender, fixed in products
        }

    def _pack(self, kernels: Mapping[str, Collection[Selected]]) -> PackedWeights:
        """The weights packed for these kernels. Plans of weights that these replace, or too many, are dropped first."""
        new = {(name, each) for name, selected in kernels.items() for each in selected}
        kept = {id(plan.packed): plan.packed for plan in self.plans.values()}
        left = [each for each in kept.values() if not each.spans.keys() <= new][1 - MOST_PACKED :]
        self.plans = {key: plan for key, plan in self.plans.items() if plan.packed in left}
        return PackedWeights(self.network, self.layout, kernels, product_address)

    def chunk_steps(self, batch: int) -> int:
        """Time steps of a chunk, which go through a layer together."""
        layers, readout = 4 * batch * self.layout.layer_pitch, 4 * batch * self.drive_pitch
        return max(1, min(LONGEST_CHUNK, CHUNK_BYTES // layers, READOUT_BYTES // readout))

    def _buffers(self, batch: int) -> RunBuffers:
        if batch != self.buffers_batch:
            chunk = self.chunk_steps(batch)
            rows, widest = chunk * batch, max(self.units)
            if rows * self.drive_pitch > np.iinfo(np.int32).max:
                raise ValueError(
                    f"batch: got {batch}, whose {rows * self.drive_pitch:,} drives are too many; split the batch"
                )
            layers = self.network.layers
            # A look-up needs no workspace, and there may be many symbols.
            looked_up = self.network.one_hot and isinstance(layers[0].w_in, Dense)
            list_rows = 2 * (rows + batch)
            inputs = max([widest, *(layer.inputs for layer in layers[looked_up:])])
            row_capacity = widest + 2 * LANES * self.n_threads
            blas_columns = self.drive_pitch * self.policy.may_blas
            self.buffers = RunBuffers(
                aligned_zeros(rows * self.drive_pitch, np.float32),
                aligned_zeros(batch * self.drive_pitch, np.float32),
                EventLists(
                    aligned_zeros(list_rows * row_capacity, np.int32),
                    aligned_zeros(list_rows * row_capacity, np.float32),
                    aligned_zeros(list_rows * self.n_threads, np.int64),
                    aligned_zeros(list_rows * self.n_threads, np.int64),
                ),
                aligned_zeros((self.n_threads, rows * self.n_threads), np.int64),
                aligned_zeros((self.n_threads, rows * self.n_threads), np.int64),
                aligned_zeros((self.n_threads, rows), np.int64),
                aligned_zeros(self.n_threads * LINE, np.int64),
                aligned_zeros((self.n_threads, batch * row_capacity), np.int32),
                aligned_zeros((self.n_threads, batch * row_capacity), np.float32),
                workspace(
                    *(self.n_threads, inputs, rows, self.max_segments, blas_columns, self.gated_blocks),
                    held=self.layout.held.size(batch),
                ),
            )
            # Set last: if memory was short above, the next run must not take the old buffers for this batch.
            self.chunk, self.buffers_batch = chunk, batch
        return self.buffers

    @cached_property
    def silent_steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Factor and addend of all cells in a silent step."""
        return silent_steps(self.network)

    def _tables(self, plan: Plan) -> NetworkTables:
        return NetworkTables(
            plan.layers,
            plan.column_tiles,
            plan.pools,
            self.threshold,
            *self.silent_steps,
            self.share_rows,
            self.layout.unit_bounds,
            self.layout.drive_begins,
            self.drive_pitch,
        )

    def prepare(self, inputs: Any) -> Inputs:
        """See `backend.Engine`. Numbers become events."""
        return self.host_inputs.prepare(inputs)

    @exclusive
    def run(self, inputs: Inputs, state: State, *, record_events: bool = False, record_states: bool = False) -> Trace:
        """See `backend.Engine`. Memory beyond the outputs does not depend on the number of steps."""
        rows, total = inputs.steps * inputs.batch, sum(self.units)
        # The kernel works in place, on copies.
        c, y = (self._flat(name, getattr(state, name), inputs.batch) for name in ("cells", "outputs"))
        output = np.empty(rows * self.output_size, np.float32)
        events = np.empty(rows * total if record_events else 0, np.float32)
        states = np.empty(rows * total if record_states else 0, np.float32)
        outputs = RunOutputs(output, events, states, np.zeros(total, np.int64), np.zeros(total, np.int64))
        buffers, held, paths = self._buffers(inputs.batch), self.layout.held, []
        held.give(state, buffers.workspace, inputs.batch)
        # The first chunk of an engine tells how active its units are; a later run begins with what was measured before.
        again, chunks = self._measured, RECHECK
        begin, ahead, sent = 0, RECHECK * self.chunk if again else self.chunk, 0
        while begin < inputs.steps:
            end = min(inputs.steps, begin + ahead)
            whole = begin == 0 and end == inputs.steps
            received, busy = self._received(inputs if whole else inputs.chunk(begin, end))
            plan = self.plan(inputs.steps, inputs.batch, partial=again)
            used = [plan.kernel_by_matrix]
            if plan.has_partial and end == inputs.steps:
                used.append(plan.kernel_at_the_end)
            size = RunSize(inputs.steps, begin, end, inputs.batch, self.chunk)
            with_blas = any(BLAS_PRODUCT in each.values() for each in used)
            plan.forget_faults()
            self._run(with_blas, self._tables(plan), received, size, buffers, c, y, outputs)
            plan.check_gates()
            fired = [int(each.sum()) for each in self._by_layer(outputs.graded + outputs.binary)]
            self.activity[1:] = [count / (end * inputs.batch * n) for count, n in zip(fired, self.units, strict=True)]
            self._measured = True
            paths += used
            sent_before, sent = sent, sum(fired)
            quiet = busy + sent - sent_before <= QUIET * (end - begin) * inputs.batch
            # Numbers become events stretch by stretch, and may be many in the next one.
            chunks = min(2 * chunks, LONGEST_RECHECK) if quiet and inputs.kind is not InputKind.DENSE else RECHECK
            begin, ahead = end, chunks * self.chunk
        return Trace(
            output.reshape(inputs.steps, inputs.batch, self.output_size),
            State(
                self._by_layer(c, inputs.batch),
                self._by_layer(y, inputs.batch),
                held.read(buffers.workspace, inputs.batch),
            ),
            tuple(map(FireCounts, self._by_layer(outputs.graded), self._by_layer(outputs.binary))),
            self._by_layer(events, inputs.steps, inputs.batch) if record_events else (),
            self._by_layer(states, inputs.steps, inputs.batch) if record_states else (),
            merged_paths(paths),
        )

    def _received(self, inputs: Inputs) -> tuple[InputEvents, int]:
        """The events for one call of the time loop, and the number of rows that have any.

        Numbers become events here, so that few exist at once.
        """
        part, busy = inputs.to_event_table(), 0
        table, row_of = part.event_table, part.rows
        if len(row_of):
            counts = table.indptr[row_of + 1] - table.indptr[row_of]
            self.activity[0] = int(counts.sum()) / (len(row_of) * max(1, inputs.size))
            busy = int(np.count_nonzero(counts))
        return InputEvents(table.indptr, table.indices, table.values, row_of), busy

    def _run(self, with_blas: bool, *arguments) -> None:
        # BLAS must not start threads beside those of the engine.
        with threadpool_limits(limits=1, user_api="blas") if with_blas else nullcontext():
            self.team.run(run, *arguments, barrier=True)

    def _flat(self, name: str, arrays: Sequence[np.ndarray], batch: int) -> np.ndarray:
        """The arrays (batch, N) of all layers in one, copied. Raises ValueError for others: kernels check no size."""
        sizes, wanted = [array.shape for array in arrays], [(batch, n) for n in self.units]
        if sizes != wanted:
            raise ValueError(f"state {name}: got arrays of shape {sizes}, need {wanted} for this batch and network")
        if len(arrays) == 1:
            return np.array(arrays[0], np.float32, order="C").reshape(-1)
        return np.concatenate([x.ravel() for x in arrays], dtype=np.float32)

    def stepper(self, state: State) -> Stepper | None:
        """A stepper for single steps on one thread; None with more threads and much work, where every step is a run.

        Threads that share a step of little work would spend more time on waking up than on the work.
        """
        if self.n_threads > 1:
            if self._multiplications(state.batch) > MOST_ALONE:
                return None
            if self._alone is None:
                self._alone = CpuEngine(self.network, 1, self.policy)
            return self._alone.stepper(state)
        batch, network, held = state.batch, self.network, self.layout.held
        c, y = (self._flat(name, getattr(state, name), batch) for name in ("cells", "outputs"))
        state.need_gates(held.shared, batch)
        gates = held.numbers(state)
        buffers, plan, layout = self._buffers(batch), self.plan(1, batch), self.layout
        total, size = sum(self.units), network.layers[0].inputs
        symbols = network.symbols is not None
        if symbols:
            table = self.host_inputs.symbol_events
            received = (table.indptr, table.indices, table.values)
        else:
            most = batch * size + LANES
            received = (np.zeros(batch + 1, np.int64), np.zeros(most, np.int32), np.zeros(most, np.float32))
        following = tuple(map(np.empty_like, (c, y, gates)))
        numbers = {
            step_table.BATCH: batch,
            step_table.CHUNK: self.chunk,
            step_table.DRIVE_PITCH: self.drive_pitch,
            step_table.N_LAYERS: len(self.units),
            step_table.N_COLUMN_TILES: plan.column_tiles.shape[1],
            step_table.SHARE_ROWS: self.share_rows,
            step_table.RUN: run_address(),
        }
        arrays = {
            step_table.NUMBERS: np.array([numbers[k] for k in range(len(numbers))], np.int64),
            step_table.BARRIER: np.zeros(1, np.int64),
            step_table.LAYERS: plan.layers,
            step_table.COLUMN_TILES: plan.column_tiles,
            step_table.VALUES: plan.pools.values,
            step_table.INDEX: plan.pools.index,
            step_table.POINTERS: plan.pools.pointers,
            step_table.BIASES: plan.pools.biases,
            step_table.THRESHOLD: self.threshold,
            step_table.KEEP: self.silent_steps[0],
            step_table.PULL: self.silent_steps[1],
            step_table.UNIT_BOUNDS: layout.unit_bounds,
            step_table.DRIVE_BEGINS: layout.drive_begins,
            step_table.INPUT_DRIVES: buffers.input_drives,
            step_table.RECURRENT_DRIVES: buffers.recurrent_drives,
            step_table.EVENT_INDICES: buffers.events.indices,
            step_table.EVENT_VALUES: buffers.events.values,
            step_table.EVENT_BEGINS: buffers.events.begins,
            step_table.EVENT_COUNTS: buffers.events.counts,
            step_table.LIST_BEGINS: buffers.list_begins,
            step_table.LIST_COUNTS: buffers.list_counts,
            step_table.DRIVE_OF: buffers.drive_of,
            step_table.RESTS: buffers.rests,
            step_table.GATED_INDICES: buffers.gated_indices,
            step_table.GATED_VALUES: buffers.gated_values,
            step_table.PANEL_BEGINS: buffers.workspace.panel_begins,
            step_table.PANEL_INDICES: buffers.workspace.panel_indices,
            step_table.PANEL_VALUES: buffers.workspace.panel_values,
            step_table.SEGMENT_NUMBERS: buffers.workspace.segment_numbers,
            step_table.SEGMENT_FACTORS: buffers.workspace.segment_factors,
            step_table.DENSE_INPUTS: buffers.workspace.dense_inputs,
            step_table.TILE: buffers.workspace.tile,
            step_table.SCRATCH: buffers.workspace.scratch,
            step_table.INPUT_INDPTR: received[0],
            step_table.INPUT_INDICES: received[1],
            step_table.INPUT_VALUES: received[2],
            step_table.INPUT_ROW_OF: np.arange(batch),
            step_table.CELLS: following[0],
            step_table.OUTPUTS: following[1],
            step_table.CELLS_BEFORE: c,
            step_table.OUTPUTS_BEFORE: y,
            step_table.HELD: following[2],
            step_table.HELD_BEFORE: gates,
            step_table.GRADED: np.zeros(total, np.int64),
            step_table.BINARY: np.zeros(total, np.int64),
            step_table.EMPTY: np.zeros(0, np.float32),
        }

        def check(inputs) -> np.ndarray:
            array = step_array(network, inputs)
            if len(array) != batch:
                raise ValueError(f"inputs: got a batch of {len(array)}, but the simulator was made for {batch}")
            return np.array(array, order="C")

        return Stepper(
            step_of_symbols if symbols else step,
            [arrays[k] for k in range(len(arrays))],
            state_of=lambda c, y, kept: State(self._by_layer(c, batch), self._by_layer(y, batch), held.views(kept)),
            check=check,
            dtype=np.int64 if symbols else np.float32,
            shape=(batch,) if symbols else (batch, size),
            output_shape=(batch, self.output_size),
            gates=plan if plan.faults else None,
        )

    def _multiplications(self, batch: int) -> float:
        """About how many multiplications a step of so many samples makes."""
        return batch * sum(self.activity[sender] * weights.stored for _, weights, _, sender, _ in self._products)

    def _sender(self, name: MatrixId) -> int:
        """Where `activity` has the events per presynaptic unit and step of a matrix."""
        return len(self.units) if name.layer is None else name.layer + name.recurrent

    def _by_layer(self, flat: np.ndarray, *leading: int) -> tuple[np.ndarray, ...]:
        """Views (*leading, N) of each layer's share of a flat array."""
        if len(self.units) == 1:
            return (flat.reshape(*leading, self.units[0]) if leading else flat,)
        rows, views, at = math.prod(leading), [], 0
        for n in self.units:
            views.append(flat[at : at + rows * n].reshape(*leading, n))
            at += rows * n
        return tuple(views)
