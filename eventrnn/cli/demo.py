"""`eventrnn demo`: train, prune, simulate event by event, compare with the dense network, count and time.

The demo calls the public library in the order in which a user would. With a trained model it trains nothing: the model
writes a text, and the same comparisons are made on it.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from eventrnn import canvas, counting, io, plots
from eventrnn._files import write_whole
from eventrnn.bench import device, interleaved, versions
from eventrnn.cells import Cell, Surrogate
from eventrnn.data.text import Corpus, python_documentation
from eventrnn.data.trigram import TrigramModel
from eventrnn.data.vocabulary import END_OF_LINE, UNKNOWN_WORD, Vocabulary
from eventrnn.events import Events
from eventrnn.network import Network
from eventrnn.pruning import GradualPruning, compress
from eventrnn.simulation import Simulation, Simulator, simulate
from eventrnn.training import Model, Progress, Schedule, Settings, Trainer, evaluate
from eventrnn.training.tasks import check_symbols
from eventrnn.weights import CSR, BlockCSR

FILES = ("model.safetensors", "counts.json", "result.json", "raster.png", "operations.png")

# The reference backend is slow, so it checks only the first steps, and of a large network fewer: as many as a dense
# engine does with so many multiplications. The dense engine, too, is timed over part of the steps only.
REFERENCE_STEPS, REFERENCE_PRODUCTS = 48, 300_000_000

TIMED_STEPS, TIMED_PRODUCTS = 4000, 2_000_000_000

# Symbols that a trained model writes.
WRITTEN = 200

# Shares of the second training: the last blocks are pruned after the first, the learning rate falls after the second.
# Pruning then costs 0.096 bits. With shares of 0.5 and 0.3 it costs 0.15, because the remaining weights need updates at
# the full rate.
PRUNED_AFTER, FALLS_AFTER = 0.35, 0.45

Report = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo; the defaults take two to three minutes on two cores."""

    hidden: int = 256
    embedding: int = 64
    steps: int = 700
    pruning_steps: int = 2000
    sparsity: float = 0.8
    block: tuple[int, int] = (1, 8)
    threshold: float = 0.4
    activity_cost: float = 1.0
    seed: int = 0


def run(
    folder: Path,
    settings: DemoSettings,
    report: Report = lambda stage, done, total, note: None,
    *,
    overwrite: bool = False,
) -> dict:
    """Run the demo, write its files into `folder`, and return the figures of `eventrnn demo --json`.

    `report(stage, done, total, note)` is called as the work proceeds. Raises RuntimeError where the counts disagree
    with their audit, and FileExistsError for a file that appeared meanwhile, unless `overwrite` is set.
    """
    started = time.perf_counter()
    common = Settings(batch=32, window=64, learning_rate=6e-3, activity_cost=settings.activity_cost, seed=settings.seed)
    training = replace(common, steps=settings.steps)
    tuning = replace(
        common, steps=settings.pruning_steps, seed=settings.seed + 1, schedule=Schedule(constant=FALLS_AFTER)
    )
    last_pruning = int(PRUNED_AFTER * settings.pruning_steps)
    pruning = GradualPruning(
        settings.sparsity, settings.block, 0, last_pruning, every=10, scope="global", statistic="l2"
    )
    corpus = python_documentation()
    network = _untrained(corpus, settings)
    pruning.check(Model(network).parameters)
    report("reading the corpus", 0, 1, "")
    baseline = TrigramModel(corpus.train, corpus.valid, len(corpus.vocabulary)).bits_per_symbol(corpus.test)

    trainer = Trainer(network, corpus.train, training)
    dense_trained = trainer.run(_reporting(report, "training", settings.steps))
    before = evaluate(dense_trained, corpus.test)

    trainer = Trainer(dense_trained, corpus.train, tuning, pruning=pruning)
    tuned = trainer.run(_reporting(report, "pruning", settings.pruning_steps))
    pruned = tuned.with_matrices({n: compress(w.to_dense(), settings.block) for n, w in tuned.matrices().items()})
    after = evaluate(pruned, corpus.test)

    measured, counts, simulation = _measured(pruned, corpus.test, report)
    result = {
        "bits_per_char": after,
        "bits_per_char_before_pruning": before,
        "bits_per_char_trigrams": baseline,
        "sparsity": _block_sparsity(pruned, settings.block),
        "block": f"{settings.block[0]}x{settings.block[1]}",
    } | measured
    _write(folder, pruned, counts, simulation.events[0], result, overwrite)
    return result | {"seconds": time.perf_counter() - started, "device": device(), "versions": versions()}


