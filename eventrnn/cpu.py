"""The CPU engine: all layers and all steps inside one compiled call, state in and state out.

Time runs in chunks that stay in cache. Within a chunk each layer first takes its whole input (no step waits for
another there), then walks its steps: recurrent product, cell update, events. Only units that fired are read.

Threads split the outputs of a product and the units of an update, never a sum, and meet at a spin barrier; so the
bits do not depend on their number. Kernels allocate nothing. `packing.py` explains the tables.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from eventrnn import cells
from eventrnn.backend import Feed, FireCounts, State, Trace
from eventrnn.jit import compiled
from eventrnn.packing import FIELDS, HIGH, LOW, Pools, aligned_zeros, pack, window_edges
from eventrnn.rows import SPINS_BEFORE_YIELD, atomic_add, atomic_load, pause, yield_core
from eventrnn.simd import LANES, bits, load, lowest_bit, store
from eventrnn.traverse import propagate

if TYPE_CHECKING:
    from eventrnn.network import Network

# Columns of the layer table. REC_GATED is the candidate's window of w_rec in the paper's variant, else -1.
UNITS, IN, REC, REC_GATED, BIAS_IN, BIAS_REC, UNIT_0 = range(7)

# A chunk's input drives should fit a share of the L2 cache.
CHUNK_BYTES = 1 << 19
LONGEST_CHUNK = 64


@compiled
def wait(barrier, parts, target):
    """Until `parts` threads have come `target` times in all; returns the next target."""
    if parts > 1:
        atomic_add(barrier, 1)
        spins = 0
        while atomic_load(barrier) < target:
            spins += 1
            pause()
            if spins > SPINS_BEFORE_YIELD:
                yield_core()
    return target + parts


@compiled
def send(y, at, low, high, ids, sent, row, counts, slot):
    """Compact the non-zero y of units `low` to `high` into a row's event list."""
    count = row + low
    whole = low + (high - low) // LANES * LANES
    for i in range(low, whole, LANES):
        value = load(y, at + i)
        fired = bits(value > cells.ZERO) | bits(value < cells.ZERO)
        while fired != 0:
            unit = i + lowest_bit(fired)
            ids[count] = unit
            sent[count] = y[at + unit]
            count += 1
            fired &= fired - 1
    for i in range(whole, high):
        if y[at + i] != 0:
            ids[count] = i
            sent[count] = y[at + i]
            count += 1
    counts[slot] = count - row - low


@compiled
def update(n, low, high, drive_in, a, drive_rec, b, threshold, p, c, y, s):
    """Released variant: cells and outputs of units `low` to `high`, in place."""
    whole = low + (high - low) // LANES * LANES
    for i in range(low, whole, LANES):
        v, _, _, _ = cells.egru_value(
            load(drive_in, a + i),
            load(drive_in, a + n + i),
            load(drive_in, a + 2 * n + i),
            load(drive_rec, b + i),
            load(drive_rec, b + n + i),
            load(drive_rec, b + 2 * n + i),
            load(c, s + i),
        )
        theta = load(threshold, p + i)
        store(y, s + i, cells.select(v > theta, v, cells.ZERO))
        store(c, s + i, cells.select(v > theta, v - theta, v))
    for i in range(whole, high):
        v, _, _, _ = cells.egru_value(
            drive_in[a + i],
            drive_in[a + n + i],
            drive_in[a + 2 * n + i],
            drive_rec[b + i],
            drive_rec[b + n + i],
            drive_rec[b + 2 * n + i],
            c[s + i],
        )
        theta = threshold[p + i]
        y[s + i] = cells.select(v > theta, v, cells.ZERO)
        c[s + i] = cells.select(v > theta, v - theta, v)


