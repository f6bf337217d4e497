"""Through time, a layer at once: all steps of a window forward, and back, inside one compiled call a thread.

A thread has some units: their drives, cells and deltas. Threads meet at a barrier where one needs what all units sent
(forward) or all units' deltas (backward), and there pass units on to whoever waited (`balance`); no sum is ever split,
so the bits depend neither on their number nor on who had a unit when.

What may be skipped. In the released variant the gradient of v is `event * d_y + slope * (v * d_y - threshold * d_c) +
d_c`. Its last term goes through the keep gate at every unit, so deltas are dense; they are zero only for a unit that
no path has reached since the window's end, and nobody looks for those. But `d_y`, the product of the next step's
deltas with the recurrent weights, counts only where a unit fired or has a slope: `backward` makes the dots of those
(unit, sample) pairs and of no others. In the paper's variant the gradient of `r * y_before` is wanted by the
same pairs, as a unit that fired is one of them. Either way what is left out is multiplied by an exact zero. Weight
gradients are outer products with what was sent: no event, no row.
"""

from __future__ import annotations

from eventrnn import cells
from eventrnn.cpu.kernels.cell_update import send
from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.microkernels import prefetch
from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.kernels.spmm import copy, propagate_all
from eventrnn.cpu.kernels.sync import take_piece, wait
from eventrnn.training.bptt.kernels.cell_update import (
    adjoint,
    adjoint_paper,
    hold,
    reset_gate,
    reset_gate_adjoint,
    update,
    update_paper,
)
from eventrnn.training.bptt.kernels.event_lists import OPEN, SENT, TILE_ROWS, list_pairs, tile_rows
from eventrnn.training.bptt.kernels.load_balance import cut_windows, even_shares, meet_and_move
from eventrnn.training.bptt.kernels.sddmm import dot_pieces, dot_single, dots, pack_chunks

# How weights are stored for the backward pass.
DENSE, PIECES, SINGLE = range(3)

# Rows of delta that dots of a window go over together, with all weights and with stored ones: a chunk of the weights,
# or the rows, lie in the L2 cache meanwhile.
WINDOW_ROWS, STORED_ROWS = 6 * TILE_ROWS, 64


@compiled
def forward(
    part, parts, barrier, paper, steps, batch, n,
    # weights
    table, windows, cut, values, index, pointers, bias, threshold,
    # in
    drive_in, pitch, held,
    # scratch
    waited, edges, drives, ids, sent, firsts, counts, cuts, own_ids, own_sent, lists, amounts, x, tile, product,
    # out; y and c have the state before the window in front
    u_out, r_out, g_out, q_out, v_out, y_out, c_out,
):  # fmt: skip
    """All steps of a layer from its input drives, which hold their bias; same bits as the inference engine.

    `windows` are those of a thread's units, the first `cut` of the gates u and r. Given a `table` of all units'
    windows, in that order, threads write to `windows` what they cut out of it, and share the units as they get on.

    Event lists: buffers 0 and 1 in turn hold y of the step before, buffer 2 what the paper's reset gate lets through;
    row b of a buffer has a segment a thread.
    """
    size, wide, drive, mine = batch * n, n + LANES * parts, drives[part], windows[part]
    even_shares(n, parts, edges[part])
    low, high, last = edges[part, part], edges[part, part + 1], len(mine)
    if len(table) > 0:
        gates = cut_windows(table, 0, cut, n, low, high, mine, 0)
        last = cut_windows(table, cut, len(table), n, low, high, mine, gates)
    else:
        gates = cut
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
    own, target = low + LANES * part, parts
    for b in range(batch):
        slot, first = b * parts + part, b * wide + own
        firsts[slot] = first
        counts[slot] = send(y_out, b * n, low, high, ids, sent, first)
    target = wait(barrier, parts, target)
    for t in range(steps):
        buffer, following = (t % 2) * batch, ((t + 1) % 2) * batch
        for q in range(buffer * parts, (buffer + batch) * parts if parts > 1 else 0):
            # All lines at once: another core has them.
            for e in range(firsts[q], firsts[q] + counts[q], LANES):
                prefetch(ids, e)
                prefetch(sent, e)
        propagate_all(
            mine, 0, gates if paper else last, values, index, pointers, bias, 0, n,
            ids, sent, firsts, counts, buffer * parts, parts, batch, *scratch, drive, pitch,
        )  # fmt: skip
        if paper:
            for b in range(batch):
                s = t * size + b * n
                reset_gate(n, low, high, drive_in, (t * batch + b) * pitch, drive, b * pitch, y_out, s, s, r_out, q_out)
                slot, first = (2 * batch + b) * parts + part, (2 * batch + b) * wide + own
                firsts[slot] = first
                counts[slot] = send(q_out, s, low, high, ids, sent, first)
            target = wait(barrier, parts, target)
            propagate_all(
                mine, gates, last, values, index, pointers, bias, 0, n,
                ids, sent, firsts, counts, 2 * batch * parts, parts, batch, *scratch, drive, pitch,
            )  # fmt: skip
        for b in range(batch):
            s, a = t * size + b * n, (t * batch + b) * pitch
            if paper:
                update_paper(
                    n, low, high, drive_in, a, drive, b * pitch, threshold, c_out, y_out, s, s,
                    u_out, g_out, v_out, y_out, c_out, s + size,
                )  # fmt: skip
            else:
                update(
                    n, low, high, drive_in, a, drive, b * pitch, threshold, c_out, s, s,
                    u_out, r_out, g_out, q_out, v_out, y_out, c_out, s + size,
                )  # fmt: skip
            if len(held) > 0:
                hold(low, high, held, paper, threshold, s, s, u_out, v_out, y_out, c_out, s + size)
            slot, first = (following + b) * parts + part, (following + b) * wide + own
            firsts[slot] = first
            counts[slot] = send(y_out, s + size, low, high, ids, sent, first)
        if len(table) == 0:
            target = wait(barrier, parts, target)
            continue
        target = meet_and_move(barrier, part, parts, target, t, waited, edges[part])
        if low != edges[part, part] or high != edges[part, part + 1]:
            low, high = edges[part, part], edges[part, part + 1]
            own = low + LANES * part
            gates = cut_windows(table, 0, cut, n, low, high, mine, 0)
            last = cut_windows(table, cut, len(table), n, low, high, mine, gates)


