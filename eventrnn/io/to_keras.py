"""GRUs and LSTMs as the weights of Keras 3 layers."""

from __future__ import annotations

import io

import numpy as np

from eventrnn.io.exported import ExportRefused, laid_out, one_cell
from eventrnn.network import Network


def to_keras(network: Network) -> dict[str, list[np.ndarray]]:
    """The arrays of each layer of a Keras 3 model, as its `set_weights` takes them, by name and from below:
    `embedding`, `gru`, `gru_1`, …, or `lstm`, …, and `dense` for the read-out.

    The model has `Embedding`, `GRU(units, return_sequences=True)` or `LSTM`, and `Dense` layers, without activations of
    its own. A GRU with the reset gate before the product needs `reset_after=False`. There, and in an LSTM, Keras has
    one bias: ours are added, with one rounding. Pruned weights are zeros.

    Where one of the biases is zero, `from_keras` reads the same network again, exactly. Raises `ExportRefused`, a
    ValueError, for EGRU cells, which Keras has not, and for layers of different cells; TypeError for gated blocks.
    """
    cell = one_cell(network, "a model of Keras")
    if cell.thresholded:
        raise ExportRefused("network: has EGRU cells, which Keras has not; export it to ONNX or PyTorch")
    layers: dict[str, list[np.ndarray]] = {}
    if network.embedding is not None:
        layers["embedding"] = [network.embedding.copy()]
    for k, layer in enumerate(network.layers):
        own = laid_out(layer, range(cell.gates))
        if cell.name == "gru" and cell.variant == "after":
            bias = np.stack([own["bias_in"], own["bias_rec"]])
        else:
            bias = own["bias_in"] + own["bias_rec"]
        layers[f"{cell.name}_{k}" if k else cell.name] = [own["w_in"], own["w_rec"], bias]
    if network.readout is not None:
        layers["dense"] = [network.readout.weights.to_dense(), network.readout.bias.copy()]
    return layers


def keras_file(network: Network) -> bytes:
    """The content of a `.weights.h5` file for `load_weights` of such a model. Needs h5py."""
    try:
        import h5py
    except ImportError:
        raise ImportError("a file of Keras needs h5py: pip install 'eventrnn[imports]'") from None
    raw = io.BytesIO()
    with h5py.File(raw, "w") as file:
        for name, arrays in to_keras(network).items():
            cell = name.startswith(("gru", "lstm"))
            group = file.create_group(f"layers/{name}/cell/vars" if cell else f"layers/{name}/vars")
            for k, array in enumerate(arrays):
                group.create_dataset(str(k), data=array)
    return raw.getvalue()
