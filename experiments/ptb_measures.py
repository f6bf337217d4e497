"""What `ptb.py` states about a word model: sizes, and perplexity, activity and operations of a text."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import eventrnn as er
from eventrnn.pruning import prune as prune_at_once
from eventrnn.training.evaluation import evaluate_text

# Products per token of AWD-LSTM with its decoder: layers of 400-1150-1150-400, 10,000 words (Merity et al. 2017).
AWD_LSTM = 4 * (1150 * (400 + 1150) + 1150 * (1150 + 1150) + 400 * (1150 + 400)) + 400 * 10_000
AWD_LSTM_FOLDED = AWD_LSTM - 4 * 1150 * 400 + 4 * 1150


def sizes(network: er.Network) -> dict[str, Any]:
    """Numbers of weights and parameters, and bytes.

    A weight that is pruned is no parameter, of an embedding either. The values of a tied embedding are counted once.
    """
    matrices = network.matrices()
    tied = network.readout is not None and network.readout.tied
    own = sum(w.nnz for w in matrices.values())
    vectors = [v for layer in network.layers for v in (layer.bias_in, layer.bias_rec, layer.threshold)]
    vectors += [network.readout.bias] if network.readout is not None else []
    embedding = 0 if tied or network.embedding is None else int(np.count_nonzero(network.embedding))
    blocks = sorted({f"{w.block[0]}x{w.block[1]}" for w in matrices.values() if isinstance(w, er.BlockCSR)})
    dense = all(isinstance(w, er.Dense) for w in matrices.values())
    return {
        "model": "egru",
        "units": [layer.units for layer in network.layers],
        "tied": tied,
        "pruned": "" if dense else ", ".join(blocks) or "1x1",
        "storage": ", ".join(sorted({w.storage for w in matrices.values()})),
        "weights": sum(w.nnz for w in matrices.values()),
        "density": sum(w.nnz for w in matrices.values()) / dense_products(network),
        "density_by_matrix": {name: w.nnz / (w.shape[0] * w.shape[1]) for name, w in matrices.items()},
        "parameters": own + embedding + sum(v.size for v in vectors),
        "weight_bytes": sum(w.nbytes for w in matrices.values()),
        "file_bytes": file_size(network),
    }


def dense_products(network: er.Network) -> int:
    """Multiplications of a dense engine per token."""
    return sum(w.shape[0] * w.shape[1] for w in network.matrices().values())


def quality(network: er.Network, symbols: np.ndarray, **options: Any) -> dict[str, Any]:
    """Perplexity, activity, and operations per token with and without the decoder, of one stream."""
    found = evaluate_text(network, symbols, **options)
    decoder = {kind: found[f"{kind}_ops_by_matrix"].get("readout", 0.0) for kind in ("effective", "executed")}
    return {
        "tokens": found["symbols"],
        "perplexity": found["perplexity"],
        "activity": found["activity"],
        "activity_by_layer": list(found["activity_by_layer"].values()),
        "dense": found["dense_ops_per_step"],
        "effective": found["effective_ops_per_step"],
        "effective_without_decoder": found["effective_ops_per_step"] - decoder["effective"],
        "executed": found["executed_ops_per_step"],
        "executed_without_decoder": found["executed_ops_per_step"] - decoder["executed"],
        "effective_by_matrix": found["effective_ops_by_matrix"],
        "fewer_than_awd_lstm": AWD_LSTM / found["effective_ops_per_step"],
        "fewer_than_awd_lstm_folded": AWD_LSTM_FOLDED / found["effective_ops_per_step"],
        "backend": found["backend"],
        "exact": found["exact"],
    }


def grid_point(network: er.Network, symbols: np.ndarray, added: float, kept: float, threads: int) -> dict[str, Any]:
    """Operations of a network with raised thresholds and pruned weights, beside the products of its shares.

    `activity` and `density` are means over the multiplications of a dense engine. `by_matrix` is the sum over the
    matrices of dense x activity x density of each; it differs from `effective` where busy units have more weights than
    others, and from `product` where busy matrices do.
    """
    layers = tuple(replace(x, threshold=(x.threshold + np.float32(added)).astype(np.float32)) for x in network.layers)
    pruned = replace(network, layers=layers)
    if kept < 1:
        pruned = prune_at_once(pruned, 1 - kept, scope="global")
    found = evaluate_text(pruned, symbols, threads=threads)
    assert pruned.embedding is not None
    # A pruned embedding sends values that are not zero only.
    sent = np.count_nonzero(pruned.embedding[symbols]) / pruned.embedding[symbols].size
    shares = [sent, *found["activity_by_layer"].values()]
    sources = {f"layers.{k}.{kind}": k + (kind == "w_rec") for k in range(len(layers)) for kind in ("w_in", "w_rec")}
    dense, products = dense_products(pruned), []
    for matrix, w in pruned.matrices().items():
        size = w.shape[0] * w.shape[1]
        products.append((size, size * shares[sources.get(matrix, len(layers))], w.nnz))
    activity, density = (sum(each[k] for each in products) / dense for k in (1, 2))
    effective = found["effective_ops_per_step"]
    by_matrix = sum(active * nnz / size for size, active, nnz in products)
    return {
        "perplexity": found["perplexity"],
        "inputs_sent": sent,
        "activity_by_layer": shares[1:],
        "activity": activity,
        "density": density,
        "dense": dense,
        "effective": effective,
        "product": dense * activity * density,
        "ratio": effective / (dense * activity * density),
        "by_matrix": by_matrix,
        "ratio_by_matrix": effective / by_matrix,
    }


def file_size(network: er.Network) -> int:
    """Bytes of the model file without the vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        er.save(replace(network, metadata={}), path)
        return path.stat().st_size
