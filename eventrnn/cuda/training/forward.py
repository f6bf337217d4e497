"""The forward pass of a window, its loss and its counts, as work that is put on lanes.

Of a piece of time: drive = x @ w_in (all steps); then per step: rec = y @ w_rec, cells. Where the reset gate comes
before the product, there is a second recurrent product per step, that of the candidate.
"""

from __future__ import annotations

import numpy as np

from eventrnn.cuda.training.cell_rules import CELLS
from eventrnn.cuda.training.kernels import cell_steps, inputs, loss, noise, sums
from eventrnn.cuda.training.lanes import Factor, Lane, bits
from eventrnn.cuda.training.layout import up
from eventrnn.cuda.training.memory import NO_SOFT_TARGETS
from eventrnn.cuda.training.window import Window

# Threads of a block of the loss, which owns a row.
LOSS_THREADS = 512


class ForwardWindow(Window):
    """A window with its forward pass."""

    def forward(self) -> None:
        """From the inputs in memory to the operands of the top layer, and the logits if there is a read-out."""
        lane = self.lanes.main
        if self.training:
            self._draw(lane)
        self._begin(lane)
        if not self.sizes.outside:
            self._read_inputs(lane)
        self.lanes.fork()
        for begin, end in self.pieces:
            mark = None
            for k, own in enumerate(self.lanes.layers):
                if mark is not None:
                    own.wait(mark)
                self._layer_forward(k, begin, end)
                mark = own.record()
        self.lanes.join()
        if self.sizes.outputs:
            top, columns = self.sizes.layers[-1].padded, up(self.sizes.outputs)
            readout = Factor(self.parameters.operand_at(self.parameters.readout), top, transposed=True)
            out = Factor(self.memory.at("logits"), columns)
            x, gated = Factor(self.sent_up(len(self.sizes.layers) - 1), top), self.products.get("readout")
            if gated is not None:
                gated.drives(lane, x, 0, self.rows, out)
            else:
                lane.multiply(x, readout, out, self.rows, top, columns)

    def _draw(self, lane: Lane) -> None:
        for mask in self.sizes.masks:
            sizes = mask.sizes(self.steps, self.batch)
            columns = self.sizes.layers[mask.layer].units if mask.name == "recurrent" else sizes[-1]
            count, out = int(np.prod(sizes)), self.memory.at(("mask", mask.name, mask.layer))
            part = noise.part_of(mask, self.steps, self.batch, self.exchange.rank, self.exchange.ranks)
            lane.each(
                ("draw",),
                noise.draw_kernel,
                count // part.width * part.blocks,
                self.parameters.job_at,
                self.seed,
                mask.place,
                bits(mask.rate),
                count,
                columns,
                up(columns),
                out,
                *part,
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
        """Thresholds, and carried outputs as operands."""
        memory, parameters = self.memory, self.parameters
        for k, layer in enumerate(self.sizes.layers):
            kind = cell_steps.LOGITS if parameters.rule == "sigmoid" else cell_steps.THRESHOLDS
            lane.each(
                ("thresholds",),
                cell_steps.threshold_kernel,
                layer.units,
                parameters.value_at(f"layers.{k}.threshold"),
                kind if layer.cell.thresholded else cell_steps.NO_THRESHOLDS,
                layer.units,
                memory.at(("threshold", k)),
            )
            self._carry(lane, k, begin=True)

    def _read_inputs(self, lane: Lane) -> None:
        """The inputs of the first layer as operands."""
        memory, parameters, first = self.memory, self.parameters, self.sizes.layers[0]
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
            self._carry(self.lanes.main, k, begin=False)

    def _carry(self, lane: Lane, k: int, *, begin: bool) -> None:
        layer, memory = self.sizes.layers[k], self.memory
        lane.each(
            ("carry", self.precision),
            lambda: cell_steps.carry_kernel(self.precision),
            layer.units * self.batch,
            begin,
            0 if begin else self.tape_at(k, self.steps - 1, CELLS),
            0 if begin else self.sent_at(k, self.steps - 1),
            memory.at(("threshold", k)),
            # Only the released EGRU subtracts the threshold in the same step.
            layer.reset_first or not layer.cell.thresholded,
            memory.at(("cells", k)),
            memory.at(("outputs", k)),
            memory.at(("y", k)),
            self.parameters.results_at if self.training else self.parameters.no_fault_at,
            layer.units,
            layer.padded,
            self.batch,
        )

    def _layer_forward(self, k: int, begin: int, end: int) -> None:
        lane, layer, memory = self.lanes.layers[k], self.sizes.layers[k], self.memory
        n, batch, inputs_, columns = layer.padded, self.batch, layer.padded_inputs, layer.gates * layer.padded
        x = Factor(self.received(k) + self.size * begin * batch * inputs_, inputs_)
        drive = Factor(memory.at(("drive", k), begin * batch * columns), columns)
        gated, rows = self.products.get(f"layers.{k}.w_in"), (end - begin) * batch
        if gated is not None:
            gated.drives(lane, x, begin * batch, rows, drive)
        else:
            lane.multiply(x, Factor(self.weights(k, "w_in"), columns), drive, rows, inputs_, columns)
        w_rec, rec = self.weights(k, "w_rec"), memory.at(("rec", k))
        vectors = self.parameters.value_at(f"layers.{k}.bias_in")
        threshold = memory.at(("threshold", k))
        mask_at, mask_steps, mask_samples, scale = self.mask_after(k)
        hold, share = self.sizes.mask("zoneout", k) if self.training else None, self.shares[0]
        gated = self.products.get(f"layers.{k}.w_rec")
        for t in range(begin, end):
            y = Factor(memory.at(("y", k), t * batch * n), n)
            own = columns - n * layer.reset_first
            if gated is not None:
                gated.drives(lane, y, t * batch, batch, Factor(rec, columns), share=share)
            else:
                lane.multiply(y, Factor(w_rec, columns), Factor(rec, columns), batch, n, own, share=share)
            before, first = self.before(k, t)
            drive_at, carried = memory.at(("drive", k), t * batch * columns), memory.at(("outputs", k))
            if layer.reset_first:
                sent = memory.at(("q", k), t * batch * n)
                lane.units(
                    ("reset_gate", self.precision),
                    lambda: cell_steps.reset_gate_kernel(self.precision),
                    layer.units,
                    batch,
                    drive_at,
                    rec,
                    vectors,
                    threshold,
                    before,
                    carried,
                    first,
                    self.tape_at(k, t),
                    self.plane(k),
                    sent,
                    layer.units,
                    n,
                    batch,
                )
                candidate, out = Factor(w_rec + self.size * own, columns), Factor(rec + 4 * own, columns)
                lane.multiply(Factor(sent, n), candidate, out, batch, n, n, share=share)
            lane.units(
                ("forward", layer.cell.name, layer.cell.variant, self.precision),
                lambda: layer.rule.forward(self.precision),
                layer.units,
                batch,
                drive_at,
                rec,
                vectors,
                threshold,
                before,
                carried,
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

    def cross_entropy(self) -> None:
        """The losses of all rows; in training, the logits become their gradient."""
        columns, soft = self.sizes.outputs, self.sizes.soft if self.training else NO_SOFT_TARGETS
        self.lanes.main.blocks(
            ("cross_entropy", self.precision),
            lambda: loss.cross_entropy_kernel(self.precision),
            self.rows,
            self.memory.at("logits"),
            up(columns),
            self.parameters.value_at("readout.bias"),
            self.memory.at("targets"),
            columns,
            up(columns),
            bits(1 / self.joined_rows) if self.training else 0,
            self.memory.at("losses"),
            soft.kept,
            bits(soft.weight),
            self.memory.at("soft symbols"),
            self.memory.at("soft probabilities"),
            threads=LOSS_THREADS,
        )

    def write_output(self, to: int = 0) -> None:
        """The output of the network as float32 (T, B, V or N) in `result`, or at an address of the caller."""
        top, columns = self.sizes.layers[-1], self.sizes.outputs
        last = len(self.sizes.layers) - 1
        source = self.memory.at("logits") if columns else self.sent_at(last)
        bias = self.parameters.value_at("readout.bias") if columns else self.memory.at(("threshold", last))
        self.lanes.main.each(
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
            to or self.memory.at("result"),
        )

    def count_events(self) -> None:
        """Events and active pairs per unit, after the forward pass, on the side lane."""
        lane, memory = self.lanes.side, self.memory
        lane.wait(self.lanes.main.record())
        lane.clear(memory["counts"])
        for k, layer in enumerate(self.sizes.layers):
            surrogate = self.surrogate(layer)
            lane.each(
                ("count_units", *surrogate),
                lambda surrogate=surrogate: sums.count_units_kernel(*surrogate),
                layer.units * self.steps,
                self.sent_at(k),
                memory.at(("threshold", k)),
                memory.at(("outputs", k)),
                layer.units,
                layer.padded,
                self.batch,
                self.steps,
                memory.at("counts", self.count_offsets[k]),
            )

    def events(self, counts: np.ndarray) -> list[int]:
        """Events of each layer, from the counts that `count_events` has left."""
        offsets = zip(self.count_offsets, self.sizes.layers, strict=False)
        return [int(counts[at + sums.FIRED * n.padded :][: n.padded].sum()) for at, n in offsets]
