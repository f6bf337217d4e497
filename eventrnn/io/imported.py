"""What all importers of GRUs and LSTMs share: the record of one cell's arrays, and the layer and network made of it.

Every library packs gates in an order of its own, keeps one or two biases, and applies the reset gate before or after
the matrix product. An importer states these; this file checks shapes and values and lays the arrays out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from eventrnn._checks import float32_array, need_kind, need_number
from eventrnn.cells import Cell, Surrogate
from eventrnn.network import Layer, Network, Readout
from eventrnn.weights import Dense

#: For each variant of the GRU the variant of the EGRU whose reset gate acts at the same place.
EVENT_VARIANTS = {"after": "evnn", "before": "paper"}


class ImportRefused(ValueError):
    """What was given is no network that can be imported. The message says what it is, and what to do."""


@dataclass(frozen=True)
class CellArrays:
    """The arrays of one cell as its library packs them, gates along the last axis.

    Attributes
    ----------
    where    : the name of the cell in its file, for messages
    cell     : the cell and its variant
    order    : for each gate row of `cell`, the place of its gate in the arrays: (1, 0, 2) for a library that packs the
               GRU's gates (r, z, n)
    w_in     : (I, gates * N)
    w_rec    : (N, gates * N)
    bias_in  : (gates * N,), or None for zeros
    bias_rec : (gates * N,), or None for zeros
    """

    where: str
    cell: Cell
    order: tuple[int, ...]
    w_in: Any
    w_rec: Any
    bias_in: Any = None
    bias_rec: Any = None

    def layer(self) -> Layer:
        """The layer. Raises `ImportRefused` for shapes that do not fit, and for NaN and infinity."""
        arrays = {name: getattr(self, name) for name in ("w_in", "w_rec", "bias_in", "bias_rec")}
        shapes = {name: np.shape(array) for name, array in arrays.items()}
        gates = len(self.order)
        units = shapes["w_rec"][0] if len(shapes["w_rec"]) == 2 else 0
        inputs = shapes["w_in"][0] if len(shapes["w_in"]) == 2 else 0
        width = gates * units
        needed = {"w_in": (inputs, width), "w_rec": (units, width), "bias_in": (width,), "bias_rec": (width,)}
        laid_out = {}
        for name, shape in needed.items():
            array = np.zeros(shape, np.float32) if arrays[name] is None else arrays[name]
            if np.shape(array) != shape or not units or not inputs:
                raise ImportRefused(
                    f"{self.where}: its {_WORDS[name]} have the shape {shapes[name]}, need {shape} for {units} units "
                    f"with {gates} gates"
                )
            try:
                found = float32_array(f"{self.where}, {_WORDS[name]}", array, f"{shape}")
            except (ValueError, TypeError) as error:
                raise ImportRefused(str(error)) from None
            blocks = found.reshape(*shape[:-1], gates, units)
            laid_out[name] = np.ascontiguousarray(blocks[..., list(self.order), :].reshape(shape))
        return Layer(
            Dense(laid_out["w_in"]),
            Dense(laid_out["w_rec"]),
            laid_out["bias_in"],
            laid_out["bias_rec"],
            np.zeros(units, np.float32),
            self.cell,
        )


_WORDS = {
    "w_in": "input weights",
    "w_rec": "recurrent weights",
    "bias_in": "input biases",
    "bias_rec": "recurrent biases",
}


def network_of(
    cells: Sequence[CellArrays | Layer], embedding: Any = None, readout: tuple[Any, Any] | None = None, *, origin: str
) -> Network:
    """The network of several cells, or of the layers made of them, from input to output.

    embedding : (V, E) numbers, or None
    readout   : weights (N, V) and biases (V,) or None, or None for no read-out
    origin    : the library and version, for the network's metadata
    """
    layers = tuple(cell if isinstance(cell, Layer) else cell.layer() for cell in cells)
    top = None
    try:
        if readout is not None:
            weights = np.ascontiguousarray(float32_array("readout", readout[0], "(N, V)", ndim=2))
            biases = np.zeros(weights.shape[1], np.float32) if readout[1] is None else readout[1]
            top = Readout(Dense(weights), np.array(float32_array("readout bias", biases, "(V,)", ndim=1)))
        below = None if embedding is None else np.array(float32_array("embedding", embedding, "(V, E)", ndim=2))
        return Network(layers, embedding=below, readout=top, metadata={"imported": origin})
    except (ValueError, TypeError) as error:
        raise ImportRefused(str(error)) from None


def as_egru(network: Network, *, threshold: float, surrogate: Surrogate | None = None) -> Network:
    """The network with EGRU cells in place of its GRU cells, the same weights, and one threshold for all units.

    threshold : number >= 0, the value that a cell must exceed to send it
    surrogate : derivative of the event in training; that of `Cell("egru")` by default

    The new network is where a training starts, and not the same function: an EGRU sends its cell only where it exceeds
    the threshold, so never a negative one, while the units of a GRU send every state. A GRU with the reset gate after
    the product becomes an EGRU of the variant "evnn", one with the gate before it of the variant "paper".

    Raises ValueError for layers that are no GRUs and for a wrong threshold.
    """
    need_kind("network", network, Network, "a Network")
    threshold = need_number("threshold", threshold, at_least=0)
    layers = []
    for k, layer in enumerate(network.layers):
        if layer.cell.name != "gru":
            raise ValueError(f"network: layer {k} has the cell {layer.cell.name!r}, need 'gru'")
        cell = Cell("egru", EVENT_VARIANTS[layer.cell.variant], Surrogate() if surrogate is None else surrogate)
        layers.append(replace(layer, cell=cell, threshold=np.full(layer.units, threshold, np.float32)))
    return replace(network, layers=tuple(layers))


def plain(array: Any) -> np.ndarray:
    """An array of another library as NumPy's, on the CPU and without gradient."""
    for step in ("detach", "cpu"):
        array = getattr(array, step, lambda same=array: same)()
    kind = str(getattr(array, "dtype", ""))
    if kind.endswith("bfloat16") and hasattr(array, "float"):
        array = array.float()
    array = np.asarray(array)
    # Arrays of JAX have a type of the package ml_dtypes, which NumPy takes for records.
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def listed(names: Mapping[str, Any] | Sequence[str]) -> str:
    """The first names, for a message."""
    names = [str(name) for name in names]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"
