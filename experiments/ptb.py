"""Word models of the Penn Treebank: evaluate, prune, fine-tune, compare with the dense twin, and draw the results.

    eventrnn train --preset egru-ptb --text ptb --backend cuda --out ptb.safetensors   # the dense-weight model
    python experiments/ptb.py evaluate ptb.safetensors.run                             # validation; --test for both
    python experiments/ptb.py prune ptb.safetensors --operations 1.2e6 --block 1x16 --out pruned.safetensors
    python experiments/ptb.py prune ptb.safetensors --operations 3e6 --refit 16384 --out refitted.safetensors
    python experiments/ptb.py tune pruned.safetensors ptb.safetensors.run --epochs 100 --out tuned.safetensors
    python experiments/ptb.py tune ptb.safetensors ptb.safetensors.run --sparsity 0.9 --out gradual.safetensors
    python experiments/ptb.py tune ptb.safetensors ptb.safetensors.run --sparsity 0.9 --out taught.safetensors \\
        --teacher ptb.safetensors --distillation 0.5                                   # taught by the dense network
    python experiments/ptb.py tune ptb.safetensors ptb.safetensors.run --sparsity 0.8 --tied --kept embedding=0.1 \\
        --kept layers.0.w_in=0.3 --until 0.3 --out gradual.safetensors                 # the costly matrices to less
    python experiments/ptb.py arrange tuned.safetensors --bands 512,3008 --out start.safetensors   # an order for blocks
    python experiments/ptb.py tune start.safetensors egru-ptb --sparsity 0.5 --tied --block 1x16 --kept embedding=0.9 \\
        --kept embedding:512=0.75 --since 0.1 --out blocks.safetensors                 # frequent words keep more
    eventrnn convert tuned.safetensors --storage int8 --embedding int8 --out small.safetensors   # then pack_model.py
    python experiments/ptb.py evaluate small.safetensors --test
    python experiments/ptb.py evaluate small.safetensors --test --fold                 # first layer as a table
    python experiments/ptb.py twin small.safetensors                                   # equal to the dense network
    python experiments/ptb.py grid ptb.safetensors                                     # does the saving multiply?
    python experiments/ptb.py draw

A model is a model file or the folder of a run; of a GRU or an LSTM (`cell = "gru"`) it is the folder. The texts are
those of `--text`, by default the folder that EVENTRNN_PTB names, else the corpus `ptb`. Perplexities are those of one
stream with carried state. Operations are multiplications per token: embedding look-ups are free, the decoder is
counted.

Tying: the decoder of the recipe is the transposed embedding, one matrix in two places. A mask of the decoder would also
remove embedding values, which change every input of the first layer, and a look-up of which costs no operation. `prune`
therefore unties it (`Network.untied`): the decoder becomes a matrix of its own, which starts with the same values, is
pruned like the others and is fine-tuned apart; the embedding stays dense. Lines state the parameters of both.
`tune --tied` prunes the one matrix instead: every word keeps the same number of values, as an input and as a decoder,
so that the first layer too has few inputs that are not zero. Words are numbered by falling frequency: with bands of
words (`--kept embedding:512=0.75`), frequent words keep more values than rare ones, which cost as much per token.

Blocks: a block 1x16 is kept or pruned for 16 neighbouring words or units together. `arrange` puts those next to each
other that use the same inputs. Words stay within the bands that are given, so that these remain bands of frequency.

Folding: `--fold` runs the network that `er.fold` makes, whose first layer reads one row of a table per token instead of
multiplying the embedding. The sizes of a line stay those of the file; `folded_bytes` are those of the folded matrices.
Products of AWD-LSTM are stated as published and folded in the same way.

Each command but `draw` appends lines to results/ptb.jsonl.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from command_line import commands
from ptb_arrangement import arranged
from ptb_figures import grid_figure, operations_figure
from ptb_measures import AWD_LSTM, grid_point, quality, sizes
from ptb_tuning import gradual_pruning, kept_shares, taught
from records import Records

import eventrnn as er
from eventrnn.cli.options import Distillation, Fold, load_parts, parse_block, save_model, writable_file
from eventrnn.cli.terminal import as_line, progress
from eventrnn.data.vocabulary import Vocabulary
from eventrnn.io import located_model
from eventrnn.pruning import (
    Blocks,
    adaprune,
    after_training,
    magnitude_masks,
    prune_to_operations,
)
from eventrnn.pruning.schedule import prunable
from eventrnn.training import LanguageModelling, Model, Trainer, parts, run
from eventrnn.training.checkpoint import read_checkpoint
from eventrnn.training.recipes.distillation import DistillationRecipe
from eventrnn.training.recipes.recipe import Recipe, load_recipe, note, presets
from eventrnn.training.recipes.run_folder import CONFIG
from eventrnn.training.recipes.toml_config import parse_setting
from eventrnn.training.run import CHECKPOINT

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "ptb.jsonl"
KEY = ("what", "name")

# Steps and parallel streams of the training text on which operations are measured for pruning.
CALIBRATION = (512, 8)

# The grid: what is added to every threshold, and the share of the weights that is kept.
ADDED = (0.0, 0.05, 0.1, 0.2, 0.4)
DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05)

# Refitting ends when the gradient of each output has fallen by this factor.
REFIT_TOLERANCE = 1e-3

# Steps that are compared with the dense twin at a time. Their records are in memory.
COMPARED = 1024

app = commands(__doc__)

ModelPath = Annotated[Path, typer.Argument(help="Model file, or folder of a run.")]
Text = Annotated[str, typer.Option(help="Folder with the three texts, or ptb. [the folder EVENTRNN_PTB, else ptb]")]
Backend = Annotated[str, typer.Option(help="Backend that runs the network: cpu, auto or cuda.")]
Threads = Annotated[int, typer.Option(help="Threads of the cpu backend.")]
Limit = Annotated[int | None, typer.Option(help="Tokens of each text to read, at most.")]
Name = Annotated[str | None, typer.Option(help="Name of the model in the results. [name of the file]")]
Out = Annotated[Path, typer.Option(help="Model file to write.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
Results = Annotated[Path, typer.Option(help="File of results.")]

PTB = os.environ.get("EVENTRNN_PTB", "ptb")


# --- models -------------------------------------------------------------------------------------------------


def trained(path: Path, text: str) -> er.Network:
    """The network of a model file, or of the best validation of a run so far, which may still be under way.

    text : where the text of the run lies now
    """
    if not path.is_dir():
        return er.load(located_model(path))
    model = restored(path, text)
    return replace(model.network(), metadata=dict(model.template.metadata) | {"thresholds": model.thresholds})


def recipe_of(folder: Path, settings: list[tuple[str, Any]] | None = None) -> Recipe:
    """The recipe of the run in a folder, or of a preset of that name. Raises ValueError where there is none."""
    if not folder.exists() and str(folder) in presets():
        return load_recipe(preset=str(folder), settings=settings or [])
    if not (folder / CONFIG).exists():
        raise ValueError(f"model: {folder} holds no run: it has no {CONFIG}")
    return load_recipe(folder / CONFIG, settings=settings or [])


def restored(folder: Path, text: str) -> Model:
    """The model of a run with the parameters of its best validation, or the present ones before the first validation.

    The checkpoint is read without the engine that wrote it, which may be that of a GPU.
    """
    recipe = recipe_of(folder, [("training.backend", "cpu"), ("training.precision", "")])
    # Without its teacher, who would read the whole text again.
    trainer, _ = replace(recipe, data=replace(recipe.data, text=text), distillation=DistillationRecipe()).trainer()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = folder / CHECKPOINT
        # A run that was moved may have its checkpoint in parts.
        if not checkpoint.exists() and parts.join(folder, Path(scratch) / CHECKPOINT):
            checkpoint = Path(scratch) / CHECKPOINT
        arrays, _ = read_checkpoint(checkpoint)
    for key, value in trainer.model.parameters.items():
        value[...] = arrays.get(f"best.{key}", arrays[f"parameters.{key}"])
    return trainer.model


# --- commands -----------------------------------------------------------------------------------------------


@app.command()
def evaluate(
    model: ModelPath,
    text: Text = PTB,
    test: Annotated[bool, typer.Option("--test", help="Also read the test text, for reported points.")] = False,
    sparsity: Annotated[float, typer.Option(help="Of a GRU or LSTM: share of the weights to prune, by size.")] = 0.0,
    backend: Backend = "cpu",
    threads: Threads = 1,
    limit: Limit = None,
    fold: Fold = False,
    name: Name = None,
    results: Results = RESULTS,
) -> None:
    """Perplexity, activity, operations per token, parameters and bytes."""
    records, wanted = Records(results, KEY), ("valid", "test") if test else ("valid",)
    if model.is_dir() and not recipe_of(model).model.equations().thresholded:
        if fold:
            raise ValueError("fold: only an EGRU is folded here; leave out --fold")
        line = plain_line(restored(model, text), text, wanted, sparsity, limit)
    elif sparsity:
        raise ValueError(f"sparsity: got {sparsity}, but only a GRU or an LSTM is pruned here; use the command prune")
    else:
        network = trained(model, text)
        texts, line = load_parts(network, text, wanted), sizes(network) | {"folded": fold}
        if fold:
            network = er.fold(network)
            line["folded_bytes"] = sum(w.nbytes for w in network.matrices().values())
        with progress() as bar:
            for part in wanted:
                line[part] = quality(
                    network,
                    texts[part][:limit],
                    backend=backend,
                    threads=threads,
                    report=lambda stage, done, total, part=part: bar(f"reading {part}", done, total, ""),
                )
    name = name or model.name + ", folded" * fold
    show(records.add({"what": "evaluation", "name": name, "test_read": test} | line))


def plain_line(model: Model, text: str, wanted: tuple[str, ...], sparsity: float, limit: int | None) -> dict[str, Any]:
    """The line of a GRU or an LSTM of the same loop. Its units are all active, so that its operations are its weights.

    As of the EGRU, the decoder is pruned apart from the embedding.
    """
    template, model = model.template, _untied(model)
    texts = load_parts(template, text, wanted)
    matrices = {key: value for key, value in model.parameters.items() if prunable(key)}
    if sparsity:
        masks = magnitude_masks(matrices, sparsity, block=(1, 1), scope="global", statistic="max", gates="all")
        for key, mask in masks.items():
            model.parameters[key] *= mask
    weights = {key: int(np.count_nonzero(value)) for key, value in matrices.items()}
    total, decoder = sum(weights.values()), weights["readout"]
    line: dict[str, Any] = {
        "model": template.layers[0].cell.name,
        "units": [layer.units for layer in template.layers],
        "tied": False,
        "pruned": "1x1" if sparsity else "",
        "storage": "float32",
        "weights": total,
        "density": total / sum(value.size for value in matrices.values()),
        "parameters": sum(value.size for value in model.parameters.values())
        - sum(value.size for value in matrices.values())
        + total,
    }
    for part in wanted:
        symbols = texts[part][:limit]
        found = LanguageModelling(symbols, symbols, valid_batch=1).evaluate(model)
        line[part] = {
            "tokens": len(symbols),
            "perplexity": found["perplexity"],
            "activity": 1.0,
            "dense": sum(value.size for value in matrices.values()),
            "effective": total,
            "effective_without_decoder": total - decoder,
            "executed": total,
            "executed_without_decoder": total - decoder,
            "fewer_than_awd_lstm": AWD_LSTM / total,
        }
    return line


def _untied(model: Model) -> Model:
    """The same model with a decoder of its own."""
    apart = Model(model.template.untied(), thresholds=model.thresholds)
    for key in apart.parameters:
        apart.parameters[key][...] = model.readout_weights() if key == "readout" else model.parameters[key]
    return apart


@app.command()
def prune(
    model: ModelPath,
    operations: Annotated[float, typer.Option(help="Multiplications per token that may remain, decoder included.")],
    out: Out,
    block: Annotated[str, typer.Option(metavar="RxC", help="Block: presynaptic x postsynaptic.")] = "1x1",
    criterion: Annotated[str, typer.Option(help="Criterion that decides which weights go first.")] = "return",
    scope: Annotated[
        str, typer.Option(help="Same share of each matrix (matrix), or of all together (global).")
    ] = "matrix",
    exempt: Annotated[list[str] | None, typer.Option(help="Matrix or layer that is not pruned; repeat.")] = None,
    refit: Annotated[
        int,
        typer.Option(min=0, help="Tokens of the training text on which kept weights and biases are refitted; 0: none."),
    ] = 0,
    text: Text = PTB,
    name: Name = None,
    force: Force = False,
    results: Results = RESULTS,
) -> None:
    """Prune input, recurrent and decoder matrices to a budget of measured operations, at once."""
    writable_file(out, force)
    shape, records, network = parse_block(block), Records(results, KEY), trained(model, text).untied()
    train = load_parts(network, text, ("train",))["train"]
    if refit and not 2 * CALIBRATION[0] <= refit <= len(train):
        raise ValueError(f"refit: got {refit}, need 0 or {2 * CALIBRATION[0]} to {len(train)} tokens")
    steps, streams = CALIBRATION[0], min(CALIBRATION[1], max(1, len(train) // CALIBRATION[0]))
    inputs = np.ascontiguousarray(train[: steps * streams].reshape(streams, -1).T)
    before = er.count(network, er.simulate(network, inputs)).total.effective / inputs.size
    with progress() as bar:
        found = prune_to_operations(
            network,
            inputs,
            min(1.0, operations / before),
            criterion=criterion,
            scope=scope,
            block=shape,
            exempt=tuple(exempt or ()),
            report=lambda k, now: bar("measuring", k, 10, f"{now:,.0f} operations per token"),
        )
        pruned, measured = found.network, found.measured
        if refit:
            streams = refit // steps
            chosen = np.ascontiguousarray(train[: steps * streams].reshape(streams, -1).T)
            pruned = refitted(network, pruned, chosen, shape, lambda k, n, matrix: bar("refitting", k, n, matrix))
            measured = er.count(pruned, er.simulate(pruned, inputs)).total.effective / inputs.size
    save_model(pruned, out, force)
    line = {
        "what": "pruning",
        "name": name or out.name,
        "of": model.name,
        "criterion": criterion,
        "scope": scope,
        "block": block,
        "exempt": exempt or [],
        "refit": refit,
    }
    figures = {"before": found.before, "asked": operations, "measured": measured, "runs": found.measurements}
    show(records.add(line | figures | sizes(pruned)))


def refitted(
    network: er.Network, pruned: er.Network, inputs: np.ndarray, block: tuple[int, int], report: Callable
) -> er.Network:
    """The pruned network with its kept weights and its biases refitted to the drives of the network before pruning.

    Pruning shifts the mean of every drive and of every score; the biases take that up. The refitted network may do a
    little more or less than the operations that it was pruned to.
    """
    masks = {name: w.to_dense() != 0 for name, w in pruned.matrices().items() if w.nnz < w.shape[0] * w.shape[1]}
    changed, _ = adaprune(
        network,
        inputs,
        masks,
        store=Blocks(0.5, block),
        tolerance=REFIT_TOLERANCE,
        report=lambda matrix, done, total: report(done, total, matrix),
    )
    return changed


@app.command()
def arrange(
    model: ModelPath,
    out: Out,
    width: Annotated[int, typer.Option(min=2, help="Outputs per block.")] = 16,
    bands: Annotated[
        str, typer.Option(metavar="WORD,...", help="Words move within bands, which begin at these words, only.")
    ] = "",
    text: Text = PTB,
    name: Name = None,
    force: Force = False,
    results: Results = RESULTS,
) -> None:
    """Put words and units in an order in which blocks of neighbours lose little; the network is then dense and tied."""
    writable_file(out, force)
    try:
        limits = tuple(map(int, bands.split(","))) if bands else ()
    except ValueError:
        raise ValueError(f"bands: got {bands!r}, need numbers of words such as 512,3008") from None
    records, network = Records(results, KEY), trained(model, text)
    changed, figures = arranged(network, width, limits)
    save_model(changed, out, force)
    line = {"what": "arrangement", "name": name or out.name, "of": model.name, "width": width, "bands": limits}
    show(records.add(line | {"energy_kept": figures} | sizes(changed)))


@app.command()
def tune(
    model: Annotated[Path, typer.Argument(help="Model file, pruned already or pruned here by --sparsity.")],
    of: Annotated[Path, typer.Argument(help="Folder of the run that trained the model, or a preset: the recipe.")],
    out: Out,
    sparsity: Annotated[
        float,
        typer.Option(help="Share of the blocks that the training prunes by magnitude; 0: none."),
    ] = 0.0,
    kept: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MATRIX[:WORD]=SHARE",
            help="With --sparsity: share of its blocks that a matrix keeps, in place of 1 - SPARSITY; of a matrix of "
            "words also from a WORD on, by its number; repeat.",
        ),
    ] = None,
    tied: Annotated[
        bool,
        typer.Option(
            "--tied",
            help="With --sparsity: keep the read-out tied, and prune it and the embedding by one mask (embedding).",
        ),
    ] = False,
    until: Annotated[
        float, typer.Option(help="With --sparsity: share of the training after which the masks stay.")
    ] = 0.5,
    since: Annotated[
        float, typer.Option(help="With --sparsity: share of the training before the first weight is pruned.")
    ] = 0.0,
    block: Annotated[str, typer.Option(metavar="RxC", help="Block, with --sparsity.")] = "1x1",
    epochs: Annotated[int, typer.Option(help="Passes over the training text.")] = 100,
    learning_rate: Annotated[
        float, typer.Option(help="Learning rate at the start; it falls to zero by a cosine.")
    ] = 6e-4,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME|ADDRESS|none", help="As for eventrnn train; none for no teacher. [that of the run]"
        ),
    ] = None,
    distillation: Distillation = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the recipe; repeat.")] = None,
    folder: Annotated[Path | None, typer.Option("--run", help="Folder of the run. [OUT.run]")] = None,
    text: Text = PTB,
    name: Name = None,
    force: Force = False,
    results: Results = RESULTS,
) -> None:
    """Train a model on by the recipe of the run that made it: with its masks, or pruned gradually meanwhile.

    A run that was stopped continues.
    """
    writable_file(out, force)
    shape, records = parse_block(block), Records(results, KEY)
    options = (("block", block, "1x1"), ("kept", kept, None), ("until", until, 0.5), ("since", since, 0.0))
    options += (("tied", tied, False),)
    for option, given, default in options:
        if given != default and not sparsity:
            raise ValueError(f"{option}: got {given}, but only --sparsity prunes here; leave it out")
    network = er.load(model)
    if tied and (network.readout is None or not network.readout.tied):
        raise ValueError(f"tied: the read-out of {model} is not tied; leave out --tied")
    network = network.untied() if sparsity and not tied else network
    shares = kept_shares(kept or [], network, sparsity)
    changed = [
        ("training.epochs", epochs),
        ("training.learning_rate", learning_rate),
        ("training.schedule.constant", 0.0),
        ("data.text", text),
        *taught(teacher, distillation),
        *map(parse_setting, settings or []),
    ]
    recipe = recipe_of(of, changed)
    if recipe.distillation.teacher and teacher is None:
        inherited = f"{recipe.distillation.teacher} with the weight {recipe.distillation.weight}"
        print(f"the teacher is that of the run {of}: {inherited}; --teacher none trains without", file=sys.stderr)
    network = replace(network, metadata={**network.metadata, **recipe.distillation.metadata()})
    texts = load_parts(network, text, ("train", "valid"))
    training, options = recipe.training, {"valid_batch": recipe.data.valid_batch, "carry": recipe.data.carry}
    length = LanguageModelling(texts["train"], texts["valid"], **options).length(training.batch)
    updates = epochs * -(-length // training.window)
    pruning = gradual_pruning(sparsity, shares, network, shape, updates, until, since) if sparsity else None
    vocabulary = Vocabulary.from_json(network.metadata["vocabulary"])
    with progress() as bar:
        soft = recipe.distillation.targets(vocabulary, texts["train"], training, bar)
        task = LanguageModelling(texts["train"], texts["valid"], soft=soft, **options)
        trainer = Trainer(network, task, training, pruning=pruning)
        seconds = run(
            trainer,
            folder or Path(f"{out}.run"),
            resume=True,
            report=lambda p, _: bar("fine-tuning", round(1000 * p.share), 1000, note(p, "word", soft is not None)),
        )
    # A matrix that was pruned here takes the format of its blocks; others go back into the format that they had.
    masks = trainer.model.masks if sparsity else {}
    tuned = after_training(trainer.network(best=True), network, masks, Blocks(sparsity, shape))
    save_model(tuned, out, force)
    line = {"what": "tuning", "name": name or out.name, "of": model.name, "epochs": epochs, "seconds": seconds}
    line |= {"teacher": Path(recipe.distillation.teacher).name, "distillation": recipe.distillation.weight}
    line |= {
        "sparsity": sparsity,
        "kept": shares,
        "until": until,
        "since": since,
        "block": block,
        "settings": settings or [],
    }
    show(records.add(line | {"learning_rate": learning_rate, "best_bits": trainer.best_value} | sizes(tuned)))


@app.command()
def twin(
    model: ModelPath,
    text: Text = PTB,
    part: Annotated[str, typer.Option(help="Part of the text to read.")] = "test",
    backend: Backend = "cpu",
    threads: Threads = 1,
    limit: Limit = None,
    fold: Fold = False,
    name: Name = None,
    results: Results = RESULTS,
) -> None:
    """Compare every event, cell and output of a run with those of the dense network on the CPU, bit by bit.

    Exit code 1 where they differ, with the first difference.
    """
    from eventrnn.testing import Divergence, assert_equivalent

    network, records = trained(model, text), Records(results, KEY)
    symbols = load_parts(network, text, (part,))[part][:limit]
    # The dense network is never folded, so that folding is compared too.
    ours = er.Simulator(er.fold(network) if fold else network, backend=backend, threads=threads)
    dense = er.Simulator(network.dense(), threads=threads)
    compared, started = 0, time.perf_counter()
    with progress() as bar:
        for at in range(0, len(symbols), COMPARED):
            try:
                compared += assert_equivalent(ours, dense, symbols[at : at + COMPARED, None])
            except Divergence as difference:
                print(f"from token {at}: {difference}")
                raise typer.Exit(1) from None
            bar("comparing", min(at + COMPARED, len(symbols)), len(symbols), f"{compared:,} units and steps")
    line = {
        "what": "twin",
        "name": name or model.name + ", folded" * fold,
        "part": part,
        "tokens": len(symbols),
        "backend": backend,
    }
    seconds = time.perf_counter() - started
    line |= {"threads": threads, "folded": fold}
    show(records.add(line | {"compared": compared, "equal": True, "seconds": seconds}))


@app.command()
def grid(
    model: ModelPath,
    text: Text = PTB,
    limit: Limit = 5000,
    only: Annotated[
        bool, typer.Option("--only", help="Only the model as it is, such as one that was pruned in training.")
    ] = False,
    threads: Threads = 1,
    name: Name = None,
    results: Results = RESULTS,
) -> None:
    """Operations over dense x activity x density, on a grid of raised thresholds and of pruned weights, not tuned."""
    network, records = trained(model, text).untied(), Records(results, (*KEY, "added", "kept", "limit"))
    valid = load_parts(network, text, ("valid",))["valid"][:limit]
    points = [(added, kept) for added in ADDED for kept in DENSITIES][: 1 if only else None]
    with progress() as bar:
        for done, (added, kept) in enumerate(points):
            bar("grid", done, len(points), f"thresholds +{added:g}, {kept:.0%} of the weights")
            asked = {"what": "grid", "name": name or model.name, "added": added, "kept": kept}
            if records.of(asked | {"limit": limit}) is None:
                records.add(asked | {"limit": limit} | grid_point(network, valid, added, kept, threads))
    draw(results=results)


@app.command()
def draw(
    results: Results = RESULTS,
    figures: Annotated[
        Path | None, typer.Option(help="Folder to draw into. [figures, for the results of the repository]")
    ] = None,
) -> None:
    """Draw perplexity over operations, and the grid, from the lines that exist."""
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    folder = figures or (HERE / "figures" if results == RESULTS else results.parent)
    evaluated = list({each["name"]: each for each in lines if each["what"] == "evaluation"}.values())
    operations_figure(evaluated, path=folder / "ptb.png")
    print(f"wrote {folder / 'ptb.png'}: {len(evaluated)} models")
    measured = [each for each in lines if each["what"] == "grid"]
    points = list({(each["name"], each["added"], each["kept"]): each for each in measured}.values())
    whole = [each["name"] for each in points if each["kept"] < 1]
    if points:
        of = whole[-1] if whole else points[-1]["name"]
        tuned = [each for each in points if each["name"] != of and not each["added"] and each["kept"] == 1]
        grid_figure([each for each in points if each["name"] == of], tuned, path=folder / "ptb_grid.png")
        print(f"wrote {folder / 'ptb_grid.png'}: {len(points)} points")


def show(line: dict[str, Any]) -> None:
    """Print a line without what belongs to the machine."""
    print(as_line({key: value for key, value in line.items() if key not in ("versions", "device", "time")}))


if __name__ == "__main__":
    app.run()
