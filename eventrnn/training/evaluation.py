"""Evaluation of language models: bits per symbol, activity and operations of a text that the event engine reads.

The text is read as one stream from the zero state, and every symbol but the first is predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from eventrnn import counting
from eventrnn._checks import need_choice, need_whole
from eventrnn.counting.gated import records_of
from eventrnn.network import Network
from eventrnn.simulation import Simulation, Simulator
from eventrnn.training.losses import cross_entropy_bits
from eventrnn.training.tasks import check_symbols
from eventrnn.weights import STORAGES

# Steps per simulator call of `evaluate_text`. The outputs of one call are held in memory, and progress is reported
# once per call.
CHUNK = 2048


def evaluate(
    network: Network,
    symbols: np.ndarray,
    *,
    backend: str = "cpu",
    threads: int = 1,
    chunk: int = 4096,
    report: Callable[[int], None] = lambda done: None,
) -> float:
    """Bits per symbol of a text: the mean of -log2 p(next symbol).

    Parameters
    ----------
    network : a network with an embedding and a read-out over the same symbols
    symbols : (n,) integers, n >= 2; the first symbol is given, the others are predicted
    chunk   : steps per simulator call; the outputs of so many steps are in memory. The events do not depend on it
    report  : called after every chunk with the number of symbols predicted so far

    Raises ValueError for symbols that the network cannot read. Cost: one run.
    """
    symbols = check_symbols(network, symbols)
    need_whole("chunk", chunk, at_least=1)
    total = 0.0
    for done, bits, _ in _chunks(Simulator(network, backend=backend, threads=threads), symbols, chunk):
        total += bits
        report(done)
    return total / (len(symbols) - 1)


def evaluate_text(
    network: Network,
    symbols: np.ndarray,
    *,
    backend: str = "cpu",
    threads: int = 1,
    report: Callable[[str, int, int], None] = lambda stage, done, total: None,
    stage: str = "reading",
) -> dict[str, Any]:
    """Quality and cost of reading a text.

    Parameters
    ----------
    network : a network with an embedding and a read-out over the same symbols
    symbols : (n,) integers, n >= 2; the first symbol is given, the others are predicted
    report  : called after every chunk with `stage`, the steps done and the steps in all

    Returns bits per symbol, perplexity, activity (share of units that send an event, per step) over all layers and by
    layer, the operations per step of a dense engine, effective and executed ones, effective and executed ones by
    matrix, the reduction (dense / effective), and the backend; with gated blocks also the operations per step that
    choose and scale them, which executed ones do not include. Raises ValueError for symbols that the network cannot
    read. Cost: one run, and memory for the outputs of `CHUNK` steps.
    """
    symbols = check_symbols(network, symbols)
    simulator = Simulator(network, backend=backend, threads=threads)
    bits, counts, fired, steps = 0.0, None, [0] * len(network.layers), len(symbols) - 1
    for done, chunk_bits, simulation in _chunks(simulator, symbols, CHUNK, records_of(network)):
        bits += chunk_bits
        chunk_counts = counting.count(network, simulation)
        counts = chunk_counts if counts is None else counts + chunk_counts
        fired = [so_far + int(layer.total.sum()) for so_far, layer in zip(fired, simulation.fired, strict=True)]
        report(stage, done, steps)
    assert counts is not None
    bits /= steps
    selection = {"selection_ops_per_step": counts.total.selection / counts.steps} if records_of(network) else {}
    return {
        "symbols": len(symbols),
        "bits_per_symbol": bits,
        "perplexity": float(np.exp2(min(bits, 1000.0))),
        "activity": sum(fired) / (counts.steps * sum(layer.units for layer in network.layers)),
        "activity_by_layer": {
            f"layers.{k}": fired[k] / (counts.steps * layer.units) for k, layer in enumerate(network.layers)
        },
        "dense_ops_per_step": counts.total.dense // counts.steps,
        "effective_ops_per_step": counts.total.effective / counts.steps,
        "executed_ops_per_step": counts.total.executed / counts.steps,
        **selection,
        "effective_ops_by_matrix": {name: each.effective / counts.steps for name, each in counts.matrices.items()},
        "executed_ops_by_matrix": {name: each.executed / counts.steps for name, each in counts.matrices.items()},
        "reduction": counts.reduction,
        "backend": backend,
        "exact": simulator.backend.exact,
    }


def _chunks(
    simulator: Simulator, symbols: np.ndarray, chunk: int, record: tuple[str, ...] = ()
) -> Iterator[tuple[int, float, Simulation]]:
    """Run the simulator over a text; per chunk: the steps done so far, the bits of its symbols, and the simulation."""
    steps = len(symbols) - 1
    for start in range(0, steps, chunk):
        stop = min(start + chunk, steps)
        simulation = simulator.run(symbols[start:stop, None], record=record)
        yield stop, cross_entropy_bits(simulation.output[:, 0], symbols[start + 1 : stop + 1]), simulation


def compare_storage(
    network: Network,
    symbols: np.ndarray,
    storage: str,
    *,
    backend: str = "cpu",
    threads: int = 1,
    report: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """`evaluate_text` with weights in a narrow storage, compared with the float32 weights.

    storage : "bfloat16" or "int8"

    Returns the figures of the narrow weights and, in addition, `bits_per_symbol_float32`, `bits_per_symbol_added` (the
    difference), `weight_bytes` and `weight_bytes_float32`. The bytes are those of all matrices, with indices and
    scales; the embedding is not included. Raises ValueError for weights that are in a narrow storage already. Cost: two
    runs.
    """
    narrow = with_storage(network, storage)
    figures, wide = (
        evaluate_text(net, symbols, backend=backend, threads=threads, report=report, stage=f"reading with {name}")
        for net, name in ((narrow, storage), (network, "float32"))
    )
    return figures | {
        "storage": storage,
        "bits_per_symbol_float32": wide["bits_per_symbol"],
        "bits_per_symbol_added": figures["bits_per_symbol"] - wide["bits_per_symbol"],
        "weight_bytes": sum(weights.nbytes for weights in narrow.matrices().values()),
        "weight_bytes_float32": sum(weights.nbytes for weights in network.matrices().values()),
    }


def with_storage(network: Network, storage: str) -> Network:
    """The network with every matrix in a narrow storage. A tied read-out stays the float32 embedding.

    storage : "bfloat16" or "int8"

    Raises ValueError for another storage, and for a network whose weights are narrow already: a comparison with
    float32 could not show what they lost.
    """
    need_choice("storage", storage, STORAGES[1:])
    already = sorted({weights.storage for weights in network.matrices().values()} - {"float32"})
    if already:
        raise ValueError(f"storage: the weights are stored as {', '.join(already)} already; read them as they are")
    tied = network.readout is not None and network.readout.tied
    return network.with_matrices(
        {name: w.stored_as(storage) for name, w in network.matrices().items() if not (tied and name == "readout")}
    )
