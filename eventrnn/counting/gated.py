"""Operations of matrices of gated blocks (`weights/gated.py`), from the recorded events.

Which weights act depends on the input, so that the numbers of events per unit do not tell the operations. The blocks
that each sample chose in each step are computed again from the events, with the bits of the run. In addition to the
counts of other matrices there are:

| count       | definition                                                                                         |
| ----------- | -------------------------------------------------------------------------------------------------- |
| `selection` | multiplications and divisions by which blocks are chosen: of the logits, one per event and block,  |
|             | or, with two factors, `rank` per event and `rank` per block; of the gates, two per chosen block    |
|             | (its ratio and its gate); of the scaled inputs, one per event and executed block of the unit. Only |
|             | the last ones in a step that has the gates of an earlier one (`GatedBlocks.gate_period`)           |
| `chosen`    | chosen blocks: `GatedBlocks.kept_blocks` per sample and step                                       |
| `blocks`    | executed blocks: chosen with a gate that is not zero, stored, and with an event of one of its units |

`executed` are the products of the executed blocks with the events of their units, with padding columns; `effective`
are those of them whose weight is not zero. All of them count as graded, because a gate times a binary event is not
binary. `weight_bytes` are, per event, the row of the gate, and of each executed block its values and one index, and
the scale of an int8 unit that has an executed block; and per sample and step the second factor of a gate. A step that
has the gates of an earlier one reads the gates of the chosen blocks in place of the gate's rows and second factor. Gate
biases, as all biases, are not counted.
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.events import Events
from eventrnn.network import Network
from eventrnn.reference_products import ChosenBlocks, gates_of_logits, propagate, weight_arrays
from eventrnn.state import HeldGates
from eventrnn.weights import GatedBlocks
from eventrnn.weights.gated import chosen_at, rows_of_part

# Numbers of the arrays that the gates of some rows take at once.
PART = 1 << 22


def records_of(network: Network) -> tuple[str, ...]:
    """What a run of the network must record so that `count` can count it: events, where a matrix has gated blocks."""
    return ("events",) if any(isinstance(w, GatedBlocks) for w in network.matrices().values()) else ()


def counts_of_rows(
    name: str, weights: GatedBlocks, events: Events, present: np.ndarray, held: HeldGates | None = None
) -> dict[str, np.ndarray]:
    """The counts of one matrix per step and sample: arrays (steps, batch) int64 by count.

    name    : of the matrix
    events  : what the matrix receives, (steps, batch, n_pre)
    present : (steps, batch) whole numbers, 0 for padding, in which nothing is computed
    held    : what the state before the first step held, where some steps share a choice; None for nothing

    O(events * blocks + steps * batch * blocks) time.
    """
    n_rows = events.shape[0] * events.shape[1]
    names = ("effective", "executed", "weight_bytes", "selection", "chosen", "blocks")
    found = {count: np.zeros(n_rows, np.int64) for count in names}
    rows = np.flatnonzero(present.ravel())
    most = max(1, PART // max(1, weights.n_blocks + weights.shape[0]))
    left = np.zeros(events.shape[1], np.int64) if held is None else held.left
    tables, sources = _tables(weights), chosen_at(weights.gate_period, left, events.shape[0])
    for first in range(0, len(rows), most):
        part = rows[first : first + most]
        x, gates = _dense_rows(events, part), _gates(name, weights, events, sources[part], held)
        for count, values in _counts(weights, x, gates, sources[part] == part, tables).items():
            found[count][part] = values
    found["dense"] = present.ravel() * (weights.shape[0] * weights.shape[1])
    found["graded"], found["binary"] = found["effective"], np.zeros(n_rows, np.int64)
    return {count: values.reshape(events.shape[:2]) for count, values in found.items()}


def _tables(weights: GatedBlocks) -> tuple[np.ndarray, np.ndarray]:
    """Non-zero weights of each unit in each block column (n_pre, block columns), and stored blocks (grid) boolean."""
    (rows, columns), blocks = weights.grid, weights.blocks
    stored = np.zeros((rows, columns), bool)
    stored[np.repeat(np.arange(rows), np.diff(blocks.indptr)), blocks.indices] = True
    there = np.zeros((weights.shape[0], columns * weights.block[1]), bool)
    there[:, : weights.shape[1]] = blocks.to_dense() != 0
    return there.reshape(weights.shape[0], columns, weights.block[1]).sum(axis=2), stored


def _dense_rows(events: Events, rows: np.ndarray) -> np.ndarray:
    """Some rows of events (n,) as numbers (n, n_pre) float32."""
    x = np.zeros((len(rows), events.shape[2]), np.float32)
    for k, row in enumerate(rows):
        entries = slice(events.indptr[row], events.indptr[row + 1])
        x[k, events.indices[entries]] = events.values[entries]
    return x


def _gates(name: str, weights: GatedBlocks, events: Events, rows: np.ndarray, held: HeldGates | None) -> np.ndarray:
    """The gates (n, blocks) that inputs chose, of the rows (n,) that `chosen_at` gives."""
    sources, place = np.unique(rows, return_inverse=True)
    before, gates = np.count_nonzero(sources < 0), np.zeros((len(sources), weights.n_blocks), np.float32)
    if held is not None:
        gates[:before] = held.gates[sources[:before]]
    gates[before:] = gates_of_active(name, weights, _dense_rows(events, sources[before:]))
    return gates[place]


def _counts(
    weights: GatedBlocks, x: np.ndarray, gates: np.ndarray, fresh: np.ndarray, tables: tuple[np.ndarray, np.ndarray]
) -> dict[str, np.ndarray]:
    """The counts of inputs x (n, n_pre) with gates (n, blocks), (n,) int64 each; `fresh` (n,) says which chose."""
    fan_out, stored = tables
    (r, c), (block_rows, columns) = weights.block, weights.grid
    fired = x != 0
    used = (gates != 0).reshape(-1, block_rows, columns) & stored
    padded = np.zeros((len(x), block_rows * r), np.int64)
    padded[:, : fired.shape[1]] = fired
    active = padded.reshape(len(x), block_rows, r).sum(axis=2)
    products = (active[:, :, None] * used).sum(axis=(1, 2))
    # Per unit, the non-zero weights in its executed blocks.
    unit = np.arange(weights.shape[0]) // r
    effective = np.array([(used[k][unit[f]] * fan_out[f]).sum() for k, f in enumerate(fired)], np.int64)
    scales = (active * used.any(axis=2)).sum(axis=1) if weights.scales is not None else 0
    out = 0 if weights.gate_out is None else weights.gate_out.size
    logits, kept = fresh * (active.sum(axis=1) * weights.gate.shape[1] + out), weights.kept_blocks
    return {
        "effective": effective,
        "executed": products * c,
        "weight_bytes": 4 * (logits + kept * ~fresh) + products * (c * weights.values.itemsize + 4) + 4 * scales,
        "selection": logits + 2 * kept * fresh + products,
        "chosen": np.full(len(x), kept),
        "blocks": (used & (active > 0)[:, :, None]).sum(axis=(1, 2)),
    }


def gates_of_active(name: str, weights: GatedBlocks, x: np.ndarray) -> np.ndarray:
    """`reference.block_gates` of inputs (rows, n_pre), which visits only the units that are active.

    Whether a product of gate and input is finite is left to the run, which has refused it.
    """
    arrays = weight_arrays(name, weights, np.float32)
    assert isinstance(arrays, ChosenBlocks)
    out = weights.gate_out
    sums = np.repeat((weights.gate_bias if out is None else np.zeros(len(out), np.float32))[None], len(x), axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        rows, active = rows_of_part(weights.block[0]), np.flatnonzero(x.any(axis=0))
        for part in np.unique(active // rows):
            of_part = sums if part == 0 else np.zeros_like(sums)
            for j in active[active // rows == part]:
                there = np.flatnonzero(x[:, j])
                of_part[there] = cells.fma(weights.gate[j][None], x[there, j, None], of_part[there])
            sums = of_part if part == 0 else sums + of_part
        return gates_of_logits(arrays, sums if out is None else propagate(out, sums, weights.gate_bias))
