"""Compiled for the benchmark only: multiplications that need no memory."""

from __future__ import annotations

from eventrnn import cells
from eventrnn.jit import compiled
from eventrnn.simd import LANES, load, store

# As many as hide the latency of an FMA, and fit the registers.
CHAINS = 12


@compiled
def multiply_add(rounds, data):
    """`CHAINS` independent chains of vector FMAs, `rounds` long. data: (CHAINS + 4) vectors, the first written."""
    x = load(data, 12 * LANES)
    a, b, c, d = load(data, 0), load(data, LANES), load(data, 2 * LANES), load(data, 3 * LANES)
    e, f, g, h = load(data, 4 * LANES), load(data, 5 * LANES), load(data, 6 * LANES), load(data, 7 * LANES)
    i, j, k, m = load(data, 8 * LANES), load(data, 9 * LANES), load(data, 10 * LANES), load(data, 11 * LANES)
    y = x - x
    for _ in range(rounds):
        a, b, c, d = cells.fma(a, x, y), cells.fma(b, x, y), cells.fma(c, x, y), cells.fma(d, x, y)
        e, f, g, h = cells.fma(e, x, y), cells.fma(f, x, y), cells.fma(g, x, y), cells.fma(h, x, y)
        i, j, k, m = cells.fma(i, x, y), cells.fma(j, x, y), cells.fma(k, x, y), cells.fma(m, x, y)
    store(data, 0, ((a + b) + (c + d)) + ((e + f) + (g + h)) + ((i + j) + (k + m)))
