"""The forward and the backward pass of a window, as work that is put on lanes.

Every layer has a lane. The window is cut into pieces of time: while a layer works on one piece, the layer below works
on the next one (above, in the backward pass). Weight gradients of a layer are one product each, after its last piece.

forward, of a piece :  drive = x @ w_in  (all steps);  per step:  rec = y @ w_rec,  cells
backward, of a piece:  per step:  adjoint,  product = (u, r, q) @ w_rec^T;   d_x = (g, u, r) @ w_in^T  (all steps)

The paper's variant has a second recurrent product per step, that of the candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda.training.kernels import cell_steps, inputs, loss, noise, sums
from eventrnn.cuda.training.lanes import SUM_THREADS, Factor, Lane
from eventrnn.cuda.training.layout import up
from eventrnn.cuda.training.memory import LayerSizes, Memory, Sizes

if TYPE_CHECKING:
    from eventrnn.cuda.training.parameters import DeviceParameters

# Pieces of time into which a window is cut if the network has several layers, and their fewest steps.
PIECES, FEWEST_STEPS = 5, 8

# Threads of a block of the loss, which owns a row.
LOSS_THREADS = 512


def bits(number: float) -> int:
    """The bits of a float32, as kernels take it."""
    return int(np.float32(number).view(np.int32))


class Passes:
    """The passes of windows of `steps` steps and `batch` samples through a network.

    lanes      : one per layer; the first also does what comes before and after the layers
    memory     : arrays of windows of at least this size
    parameters : the parameters, and where gradients go
    training   : with noise, and with what the backward pass needs
    seed       : of the noise
    """

    def __init__(
        self,
        sizes: Sizes,
        lanes: Sequence[Lane],
        memory: Memory,
        parameters: DeviceParameters,
        steps: int,
        batch: int,
        *,
        training: bool,
        seed: int = 0,
    ):
        self.sizes, self.lanes, self.memory, self.parameters = sizes, lanes, memory, parameters
        self.steps, self.batch, self.rows = steps, batch, steps * batch
        self.training, self.seed = training, seed
        self.precision, self.size = sizes.precision, lanes[0].size
        pieces = PIECES if len(sizes.layers) > 1 else 1
        length = max(FEWEST_STEPS, -(-steps // pieces))
        self.pieces = [(begin, min(begin + length, steps)) for begin in range(0, steps, length)]
        offsets = np.cumsum([0, *(sums.UNIT_COUNTS * layer.padded for layer in sizes.layers)])
        self.count_offsets = [int(offset) for offset in offsets]
        offsets = np.cumsum([0, *(layer.padded_inputs for layer in sizes.layers)])
        self.input_count_offsets = [int(offset) for offset in offsets]

    # --- places ---

    def mask(self, name: str, layer: int = 0) -> tuple[int, int, int, int]:
        """Address of a mask of dropout, bytes from one step and from one sample to the next, and the bits of its scale.
        Zeros without the mask."""
        found = self.sizes.mask(name, layer) if self.training else None
        if found is None:
            return 0, 0, 0, 0
        pitch = up(found.sizes(self.steps, self.batch)[-1])
        apart = (0, pitch) if found.shape[0] == "B" else (pitch, 0)
        return self.memory.at(("mask", name, layer)), *apart, bits(found.scale)

    def mask_after(self, k: int) -> tuple[int, int, int, int]:
        """`mask` of the outputs of layer k."""
        return self.mask("between", k) if k + 1 < len(self.sizes.layers) else self.mask("top")

    def sent_up(self, k: int) -> int:
        """Address of the operands (T, B, N') that layer k sends to what is above it."""
        if ("next", k) in self.memory and self.training:
            return self.memory.at(("next", k))
        return self.memory.at(("y", k), self.batch * self.sizes.layers[k].padded)

    def received(self, k: int) -> int:
        """Address of the operands (T, B, I') that layer k receives."""
        return self.sent_up(k - 1) if k else self.memory.at("x")

    def weights(self, k: int, role: str) -> int:
        """Address of the operands of a matrix of layer k, with DropConnect."""
        if role == "w_rec" and self.training and self.sizes.mask("recurrent", k) is not None:
            return self.memory.at(("dropped", k))
        return self.parameters.operand_at(f"layers.{k}.{role}")

    def before(self, k: int, t: int) -> tuple[int, int]:
        """Address of the cells before step t, and whether they are those carried into the window."""
        if t == 0:
            return self.memory.at(("cells", k)), 1
        return self.tape_at(k, t - 1) + 4 * self.plane(k), 0

    def tape_at(self, k: int, t: int) -> int:
        """Address of step t of the tape of layer k."""
        return self.memory.at(("tape", k), t * self.batch * self.sizes.layers[k].padded)

    def plane(self, k: int) -> int:
        """Bytes between two arrays of the tape of layer k."""
        return 4 * self.rows * self.sizes.layers[k].padded

    # --- forward ---

    def forward(self) -> None:
        """From the inputs in memory to the operands of the top layer, and the logits if there is a read-out."""
        lane = self.lanes[0]
        if self.training:
            self._draw(lane)
        self._begin(lane)
        begun = lane.record()
        for k in range(1, len(self.lanes)):
            self.lanes[k].wait(begun)
        for begin, end in self.pieces:
            mark = None
            for k, own in enumerate(self.lanes):
                if mark is not None:
                    own.wait(mark)
                self._layer_forward(k, begin, end)
                mark = own.record()
        self._join()
        if self.sizes.outputs:
            top, columns = self.sizes.layers[-1].padded, up(self.sizes.outputs)
            readout = Factor(self.parameters.operand_at(self.parameters.readout), top, transposed=True)
            out = Factor(self.memory.at("logits"), columns)
            lane.multiply(Factor(self.sent_up(len(self.sizes.layers) - 1), top), readout, out, self.rows, top, columns)

    def _join(self) -> None:
        """Let the first lane wait for the others."""
        for lane in self.lanes[1:]:
            self.lanes[0].wait(lane.record())

    def _draw(self, lane: Lane) -> None:
        for mask in self.sizes.masks:
            sizes = mask.sizes(self.steps, self.batch)
            columns = self.sizes.layers[mask.layer].units if mask.name == "recurrent" else sizes[-1]
            count, out = int(np.prod(sizes)), self.memory.at(("mask", mask.name, mask.layer))
            lane.each(
                ("draw",),
                noise.draw_kernel,
                -(-count // noise.PER_BLOCK),
                self.parameters.job_at,
                self.seed,
                mask.place,
                bits(mask.rate),
                count,
                columns,
                up(columns),
                out,
            )
            if mask.name == "recurrent":
                weights = self.parameters.layout[f"layers.{mask.layer}.w_rec"]
                lane.each(
                    ("drop_weights", self.precision),
                    lambda: noise.drop_weights_kernel(self.precision),
                    weights.size,
                    self.parameters.value_at(weights.name),
                    out,
                    bits(mask.scale),
                    weights.size,
                    self.memory.at(("dropped", mask.layer)),
                )

    def _begin(self, lane: Lane) -> None:
        """Thresholds, carried outputs as operands, and the inputs of the first layer."""
        memory, parameters, first = self.memory, self.parameters, self.sizes.layers[0]
        for k, layer in enumerate(self.sizes.layers):
            lane.each(
                ("thresholds",),
                cell_steps.threshold_kernel,
                layer.units,
                parameters.value_at(f"layers.{k}.threshold"),
                parameters.rule == "sigmoid",
                layer.units,
                memory.at(("threshold", k)),
            )
            self._carry(lane, k, begin=True)
        mask_at, mask_steps, mask_samples, scale = self.mask("inputs")
        words_at, _, _, words_scale = self.mask("words")
        symbols = bool(self.sizes.symbols)
        lane.each(
            ("inputs", self.precision),
            lambda: inputs.input_kernel(self.precision),
            self.rows * first.inputs,
            parameters.value_at("embedding") if symbols else memory.at("numbers"),
            first.padded_inputs if symbols else first.inputs,
            memory.at("symbols") if symbols else 0,
            words_at,
            words_scale,
            mask_at,
            mask_steps,
            mask_samples,
            scale,
            first.inputs,
            self.batch,
            self.rows,
            memory.at("x"),
            first.padded_inputs,
        )

    def carry_on(self) -> None:
        """The state after the window becomes the carried one, unless the window has failed."""
        for k in range(len(self.sizes.layers)):
            self._carry(self.lanes[0], k, begin=False)

    def _carry(self, lane: Lane, k: int, *, begin: bool) -> None:
        layer, memory = self.sizes.layers[k], self.memory
        lane.each(
            ("carry", self.precision),
            lambda: cell_steps.carry_kernel(self.precision),
            layer.units * self.batch,
            begin,
            0 if begin else self.tape_at(k, self.steps - 1) + 4 * self.plane(k),
            memory.at(("threshold", k)),
            layer.paper,
            memory.at(("cells", k)),
            memory.at(("outputs", k)),
            memory.at(("y", k)),
            self.parameters.results_at if self.training else self.parameters.no_fault_at,
            layer.units,
            layer.padded,
            self.batch,
        )

    def _layer_forward(self, k: int, begin: int, end: int) -> None:
        lane, layer, memory = self.lanes[k], self.sizes.layers[k], self.memory
        n, batch, inputs_ = layer.padded, self.batch, layer.padded_inputs
        x = Factor(self.received(k) + self.size * begin * batch * inputs_, inputs_)
        drive = Factor(memory.at(("drive", k), begin * batch * 3 * n), 3 * n)
        lane.multiply(x, Factor(self.weights(k, "w_in"), 3 * n), drive, (end - begin) * batch, inputs_, 3 * n)
        w_rec, rec = self.weights(k, "w_rec"), memory.at(("rec", k))
        vectors = self.parameters.value_at(f"layers.{k}.bias_in")
        threshold, elements = memory.at(("threshold", k)), layer.units * batch
        mask_at, mask_steps, mask_samples, scale = self.mask_after(k)
        hold = self.sizes.mask("zoneout", k) if self.training else None
        for t in range(begin, end):
            y = Factor(memory.at(("y", k), t * batch * n), n)
            gates = 2 * n if layer.paper else 3 * n
            lane.multiply(y, Factor(w_rec, 3 * n), Factor(rec, 3 * n), batch, n, gates)
            before, first = self.before(k, t)
            drive_at = memory.at(("drive", k), t * batch * 3 * n)
            carried: tuple[int, ...] = ()
            if layer.paper:
                sent = memory.at(("q", k), t * batch * n)
                carried = (memory.at(("outputs", k)),)
                lane.each(
                    ("reset_gate", self.precision),
                    lambda: cell_steps.reset_gate_kernel(self.precision),
                    elements,
                    drive_at,
                    rec,
                    vectors,
                    threshold,
                    before,
                    *carried,
                    first,
                    self.tape_at(k, t),
                    self.plane(k),
                    sent,
                    layer.units,
                    n,
                    batch,
                )
                candidate = Factor(w_rec + self.size * 2 * n, 3 * n)
                lane.multiply(Factor(sent, n), candidate, Factor(rec + 4 * 2 * n, 3 * n), batch, n, n)
            make = cell_steps.paper_forward_kernel if layer.paper else cell_steps.forward_kernel
            lane.each(
                (make.__name__, self.precision),
                lambda make=make: make(self.precision),
                elements,
                drive_at,
                rec,
                vectors,
                threshold,
                before,
                *carried,
                first,
                self.tape_at(k, t),
                self.plane(k),
                memory.at(("y", k), (t + 1) * batch * n),
                self.sent_up(k) + self.size * t * batch * n if ("next", k) in memory and self.training else 0,
                mask_at and mask_at + t * mask_steps,
                mask_samples,
                scale,
                memory.at(("mask", "zoneout", k), t * batch * n) if hold else 0,
                layer.units,
                n,
                batch,
            )

    # --- loss and outputs ---

    def cross_entropy(self) -> None:
        """The losses of all rows; in training, the logits become their gradient."""
        columns = self.sizes.outputs
        self.lanes[0].blocks(
            ("cross_entropy", self.precision),
            lambda: loss.cross_entropy_kernel(self.precision),
            self.rows,
            self.memory.at("logits"),
            up(columns),
            self.parameters.value_at("readout.bias"),
            self.memory.at("targets"),
            columns,
            up(columns),
            bits(1 / self.rows) if self.training else 0,
            self.memory.at("losses"),
            threads=LOSS_THREADS,
        )

    def write_output(self) -> None:
        """The output of the network as float32 (T, B, V or N) in `result`."""
        top, columns = self.sizes.layers[-1], self.sizes.outputs
        last = len(self.sizes.layers) - 1
        source = self.memory.at("logits") if columns else self.tape_at(last, 0) + 4 * self.plane(last)
        bias = self.parameters.value_at("readout.bias") if columns else self.memory.at(("threshold", last))
        self.lanes[0].each(
            ("outputs",),
            inputs.outputs_kernel,
            self.rows * (columns or top.units),
            bool(columns),
            source,
            up(columns) or top.padded,
            bias,
            *((0, 0, 0, 0) if columns else self.mask("top")),
            columns or top.units,
            self.batch,
            self.rows,
            self.memory.at("result"),
        )

    def take_output_gradient(self) -> None:
        """The gradient of the output, float32 in `result`, as the backward pass wants it."""
        top, columns = self.sizes.layers[-1], self.sizes.outputs
        last = len(self.sizes.layers) - 1
        precision = self.precision if columns else "float32"
        self.lanes[0].each(
            ("spread", precision),
            lambda: inputs.spread_kernel(precision),
            self.rows * (columns or top.units),
            self.memory.at("result"),
            columns or top.units,
            self.rows,
            self.memory.at("logits") if columns else self.memory.at(("upstream", last)),
            self.logits_pitch if columns else top.padded,
        )

    @property
    def logits_pitch(self) -> int:
        """Operands from one row of the logits' gradient to the next, which takes the place of the float32 logits."""
        return up(self.sizes.outputs) * 4 // self.size

    # --- backward ---

    def backward(self) -> None:
        """From the gradient of the logits (or of the top layer's outputs) to the gradients of all parameters."""
        lane, layers = self.lanes[0], self.sizes.layers
        if self.sizes.outputs:
            self._readout_backward(lane)
        begun = lane.record()
        for other in self.lanes[1:]:
            other.wait(begun)
        for k in range(len(layers)):
            self._start_backward(self.lanes[k], k)
        marks: dict[tuple[int, int], Any] = {}
        for number, (begin, end) in reversed(list(enumerate(self.pieces))):
            for k in reversed(range(len(layers))):
                if k + 1 < len(layers):
                    self.lanes[k].wait(marks[k + 1, number])
                self._layer_backward(k, begin, end)
                marks[k, number] = self.lanes[k].record()
        for k in range(len(layers)):
            self._layer_gradients(self.lanes[k], k)
        self._join()
        if self.sizes.symbols:
            self._embedding_backward(lane)

    def _readout_backward(self, lane: Lane) -> None:
        layers, parameters, memory = self.sizes.layers, self.parameters, self.memory
        last, n, columns = len(layers) - 1, layers[-1].padded, up(self.sizes.outputs)
        deltas = Factor(memory.at("logits"), self.logits_pitch)
        readout = Factor(parameters.operand_at(parameters.readout), n)
        lane.multiply(deltas, readout, Factor(memory.at(("upstream", last)), n), self.rows, columns, n)
        top = Factor(self.sent_up(last), n)
        gradient = Factor(parameters.gradient_at(parameters.readout), n)
        lane.multiply(deltas._replace(transposed=True), top, gradient, columns, self.rows, n)
        self._sum_columns(lane, deltas, columns, "partial outputs")
        self._finish_sums(lane, "partial outputs", columns, 0, self.sizes.outputs, "readout.bias")

    def _sum_columns(self, lane: Lane, operands: Factor, columns: int, partial: Any) -> None:
        """Add up columns of the rows of each step."""
        lane.each(
            ("column_sums", self.precision),
            lambda: sums.column_sums_kernel(self.precision),
            self.steps * columns,
            operands.at,
            operands.pitch,
            columns,
            self.batch,
            self.rows,
            self.steps,
            self.memory.at(partial),
        )

    def _finish_sums(
        self,
        lane: Lane,
        partial: Any,
        pitch: int,
        first: int,
        columns: int,
        name: str,
        *,
        to: int = 0,
        rule: int = sums.PLAIN,
        threshold: int = 0,
    ) -> None:
        """Add up the sums of all steps into the elements from `to` on of the gradient of a vector."""
        lane.each(
            ("finish_sums",),
            sums.finish_sums_kernel,
            columns,
            self.memory.at(partial),
            self.steps,
            pitch,
            first,
            columns,
            rule,
            threshold,
            self.parameters.gradient_at(name) + 4 * to,
        )

    def _surrogate(self, layer: LayerSizes) -> tuple[int, float, float]:
        rule = layer.cell.surrogate
        return rule.code, rule.dampening, rule.support

    def _start_backward(self, lane: Lane, k: int) -> None:
        memory = self.memory
        lane.clear(memory["later", k])
        if self.sizes.layers[k].paper:
            lane.clear(memory["d_sent", k])

    def _layer_backward(self, k: int, begin: int, end: int) -> None:
        lane, layer, memory, parameters = self.lanes[k], self.sizes.layers[k], self.memory, self.parameters
        n, batch, size, elements = layer.padded, self.batch, self.size, layer.units * self.batch
        w_rec, threshold = self.weights(k, "w_rec"), memory.at(("threshold", k))
        surrogate = self._surrogate(layer)
        penalised = ("penalties", k) in memory
        if penalised:
            self._penalise(k, begin, end)
        # Penalties apply the dropout of the outputs already.
        mask_at, mask_steps, mask_samples, scale = (0, 0, 0, 0) if penalised else self.mask_after(k)
        for t in reversed(range(begin, end)):
            before, first = self.before(k, t)
            deltas = memory.at(("deltas", k), t * batch * 5 * n)
            lane.each(
                ("adjoint", self.precision, layer.paper, *surrogate),
                lambda: cell_steps.adjoint_kernel(self.precision, layer.paper, *surrogate),
                elements,
                self.tape_at(k, t),
                self.plane(k),
                before,
                first,
                threshold,
                memory.at(("upstream", k), t * batch * n),
                0 if t == self.steps - 1 else memory.at(("product", k)),
                memory.at(("later", k)),
                memory.at(("d_sent", k)),
                memory.at(("d_cell", k), t * batch * n),
                mask_at and mask_at + t * mask_steps,
                mask_samples,
                scale,
                deltas,
                layer.units,
                n,
                batch,
            )
            if layer.paper:
                d_q = Factor(memory.at(("d_q", k)), n)
                candidate = Factor(w_rec + size * 2 * n, 3 * n, transposed=True)
                lane.multiply(Factor(deltas, 5 * n), candidate, d_q, batch, n, n)
                lane.each(
                    ("reset_gate_adjoint", self.precision),
                    lambda: cell_steps.reset_gate_adjoint_kernel(self.precision),
                    elements,
                    self.tape_at(k, t),
                    self.plane(k),
                    before,
                    memory.at(("outputs", k)),
                    first,
                    threshold,
                    d_q.at,
                    memory.at(("d_sent", k)),
                    deltas,
                    layer.units,
                    n,
                    batch,
                )
            if t:
                gates = 2 * n if layer.paper else 3 * n
                lane.multiply(
                    Factor(deltas + size * n, 5 * n),
                    Factor(w_rec, 3 * n, transposed=True),
                    Factor(memory.at(("product", k)), n),
                    batch,
                    gates,
                    n,
                )
        if k or self.sizes.symbols:
            below = memory.at(("upstream", k - 1)) if k else memory.at("d_x")
            width = layer.padded_inputs
            lane.multiply(
                Factor(memory.at(("deltas", k), begin * batch * 5 * n), 5 * n),
                Factor(parameters.operand_at(f"layers.{k}.w_in"), 3 * n, transposed=True),
                Factor(below + 4 * begin * batch * width, width),
                (end - begin) * batch,
                3 * n,
                width,
            )

    def _penalise(self, k: int, begin: int, end: int) -> None:
        layer, memory = self.sizes.layers[k], self.memory
        n, surrogate = layer.padded, self._surrogate(layer)
        at, steps_apart, samples_apart, scale = self.mask_after(k)
        self.lanes[k].blocks(
            ("penalties", *surrogate),
            lambda: sums.penalties_kernel(*surrogate),
            end - begin,
            self.tape_at(k, 0) + 4 * self.plane(k),
            memory.at(("threshold", k)),
            memory.at(("upstream", k)),
            memory.at(("d_cell", k)),
            at,
            steps_apart,
            samples_apart,
            scale,
            memory.at(("d_event", k)),
            memory.at(("factors", k)),
            layer.units,
            n,
            self.batch,
            self.steps,
            begin,
            memory.at(("penalties", k)),
            threads=SUM_THREADS,
        )

    def _layer_gradients(self, lane: Lane, k: int) -> None:
        """Gradients of the weights, biases and thresholds of a layer, from its deltas."""
        layer, memory, parameters = self.sizes.layers[k], self.memory, self.parameters
        n, size, name = layer.padded, self.size, f"layers.{k}"
        deltas, rows = Factor(memory.at(("deltas", k)), 5 * n), self.rows
        x = Factor(self.received(k), layer.padded_inputs, transposed=True)
        out = Factor(parameters.gradient_at(f"{name}.w_in"), 3 * n)
        lane.multiply(x, deltas, out, layer.padded_inputs, rows, 3 * n)
        y, out = Factor(memory.at(("y", k)), n, transposed=True), Factor(parameters.gradient_at(f"{name}.w_rec"), 3 * n)
        gates = deltas._replace(at=deltas.at + size * n)
        if layer.paper:
            lane.multiply(y, gates, out, n, rows, 2 * n)
            q = Factor(memory.at(("q", k)), n, transposed=True)
            lane.multiply(q, deltas, out._replace(at=out.at + 4 * 2 * n), n, rows, n)
        else:
            lane.multiply(y, gates, out, n, rows, 3 * n)
        partial = ("partial", k)
        self._sum_columns(lane, deltas, 5 * n, partial)
        self._finish_sums(lane, partial, 5 * n, 0, 3 * n, f"{name}.bias_in")
        if layer.paper:
            # u and r, then g, whose recurrent row is that of the input.
            self._finish_sums(lane, partial, 5 * n, n, 2 * n, f"{name}.bias_rec")
            self._finish_sums(lane, partial, 5 * n, 0, n, f"{name}.bias_rec", to=2 * n)
        else:
            self._finish_sums(lane, partial, 5 * n, n, 3 * n, f"{name}.bias_rec")
        rule = {"fixed": sums.FIXED, "sigmoid": sums.SIGMOID}.get(parameters.rule, sums.PLAIN)
        threshold = memory.at(("threshold", k))
        self._finish_sums(lane, partial, 5 * n, 4 * n, layer.units, f"{name}.threshold", rule=rule, threshold=threshold)

    def _embedding_backward(self, lane: Lane) -> None:
        memory, parameters, first = self.memory, self.parameters, self.sizes.layers[0]
        words_at, _, _, words_scale = self.mask("words")
        if not parameters.tied:
            lane.clear(parameters.gradient("embedding"))
        lane.blocks(
            ("embedding_gradient",),
            inputs.embedding_gradient_kernel,
            self.rows,
            memory.at("d_x"),
            first.padded_inputs,
            memory.at("symbols"),
            words_at,
            words_scale,
            *self.mask("inputs"),
            first.inputs,
            self.batch,
            memory.at("order"),
            memory.at("groups"),
            parameters.gradient_at("embedding"),
        )

    # --- counts ---

    def count_events(self) -> None:
        """Events and active pairs per unit, after the forward pass."""
        lane, memory = self.lanes[0], self.memory
        lane.clear(memory["counts"])
        for k, layer in enumerate(self.sizes.layers):
            surrogate = self._surrogate(layer)
            lane.each(
                ("count_units", *surrogate),
                lambda surrogate=surrogate: sums.count_units_kernel(*surrogate),
                layer.units * self.steps,
                self.tape_at(k, 0) + 4 * self.plane(k),
                memory.at(("threshold", k)),
                memory.at(("outputs", k)),
                layer.units,
                layer.padded,
                self.batch,
                self.steps,
                memory.at("counts", self.count_offsets[k]),
            )

    def events(self, counts: np.ndarray) -> int:
        """Events of all layers, from the counts that `count_events` has left."""
        offsets = zip(self.count_offsets, self.sizes.layers, strict=False)
        return sum(int(counts[at + sums.FIRED * n.padded :][: n.padded].sum()) for at, n in offsets)

    def count(self) -> None:
        """`count_events`, events of the inputs, and the totals of all."""
        lane, memory, parameters = self.lanes[0], self.memory, self.parameters
        self.count_events()
        lane.clear(memory["counts of inputs"])
        for k, layer in enumerate(self.sizes.layers):
            lane.each(
                ("count_inputs", self.precision),
                lambda: sums.count_inputs_kernel(self.precision),
                layer.inputs * self.steps,
                self.received(k),
                layer.inputs,
                layer.padded_inputs,
                self.batch,
                self.steps,
                memory.at("counts of inputs", self.input_count_offsets[k]),
            )
        for k, layer in enumerate(self.sizes.layers):
            below = self.sizes.layers[k - 1] if k else None
            lane.blocks(
                ("operations",),
                sums.operations_kernel,
                1,
                memory.at("counts", self.count_offsets[k]),
                layer.padded,
                layer.units,
                layer.paper,
                memory.at("counts", self.count_offsets[k - 1]) if k else 0,
                below.padded if below else 0,
                memory.at("counts of inputs", self.input_count_offsets[k]),
                layer.inputs,
                self.rows if self.sizes.symbols else 0,
                parameters.kept_at(f"layers.{k}.w_in"),
                parameters.kept_at(f"layers.{k}.w_rec"),
                parameters.totals_at(k),
                threads=SUM_THREADS,
            )

    def penalty_rates(self, rates_at: int) -> None:
        """What the penalties of the activity rate need of the counts, before the backward pass.

        rates_at : two float64: target and strength
        """
        for k, layer in enumerate(self.sizes.layers):
            self.lanes[0].each(
                ("rates",),
                sums.rate_kernel,
                layer.units,
                self.memory.at("counts", self.count_offsets[k] + sums.FIRED * layer.padded),
                self.rows,
                rates_at,
                rates_at + 8,
                layer.units,
                self.memory.at(("d_event", k)),
                self.memory.at(("rate squares", k)),
            )
