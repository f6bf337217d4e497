"""Blocks that every input chooses: time beside the same weights without a gate, and quality beside static baselines.

    python experiments/dynamic_blocks.py speed
    python experiments/dynamic_blocks.py speed --rank 16
    python experiments/dynamic_blocks.py speed --block 64x64 --period 4     # four steps share a choice
    python experiments/dynamic_blocks.py speed --units 512 --block 64x64 --density 0.25
    python experiments/dynamic_blocks.py gpu --phases                       # needs a GPU, and torch
    python experiments/dynamic_blocks.py quality --variant gated --seed 0   # one model; all of them without options
    python experiments/dynamic_blocks.py ptb --variant dense --variant gated --epochs 3   # on a GPU
    python experiments/dynamic_blocks.py draw

`speed`: one layer with as many inputs as units, whose inputs are all active, and random weights, at batch 1 on the CPU.
The two networks are timed in turn in one process: `run` is one call for all steps, `step` one call per step. Gates are
drawn, so that every input chooses other blocks. The threshold is set so that about the asked share of the units is
active.

`product`: one product of a square matrix at batch 1, of whose inputs all are active, beside the same weights without a
gate and beside the BLAS of NumPy, on one CPU thread. The gate and the choice are in the time.

`gpu`: one layer of GRU cells and one of LSTM cells at batch 1 on a GPU, beside the same weights without a gate and
beside cuDNN of the same size, as PyTorch calls it (gated_gpu.py; `every_cudnn.py --hidden 1536` has all algorithms of
cuDNN). All sides are timed by CUDA events; ours are exact, and equal to the CPU.
With --phases, clocks in the kernel say how long a step waits, multiplies and chooses.

`quality`: word models of the Penn Treebank at a size for a CPU (gated_words.py says which variants there are). Only the
most frequent words are symbols; perplexities are therefore lower than those of all 10,000 words, and comparable among
the lines only. Operations are multiplications per token of the two matrices of the layer, gates included, on the first
tokens of the validation text. A run is kept in a folder, and one that was stopped continues.

`ptb`: the same on a GPU at the size of the paper's word model: two layers of 1536 LSTM units, blocks of 128 x 128 in
their four matrices, half of them chosen, and all words of the Penn Treebank. An embedding of 1536 numbers per word and
a read-out are dense. Perplexities are those of the best validation.

`draw`: figures/dynamic_blocks.png, from the lines of one cell and size, the last ones by default.

Lines are appended to results/dynamic_blocks.jsonl.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import gated_gpu
import numpy as np
import typer
from command_line import commands
from gated_figures import quality_figure
from gated_words import VARIANTS, Job
from gated_words import measure as measure_quality
from records import Records
from rich.console import Console
from rich.table import Table

import eventrnn as er
from eventrnn.bench import interleaved
from eventrnn.bench.machine import limited
from eventrnn.cells import Cell
from eventrnn.cli.options import parse_block
from eventrnn.cli.terminal import as_line, progress
from eventrnn.cpu.single_product import Product
from eventrnn.data.text import from_path
from eventrnn.weights import gate_cost

RESULTS = Path(__file__).parent / "results" / "dynamic_blocks.jsonl"
FIGURE = Path(__file__).parent / "figures" / "dynamic_blocks.png"
KEY = ("what", "cell", "units", "block", "density", "rank", "period", "asked_activity", "steps")

GPU_KEY = ("what", "cell", "units", "block", "density", "rank", "steps")

PRODUCT_KEY = ("what", "size", "block", "density", "rank", "threads")

# What identifies a trained model.
QUALITY_KEY = ("what", "variant", "seed", "cell", "hidden", "vocabulary", "epochs", "batch", "window")

# The same of the large word model.
PTB_KEY = (*QUALITY_KEY, "layers", "block", "learning_rate", "backend")

PTB = os.environ.get("EVENTRNN_PTB", "ptb")

app = commands(__doc__)

# Halvings of the interval in which the threshold is searched, and steps of a run of the search.
HALVINGS, SEARCHED = 12, 8


def at_activity(network: er.Network, asked: float, x: np.ndarray) -> er.Network:
    """The network with one threshold for all units, at which about the asked share of them is active."""

    def with_threshold(threshold: float) -> er.Network:
        layer = network.layers[0]
        return replace(network, layers=(replace(layer, threshold=np.full(layer.units, threshold, np.float32)),))

    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        busy = er.simulate(with_threshold(middle), x[:SEARCHED]).activity[0] > asked
        low, high = (middle, high) if busy else (low, middle)
    return with_threshold(low)


@dataclass(frozen=True)
class Layer:
    """A layer with as many inputs as units, and the gated blocks of its matrices.

    period : number of steps that share a choice
    """

    cell: str
    units: int
    block: tuple[int, int]
    density: float
    rank: int | None
    period: int


def networks(layer: Layer, asked: float, x: np.ndarray) -> tuple[er.Network, er.Network]:
    """A dense network, and one with the same weights behind gates, both at the asked activity of an EGRU."""
    rng = np.random.default_rng(1)
    threshold = {"threshold": 0.0} if layer.cell == "egru" else {}
    dense = er.Network.random([layer.units], inputs=layer.units, rng=rng, cell=Cell(layer.cell), **threshold)
    gates = {"block": layer.block, "density": layer.density, "rank": layer.rank, "gate_period": layer.period}
    gates["gate_rule"] = "softmax"
    gated = dense.with_matrices(
        {name: er.GatedBlocks.from_weights(w, rng=rng, **gates) for name, w in dense.matrices().items()}
    )
    if layer.cell != "egru":
        return dense, gated
    return at_activity(dense, asked, x), at_activity(gated, asked, x)


def contestants(network: er.Network, x: np.ndarray) -> dict[str, Callable[[], object]]:
    """A run over all steps in one call, and in a call per step."""
    whole, stepped = er.Simulator(network), er.Simulator(network)

    def steps() -> None:
        for each in x:
            stepped.step(each)

    return {"run": lambda: whole.run(x), "step": steps}


def measure_speed(layer: Layer, asked: float, steps: int, repeats: int) -> dict:
    """The line of one activity: microseconds per step of both networks, and the operations of the gated one."""
    x = np.random.default_rng(0).standard_normal((steps, 1, layer.units), dtype=np.float32)
    dense, gated = networks(layer, asked, x)
    sides = {"dense": contestants(dense, x), "gated": contestants(gated, x)}
    seconds = interleaved({(side, way): run for side, ways in sides.items() for way, run in ways.items()}, repeats)
    each = {key: 1e6 * float(np.median(times)) / steps for key, times in seconds.items()}
    run, plain = er.simulate(gated, x, record="events"), er.simulate(dense, x)
    shape, gates = (layer.units, Cell(layer.cell).gates * layer.units), {"rank": layer.rank, "period": layer.period}
    cost = gate_cost(shape, block=layer.block, density=layer.density, **gates).cost
    total, executed = er.count(gated, run).total, er.count(dense, plain).total.executed
    return {
        "what": "speed",
        **asdict(layer) | {"block": list(layer.block)},
        "asked_activity": asked,
        "steps": steps,
        "repeats": repeats,
        "activity": run.activity[0],
        "dense_activity": plain.activity[0],
        "gate_cost": cost,
        "executed_per_step": total.executed / steps,
        "selection_per_step": total.selection / steps,
        "dense_executed_per_step": executed / steps,
        "us_per_step": {f"{side}, {way}": value for (side, way), value in each.items()},
        "speedup": {way: each["dense", way] / each["gated", way] for way in ("run", "step")},
    }


@app.command()
def speed(
    cell: Annotated[
        list[str] | None,
        typer.Option(help="egru, gru or lstm; repeat for more. All units of plain cells are active. [all]"),
    ] = None,
    units: Annotated[int, typer.Option(help="Units of the layer, and inputs.")] = 1536,
    block: Annotated[str, typer.Option(metavar="RxC", help="Size of a block.")] = "128x128",
    density: Annotated[float, typer.Option(help="Share of the blocks that an input chooses.")] = 0.5,
    rank: Annotated[int | None, typer.Option(help="Rank of a gate of two factors. [one factor]")] = None,
    period: Annotated[int, typer.Option(help="Steps that share a choice of blocks.")] = 1,
    activity: Annotated[list[float] | None, typer.Option(help="Share of active units; repeat for more.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of a run.")] = 32,
    repeats: Annotated[int, typer.Option(help="Timed runs of each contestant.")] = 7,
    results: Annotated[Path, typer.Option(help="Lines are appended to this file.")] = RESULTS,
) -> None:
    """Measure every activity, and print the speed-ups."""
    records, console = Records(results, KEY), Console()
    for name in cell or ("gru", "lstm", "egru"):
        for asked in (activity or (0.5, 0.1)) if name == "egru" else (1.0,):
            layer = Layer(name, units, parse_block(block), density, rank, period)
            line = records.add(measure_speed(layer, asked, steps, repeats))
            ways = ", ".join(f"{way} {value:.2f}x" for way, value in line["speedup"].items())
            active = f"activity {line['activity']:.2f} (dense {line['dense_activity']:.2f})"
            console.print(f"{name}, {active}: {ways}", soft_wrap=True)


def measure_product(
    size: int, block: tuple[int, int], densities: list[float], rank: int | None, steps: int, repeats: int
) -> Iterator[dict]:
    """A line per density: microseconds of one product of a square matrix and an input of which all units are active,
    behind a gate, without one, and by the BLAS of NumPy, all interleaved on one thread."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((size, size), dtype=np.float32)
    x = rng.standard_normal((steps, 1, size), dtype=np.float32)
    events, gates = er.Events.from_dense(x), {"block": block, "rank": rank, "gate_rule": "softmax"}
    # An LSTM of a quarter of the units: its four gates are the columns of the matrix.
    products = {"dense": Product(er.convert(weights, "dense"), events, cell=Cell("lstm"))}
    with warnings.catch_warnings():
        # That a gate costs more than it saves at such a density is what the lines are to show.
        warnings.simplefilter("ignore", UserWarning)
        for density in densities:
            gated = er.GatedBlocks.from_weights(weights, rng=rng, density=density, **gates)
            products[f"{density}"] = Product(gated, events, cell=Cell("lstm"))

    def blas() -> None:
        for each in x:
            each @ weights

    with limited(1):
        seconds = interleaved({name: each.run for name, each in products.items()} | {"BLAS": blas}, repeats)
    us = {name: 1e6 * float(np.median(times)) / steps for name, times in seconds.items()}
    for density in densities:
        cost = gate_cost((size, size), block=block, density=density, rank=rank)
        asked = {"size": size, "block": list(block), "density": density, "rank": rank, "threads": 1}
        own = {"gated": us[f"{density}"], "dense": us["dense"], "blas": us["BLAS"]}
        speedup = {name: own[name] / own["gated"] for name in ("dense", "blas")}
        costs = {"gate_cost": cost.gate, "products": cost.products}
        yield {"what": "product", **asked, "steps": steps, "repeats": repeats, **costs, "us": own, "speedup": speedup}


