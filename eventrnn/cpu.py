"""The CPU engine: all layers and all steps inside one compiled call, state in and state out.

Time runs in chunks that stay in cache. Within a chunk each layer first takes its whole input (no step waits for
another there), then walks its steps: recurrent product, cell update, events. Only units that fired are read.

Threads split the outputs of a product and the units of an update, never a sum, and meet at a spin barrier; so the
bits do not depend on their number. Kernels allocate nothing. `packing.py` explains the tables.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from eventrnn import cells
from eventrnn.backend import Feed, FireCounts, State, Trace
from eventrnn.jit import compiled
from eventrnn.packing import FIELDS, HIGH, LOW, Pools, aligned_zeros, check_format, narrow, pack, window_edges
from eventrnn.rows import SPINS_BEFORE_YIELD, atomic_add, atomic_load, pause, yield_core
from eventrnn.simd import LANES, bits, load, lowest_bit, store
from eventrnn.traverse import SHARED_BLOCKS, SHARED_ROWS, SHARED_WIDTH, propagate_all
from eventrnn.weights import BlockCSR, Dense, Weights

if TYPE_CHECKING:
    from eventrnn.network import Network

# Columns of the layer table. IN to REC are the windows of w_in, REC to REC_GATED those of w_rec, and REC_GATED to END
# the candidate's columns of w_rec, apart in the paper's variant only.
UNITS, INPUTS, IN, REC, REC_GATED, END, BIAS_IN, BIAS_REC, UNIT_0 = range(9)

# A chunk's input drives should fit a share of the L2 cache.
CHUNK_BYTES = 1 << 20
LONGEST_CHUNK = 64
# Columns of a narrow window: a chunk of 64 rows of them fits the L1 cache beside the weights that pass through.
ROW_TILE = 128
# More than a machine for this package has; every one spins at the barriers.
MOST_THREADS = 64


@compiled
def wait(barrier, parts, target):
    """Come to the barrier and wait until `target` arrivals were made in all; returns the next target."""
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
def send(y, at, low, high, ids, sent, row, firsts, counts, slot):
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
    firsts[slot], counts[slot] = row + low, count - row - low


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
def gate_events(
    n, drive_in, a, drive_rec, b,
    ids, sent, firsts, counts, slot, segments,
    ids_out, gated_out, at, firsts_out, counts_out, slot_out,
):  # fmt: skip
    """A row's events times the reset gate of their unit, as one list: what the paper's candidate product receives."""
    to = at
    for q in range(slot, slot + segments):
        for e in range(firsts[q], firsts[q] + counts[q]):
            i = ids[e]
            ids_out[to] = i
            gated_out[to] = cells.egru_reset_gate(drive_in[a + n + i], drive_rec[b + n + i]) * sent[e]
            to += 1
    firsts_out[slot_out], counts_out[slot_out] = at, to - at


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
    layers, windows, values, index, pointers, biases, threshold, readout,
    # in
    feed_indptr, feed_ids, feed_sent, row_of, steps, batch, chunk, edges, pitch,
    # scratch
    drive_in, drive_rec, ids, sent, firsts, counts, feed_firsts, feed_counts, gated_ids, gated,
    starts, targets, grouped,
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
            for b in range(batch):
                row = mine + b
                send(y, unit_0 * batch + b * n, low, high, ids, sent, row * widest, firsts, counts, row * parts + part)
            # Everybody has left the last chunk's drives, and the carried events are complete.
            target = wait(barrier, parts, target)

            w0, w1, p = layers[layer, IN], layers[layer, REC], layers[layer, BIAS_IN]
            if layer == 0:
                for k in range(length * batch):
                    source = row_of[t0 * batch + k]
                    feed_firsts[part, k] = feed_indptr[source]
                    feed_counts[part, k] = feed_indptr[source + 1] - feed_indptr[source]
                propagate_all(
                    windows[part], w0, w1, values, index, pointers, biases, p, layers[layer, INPUTS],
                    feed_ids, feed_sent, feed_firsts[part], feed_counts[part], 0, 1, length * batch,
                    starts[part], targets[part], grouped[part], drive_in, pitch,
                )  # fmt: skip
            else:
                propagate_all(
                    windows[part], w0, w1, values, index, pointers, biases, p, layers[layer, INPUTS],
                    ids, sent, firsts, counts, (below + batch) * parts, parts, length * batch,
                    starts[part], targets[part], grouped[part], drive_in, pitch,
                )  # fmt: skip

            w0, w1, w2, p = layers[layer, REC], layers[layer, REC_GATED], layers[layer, END], layers[layer, BIAS_REC]
            for t in range(length):
                propagate_all(
                    windows[part], w0, w1, values, index, pointers, biases, p, n,
                    ids, sent, firsts, counts, (mine + t * batch) * parts, parts, batch,
                    starts[part], targets[part], grouped[part], drive_rec, pitch,
                )  # fmt: skip
                target = wait(barrier, parts, target)

                if w2 > w1:
                    for b in range(batch):
                        row, a = mine + t * batch + b, (t * batch + b) * pitch
                        gate_events(
                            n, drive_in, a, drive_rec, b * pitch, ids, sent, firsts, counts, row * parts, parts,
                            gated_ids[part], gated[part], b * widest, feed_firsts[part], feed_counts[part], b,
                        )  # fmt: skip
                    propagate_all(
                        windows[part], w1, w2, values, index, pointers, biases, p, n,
                        gated_ids[part], gated[part], feed_firsts[part], feed_counts[part], 0, 1, batch,
                        starts[part], targets[part], grouped[part], drive_rec, pitch,
                    )  # fmt: skip
                    target = wait(barrier, parts, target)

                for b in range(batch):
                    row, a, s = mine + (t + 1) * batch + b, (t * batch + b) * pitch, unit_0 * batch + b * n
                    if w2 > w1:
                        update_paper(n, low, high, drive_in, a, drive_rec, b * pitch, threshold, unit_0, c, y, s)
                    else:
                        update(n, low, high, drive_in, a, drive_rec, b * pitch, threshold, unit_0, c, y, s)
                    send(y, s, low, high, ids, sent, row * widest, firsts, counts, row * parts + part)
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
            size, w0, w1 = len(output_out) // (steps * batch), readout, windows.shape[1]
            last = ((n_layers - 1) % 2) * rows
            propagate_all(
                windows[part], w0, w1, values, index, pointers, biases, len(biases) - size, layers[n_layers - 1, UNITS],
                ids, sent, firsts, counts, (last + batch) * parts, parts, length * batch,
                starts[part], targets[part], grouped[part], drive_in, pitch,
            )  # fmt: skip
            for k in range(length * batch):
                for i in range(windows[part, w0, LOW], windows[part, w1 - 1, HIGH]):
                    output_out[(t0 * batch + k) * size + i] = drive_in[k * pitch + i]


class CpuBackend:
    """Numba on this machine's cores; the exact tier."""

    name = "cpu"
    exact = True

    def engine(self, network: Network, *, threads: int = 1) -> CpuEngine:
        """Pack the weights, one window a thread. Cost: one pass over the weights, as much memory again."""
        return CpuEngine(network, threads)


