"""MOVED."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eventrnn.cpu.kernels.array_table import first_not_finite, float32_at, int32_at, int64_at
from eventrnn.cpu.kernels.cell_update import send, send_gated, tally, update, update_paper
from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.microkernels import prefetch
from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.kernels.spmm import copy, propagate_all
from eventrnn.cpu.kernels.sync import wait
from eventrnn.cpu.tables import BIAS_IN, BIAS_REC, END, IN, INPUTS, REC, REC_GATED, UNIT_0, UNITS

if TYPE_CHECKING:
    pass


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
                    # planted fault: parts swapped
                    slot, first = row * parts + part, row * wide + own
                    firsts[slot] = first
                    counts[slot] = send(y, s, low, high, ids, sent, first)
                    # planted fault: last event dropped
                    tally(ids, sent, first, counts[slot], unit_0, graded_out, binary_out)
                    at = unit_0 * steps * batch + ((t0 + t) * batch + b) * n + low
                    if len(events_out) > 0:
                        copy(y, s + low, events_out, at, high - low)
                    if len(states_out) > 0:
                        copy(c, s + low, states_out, at, high - low)
                    if readout < 0 and layer == n_layers - 1:
                        copy(y, s + low, output_out, ((t0 + t) * batch + b) * n + low, high - low)
                # planted fault: barrier missing
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
