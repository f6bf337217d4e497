"""The CPU engine: all layers and all steps inside one compiled call, state in and state out.

Time runs in chunks that stay in cache. Within a chunk each layer first takes its whole input (no step waits for
another there), then walks its steps: recurrent product, cell update, events. Only units that fired are read.

Threads split the outputs of a product and the units of an update, never a sum, and meet at a spin barrier; so the
bits do not depend on their number. Kernels allocate nothing, but for BLAS. `packing.py` explains the tables.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from eventrnn.backend import Feed, FireCounts, State, Trace, as_array, need_on_host
from eventrnn.jit import compiled
from eventrnn.packing import PIECES, aligned_zeros, check_format
from eventrnn.plan import (
    BIAS_IN,
    BIAS_REC,
    BLAS_PRODUCT,
    END,
    IN,
    INPUTS,
    REC,
    REC_GATED,
    UNIT_0,
    UNITS,
    Choice,
    Layout,
    Plan,
    product_scratch,
)
from eventrnn.rows import prefetch
from eventrnn.simd import LANES
from eventrnn.steps import send, send_gated, tally, update, update_paper
from eventrnn.stream import Stepper, first_not_finite, float32_at, int32_at, int64_at
from eventrnn.team import started, wait
from eventrnn.traverse import copy, propagate_all

if TYPE_CHECKING:
    from eventrnn.network import Network

# A chunk's input drives should fit a share of the L2 cache.
CHUNK_BYTES = 1 << 20
LONGEST_CHUNK = 64
# Chunks between two looks at which way products go.
RECHECK = 16
MOST_PLANS = 4
USUAL_ACTIVITY = 0.1
# More than a machine for this package has; every one spins at the barriers.
MOST_THREADS = 64


@compiled
def run(
    part, parts, barrier,
    # weights
    layers, windows, values, index, pointers, biases, threshold, readout, bias_out,
    # in
    feed_indptr, feed_ids, feed_sent, row_of, steps, begin, end, batch, chunk, edges, bases, pitch,
    # scratch
    drive_in, drive_rec, ids, sent, firsts, counts, feed_firsts, feed_counts, gated_ids, gated,
    cuts, own_ids, own_sent, lists, amounts, x, tile, product,
    # state, updated in place
    c, y,
    # out
    output_out, events_out, states_out, graded_out, binary_out,
):  # fmt: skip
    """One thread's share of steps `begin` to `end` of a run; every thread calls this with its `part`.

    Event lists: buffer `layer % 2`, row `(t + 1) * batch + b` of the chunk; row b holds the step before the
    chunk. Within a row, units `edges[layer, part]` on write at their own offset, so the parts read in order.
    """
    n_layers = len(layers)
    rows = (chunk + 1) * batch
    wide = len(ids) // (2 * rows)
    scratch = (
        cuts[part],
        own_ids[part],
        own_sent[part],
        lists[part],
        amounts[part],
        x[part],
        tile[part],
        product[part],
    )
    target = parts
    for t0 in range(begin, end, chunk):
        length = min(chunk, end - t0)
        for layer in range(n_layers):
            n, unit_0 = layers[layer, UNITS], layers[layer, UNIT_0]
            low, high, base = edges[layer, part], edges[layer, part + 1], bases[layer, part]
            mine, below = (layer % 2) * rows, ((layer + 1) % 2) * rows
            # Each thread's lists have a vector to spare.
            own = low + LANES * part
            for b in range(batch):
                row = mine + b
                slot = row * parts + part
                firsts[slot] = row * wide + own
                counts[slot] = send(y, unit_0 * batch + b * n, low, high, ids, sent, row * wide + own)
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
                    *scratch, drive_in, pitch,
                )  # fmt: skip
            else:
                propagate_all(
                    windows[part], w0, w1, values, index, pointers, biases, p, layers[layer, INPUTS],
                    ids, sent, firsts, counts, (below + batch) * parts, parts, length * batch,
                    *scratch, drive_in, pitch,
                )  # fmt: skip

            w0, w1, w2, p = layers[layer, REC], layers[layer, REC_GATED], layers[layer, END], layers[layer, BIAS_REC]
            for t in range(length):
                for q in range((mine + t * batch) * parts, (mine + (t + 1) * batch) * parts if parts > 1 else 0):
                    # All lines at once: another core has them.
                    for e in range(firsts[q], firsts[q] + counts[q], LANES):
                        prefetch(ids, e)
                        prefetch(sent, e)
                propagate_all(
                    windows[part], w0, w1, values, index, pointers, biases, p, n,
                    ids, sent, firsts, counts, (mine + t * batch) * parts, parts, batch,
                    *scratch, drive_rec, pitch,
                )  # fmt: skip
                if w2 > w1:
                    # The candidate's events take the reset gates of all units.
                    target = wait(barrier, parts, target)
                    for b in range(batch):
                        a, s, to = (t * batch + b) * pitch, unit_0 * batch + b * n, b * wide
                        feed_firsts[part, b] = to
                        for q in range(parts):
                            first, last = edges[layer, q], edges[layer, q + 1]
                            gate_r = bases[layer, q] + last - first
                            to += send_gated(
                                first, last, drive_in, a + gate_r, drive_rec, b * pitch + gate_r, y, s,
                                gated_ids[part], gated[part], to,
                            )  # fmt: skip
                        feed_counts[part, b] = to - b * wide
                    propagate_all(
                        windows[part], w1, w2, values, index, pointers, biases, p, n,
                        gated_ids[part], gated[part], feed_firsts[part], feed_counts[part], 0, 1, batch,
                        *scratch, drive_rec, pitch,
                    )  # fmt: skip
                    # Nobody reads y, or the reset gates, any more.
                    target = wait(barrier, parts, target)

                for b in range(batch):
                    row, a, s = mine + (t + 1) * batch + b, (t * batch + b) * pitch + base, unit_0 * batch + b * n
                    if w2 > w1:
                        update_paper(
                            high - low, drive_in, a, drive_rec, b * pitch + base, threshold, unit_0 + low, c, y, s + low
                        )
                    else:
                        update(
                            high - low, drive_in, a, drive_rec, b * pitch + base, threshold, unit_0 + low, c, y, s + low
                        )
                    slot, first = row * parts + part, row * wide + own
                    firsts[slot] = first
                    counts[slot] = send(y, s, low, high, ids, sent, first)
                    tally(ids, sent, first, counts[slot], unit_0, graded_out, binary_out)
                    at = unit_0 * steps * batch + ((t0 + t) * batch + b) * n + low
                    if len(events_out) > 0:
                        copy(y, s + low, events_out, at, high - low)
                    if len(states_out) > 0:
                        copy(c, s + low, states_out, at, high - low)
                    if readout < 0 and layer == n_layers - 1:
                        copy(y, s + low, output_out, ((t0 + t) * batch + b) * n + low, high - low)
                target = wait(barrier, parts, target)

        if readout >= 0:
            low, high, base = edges[n_layers, part], edges[n_layers, part + 1], bases[n_layers, part]
            last, size = ((n_layers - 1) % 2) * rows, edges[n_layers, parts]
            propagate_all(
                windows[part], readout, windows.shape[1], values, index, pointers, biases, bias_out,
                layers[n_layers - 1, UNITS],
                ids, sent, firsts, counts, (last + batch) * parts, parts, length * batch,
                *scratch, drive_in, pitch,
            )  # fmt: skip
            for k in range(length * batch):
                copy(drive_in, k * pitch + base, output_out, (t0 * batch + k) * size + low, high - low)


@compiled
def step(table, inputs, symbols, output):
    """One step on one thread of what is bound in a table (see `CpuEngine.stepper`), on (batch, I) float32 or, with an
    embedding, (batch,) int64 symbols; the other one is empty. Returns whether anything in it or after it is not finite,
    or a symbol is none.
    """
    indptr, ids, sent, row_of = int64_at(table, 37), int32_at(table, 38), float32_at(table, 39), int64_at(table, 23)
    if len(symbols) > 0:
        for symbol in symbols:
            if not 0 <= symbol < len(indptr) - 1:
                return True
        row_of = symbols
    else:
        flat, (samples, size) = inputs.reshape(inputs.size), inputs.shape
        if first_not_finite(flat, len(flat)) >= 0:
            return True
        for b in range(samples):
            indptr[b + 1] = indptr[b] + send(flat, b * size, 0, size, ids, sent, indptr[b])
    numbers = int64_at(table, 0)
    batch, chunk, pitch, n_layers, n_windows = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    c, y = float32_at(table, 24), float32_at(table, 25)
    copy(c, 0, float32_at(table, 26), 0, len(c))
    copy(y, 0, float32_at(table, 27), 0, len(y))
    nothing = float32_at(table, 28)
    run(
        0, 1, int64_at(table, 1),
        int64_at(table, 2).reshape((n_layers, -1)), int64_at(table, 3).reshape((1, n_windows, -1)),
        float32_at(table, 4), int32_at(table, 5), int64_at(table, 6), float32_at(table, 7), float32_at(table, 8),
        numbers[5], numbers[6],
        indptr, ids, sent, row_of, 1, 0, 1, batch, chunk,
        int64_at(table, 9).reshape((-1, 2)), int64_at(table, 10).reshape((-1, 1)), pitch,
        float32_at(table, 11), float32_at(table, 12), int32_at(table, 13), float32_at(table, 14),
        int64_at(table, 15), int64_at(table, 16), int64_at(table, 17).reshape((1, -1)),
        int64_at(table, 18).reshape((1, -1)), int32_at(table, 19).reshape((1, -1)),
        float32_at(table, 20).reshape((1, -1)),
        int64_at(table, 29).reshape((1, -1)), int32_at(table, 30).reshape((1, -1)),
        float32_at(table, 31).reshape((1, -1)), int32_at(table, 32).reshape((1, 2, -1)),
        float32_at(table, 33).reshape((1, 2, -1)), float32_at(table, 34).reshape((1, -1)),
        float32_at(table, 35).reshape((1, -1)), float32_at(table, 36).reshape((1, -1)),
        c, y, output.reshape(output.size), nothing, nothing, int64_at(table, 21), int64_at(table, 22),
    )  # fmt: skip
    return first_not_finite(c, len(c)) >= 0


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
        for name in matrices:
            k = last if name == "readout" else int(name.split(".")[1]) + name.endswith("w_rec")
            rows[name], active[name] = batch if name.endswith("w_rec") else many, self.activity[k]
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
        scratch, layout, paths = self._scratch(feed.batch), self.layout, {}
        if rows:
            self.activity[0] = float(np.diff(feed.indptr)[feed.row_of].mean()) / max(1, feed.size)
        begin, ahead = 0, self.chunk
        while begin < feed.steps:
            end = min(feed.steps, begin + ahead)
            plan = self.plan(end - begin, feed.batch)
            self._run(
                BLAS_PRODUCT in plan.picks.values(),
                *(plan.layers, plan.windows, plan.values, plan.index, plan.pointers, layout.biases, self.threshold),
                *(plan.readout, layout.starts[-1], feed.indptr, feed.indices, feed.values, feed.row_of),
                *(feed.steps, begin, end, feed.batch, self.chunk, layout.edges, layout.bases, self.pitch, *scratch),
                *(c, y, output, events, states, graded, binary),
            )
            fired = self._by_layer(graded + binary)
            self.activity[1:] = [float(f.sum()) / (end * feed.batch * len(f)) for f in fired]
            paths.update(plan.picks)
            begin, ahead = end, RECHECK * self.chunk
        return Trace(
            output.reshape(feed.steps, feed.batch, self.output_size),
            State(self._by_layer(c, feed.batch), self._by_layer(y, feed.batch)),
            tuple(map(FireCounts, self._by_layer(graded), self._by_layer(binary))),
            self._by_layer(events, feed.steps, feed.batch) if record_events else (),
            self._by_layer(states, feed.steps, feed.batch) if record_states else (),
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
            table = network.feed(np.zeros((1, batch), np.int64))
            feed = (table.indptr, table.indices, table.values)
        else:
            most = batch * size + LANES
            feed = (np.zeros(batch + 1, np.int64), np.zeros(most, np.int32), np.zeros(most, np.float32))
        before = np.empty_like(c), np.empty_like(y)
        arrays = [
            *(numbers, np.zeros(1, np.int64), plan.layers, plan.windows, plan.values, plan.index, plan.pointers),
            *(layout.biases, self.threshold, layout.edges, layout.bases, *scratch[:10]),
            *(np.zeros(total, np.int64), np.zeros(total, np.int64), np.arange(batch), c, y, *before),
            *(np.zeros(0, np.float32), *scratch[10:], *feed),
        ]

        def check(inputs) -> np.ndarray:
            need_on_host(inputs)
            fed = network.feed(as_array(inputs)[None])
            if fed.batch != batch:
                raise ValueError(f"inputs: got a batch of {fed.batch}, but the simulator was made for {batch}")
            return fed.row_of if symbols else fed.events().to_dense()[0]

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
