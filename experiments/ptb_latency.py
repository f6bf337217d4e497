"""Milliseconds per token of word models at batch 1: embedding, layers and decoder over 10,000 words.

    python experiments/ptb_latency.py MODEL                      # a model file; reads EVENTRNN_PTB, or ptb
    python experiments/ptb_latency.py --random 0.1 --block 1x16  # a random network of the recipe's size and activity
    python experiments/ptb_latency.py MODEL --fold               # folded, beside the same network as it is
    python experiments/ptb_latency.py MODEL --gpu                # on a GPU beside cuDNN

All contestants read the same tokens, one stream with carried state, interleaved in one process, and give the scores of
all words after every token. Each is timed in two ways: `sequence` is one call for the whole text, `token` one call per
token, as a program must that writes text or reads it as it arrives. Of PyTorch's models `token` is the faster of the
module's own call and of a call of `LSTMCell` or `GRUCell` per layer.

    ours           the pruned network, event by event; with --fold its embedding and input weights are one table
    ours, factors  with --fold: the network as it is
    ours, dense    the same network with all its weights, event by event
    ours, BLAS     the same network with all its weights, a dense product per matrix and step
    LSTM           torch.nn.LSTM of the size of AWD-LSTM: 400-1150-1150-400, tied decoder, 24 million parameters
    GRU            torch.nn.GRU of the sizes of our layers
    ..., int8      their dynamic quantisation (torch.ao.quantization)

PyTorch's models have random weights, because a dense model takes the same time whatever its weights are. The lines say
what was missing: a package, a GPU, or an option that a package no longer has. Lines go to results/ptb_latency.jsonl.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from command_line import command
from records import Records
from rich.console import Console
from rich.table import Table

import eventrnn as er
from eventrnn.bench import interleaved
from eventrnn.bench.machine import limited
from eventrnn.cli.options import Fold, load_parts, parse_block
from eventrnn.cli.terminal import progress
from eventrnn.io import located_model
from eventrnn.pruning import prune

RESULTS = Path(__file__).parent / "results" / "ptb_latency.jsonl"

# Layers of AWD-LSTM (Merity et al. 2017), and of the recipe egru-ptb.
AWD_LSTM = (400, (1150, 1150, 400))
EGRU = (750, (1350, 1350, 750))
WORDS = 10_000

# Measured activity of the layers of the recipe after 116 epochs with EvNN's kernels.
ACTIVITY = (0.121, 0.141, 0.299)

# The ways of reading a text. A way of a contestant begins with one of these words.
WAYS = ("sequence", "token")

# A contestant: way -> run over all tokens.
Ways = dict[str, Callable[[], object]]


# --- ours ---------------------------------------------------------------------------------------------------


def random_network(
    density: float, block: tuple[int, int], tokens: np.ndarray, words: int, sizes: tuple, activity: tuple[float, ...]
) -> er.Network:
    """An untrained network of these sizes with randomly kept blocks, at the activity of a trained one.

    Thresholds are set layer by layer, one number per layer, by bisection on these tokens.
    """
    embedding, units = sizes
    rng = np.random.default_rng(0)
    network = er.Network.random(
        list(units), rng=rng, symbols=words, embedding=embedding, tied=True, threshold=0.0
    ).untied()
    # The weights are independent, so that the largest blocks are random ones. The scale keeps drives at order 1.
    if density < 1:
        network = prune(network, 1 - density, block=block)
    network = replace(network, embedding=(network.embedding * 30).astype(np.float32))
    for k, asked in enumerate(activity):
        low, high, tried = 0.0, 2.0, []
        for _ in range(12):
            middle = (low + high) / 2
            layers = list(network.layers)
            layers[k] = replace(layers[k], threshold=np.full(units[k], middle, np.float32))
            below = replace(network, layers=tuple(layers[: k + 1]), readout=None)
            measured = er.simulate(below, tokens[:, None]).activity[k]
            tried.append((abs(measured - asked), tuple(layers)))
            low, high = (middle, high) if measured > asked else (low, middle)
        # Activity does not fall steadily with the threshold, so that the last one need not be the best.
        network = replace(network, layers=min(tried, key=lambda each: each[0])[1])
    return network


def ours(network: er.Network, tokens: np.ndarray, backend: str) -> Ways:
    """Our engine over the tokens."""
    stream, singles = tokens[:, None], [tokens[t : t + 1] for t in range(len(tokens))]
    whole, single = er.Simulator(network, backend=backend), er.Simulator(network, backend=backend)

    def one_by_one() -> None:
        for token in singles:
            single.step(token)

    return {"sequence": lambda: whole.run(stream), "token": one_by_one}


# --- PyTorch ------------------------------------------------------------------------------------------------


def torch_models(
    tokens: np.ndarray, units: tuple[int, tuple[int, ...]], missing: dict[str, str], gpu: bool
) -> dict[str, Ways]:
    """PyTorch's contestants. What cannot be made is entered in `missing` with the reason."""
    try:
        import torch
    except ImportError:
        missing.update(dict.fromkeys(("LSTM", "GRU", "LSTM, int8", "GRU, int8"), "torch is not installed"))
        return {}
    if gpu and not torch.cuda.is_available():
        missing.update(dict.fromkeys(("LSTM", "GRU"), "torch finds no GPU"))
        return {}
    device = torch.device("cuda" if gpu else "cpu")
    found = {}
    for kind, sizes in (("LSTM", AWD_LSTM), ("GRU", units)):
        model = word_model(torch, kind, sizes).eval()
        cells = word_model(torch, f"{kind}Cell", sizes).eval().to(device)
        found[kind] = torch_ways(torch, model.to(device), tokens, device, cells)
        if gpu:
            half = word_model(torch, kind, sizes).eval().to(device).half()
            found[f"{kind}, float16"] = torch_ways(torch, half, tokens, device)
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                parts = {getattr(torch.nn, kind), torch.nn.Linear}
                narrow = torch.ao.quantization.quantize_dynamic(model, parts, dtype=torch.qint8)
                narrow(torch.zeros((1, 1), dtype=torch.long), None)
            found[f"{kind}, int8"] = torch_ways(torch, narrow, tokens, device)
        except (AttributeError, RuntimeError) as error:
            missing[f"{kind}, int8"] = " ".join(str(error).split())[:200]
    return found