@compiled
def multiply_back(
    form, width, weights, columns, pointers, low, count, delta, start, pitch, rows, first, end, n,
    who, counts, starts, amounts, pairs, sums, tile, out, at,
):  # fmt: skip
    """out[at + b * n + j] += weights[j, low : low + count] . delta of row b, for the pairs of units `first` to `end`
    that `list_pairs` listed. Weights: chunks of these columns, if all are there; stored ones have two pointers a unit,
    to their first and past their last from column `low` on."""
    if form == DENSE:
        dots(
            weights, low, count, delta, start, pitch, rows, tile_rows(rows), first, end,
            starts, amounts, pairs, sums, tile, out, at, n,
        )  # fmt: skip
    elif form == PIECES:
        dot_pieces(weights, pointers, columns, width, delta, start, pitch, first, end, who, counts, rows, out, at, n)
    else:
        dot_single(weights, pointers, columns, delta, start, pitch, first, end, who, counts, rows, out, at, n)


@compiled
def backward(
    part, parts, barrier, paper, steps, batch, n, kind, dampening, support, threshold,
    # weights; the candidate's pointers are apart in the paper's variant
    form, width, weights, columns, pointers, candidate_pointers,
    # in
    u, r, g, q, v, y, c, d_cell, d_y,
    # updated: gradient of the cell after the window
    d_c,
    # scratch
    waited, edges, d_sum, chunks, who, counts, found, values, starts, amounts, pairs, sums, tiles, d_sent,
    # out
    d_in_out, d_rec_out, pitch, d_threshold, d_bias, made_out,
):  # fmt: skip
    """All steps back: deltas of both drives (one and the same in the paper's variant), rows `pitch` apart.

    `d_y` (T, B, N) is what the layer above and the loss say of what was sent; `d_sum` (B, N) takes the recurrent part
    of one step beside it.
    `made_out` (N,) counts how often a unit's dot was made.
    """
    even_shares(n, parts, edges[part])
    low, high = edges[part, part], edges[part, part + 1]
    size, target, gates = batch * n, parts, 2 * n if paper else 3 * n
    each_cell = size if len(d_cell) > size else 0
    lists, stored, stored_candidate = (starts[part], amounts[part], pairs[part]), weights, weights
    if form == DENSE:
        stored, stored_candidate = chunks[0], chunks[1]
        pack_chunks(weights, 3 * n, 0, gates, low, high, n, stored)
        pack_chunks(weights, 3 * n, gates, 3 * n - gates, low, high, n, stored_candidate)
    for b in range(batch if steps > 0 else 0):
        copy(d_y, (steps - 1) * size + b * n + low, d_sum, b * n + low, high - low)
    for t in range(steps - 1, -1, -1):
        for b in range(batch):
            s, d = t * size + b * n, (t * batch + b) * pitch
            if paper:
                adjoint_paper(
                    n, low, high, kind, dampening, support, threshold,
                    u, g, v, s, c, s, d_sum, d_cell, t * each_cell + b * n,
                    d_c, b * n, d_sent, size + b * n, d_in_out, d, d_threshold, d_bias,
                )  # fmt: skip
            else:
                adjoint(
                    n, low, high, kind, dampening, support, threshold,
                    u, r, g, q, v, s, c, s, d_sum, d_cell, t * each_cell + b * n,
                    d_c, b * n, d_in_out, d_rec_out, d, d_threshold, d_bias,
                )  # fmt: skip
        target = meet_and_move(barrier, part, parts, target, t, waited, edges[part])
        low, high = edges[part, part], edges[part, part + 1]
        start = t * batch * pitch
        if t == 0 and not paper:
            continue
        for b in range(batch if t > 0 else 0):
            copy(d_y, (t - 1) * size + b * n + low, d_sum, b * n + low, high - low)
        list_pairs(
            OPEN if t > 0 else SENT, form == DENSE, kind, dampening, support, threshold,
            v if t > 0 else y, max(0, t - 1) * batch, batch, n, low, high,
            who[part], counts[part], found[part], values[part], made_out, *lists,
        )  # fmt: skip
        if paper:
            for b in range(batch):
                for i in range(b * n + low, b * n + high):
                    d_sent[i] = cells.ZERO
            multiply_back(
                form, width, stored_candidate, columns, candidate_pointers, 2 * n, n,
                d_in_out, start, pitch, batch, low, high, n,
                who[part], counts[part], *lists, sums[part], tiles[part], d_sent, 0,
            )  # fmt: skip
            for b in range(batch):
                s = t * size + b * n
                reset_gate_adjoint(
                    n, low, high, r, s, y, s, d_sent, b * n, d_in_out, start + b * pitch, d_sent, size + b * n, d_bias
                )
                for i in range(low, high if t > 0 else low):
                    d_sum[b * n + i] += d_sent[size + b * n + i]
            target = wait(barrier, parts, target)
        if t > 0:
            multiply_back(
                form, width, stored, columns, pointers, 0, gates,
                d_in_out if paper else d_rec_out, start, pitch, batch, low, high, n,
                who[part], counts[part], *lists, sums[part], tiles[part], d_sum, 0,
            )  # fmt: skip


