"""What masks that are drawn anew every few updates cost, as a share of a training step (after Hubara et al. 2021).

    python experiments/mask_refresh.py

Transposable 4:8 masks of all matrices of an EGRU, by the exact optimum and by the greedy method, on one CPU thread.
Three trainings take their steps in turn: a dense one, one that keeps its masks, and one that draws them in every step.
The second has the dense weights behind the masks to move (straight-through). A line per method goes to
results/mask_refresh.jsonl: medians in seconds, from which the share follows for every interval.
"""

import time
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer
from command_line import command
from records import Records

from eventrnn.bench.machine import limited
from eventrnn.network import Network
from eventrnn.pruning import DynamicMasks, NofM
from eventrnn.training import LanguageModelling, Settings, Trainer

RESULTS = Path(__file__).parent / "results" / "mask_refresh.jsonl"
KEY = ("method", "hidden", "batch", "window")

# Updates between two changes of the masks, of which the shares are shown; 40 in the paper.
INTERVALS = (1, 10, 40, 100)
UPDATES = 100_000


def trainer(hidden: int, batch: int, window: int, pruning: DynamicMasks | None) -> Trainer:
    """A training of a stack of two layers on random symbols."""
    rng, symbols = np.random.default_rng(0), 1000
    network = Network.random(
        [hidden, hidden], rng=rng, symbols=symbols, embedding=hidden, readout=symbols, threshold=0.3
    )
    text = rng.integers(0, symbols, 40 * batch * window)
    settings = Settings(steps=UPDATES, batch=batch, window=window)
    return Trainer(network, LanguageModelling(text), settings, pruning=pruning)


def measured(method: str, hidden: int, batch: int, window: int, rounds: int) -> dict:
    """The line of a method."""
    pattern = NofM(4, 8, "both", method)

    def masked(every: int) -> DynamicMasks:
        return DynamicMasks(pattern, 0, UPDATES - 2, every=every)

    rules = {"dense": None, "kept": masked(UPDATES - 3), "drawn": masked(1)}
    runs = {name: trainer(hidden, batch, window, rule) for name, rule in rules.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with limited(1):
        # The first step compiles, and draws masks in both masked trainings.
        for turn in range(rounds + 1):
            for name, run in runs.items():
                started = time.perf_counter()
                run.step()
                if turn:
                    seconds[name].append(time.perf_counter() - started)
    at = {name: median(each) for name, each in seconds.items()}
    shares = {str(k): (at["drawn"] - at["kept"]) / (k * at["dense"]) for k in INTERVALS}
    sizes = {"hidden": hidden, "batch": batch, "window": window, "rounds": rounds}
    return {"method": method, **sizes, "seconds": at, "masks_share": shares, "kept_share": at["kept"] / at["dense"] - 1}


def main(
    hidden: Annotated[int, typer.Option(min=8, help="Units of both layers.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Samples.")] = 32,
    window: Annotated[int, typer.Option(min=1, help="Steps of an update.")] = 32,
    rounds: Annotated[int, typer.Option(min=3, help="Timed steps of each training.")] = 9,
    results: Annotated[Path, typer.Option(help="File to which a line per method is appended.")] = RESULTS,
) -> None:
    records = Records(results, KEY)
    for method in ("exact", "greedy"):
        line = records.add(measured(method, hidden, batch, window, rounds))
        shares = ", ".join(f"every {k} {share:.0%}" for k, share in line["masks_share"].items())
        print(f"{method}: masks {shares}; dense weights behind them {line['kept_share']:.0%}", flush=True)


if __name__ == "__main__":
    command(main, __doc__).run()