def title(network: Network) -> str:
    """What the figures of a trained model show. Only units with a threshold are silent; not every model is pruned."""
    words = ["activity-sparse"] if all(layer.cell.thresholded for layer in network.layers) else []
    if any(weights.nnz < weights.shape[0] * weights.shape[1] for weights in network.matrices().values()):
        words.append("pruned")
    return ", ".join([*words, "event by event"]).capitalize()


def run_trained(
    network: Network,
    folder: Path,
    *,
    symbols: int = WRITTEN,
    seed: int = 0,
    report: Report = lambda stage, done, total, note: None,
    overwrite: bool = False,
) -> dict:
    """Let a trained model write a text, and compare, count and time its run over this text as `run` does.

    symbols : length of the text
    seed    : seed of the draws

    Returns the figures, and the text as `text`. Raises ValueError for a model that does not write text, and otherwise
    as `run` does.
    """
    started = time.perf_counter()
    vocabulary, drawn = _written(network, symbols, seed, report)
    measured, counts, simulation = _measured(network, drawn, report)
    text = vocabulary.decode(drawn)
    _write(folder, None, counts, simulation.events[0], measured | {"text": text}, overwrite)
    seconds = {"seconds": time.perf_counter() - started, "device": device(), "versions": versions()}
    return measured | seconds | {"text": text}


def _written(network: Network, symbols: int, seed: int, report: Report) -> tuple[Vocabulary, np.ndarray]:
    """The vocabulary of a model and a text that it writes: symbols drawn from its own predictions, one after another.

    The symbol for all others is never drawn. Raises ValueError for a model without vocabulary, embedding or read-out.
    """
    if "vocabulary" not in network.metadata or network.symbols is None or network.readout is None:
        raise ValueError("model: needs a vocabulary, an embedding and a read-out to write a text")
    vocabulary = Vocabulary.from_json(network.metadata["vocabulary"])
    check_symbols(network, np.array([0, len(vocabulary) - 1]))
    rng, simulator = np.random.default_rng(seed), Simulator(network)
    numbers = {symbol: number for number, symbol in enumerate(vocabulary.symbols)}
    never = {numbers[symbol] for symbol in (vocabulary.unknown, UNKNOWN_WORD) if symbol in numbers}
    drawn = [numbers.get(END_OF_LINE, int(rng.integers(len(vocabulary))))]
    while len(drawn) < symbols:
        scores = simulator.step(np.array(drawn[-1:]))[0].astype(np.float64)
        scores[list(never)] = -np.inf
        shares = np.cumsum(np.exp(scores - scores.max()))
        drawn.append(int(np.searchsorted(shares, rng.random() * shares[-1], side="right")))
        report("writing", len(drawn), symbols, "")
    return vocabulary, np.array(drawn)


