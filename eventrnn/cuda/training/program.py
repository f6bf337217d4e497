"""One size of window: what is put on the lanes for an update, as graphs, and how its figures are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from eventrnn._checks import class_array, float32_array, plain_array
from eventrnn.backend import WindowResult
from eventrnn.cuda.run_buffers import Replay
from eventrnn.cuda.training.backward import TrainingWindow
from eventrnn.cuda.training.kernels import sums, updates
from eventrnn.cuda.training.memory import NO_SOFT_TARGETS, Sizes, SoftSizes
from eventrnn.state import gates_not_finite
from eventrnn.weights import MatrixId

if TYPE_CHECKING:
    from eventrnn.cuda.training.engine import CudaTrainingEngine
    from eventrnn.training.targets import SoftTargets

F32 = np.float32


class Program:
    """The update on windows of `steps` steps and `batch` samples.

    averaged : whether the running mean of the parameters is kept
    """

    def __init__(self, engine: CudaTrainingEngine, steps: int, batch: int, *, averaged: bool):
        self.engine, self.steps, self.batch, self.averaged = engine, steps, batch, averaged
        self.rows = steps * batch
        self.memory, self.sizes = engine.memory, engine.sizes
        self.window = TrainingWindow(
            engine.sizes,
            engine.lanes,
            engine.memory,
            engine.parameters,
            steps,
            batch,
            training=True,
            seed=engine.noise_seed,
            exchange=engine.exchange,
        )
        self.joined_rows = self.window.joined_rows
        self.spans = engine.device.put(np.array(self._spans(), np.int64))
        queue = engine.device.queue
        self.whole = Replay(queue, self._whole)
        self.forward, self.backward = Replay(queue, self._forward), Replay(queue, self._backward)
        #: for benchmarks: forward and backward, from the inputs and the gradient of the output that are there
        self.passes = Replay(queue, self._passes)

    def drop(self) -> None:
        """Drop the graphs. They refer to the program: memory would be freed when Python looks for cycles, not now."""
        del self.whole, self.forward, self.backward, self.passes

    @staticmethod
    def number_of_sums(sizes: Sizes) -> int:
        """The loss; then per layer the terms of its penalties; then per layer the penalty of its rate; then the load
        balance of each matrix of gated blocks, not finite where its gates are not."""
        count = len(sizes.layers)
        return 1 + count * sums.PENALTY_TERMS * sizes.penalties + count * sizes.cells + len(sizes.gated)

    def _spans(self) -> list[tuple[int, int, int]]:
        memory, layers = self.memory, self.sizes.layers
        spans = [(memory.at("losses"), self.rows if self.engine.fused else 0, 1)]
        if self.sizes.penalties:
            for k in range(len(layers)):
                parts, terms = self.steps * sums.PENALTY_PARTS, sums.PENALTY_TERMS
                spans += [(memory.at(("penalties", k), term), parts, terms) for term in range(terms)]
        if self.sizes.cells:
            spans += [(memory.at(("rate squares", k)), layer.units, 1) for k, layer in enumerate(layers)]
        spans += [(memory.at(("penalties of gates", name)), self.rows, 1) for name in self.sizes.gated]
        return spans + self.engine.parameters.spans()

    # --- inputs ---

    def put(self, inputs: np.ndarray, targets: np.ndarray | None, soft: SoftTargets | None = None) -> None:
        """Send a window, and what depends on its size. Raises ValueError, before anything is sent, for targets that are
        not classes of the read-out, for soft targets of another number or weight than those of the first window, and as
        `put_inputs` does."""
        send, memory = self.engine.device.send, self.memory
        if targets is not None:
            targets = class_array("targets", targets, (self.steps, self.batch), self.sizes.outputs)
        self._check_soft(soft)
        put_inputs(self.engine.device, memory, self.sizes, inputs)
        if self.sizes.symbols:
            # Rows of one symbol stand together, in ascending order.
            symbols = np.asarray(inputs).reshape(-1)
            short = symbols.astype(np.uint16) if self.sizes.symbols <= 1 << 16 else symbols
            order = np.argsort(short, kind="stable")
            ordered = symbols[order]
            groups = np.full(self.rows + 1, self.rows, np.int64)
            begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
            groups[: len(begins)] = begins
            send(np.ascontiguousarray(order, np.int64), memory["order"][: self.rows])
            send(groups, memory["groups"][: self.rows + 1])
        if targets is not None:
            send(targets.reshape(-1), memory["targets"][: self.rows])
        if soft is not None:
            for name, array in (("soft symbols", soft.symbols), ("soft probabilities", soft.probabilities)):
                send(np.ascontiguousarray(array).reshape(self.rows, -1), memory[name][: self.rows])
        if self.sizes.penalties:
            for k in range(len(self.sizes.layers)):
                send(self._factors(k), memory["factors", k])

    def _check_soft(self, soft: SoftTargets | None) -> None:
        need = self.sizes.soft
        found = NO_SOFT_TARGETS if soft is None else SoftSizes(soft.top_k, soft.weight)
        shape = () if soft is None else soft.symbols.shape[:-1]
        if found != need or (soft is not None and shape != (self.steps, self.batch)):
            raise ValueError(
                f"soft: got {found.kept} targets of weight {found.weight} for each of {shape} places, need {need.kept} "
                f"of weight {need.weight} for ({self.steps}, {self.batch}), as in the first window"
            )
        if soft is not None:
            soft.check(self.sizes.outputs)

    def _factors(self, k: int) -> np.ndarray:
        """Factors of the gradients of the penalties of layer k."""
        rule, last = self.engine.settings.regularisers, k + 1 == len(self.sizes.layers)
        size = self.joined_rows * self.sizes.layers[k].units
        factors = np.zeros(sums.PENALTY_TERMS + 1, F32)
        if last:
            factors[sums.ACTIVATION] = 2 * rule.activation / size
            if self.steps > 1:
                factors[sums.CHANGE] = 2 * rule.temporal_activation / self._changes()
        factors[sums.STATE] = 2 * rule.state / size
        factors[sums.SENT] = self.engine.settings.activity_cost / size
        factors[sums.PENALTY_TERMS] = rule.state_margin
        return factors

    def _changes(self) -> int:
        """Number of changes of outputs of the last layer, in the joined batch."""
        return (self.steps - 1) * (self.joined_rows // self.steps) * self.sizes.layers[-1].units

    # --- work ---

    def _whole(self) -> None:
        self._before_loss()
        self.window.cross_entropy()
        self._after_loss()

    def _forward(self) -> None:
        self._before_loss()
        self.window.write_output()
        self.engine.lanes.join()

    def _backward(self) -> None:
        self.window.take_output_gradient()
        self._after_loss()

    def _passes(self) -> None:
        self.window.forward()
        self.window.take_output_gradient()
        self.window.backward()

    def _before_loss(self) -> None:
        self.window.forward()
        self.window.count()
        if self.sizes.cells:
            self.window.penalty_rates(self.engine.constants.data.ptr)
            self.engine.lanes.join()

    def _after_loss(self) -> None:
        engine, lane = self.engine, self.engine.lanes.main
        self.window.backward()
        engine.parameters.settle(lane, self.spans, engine.exchange)
        engine.parameters.update(lane, engine.rule, averaged=self.averaged)
        self.window.carry_on()

    def output(self) -> np.ndarray:
        """The output of the network, (T, B, V or N)."""
        return fetch_output(self.engine.device, self.memory, self.sizes, self.steps, self.batch)

    def put_gradient(self, d_output: np.ndarray) -> None:
        """Send the gradient of the output, (T, B, V or N), for `backward`. Raises ValueError for another shape."""
        shape = (self.steps, self.batch, self.sizes.outputs or self.sizes.layers[-1].units)
        if d_output.shape != shape:
            raise ValueError(f"d_output: got {d_output.shape}, need the output's shape {shape}")
        flat = np.ascontiguousarray(d_output, F32).reshape(-1)
        self.engine.device.send(flat, self.memory["result"].reshape(-1)[: flat.size])

    # --- figures ---

    def result(self, loss: float | None) -> WindowResult:
        """The figures of the update of the joined batch. loss : if the host computed it"""
        engine, parameters, layers = self.engine, self.engine.parameters, self.sizes.layers
        found, totals, window, squares = parameters.read_results()
        if loss is None:
            loss = float(window[0]) / self.joined_rows
        penalty = self._penalty(window[1:])
        names = [segment.name for segment in parameters.layout]
        if found[updates.FAILED]:
            if fault := gate_fault(engine.device, self.memory, self.sizes, self.steps, self.batch):
                return WindowResult(fault=str(fault))
            if not np.isfinite(loss + penalty):
                return WindowResult(fault=f"the loss is {loss + penalty}")
            bad = [name for name, square in zip(names, squares, strict=True) if not np.isfinite(square)]
            return WindowResult(fault=f"the gradient of {bad[0] if bad else 'a layer'} is not finite")
        entries = self.joined_rows * sum(layer.units for layer in layers)
        return WindowResult(
            loss=loss,
            penalty=penalty,
            activity=float(totals[:, 0].sum()) / entries,
            support=float(totals[:, 1].sum()) / entries,
            norm=float(found[updates.NORM]),
            operations=int(totals[:, 2].sum()),
            norms={name: float(np.sqrt(square)) for name, square in zip(names, squares, strict=True)},
        )

    def _penalty(self, window: np.ndarray) -> float:
        """The penalties and the activity cost of the window, from its sums."""
        gated = list(self.sizes.gated.values())
        balances = window[len(window) - len(gated) :]
        strength = self.engine.settings.regularisers.gate_balance / self.joined_rows
        balance = strength * sum(each.blocks * float(value) for each, value in zip(gated, balances, strict=True))
        if not self.sizes.penalties:
            return balance
        settings, layers = self.engine.settings, self.sizes.layers
        rule, count = settings.regularisers, len(layers)
        terms = window[: count * sums.PENALTY_TERMS].reshape(count, -1)
        sizes = np.array([self.joined_rows * layer.units for layer in layers])
        total = balance + settings.activity_cost * float((terms[:, sums.SENT] / sizes).sum())
        total += rule.state * float((terms[:, sums.STATE] / sizes).sum())
        total += rule.activation * float(terms[-1, sums.ACTIVATION]) / int(sizes[-1])
        if self.steps > 1:
            total += rule.temporal_activation * float(terms[-1, sums.CHANGE]) / self._changes()
        if self.sizes.cells:
            rates = window[count * sums.PENALTY_TERMS :][:count]
            units = [layer.units for layer in layers]
            # Every device has the rates of the joined batch, and adds the same.
            total += rule.activity_rate * float((rates / units).sum()) / self.engine.exchange.ranks
        return total


def put_inputs(device, memory, sizes: Sizes, inputs: np.ndarray) -> None:
    """Send the inputs of a window, (T, B) symbols or (T, B, I) finite numbers. Raises ValueError for others, and for a
    window without a step or a sample."""
    first = sizes.layers[0]
    if 0 in inputs.shape[:2]:
        raise ValueError(f"inputs: got shape {inputs.shape}, need at least one step of one sample")
    if not sizes.symbols:
        numbers = float32_array("inputs", inputs, f"(T, B, {first.inputs})", ndim=3)
        if numbers.shape[2] != first.inputs:
            raise ValueError(f"inputs: got shape {numbers.shape}, need (T, B, {first.inputs}) numbers")
        rows = numbers.shape[0] * numbers.shape[1]
        device.send(np.ascontiguousarray(numbers).reshape(rows, first.inputs), memory["numbers"][:rows])
        return
    inputs = plain_array("inputs", inputs)
    if inputs.ndim != 2 or inputs.dtype.kind not in "iu":
        raise ValueError(f"inputs: got {inputs.dtype} {inputs.shape}, need (T, B) symbols")
    if inputs.size and not (inputs.min() >= 0 and inputs.max() < sizes.symbols):
        at = tuple(map(int, np.argwhere((inputs < 0) | (inputs >= sizes.symbols))[0]))
        raise ValueError(f"inputs: got symbol {inputs[at]} at (step, sample) {at}, need 0..{sizes.symbols - 1}")
    device.send(np.ascontiguousarray(inputs, np.int64).reshape(-1), memory["symbols"][: inputs.size])


def gate_fault(device, memory, sizes: Sizes, steps: int, batch: int) -> FloatingPointError | None:
    """The error for gates of the window that are not finite, or None.

    It is that of the first matrix, and of a recurrent one in the first step, as the CPU finds it: after a fault,
    everything that follows is not finite.
    """
    for name in sizes.gated:
        faults = np.empty((steps, batch), np.int64)
        device.fetch(memory["faults", name][: faults.size], faults.reshape(-1))
        if faults.any():
            if MatrixId(name).recurrent:
                faults = faults[faults.any(axis=1)][0]
            return gates_not_finite(name, int(faults[faults > 0].min()))
    return None


def fetch_output(device, memory, sizes: Sizes, steps: int, batch: int) -> np.ndarray:
    """The output (T, B, V or N) of a window in `result`."""
    output = np.empty((steps, batch, sizes.outputs or sizes.layers[-1].units), F32)
    device.fetch(memory["result"].reshape(-1)[: output.size], output.reshape(-1))
    return output