@compiled
def update_paper(n, low, high, drive_in, a, drive_rec, b, threshold, p, c, y, s):
    """Paper's variant: cells and outputs of units `low` to `high`, in place."""
    whole = low + (high - low) // LANES * LANES
    for i in range(low, whole, LANES):
        v, _, _ = cells.egru_paper_value(
            load(drive_in, a + i),
            load(drive_in, a + 2 * n + i),
            load(drive_rec, b + i),
            load(drive_rec, b + 2 * n + i),
            load(c, s + i),
            load(y, s + i),
        )
        store(y, s + i, cells.select(v > load(threshold, p + i), v, cells.ZERO))
        store(c, s + i, v)
    for i in range(whole, high):
        v, _, _ = cells.egru_paper_value(
            drive_in[a + i], drive_in[a + 2 * n + i], drive_rec[b + i], drive_rec[b + 2 * n + i], c[s + i], y[s + i]
        )
        y[s + i] = cells.select(v > threshold[p + i], v, cells.ZERO)
        c[s + i] = v


@compiled
def gate_events(n, drive_in, a, drive_rec, b, ids, sent, first, count, gated_ids, gated, at):
    """gated = reset gate * value of every event: what the paper's candidate product receives."""
    for e in range(count):
        i = ids[first + e]
        gated_ids[at + e] = i
        gated[at + e] = cells.egru_reset_gate(drive_in[a + n + i], drive_rec[b + n + i]) * sent[first + e]


@compiled
def start_from(bias, p, matrix, drive, at):
    """The drive of a window starts from its bias."""
    low, high = matrix[LOW], matrix[HIGH]
    whole = low + (high - low) // LANES * LANES
    for i in range(low, whole, LANES):
        store(drive, at + i, load(bias, p + i))
    for i in range(whole, high):
        drive[at + i] = bias[p + i]


@compiled
def record(n, low, high, y, c, s, at, ids, sent, first, count, unit_0, events_out, states_out, graded_out, binary_out):
    """Count the events just sent and copy what is recorded."""
    for e in range(first, first + count):
        if sent[e] == 1:
            binary_out[unit_0 + ids[e]] += 1
        else:
            graded_out[unit_0 + ids[e]] += 1
    if len(events_out) > 0:
        for i in range(low, high):
            events_out[at + i] = y[s + i]
    if len(states_out) > 0:
        for i in range(low, high):
            states_out[at + i] = c[s + i]