@app.command("product")
def products(
    size: Annotated[
        list[int] | None, typer.Option(min=4, help="Inputs, and outputs, of the matrix; repeat. [2048 4096 6144]")
    ] = None,
    block: Annotated[str, typer.Option(metavar="RxC", help="Size of a block.")] = "128x128",
    density: Annotated[
        list[float] | None,
        typer.Option(help="Share of the blocks that are chosen; repeat. [0.1 0.25 0.5 0.75 1]"),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of a gate of two factors. [one factor]")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Inputs, each with a choice of its own.")] = 16,
    repeats: Annotated[int, typer.Option(min=3, help="Timed runs of each contestant.")] = 7,
    results: Annotated[Path, typer.Option(help="Lines are appended to this file.")] = RESULTS,
) -> None:
    """Measure one product of a square matrix over density, beside dense weights and BLAS; one CPU thread."""
    sizes, densities = size or [2048, 4096, 6144], density or [0.1, 0.25, 0.5, 0.75, 1.0]
    for each in sizes:
        if each % 4:
            raise ValueError(f"size: got {each}, need a multiple of 4, the gates of an LSTM")
    records, console = Records(results, PRODUCT_KEY), Console()
    for each in sizes:
        for line in measure_product(each, parse_block(block), densities, rank, steps, repeats):
            records.add(line)
            us, faster = line["us"], line["speedup"]
            shown = f"{us['gated']:.0f} µs, dense {us['dense']:.0f} ({faster['dense']:.2f}x)"
            shown += f", BLAS {us['blas']:.0f} ({faster['blas']:.2f}x)"
            console.print(f"{each}, density {line['density']:g}: {shown}", soft_wrap=True)


