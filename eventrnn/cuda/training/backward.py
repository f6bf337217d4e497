"""The backward pass of a window and its penalties, as work that is put on lanes.

Of a piece of time: per step: adjoint, product = recurrent parts of its deltas @ w_rec^T; then d_x = deltas of the gates
@ w_in^T (all steps). Weight gradients of a layer are one product each, after its last piece.
"""

from __future__ import annotations

from typing import Any

from eventrnn.cuda.training.forward import ForwardWindow
from eventrnn.cuda.training.kernels import cell_steps, inputs, sums
from eventrnn.cuda.training.lanes import SUM_THREADS, Factor, Lane
from eventrnn.cuda.training.layout import up


class TrainingWindow(ForwardWindow):
    """A window with its forward and its backward pass."""

    def take_output_gradient(self) -> None:
        """The gradient of the output, float32 in `result`, as the backward pass wants it."""
        top, columns = self.sizes.layers[-1], self.sizes.outputs
        last = len(self.sizes.layers) - 1
        precision = self.precision if columns else "float32"
        self.lanes.main.each(
            ("spread", precision),
            lambda: inputs.spread_kernel(precision),
            self.rows * (up(columns) or top.padded),
            self.memory.at("result"),
            columns or top.units,
            self.rows,
            self.memory.at("logits") if columns else self.memory.at(("upstream", last)),
            self.logits_pitch if columns else top.padded,
            up(columns) or top.padded,
        )

    @property
    def logits_pitch(self) -> int:
        """Operands from one row of the logits' gradient to the next, which takes the place of the float32 logits."""
        return up(self.sizes.outputs) * 4 // self.size

    def backward(self) -> None:
        """From the gradient of the logits (or of the top layer's outputs) to the gradients of all parameters."""
        lane, layers = self.lanes.main, self.sizes.layers
        if self.sizes.outputs:
            self._readout_backward(lane)
        self.lanes.fork()
        for k in range(len(layers)):
            self._start_backward(self.lanes.layers[k], k)
        marks: dict[tuple[int, int], Any] = {}
        for number, (begin, end) in reversed(list(enumerate(self.pieces))):
            for k in reversed(range(len(layers))):
                if k + 1 < len(layers):
                    self.lanes.layers[k].wait(marks[k + 1, number])
                self._layer_backward(k, begin, end)
                marks[k, number] = self.lanes.layers[k].record()
        for k in range(len(layers)):
            self._layer_gradients(self.lanes.layers[k], k)
        self.lanes.join()
        if self.sizes.symbols:
            self._embedding_backward(lane)

    def _readout_backward(self, lane: Lane) -> None:
        layers, parameters, memory = self.sizes.layers, self.parameters, self.memory
        last, n, columns = len(layers) - 1, layers[-1].padded, up(self.sizes.outputs)
        deltas = Factor(memory.at("logits"), self.logits_pitch)
        readout = Factor(parameters.operand_at(parameters.readout), n)
        lane.multiply(deltas, readout, Factor(memory.at(("upstream", last)), n), self.rows, columns, n)
        # Gradients of the read-out are needed by the update only.
        side = self.lanes.side
        side.wait(lane.record())
        top = Factor(self.sent_up(last), n)
        gradient = Factor(parameters.gradient_at(parameters.readout), n)
        side.multiply(deltas._replace(transposed=True), top, gradient, columns, self.rows, n)
        self._sum_columns(side, deltas, columns, "partial outputs")
        self._finish_sums(side, "partial outputs", columns, 0, self.sizes.outputs, "readout.bias")

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

    def _start_backward(self, lane: Lane, k: int) -> None:
        memory = self.memory
        lane.clear(memory["later", k])
        if self.sizes.layers[k].reset_first:
            lane.clear(memory["d_sent", k])

    def _layer_backward(self, k: int, begin: int, end: int) -> None:
        lane, layer, memory, parameters = self.lanes.layers[k], self.sizes.layers[k], self.memory, self.parameters
        n, batch, size = layer.padded, self.batch, self.size
        columns, pitch, rule = layer.gates * n, layer.rule.parts * n, layer.rule
        w_rec, threshold = self.weights(k, "w_rec"), memory.at(("threshold", k))
        surrogate = self.surrogate(layer)
        penalised = ("penalties", k) in memory
        if penalised:
            self._penalise(k, begin, end)
        # Penalties apply the dropout of the outputs already.
        mask_at, mask_steps, mask_samples, scale = (0, 0, 0, 0) if penalised else self.mask_after(k)
        for t in reversed(range(begin, end)):
            before, first = self.before(k, t)
            deltas = memory.at(("deltas", k), t * batch * pitch)
            lane.units(
                ("adjoint", layer.cell.name, layer.cell.variant, self.precision, *surrogate),
                lambda: rule.adjoint(self.precision, surrogate),
                layer.units,
                batch,
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
            if layer.reset_first:
                d_q = Factor(memory.at(("d_q", k)), n)
                candidate = Factor(w_rec + size * (columns - n), columns, transposed=True)
                lane.multiply_step(Factor(deltas, pitch), candidate, d_q, batch, n, n, share=self.shares[1])
                lane.units(
                    ("reset_gate_adjoint", self.precision),
                    lambda: cell_steps.reset_gate_adjoint_kernel(self.precision),
                    layer.units,
                    batch,
                    self.tape_at(k, t),
                    self.plane(k),
                    before,
                    memory.at(("outputs", k)),
                    first,
                    threshold,
                    d_q.at,
                    memory.at(("d_sent", k)),
                    deltas,
                    rule.parts,
                    layer.units,
                    n,
                    batch,
                )
            if t:
                lane.multiply_step(
                    Factor(deltas + size * rule.recurrent * n, pitch),
                    Factor(w_rec, columns, transposed=True),
                    Factor(memory.at(("product", k)), n),
                    batch,
                    columns - n * layer.reset_first,
                    n,
                    share=self.shares[1],
                )
        if k or self.sizes.d_inputs:
            below = memory.at(("upstream", k - 1)) if k else memory.at("d_x")
            width = layer.padded_inputs
            lane.multiply(
                Factor(memory.at(("deltas", k), begin * batch * pitch), pitch),
                Factor(parameters.operand_at(f"layers.{k}.w_in"), columns, transposed=True),
                Factor(below + 4 * begin * batch * width, width),
                (end - begin) * batch,
                columns,
                width,
            )

    def _penalise(self, k: int, begin: int, end: int) -> None:
        layer, memory = self.sizes.layers[k], self.memory
        n, surrogate = layer.padded, self.surrogate(layer)
        at, steps_apart, samples_apart, scale = self.mask_after(k)
        self.lanes.layers[k].blocks(
            ("penalties", *surrogate),
            lambda: sums.penalties_kernel(*surrogate),
            (end - begin) * sums.PENALTY_PARTS,
            self.sent_at(k),
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
        n, size, name, parts, first = layer.padded, self.size, f"layers.{k}", layer.rule.parts, layer.rule.recurrent
        deltas, rows, columns = Factor(memory.at(("deltas", k)), parts * n), self.rows, layer.gates * n
        x = Factor(self.received(k), layer.padded_inputs, transposed=True)
        out = Factor(parameters.gradient_at(f"{name}.w_in"), columns)
        lane.multiply(x, deltas, out, layer.padded_inputs, rows, columns)
        y, out = (
            Factor(memory.at(("y", k)), n, transposed=True),
            Factor(parameters.gradient_at(f"{name}.w_rec"), columns),
        )
        own = columns - n * layer.reset_first
        lane.multiply(y, deltas._replace(at=deltas.at + size * first * n), out, n, rows, own)
        if layer.reset_first:
            q = Factor(memory.at(("q", k)), n, transposed=True)
            lane.multiply(q, deltas, out._replace(at=out.at + 4 * own), n, rows, n)
        partial = ("partial", k)
        self._sum_columns(lane, deltas, parts * n, partial)
        self._finish_sums(lane, partial, parts * n, 0, columns, f"{name}.bias_in")
        self._finish_sums(lane, partial, parts * n, first * n, own, f"{name}.bias_rec")
        if layer.reset_first:
            # The recurrent row of the candidate is that of the input.
            self._finish_sums(lane, partial, parts * n, 0, n, f"{name}.bias_rec", to=own)
        if not layer.cell.thresholded:
            # The gradient of its thresholds, which do not act, stays zero.
            return
        rule = {"fixed": sums.FIXED, "sigmoid": sums.SIGMOID}.get(parameters.rule, sums.PLAIN)
        threshold = memory.at(("threshold", k))
        self._finish_sums(
            lane, partial, parts * n, 4 * n, layer.units, f"{name}.threshold", rule=rule, threshold=threshold
        )

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

    def count(self) -> None:
        """`count_events`, events of the inputs, and the totals of all."""
        lane, memory, parameters = self.lanes.side, self.memory, self.parameters
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
                layer.reset_first and layer.cell.thresholded,
                self.batch if layer.reset_first and not layer.cell.thresholded else 0,
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
        """What the penalties of the activity rate need of the counts, before the backward pass, on the side lane.

        rates_at : two float64: target and strength
        """
        for k, layer in enumerate(self.sizes.layers):
            self.lanes.side.each(
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
