"""From a character model that PyTorch trained to EGRUs of several activities: perplexity over operations. No download.

    python experiments/fine_tune_text.py           # needs torch

PyTorch alone trains an embedding, an `nn.GRU` and a linear layer on the documentation that Python carries, and
`torch.save` writes their `state_dict`. Then `eventrnn import` and `eventrnn fine-tune` make EGRUs of it, as
a user would. The test part, which no training and no choice has seen, is read at the end. Every activity appends a line
to results/fine_tune_text.jsonl.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from command_line import command
from records import Records

import eventrnn as er
from eventrnn.cli.terminal import as_line
from eventrnn.data.text import python_documentation
from eventrnn.training.evaluation import evaluate_text

RESULTS = Path(__file__).parent / "results" / "fine_tune_text.jsonl"

ACTIVITIES = (0.3, 0.2, 0.1, 0.05)

# Streams and steps per window of the training by PyTorch.
STREAMS, WINDOW = 32, 64


def trained_gru(train: np.ndarray, symbols: int, hidden: int, epochs: int, seed: int) -> Any:
    """An embedding, an `nn.GRU` and an `nn.Linear`, trained by PyTorch alone to predict the next symbol."""
    import torch

    torch.manual_seed(seed)
    model = torch.nn.ModuleDict(
        {
            "embedding": torch.nn.Embedding(symbols, 64),
            "rnn": torch.nn.GRU(64, hidden),
            "top": torch.nn.Linear(hidden, symbols),
        }
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    length = len(train) // STREAMS
    text = torch.from_numpy(train[: STREAMS * length].astype(np.int64)).reshape(STREAMS, length).T
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * -(-(length - 1) // WINDOW))
    for _ in range(epochs):
        state = torch.zeros(1, STREAMS, hidden)
        for at in range(0, length - 1, WINDOW):
            part = text[at : at + WINDOW + 1]
            output, state = model["rnn"](model["embedding"](part[:-1]), state.detach())
            loss = torch.nn.functional.cross_entropy(model["top"](output).flatten(0, 1), part[1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    return model


def eventrnn(*arguments: object) -> dict[str, Any]:
    """What a command of eventrnn prints with --json."""
    done = subprocess.run(
        [sys.executable, "-m", "eventrnn", *map(str, arguments), "--json"], check=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout)


def tested(network: er.Network, symbols: np.ndarray) -> dict[str, float]:
    """Perplexity, activity and operations per step on the test text, read as one stream."""
    found = evaluate_text(network, symbols)
    return {
        "perplexity": found["perplexity"],
        "bits": found["bits_per_symbol"],
        "activity": found["activity"],
        "effective_per_step": found["effective_ops_per_step"],
        "dense_per_step": found["dense_ops_per_step"],
    }


def run(
    hidden: Annotated[int, typer.Option(min=1, help="Units of the GRU.")] = 256,
    gru_epochs: Annotated[int, typer.Option(min=1, help="Passes over the text by PyTorch.")] = 10,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the text by fine-tuning.")] = 10,
    activity: Annotated[list[float] | None, typer.Option(help="Wanted activity; repeat for more. [four]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of both trainings.")] = 2,
    results: Annotated[Path, typer.Option(help="File to which the lines are appended.")] = RESULTS,
) -> None:
    """Train a character model with PyTorch, and fine-tune it to EGRUs."""
    import torch

    torch.set_num_threads(threads)
    corpus = python_documentation()
    begun = time.perf_counter()
    module = trained_gru(corpus.train, len(corpus.vocabulary), hidden, gru_epochs, seed)
    gru_seconds = time.perf_counter() - begun
    with TemporaryDirectory() as folder:
        file, model = Path(folder) / "gru.pt", Path(folder) / "gru.safetensors"
        torch.save(module.state_dict(), file)
        symbols = ("--vocabulary", "characters", "--text", "builtin")
        eventrnn("import", file, "--embedding", "embedding", "--readout", "top", *symbols, "--out", model)
        given = tested(er.load(model), corpus.test)
        for wanted in activity or ACTIVITIES:
            out = Path(folder) / f"egru-{wanted}.safetensors"
            how = ("--activity", wanted, "--epochs", epochs, "--seed", seed, "--threads", threads)
            figures = eventrnn("fine-tune", model, "--text", "builtin", *how, "--out", out)
            line = {
                "experiment": "fine_tune_text",
                "text": "builtin",
                "python": ".".join(map(str, sys.version_info[:3])),
                "hidden": hidden,
                "gru_epochs": gru_epochs,
                "epochs": epochs,
                "wanted": wanted,
                "seed": seed,
                "gru_seconds": gru_seconds,
                "seconds": figures["seconds"],
                "valid": {name: figures[name]["perplexity"] for name in ("given", "start", "tuned")},
                "given": given,
                "tuned": tested(er.load(out), corpus.test),
            }
            Records(results, ()).add(line)
            print(as_line(line))


if __name__ == "__main__":
    command(run, __doc__).run()
