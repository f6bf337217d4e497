"""The product of a matrix of gated blocks in a window, forward and backward, as work that is put on lanes.

Of one row, cuBLAS multiplies each block row of inputs by its rows of weights, all block rows in one call; a kernel adds
the products, each scaled by its gate (`kernels/gated_blocks.py`). All blocks are multiplied in training, as on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from eventrnn.cuda.training.gated_sizes import GatedSizes
from eventrnn.cuda.training.kernels import gated_blocks, threads
from eventrnn.cuda.training.lanes import SUM_THREADS, Factor, Lane, bits
from eventrnn.cuda.training.layout import up

if TYPE_CHECKING:
    from eventrnn.cuda.training.window import Window


class GatedProduct:
    """The product of a matrix of gated blocks with rows of inputs: a piece of the window, or a step.

    window  : where the arrays lie
    sizes   : of the matrix
    weights : its operands as a factor (J', columns); that of a read-out is stored transposed

    Inputs and gradients are factors that begin with the first of the rows of a call.
    """

    def __init__(self, window: Window, sizes: GatedSizes, weights: Factor):
        height = sizes.block[0]
        apart = height if weights.transposed else height * weights.pitch
        # Not the window itself: in a cycle, its memory would be freed when Python looks for cycles, not at once.
        self.name, self.sizes, self.weights = sizes.name, sizes, weights._replace(apart=apart)
        self.memory, self.parameters, self.network = window.memory, window.parameters, window.sizes
        self.rows, self.training = window.rows, window.training
        self.precision, self.size = window.precision, window.size

    def at(self, array: str, row: int = 0, pitch: int | None = None) -> int:
        """Address of a row of an array of this matrix; 0 for an array that is not there."""
        if (array, self.name) not in self.memory:
            return 0
        return self.memory.at((array, self.name), row * (self.sizes.pitch if pitch is None else pitch))

    def drives(self, lane: Lane, x: Factor, first: int, rows: int, out: Factor, *, share: int = 1) -> None:
        """out = the drives of `rows` rows from number `first` of the window on, without a bias."""
        sizes, training = self.sizes, self.training
        self._logits(lane, x, first, rows, share)
        lane.blocks(
            ("choose", self.precision),
            lambda: gated_blocks.choose_kernel(self.precision),
            rows,
            self.at("logits", first),
            self.parameters.value_at(f"{self.name}.gate_bias"),
            x.at,
            x.pitch,
            sizes.inputs,
            sizes.blocks,
            sizes.pitch,
            self.parameters.kept_blocks_at(self.name, final=not training),
            sizes.softmax,
            self.network.straight_through,
            self.at("gates", first),
            self.at("slopes", first),
            self.at("chosen", first),
            self.at("faults", first, 1),
            self.at("penalties of gates", first, 1),
            threads=SUM_THREADS,
        )
        at_once = sizes.rows_at_once(self.rows, training=training)
        for begin in range(first, first + rows, at_once):
            count, done = min(at_once, first + rows - begin), begin - first
            products = self._products(begin if training else 0)
            some = x._replace(at=x.at + self.size * done * x.pitch, apart=sizes.block[0])
            self._multiply(lane, some, self.weights, products, lambda n, c=count: (c, n, sizes.columns), share)
            lane.each(
                ("combine",),
                gated_blocks.combine_kernel,
                count * sizes.gates * sizes.units,
                products.at,
                self.at("gates", begin),
                sizes.pitch,
                *sizes.grid,
                sizes.block[1],
                sizes.units,
                up(sizes.units),
                sizes.gates,
                sizes.shift,
                count,
                out.at + 4 * done * out.pitch,
                out.pitch,
            )

    def _logits(self, lane: Lane, x: Factor, first: int, rows: int, share: int) -> None:
        sizes, inputs = self.sizes, up(self.sizes.inputs)
        logits, gate = Factor(self.at("logits", first), sizes.pitch), self._gate()
        if not sizes.rank:
            lane.multiply(x, gate, logits, rows, inputs, sizes.pitch, share=share)
            return
        rank = up(sizes.rank)
        inner = Factor(self.at("inner", first, rank), rank)
        lane.multiply(x, gate, inner, rows, inputs, rank, share=share)
        narrow = Factor(self._narrowed(lane, "inner", first, rows), rank)
        lane.multiply(narrow, self._gate_out(), logits, rows, rank, sizes.pitch, share=share)

    def backward(
        self, lane: Lane, first: int, rows: int, deltas: Factor, d_x: Factor | None, *, share: int = 1
    ) -> None:
        """From the gradients of the drives of some rows to those of the logits and, unless it is None, to d_x, the
        gradient of the inputs, float32."""
        sizes, balance = self.sizes, self.network.gate_balance
        products, d_products = self._products(first), self._d_products(first)
        lane.blocks(
            ("spread gates", self.precision),
            lambda: gated_blocks.spread_kernel(self.precision),
            rows * sizes.grid[0],
            deltas.at,
            deltas.pitch,
            products.at,
            self.at("gates", first),
            sizes.pitch,
            *sizes.grid,
            sizes.block[1],
            sizes.units,
            up(sizes.units),
            sizes.gates,
            sizes.shift,
            d_products.at,
            self.at("d_gates", first),
            threads=SUM_THREADS,
        )
        lane.blocks(
            ("logit gradients", self.precision),
            lambda: gated_blocks.logit_gradients_kernel(self.precision),
            rows,
            self.at("d_gates", first),
            self.at("gates", first),
            self.at("slopes", first),
            self.at("logits", first),
            sizes.blocks,
            sizes.pitch,
            self.at("used") if balance else 0,
            bits(balance * sizes.blocks / self.rows),
            self.at("penalties of gates", first, 1),
            self.at("d_logits", first),
            threads=SUM_THREADS,
        )
        d_inner, width = Factor(self.at("d_logits", first), sizes.pitch), sizes.pitch
        if sizes.rank:
            width = up(sizes.rank)
            out = Factor(self.at("d_inner", first, width), width)
            lane.multiply(d_inner, self._gate_out().turned, out, rows, sizes.pitch, width, share=share)
            d_inner = Factor(self._narrowed(lane, "d_inner", first, rows), width)
        if d_x is not None:
            of_blocks = d_x._replace(apart=sizes.block[0])
            self._multiply(lane, d_products, self.weights.turned, of_blocks, lambda n: (rows, sizes.columns, n), share)
            gate, inputs = self._gate().turned, up(sizes.inputs)
            lane.multiply(d_inner, gate, d_x, rows, width, inputs, share=share, accumulate=True)

    def gradients(self, lane: Lane, x: Factor) -> None:
        """Gradients of the weights and of the gate, after `backward` of all rows. x : the inputs of the window"""
        sizes, rows, inputs = self.sizes, self.rows, up(self.sizes.inputs)
        gradient, d_products, of_blocks = (
            self.parameters.gradient_at,
            self._d_products(0),
            x._replace(apart=sizes.block[0]),
        )
        out = self.weights._replace(at=gradient(self.name), transposed=False)
        if self.weights.transposed:
            self._multiply(lane, d_products.turned, of_blocks, out, lambda n: (sizes.columns, rows, n))
        else:
            self._multiply(lane, of_blocks.turned, d_products, out, lambda n: (n, rows, sizes.columns))
        d_logits, columns = Factor(self.at("d_logits"), sizes.pitch), sizes.pitch
        d_inner = d_logits
        if sizes.rank:
            columns = up(sizes.rank)
            d_inner, inner = (Factor(self.at(f"{name} operands"), columns) for name in ("d_inner", "inner"))
            out = Factor(gradient(f"{self.name}.gate_out"), sizes.pitch)
            lane.multiply(inner.turned, d_logits, out, columns, rows, sizes.pitch)
        lane.multiply(x.turned, d_inner, Factor(gradient(f"{self.name}.gate"), columns), inputs, rows, columns)

    def count_choices(self, lane: Lane) -> None:
        """The share of the window's choices that fell on each block, for the load balance."""
        sizes = self.sizes
        lane.each(
            ("count_choices",),
            gated_blocks.count_choices_kernel,
            sizes.blocks,
            self.at("chosen"),
            self.rows,
            sizes.blocks,
            sizes.pitch,
            self.parameters.kept_blocks_at(self.name),
            self.at("used"),
        )

    def _gate(self) -> Factor:
        columns = up(self.sizes.rank) if self.sizes.rank else self.sizes.pitch
        return Factor(self.parameters.operand_at(f"{self.name}.gate"), columns)

    def _gate_out(self) -> Factor:
        return Factor(self.parameters.operand_at(f"{self.name}.gate_out"), self.sizes.pitch)

    def _narrowed(self, lane: Lane, array: str, first: int, rows: int) -> int:
        """Round rows of an array (rows, rank') to operands, and return their address."""
        rank = up(self.sizes.rank)
        out = self.at(f"{array} operands", first, rank)
        count = rows * rank
        lane.each(
            ("narrow", self.precision),
            lambda: threads.narrow_kernel(self.precision),
            count,
            self.at(array, first, rank),
            count,
            out,
        )
        return out

    def _products(self, row: int) -> Factor:
        """The products from a row on, (rows, columns) of each block row."""
        pitch = self.sizes.grid[0] * self.sizes.columns
        return Factor(self.at("products", row, pitch), pitch, apart=self.sizes.columns)

    def _d_products(self, row: int) -> Factor:
        """The gradients of the products."""
        products = self._products(0)
        return products._replace(at=self.at("d_products", row, products.pitch))

    def _multiply(
        self,
        lane: Lane,
        a: Factor,
        b: Factor,
        out: Factor,
        shape: Callable[[int], tuple[int, int, int]],
        share: int = 1,
    ) -> None:
        """out = a @ b for each block row; the factors state how far block rows are apart.

        shape : inputs of a block row -> sizes of its product. The last block row may have fewer
        """
        height, whole, rest = self.sizes.block[0], *divmod(self.sizes.inputs, self.sizes.block[0])
        for first, count, inputs in ((0, whole, height), (whole, 1, rest)):
            if count and inputs:
                left, right = (each._replace(at=each.at + self.size * first * each.apart) for each in (a, b))
                to, (rows, width, columns) = out._replace(at=out.at + 4 * first * out.apart), shape(inputs)
                lane.multiply(left, right, to, rows, width, columns, share=share, count=count)
