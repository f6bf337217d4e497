"""What a silent step of a network consists of; `kernels/silence.py` says what that is and takes such steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from eventrnn import cells
from eventrnn.cells import ONE, ZERO

if TYPE_CHECKING:
    from eventrnn.network import Layer, Network


def silent_steps(network: Network) -> tuple[np.ndarray, np.ndarray]:
    """Factor and addend of the cells of all layers in a silent step, (units,) float32 each; zeros for other cells.

    A cell that is not thresholded has no silent steps: its units send their outputs at every step. The functions of
    `cells.py` are evaluated in NumPy, which gives the bits of the kernels.
    """
    pairs = [_of_layer(layer) for layer in network.layers]
    keep, pull = (np.concatenate(each) for each in zip(*pairs, strict=True))
    return keep, pull


def _of_layer(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    if not layer.cell.thresholded:
        return np.zeros(layer.units, np.float32), np.zeros(layer.units, np.float32)
    (in_u, in_r, in_g), (rec_u, rec_r, rec_g) = (np.split(bias, 3) for bias in (layer.bias_in, layer.bias_rec))
    if layer.cell.reset_first:
        _, keep, candidate = cells.egru_paper_value(in_u, in_g, rec_u, rec_g, ZERO, ZERO)
    else:
        _, keep, _, candidate = cells.egru_value(in_u, in_r, in_g, rec_u, rec_r, rec_g, ZERO)
    return keep, (ONE - keep) * candidate