def word_model(torch: Any, kind: str, sizes: tuple[int, tuple[int, ...]]) -> Any:
    """Embedding, recurrent layers and tied decoder of a word model in PyTorch.

    kind : LSTM or GRU; with LSTMCell and GRUCell the layers take one token, and the model itself cannot be called

    A call takes tokens (steps, batch) and states of the layers; it returns scores (steps, batch, words) and states.
    """
    embedding, units = sizes
    inputs = (embedding, *units[:-1])

    class WordModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(WORDS, embedding)
            self.layers = torch.nn.ModuleList(getattr(torch.nn, kind)(i, n) for i, n in zip(inputs, units, strict=True))
            self.decoder = torch.nn.Linear(units[-1], WORDS)
            if units[-1] == embedding:
                self.decoder.weight = self.embedding.weight

        def forward(self, tokens, states):
            x, after = self.embedding(tokens), []
            for k, layer in enumerate(self.layers):
                x, state = layer(x, None if states is None else states[k])
                after.append(state)
            return self.decoder(x), after

    torch.manual_seed(0)
    return WordModel()


def torch_ways(torch: Any, model: Any, tokens: np.ndarray, device: Any, cells: Any = None) -> Ways:
    """The ways of a PyTorch model; on a GPU they end when the GPU has.

    cells : the same model made of single cells, or None
    """
    stream = torch.from_numpy(tokens.astype(np.int64))[:, None].to(device)
    singles = [stream[t : t + 1] for t in range(len(stream))]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def sequence() -> None:
        with torch.inference_mode():
            model(stream, None)
            wait()

    def one_by_one() -> None:
        with torch.inference_mode():
            states = None
            for token in singles:
                _, states = model(token, states)
            wait()

    def by_cells() -> None:
        with torch.inference_mode():
            states = [None] * len(cells.layers)
            for token in singles:
                x = cells.embedding(token[0])
                for k, cell in enumerate(cells.layers):
                    states[k] = cell(x, states[k])
                    x = states[k][0] if isinstance(states[k], tuple) else states[k]
                cells.decoder(x)
            wait()

    ways = {"sequence": sequence, "token": one_by_one}
    return ways if cells is None else ways | {"token, cells": by_cells}


# --- one measurement ----------------------------------------------------------------------------------------


def measure(
    network: er.Network, own: er.Network, tokens: np.ndarray, repeats: int, gpu: bool, report: Callable
) -> dict[str, Any]:
    """Median milliseconds per token of every contestant and way, and how many times faster ours is than each.

    own : the network that is ours: `network`, or the same one folded
    """
    missing: dict[str, str] = {}
    backend = "cuda" if gpu else "cpu"
    contestants = {"ours": ours(own, tokens, backend)}
    if own is not network:
        contestants["ours, factors"] = ours(network, tokens, backend)
    contestants["ours, dense"] = ours(network.dense(), tokens, backend)
    if not gpu:
        contestants["ours, BLAS"] = ours(network.dense(), tokens, "blas")
    sizes = (network.layers[0].inputs, tuple(layer.units for layer in network.layers))
    report("preparing", 0, 1, "")
    contestants |= torch_models(tokens, sizes, missing, gpu)
    runs = {(name, way): run for name, ways in contestants.items() for way, run in ways.items()}
    with limited(1):
        for done, run in enumerate(runs.values()):
            report("warming up", done, len(runs), "")
            run()
        report("timing", 0, 1, f"{repeats} rounds")
        seconds = interleaved(runs, repeats)
    every = {key: 1e3 * float(np.median(each)) / len(tokens) for key, each in seconds.items()}
    spread = {key: 1e3 * float(np.ptp(each)) / len(tokens) for key, each in seconds.items()}
    table = {
        name: {way: {"ms": every[name, way], "spread_ms": spread[name, way]} for way in ways}
        for name, ways in contestants.items()
    }
    ms = {
        (name, way): min(every[name, each] for each in ways if each.startswith(way))
        for name, ways in contestants.items()
        for way in WAYS
    }
    best = {name: min(ms[name, way] for way in WAYS) for name in contestants}
    return {
        "ms_per_token": table,
        "times_faster": {
            way: {name: ms[name, way] / ms["ours", way] for name in contestants if name != "ours"} for way in WAYS
        },
        # Each side in its better way.
        "times_faster_best": {name: best[name] / best["ours"] for name in contestants if name != "ours"},
        "missing": missing,
    }


