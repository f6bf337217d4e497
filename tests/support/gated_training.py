"""What a window of training on a GPU leaves of a matrix of gated blocks, link by link, in float64 with error bounds."""

from __future__ import annotations

import numpy as np

from eventrnn.weights import MatrixId
from eventrnn.weights.gated import kept_blocks
from support.fake_gpu import widened
from support.tolerance import ROUNDED, U32, gamma, single_gate_error

F64 = np.float64


def operands(engine, array, shape, first: int = 0) -> np.ndarray:
    """Elements of an array of operands from number `first` on, in float64."""
    some = array.reshape(-1)[first : first + int(np.prod(shape))]
    out = np.empty(shape, some.dtype)
    engine.device.fetch(some, out.reshape(-1))
    return widened(out, engine.precision if out.dtype == np.uint16 else "tf32").astype(F64)


class Links:
    """The arrays of a matrix of gated blocks after an update, in the order of the host, in float64.

    engine : after an update on a window of so many steps and samples
    step   : number of the update
    """

    def __init__(self, engine, name: str, steps: int, batch: int, step: int):
        self.engine, self.name, self.sizes = engine, MatrixId(name), engine.sizes.gated[name]
        self.rows, self.batch, self.weights = steps * batch, batch, engine.model.gated[name]
        density = engine.settings.gates.density(self.weights.density, step)
        self.kept = kept_blocks(density, self.sizes.blocks)
        self.e = ROUNDED["tf32"] if engine.precision == "tf32" else 0.0
        self.narrow = ROUNDED.get(engine.precision, 0.0)

    def array(self, array: str, *shape: int) -> np.ndarray:
        return operands(self.engine, self.engine.memory[array, self.name], shape)

    def of_blocks(self, array: str) -> np.ndarray:
        return self.array(array, self.rows, self.sizes.pitch)[:, : self.sizes.blocks]

    def inputs(self) -> np.ndarray:
        """(rows, J) operands that the matrix receives."""
        memory, layers, first = self.engine.memory, self.engine.sizes.layers, 0
        if self.name.recurrent:
            array, padded = memory["y", self.name.layer], layers[self.name.layer].padded
        elif self.name.layer == 0:
            array, padded = memory["x"], layers[0].padded_inputs
        else:
            k = len(layers) - 1 if self.name.layer is None else self.name.layer - 1
            padded = layers[k].padded
            array, first = (memory["next", k], 0) if ("next", k) in memory else (memory["y", k], self.batch * padded)
        return operands(self.engine, array, (self.rows, padded), first)[:, : self.sizes.inputs]

    def before(self, name: str) -> np.ndarray:
        """A parameter as the kernels read it."""
        there = self.engine.parameters
        return self.parameter(name, there.values if name.endswith("bias") else there.operands)

    def parameter(self, name: str, array) -> np.ndarray:
        """A parameter, its operands or its gradient, as on the host."""
        there = self.engine.parameters
        segment = there.layout[name]
        packed = operands(self.engine, array, (segment.size,), segment.first)
        out = np.empty(segment.shape)
        segment.unpack(packed, out)
        return out

    def in_host_order(self, padded: np.ndarray) -> np.ndarray:
        """Outputs (..., G * N') of the GPU as (..., P)."""
        sizes = self.sizes
        parts = padded.reshape(*padded.shape[:-1], sizes.gates, -1)[..., : sizes.units]
        order = [(gate + sizes.shift) % sizes.gates for gate in range(sizes.gates)]
        return parts[..., order, :].reshape(*padded.shape[:-1], -1)

    def check(self, before: dict, balanced: bool) -> None:
        """Every link follows from the arrays before it.

        before   : the parameters before the update, by name, of a window without DropConnect
        balanced : whether the load balance takes part
        """
        x, sizes, (r, c) = self.inputs(), self.sizes, self.weights.block
        weights, gate, bias = (before[f"{self.name}{end}"] for end in ("", ".gate", ".gate_bias"))
        logits, inner = self.of_blocks("logits"), x
        if sizes.rank:
            inner = self.array("inner operands", self.rows, -(-sizes.rank // 8) * 8)[:, : sizes.rank]
            self.near(inner, x @ gate, np.abs(x) @ np.abs(gate), sizes.inputs, self.narrow)
            gate = before[f"{self.name}.gate_out"]
        self.near(logits, inner @ gate + bias, np.abs(inner) @ np.abs(gate) + np.abs(bias), len(gate) + 2)
        gates, chosen, slopes = self.of_blocks("gates"), self.of_blocks("chosen"), self.of_blocks("slopes")
        self.check_choice(logits, gates, chosen, slopes)
        products = self.in_host_order(self.array("products", self.rows, sizes.grid[0], sizes.columns))
        d_products = self.in_host_order(self.array("d_products", self.rows, sizes.grid[0], sizes.columns))
        d_gates, columns = self.of_blocks("d_gates"), np.arange(weights.shape[1]) // c
        for row in range(sizes.grid[0]):
            some = slice(row * r, (row + 1) * r)
            size = np.abs(x[:, some]) @ np.abs(weights[some])
            self.near(products[:, row], x[:, some] @ weights[some], size, r)
        # Where the gate is zero, the gradient of the product is; elsewhere it states the gradient of the drive.
        wide = gates.reshape(self.rows, *sizes.grid)[:, :, columns]
        with np.errstate(divide="ignore", invalid="ignore"):
            d_drives = np.nanmax(np.where(wide != 0, d_products / wide, -np.inf), axis=1)
        known = np.isfinite(d_drives)
        assert known.any()
        d_drives = np.where(known, d_drives, 0)
        spread = 2 * self.narrow + 4 * U32
        assert (np.abs(d_products - wide * d_drives[:, None]) <= 2 * spread * np.abs(d_products)).all()
        if known.all():
            for row in range(sizes.grid[0]):
                for column in range(sizes.grid[1]):
                    own, terms = columns == column, d_drives * products[:, row]
                    size = np.abs(terms[:, own]).sum(axis=1)
                    got = d_gates[:, row * sizes.grid[1] + column]
                    assert (np.abs(got - terms[:, own].sum(axis=1)) <= (gamma(c + 4, U32) + spread) * size).all()
        self.check_gradients(x, inner, gates, slopes, logits, chosen, d_gates, d_products, balanced)

    def check_choice(self, logits, gates, chosen, slopes) -> None:
        order = np.argsort(-logits, axis=1, kind="stable")[:, : self.kept]
        expected = np.zeros_like(logits)
        np.put_along_axis(expected, order, 1, axis=1)
        assert np.array_equal(chosen, expected)
        straight, blocks = self.engine.settings.gates.straight_through, logits.shape[1]
        for row, own in enumerate(expected == 1):
            some, passing = logits[row][own], np.ones(blocks, bool) if straight else own
            if self.sizes.softmax:
                ratios = np.exp(logits[row] - some.max())
                factor = blocks / ratios[own].sum()
                slope = ratios * factor
            else:
                pivot = np.abs(some).max()
                ratios = logits[row] / pivot if pivot else np.ones(blocks)
                factor = blocks / ratios[own].sum()
                slope = np.full(blocks, factor / pivot if pivot else 0.0)
            bound = single_gate_error(ratios[own])
            assert (np.abs(gates[row] - ratios * factor * own) <= bound * np.abs(ratios * factor)).all()
            assert (np.abs(slopes[row] - slope * passing) <= bound * np.abs(slope)).all()

    def check_gradients(self, x, inner, gates, slopes, logits, chosen, d_gates, d_products, balanced) -> None:
        sizes, there, blocks = self.sizes, self.engine.parameters, self.sizes.blocks
        d_logits = self.of_blocks("d_logits")
        mean, size = (d_gates * gates).sum(axis=1) / blocks, np.abs(d_gates * gates).sum(axis=1) / blocks
        expected = slopes * (d_gates - mean[:, None])
        sizes_of = np.abs(slopes) * (np.abs(d_gates) + size[:, None])
        if balanced:
            strength = self.engine.settings.regularisers.gate_balance
            used, shares = chosen.sum(axis=0) / chosen.sum(), np.exp(logits - logits.max(axis=1, keepdims=True))
            shares /= shares.sum(axis=1, keepdims=True)
            of_row, factor = shares @ used, strength * blocks / self.rows
            expected += factor * shares * (used - of_row[:, None])
            # An exponential of a difference of up to 88 has at most 92 roundings; two of them make a share.
            sizes_of += 8 * factor * shares * (used + of_row[:, None])
        self.near(d_logits, expected, sizes_of, 200, self.narrow)
        gradient = there.gradients
        d_inner = d_logits
        if sizes.rank:
            rank = -(-sizes.rank // 8) * 8
            d_inner = self.array("d_inner operands", self.rows, rank)[:, : sizes.rank]
            out = self.parameter(f"{self.name}.gate_out", gradient)
            self.near(out, inner.T @ d_logits, np.abs(inner).T @ np.abs(d_logits), self.rows)
        found = self.parameter(f"{self.name}.gate", gradient)
        self.near(found, x.T @ d_inner, np.abs(x).T @ np.abs(d_inner), self.rows)
        found = self.parameter(f"{self.name}.gate_bias", gradient)
        self.near(found, d_logits.sum(axis=0), np.abs(d_logits).sum(axis=0), self.rows)
        found, r = self.parameter(self.name, gradient), self.weights.block[0]
        for row in range(sizes.grid[0]):
            some = slice(row * r, (row + 1) * r)
            value, size = x[:, some].T @ d_products[:, row], np.abs(x[:, some]).T @ np.abs(d_products[:, row])
            self.near(found[some], value, size, self.rows)

    def near(self, got, expected, size, roundings: int, narrow: float = 0.0) -> None:
        """Sums of so many products in float32, of factors of which the precision may round each once."""
        factors = 2 * self.e + self.e**2
        bound = (gamma(roundings + 2, U32) + factors) * size
        assert (np.abs(got - expected) <= bound + narrow * (np.abs(expected) + bound)).all(), self.name
