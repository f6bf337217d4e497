"""The matrices of gated blocks of one layer and window: what the engines of all cells do with them.

An engine makes the `products` of its parameters before the window. It takes drives from them in place of matrix
products, and gives back the gradient of its recurrent drives at every step, the first one included. After the last step
it asks for the `gradients`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from eventrnn.cells import Cell
from eventrnn.cpu.threads import Team
from eventrnn.training.bptt.gated_products import GatedMatrix, GatedProduct, rows_of
from eventrnn.training.bptt.tape import GradientMask, LayerTape, active
from eventrnn.training.bptt.workspace import Arena


def products(p: Mapping[str, np.ndarray | GatedMatrix], rows: int, team: Team, arena: Arena) -> dict[str, GatedProduct]:
    """The products of the matrices of gated blocks among the parameters of a layer, for so many rows."""
    return {name: GatedProduct(each, rows, team, arena) for name, each in p.items() if isinstance(each, GatedMatrix)}


def pairs_of_outputs(cell: Cell, tape: LayerTape) -> np.ndarray:
    """The active pairs (T * B, N) of the outputs that the recurrent matrix receives, as booleans.

    Nothing within the window reads the last output, and the first one is that of the state before it.
    """
    steps, batch, n = tape.v.shape
    pairs = np.zeros((steps, batch, n), bool)
    if "w_rec" in tape.products:
        pairs[1:] = active(cell, tape.v[:-1], tape.threshold) if cell.thresholded else True
    return pairs.reshape(steps * batch, n)


def gradients(
    tape: LayerTape,
    d_drives: Mapping[str, np.ndarray],
    input_mask: GradientMask | None,
    pairs: np.ndarray,
    masks: Mapping[str, np.ndarray | None],
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Gradients of all matrices of gated blocks of a layer, whose work is written to the tape.

    d_drives   : (T * B, P) gradient of the drives of each matrix; for `w_rec` the product has seen it, step by step
    input_mask : where the gradient of the inputs is needed; None for nowhere
    pairs      : (T * B, N) boolean, the outputs whose gradient through `w_rec` is needed
    masks      : kept weights of each matrix; None for all

    Returns gradients by name, such as `w_in` and `w_in.gate`, of pruned weights too; and the gradient of the inputs
    (T, B, I) if it goes through a gate and is needed.
    """
    found, d_x = {}, None
    steps, batch = tape.v.shape[:2]
    for name, product in tape.products.items():
        needed, x = max(0, steps - 1) * batch, rows_of(tape.x if name == "w_in" else tape.y[:-1])
        own = pairs
        if name == "w_in":
            # The gradient of the logits needs that of the scaled inputs, also where that of the inputs is not needed.
            d_inputs, own, needed = product.input_gradient(x, d_drives[name], 0), np.zeros(x.shape, bool), 0
            if input_mask is not None:
                d_x, own, needed = d_inputs.reshape(tape.x.shape), input_mask.needed(x.shape), len(x)
                input_mask.zero_elsewhere(d_x)
        found |= {name + end: gradient for end, gradient in product.gradients(x, d_drives[name]).items()}
        tape.work[name] = product.work(x, masks[name], own, needed)
    return found, d_x
