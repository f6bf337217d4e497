"""The device memory of windows of one size: what it needs, stated before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cells import Cell
from eventrnn.cuda.training.cell_rules import CellRule, rule_of
from eventrnn.cuda.training.gated_sizes import GatedSizes
from eventrnn.cuda.training.kernels.sums import PENALTY_PARTS, PENALTY_TERMS, UNIT_COUNTS
from eventrnn.cuda.training.kernels.threads import BYTES
from eventrnn.cuda.training.layout import up

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device
    from eventrnn.training.bptt.noise import Mask

Spec = dict[Any, tuple[tuple[int, ...], Any]]


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a layer: inputs, units, both padded, and its cell."""

    inputs: int
    units: int
    cell: Cell

    @property
    def rule(self) -> CellRule:
        """How the layer is trained."""
        return rule_of(self.cell)

    @property
    def gates(self) -> int:
        return self.cell.gates

    @property
    def reset_first(self) -> bool:
        return self.cell.reset_first

    @property
    def padded_inputs(self) -> int:
        return up(self.inputs)

    @property
    def padded(self) -> int:
        return up(self.units)


@dataclass(frozen=True)
class SoftSizes:
    """Soft targets of a row: how many, and their share in the loss."""

    kept: int
    weight: float


NO_SOFT_TARGETS = SoftSizes(0, 0.0)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a network, and what its windows need.

    Attributes
    ----------
    layers    : from the first to the last
    symbols   : rows of the embedding, 0 without one
    outputs   : columns of the read-out, 0 without one
    precision : type of operands
    masks     : random masks of a window
    penalties : whether a penalty or an activity cost acts on outputs or cells
    cells     : whether a penalty acts on cells
    d_inputs  : whether the gradient of the inputs is computed; always with an embedding
    soft      : soft targets of the loss
    gated     : sizes of the matrices of gated blocks, by name, from the first layer to the read-out
    outside   : whether inputs and outputs lie in arrays of a caller, which copies them itself
    straight_through, gate_balance : see `GateSettings` and `Regularisers`
    """

    layers: Sequence[LayerSizes]
    symbols: int
    outputs: int
    precision: str
    masks: Sequence[Mask]
    penalties: bool
    cells: bool
    d_inputs: bool
    soft: SoftSizes = NO_SOFT_TARGETS
    gated: Mapping[str, GatedSizes] = field(default_factory=dict)
    straight_through: bool = False
    gate_balance: float = 0.0
    outside: bool = False

    def mask(self, name: str, layer: int = 0) -> Mask | None:
        """The random mask of that name and layer, or None."""
        return next((mask for mask in self.masks if (mask.name, mask.layer) == (name, layer)), None)

    def after(self, k: int) -> Mask | None:
        """The random mask of the outputs of layer k, or None."""
        return self.mask("between", k) if k + 1 < len(self.layers) else self.mask("top")

    def outline(self, steps: int, batch: int, *, training: bool) -> Spec:
        """Name -> shape and type of every array of windows of up to `steps` steps and `batch` samples.

        training : with what only the backward pass needs
        """
        rows, operand = steps * batch, np.uint16 if BYTES[self.precision] == 2 else np.float32
        first, spec = self.layers[0], {}
        spec["symbols"] = (rows,), np.int64
        spec["targets"] = (rows,), np.int64
        spec["losses"] = (rows,), np.float64
        if not self.symbols and not self.outside:
            spec["numbers"] = (rows, first.inputs), np.float32
        spec["x"] = (rows, first.padded_inputs), operand
        spec["counts of inputs"] = (sum(layer.padded_inputs for layer in self.layers),), np.int64
        spec["counts"] = (UNIT_COUNTS * sum(layer.padded for layer in self.layers),), np.int64
        for k, layer in enumerate(self.layers):
            n = layer.padded
            spec["threshold", k] = (n,), np.float32
            spec["cells", k] = (batch, n), np.float32
            spec["outputs", k] = (batch, n), np.float32
            spec["drive", k] = (rows, layer.gates * n), np.float32
            spec["rec", k] = (batch, layer.gates * n), np.float32
            spec["tape", k] = (layer.rule.planes, rows, n), np.float32
            spec["y", k] = (rows + batch, n), operand
            if layer.reset_first:
                spec["q", k] = (rows, n), operand
            if training and self.after(k) is not None:
                spec["next", k] = (rows, n), operand
        top = self.layers[-1]
        if self.outputs:
            spec["logits"] = (rows, up(self.outputs)), np.float32
        if not self.outside:
            spec["result"] = (rows, self.outputs or top.units), np.float32
        for gated in self.gated.values():
            spec |= gated.outline(rows, steps, operand, training=training)
        if training:
            spec |= self._backward(steps, batch, rows, operand)
        return spec

    def _backward(self, steps: int, batch: int, rows: int, operand: Any) -> Spec:
        spec: Spec = {}
        for k, layer in enumerate(self.layers):
            n, parts = layer.padded, layer.rule.parts
            spec["deltas", k] = (rows, parts * n), operand
            spec["upstream", k] = (rows, n), np.float32
            spec["product", k] = (batch, n), np.float32
            spec["later", k] = (batch, n), np.float32
            spec["partial", k] = (steps, parts * n), np.float32
            spec["gated work", k] = (1,), np.int64
            if layer.reset_first:
                spec["d_sent", k] = (batch, n), np.float32
                spec["d_q", k] = (batch, n), np.float32
            if self.cells:
                spec["d_cell", k] = (rows, n), np.float32
                spec["d_event", k] = (n,), np.float32
                spec["rate squares", k] = (n,), np.float64
            if self.penalties:
                spec["penalties", k] = (steps * PENALTY_PARTS, PENALTY_TERMS), np.float64
                spec["factors", k] = (PENALTY_TERMS + 1,), np.float32
        if self.d_inputs:
            spec["d_x"] = (rows, self.layers[0].padded_inputs), np.float32
        if self.symbols:
            spec["order"] = (rows,), np.int64
            spec["groups"] = (rows + 1,), np.int64
        if self.soft.kept:
            spec["soft symbols"] = (rows, self.soft.kept), np.int32
            spec["soft probabilities"] = (rows, self.soft.kept), np.float32
        if self.outputs:
            spec["partial outputs"] = (steps, up(self.outputs)), np.float32
        for mask in self.masks:
            sizes = mask.sizes(steps, batch)
            if mask.name == "recurrent":
                n, gates = self.layers[mask.layer].padded, self.layers[mask.layer].gates
                spec["mask", mask.name, mask.layer] = (n, gates * n), np.uint8
                spec["dropped", mask.layer] = (n, gates * n), operand
            else:
                spec["mask", mask.name, mask.layer] = (*sizes[:-1], up(sizes[-1])), np.uint8
        return spec


def nbytes(spec: Spec) -> int:
    """Bytes of all arrays."""
    return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in spec.values())


class Memory:
    """Arrays by name, all zero at first; kernels never write to the padding."""

    def __init__(self, device: Device, spec: Spec):
        self.arrays = {name: device.empty(shape, dtype) for name, (shape, dtype) in spec.items()}
        for array in self.arrays.values():
            if array.nbytes:
                array.data.memset_async(0, array.nbytes)

    def __contains__(self, name: Any) -> bool:
        return name in self.arrays

    def __getitem__(self, name: Any) -> Any:
        return self.arrays[name]

    def at(self, name: Any, elements: int = 0) -> int:
        """Address of an array, or of an element of it; 0 for an array that is not there."""
        if name not in self.arrays:
            return 0
        array = self.arrays[name]
        return array.data.ptr + elements * array.dtype.itemsize
