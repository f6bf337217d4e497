"""Networks as the `state_dict` of modules of PyTorch: `nn.GRU` and `nn.LSTM`, and `eventrnn.torch.EGRU`."""

from __future__ import annotations

import numpy as np

from eventrnn.io.exported import ExportRefused, laid_out, one_cell, one_size
from eventrnn.io.from_torch import ORDER
from eventrnn.network import Network


def to_torch(network: Network) -> dict[str, np.ndarray]:
    """The parameters of a network by their names in PyTorch, float32.

    GRU cells with the reset gate after the product become those of `nn.GRU` (`weight_ih_l0` and so on), LSTM cells
    those of `nn.LSTM`, and EGRU cells those of `eventrnn.torch.EGRU`. In a network with an embedding or a read-out
    their names begin with `rnn.`, and `embedding.weight` (V, E), `readout.weight` (V, N) and `readout.bias` (V,) stand
    beside them. Pruned weights are zeros, and a tied read-out is written out.

    `from_torch` reads them again, exactly. Raises `ExportRefused`, a ValueError, for GRUs with the reset gate before
    the product, which PyTorch has not, and for layers of different cells or sizes; TypeError for gated blocks.
    """
    where = "a module of PyTorch"
    cell = one_cell(network, where)
    one_size(network, where)
    if cell.name == "gru" and cell.variant != "after":
        raise ExportRefused(
            "network: its GRU applies the reset gate before the product, while nn.GRU has it after; export it to Keras "
            "or ONNX"
        )
    whole = network.embedding is not None or network.readout is not None
    prefix, arrays = "rnn." if whole else "", {}
    for k, layer in enumerate(network.layers):
        if cell.thresholded:
            own = laid_out(layer, range(cell.gates)) | {"threshold": layer.threshold.copy()}
            arrays |= {f"{prefix}{name}_l{k}": array for name, array in own.items()}
            continue
        own = laid_out(layer, ORDER[cell.name])
        arrays[f"{prefix}weight_ih_l{k}"] = np.ascontiguousarray(own["w_in"].T)
        arrays[f"{prefix}weight_hh_l{k}"] = np.ascontiguousarray(own["w_rec"].T)
        arrays[f"{prefix}bias_ih_l{k}"] = own["bias_in"]
        arrays[f"{prefix}bias_hh_l{k}"] = own["bias_rec"]
    if network.embedding is not None:
        arrays["embedding.weight"] = network.embedding.copy()
    if network.readout is not None:
        arrays["readout.weight"] = np.ascontiguousarray(network.readout.weights.to_dense().T)
        arrays["readout.bias"] = network.readout.bias.copy()
    return arrays