class Plan:
    """A network's weights packed for one way to run.

    `in_rows` and `rec_rows` are the drives that an input and a recurrent product have at once. With many of them, dense
    rows want narrow windows and wide blocks go by column: so the drives' share of either stays in the L1 cache.
    """

    def __init__(self, network: Network, parts: int, in_rows: int, rec_rows: int):
        self.parts, self.pools = parts, Pools.empty()
        self.tables: list[list[list[int]]] = [[] for _ in range(parts)]
        layers, at, unit_0 = [], 0, 0
        for layer in network.layers:
            n, rows = layer.units, layer.w_rec.shape[1]
            cut = 2 * n if layer.cell.variant == "paper" else rows
            w_in = self._place(layer.w_in, 0, rows, in_rows)
            w_rec = self._place(layer.w_rec, 0, cut, rec_rows)
            w_gated = self._place(layer.w_rec, cut, rows, rec_rows) if cut < rows else len(self.tables[0])
            layers.append([n, layer.inputs, w_in, w_rec, w_gated, len(self.tables[0]), at, at + rows, unit_0])
            at, unit_0 = at + 2 * rows, unit_0 + n
        self.readout = -1
        if network.readout is not None:
            self.readout = self._place(network.readout.weights, 0, network.readout.weights.shape[1], in_rows)
        self.layers = np.array(layers, np.int64)
        self.windows = np.array(self.tables, np.int64).reshape(parts, -1, FIELDS)
        self.values, self.index, self.pointers = self.pools.freeze()
        del self.pools, self.tables  # as large as the weights, and copied now

    def _place(self, weights: Weights, start: int, stop: int, rows: int) -> int:
        """Pack the columns `start` to `stop`, each thread's share; returns the first window."""
        before, edges = len(self.tables[0]), window_edges(weights, start, stop, self.parts)
        cuts = [[edges[part], edges[part + 1]] for part in range(self.parts)]
        by_column = rows >= SHARED_BLOCKS and isinstance(weights, BlockCSR) and weights.block[1] >= SHARED_WIDTH
        if rows >= SHARED_ROWS and isinstance(weights, Dense):
            cuts = [narrow(low, high, ROW_TILE) for low, high in cuts]
        most = max(len(cut) for cut in cuts)
        for table, cut in zip(self.tables, cuts, strict=True):
            cut += cut[-1:] * (most - len(cut))
            table += [
                pack(self.pools, weights, low, high, by_column) for low, high in zip(cut[:-1], cut[1:], strict=True)
            ]
        return before


