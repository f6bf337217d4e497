"""What all exporters share: refusals, the one cell of a network, and arrays in the gate order of another library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from eventrnn._checks import need_kind
from eventrnn.cells import Cell, Surrogate
from eventrnn.network import Layer, Network
from eventrnn.weights.gated import need_matrices

#: The key of the cells among the metadata of a file.
CELLS_KEY = "eventrnn.cells"


class ExportRefused(ValueError):
    """What was given is no network that the format can hold. The message says why, and what to do."""


def one_cell(network: Network, where: str) -> Cell:
    """The cell of all layers of a network. Raises `ExportRefused` where they differ, TypeError for gated blocks."""
    need_kind("network", network, Network, "a Network")
    need_matrices(network.matrices(), where)
    if network.one_hot:
        raise ExportRefused(
            f"network: its embedding is folded into layers.0.w_in, which {where} has not; export the network before it "
            "is folded"
        )
    cells = {(layer.cell.name, layer.cell.variant) for layer in network.layers}
    if len(cells) > 1:
        found = ", ".join(sorted("/".join(cell) for cell in cells))
        raise ExportRefused(f"network: has the cells {found}, need one for all layers of {where}; export them apart")
    return network.layers[0].cell


def one_size(network: Network, where: str) -> int:
    """The units of all layers of a network. Raises `ExportRefused` where they differ."""
    sizes = [layer.units for layer in network.layers]
    if len(set(sizes)) > 1:
        raise ExportRefused(
            f"network: has layers of {', '.join(map(str, sizes))} units, need the same in all for {where}; export them "
            "apart"
        )
    return sizes[0]


def laid_out(layer: Layer, order: Sequence[int]) -> dict[str, np.ndarray]:
    """The arrays of a layer with gate blocks in another order, C-contiguous float32: w_in (I, G N), w_rec (N, G N),
    bias_in and bias_rec (G N,).

    order : for each gate of the cell, its place in the other library, as in `CellArrays`
    """
    inverse = np.argsort(order)
    arrays = {
        "w_in": layer.w_in.to_dense(),
        "w_rec": layer.w_rec.to_dense(),
        "bias_in": layer.bias_in,
        "bias_rec": layer.bias_rec,
    }
    return {
        name: np.ascontiguousarray(
            array.reshape(*array.shape[:-1], len(order), layer.units)[..., inverse, :].reshape(array.shape)
        )
        for name, array in arrays.items()
    }


def described(network: Network) -> dict[str, str]:
    """The cells of a network as metadata of a file whose format does not know them."""
    return {CELLS_KEY: json.dumps([asdict(layer.cell) for layer in network.layers])}


def cells_of(metadata: dict[str, str]) -> list[Cell] | None:
    """The cells that `described` wrote; None where there are none. Raises ValueError for another text."""
    text = metadata.get(CELLS_KEY)
    if text is None:
        return None
    try:
        return [Cell(**{**each, "surrogate": Surrogate(**each["surrogate"])}) for each in json.loads(text)]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{CELLS_KEY}: not what an export wrote ({error})") from None