@app.command()
def gpu(
    cell: Annotated[list[str] | None, typer.Option(help="gru or lstm; repeat for more. [both]")] = None,
    units: Annotated[int, typer.Option(help="Units of the layer, and inputs.")] = 1536,
    block: Annotated[str, typer.Option(metavar="RxC", help="Size of a block.")] = "128x128",
    density: Annotated[float, typer.Option(help="Share of the blocks that an input chooses.")] = 0.5,
    rank: Annotated[int | None, typer.Option(help="Rank of a gate of two factors. [one factor]")] = None,
    steps: Annotated[int, typer.Option(help="Steps of a run.")] = 256,
    repeats: Annotated[int, typer.Option(help="Timed runs of each contestant.")] = 7,
    phases: Annotated[bool, typer.Option("--phases", help="Also print where the time of a step goes.")] = False,
    results: Annotated[Path, typer.Option(help="Lines are appended to this file.")] = RESULTS,
) -> None:
    """Measure cells on a GPU, and print the times and the speed-ups."""
    records, console = Records(results, GPU_KEY), Console()
    for name in cell or ("gru", "lstm"):
        line = records.add(gated_gpu.measure(name, units, parse_block(block), density, rank, steps, repeats, phases))
        times = ", ".join(f"{who} {value:.2f} µs" for who, value in line["us_per_step"].items())
        console.print(f"{name}: {times}; {line['speedup']['cudnn']:.2f}x cuDNN in float32 or TF32")
        for kind in ("phases", "dense_phases") if phases else ():
            found, title = line[kind], f"{name}, {'dense' if kind == 'dense_phases' else 'gated'}"
            table = Table("phase", "cycles", "slowest block", title=f"{title}: a step of a block of threads")
            for phase, cycles in found["cycles"].items():
                table.add_row(phase, f"{cycles['mean']:.0f}", f"{cycles['largest']:.0f}")
            table.add_row("step", f"{found['cycles_per_step']:.0f}", "")
            console.print(table)
            resident = f"{found['resident_block_rows']} of {found['block_rows']} block rows are in shared memory"
            console.print(f"{resident}; {found['us_per_step']:.2f} µs per step with clocks, input product included")


