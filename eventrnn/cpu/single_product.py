"""One product by itself: what the benchmark times beside libraries, and what the crossover map is made of."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from eventrnn.cpu.engine import CpuEngine
from eventrnn.cpu.kernels.spmm import products
from eventrnn.cpu.plan import Choice, Plan, product_scratch
from eventrnn.cpu.tables import BIAS_REC, END, REC
from eventrnn.events import Events
from eventrnn.network import Layer, Network
from eventrnn.weights import Dense, Weights


class Product:
    """One matrix and the events that arrive: drive[b] = sum over fired j of weights[j] * value[b, j], a step.

    weights : (N, 3N), any format; packed as the engine packs recurrent weights for that batch and activity
    events  : (steps, batch, N)
    choice  : which way it goes
    plan    : of another product of the same weights, to save packing them
    """

    def __init__(
        self, weights: Weights, events: Events, threads: int = 1, choice: Choice | None = None, plan: Plan | None = None
    ):
        self.weights, self.events, self.threads = weights, events, threads
        self.steps, self.batch, n = events.shape
        zeros = np.zeros(3 * n, np.float32)
        unused = Dense(np.zeros((1, 3 * n), np.float32))
        network = Network((Layer(unused, weights, zeros, zeros, np.zeros(n, np.float32)),))
        engine = CpuEngine(network, threads, choice)
        engine.activity[1] = len(events.indices) / max(1, self.steps * self.batch * n)
        self.plan, self.pitch, self.n = plan or engine.plan(1, self.batch), engine.pitch, n
        layer = self.plan.layers[0]
        self.span = int(layer[REC]), int(layer[END])
        self.drive = np.zeros(self.batch * self.pitch, np.float32)
        self.arguments = (
            *(
                *self.span,
                self.plan.values,
                self.plan.index,
                self.plan.pointers,
                engine.layout.biases,
                int(layer[BIAS_REC]),
            ),
            *(n, events.indices, events.values, events.indptr[:-1].copy(), np.diff(events.indptr)),
        )
        self.scratch = product_scratch(threads, n, self.batch, engine.pieces, engine.pitch * engine.choice.may_blas)
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def run(self, start: int = 0, stop: int | None = None) -> None:
        """Every step from `start` to `stop` (all), inside one compiled call a thread; threads never wait."""
        stop = self.steps if stop is None else stop

        def share(part: int) -> None:
            products(
                self.plan.windows[part], *self.arguments, start, stop, self.batch,
                *(each[part] for each in self.scratch), self.drive, self.pitch,
            )  # fmt: skip

        if self.pool is None:
            share(0)
        else:
            list(self.pool.map(share, range(self.threads)))

    def result(self, t: int) -> np.ndarray:
        """The drives of step t, (batch, 3N)."""
        self.run(t, t + 1)
        drives, layout = self.drive.reshape(self.batch, self.pitch), self.plan.layout
        result = np.zeros((self.batch, 3 * self.n), np.float32)
        for segment in (each for part in range(self.threads) for each in layout.segments(0, part, 0, 3)):
            width = segment.stop - segment.start
            result[:, segment.start : segment.stop] = drives[:, segment.position : segment.position + width]
        return result