def _measured(network: Network, symbols: np.ndarray, report: Report) -> tuple[dict, counting.OpCounts, Simulation]:
    """Figures of a run over a text beside that of the dense network, its counts, and its record.

    Raises RuntimeError where the counts disagree with their audit.
    """
    report("comparing with the dense network", 0, 1, "")
    stream = symbols[:, None]
    simulation = simulate(network, stream, record=("events", "states"))
    of_dense = simulate(network.dense(), stream, record=("events", "states"))
    dense = sum(w.shape[0] * w.shape[1] for w in network.matrices().values())
    head = stream[: max(1, min(REFERENCE_STEPS, REFERENCE_PRODUCTS // dense))]
    by_reference = simulate(network, head, backend="reference", record=("events", "states"))
    identical = _identical(simulation, of_dense) and _identical(
        simulate(network, head, record=("events", "states")), by_reference
    )
    counts = counting.count(network, simulation)
    audit = counting.audit(network, simulation, counts)
    if not audit.agrees:
        raise RuntimeError(f"the counts do not agree with their audit:\n{audit}")
    report("timing", 0, 1, "")
    engines = {name: Simulator(network, backend=name) for name in ("cpu", "blas")}
    steps = {"cpu": TIMED_STEPS, "blas": max(1, min(TIMED_STEPS, TIMED_PRODUCTS // dense))}
    parts = {name: stream[:most] for name, most in steps.items()}
    seconds = interleaved({name: lambda s=s, part=parts[name]: s.run(part) for name, s in engines.items()}, 7)
    times = {name: 1e6 * float(np.median(each)) / len(parts[name]) for name, each in seconds.items()}
    rows, total = counts.sample_steps, counts.total
    figures = {
        "activity": float(np.mean(simulation.activity)),
        "dense_ops_per_step": total.dense // rows,
        "effective_ops_per_step": total.effective / rows,
        "executed_ops_per_step": total.executed / rows,
        "reduction": counts.reduction,
        "events_compared": simulation.steps * sum(layer.units for layer in network.layers),
        "events_identical": identical,
        "us_per_step": times["cpu"],
        "dense_us_per_step": times["blas"],
    }
    return figures, counts, simulation


def _untrained(corpus: Corpus, settings: DemoSettings) -> Network:
    rng = np.random.default_rng(settings.seed)
    symbols = len(corpus.vocabulary)
    network = Network.random(
        [settings.hidden],
        rng=rng,
        symbols=symbols,
        embedding=settings.embedding,
        readout=symbols,
        threshold=settings.threshold,
        cell=Cell(surrogate=Surrogate("triangle", 0.7, 1.0)),
        metadata={
            "vocabulary": corpus.vocabulary.to_json(),
            "corpus": f"documentation of Python {platform.python_version()}",
        },
    )
    # The default range of 0.1 is for wide embeddings of words; characters learn faster from a wider range.
    return replace(network, embedding=rng.uniform(-1, 1, (symbols, settings.embedding)).astype(np.float32))


def _reporting(report: Report, stage: str, total: int) -> Callable[[Progress], None]:
    def each(progress: Progress) -> None:
        note = f"{progress.bits:.3f} bits/char, activity {progress.activity:.1%}, sparsity {progress.sparsity:.0%}"
        report(stage, progress.step, total, note)

    return each


def _identical(a, b) -> bool:
    """Whether two runs have the same bits in all events and cells. The read-out is a function of the events."""
    events = all(
        np.array_equal(x.indptr, y.indptr)
        and np.array_equal(x.indices, y.indices)
        and np.array_equal(x.values, y.values)
        for x, y in zip(a.events, b.events, strict=True)
    )
    return events and all(np.array_equal(x, y) for x, y in zip(a.states, b.states, strict=True))


def _block_sparsity(network: Network, block: tuple[int, int]) -> float:
    """Share of blocks that are not stored."""
    stored = sum(len(w.indices) for w in network.matrices().values() if isinstance(w, CSR | BlockCSR))
    grids = [-(-w.shape[0] // block[0]) * -(-w.shape[1] // block[1]) for w in network.matrices().values()]
    return 1 - stored / sum(grids)


def _write(
    folder: Path, network: Network | None, counts: counting.OpCounts, events: Events, result: dict, overwrite: bool
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if network is not None:
        io.save(network, folder / "model.safetensors", overwrite=overwrite)
    for name, record in (("counts.json", counts.as_dict()), ("result.json", result)):
        write_whole(folder / name, (json.dumps(record, indent=2) + "\n").encode(), overwrite=overwrite)
    if find_spec("matplotlib"):
        canvas.saved(plots.raster(events), folder / "raster.png", overwrite=overwrite)
        operations = {name: result[f"{name}_ops_per_step"] for name in ("dense", "effective", "executed")}
        times = {"dense (BLAS)": result["dense_us_per_step"], "event-driven": result["us_per_step"]}
        canvas.saved(plots.bars(operations, times), folder / "operations.png", overwrite=overwrite)
