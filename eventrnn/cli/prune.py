"""`eventrnn prune`: prune a model file by any method, and show the figures before and after."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from eventrnn import counting, io, pruning
from eventrnn._files import printable
from eventrnn.cli.imports import own_model
from eventrnn.cli.options import (
    Distillation,
    Force,
    Json,
    Model,
    Teacher,
    TopK,
    Unknown,
    load_parts,
    parse_block,
    picture_text,
    save_model,
    takes,
    untied,
    writable_file,
    writable_picture,
)
from eventrnn.cli.terminal import as_line, console, progress
from eventrnn.data.vocabulary import Vocabulary
from eventrnn.network import Network, need_thresholds
from eventrnn.pruning.magnitude import GATES, SCOPES, STATISTICS
from eventrnn.pruning.methods import BLOCK_OPTIONS, METHODS, TARGETS, Method, options_with, training_schedule
from eventrnn.pruning.nm import TRANSPOSABLE_METHODS
from eventrnn.pruning.operations import MEASUREMENTS, check_budget
from eventrnn.pruning.patterns import parse_nm
from eventrnn.simulation import simulate
from eventrnn.training import LanguageModelling, Progress, Settings, Trainer
from eventrnn.training.recipes.distillation import DistillationRecipe
from eventrnn.training.thresholds import RULES, check_rule

#: options that need --steps
TUNING = ("learning_rate", "activity_cost", "thresholds", "batch", "window", "seed")

#: option -> setting of `DistillationRecipe`; they need --steps
TEACHING = {"teacher": "teacher", "distillation": "weight", "top_k": "top_k"}

# Steps and parallel streams of the validation text on which activity is measured and matrices are refitted.
CALIBRATION = (512, 8)

Report = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class PruneOptions:
    """Options of `eventrnn prune`. None: the option was not given."""

    model: Model
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Model file to write.")] = None
    method: Annotated[
        str | None,
        typer.Option(help=f"{'; '.join(f'{name}: {each.summary}' for name, each in METHODS.items())}. [magnitude]"),
    ] = None
    sparsity: Annotated[float | None, typer.Option(help="Share of the blocks to prune, in [0, 1). [0.8]")] = None
    nm: Annotated[
        str | None,
        typer.Option(
            "--nm",
            metavar="N:M[:AXIS]",
            help="Number of weights to keep of each m along the axis post (default), pre or both.",
        ),
    ] = None
    ops_budget: Annotated[
        float | None,
        typer.Option(
            "--ops-budget",
            help="Share of the effective operations that may remain, in (0, 1]. Training with --steps afterwards "
            "changes activity, and with it the operations: the last line says whether the budget still holds.",
        ),
    ] = None
    diagonal: Annotated[
        int | None,
        typer.Option(
            "--diagonal",
            metavar="PARTS",
            help="Keep only blocks along the diagonal of each gate, a share of 1 / PARTS of the weights.",
        ),
    ] = None
    block: Annotated[
        str | None, typer.Option("--block", metavar="RxC", help="Size of a block: presynaptic x postsynaptic. [1x1]")
    ] = None
    scope: Annotated[
        str | None,
        typer.Option(
            help="Apply the share to each matrix, to all together (global), or to each column of blocks, such as the "
            f"weights of a word in a read-out: {', '.join(SCOPES)}. [matrix; a budget: global, and no column]"
        ),
    ] = None
    statistic: Annotated[
        str | None, typer.Option(help=f"Statistic by which blocks are ranked: {', '.join(STATISTICS)}.")
    ] = None
    gates: Annotated[
        str | None,
        typer.Option(
            help=f"Grid of blocks: {', '.join(GATES)} (one over all gates, one per gate, one mask for all gates)."
        ),
    ] = None
    mask: Annotated[
        str | None, typer.Option(help=f"Method that finds masks along both axes: {', '.join(TRANSPOSABLE_METHODS)}.")
    ] = None
    criterion: Annotated[
        str | None,
        typer.Option(help=f"Criterion that decides which weights go first: {', '.join(pruning.CRITERIA)}. [return]"),
    ] = None
    strength: Annotated[float | None, typer.Option(help="Strength of the group lasso. [0.01]")] = None
    rounds: Annotated[int | None, typer.Option(help="Number of rounds of iterative pruning. [5]")] = None
    every: Annotated[
        int | None,
        typer.Option(
            help="Number of updates between two changes of the masks, which are final after half of the updates. [40]"
        ),
    ] = None
    exempt: Annotated[list[str] | None, typer.Option(help="Matrix or layer that is not pruned; repeat for more.")] = (
        None
    )
    untie: Annotated[
        bool,
        typer.Option(
            "--untie",
            help="Give a tied read-out weights of its own first, so that it is pruned too; the embedding stays dense.",
        ),
    ] = False
    steps: Annotated[
        int, typer.Option(help="Number of updates of the training, per round if there are rounds; 0 for no training.")
    ] = 0
    text: Annotated[
        str | None,
        typer.Option("--text", help="Text for training, calibration and measurement, as for train. [builtin]"),
    ] = None
    unknown: Unknown = None
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate of the training. [0.003]")] = None
    activity_cost: Annotated[float | None, typer.Option(help="Activity cost of the training, as for train. [0]")] = None
    thresholds: Annotated[
        str | None,
        typer.Option(
            help=f"How thresholds are trained: {', '.join(RULES)}. [the rule in the model file, else {RULES[0]}]",
        ),
    ] = None
    batch: Annotated[int | None, typer.Option(help="Number of parallel streams of the training. [32]")] = None
    window: Annotated[int | None, typer.Option(help="Number of time steps per window of the training. [64]")] = None
    seed: Annotated[int | None, typer.Option(help="Seed of the training. [0]")] = None
    teacher: Teacher = None
    distillation: Distillation = None
    top_k: TopK = None
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show the table and write nothing. A method that trains is shown as pruning by magnitude at once.",
        ),
    ] = False
    picture: Annotated[Path | None, typer.Option(help="File for a picture of the masks: .png, .pdf or .svg.")] = None
    force: Force = False
    as_json: Json = False


@dataclass(frozen=True)
class Request:
    """One pruning, checked before any work.

    Attributes
    ----------
    name, method : entry of `pruning.methods.METHODS`
    pattern      : what to prune to
    steps        : updates of the training, 0 for none
    schedule     : what the trainer is given; None without training and for methods that train otherwise
    teaching     : the teacher of the training, if there is one
    given        : every option that was given, by name
    """

    name: str
    method: Method
    pattern: pruning.Pattern
    steps: int
    schedule: pruning.Pruning | None
    teaching: DistillationRecipe
    given: Mapping[str, Any]

    @property
    def exempt(self) -> tuple[str, ...]:
        return tuple(self.given.get("exempt", ()))

    def some(self, *options: str) -> dict[str, Any]:
        """Those of the named options that were given, as keyword arguments."""
        return {option: self.given[option] for option in options if option in self.given}


@takes(PruneOptions)
def prune(options: PruneOptions) -> None:
    """Prune a model: at once, during training, to N of each M weights, to a diagonal, or to a budget of operations."""
    request = _request(options)
    network = untied(own_model(options.model), options.untie, options.model)
    if options.thresholds is not None:
        need_thresholds(network, f"thresholds: got {options.thresholds!r}", "leave out --thresholds")
    parts, budget = {}, {}
    if request.steps or request.method.calibrates or options.text is not None:
        parts = load_parts(network, options.text or "builtin", ("train", "valid"), options.unknown)
    with progress() as report:
        pruned = _pruned(request, network, parts, report)
        pruned = replace(pruned, metadata={**pruned.metadata, **request.teaching.metadata()})
        if request.name == "operations":
            budget = _budget(request, network, pruned, parts["valid"])
        before, after = (_figures(each, parts.get("valid"), report) for each in (network, pruned))
    before["file_bytes"] = options.model.stat().st_size
    if options.out is not None and not options.dry_run:
        save_model(pruned, options.out, options.force)
        after["file_bytes"] = options.out.stat().st_size
    else:
        after["file_bytes"] = _file_size(pruned)
    if options.picture is not None:
        from eventrnn import canvas, plots

        title = picture_text(f"{options.model.name}, {request.name}: {request.pattern}")
        canvas.saved(plots.mask_map(pruned.matrices(), title=title), options.picture, overwrite=options.force)
    matrices = pruned.matrices().values()
    summary = {
        "method": request.name,
        "format": ", ".join(sorted({w.name for w in matrices})),
        "storage": ", ".join(sorted({w.storage for w in matrices})),
        **budget,
        "steps": 0 if options.dry_run else request.steps,
        "dry_run": options.dry_run,
        **request.teaching.said(),
    }
    _show(summary, before, after, options)


# --- options ------------------------------------------------------------------------------------------------


def _request(options: PruneOptions) -> Request:
    """The pruning that the options describe. Raises ValueError for options that do not fit together."""
    given = {name: value for name, value in asdict(options).items() if value is not None}
    name = options.method or ("operations" if options.ops_budget is not None else "magnitude")
    method = _method(name, given, options.steps)
    check_rule(given.get("thresholds", RULES[0]))
    if options.out is None and not options.dry_run:
        raise ValueError("out: got none; give a file to write, or --dry-run")
    if options.out is not None:
        writable_file(options.out, options.force)
    if options.picture is not None:
        _check_picture(options.picture, given, options.force)
    pattern = _pattern(given)
    schedule = training_schedule(name, pattern, options.steps, given) if options.steps else None
    if name == "operations":
        check_budget(given["ops_budget"], given.get("criterion", "return"))
    teaching = DistillationRecipe(**{setting: given[name] for name, setting in TEACHING.items() if name in given})
    return Request(name, method, pattern, options.steps, schedule, teaching.located(), given)


def _method(name: str, given: Mapping[str, Any], steps: int) -> Method:
    """The method of that name. Raises ValueError where it does not take an option that was given."""
    if name not in METHODS:
        raise ValueError(f"method: got {name!r}, need one of {', '.join(METHODS)}")
    method = METHODS[name]
    targets = [target for target in TARGETS if target in given]
    if len(targets) > 1 or any(target not in method.targets for target in targets):
        raise ValueError(f"target: got {_listed(targets)} for {name}, need one of {_listed(method.targets)}")
    if name == "operations" and not targets:
        raise ValueError("target: operations needs --ops-budget, the share of operations that may remain")
    if steps < 0 or (method.trains and not steps):
        raise ValueError(f"steps: got {steps}, but {name} prunes while it trains; give --steps")
    if method.trains is False and steps:
        raise ValueError(f"steps: got {steps}, but {name} does not train; leave --steps out")
    own = TARGETS[targets[0]] if targets else BLOCK_OPTIONS
    taken = options_with(method, targets[0] if targets else None)
    every = {option for each in METHODS.values() for option in each.options}
    tuning = [option for option in (*TUNING, *TEACHING) if option in given]
    if tuning and not steps:
        raise ValueError(f"{_listed(tuning)}: only with training; give --steps")
    unknown = [option for option in given if option in every - taken]
    if unknown:
        pattern = "" if own == BLOCK_OPTIONS else f" with {_listed(targets)}"
        takes = f"it takes {_listed(sorted(taken))}" if taken else "it takes no further option"
        raise ValueError(f"{_listed(unknown[:1])}: not an option of --method {name}{pattern}; {takes}")
    return method


def _listed(options: Iterable[str]) -> str:
    """Names of fields as they are written on the command line."""
    return ", ".join("--" + option.replace("_", "-") for option in options)


def _check_picture(picture: Path, given: Mapping[str, Any], force: bool) -> None:
    """Refuse a picture that would not be drawn, or that would overwrite a model."""
    if given["dry_run"]:
        raise ValueError("picture: a dry run writes nothing; leave out --picture or --dry-run")
    for option in ("out", "model"):
        if option in given and given[option].resolve() == picture.resolve():
            raise ValueError(f"picture: {picture} is the file of {option}; give another")
    writable_picture(picture, force, "picture")


def _pattern(given: Mapping[str, Any]) -> pruning.Pattern:
    if "nm" in given:
        return pruning.NofM(*parse_nm(given["nm"]), given.get("mask", "exact"))
    if "diagonal" in given:
        return pruning.BlockDiagonal(given["diagonal"])
    blocks = {name: given[name] for name in ("statistic", "gates") if name in given}
    sparsity = 0.0 if "ops_budget" in given else given.get("sparsity", 0.8)
    return pruning.Blocks(sparsity, parse_block(given.get("block", "1x1")), **blocks)


# --- pruning ------------------------------------------------------------------------------------------------


def _pruned(request: Request, network: Network, parts: Mapping[str, np.ndarray], report: Report) -> Network:
    """The pruned network; of a method that trains also trained, except in a dry run.

    parts : symbols of the train and the valid part of the text, where the request needs them
    """
    trains = request.steps > 0 and not request.given["dry_run"]
    task = _task(request, network, parts["train"], report) if trains else None
    if request.name == "operations":
        pruned = _to_budget(request, network, parts["valid"], report)
        return _trained(request, pruned, task, report) if task is not None else pruned
    if request.name == "adaprune":
        return pruning.adaprune(
            network,
            _calibration(parts["valid"]),
            request.pattern,
            exempt=request.exempt,
            report=lambda matrix, done, total: report("refitting", done, total, matrix),
        )[0]
    if task is None:
        return _at_once(request, network)
    if request.name == "iterative":
        return _in_rounds(request, network, task, report)
    return _trained(request, network, task, report)


def _task(request: Request, network: Network, train: np.ndarray, report: Report) -> LanguageModelling:
    """The task of the training, with what the teacher expects of its text."""
    vocabulary = Vocabulary.from_json(network.metadata["vocabulary"])
    return LanguageModelling(train, soft=request.teaching.targets(vocabulary, train, Settings(), report))


def _at_once(request: Request, network: Network) -> Network:
    pattern = request.pattern
    if isinstance(pattern, pruning.Blocks):
        options = request.some("scope", "statistic", "gates")
        return pruning.prune(network, pattern.sparsity, block=pattern.block, exempt=request.exempt, **options)
    return pruning.prune_to(network, pattern, exempt=request.exempt)


def _to_budget(request: Request, network: Network, valid: np.ndarray, report: Report) -> Network:
    assert isinstance(request.pattern, pruning.Blocks)
    return pruning.prune_to_operations(
        network,
        _calibration(valid),
        request.given["ops_budget"],
        block=request.pattern.block,
        exempt=request.exempt,
        report=lambda k, operations: report("measuring", k, MEASUREMENTS, f"{operations:,.0f} operations per step"),
        **request.some("criterion", "scope"),
    ).network


def _in_rounds(request: Request, network: Network, task: LanguageModelling, report: Report) -> Network:
    pattern = request.pattern
    assert isinstance(pattern, pruning.Blocks)
    rounds = pruning.iterative_pruning(
        network,
        lambda each: _trained(request, each, task, report),
        pattern.sparsity,
        block=pattern.block,
        exempt=request.exempt,
        **request.some("scope", "statistic", "rounds"),
    )
    for each in rounds:
        network = each.network
    return network


def _trained(request: Request, network: Network, task: LanguageModelling, report: Report) -> Network:
    """The trained network. Matrices that the schedule pruned are in the format of the pattern, others unchanged."""
    before = network.metadata.get("thresholds", RULES[0])
    tuning = {"steps": request.steps, "learning_rate": 3e-3, "thresholds": before} | request.some(*TUNING)
    try:
        trainer = Trainer(network, task, Settings(**tuning), pruning=request.schedule)
    except ValueError as error:
        if "thresholds" in request.given or not str(error).startswith("thresholds: "):
            raise
        raise ValueError(f"{error} (the model file says {before!r}; give --thresholds)") from None

    def quality(p: Progress) -> str:
        return f"{p.bits:.3f} bits" if task.soft is None else f"{p.loss:.3f} nats with soft targets"

    trained = trainer.run(lambda p: report("pruning", p.step, request.steps, f"{quality(p)}, {p.sparsity:.0%} pruned"))
    chosen = request.schedule.matrices(trainer.model.parameters) if request.schedule is not None else ()
    masks = {name: trainer.model.masks[name] for name in chosen}
    return pruning.after_training(trained, network, masks, request.pattern)


def _calibration(valid: np.ndarray) -> np.ndarray:
    """(steps, streams): the beginning of the validation text in parallel streams, less where the text is short."""
    streams = min(CALIBRATION[1], len(valid))
    steps = min(CALIBRATION[0], len(valid) // streams)
    return np.ascontiguousarray(valid[: steps * streams].reshape(streams, steps).T)


# --- results ------------------------------------------------------------------------------------------------


def _budget(request: Request, network: Network, pruned: Network, valid: np.ndarray) -> dict[str, Any]:
    """The share of the effective operations that remains, and whether it is within the budget."""
    inputs, budget = _calibration(valid), request.given["ops_budget"]
    share = _operations(pruned, inputs) / _operations(network, inputs)
    return {"budget": budget, "budget_share": share, "budget_held": share <= budget}


def _operations(network: Network, inputs: np.ndarray) -> int:
    """Effective operations of a run over these inputs."""
    return counting.count(network, simulate(network, inputs, record="events")).total.effective


def _figures(network: Network, valid: np.ndarray | None, report: Callable) -> dict[str, Any]:
    matrices = network.matrices().values()
    figures = {
        "weights": sum(w.nnz for w in matrices),
        "density": sum(w.nnz for w in matrices) / sum(w.shape[0] * w.shape[1] for w in matrices),
    }
    if valid is None:
        return figures
    from eventrnn.training.evaluation import evaluate_text

    found = evaluate_text(network, valid, report=lambda stage, done, total: report(stage, done, total, ""))
    figures |= {"bits": found["bits_per_symbol"], "activity": found["activity"]}
    work = ("effective_ops_per_step", "executed_ops_per_step", "selection_ops_per_step")
    return figures | {name: found[name] for name in work if name in found}


def _file_size(network: Network) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        io.save(network, path)
        return path.stat().st_size


def _show(summary: dict, before: dict, after: dict, options: PruneOptions) -> None:
    if options.as_json:
        sides = {f"{name}_{side}": fs[name] for name in after for side, fs in (("before", before), ("after", after))}
        print(as_line(summary | sides))
        return
    title = f"wrote {options.out} ({summary['method']})"
    if summary["dry_run"]:
        how = "magnitude, at once" if METHODS[summary["method"]].trains else summary["method"]
        title = f"dry run: nothing is written, nothing was trained ({how})"
    table = Table("", "before", "after", "before / after", title=printable(title))
    for name, value in after.items():
        numbers = [f"{x:,}" if isinstance(x, int) else f"{x:,.4g}" for x in (before[name], value)]
        table.add_row(name.replace("_", " "), *numbers, f"{before[name] / value:.2f}" if value else "")
    console().print(table)
    print(f"format: {summary['format']}; storage: {summary['storage']}")
    if "budget" in summary:
        held = "yes" if summary["budget_held"] else "no"
        share, budget = summary["budget_share"], summary["budget"]
        print(f"budget held: {held}, {share:.1%} of the operations measured, {budget:.1%} asked")
    if "bits" not in after:
        print("give --text to see bits per symbol, activity and operations before and after")
