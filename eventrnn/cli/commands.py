"""The short commands: demo, run, info and convert."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from eventrnn import io
from eventrnn._checks import need_choice
from eventrnn._files import file_sha256, printable
from eventrnn.cli.imports import own_model
from eventrnn.cli.options import (
    Backend,
    Block,
    Fold,
    Force,
    GivenModel,
    Json,
    NamedModel,
    Out,
    Part,
    Seed,
    Steps,
    Text,
    Threads,
    Unknown,
    folded,
    load_symbols,
    model_file,
    parse_bits,
    parse_block,
    save_model,
    takes,
    untied,
    writable_file,
    writable_folder,
)
from eventrnn.cli.terminal import progress, show
from eventrnn.pruning.patterns import parse_nm
from eventrnn.pruning.schedule import choose
from eventrnn.weights import FORMATS, STORAGES, GatedBlocks, Weights, check_block, convert
from eventrnn.weights.nm import AXES
from eventrnn.weights.storage import MOST_BITS


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")] = Path("eventrnn-demo"),
    hidden: Annotated[int, typer.Option(help="Number of units.")] = 256,
    steps: Steps = 700,
    pruning_steps: Annotated[int, typer.Option(help="Number of updates during and after pruning.")] = 2000,
    sparsity: Annotated[float, typer.Option(help="Share of the blocks to prune.")] = 0.8,
    block: Block = "1x8",
    seed: Seed = 0,
    named: NamedModel = None,
    fold: Fold = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train, prune and simulate a model, compare it with the dense network, count and time: two to three minutes.

    With --model, a trained model writes a text instead, and is compared, counted and timed on it: no training.
    """
    from eventrnn.cli import demo as job

    settings = job.DemoSettings(
        hidden=hidden, steps=steps, pruning_steps=pruning_steps, sparsity=sparsity, block=parse_block(block), seed=seed
    )
    if named is not None and replace(settings, seed=0) != job.DemoSettings():
        raise ValueError(
            "model: a trained model is not trained again; leave out the sizes and shares, and give only --seed"
        )
    if fold and named is None:
        raise ValueError("fold: a model that is trained here is not folded; give a trained one with --model")
    writable_folder(out, job.FILES, force)
    if named is None:
        shown = SHOWN
        with progress() as report:
            result = job.run(out, settings, report, overwrite=force)
    else:
        network = folded(io.load(model_file(None, named)), fold)
        shown = job.title(network)
        with progress() as report:
            result = job.run_trained(network, out, seed=seed, report=report, overwrite=force)
    if "text" in result and not as_json:
        print("\n".join(map(printable, result.pop("text").split("\n"))) + "\n")
    show(shown, result, as_json)
    if not as_json:
        print(f"wrote {printable(out)}/: {', '.join(sorted(p.name for p in out.iterdir() if p.name in job.FILES))}")
    if not result["events_identical"]:
        raise RuntimeError("the event-driven run and that of the dense network differ; this is a bug, please report it")


# Title of the figures of a demo that trains.
SHOWN = "Activity-sparse, block-pruned, event by event"


