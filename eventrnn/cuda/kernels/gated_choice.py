"""The choice of gated blocks: device functions by which a block of threads turns logits into gates.

`weights/gated.py` defines the choice and the gates; they have the bits of `reference_products.block_gates`.

choose : all threads of a block, one row of inputs. A search finds a key from which on as many logits lie as are chosen.
         It ends early where no logit equals the smallest chosen one; otherwise equal ones are taken in ascending
         order. One warp sums the ratios in ascending order of blocks.

=========== ======== ===========================================================================================
array       memory   shape, dtype, contents
=========== ======== ===========================================================================================
gates       shared   (blocks,) float32, logits and then gates, 0 for blocks that are not chosen
keys        shared   (blocks,) int32: bits of a logit in the order of the numbers; then the place among the chosen
ratios      shared   (kept blocks + RATIO_PAD,) float32, of the chosen blocks in ascending order, then zeros
words       shared   (CHOICE_WORDS + 64 per warp,) int32, counts per warp and what one warp tells the others
maxima      shared   (32,) int32, per warp the bits of the largest magnitude among its inputs
=========== ======== ===========================================================================================
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64

from eventrnn.cuda.device import cuda, device_function, libdevice
from eventrnn.cuda.kernels.gated_strips import load8
from eventrnn.cuda.kernels.ptx import (
    add_shared,
    exp_float32,
    load_shared4,
    max_of_warp,
    min_of_warp,
    shared_float32,
    shared_int32,
    sum_of_warp,
    take_shared,
)
from eventrnn.cuda.kernels.strip_product import FULL_WARP, popcount
from eventrnn.cuda.tables import CHOICE_WORDS, CLASSES, LANES, RANKED, RATIO_PAD

# A key is the bits of a float32 as an integer that is in the same order: those of a negative number are flipped, apart
# from the sign. The same operation turns a key into bits.
LOWEST_KEY, MAGNITUDE = np.int32(-(1 << 31)), np.int32((1 << 31) - 1)

# Places of `words`: counts of two votes per warp, the largest and the smallest key of each warp, whether the gates are
# not finite, the bits of what ratios are multiplied by, how many logits of the class of the smallest chosen one are
# listed, and the bits of the range of the last logits (`range_of`); counts of classes of logits, the keys of the listed
# ones, and twice the counts of the candidates by each warp.
SECOND_COUNTS, LARGEST, SMALLEST, NOT_FINITE, FACTOR, LISTED, BOTTOM, SCALE = 32, 64, 96, 128, 129, 130, 131, 132
CLASS_COUNTS, LIST, COUNTS = 160, 160 + CLASSES, 160 + CLASSES + RANKED

assert CLASSES == 8 * LANES and RANKED == LANES and COUNTS == CHOICE_WORDS, "a lane has eight classes and one key"

# Turns of the search that divide the interval of the logits, before those that divide the interval of the keys. The
# former need fewer turns for logits that are spread evenly, the latter a limited number for all.
LINEAR_TURNS = 8


@device_function
def key_of(word):
    """The key of the bits of a float32, and the bits of a key."""
    return int32(word ^ ((word >> int32(31)) & MAGNITUDE))


@device_function
def before_and_all(counts, first, me):
    """The sums of counts[first:] over the earlier warps and over all warps."""
    lane, warp, warps = me
    each = int32(0)
    if lane < warps:
        each = counts[int32(first + lane)]
    earlier = each
    if lane >= warp:
        earlier = int32(0)
    return sum_of_warp(earlier), sum_of_warp(each)


@device_function
def sum_in_order(at, count):
    """The sum from +0 on of `count` float32 in shared memory, one after the other, with zeros behind them.

    Zeros are added up to a multiple of 32. Three times eight numbers are under way while eight are added.
    """
    total, k, sixteen = np.float32(0), int32(0), int64(16)
    a0, a1, a2, a3, a4, a5, a6, a7 = load8(at, sixteen)
    b0, b1, b2, b3, b4, b5, b6, b7 = load8(at + int64(32), sixteen)
    c0, c1, c2, c3, c4, c5, c6, c7 = load8(at + int64(64), sixteen)
    while k < count:
        d0, d1, d2, d3, d4, d5, d6, d7 = load8(at + int64(96), sixteen)
        total = total + a0
        total = total + a1
        total = total + a2
        total = total + a3
        total = total + a4
        total = total + a5
        total = total + a6
        total = total + a7
        a0, a1, a2, a3, a4, a5, a6, a7 = load8(at + int64(128), sixteen)
        total = total + b0
        total = total + b1
        total = total + b2
        total = total + b3
        total = total + b4
        total = total + b5
        total = total + b6
        total = total + b7
        b0, b1, b2, b3, b4, b5, b6, b7 = load8(at + int64(160), sixteen)
        total = total + c0
        total = total + c1
        total = total + c2
        total = total + c3
        total = total + c4
        total = total + c5
        total = total + c6
        total = total + c7
        c0, c1, c2, c3, c4, c5, c6, c7 = load8(at + int64(192), sixteen)
        total = total + d0
        total = total + d1
        total = total + d2
        total = total + d3
        total = total + d4
        total = total + d5
        total = total + d6
        total = total + d7
        k, at = int32(k + 32), at + int64(128)
    return total


@device_function
def candidate_of(low, high, turn, share):
    """A key between two keys `low` and `high`, exclusive, that are not neighbours, at a share of their interval."""
    if turn < LINEAR_TURNS:
        bottom, top = libdevice.int_as_float(key_of(int32(low))), libdevice.int_as_float(key_of(int32(high - int64(1))))
        between = (np.float32(1) - share) * bottom + share * top
        candidate = int64(key_of(libdevice.float_as_int(between)))
    else:
        candidate = low + int64(np.float32(high - low) * share)
    return int32(min(max(candidate, low + int64(1)), high - int64(1)))


@device_function
def reaching(candidate, logits, first, step, n):
    """How many of logits[first:n:step] are at least a candidate. All lanes read the same number at a time."""
    count, b = int32(0), first
    while b + 3 * step < n:
        one, two = int32(logits[b] >= candidate), int32(logits[int32(b + step)] >= candidate)
        three, four = int32(logits[int32(b + 2 * step)] >= candidate), int32(logits[int32(b + 3 * step)] >= candidate)
        count, b = int32(int32(count + one + two) + int32(three + four)), int32(b + 4 * step)
    while b < n:
        count, b = int32(count + int32(logits[b] >= candidate)), int32(b + step)
    return count


@device_function
def sum_over_warps(counts, first, warps, lane):
    """The sum of a count of every warp: those of a warp are 32 numbers, of which a lane adds one each."""
    total, at, k = int32(0), int32(first + lane), int32(0)
    while k + 4 <= warps:
        one, two = counts[at], counts[int32(at + LANES)]
        three, four = counts[int32(at + 2 * LANES)], counts[int32(at + 3 * LANES)]
        total, at, k = int32(int32(total + one + two) + int32(three + four)), int32(at + 4 * LANES), int32(k + 4)
    while k < warps:
        total, at, k = int32(total + counts[at]), int32(at + LANES), int32(k + 1)
    return total


@device_function
def smallest_chosen(logits, words, n, kept, smallest, largest, me):
    """A key from which on `kept` keys lie: all keys lie between `smallest` and `largest`, int32.

    In each turn every lane has a candidate, the same in all warps. Every warp compares some of the logits with them.

    Returns it, how many keys reach it, and how many are larger. The former is `kept` unless several keys equal the
    smallest chosen one; then the result is that key. All threads must call it, after a block barrier.
    """
    lane, warp, warps = me
    low, high, reached, above, turn = int64(smallest), int64(largest) + int64(1), n, int32(0), int32(0)
    share = np.float32(lane + 1) / np.float32(LANES + 1)
    while reached != kept and high - low > 1:
        candidate = candidate_of(low, high, turn, share)
        count = reaching(libdevice.int_as_float(key_of(candidate)), logits, warp, warps, n)
        # Other warps may still read what was written in the turn before.
        area = int32(COUNTS + (turn & int32(1)) * (LANES * warps))
        words[int32(area + warp * LANES + lane)] = count
        cuda.syncthreads()
        count = sum_over_warps(words, area, warps, lane)
        # The last candidate that enough keys reach, and the first one that too few reach.
        begin, end, enough, few = int32(low), MAGNITUDE, reached, above
        if count >= kept:
            begin, enough = candidate, int32(min(enough, count))
        else:
            end, few = candidate, int32(max(few, count))
        low, reached, above = int64(max_of_warp(begin)), min_of_warp(enough), max_of_warp(few)
        high = min(high, int64(min_of_warp(end)))
        turn = int32(turn + 1)
    return int32(low), reached, above


@device_function
def class_of(logit, bottom, scale):
    """The class of a logit; that of a larger one is the same or a larger one."""
    place, each = np.float32(0), (logit - bottom) * scale
    if each > place:
        place = each
    if place > np.float32(CLASSES - 1):
        place = np.float32(CLASSES - 1)
    return int32(place)


@device_function
def range_of(smallest, largest):
    """The smallest logit, and the classes per unit of logits, from two keys. The latter are 0 where no classes divide
    the logits: their difference may be infinite, zero, or so small that the quotient is not finite."""
    bottom, scale = libdevice.int_as_float(key_of(smallest)), np.float32(0)
    width = libdevice.int_as_float(key_of(largest)) - bottom
    if width > 0 and width - width == 0:
        scale = np.float32(CLASSES - 1) / width
    if not (scale > 0 and scale - scale == 0):
        scale = np.float32(0)
    return bottom, scale


@device_function
def count_class(words_at, logit, bottom, scale):
    """Count a logit in its class."""
    if scale > 0:
        add_shared(int32(words_at + int64(4) * (CLASS_COUNTS + class_of(logit, bottom, scale))), int32(1))


@device_function
def clear_counts(words_at, me):
    """Write zeros to the counts of the classes, as a choice needs them. The block is synchronised afterwards."""
    words, b = shared_int32(words_at), int32(me[1] * LANES + me[0])
    if b == 0:
        words[LISTED], words[SCALE] = int32(0), int32(0)
    while b < CLASSES:
        words[int32(CLASS_COUNTS + b)], b = int32(0), int32(b + me[2] * LANES)


@device_function
def after_class(count, wanted, larger, reaching_wanted, classes):
    """Take a further count of the logits of some classes and larger ones, in ascending order.

    Returns the largest count below `wanted`, the smallest one that is not, and how many are below.
    """
    if count < wanted:
        larger, classes = int32(max(larger, count)), int32(classes + 1)
    else:
        reaching_wanted = int32(min(reaching_wanted, count))
    return larger, reaching_wanted, classes


@device_function
def class_of_smallest_chosen(words_at, kept, lane):
    """The class in which the `kept`-th largest logit lies, how many logits it has, and how many lie in larger ones.

    A lane counts eight neighbouring classes; the first lane has the largest ones.
    """
    counts_at = int32(words_at + int64(4 * CLASS_COUNTS)) + int32(32 * (LANES - 1 - lane))
    h, g, f, e = load_shared4(int32(counts_at))
    d, c, b, a = load_shared4(int32(counts_at + int32(16)))
    own = int32(int32(int32(a + b) + int32(c + d)) + int32(int32(e + f) + int32(g + h)))
    total, distance, none = own, int32(1), int32(0)
    while distance < LANES:
        earlier = cuda.shfl_sync(FULL_WARP, total, max(int32(lane - distance), none))
        if lane >= distance:
            total = int32(total + earlier)
        distance = int32(2 * distance)
    # How many logits lie in the largest two of the own classes, in the largest three, and so on.
    before, ab = int32(total - own), int32(a + b)
    wanted, to_c, to_d = int32(kept - before), int32(ab + c), int32(int32(ab + c) + d)
    to_e, to_f, to_g = int32(to_d + e), int32(to_d + int32(e + f)), int32(own - h)
    above, reached, classes = after_class(a, wanted, none, own, none)
    above, reached, classes = after_class(ab, wanted, above, reached, classes)
    above, reached, classes = after_class(to_c, wanted, above, reached, classes)
    above, reached, classes = after_class(to_d, wanted, above, reached, classes)
    above, reached, classes = after_class(to_e, wanted, above, reached, classes)
    above, reached, classes = after_class(to_f, wanted, above, reached, classes)
    above, reached, classes = after_class(to_g, wanted, above, reached, classes)
    size, place = int32(reached - above), int32(int32(CLASSES - 1 - 8 * lane) - classes)
    above = int32(before + above)
    here = int32(cuda.ffs(cuda.ballot_sync(FULL_WARP, total >= kept)) - 1)
    return (
        cuda.shfl_sync(FULL_WARP, place, here),
        cuda.shfl_sync(FULL_WARP, size, here),
        cuda.shfl_sync(FULL_WARP, above, here),
    )


@device_function
def smallest_of_class(words_at, size, wanted, lane):
    """The `wanted`-th largest of `size` listed keys, how many of them reach it, and how many are larger."""
    words = shared_int32(words_at)
    key, larger, k = LOWEST_KEY, int32(0), int32(0)
    if lane < size:
        key = words[int32(LIST + lane)]
    while k < size:
        a, b, c, d = load_shared4(int32(words_at + int64(4) * (LIST + k)))
        one, two = int32(a > key), int32(k + 1 < size and b > key)
        three, four = int32(k + 2 < size and c > key), int32(k + 3 < size and d > key)
        larger, k = int32(int32(larger + one + two) + int32(three + four)), int32(k + 4)
    # The keys that fewer than `wanted` ones exceed; the smallest of them is the result.
    result = MAGNITUDE
    if lane < size and larger < wanted:
        result = key
    result = min_of_warp(result)
    votes = cuda.ballot_sync(FULL_WARP, lane < size and key >= result)
    votes_above = cuda.ballot_sync(FULL_WARP, lane < size and key > result)
    return result, popcount(votes), popcount(votes_above)


@device_function
def divided_choice(logits, keys, words_at, n, kept, smallest, largest, bottom, scale, me):
    """`smallest_chosen` by the classes of the logits, which were counted. If too many logits lie in one class, or no
    classes divide them, it is a search."""
    lane, warp, warps = me
    thread, threads, words = int32(warp * LANES + lane), int32(warps * LANES), shared_int32(words_at)
    size, place, above = int32(RANKED + 1), int32(0), int32(0)
    if scale > 0:
        place, size, above = class_of_smallest_chosen(words_at, kept, lane)
    if size <= RANKED:
        b = thread
        while b < n:
            if class_of(logits[b], bottom, scale) == place:
                words[int32(LIST + take_shared(int32(words_at + int64(4 * LISTED)), int32(1)))] = keys[b]
            b = int32(b + threads)
        cuda.syncthreads()
        lowest, reached, larger = smallest_of_class(words_at, size, int32(kept - above), lane)
        reached, above = int32(above + reached), int32(above + larger)
    else:
        lowest, reached, above = smallest_chosen(logits, words, n, kept, smallest, largest, me)
    return lowest, reached, above


@device_function
def place_chosen(gates, keys, ratios, words, n, lowest, reached, room, softmax, pivot, me):
    """Write numbers of the chosen blocks to `ratios`, in ascending order, and their places to `keys`, else -1.

    The numbers are ratios for the rule "softmax", whose largest logit is `pivot`, and logits for the rule "linear".

    lowest, reached : the result of `smallest_chosen`; room : how many blocks with this key are chosen, or -1 for all
    """
    lane, warp, warps = me
    lanes_below = int32((int32(1) << lane) - 1)
    ties, chosen, first, area = int32(0), int32(0), int32(0), int32(0)
    while first < n:
        # Two neighbours per thread.
        b = int32(first + 2 * (warp * LANES + lane))
        c = int32(b + 1)
        key, value, next_key, next_value = LOWEST_KEY, np.float32(0), LOWEST_KEY, np.float32(0)
        if b < n:
            key, value = keys[b], gates[b]
        if c < n:
            next_key, next_value = keys[c], gates[c]
        taken, next_taken = b < n and key >= lowest, c < n and next_key >= lowest
        if room >= 0:
            tied, next_tied = b < n and key == lowest, c < n and next_key == lowest
            votes, next_votes = cuda.ballot_sync(FULL_WARP, tied), cuda.ballot_sync(FULL_WARP, next_tied)
            if lane == 0:
                words[warp] = int32(popcount(votes) + popcount(next_votes))
            cuda.syncthreads()
            before, every = before_and_all(words, int32(0), me)
            rank = int32(ties + before + popcount(votes & lanes_below) + popcount(next_votes & lanes_below))
            if tied and rank >= room:
                taken = False
            if next_tied and rank + int32(tied) >= room:
                next_taken = False
            ties = int32(ties + every)
            area = int32(0)
        # Other warps may still read the counts of the turn before.
        area = int32(SECOND_COUNTS - area)
        votes, next_votes = cuda.ballot_sync(FULL_WARP, taken), cuda.ballot_sync(FULL_WARP, next_taken)
        if lane == 0:
            words[int32(area + warp)] = int32(popcount(votes) + popcount(next_votes))
        if softmax != 0:
            value, next_value = exp_float32(value - pivot), exp_float32(next_value - pivot)
        cuda.syncthreads()
        before, every = before_and_all(words, area, me)
        place = int32(chosen + before + popcount(votes & lanes_below) + popcount(next_votes & lanes_below))
        next_place = int32(place + int32(taken))
        if b < n:
            keys[b] = int32(-1)
            if taken:
                keys[b], ratios[place] = place, value
        if c < n:
            keys[c] = int32(-1)
            if next_taken:
                keys[c], ratios[next_place] = next_place, next_value
        chosen = int32(chosen + every)
        first = int32(first + 2 * warps * LANES)


@device_function
def divide_by_largest(ratios, kept, lane):
    """One warp divides the chosen logits by the first one of the largest magnitude, and all are 1 if that is 0."""
    best, k = int32(0), lane
    while k < kept:
        best = int32(max(best, libdevice.float_as_int(ratios[k]) & MAGNITUDE))
        k = int32(k + LANES)
    best = max_of_warp(best)
    place, k = kept, lane
    while k < kept:
        if place == kept and (libdevice.float_as_int(ratios[k]) & MAGNITUDE) == best:
            place = k
        k = int32(k + LANES)
    pivot = ratios[min_of_warp(place)]
    cuda.syncwarp(FULL_WARP)
    k = lane
    while k < kept:
        ratio = np.float32(1)
        if pivot != 0:
            ratio = ratios[k] / pivot
        ratios[k] = ratio
        k = int32(k + LANES)
    cuda.syncwarp(FULL_WARP)


@device_function
def is_too_large(largest, maxima, me):
    """In warp 0: whether the largest gate times the largest input is not finite. largest : bits of the gate."""
    lane, warp, warps = me
    too_large = False
    if warp == 0:
        each = int32(0)
        if lane < warps:
            each = maxima[lane]
        most = libdevice.int_as_float(largest) * libdevice.int_as_float(max_of_warp(each))
        too_large = most - most != 0
    return too_large


@device_function
def choose_places(gates, keys, ratios_at, words_at, n, kept, softmax, again, me):
    """Turn the logits of `n` blocks into `keys` and ratios (`place_chosen`). Returns True where a logit is not finite.

    again : whether the range of the last logits divides these into classes: any range is right. The next one will do
            so, too. With 0 it is their own range, for which the block waits once more

    All threads must call it, after `clear_counts`; the block is synchronised at the end.
    """
    lane, warp, warps = me
    thread, threads = int32(warp * LANES + lane), int32(warps * LANES)
    ratios, words = shared_float32(ratios_at), shared_int32(words_at)
    bad, b, largest, smallest = int32(0), thread, LOWEST_KEY, MAGNITUDE
    bottom, scale = np.float32(0), np.float32(0)
    if again != 0:
        bottom, scale = libdevice.int_as_float(words[BOTTOM]), libdevice.int_as_float(words[SCALE])
    while b < n:
        logit = gates[b] + np.float32(0)
        if logit - logit != 0:
            bad = int32(1)
        key = key_of(libdevice.float_as_int(logit))
        gates[b], keys[b] = logit, key
        count_class(words_at, logit, bottom, scale)
        largest, smallest = int32(max(largest, key)), int32(min(smallest, key))
        b = int32(b + threads)
    if thread < RATIO_PAD:
        ratios[int32(kept + thread)] = np.float32(0)
    largest, smallest = max_of_warp(largest), min_of_warp(smallest)
    if lane == 0:
        words[int32(LARGEST + warp)], words[int32(SMALLEST + warp)] = largest, smallest
    faulty = cuda.syncthreads_or(bad) != 0
    largest, smallest = LOWEST_KEY, MAGNITUDE
    if lane < warps:
        largest, smallest = words[int32(LARGEST + lane)], words[int32(SMALLEST + lane)]
    largest, smallest = max_of_warp(largest), min_of_warp(smallest)
    if again == 0:
        bottom, scale = range_of(smallest, largest)
        b = thread
        while b < n:
            count_class(words_at, gates[b], bottom, scale)
            b = int32(b + threads)
        cuda.syncthreads()
    lowest, reached, above = divided_choice(
        *(gates, keys, words_at, n, kept, smallest, largest, bottom, scale, me),
    )
    room, pivot = int32(-1), libdevice.int_as_float(key_of(largest))
    if reached != kept:
        room = int32(kept - above)
    place_chosen(gates, keys, ratios, words, n, lowest, reached, room, softmax, pivot, me)
    # All warps have read the counts.
    clear_counts(words_at, me)
    if again != 0 and thread == 0:
        bottom, scale = range_of(smallest, largest)
        words[BOTTOM], words[SCALE] = libdevice.float_as_int(bottom), libdevice.float_as_int(scale)
    cuda.syncthreads()
    return faulty


@device_function
def find_factor(ratios_at, words_at, maxima, n, kept, softmax, warps, lane):
    """In one warp: what the ratios are multiplied by, and whether gates and their products with inputs are finite."""
    words = shared_int32(words_at)
    if softmax == 0:
        divide_by_largest(shared_float32(ratios_at), kept, lane)
    # The largest ratio is 1, so that the factor is the largest gate.
    factor, each = np.float32(n) / sum_in_order(ratios_at, kept), int32(0)
    if lane < warps:
        each = maxima[lane]
    most = factor * libdevice.int_as_float(max_of_warp(each))
    if lane == 0:
        words[NOT_FINITE] = int32(not (factor - factor == 0 and most - most == 0))
        words[FACTOR] = libdevice.float_as_int(factor)


@device_function
def factor_of(words):
    """What the ratios are multiplied by, after `find_factor` and a block barrier."""
    return libdevice.int_as_float(words[FACTOR])


@device_function
def write_gates(gates, keys, ratios_at, words_at, n, me):
    """Write the gates. Returns True where they are not finite. The block is synchronised before, and by the caller
    before other threads than the own one read `gates`."""
    words, ratios = shared_int32(words_at), shared_float32(ratios_at)
    b, threads, factor = int32(me[1] * LANES + me[0]), int32(me[2] * LANES), factor_of(words)
    while b < n:
        gate = np.float32(0)
        if keys[b] >= 0:
            gate = ratios[keys[b]] * factor
        gates[b] = gate
        b = int32(b + threads)
    return words[NOT_FINITE] != 0


@device_function
def choose(gates, keys, ratios_at, words_at, maxima, n, kept, softmax, me):
    """Turn the logits of `n` blocks into gates. Returns True where they are not finite. All threads must call it, after
    `clear_counts`.

    The caller synchronises the block before other threads than the own one read `gates`.
    """
    faulty = choose_places(gates, keys, ratios_at, words_at, n, kept, softmax, int32(0), me)
    if me[1] == 0:
        find_factor(ratios_at, words_at, maxima, n, kept, softmax, me[2], me[0])
    cuda.syncthreads()
    not_finite = write_gates(gates, keys, ratios_at, words_at, n, me)
    return faulty or not_finite