def described(network: er.Network, own: er.Network, tokens: np.ndarray) -> dict[str, Any]:
    """What the network is, and what it does on these tokens in the form `own`."""
    done, matrices = er.simulate(own, tokens[:, None]), network.matrices().values()
    total = er.count(own, done).total
    return {
        "units": [layer.units for layer in network.layers],
        "words": network.symbols,
        "folded": own is not network,
        "formats": sorted({w.name for w in matrices}),
        "blocks": sorted({f"{w.block[0]}x{w.block[1]}" for w in matrices if isinstance(w, er.BlockCSR)}),
        "storage": sorted({w.storage for w in matrices}),
        "density": sum(w.nnz for w in matrices) / sum(w.shape[0] * w.shape[1] for w in matrices),
        "activity_by_layer": list(done.activity),
        "effective": total.effective / len(tokens),
        "executed": total.executed / len(tokens),
        "dense": total.dense // len(tokens),
    }


def show(line: dict[str, Any]) -> Table:
    """A table of a line: milliseconds per token of every contestant, and how many times slower than ours it is."""
    table = Table(
        "", "sequence, ms", "token, ms", "times slower, sequence", "token", "each at its best", title=line["name"]
    )
    for name, ways in line["ms_per_token"].items():
        ratios = [line["times_faster"][way].get(name) for way in WAYS]
        ratios.append(line["times_faster_best"].get(name))
        cells = [f"{min(ways[each]['ms'] for each in ways if each.startswith(way)):.3f}" for way in WAYS]
        table.add_row(name, *cells, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios))
    for name, reason in line["missing"].items():
        table.add_row(name, "missing", reason)
    return table


def main(
    model: Annotated[Path | None, typer.Argument(help="Model file.")] = None,
    random: Annotated[
        float | None, typer.Option(help="Instead of a model: share of the blocks that a random network keeps.")
    ] = None,
    block: Annotated[str, typer.Option(metavar="RxC", help="Block of the random network.")] = "1x16",
    text: Annotated[str, typer.Option(help="Text, of a model.")] = os.environ.get("EVENTRNN_PTB", "ptb"),
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a timed run.")] = 200,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 9,
    gpu: Annotated[bool, typer.Option("--gpu", help="Time on a GPU beside cuDNN.")] = False,
    fold: Fold = False,
    results: Annotated[Path, typer.Option(help="File to which the line is appended.")] = RESULTS,
) -> None:
    """Time a model beside PyTorch's LSTM and GRU, on one CPU thread or on a GPU, and append a line."""
    if (model is None) == (random is None):
        raise ValueError("model: give either a model file, or --random with the share of the blocks to keep")
    with progress() as report:
        if model is not None:
            network, name, made = er.load(located_model(model)), model.name, "trained"
            # Validation text: the test text is for reported perplexities only.
            stream = load_parts(network, text, ("valid",))["valid"][:tokens]
        else:
            report("setting the activity", 0, 1, "")
            stream = np.random.default_rng(1).integers(0, WORDS, tokens)
            network = random_network(random or 0.0, parse_block(block), stream, WORDS, EGRU, ACTIVITY)
            name, made = (
                f"random network, {random:.0%} of {block}",
                "random weights at the activity of a trained network",
            )
        line = {"name": name, "weights": made, "device_kind": "gpu" if gpu else "cpu", "threads": 1}
        own = er.fold(network) if fold else network
        line["name"] += ", folded" * fold
        line |= {"tokens": len(stream), "repeats": repeats} | described(network, own, stream)
        line |= measure(network, own, stream, repeats, gpu, report)
    records = Records(results, ("name",))
    if gpu:
        from eventrnn.cuda.device import current_device

        records.device = current_device().name
    line = records.add(line)
    Console(width=150).print(show(line))


if __name__ == "__main__":
    command(main, __doc__).run()