def run(
    model: GivenModel = None,
    named: NamedModel = None,
    text: Text = "builtin",
    part: Part = "test",
    unknown: Unknown = None,
    backend: Backend = "cpu",
    threads: Threads = 1,
    fold: Fold = False,
    storage: Annotated[
        str | None,
        typer.Option(help=f"Compare the model with one whose weights are stored as: {', '.join(STORAGES[1:])}."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a text event by event, and report bits per symbol, activity and operations."""
    from eventrnn.training.evaluation import compare_storage, evaluate_text

    network = folded(own_model(model_file(model, named)), fold)
    symbols = load_symbols(network, text, part, unknown)
    with progress() as bar:

        def report(stage: str, done: int, total: int) -> None:
            bar(stage, done, total, "")

        if storage is None:
            figures = evaluate_text(network, symbols, backend=backend, threads=threads, report=report)
        else:
            figures = compare_storage(network, symbols, storage, backend=backend, threads=threads, report=report)
    show(f"{model or named} on {text} ({part})", figures, as_json)


def _choices(weights: Weights) -> str:
    """How many blocks an input chooses, and how often; nothing of a matrix without gates."""
    if not isinstance(weights, GatedBlocks):
        return ""
    every = "" if weights.gate_period == 1 else f", every {weights.gate_period} steps"
    return f", {weights.kept_blocks} of {weights.n_blocks} blocks per input{every}"


def info(model: GivenModel = None, named: NamedModel = None, as_json: Json = False) -> None:
    """Show what is installed, what a GPU would run and how long the first call takes, or what a model file holds."""
    if model is not None or named is not None:
        path = model_file(model, named)
        network = own_model(path)
        shapes = {
            name: f"{w.name} {w.shape[0]}x{w.shape[1]}, {w.storage}, {w.nnz:,} weights "
            f"({w.nnz / max(1, w.shape[0] * w.shape[1]):.1%})" + _choices(w)
            for name, w in network.matrices().items()
        }
        cells = {
            f"layers.{k}": f"{layer.cell.name}/{layer.cell.variant}, {layer.units} units"
            for k, layer in enumerate(network.layers)
        }
        if network.one_hot:
            shapes = {"embedding": "folded into layers.0.w_in, one row per symbol"} | shapes
        show(
            model or named or "", cells | shapes | {"bytes": path.stat().st_size, "sha256": file_sha256(path)}, as_json
        )
        return
    from eventrnn import bench

    show(
        "eventrnn",
        bench.first_call() | {"device": bench.device(), **bench.gpu(), "versions": bench.versions()},
        as_json,
    )


@dataclass(frozen=True)
class ConvertOptions:
    """Options of `eventrnn convert`. None: the option was not given."""

    source: Annotated[Path, typer.Argument(help="Model file.")]
    out: Out
    to: Annotated[
        str | None,
        typer.Option(help=f"Weight format: {', '.join(FORMATS)}. [block with --block, nm with --nm, else unchanged]"),
    ] = None
    block: Annotated[
        str | None, typer.Option("--block", metavar="RxC", help="Size of a block of the block format.")
    ] = None
    nm: Annotated[
        str | None,
        typer.Option(
            "--nm", metavar="N:M[:AXIS]", help="Weights kept of each group, along the axis post (default) or pre."
        ),
    ] = None
    storage: Annotated[
        str | None, typer.Option(help=f"Storage type of the weights: {', '.join(STORAGES)}. [unchanged]")
    ] = None
    embedding: Annotated[
        str | None,
        typer.Option(
            help=f"Round the embedding to numbers of this type, for a smaller file: {', '.join(STORAGES[1:])}."
        ),
    ] = None
    untie: Annotated[
        bool,
        typer.Option(
            "--untie", help="Give a tied read-out weights of its own first, so that the embedding can be rounded apart."
        ),
    ] = False
    bits: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[MATRIX=]N",
            help="Bits of the codes of int8, 2 to 8, of all that --storage int8 and --embedding int8 round, or of one "
            "matrix or the embedding; repeat. Fewer compress better. [8]",
        ),
    ] = None
    exempt: Annotated[
        list[str] | None, typer.Option(help="Name of a matrix or layer that is not changed; repeat for more.")
    ] = None
    fold: Annotated[
        bool,
        typer.Option(
            "--fold",
            help="Fold the embedding and the input weights into one table first. The file is then large; the commands "
            "run, count and demo take --fold too.",
        ),
    ] = False
    force: Force = False
    as_json: Json = False


@takes(ConvertOptions)
def convert_command(options: ConvertOptions) -> None:
    """Change the weight format or the storage type of a model."""
    storage, embedding = options.storage, options.embedding
    r_c, n_m = parse_block(options.block) if options.block else None, parse_nm(options.nm, AXES) if options.nm else None
    writable_file(options.out, options.force)
    if embedding is not None:
        need_choice("embedding", embedding, STORAGES[1:])
        if options.fold:
            raise ValueError(
                f"embedding: got {embedding} with --fold, after which there is none; leave out one of them"
            )
    network = folded(untied(own_model(options.source), options.untie, options.source), options.fold)
    to = options.to or ("block" if r_c else "nm" if n_m else None)
    # A tied read-out keeps the values of the embedding. Dense float32 weights are those values, in any other format.
    same = to == "dense" and storage in (None, "float32")
    tied = network.readout is not None and network.readout.tied and not same
    there = [name for name in network.matrices() if not (tied and name == "readout")]
    chosen = choose(there, exempt=tuple(options.exempt or ()))
    coded = [*(chosen if storage == "int8" else ()), *(["embedding"] if embedding == "int8" else ())]
    if options.bits and not coded:
        given = options.bits[0]
        raise ValueError(f"bits: got {given}, but only int8 has codes; give --storage int8 or --embedding int8")
    codes = parse_bits(options.bits or [], coded)
    changed = {}
    for name in chosen:
        weights = network.matrices()[name]
        if r_c and to == "block":
            check_block(r_c, weights.shape, name)
        # Weights are rounded once, by `stored_as`.
        made = convert(weights, to, block=r_c, nm=n_m) if to else weights
        changed[name] = made.stored_as(storage or made.storage, codes.get(name, MOST_BITS))
    converted = network.with_matrices(changed)
    if embedding is not None:
        converted = converted.with_rounded_embedding(embedding, codes.get("embedding", MOST_BITS))
    save_model(converted, options.out, options.force)
    show(
        f"wrote {options.out}",
        {
            "format": ", ".join(sorted({w.name for w in changed.values()})),
            "storage": ", ".join(sorted({w.storage for w in changed.values()})),
            "bytes": options.out.stat().st_size,
            "weights": sum(w.nnz for w in changed.values()),
        },
        options.as_json,
    )
