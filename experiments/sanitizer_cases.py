"""Small networks on the CUDA engines, to be run under NVIDIA's compute-sanitizer.

    compute-sanitizer --report-api-errors no --tool memcheck python experiments/sanitizer_cases.py
    compute-sanitizer --report-api-errors no --tool racecheck python experiments/sanitizer_cases.py
    compute-sanitizer --report-api-errors no --tool memcheck python experiments/sanitizer_cases.py training
    compute-sanitizer --report-api-errors no --tool racecheck python experiments/sanitizer_cases.py training 3

A number behind `training` asks for one of its cases, so that cases can run side by side.

Of inference, each case is a run of a weight format, single steps and a replayed graph. Events are compared with those
of the CPU engine. Of training, each case is some updates, the first of them outside a graph, and a validation; two
trainers must have the same bits. Cases differ in cell, kind of input, precision, noise, penalties, update rule and
pruning method; some have blocks that every input chooses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import typer
from command_line import command

from eventrnn.cells import Cell, Surrogate
from eventrnn.cuda import PRECISIONS, CudaBackend
from eventrnn.network import Network
from eventrnn.pruning import Blocks, DynamicMasks, GradualPruning, Pruning, RegrownMasks
from eventrnn.simulation import Simulator, simulate
from eventrnn.training import (
    Classification,
    GateSettings,
    LanguageModelling,
    Optimiser,
    Regularisers,
    Settings,
    Task,
    Trainer,
)
from eventrnn.weights import GatedBlocks, convert

UNITS, INPUTS, STEPS = [40, 100], 33, 5
STORED = [
    ("csr", {}, "bfloat16"),
    ("block", {"block": (1, 32)}, "bfloat16"),
    ("block", {"block": (1, 32)}, "float32"),
    ("dense", {}, "float32"),
    ("nm", {"nm": (8, 8, "post")}, "int8"),
]


def exact(network: Network, batch: int, rng: np.random.Generator, backend: str) -> bool:
    """Whether a run has the events of the CPU engine. Single steps and a replayed graph follow."""
    x = rng.standard_normal((STEPS, batch, INPUTS)).astype(np.float32)
    ours, theirs = (simulate(network, x, backend=name, record=("events", "states")) for name in (backend, "cpu"))
    stream = Simulator(network, batch=batch, backend=backend)
    for each in x[:3]:
        stream.step(each)
    for _ in range(2):
        stream.run(x)
    pairs = zip(ours.events, theirs.events, strict=True)
    return all(np.array_equal(a.to_dense(), b.to_dense()) for a, b in pairs)


def inexact(network: Network, precision: str, rng: np.random.Generator) -> bool:
    """Whether the layers went through tensor cores, which this function forces."""
    simulator = Simulator(network, batch=9, backend=CudaBackend(exact=False, precision=precision))
    simulator.engine.tensor_layers[9] = tuple(range(len(UNITS)))
    paths = simulator.run(rng.standard_normal((STEPS, 9, INPUTS)).astype(np.float32)).paths
    return paths["layers.0.w_rec"] == f"tensor {precision}"


NOISE = ("dropconnect", "dropout_input", "dropout_between", "dropout_top", "zoneout")

PENALTIES = {"activity_rate": 1.0, "state": 0.5, "activation": 1.0, "temporal_activation": 1.0}

OF_THRESHOLDS = ("activity_rate", "state")

UPDATES = 5

SYMBOLS = 37

Method = Callable[[], Pruning | None]

#: name of a case -> cell of its layers
CELLS = {"evnn": Cell(), "paper": Cell(variant="paper"), "lstm": Cell("lstm"), "gru": Cell("gru", "before")}

# cell, with "gated" where its matrices have gates; kind of input: symbols; precision; update rule; pruning method
# method
TRAININGS: list[tuple[str, bool, str, Optimiser, Method]] = [
    ("evnn", True, "bfloat16", Optimiser(beta1=0.0, decay_biases=True), lambda: None),
    ("evnn", True, "tf32", Optimiser(), lambda: GradualPruning(0.5, block=(1, 8), start=0, end=4, every=2)),
    ("evnn", False, "float32", Optimiser(kind="sgd", momentum=0.9), lambda: None),
    ("paper", True, "bfloat16", Optimiser(kind="nt-asgd", patience=1), lambda: None),
    ("paper", False, "tf32", Optimiser(), lambda: RegrownMasks(0.5, block=(1, 8), start=0, end=4, every=2)),
    ("evnn", True, "bfloat16", Optimiser(), lambda: DynamicMasks(Blocks(0.5, (1, 8)), start=0, end=3, every=1)),
    ("lstm", True, "bfloat16", Optimiser(), lambda: None),
    ("gru", False, "tf32", Optimiser(), lambda: None),
    ("lstm gated", True, "bfloat16", Optimiser(), lambda: GradualPruning(0.5, block=(7, 16), end=4, every=2)),
    ("evnn gated", False, "float32", Optimiser(), lambda: None),
    ("gru gated", True, "tf32", Optimiser(), lambda: None),
]


def gated(network: Network) -> Network:
    """The network with gates of rank 3 in front of the blocks of its matrices, where the cell takes them."""
    rng, layers = np.random.default_rng(4), network.layers
    gates = {"block": (7, 16), "density": 0.5, "rank": 3, "rng": rng, "gate_rule": "softmax"}
    with warnings.catch_warnings():
        # Matrices this small cost more with a gate.
        warnings.simplefilter("ignore", UserWarning)
        return network.with_matrices(
            {
                name: GatedBlocks.from_weights(weights, **gates)
                for name, weights in network.matrices().items()
                if name.role != "w_rec" or not layers[name.layer].cell.reset_first
            }
        )


def trained(kind: str, symbols: bool, precision: str, optimiser: Optimiser, method: Method) -> Trainer:
    """A trainer after some updates and validations."""
    rng = np.random.default_rng(3)
    name, _, gates = kind.partition(" ")
    cell = CELLS[name]
    if cell.thresholded:
        cell = replace(cell, surrogate=Surrogate("triangle" if symbols else "gaussian"))
    shape = {"symbols": SYMBOLS, "embedding": 29} if symbols else {"inputs": INPUTS}
    network = Network.random(UNITS, readout=SYMBOLS, rng=rng, threshold=0.1 * cell.thresholded, cell=cell, **shape)
    network = gated(network) if gates else network
    rates = dict.fromkeys(NOISE, 0.3) | ({"dropout_words": 0.2} if symbols else {})
    rates |= {name: strength for name, strength in PENALTIES.items() if cell.thresholded or name not in OF_THRESHOLDS}
    rates |= {"gate_balance": 0.1} if gates else {}
    task: Task = LanguageModelling(rng.integers(0, SYMBOLS, 900), rng.integers(0, SYMBOLS, 90), valid_batch=3)
    if not symbols:
        x = rng.standard_normal((23, 6, INPUTS)).astype(np.float32)
        labels = rng.integers(0, SYMBOLS, 23)
        task = Classification(x, labels, (x[:5], labels[:5]))
    settings = Settings(
        steps=UPDATES,
        batch=7,
        window=6,
        window_jitter=1.0 if symbols else 0.0,
        activity_cost=0.1 * cell.thresholded,
        clip_layers=0.1,
        backend="cuda",
        precision=precision,
        optimiser=optimiser,
        regularisers=Regularisers(**rates, mask_sharing="batch" if name == "evnn" else "time"),
        gates=GateSettings(True, 1.0, 3) if gates else GateSettings(),
    )
    trainer = Trainer(network, task, settings, pruning=method())
    for _ in range(UPDATES):
        trainer.step()
        trainer.validate()
    return trainer


def training(case: tuple[str, bool, str, Optimiser, Method]) -> bool:
    """Whether two trainers have the same bits, none of them NaN."""
    one, other = (trained(*case).arrays() for _ in range(2))
    same = one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    return same and all(np.isfinite(array).all() for array in one.values())


def inference(backend: str) -> list[bool]:
    """Whether each case of inference passes."""
    good, rng = [], np.random.default_rng(1)
    for variant in ("evnn", "paper"):
        network = Network.random(UNITS, inputs=INPUTS, readout=40, rng=rng, threshold=0.1, cell=Cell(variant=variant))
        for name, options, storage in STORED:
            kept = 1 if name == "dense" else 0.2
            thinned = {
                k: convert(2 * w.to_dense() * (rng.random(w.shape) < kept), name, storage=storage, **options)
                for k, w in network.matrices().items()
            }
            good += [exact(network.with_matrices(thinned), batch, rng, backend) for batch in (1, 7)]
        if variant == "evnn" and backend == "cuda":
            good += [inexact(network, precision, rng) for precision in PRECISIONS]
    return good


def failures(backend: str = "cuda", only: str | None = None, number: int | None = None) -> int:
    """Run the cases, or those of `only`, "inference" or "training". Returns how many of them failed."""
    good = [] if only == "training" else inference(backend)
    if backend == "cuda" and only != "inference":
        for k, case in enumerate(TRAININGS):
            if number not in (None, k):
                continue
            good.append(training(case))
            print(f"training case {k}: {'passed' if good[-1] else 'failed'}", flush=True)
    print(f"{sum(good)} of {len(good)} cases passed")
    return len(good) - sum(good)


def main(
    only: Annotated[
        Literal["inference", "training"] | None, typer.Argument(help="Cases to run; all of them without it.")
    ] = None,
    number: Annotated[
        int | None, typer.Argument(min=0, max=len(TRAININGS) - 1, help="Case of training to run; all without it.")
    ] = None,
    backend: Annotated[Literal["cuda", "cpu"], typer.Option(help="Where the cases of inference run.")] = "cuda",
) -> None:
    if number is not None and only != "training":
        raise typer.BadParameter("cases of training alone have numbers", param_hint="number")
    raise typer.Exit(min(failures(backend, only, number), 1))


if __name__ == "__main__":
    command(main, __doc__).run()