@compiled
def run(
    part, parts, barrier,
    # weights
    layers, matrices, values, index, pointers, biases, threshold, readout,
    # in
    feed_indptr, feed_ids, feed_sent, row_of, steps, batch, chunk, edges, pitch,
    # scratch
    drive_in, drive_rec, ids, sent, counts, gated_ids, gated,
    # state, updated in place
    c, y,
    # out
    output_out, events_out, states_out, graded_out, binary_out,
):  # fmt: skip
    """One thread's share of a whole run; every thread calls this with its `part`.

    Event lists: buffer `layer % 2`, row `(t + 1) * batch + b` of the chunk; row b holds the step before the
    chunk. Within a row, units `edges[layer, part]` on write at their own offset, so the parts read in order.
    """
    n_layers = len(layers)
    rows = (chunk + 1) * batch
    widest = len(ids) // (2 * rows)
    target = parts
    for t0 in range(0, steps, chunk):
        length = min(chunk, steps - t0)
        for layer in range(n_layers):
            n, unit_0 = layers[layer, UNITS], layers[layer, UNIT_0]
            low, high = edges[layer, part], edges[layer, part + 1]
            mine, below = (layer % 2) * rows, ((layer + 1) % 2) * rows
            w_in, w_rec = matrices[part, layers[layer, IN]], matrices[part, layers[layer, REC]]
            for b in range(batch):
                row = mine + b
                send(y, unit_0 * batch + b * n, low, high, ids, sent, row * widest, counts, row * parts + part)
            # Everybody has left the last chunk's drives, and the carried events are complete.
            target = wait(barrier, parts, target)

            for k in range(length * batch):
                start_from(biases, layers[layer, BIAS_IN], w_in, drive_in, k * pitch)
                if layer == 0:
                    source = row_of[t0 * batch + k]
                    first, end = feed_indptr[source], feed_indptr[source + 1]
                    propagate(
                        w_in, values, index, pointers, feed_ids, feed_sent, first, end - first, drive_in, k * pitch
                    )
                else:
                    row = below + batch + k
                    for q in range(parts):
                        first, count = row * widest + edges[layer - 1, q], counts[row * parts + q]
                        propagate(w_in, values, index, pointers, ids, sent, first, count, drive_in, k * pitch)

            for t in range(length):
                for b in range(batch):
                    row = mine + t * batch + b
                    start_from(biases, layers[layer, BIAS_REC], w_rec, drive_rec, b * pitch)
                    for q in range(parts):
                        first, count = row * widest + edges[layer, q], counts[row * parts + q]
                        propagate(w_rec, values, index, pointers, ids, sent, first, count, drive_rec, b * pitch)
                target = wait(barrier, parts, target)

                if layers[layer, REC_GATED] >= 0:
                    w_gated = matrices[part, layers[layer, REC_GATED]]
                    at = part * widest
                    for b in range(batch):
                        row, a = mine + t * batch + b, (t * batch + b) * pitch
                        start_from(biases, layers[layer, BIAS_REC], w_gated, drive_rec, b * pitch)
                        for q in range(parts):
                            first, count = row * widest + edges[layer, q], counts[row * parts + q]
                            gate_events(
                                n, drive_in, a, drive_rec, b * pitch, ids, sent, first, count, gated_ids, gated, at
                            )
                            propagate(
                                w_gated, values, index, pointers, gated_ids, gated, at, count, drive_rec, b * pitch
                            )
                    target = wait(barrier, parts, target)

                for b in range(batch):
                    row, a, s = mine + (t + 1) * batch + b, (t * batch + b) * pitch, unit_0 * batch + b * n
                    if layers[layer, REC_GATED] >= 0:
                        update_paper(n, low, high, drive_in, a, drive_rec, b * pitch, threshold, unit_0, c, y, s)
                    else:
                        update(n, low, high, drive_in, a, drive_rec, b * pitch, threshold, unit_0, c, y, s)
                    send(y, s, low, high, ids, sent, row * widest, counts, row * parts + part)
                    at = unit_0 * steps * batch + ((t0 + t) * batch + b) * n
                    record(
                        n, low, high, y, c, s, at, ids, sent, row * widest + low, counts[row * parts + part], unit_0,
                        events_out, states_out, graded_out, binary_out,
                    )  # fmt: skip
                    if readout < 0 and layer == n_layers - 1:
                        for i in range(low, high):
                            output_out[((t0 + t) * batch + b) * n + i] = y[s + i]
                target = wait(barrier, parts, target)

        if readout >= 0:
            w_out, size = matrices[part, readout], len(output_out) // (steps * batch)
            last = ((n_layers - 1) % 2) * rows
            for k in range(length * batch):
                row = last + batch + k
                start_from(biases, len(biases) - size, w_out, drive_in, k * pitch)
                for q in range(parts):
                    first, count = row * widest + edges[n_layers - 1, q], counts[row * parts + q]
                    propagate(w_out, values, index, pointers, ids, sent, first, count, drive_in, k * pitch)
                for i in range(w_out[LOW], w_out[HIGH]):
                    output_out[(t0 * batch + k) * size + i] = drive_in[k * pitch + i]


class CpuBackend:
    """Numba on this machine's cores; the exact tier."""

    name = "cpu"
    exact = True

    def engine(self, network: Network, *, threads: int = 1) -> CpuEngine:
        """Pack the weights, one window a thread. Cost: one pass over the weights, as much memory again."""
        return CpuEngine(network, threads)