@compiled
def gradient_of_inputs(
    part, parts, queue, form, width, weights, columns, pointers, n_post, delta, pitch, rows, n_pre,
    source, kind, dampening, support, threshold, v,
    chunks, who, counts, found, values, starts, amounts, pairs, sums, tiles, d_x_out, made_out,
):  # fmt: skip
    """d_x (rows, n_pre) = delta @ weights.T where it is wanted, zero elsewhere: everywhere, or where the unit below (v)
    fired or has a slope. Threads take rows; `made_out` (parts, n_pre). Dense weights come in chunks already."""
    unit, most, stored = 1, STORED_ROWS, weights
    if form == DENSE:
        unit, stored = tile_rows(min(rows, WINDOW_ROWS)), chunks[0]
        most = -(-min(rows, WINDOW_ROWS) // unit)
    first, some = take_piece(queue, -(-rows // unit), most, 1, parts)
    while some > 0:
        first, some = first * unit, min(some * unit, rows - first * unit)
        for i in range(first * n_pre, (first + some) * n_pre):
            d_x_out[i] = cells.ZERO
        list_pairs(
            source, form == DENSE, kind, dampening, support, threshold, v, first, some, n_pre, 0, n_pre,
            who[part], counts[part], found[part], values[part], made_out[part],
            starts[part], amounts[part], pairs[part],
        )  # fmt: skip
        multiply_back(
            form, width, stored, columns, pointers, 0, n_post, delta, first * pitch, pitch, some, 0, n_pre, n_pre,
            who[part], counts[part], starts[part], amounts[part], pairs[part], sums[part], tiles[part],
            d_x_out, first * n_pre,
        )  # fmt: skip
        first, some = take_piece(queue, -(-rows // unit), most, 1, parts)
