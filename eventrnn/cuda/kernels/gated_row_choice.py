"""The choices of many rows of inputs: gates of the parts of their logits, for `row_tiles.tile_product`.

choose_rows : a block owns a row. It adds the parts of the logits, chooses (`gated_choice.py`), and writes the gates. Of
              a gate of two factors they are parts of the numbers between both, of which the block computes the logits.
              Of rows that share a choice, the block of the row that chose does all of it, and the others nothing.
carry_gates : a block owns a sample. It moves the gates that the sample holds after some rows to the place of those that
              it holds before further ones.

=========== ======== ===========================================================================================
array       memory   shape, dtype, contents
=========== ======== ===========================================================================================
parts       global   (parts, rows, blocks) float32, parts of logits; of a gate of two factors (parts, rows, rank)
inner       shared   (rank,) float32, the numbers between two factors
maxima      global   (rows, warps) int32, `row_tiles.spread_rows`
gates, left global   `row_tiles.py`
=========== ======== ===========================================================================================

The table of shared memory (`tables.PLACE_FIELDS`) has `inner` and the arrays that `gated_choice.py` describes. In that
of the matrix LOGIT_VALUES is the address of the second of two factors, (rank, blocks) float32.
"""

from __future__ import annotations

from numba import int32, int64, types

from eventrnn.cuda import tables
from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.kernels.gated_choice import FACTOR, choose, clear_counts, is_too_large
from eventrnn.cuda.kernels.gated_kernels import magnitude_bits, report
from eventrnn.cuda.kernels.persistent import Lane
from eventrnn.cuda.kernels.ptx import (
    global_float32,
    global_int32,
    global_int64,
    max_of_warp,
    shared_base,
    shared_float32,
    shared_int32,
)
from eventrnn.cuda.kernels.row_tiles import slot_of
from eventrnn.cuda.tables import LANES


@device_function
def sum_parts(sums, parts_at, parts, row, rows, columns, thread, threads):
    """Write the sums of a row (columns,) of their parts (parts, rows, columns), in ascending order."""
    k, pitch = thread, rows * columns
    while k < columns:
        part, each = global_float32(parts_at + 4 * (row * columns + k)), int64(1)
        total = part[0]
        while each < parts:
            total, each = total + part[each * pitch], each + 1
        sums[k], k = total, int32(k + threads)


def choose_rows_kernel():
    """The kernel of `choose_rows`, and its signature.

    matrix_at, place_at : the tables of the matrix and of shared memory
    parts_at, parts     : see the head, and their number
    rows, batch         : rows (step * batch + sample)
    """

    def choose_rows(matrix_at, place_at, parts_at, parts, maxima_at, gates_at, left_at, rows, batch, status_at):
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = thread & int32(31), thread >> int32(5), threads >> int32(5)
        me, m, place, shared = Lane(lane, warp, warps), global_int64(matrix_at), global_int64(place_at), shared_base()
        row = int64(cuda.blockIdx.x)
        step = row // batch
        blocks, period, left = int32(m[tables.ALL_BLOCKS]), m[tables.PERIOD], int64(0)
        if period > 1:
            left = int64(global_int32(left_at)[row - step * batch])
            if step > left and (step - left) % period != 0:
                return
        gates, maxima = (
            shared_float32(shared + place[tables.AT_GATES]),
            shared_int32(shared + place[tables.AT_MAXIMA]),
        )
        words_at, inner_at = shared + place[tables.AT_WORDS], shared + place[tables.AT_INNER]
        words = shared_int32(words_at)
        slot = global_float32(gates_at + 4 * blocks * slot_of(row, batch, period, left))
        all_maxima, own, last, largest = global_int32(maxima_at), row, row, int32(0)
        if step >= left:
            rank, k = int32(m[tables.RANK]), thread
            if rank > 0:
                sum_parts(shared_float32(inner_at), parts_at, parts, row, rows, rank, thread, threads)
                cuda.syncthreads()
                out, inner = global_float32(m[tables.LOGIT_VALUES]), shared_float32(inner_at)
                while k < blocks:
                    total, q = global_float32(m[tables.LOGIT_BIAS])[k], int32(0)
                    while q < rank:
                        total, q = cuda.fma(out[int64(q) * blocks + k], inner[q], total), int32(q + 1)
                    gates[k], k = total, int32(k + threads)
            else:
                sum_parts(gates, parts_at, parts, row, rows, blocks, thread, threads)
            if thread < warps:
                maxima[thread] = all_maxima[row * warps + thread]
            clear_counts(words_at, me)
            cuda.syncthreads()
            bad = choose(
                *(gates, shared_int32(shared + place[tables.AT_KEYS]), shared + place[tables.AT_RATIOS], words_at),
                *(maxima, blocks, int32(m[tables.KEPT_BLOCKS]), int32(m[tables.SOFTMAX]), me),
            )
            if bad and thread == 0:
                report(status_at, m[tables.NUMBER])
            # A thread reads the gates that it has written.
            k = thread
            while k < blocks:
                slot[k], k = gates[k], int32(k + threads)
            largest, own, last = words[FACTOR], row + batch, min(row + (period - 1) * batch, rows - 1)
        else:
            # Gates of before; every warp finds the largest one.
            k = lane
            while k < blocks:
                largest, k = int32(max(largest, magnitude_bits(slot[k]))), int32(k + LANES)
            largest = max_of_warp(largest)
        while own <= last:
            cuda.syncthreads()
            if thread < warps:
                maxima[thread] = all_maxima[own * warps + thread]
            cuda.syncthreads()
            if is_too_large(largest, maxima, me) and thread == 0:
                report(status_at, m[tables.NUMBER])
            own += batch

    return choose_rows, types.void(*[types.int64] * 10)


def carry_gates_kernel():
    """The kernel of `carry_gates`, and its signature.

    gates_at, left_at     : the gates of the rows, and the first steps with those before them
    rows, batch           : rows (step * batch + sample), or no row
    period, blocks        : steps that share a choice, and blocks
    to_at, left_to_at     : (batch, blocks) float32 and (batch,) int32, the gates after the rows and the steps with
                            them; may be the begin of the gates, and left
    """

    def carry_gates(gates_at, left_at, rows, batch, period, blocks, to_at, left_to_at):
        thread, threads, sample = int32(cuda.threadIdx.x), int32(cuda.blockDim.x), int64(cuda.blockIdx.x)
        left, last = int64(global_int32(left_at)[sample]), rows // batch - 1
        place = sample
        if last >= left:
            place = slot_of(last * batch + sample, batch, period, left)
        further = left - last - 1
        if last >= left:
            further = period - 1 - (last - left) % period
        k, source, target = thread, global_float32(gates_at + 4 * place * blocks), global_float32(to_at)
        while k < blocks:
            target[sample * blocks + k], k = source[k], int32(k + threads)
        # All threads have read `left`.
        cuda.syncthreads()
        if thread == 0:
            global_int32(left_to_at)[sample] = int32(further)

    return carry_gates, types.void(*[types.int64] * 8)