class CpuEngine:
    """A network packed for `run`; keeps its scratch between calls, so one engine serves one run at a time."""

    def __init__(self, network: Network, threads: int):
        self.parts = threads
        self.units = [layer.units for layer in network.layers]
        self.output_size = self.units[-1] if network.readout is None else network.readout.weights.shape[1]
        pools, tables = Pools.empty(), [[] for _ in range(threads)]

        def place(weights, start, stop) -> int:
            edges = window_edges(weights, start, stop, threads)
            for part, table in enumerate(tables):
                table.append(pack(pools, weights, edges[part], edges[part + 1]))
            return len(tables[0]) - 1

        layers, biases, at, unit_0 = [], [], 0, 0
        for layer in network.layers:
            n, rows = layer.units, layer.w_rec.shape[1]
            w_in = place(layer.w_in, 0, rows)
            if layer.cell.variant == "paper":
                w_rec, w_gated = place(layer.w_rec, 0, 2 * n), place(layer.w_rec, 2 * n, rows)
            else:
                w_rec, w_gated = place(layer.w_rec, 0, rows), -1
            layers.append([n, w_in, w_rec, w_gated, at, at + rows, unit_0])
            biases += [layer.bias_in, layer.bias_rec]
            at, unit_0 = at + 2 * rows, unit_0 + n
        self.readout = -1
        if network.readout is not None:
            self.readout = place(network.readout.weights, 0, self.output_size)
            biases.append(network.readout.bias)
        self.layers = np.array(layers, np.int64)
        self.matrices = np.array(tables, np.int64).reshape(threads, -1, FIELDS)
        self.values, self.index, self.pointers = pools.freeze()
        self.biases = np.concatenate(biases)
        self.threshold = np.concatenate([layer.threshold for layer in network.layers])
        self.edges = np.array([[n * q // threads for q in range(threads + 1)] for n in self.units], np.int64)
        # Vectors and padded blocks may run past the last gate row.
        widths = [w.shape[1] + max(LANES, getattr(w, "block", (1, 1))[1]) for w in network.matrices().values()]
        self.pitch = -(-max(widths) // LANES) * LANES
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self.scratch_batch = 0

    def _scratch(self, batch: int) -> tuple[np.ndarray, ...]:
        if batch != self.scratch_batch:
            self.scratch_batch = batch
            self.chunk = max(1, min(LONGEST_CHUNK, CHUNK_BYTES // (4 * batch * self.pitch)))
            rows, widest = (self.chunk + 1) * batch, max(self.units)
            self.scratch = (
                aligned_zeros(self.chunk * batch * self.pitch, np.float32),
                aligned_zeros(batch * self.pitch, np.float32),
                np.zeros(2 * rows * widest, np.int32),
                np.zeros(2 * rows * widest, np.float32),
                np.zeros(2 * rows * self.parts, np.int64),
                np.zeros(self.parts * widest, np.int32),
                np.zeros(self.parts * widest, np.float32),
            )
        return self.scratch

    def run(self, feed: Feed, state: State, *, record_events: bool = False, record_states: bool = False) -> Trace:
        """See `backend.Engine`. Memory beyond the outputs does not depend on the number of steps."""
        rows, total = feed.steps * feed.batch, sum(self.units)
        c = np.concatenate([x.ravel() for x in state.cells]).astype(np.float32)
        y = np.concatenate([x.ravel() for x in state.outputs]).astype(np.float32)
        output = np.empty(rows * self.output_size, np.float32)
        events = np.empty(rows * total if record_events else 0, np.float32)
        states = np.empty(rows * total if record_states else 0, np.float32)
        graded, binary = np.zeros(total, np.int64), np.zeros(total, np.int64)
        scratch, barrier = self._scratch(feed.batch), np.zeros(1, np.int64)
        if rows:
            arguments = (
                *(self.layers, self.matrices, self.values, self.index, self.pointers, self.biases, self.threshold),
                *(self.readout, feed.indptr, feed.indices, feed.values, feed.row_of, feed.steps, feed.batch),
                *(self.chunk, self.edges, self.pitch, *scratch, c, y, output, events, states, graded, binary),
            )
            if self.pool is None:
                run(0, 1, barrier, *arguments)
            else:
                shares = [self.pool.submit(run, part, self.parts, barrier, *arguments) for part in range(self.parts)]
                for share in shares:
                    share.result()
        cut = np.cumsum(self.units)[:-1]
        return Trace(
            output.reshape(feed.steps, feed.batch, self.output_size),
            State(self._by_layer(c, feed.batch), self._by_layer(y, feed.batch)),
            tuple(FireCounts(*pair) for pair in zip(np.split(graded, cut), np.split(binary, cut), strict=True)),
            self._by_layer(events, feed.steps, feed.batch) if record_events else (),
            self._by_layer(states, feed.steps, feed.batch) if record_states else (),
        )

    def _by_layer(self, flat: np.ndarray, *leading: int) -> tuple[np.ndarray, ...]:
        cut = np.cumsum([int(np.prod(leading)) * n for n in self.units])[:-1]
        return tuple(part.reshape(*leading, n) for part, n in zip(np.split(flat, cut), self.units, strict=True))