class CpuEngine:
    """A network packed for `run`; keeps its scratch between calls, so one engine serves one run at a time.

    Weights are packed at the first run of each kind: single steps or sequences, one sample or many.
    """

    dense = False

    def __init__(self, network: Network, threads: int):
        if not 1 <= threads <= MOST_THREADS:
            raise ValueError(f"threads: got {threads}, need 1 to {MOST_THREADS}; more than the cores only wait")
        for name, weights in network.matrices().items():
            check_format(name, weights)
        self.network, self.parts = network, threads
        self.units = [layer.units for layer in network.layers]
        self.output_size = self.units[-1] if network.readout is None else network.readout.weights.shape[1]
        self.plans: dict[tuple[tuple[bool, bool], ...], Plan] = {}
        biases = [bias for layer in network.layers for bias in (layer.bias_in, layer.bias_rec)]
        self.biases = np.concatenate(biases + ([network.readout.bias] if network.readout is not None else []))
        self.threshold = np.concatenate([layer.threshold for layer in network.layers])
        self.edges = np.array([[n * q // threads for q in range(threads + 1)] for n in self.units], np.int64)
        # Vectors and padded blocks may run past the last gate row.
        widths = [w.shape[1] + max(LANES, getattr(w, "block", (1, 1))[1]) for w in network.matrices().values()]
        self.pitch = -(-max(widths) // LANES) * LANES
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self.scratch_batch = 0

    def plan(self, steps: int, batch: int) -> Plan:
        """The weights as a run of that size wants them."""
        rows = (min(steps, self.chunk_steps(batch)) * batch, batch)
        kind = tuple((n >= SHARED_ROWS, n >= SHARED_BLOCKS) for n in rows)
        if kind not in self.plans:
            self.plans[kind] = Plan(self.network, self.parts, *rows)
        return self.plans[kind]

    def chunk_steps(self, batch: int) -> int:
        """Time steps that go through a layer together."""
        return max(1, min(LONGEST_CHUNK, CHUNK_BYTES // (4 * batch * self.pitch)))

    def _scratch(self, batch: int) -> tuple[np.ndarray, ...]:
        if batch != self.scratch_batch:
            self.scratch_batch = batch
            self.chunk = self.chunk_steps(batch)
            rows, widest = self.chunk * batch, max(self.units)
            if rows * self.pitch > np.iinfo(np.int32).max:
                self.scratch_batch = 0
                raise ValueError(
                    f"batch: got {batch}, whose {rows * self.pitch:,} drives are too many; split the batch"
                )
            lists, most = 2 * (rows + batch), rows * max(widest, *(layer.inputs for layer in self.network.layers))
            self.scratch = (
                aligned_zeros(rows * self.pitch, np.float32),
                aligned_zeros(batch * self.pitch, np.float32),
                np.zeros(lists * widest, np.int32),
                np.zeros(lists * widest, np.float32),
                np.zeros(lists * self.parts, np.int64),
                np.zeros(lists * self.parts, np.int64),
                np.zeros((self.parts, rows), np.int64),
                np.zeros((self.parts, rows), np.int64),
                np.zeros((self.parts, batch * widest), np.int32),
                np.zeros((self.parts, batch * widest), np.float32),
                np.zeros((self.parts, most // rows + 2), np.int64),
                np.zeros((self.parts, most), np.int32),
                np.zeros((self.parts, most), np.float32),
            )
        return self.scratch

    def run(self, feed: Feed, state: State, *, record_events: bool = False, record_states: bool = False) -> Trace:
        """See `backend.Engine`. Memory beyond the outputs does not depend on the number of steps."""
        rows, total = feed.steps * feed.batch, sum(self.units)
        # Copies: the kernel works in place.
        c = np.concatenate([x.ravel() for x in state.cells], dtype=np.float32)
        y = np.concatenate([x.ravel() for x in state.outputs], dtype=np.float32)
        output = np.empty(rows * self.output_size, np.float32)
        events = np.empty(rows * total if record_events else 0, np.float32)
        states = np.empty(rows * total if record_states else 0, np.float32)
        graded, binary = np.zeros(total, np.int64), np.zeros(total, np.int64)
        scratch, barrier = self._scratch(feed.batch), np.zeros(1, np.int64)
        if rows:
            plan = self.plan(feed.steps, feed.batch)
            arguments = (
                *(plan.layers, plan.windows, plan.values, plan.index, plan.pointers, self.biases, self.threshold),
                *(plan.readout, feed.indptr, feed.indices, feed.values, feed.row_of, feed.steps, feed.batch),
                *(self.chunk, self.edges, self.pitch, *scratch, c, y, output, events, states, graded, binary),
            )
            if self.pool is None:
                run(0, 1, barrier, *arguments)
            else:
                shares = [self.pool.submit(run, part, self.parts, barrier, *arguments) for part in range(self.parts)]
                for share in shares:
                    share.result()
        return Trace(
            output.reshape(feed.steps, feed.batch, self.output_size),
            State(self._by_layer(c, feed.batch), self._by_layer(y, feed.batch)),
            tuple(map(FireCounts, self._by_layer(graded), self._by_layer(binary))),
            self._by_layer(events, feed.steps, feed.batch) if record_events else (),
            self._by_layer(states, feed.steps, feed.batch) if record_states else (),
        )

    def _by_layer(self, flat: np.ndarray, *leading: int) -> tuple[np.ndarray, ...]:
        """Views (*leading, N) of each layer's share."""
        rows, parts, at = math.prod(leading), [], 0
        for n in self.units:
            parts.append(flat[at : at + rows * n].reshape(*leading, n))
            at += rows * n
        return tuple(parts)
