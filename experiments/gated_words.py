"""Word models with gated blocks beside static baselines, all trained by one loop; a part of dynamic_blocks.py.

A model has one layer or several, with as many inputs as units. Blocks, masks and cost are those of their matrices;
embedding and read-out are dense in all variants. All variants of a seed read the same windows with the same dropout
masks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import eventrnn as er
from eventrnn import Cell, Network, State
from eventrnn.cells import CELLS
from eventrnn.data.text import Corpus
from eventrnn.pruning import BlockDiagonal, Blocks, GradualPruning, Pruning, StaticMasks, with_masks
from eventrnn.training import (
    GateSettings,
    LanguageModelling,
    Model,
    Progress,
    Regularisers,
    Schedule,
    Settings,
    Trainer,
    evaluate,
    read_log,
    run,
)
from eventrnn.weights import GatedBlocks, gate_cost

# Tokens of the validation text whose operations are counted, and whose choices are in the histogram.
COUNTED = 2000

# Counting computes all gates again with emulated FMAs, which takes longer than the run. Of layers with more than LARGE
# units, the operations of fewer tokens are counted.
LARGE, COUNTED_OF_LARGE = 512, 50

# Gradual pruning begins and ends at these shares of the run, and changes the masks so many times.
PRUNE_FROM, PRUNE_UNTIL, CHANGES = 0.1, 0.6, 40

# Annealing ends at this share of the run.
ANNEAL_UNTIL = 0.5


@dataclass(frozen=True)
class Variant:
    """What is done to the matrices of the layers. By default nothing: the dense model.

    Attributes
    ----------
    density  : share of the blocks that an input chooses, 0 for no gates
    block    : units on each side of a block, as a share of the units of the layer
    rank     : of the gate, as a share of the units; 0 for one factor
    rule     : of the gates
    period   : number of steps that share a choice
    balance  : strength of the load balance
    training : straight-through and the density at the start
    gradual  : share of the weights that gradual magnitude pruning removes; with gates, of whole blocks
    parts    : of a block-diagonal
    smaller  : fewer units, so that the two matrices cost what those of the variant "gated" cost
    """

    density: float = 0.0
    block: float = 1 / 4
    rank: float = 0.0
    rule: str = "softmax"
    period: int = 1
    balance: float = 0.0
    training: dict[str, Any] = field(default_factory=dict)
    gradual: float = 0.0
    parts: int = 0
    smaller: bool = False


VARIANTS = {
    "dense": Variant(),
    "gated": Variant(density=0.5),
    "gated-linear": Variant(density=0.5, rule="linear"),
    "gated-rank": Variant(density=0.5, block=1 / 8, rank=1 / 16),
    "gated-quarter": Variant(density=0.25),
    # Four steps share a choice; the gate of "gated" with a quarter of its operations, and a finer one with as many.
    "gated-shared": Variant(density=0.5, period=4),
    "gated-shared-fine": Variant(density=0.5, block=1 / 8, period=4),
    "gated-balanced": Variant(density=0.5, balance=0.01),
    "gated-straight-through": Variant(density=0.5, training={"straight_through": True}),
    "gated-annealed": Variant(density=0.5, training={"start_density": 1.0}),
    # About as many operations as "gated" has with its gate, 0.5625 of the dense ones.
    "gradual-44": Variant(gradual=0.4375),
    "gradual-50": Variant(gradual=0.5),
    "gradual-75": Variant(gradual=0.75),
    "gradual-90": Variant(gradual=0.9),
    "diagonal-2": Variant(parts=2),
    "diagonal-4": Variant(parts=4),
    "diagonal-12": Variant(parts=12),
    "gated-gradual-50": Variant(density=0.5, gradual=0.5),
    "smaller": Variant(smaller=True),
}


@dataclass(frozen=True)
class Job:
    """One model to train.

    variant : name in `VARIANTS`
    cell    : "gru" or "lstm", whose units are all active, or "egru"
    hidden  : units of each layer, and width of the embedding
    block   : side of the blocks of the variant "gated"; those of others are in proportion. 0 for a quarter of the units
    backend : "cpu", or "cuda" for a GPU, where products have factors in bfloat16
    """

    variant: str
    seed: int
    cell: str
    hidden: int
    vocabulary: int
    epochs: int
    batch: int
    window: int
    layers: int = 1
    block: int = 0
    learning_rate: float = 3e-3
    backend: str = "cpu"

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"variant: got {self.variant!r}, need one of {', '.join(VARIANTS)}")
        if self.cell not in CELLS:
            raise ValueError(f"cell: got {self.cell!r}, need one of {', '.join(CELLS)}")

    @property
    def name(self) -> str:
        """A name for the folder of the run."""
        size = f"{self.hidden}-{self.vocabulary}-{self.epochs}"
        further = f"-{self.backend}-{self.layers}x{self.block}" if self.layers > 1 or self.backend != "cpu" else ""
        return f"dynamic-{self.cell}-{size}-{self.variant}-{self.seed}{further}"

    @property
    def matrices(self) -> tuple[str, ...]:
        """The matrices that the variants differ in."""
        return tuple(f"layers.{k}.{role}" for k in range(self.layers) for role in ("w_in", "w_rec"))

    @property
    def counted(self) -> int:
        """Tokens whose operations are counted."""
        return COUNTED if self.hidden <= LARGE else COUNTED_OF_LARGE


def block_of(variant: Variant, job: Job) -> tuple[tuple[int, int], int | None]:
    """The block and the rank of a gate."""
    of_gated = job.block or VARIANTS["gated"].block * job.hidden
    side = max(1, round(variant.block / VARIANTS["gated"].block * of_gated))
    return (side, side), max(1, round(variant.rank * job.hidden)) if variant.rank else None


def units_of(variant: Variant, job: Job) -> int:
    """The units of each layer: fewer in the variant that is smaller."""
    if not variant.smaller:
        return job.hidden
    gated, hidden, layers = VARIANTS["gated"], job.hidden, job.layers
    block, rank = block_of(gated, job)
    share = gate_cost((hidden, Cell(job.cell).gates * hidden), block=block, density=gated.density, rank=rank).cost
    # Inputs and units of the smaller layers, times their units, against 2 * hidden^2 per layer.
    return max(
        n for n in range(1, hidden + 1) if n * (hidden + n + 2 * (layers - 1) * n) <= 2 * layers * share * hidden**2
    )


def initial_network(job: Job, symbols: int) -> Network:
    """The network to start from. Variants of one seed and size start from the same numbers."""
    variant, rng = VARIANTS[job.variant], np.random.default_rng(job.seed)
    cell = Cell(job.cell)
    network = Network.random(
        [units_of(variant, job)] * job.layers,
        symbols=symbols,
        embedding=job.hidden,
        readout=symbols,
        threshold=0.2 if cell.thresholded else 0.0,
        rng=rng,
        cell=cell,
    )
    if not variant.density:
        return network
    block, rank = block_of(variant, job)
    gates = {"block": block, "density": variant.density, "rank": rank, "gate_rule": variant.rule, "rng": rng}
    gates["gate_period"] = variant.period
    matrices = network.matrices()
    with warnings.catch_warnings():
        # The line of the results states the cost.
        warnings.simplefilter("ignore", UserWarning)
        return network.with_matrices({name: GatedBlocks.from_weights(matrices[name], **gates) for name in job.matrices})


def trainer_of(job: Job, corpus: Corpus) -> Trainer:
    """The trainer of a job in its initial state."""
    variant, network = VARIANTS[job.variant], initial_network(job, len(corpus.vocabulary))
    task = LanguageModelling(corpus.train, corpus.valid)
    per_epoch = -(-task.length(job.batch) // job.window)
    steps, annealed = job.epochs * per_epoch, dict(variant.training)
    if "start_density" in annealed:
        annealed["anneal_steps"] = round(ANNEAL_UNTIL * steps)
    settings = Settings(
        epochs=job.epochs,
        batch=job.batch,
        window=job.window,
        learning_rate=job.learning_rate,
        weight_decay=0.0,
        clip=0.5,
        seed=job.seed,
        schedule=Schedule("cosine", constant=0.2, final=0.02, warmup=100),
        regularisers=Regularisers(
            dropout_input=0.2,
            dropout_between=0.3 if job.layers > 1 else 0.0,
            dropout_top=0.3,
            gate_balance=variant.balance,
        ),
        gates=GateSettings(**annealed),
        backend=job.backend,
    )
    model = Model(network, threads=settings.threads)
    return Trainer(network, task, settings, model=model, pruning=pruning_of(variant, job, steps))


def pruning_of(variant: Variant, job: Job, steps: int) -> Pruning | None:
    """The pruning of a variant in a run of so many updates."""
    if variant.parts:
        return StaticMasks(BlockDiagonal(variant.parts), names=job.matrices)
    if not variant.gradual:
        return None
    start, end = round(PRUNE_FROM * steps), max(1, round(PRUNE_UNTIL * steps))
    schedule = {"start": start, "end": end, "every": max(1, (end - start) // CHANGES), "names": job.matrices}
    # A block that is not stored costs nothing where it is chosen; single weights in it would be multiplied.
    block = block_of(variant, job)[0] if variant.density else (1, 1)
    return GradualPruning(variant.gradual, block=block, statistic="mean", **schedule)


def trained(trainer: Trainer, job: Job) -> Network:
    """The network of the best validation, with pruned matrices in a sparse format."""
    network, variant = trainer.network(best=True), VARIANTS[job.variant]
    if variant.density or not (variant.parts or variant.gradual):
        return network
    pattern = BlockDiagonal(variant.parts) if variant.parts else Blocks(variant.gradual)
    return with_masks(network, {name: trainer.model.masks[name] for name in job.matrices}, pattern)


def operations(network: Network, job: Job, symbols: np.ndarray) -> dict[str, float]:
    """Multiplications per token of the matrices, those of their gates and of the read-out, and the activity."""
    symbols = symbols[: job.counted]
    found = er.simulate(network, symbols[:, None], record="events")
    counts = er.count(network, found).matrices
    layer = [counts[name] for name in job.matrices]
    return {
        "dense": sum(each.dense for each in layer) / len(symbols),
        "executed": sum(each.executed for each in layer) / len(symbols),
        "selection": sum(each.selection for each in layer) / len(symbols),
        "readout": counts["readout"].executed / len(symbols),
        "activity": float(np.mean(found.activity)),
    }


def usage(network: Network, job: Job, symbols: np.ndarray) -> dict[str, list[float]]:
    """Share of the tokens that chose each block, by matrix and block number."""
    steps = min(len(symbols), COUNTED) // job.batch
    inputs = np.ascontiguousarray(symbols[: steps * job.batch].reshape(job.batch, steps).T)
    _, _, tape = Model(network).forward(inputs, State.zeros(network, job.batch))
    return {name: [round(float(s), 4) for s in p.chosen.mean(axis=0)] for name, p in tape.products.items()}


def measure(
    job: Job, corpus: Corpus, runs: Path, report: Callable[[Progress, float], None], *, what: str = "quality"
) -> dict[str, Any]:
    """Train, or continue, the model of a job; the line of its results, of the kind `what`."""
    variant, trainer = VARIANTS[job.variant], trainer_of(job, corpus)
    seconds = run(trainer, runs / job.name, resume=True, report=report)
    network = trained(trainer, job)
    # On a GPU, the perplexity is that of the best validation, whose streams are those of the trainer.
    bits = evaluate(network, corpus.valid) if job.backend == "cpu" else trainer.best_value
    line: dict[str, Any] = {
        "what": what,
        **vars(job),
        "units": network.layers[0].units,
        "symbols": len(corpus.vocabulary),
        "tokens": len(corpus.train),
        "perplexity_valid": float(2**bits),
        "parameters": sum(p.size for p in trainer.model.parameters.values()),
        "seconds": seconds,
        **operations(network, job, corpus.valid),
    }
    if variant.density:
        block, rank = block_of(variant, job)
        shape = (job.hidden, Cell(job.cell).gates * job.hidden)
        line |= {"block": list(block), "rank": rank, "density": variant.density, "rule": variant.rule}
        cost = {"block": block, "density": variant.density, "rank": rank, "period": variant.period}
        line |= {"period": variant.period, "gate_cost": gate_cost(shape, **cost).cost}
        line |= {"usage": usage(network, job, corpus.valid)}
    log = read_log(runs / job.name)
    line["curve"] = [[each["step"], each["validation"]["perplexity"]] for each in log if each["validation"]]
    return line
