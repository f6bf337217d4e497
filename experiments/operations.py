"""Pruning to a budget of measured operations: criteria compared at equal operations, one line per point.

    python experiments/operations.py --work FOLDER     # trains the demo's model once, some minutes; then 25 points
    python experiments/operations.py --table           # shows the lines that exist

The model reads Python's documentation. Each criterion prunes it to a share of its effective operations, measured on
the validation text, and the result is fine-tuned with that mask. Bits per character and operations per step are those
of the test text, before and after fine-tuning. A point that has a line with these settings and device is skipped.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from command_line import command
from records import Records
from rich.console import Console
from rich.table import Table

import eventrnn as er
from eventrnn.cli.terminal import progress
from eventrnn.data.text import python_documentation
from eventrnn.pruning import CRITERIA, prune_to_operations
from eventrnn.training import Settings, Trainer
from eventrnn.training.evaluation import evaluate_text

RESULTS = Path(__file__).parent / "results" / "operations.jsonl"
BUDGETS = (0.5, 0.3, 0.2, 0.1, 0.05)
HIDDEN, EMBEDDING, ACTIVITY_COST, RATE = 256, 64, 1.0, 6e-3
# Parallel streams of the validation text on which activity is measured.
STREAMS = 8
KEY = ("criterion", "budget", "steps", "tuning", "seed")


def trained(path: Path, steps: int, seed: int, report) -> er.Network:
    """The demo's dense model. Its file is reused."""
    if path.exists():
        return er.load(path)
    corpus, rng = python_documentation(), np.random.default_rng(seed)
    symbols = len(corpus.vocabulary)
    network = er.Network.random(
        [HIDDEN],
        rng=rng,
        symbols=symbols,
        embedding=EMBEDDING,
        readout=symbols,
        threshold=0.4,
        cell=er.Cell(surrogate=er.Surrogate("triangle", 0.7, 1.0)),
    )
    network = replace(network, embedding=rng.uniform(-1, 1, (symbols, EMBEDDING)).astype(np.float32))
    settings = Settings(steps=steps, learning_rate=RATE, activity_cost=ACTIVITY_COST, seed=seed)
    network = Trainer(network, corpus.train, settings).run(
        lambda p: report("training", p.step, steps, f"{p.bits:.3f} bits")
    )
    er.save(network, path)
    return network


def figures(network: er.Network, symbols: np.ndarray) -> dict:
    """Bits per character, operations per step and activity on a text."""
    found = evaluate_text(network, symbols)
    return {
        "bits": found["bits_per_symbol"],
        "operations": found["effective_ops_per_step"],
        "activity": found["activity"],
    }


def show(records: Records, steps: int, tuning: int, seed: int) -> Table:
    """One row per budget, one column per criterion: bits before and after fine-tuning, operations after it."""
    table = Table("operations", *CRITERIA, title="bits per character: pruned → fine-tuned (1000 operations per step)")
    for budget in BUDGETS:
        cells = []
        for criterion in CRITERIA:
            asked = {"criterion": criterion, "budget": budget, "steps": steps, "tuning": tuning, "seed": seed}
            line = records.of(asked)
            cells.append(
                f"{line['pruned']['bits']:.3f} → {line['tuned']['bits']:.3f} ({line['tuned']['operations'] / 1e3:.1f})"
                if line
                else ""
            )
        table.add_row(f"{budget:.0%}", *cells)
    return table


def main(
    work: Annotated[Path, typer.Option(help="Folder for the trained model.")] = Path("eventrnn-operations"),
    steps: Annotated[int, typer.Option(help="Updates of the dense model.")] = 1500,
    tuning: Annotated[int, typer.Option(help="Updates after pruning.")] = 300,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    table_only: Annotated[bool, typer.Option("--table", help="Measure nothing; show the lines that exist.")] = False,
    results: Annotated[Path, typer.Option(help="File to which a line per point is appended.")] = RESULTS,
) -> None:
    """Measure the points that have no line, then show all of them."""
    records, console = Records(results, KEY), Console(width=170)
    if table_only:
        console.print(show(records, steps, tuning, seed))
        return
    corpus = python_documentation()
    length = len(corpus.valid) // STREAMS
    calibration = np.ascontiguousarray(corpus.valid[: length * STREAMS].reshape(STREAMS, length).T)
    work.mkdir(parents=True, exist_ok=True)
    with progress() as report:
        dense = trained(work / f"dense-{steps}-{seed}.safetensors", steps, seed, report)
        points = [(budget, criterion) for budget in BUDGETS for criterion in CRITERIA]
        before = figures(dense, corpus.test)
        for done, (budget, criterion) in enumerate(points):
            report("pruning", done, len(points), f"{criterion} to {budget:.0%}")
            asked = {"criterion": criterion, "budget": budget, "steps": steps, "tuning": tuning, "seed": seed}
            if records.of(asked):
                continue
            found = prune_to_operations(dense, calibration, budget, criterion=criterion)
            settings = Settings(steps=tuning, learning_rate=RATE / 2, activity_cost=ACTIVITY_COST, seed=seed + 1)
            tuned = Trainer(found.network, corpus.train, settings).run()
            sparse = tuned.with_matrices({n: er.convert(w, "csr") for n, w in tuned.matrices().items()})
            weights = {name: w.nnz for name, w in found.network.matrices().items()}
            records.add(
                asked
                | {
                    "dense": before,
                    "pruned": figures(found.network, corpus.test),
                    "tuned": figures(sparse, corpus.test),
                }
                | {"weights": weights, "calibrated": found.measured / found.before, "runs": found.measurements}
            )
    console.print(show(records, steps, tuning, seed))


if __name__ == "__main__":
    command(main, __doc__).run()
