"""A small event-based word model beside a GRU of the same size, both trained by the same loop.

    python experiments/words.py FOLDER                       # the EGRU, then the GRU; appends to results/words.jsonl
    python experiments/words.py FOLDER --model egru --epochs 4

FOLDER holds ptb.train.txt, ptb.valid.txt and ptb.test.txt (or three files named alike). The GRU is `Cell("gru")`: a
unit sends its cell at every step, and nothing is subtracted from it. Both models have the same parameters, except for
thresholds, and the same initialisation and noise. The GRU has no activity cost, which would only shrink its outputs. A
run is kept in runs/, and a run that was stopped continues.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from command_line import command
from records import Records

from eventrnn import Cell, Network, plots
from eventrnn.cli.terminal import as_line, progress
from eventrnn.data.text import from_path
from eventrnn.training import LanguageModelling, Model, Regularisers, Schedule, Settings, Trainer, read_log, run

RESULTS = Path(__file__).parent / "results" / "words.jsonl"
FIGURE = Path(__file__).parent / "figures" / "words.png"


def settings(model: str, epochs: int) -> Settings:
    """The settings of both models. They are the first ones tried; nothing was tuned on these texts."""
    return Settings(
        epochs=epochs,
        batch=20,
        window=35,
        learning_rate=3e-3,
        weight_decay=0.0,
        clip=0.5,
        activity_cost=1.0 if model == "egru" else 0.0,
        validate_every=332,
        schedule=Schedule("cosine", constant=0.2, final=0.02, warmup=100),
        regularisers=Regularisers(dropout_input=0.1, dropout_top=0.2),
    )


def as_gru(network: Network) -> Network:
    """The network with the same weights and GRU cells."""
    layers = [replace(layer, cell=Cell("gru"), threshold=np.zeros_like(layer.threshold)) for layer in network.layers]
    return replace(network, layers=tuple(layers))


def main(
    folder: Annotated[Path, typer.Argument(help="Folder with the three texts.")],
    model: Annotated[list[str] | None, typer.Option(help="egru or gru; repeat for both. [both]")] = None,
    hidden: Annotated[int, typer.Option(help="Units of the layer.")] = 256,
    epochs: Annotated[int, typer.Option(help="Passes over the training text.")] = 2,
    runs: Annotated[Path, typer.Option(help="Folder in which runs are kept.")] = Path("runs"),
    results: Annotated[Path, typer.Option(help="File to which a line per model is appended.")] = RESULTS,
) -> None:
    """Train, validate and test each model, and append a line per model."""
    for name in model or ():
        if name not in ("egru", "gru"):
            raise ValueError(f"model: got {name!r}, need egru or gru")
    corpus, records = from_path(folder, kind="word"), Records(results, ())
    symbols = len(corpus.vocabulary)
    for name in model or ["egru", "gru"]:
        network = Network.random(
            [hidden], symbols=symbols, embedding=hidden, tied=True, threshold=0.3, rng=np.random.default_rng(0)
        )
        if name == "gru":
            network = as_gru(network)
        chosen = settings(name, epochs)
        engine = Model(network, threads=chosen.threads)
        trainer = Trainer(network, LanguageModelling(corpus.train, corpus.valid), chosen, model=engine)
        with progress() as bar:

            def report(p, seconds, name=name, bar=bar):
                note = f"{p.bits:.3f} bits, activity {p.activity:.1%}, {seconds:.0f} s"
                bar(name, round(p.share * 1000), 1000, note)

            seconds = run(trainer, runs / f"words-{name}-{hidden}-{epochs}", resume=True, report=report)
        lines = read_log(runs / f"words-{name}-{hidden}-{epochs}")
        engine.parameters = trainer.best
        test = LanguageModelling(corpus.train, corpus.test).evaluate(engine)
        best = min((line["validation"] for line in lines if line["validation"]), key=lambda v: v["bits"])
        line = {
            "experiment": "words",
            "model": name,
            "hidden": hidden,
            "epochs": epochs,
            "symbols": symbols,
            "words": len(corpus.train),
            "perplexity_valid": best["perplexity"],
            "perplexity_test": test["perplexity"],
            "activity": test["activity"],
            "support": lines[-1]["support"],
            "seconds": seconds,
            "parameters": sum(p.size for p in engine.parameters.values()),
            "curve": [
                [each["step"], each["validation"]["perplexity"], each["validation"]["activity"]]
                for each in lines
                if each["validation"]
            ],
        }
        records.add(line)
        plots.learning_curves(
            {
                each["model"]: each["curve"]
                for each in records.lines
                if (each["hidden"], each["epochs"]) == (hidden, epochs)
            },
            title=f"{hidden} units, {epochs} epochs of {len(corpus.train):,} words",
            path=runs / "words.png" if results != RESULTS else FIGURE,
        )
        print(as_line({key: value for key, value in line.items() if key != "curve"}))


if __name__ == "__main__":
    command(main, __doc__).run()