@app.command()
def quality(
    variant: Annotated[list[str] | None, typer.Option(help="Variant; repeat for more. [all]")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed; repeat for more. [0, 1 and 2]")] = None,
    cell: Annotated[str, typer.Option(help="gru or lstm, whose units are all active, or egru.")] = "gru",
    hidden: Annotated[int, typer.Option(help="Units of the layer, and width of the embedding.")] = 256,
    vocabulary: Annotated[int, typer.Option(help="Words that are symbols, of which one stands for all others.")] = 2000,
    epochs: Annotated[int, typer.Option(help="Passes over the training text.")] = 4,
    batch: Annotated[int, typer.Option(help="Parallel streams.")] = 32,
    window: Annotated[int, typer.Option(help="Time steps per window.")] = 35,
    text: Annotated[str, typer.Option(help="Folder with the texts, or ptb. [the folder EVENTRNN_PTB, else ptb]")] = PTB,
    runs: Annotated[Path, typer.Option(help="Folder in which runs are kept.")] = Path("runs"),
    results: Annotated[Path, typer.Option(help="Lines are appended to this file.")] = RESULTS,
) -> None:
    """Train each variant with each seed, and append a line per model. A model that has a line is left out."""
    jobs = [
        Job(name, number, cell, hidden, vocabulary, epochs, batch, window)
        for number in seed or (0, 1, 2)
        for name in variant or VARIANTS
    ]
    measure_all("quality", jobs, text, runs, Records(results, QUALITY_KEY))


@app.command()
def ptb(
    variant: Annotated[list[str] | None, typer.Option(help="Variant; repeat for more. [dense and gated]")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed; repeat for more. [0]")] = None,
    cell: Annotated[str, typer.Option(help="gru, lstm or egru.")] = "lstm",
    hidden: Annotated[int, typer.Option(help="Units of each layer, and width of the embedding.")] = 1536,
    layers: Annotated[int, typer.Option(help="Layers.")] = 2,
    block: Annotated[int, typer.Option(help="Side of a block of the variant gated; others are in proportion.")] = 128,
    vocabulary: Annotated[int, typer.Option(help="Words that are symbols; 0 for all.")] = 0,
    epochs: Annotated[int, typer.Option(help="Passes over the training text.")] = 20,
    batch: Annotated[int, typer.Option(help="Parallel streams.")] = 20,
    window: Annotated[int, typer.Option(help="Time steps per window.")] = 35,
    learning_rate: Annotated[float, typer.Option(help="Learning rate before its schedule.")] = 1e-3,
    backend: Annotated[str, typer.Option(help="cuda for a GPU, or cpu.")] = "cuda",
    text: Annotated[str, typer.Option(help="Folder with the texts, or ptb. [the folder EVENTRNN_PTB, else ptb]")] = PTB,
    runs: Annotated[Path, typer.Option(help="Folder in which runs are kept.")] = Path("runs"),
    results: Annotated[Path, typer.Option(help="Lines are appended to this file.")] = RESULTS,
) -> None:
    """Train large word models, by default dense and with gates; otherwise as `quality`."""
    options = {"layers": layers, "block": block, "learning_rate": learning_rate, "backend": backend}
    jobs = [
        Job(name, number, cell, hidden, vocabulary, epochs, batch, window, **options)
        for number in seed or (0,)
        for name in variant or ("dense", "gated")
    ]
    measure_all("ptb", jobs, text, runs, Records(results, PTB_KEY))


def measure_all(what: str, jobs: list[Job], text: str, runs: Path, records: Records) -> None:
    """Train the models of the jobs, all of one vocabulary, that have no line yet; append and print a line for each."""
    corpus = from_path(text, kind="word", size=jobs[0].vocabulary or None)
    for job in jobs:
        if records.of({"what": what, **vars(job)}) is not None:
            continue
        with progress() as bar:

            def report(p, seconds, job=job, bar=bar):
                bar(job.name, round(p.share * 1000), 1000, f"{p.bits:.3f} bits, {seconds:.0f} s")

            line = records.add(measure_quality(job, corpus, runs, report, what=what))
        shown = {key: value for key, value in line.items() if key not in ("usage", "curve", "versions")}
        print(as_line(shown), flush=True)


@app.command()
def draw(
    cell: Annotated[str | None, typer.Option(help="Cell of the lines. [that of the last line]")] = None,
    results: Annotated[Path, typer.Option(help="File of results.")] = RESULTS,
    out: Annotated[Path, typer.Option(help="File of the figure.")] = FIGURE,
) -> None:
    """Draw perplexity over operations, and the use of the blocks. Of several lines of one model the last one counts."""
    lines = [line for line in Records(results, QUALITY_KEY).lines if line["what"] == "quality"]
    lines = [line for line in lines if cell in (None, line["cell"])]
    if not lines:
        raise ValueError(f"results: {results} has no line of `quality`" + (f" with cell {cell}" if cell else ""))
    # What the figure compares has the same size.
    shared = [name for name in QUALITY_KEY if name not in ("variant", "seed")]
    same = [line for line in lines if all(line[name] == lines[-1][name] for name in shared)]
    latest = {(line["variant"], line["seed"]): line for line in same}
    order = {name: k for k, name in enumerate(VARIANTS)}
    quality_figure(sorted(latest.values(), key=lambda line: (order[line["variant"]], line["seed"])), path=out)
    print(out)


if __name__ == "__main__":
    app.run()
