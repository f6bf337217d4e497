"""The backward pass of a window and its penalties, as work that is put on lanes.

Of a piece of time: per step: adjoint, product = recurrent parts of its deltas @ w_rec^T; then d_x = deltas of the gates
@ w_in^T (all steps). Weight gradients of a layer are one product each, after its last piece.
"""

from __future__ import annotations

from typing import Any

from eventrnn.cuda.training.forward import ForwardWindow
from eventrnn.cuda.training.gated import GatedProduct
from eventrnn.cuda.training.kernels import cell_steps, gated_blocks, inputs, sums
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
        if self.sizes.gate_balance:
            for product in self.products.values():
                product.count_choices(lane)
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
        # The last layer is through first.
        for k in reversed(range(len(layers))):
            self._layer_gradients(self.lanes.layers[k], k)
        self.lanes.join()
        if self.sizes.symbols:
            self._embedding_backward(lane)
        self.exchange.finish(lane)

    def _readout_backward(self, lane: Lane) -> None:
        layers, parameters, memory = self.sizes.layers, self.parameters, self.memory
        last, n, columns = len(layers) - 1, layers[-1].padded, up(self.sizes.outputs)
        deltas = Factor(memory.at("logits"), self.logits_pitch)
        readout = Factor(parameters.operand_at(parameters.readout), n)
        gated, d_top = self.products.get("readout"), Factor(memory.at(("upstream", last)), n)
        if gated is not None:
            gated.backward(lane, 0, self.rows, deltas, d_top)
        else:
            lane.multiply(deltas, readout, d_top, self.rows, columns, n)
        # Gradients of the read-out are needed by the update only.
        side = self.lanes.side
        side.wait(lane.record())
        top = Factor(self.sent_up(last), n)
        if gated is not None:
            self._gated_gradients(side, gated, top)
        else:
            gradient = Factor(parameters.gradient_at(parameters.readout), n)
            side.multiply(deltas.turned, top, gradient, columns, self.rows, n)
            if not parameters.tied:
                self.exchange.ready(side, parameters.readout)
        self._sum_columns(side, deltas, columns, "partial outputs")
        self._finish_sums(side, "partial outputs", columns, 0, self.sizes.outputs, "readout.bias")

    def _gated_gradients(self, lane: Lane, product: GatedProduct, x: Factor) -> None:
        """Gradients of a matrix of gated blocks and of its gate. x : its inputs, of all rows"""
        product.gradients(lane, x)
        sizes, partial = product.sizes, ("partial gates", product.name)
        self._sum_columns(lane, Factor(product.at("d_logits"), sizes.pitch), sizes.pitch, partial)
        self._finish_sums(lane, partial, sizes.pitch, 0, sizes.blocks, f"{product.name}.gate_bias")

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
        surrogate, gated = self.surrogate(layer), self.products.get(f"layers.{k}.w_rec")
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
                lane.multiply(Factor(deltas, pitch), candidate, d_q, batch, n, n, share=self.shares[1])
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
            own, sent = Factor(deltas + size * rule.recurrent * n, pitch), Factor(memory.at(("product", k)), n)
            if gated is not None:
                # A gate has a gradient also where that of the inputs is not needed.
                gated.backward(lane, t * batch, batch, own, sent if t else None, share=self.shares[1])
            elif t:
                matrix, gates = Factor(w_rec, columns, transposed=True), columns - n * layer.reset_first
                lane.multiply(own, matrix, sent, batch, gates, n, share=self.shares[1])
        deltas, rows = Factor(memory.at(("deltas", k), begin * batch * pitch), pitch), (end - begin) * batch
        width, d_x = layer.padded_inputs, None
        if k or self.sizes.d_inputs:
            below = memory.at(("upstream", k - 1)) if k else memory.at("d_x")
            d_x = Factor(below + 4 * begin * batch * width, width)
        if (gated := self.products.get(f"layers.{k}.w_in")) is not None:
            gated.backward(lane, begin * batch, rows, deltas, d_x)
        elif d_x is not None:
            w_in = Factor(parameters.operand_at(f"layers.{k}.w_in"), columns, transposed=True)
            lane.multiply(deltas, w_in, d_x, rows, columns, width)

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
        x, y = Factor(self.received(k), layer.padded_inputs), Factor(memory.at(("y", k)), n)
        own, recurrent = columns - n * layer.reset_first, deltas._replace(at=deltas.at + size * first * n)
        for role, received, delta, some in (("w_in", x, deltas, columns), ("w_rec", y, recurrent, own)):
            if (gated := self.products.get(f"{name}.{role}")) is not None:
                self._gated_gradients(lane, gated, received)
                continue
            out = Factor(parameters.gradient_at(f"{name}.{role}"), columns)
            width = layer.padded_inputs if role == "w_in" else n
            lane.multiply(received.turned, delta, out, width, rows, some)
            if role == "w_in":
                self.exchange.ready(lane, f"{name}.w_in")
        if layer.reset_first:
            candidate = Factor(parameters.gradient_at(f"{name}.w_rec") + 4 * own, columns)
            lane.multiply(Factor(memory.at(("q", k)), n, transposed=True), deltas, candidate, n, rows, n)
        if f"{name}.w_rec" not in self.products:
            self.exchange.ready(lane, f"{name}.w_rec")
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
            lane.clear(memory["gated work", k])
            gated = [role for role in ("w_in", "w_rec") if f"layers.{k}.{role}" in self.products]
            for role in gated:
                self._count_products(lane, k, role)
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
                *(0 if role in gated else parameters.kept_at(f"layers.{k}.{role}") for role in ("w_in", "w_rec")),
                memory.at(("gated work", k)),
                parameters.totals_at(k),
                threads=SUM_THREADS,
            )

    def _count_products(self, lane: Lane, k: int, role: str) -> None:
        """Effective operations of a matrix of gated blocks of layer k."""
        layer, memory, product = self.sizes.layers[k], self.memory, self.products[f"layers.{k}.{role}"]
        sizes, surrogate = product.sizes, self.surrogate(layer)
        # What the inputs sent: the layer below, in the same row, or the layer itself, a step earlier.
        x, values, pairs_from = Factor(memory.at(("y", k)), layer.padded), (self.sent_at(k), k, self.batch), self.batch
        if role == "w_in":
            x, values, pairs_from = Factor(self.received(k), layer.padded_inputs), (0, 0, 0), 0
            if k:
                values, surrogate = (self.sent_at(k - 1), k - 1, 0), self.surrogate(self.sizes.layers[k - 1])
            elif not self.sizes.symbols:
                pairs_from = self.rows
        sent, source, shift = values
        lane.each(
            ("count_products", self.precision, *surrogate),
            lambda: gated_blocks.count_products_kernel(self.precision, *surrogate),
            self.rows * sizes.inputs,
            x.at,
            x.pitch,
            sizes.inputs,
            self.rows,
            product.at("gates"),
            sizes.pitch,
            sizes.grid[1],
            sizes.block[0],
            self.parameters.kept_at(product.name),
            sent,
            memory.at(("threshold", source)) if sent else 0,
            shift,
            pairs_from,
            memory.at(("gated work", k)),
        )

    def penalty_rates(self, rates_at: int) -> None:
        """What the penalties of the activity rate need of the counts, before the backward pass, on the side lane.

        rates_at : two float64: target and strength
        """
        # The rate of a unit is that in the joined batch.
        counts = self.memory["counts"]
        self.exchange.add(self.lanes.side, counts.data.ptr, counts.size, "int64")
        for k, layer in enumerate(self.sizes.layers):
            self.lanes.side.each(
                ("rates",),
                sums.rate_kernel,
                layer.units,
                self.memory.at("counts", self.count_offsets[k] + sums.FIRED * layer.padded),
                self.joined_rows,
                rates_at,
                rates_at + 8,
                layer.units,
                self.memory.at(("d_event", k)),
                self.memory.at(("rate squares", k)),
            )
