"""Reading a text event by event: how well a model predicts it, at what cost, and what narrow weights change in that.

Stands above `observe` and `training`, which do not know each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from eventrnn import counting
from eventrnn.network import Network
from eventrnn.simulation import Simulator
from eventrnn.training.losses import cross_entropy_bits
from eventrnn.training.tasks import check_symbols
from eventrnn.weights import STORAGES

# Steps between two reports; bounds the memory.
CHUNK = 2048


def read(
    network: Network,
    symbols: np.ndarray,
    *,
    backend: str = "cpu",
    threads: int = 1,
    report: Callable[[str, int, int], None] = lambda stage, done, total: None,
    stage: str = "reading",
) -> dict[str, Any]:
    """Predict every symbol of a text from those before it.

    Parameters
    ----------
    network : with an embedding and a read-out over the same symbols
    symbols : (steps,) integers, at least two
    report  : called with the `stage`, the steps done and all steps

    Returns bits per symbol, perplexity, activity (share of units that fire in a step), effective and executed
    operations a step, dense / effective, and the backend. Raises ValueError for symbols that the network cannot read.
    Cost: one run; memory for `CHUNK` steps of output.
    """
    check_symbols(network, symbols)
    simulator = Simulator(network, backend=backend, threads=threads)
    bits, counts, fired = 0.0, None, 0
    for start in range(0, len(symbols) - 1, CHUNK):
        stop = min(start + CHUNK, len(symbols) - 1)
        piece = simulator.run(symbols[start:stop, None])
        bits += cross_entropy_bits(piece.output[:, 0], symbols[start + 1 : stop + 1])
        cost = counting.count(network, piece)
        counts = cost if counts is None else counts + cost
        fired += sum(int(f.total.sum()) for f in piece.fired)
        report(stage, stop, len(symbols) - 1)
    assert counts is not None
    bits /= len(symbols) - 1
    return {
        "symbols": len(symbols),
        "bits_per_symbol": bits,
        "perplexity": float(np.exp2(min(bits, 1000.0))),
        "activity": fired / (counts.steps * sum(layer.units for layer in network.layers)),
        "effective_ops_per_step": counts.total.effective / counts.steps,
        "executed_ops_per_step": counts.total.executed / counts.steps,
        "reduction": counts.reduction,
        "backend": backend,
        "exact": simulator.backend.exact,
    }


def read_narrowed(
    network: Network,
    symbols: np.ndarray,
    storage: str,
    *,
    backend: str = "cpu",
    threads: int = 1,
    report: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """`read` with the weights stored narrow, and beside it the bits per symbol and bytes of the float32 weights.

    storage : "bfloat16" or "int8"

    Adds `bits_per_symbol_float32`, `bits_per_symbol_added` (the difference), `weight_bytes` and
    `weight_bytes_float32`: of all matrices, indices and scales included, the embedding not. Raises ValueError where the
    network is narrow already. Cost: two runs.
    """
    narrow = narrowed(network, storage)
    figures, wide = (
        read(net, symbols, backend=backend, threads=threads, report=report, stage=f"reading with {name}")
        for net, name in ((narrow, storage), (network, "float32"))
    )
    return figures | {
        "storage": storage,
        "bits_per_symbol_float32": wide["bits_per_symbol"],
        "bits_per_symbol_added": figures["bits_per_symbol"] - wide["bits_per_symbol"],
        "weight_bytes": sum(weights.nbytes for weights in narrow.matrices().values()),
        "weight_bytes_float32": sum(weights.nbytes for weights in network.matrices().values()),
    }


def narrowed(network: Network, storage: str) -> Network:
    """The network with every matrix stored narrow, but for a tied read-out, which stays the float32 embedding.

    Raises ValueError for a storage that is not narrow and for a network that is narrow already: what it lost, float32
    cannot show.
    """
    narrow = STORAGES[1:]
    if storage not in narrow:
        raise ValueError(f"storage: got {storage!r}, need one of {', '.join(narrow)}")
    already = sorted({weights.storage for weights in network.matrices().values()} - {"float32"})
    if already:
        raise ValueError(f"storage: the weights are stored as {', '.join(already)} already; read them as they are")
    tied = network.readout is not None and network.readout.tied
    return network.with_matrices(
        {name: w.stored_as(storage) for name, w in network.matrices().items() if not (tied and name == "readout")}
    )


def evaluate(
    network: Network,
    symbols: np.ndarray,
    *,
    backend: str = "cpu",
    threads: int = 1,
    chunk: int = 4096,
    report: Callable[[int], None] = lambda done: None,
) -> float:
    """Bits per symbol of a text read as one stream, event by event: mean of -log2 p(next symbol).

    symbols : (n,) integers, n >= 2; the first is given, the others are predicted
    report  : called with the number of symbols done after every chunk
    """
    symbols = np.asarray(symbols)
    check_symbols(network, symbols)
    simulator = Simulator(network, backend=backend, threads=threads)
    total = 0.0
    for start in range(0, len(symbols) - 1, chunk):
        stop = min(start + chunk, len(symbols) - 1)
        output = simulator.run(symbols[start:stop, None]).output
        targets = symbols[start + 1 : stop + 1].astype(np.int64)
        total += cross_entropy_bits(output[:, 0], targets)
        report(stop)
    return total / (len(symbols) - 1)
