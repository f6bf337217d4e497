"""`eventrnn prune`: every way of pruning, with a table of what it changed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from eventrnn import counting, io, pruning
from eventrnn.cli.options import (
    Force,
    Json,
    Model,
    encoded,
    parse_block,
    takes,
    writable_file,
    writable_picture,
)
from eventrnn.cli.terminal import as_line, progress
from eventrnn.network import Network
from eventrnn.pruning.magnitude import GATES, SCOPES, STATISTICS
from eventrnn.pruning.nm import METHODS as MASKS
from eventrnn.pruning.operations import check_budget
from eventrnn.pruning.patterns import parse_nm
from eventrnn.simulation import simulate
from eventrnn.training.thresholds import RULES, check_rule


@dataclass(frozen=True)
class Way:
    """One method: what it does, what says how far it goes, the options it knows, and whether it trains."""

    words: str
    targets: tuple[str, ...]
    options: tuple[str, ...] = ()
    trains: bool | None = False
    reads: bool = False


BLOCKS = ("block", "scope", "statistic", "gates")

#: name -> way; `trains` None: with --steps if you like
WAYS = {
    "magnitude": Way("the smallest, at once or gradually", ("sparsity", "nm"), (*BLOCKS, "mask"), None),
    "movement": Way("what training moves towards zero", ("sparsity",), BLOCKS, True),
    "threshold": Way("blocks under a rising threshold", ("sparsity",), ("block", "statistic"), True),
    "lasso": Way("group lasso, then that", ("sparsity",), ("block", "statistic", "strength"), True),
    "iterative": Way("in rounds, rewound after each", ("sparsity",), ("block", "scope", "statistic", "rounds"), True),
    "dynamic": Way(
        "masks that follow the weights", ("nm", "sparsity"), ("block", "statistic", "gates", "mask", "every"), True
    ),
    "regrow": Way("dropped here, regrown there", ("sparsity",), ("block", "statistic", "every"), True),
    "adaprune": Way(
        "what stays makes up for what goes", ("nm", "sparsity"), ("block", "statistic", "gates", "mask"), reads=True
    ),
    "operations": Way(
        "to a share of the measured operations", ("ops_budget",), ("block", "criterion"), None, reads=True
    ),
}

TUNING = ("learning_rate", "activity_cost", "thresholds", "batch", "window", "seed")

# Of the validation text, on which activity is measured and matrices are refitted: steps, and streams side by side.
CALIBRATION = (512, 8)

# The last step at which masks change, as a share of the steps.
SETTLED = 0.5


@dataclass(frozen=True)
class PruneOptions:
    """Options of `eventrnn prune`. None: the option was not given."""

    model: Model
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Model file to write.")] = None
    method: Annotated[
        str | None, typer.Option(help=f"{'; '.join(f'{name}: {way.words}' for name, way in WAYS.items())}. [magnitude]")
    ] = None
    sparsity: Annotated[float | None, typer.Option(help="Share of blocks to prune, in [0, 1). [0.8]")] = None
    nm: Annotated[
        str | None,
        typer.Option("--nm", metavar="N:M[:AXIS]", help="Keep n of each m along post (default), pre or both."),
    ] = None
    ops_budget: Annotated[
        float | None,
        typer.Option(
            "--ops-budget",
            help="Share of the effective operations that may remain, in (0, 1]. Training with --steps afterwards "
            "changes activity, and with it the operations: the last line says whether the budget still holds.",
        ),
    ] = None
    block: Annotated[
        str | None, typer.Option("--block", metavar="RxC", help="Block: presynaptic x postsynaptic. [1x1]")
    ] = None
    scope: Annotated[str | None, typer.Option(help=f"Share of each matrix or of all: {', '.join(SCOPES)}.")] = None
    statistic: Annotated[str | None, typer.Option(help=f"Rank blocks by: {', '.join(STATISTICS)}.")] = None
    gates: Annotated[str | None, typer.Option(help=f"Blocks over gates: {', '.join(GATES)}.")] = None
    mask: Annotated[str | None, typer.Option(help=f"How to find masks along both: {', '.join(MASKS)}.")] = None
    criterion: Annotated[str | None, typer.Option(help=f"What goes first: {', '.join(pruning.CRITERIA)}. [return]")] = (
        None
    )
    strength: Annotated[float | None, typer.Option(help="Of the group lasso. [0.01]")] = None
    rounds: Annotated[int | None, typer.Option(help="Of iterative pruning. [5]")] = None
    every: Annotated[
        int | None,
        typer.Option(help="Steps between two changes of the masks, which settle after half of the training. [40]"),
    ] = None
    exempt: Annotated[list[str] | None, typer.Option(help="Leave this matrix, or layer, alone; repeat.")] = None
    steps: Annotated[int, typer.Option(help="Updates of training, a round if there are rounds; 0 for none.")] = 0
    text: Annotated[
        str | None, typer.Option("--text", help="To train, calibrate and measure on, as for train. [builtin]")
    ] = None
    learning_rate: Annotated[float | None, typer.Option(help="Of the training. [0.003]")] = None
    activity_cost: Annotated[float | None, typer.Option(help="Of the training, as for train. [0]")] = None
    thresholds: Annotated[
        str | None,
        typer.Option(
            help=f"How the training learns thresholds: {', '.join(RULES)}. [as before, else {RULES[0]}]",
        ),
    ] = None
    batch: Annotated[int | None, typer.Option(help="Of the training, as for train. [32]")] = None
    window: Annotated[int | None, typer.Option(help="Of the training, as for train. [64]")] = None
    seed: Annotated[int | None, typer.Option(help="Of the training. [0]")] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the table, write nothing; prune at once, without the training.")
    ] = False
    picture: Annotated[Path | None, typer.Option(help="Draw the masks that are left into this .png, .pdf or .svg.")] = (
        None
    )
    force: Force = False
    as_json: Json = False


@takes(PruneOptions)
def prune(options: PruneOptions) -> None:
    """Prune a model: at once, while training, to N of each M, or to a budget of operations."""
    given = {name: value for name, value in asdict(options).items() if value is not None}
    name = options.method or ("operations" if options.ops_budget is not None else "magnitude")
    way = _way(name, given, options.steps, options.text)
    check_rule(given.get("thresholds", RULES[0]))
    if options.out is None and not options.dry_run:
        raise ValueError("out: got none; give a file to write, or --dry-run")
    if options.out is not None:
        writable_file(options.out, options.force)
    if options.picture is not None:
        _check_picture(options.picture, given, options.force)
    pattern = _pattern(given)
    schedule = (
        _schedule(name, pattern, given, options.steps)
        if options.steps and name not in ("iterative", "operations")
        else None
    )
    if name == "operations":
        check_budget(given["ops_budget"], given.get("criterion", "return"))
    network = io.load(options.model)
    parts, budget = {}, {}
    if options.steps or way.reads or options.text is not None:
        parts = {part: encoded(network, options.text or "builtin", part) for part in ("train", "valid")}
    with progress() as report:
        if name == "operations":
            pruned = _to_budget(network, parts["valid"], given, report)
        elif name == "adaprune":
            pruned, _ = pruning.adaprune(
                network, _calibration(parts["valid"]), pattern, exempt=_exempt(given),
                report=lambda matrix, done, total: report("refitting", done, total, matrix),
            )  # fmt: skip
        elif options.dry_run or (not way.trains and not (options.steps and name == "magnitude")):
            pruned = _at_once(network, pattern, given)
        else:
            pruned = _trained(name, network, parts["train"], schedule, pattern, given, options.steps, report)
        if name == "operations":
            if options.steps and not options.dry_run:
                pruned = _tuned(pruned, parts["train"], None, pattern, given, options.steps, report)
            inputs, asked = _calibration(parts["valid"]), given["ops_budget"]
            share = _operations(pruned, inputs) / _operations(network, inputs)
            budget = {"budget": asked, "budget_share": share, "budget_held": share <= asked}
        before, after = (_figures(each, parts.get("valid"), report) for each in (network, pruned))
    before["file_bytes"] = options.model.stat().st_size
    if options.out is not None and not options.dry_run:
        io.save(pruned, options.out, overwrite=options.force)
        after["file_bytes"] = options.out.stat().st_size
    else:
        after["file_bytes"] = _file_size(pruned)
    if options.picture is not None:
        from eventrnn import plots

        plots.mask_map(pruned.matrices(), title=f"{options.model.name}, {name}: {pattern}", path=options.picture)
    words = {"method": name, "format": ", ".join(sorted({w.name for w in pruned.matrices().values()}))}
    words["storage"] = ", ".join(sorted({w.storage for w in pruned.matrices().values()}))
    _show(
        words | budget | {"steps": 0 if options.dry_run else options.steps, "dry_run": options.dry_run},
        before,
        after,
        options.out,
        options.as_json,
    )


# --- options ------------------------------------------------------------------------------------------------


def _way(name: str, given: Mapping[str, Any], steps: int, text: str | None) -> Way:
    """The method, if all that was given means something to it. Raises ValueError."""
    if name not in WAYS:
        raise ValueError(f"method: got {name!r}, need one of {', '.join(WAYS)}")
    way = WAYS[name]
    targets = [target for target in ("sparsity", "nm", "ops_budget") if target in given]
    if len(targets) > 1 or any(target not in way.targets for target in targets):
        raise ValueError(
            f"target: got {', '.join(_option(t) for t in targets)} for {name}, need one of "
            f"{', '.join(_option(t) for t in way.targets)}"
        )
    if name == "operations" and not targets:
        raise ValueError("target: operations needs --ops-budget, the share of operations that may remain")
    if steps < 0 or (way.trains and not steps):
        raise ValueError(f"steps: got {steps}, but {name} prunes while it trains; give --steps")
    if way.trains is False and steps:
        raise ValueError(f"steps: got {steps}, but {name} does not train; leave --steps out")
    known = {*way.options, *(TUNING if steps else ())}
    if "nm" in given:
        known -= set(BLOCKS)
    else:
        known -= {"mask"}
    every = {option for each in WAYS.values() for option in each.options} | set(TUNING)
    idle = [option for option in given if option in every - known]
    if not steps and any(option in TUNING for option in idle):
        raise ValueError(f"steps: 0, so nothing is fine-tuned and {', '.join(idle)} mean nothing; give --steps")
    if idle:
        raise ValueError(f"{_option(idle[0])} means nothing to {name}{' with --nm' if 'nm' in given else ''}")
    return way


def _check_picture(picture: Path, given: Mapping[str, Any], force: bool) -> None:
    """Refuse a picture that would not be drawn, or would be drawn over a model."""
    if given["dry_run"]:
        raise ValueError("picture: a dry run writes nothing; leave out --picture or --dry-run")
    for option in ("out", "model"):
        if option in given and given[option].resolve() == picture.resolve():
            raise ValueError(f"picture: {picture} is the file of {option}; give another")
    writable_picture(picture, force, "picture")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _pattern(given: Mapping[str, Any]) -> pruning.Pattern:
    if "nm" in given:
        return pruning.NofM(*parse_nm(given["nm"]), given.get("mask", "exact"))
    blocks = {name: given[name] for name in ("statistic", "gates") if name in given}
    sparsity = 0.0 if "ops_budget" in given else given.get("sparsity", 0.8)
    return pruning.Blocks(sparsity, parse_block(given.get("block", "1x1")), **blocks)


def _exempt(given: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(given.get("exempt", ()))


# --- the ways -----------------------------------------------------------------------------------------------


def _at_once(network: Network, pattern: pruning.Pattern, given: Mapping[str, Any]) -> Network:
    if isinstance(pattern, pruning.Blocks):
        options = {name: given[name] for name in ("scope", "statistic", "gates") if name in given}
        return pruning.prune(network, pattern.sparsity, block=pattern.block, exempt=_exempt(given), **options)
    return pruning.prune_to(network, pattern, exempt=_exempt(given))


def _to_budget(network: Network, valid: np.ndarray, given: Mapping[str, Any], report: Callable) -> Network:
    return pruning.prune_to_operations(
        network, _calibration(valid), given["ops_budget"], criterion=given.get("criterion", "return"),
        block=parse_block(given.get("block", "1x1")), exempt=_exempt(given),
        report=lambda k, operations: report("measuring", k, 10, f"{operations:,.0f} operations a step"),
    ).network  # fmt: skip


def _trained(
    name: str,
    network: Network,
    train: np.ndarray,
    schedule: pruning.Pruning | None,
    pattern: pruning.Pattern,
    given: Mapping[str, Any],
    steps: int,
    report: Callable,
) -> Network:
    if name == "iterative":
        assert isinstance(pattern, pruning.Blocks)
        options = {option: given[option] for option in ("scope", "statistic", "rounds") if option in given}
        found = network
        for each in pruning.iterative_pruning(
            network, lambda net: _tuned(net, train, None, pattern, given, steps, report), pattern.sparsity,
            block=pattern.block, exempt=_exempt(given), **options,
        ):  # fmt: skip
            found = each.network
        return found
    return _tuned(network, train, schedule, pattern, given, steps, report)


def _schedule(name: str, pattern: pruning.Pattern, given: Mapping[str, Any], steps: int) -> pruning.Pruning:
    """What the trainer is given. Raises ValueError for too few steps."""
    end, exempt = int(steps * SETTLED), _exempt(given)
    every = {"every": given["every"]} if "every" in given else {}
    if name == "magnitude" and not isinstance(pattern, pruning.Blocks):
        return pruning.StaticMasks(pattern, exempt=exempt)
    if end < 1:
        raise ValueError(f"steps: got {steps}, but masks change in the first half of the training; give at least 2")
    if name == "dynamic":
        return pruning.DynamicMasks(pattern, 0, end, exempt=exempt, **every)
    assert isinstance(pattern, pruning.Blocks)
    common = {"block": pattern.block, "start": 0, "end": end, "exempt": exempt}
    ranked = {option: given[option] for option in ("scope", "statistic", "gates") if option in given}
    if name == "magnitude":
        return pruning.GradualPruning(pattern.sparsity, **common, **ranked)
    if name == "movement":
        start = min(end - 1, max(1, end // 4))
        return pruning.MovementPruning(pattern.sparsity, **common | {"start": start}, **ranked)
    if name == "regrow":
        return pruning.RegrownMasks(pattern.sparsity, **common, **ranked, **every)
    threshold = pruning.ThresholdPruning(ramp=end // 2, sparsity=pattern.sparsity, **common, **ranked)
    if name == "threshold":
        return threshold
    return pruning.Combined(pruning.GroupLasso(given.get("strength", 0.01), **common), threshold)


def _tuned(
    network: Network,
    train: np.ndarray,
    schedule: pruning.Pruning | None,
    pattern: pruning.Pattern,
    given: Mapping[str, Any],
    steps: int,
    report: Callable,
) -> Network:
    """Trained, in the formats and storages it came in; what the schedule pruned, in the pattern's."""
    from eventrnn.training import Settings, Trainer

    before = network.metadata.get("thresholds", RULES[0])
    tuning = {"steps": steps, "learning_rate": 3e-3, "thresholds": before}
    tuning |= {name: given[name] for name in TUNING if name in given}
    try:
        trainer = Trainer(network, train, Settings(**tuning), pruning=schedule)
    except ValueError as error:
        if "thresholds" in given or not str(error).startswith("thresholds: "):
            raise
        raise ValueError(f"{error} (the model file says {before!r}; give --thresholds)") from None
    trained = trainer.run(lambda p: report("pruning", p.step, steps, f"{p.bits:.3f} bits, {p.sparsity:.0%} pruned"))
    chosen = schedule.matrices(trainer.model.parameters) if schedule is not None else ()
    masks = {name: trainer.model.masks[name] for name in chosen}
    return pruning.after_training(trained, network, masks, pattern)


def _calibration(valid: np.ndarray) -> np.ndarray:
    """(steps, streams) of the text, as many as there are."""
    streams = min(CALIBRATION[1], len(valid))
    steps = min(CALIBRATION[0], len(valid) // streams)
    return np.ascontiguousarray(valid[: steps * streams].reshape(streams, steps).T)


def _operations(network: Network, inputs: np.ndarray) -> int:
    """Effective ones, of a run over these inputs."""
    return counting.count(network, simulate(network, inputs, record="events")).total.effective


# --- what came out ------------------------------------------------------------------------------------------


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
    return figures | {
        "bits": found["bits_per_symbol"],
        "activity": found["activity"],
        "effective_ops_per_step": found["effective_ops_per_step"],
        "executed_ops_per_step": found["executed_ops_per_step"],
    }


def _file_size(network: Network) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        io.save(network, path)
        return path.stat().st_size


def _show(words: dict, before: dict, after: dict, out: Path | None, as_json: bool) -> None:
    if as_json:
        sides = {f"{name}_{side}": fs[name] for name in after for side, fs in (("before", before), ("after", after))}
        print(as_line(words | sides))
        return
    title = "dry run: nothing is written, nothing was trained" if words["dry_run"] else f"wrote {out}"
    table = Table("", "before", "after", "before / after", title=f"{title} ({words['method']})")
    for name, value in after.items():
        numbers = [f"{x:,}" if isinstance(x, int) else f"{x:,.4g}" for x in (before[name], value)]
        table.add_row(name.replace("_", " "), *numbers, f"{before[name] / value:.2f}" if value else "")
    Console().print(table)
    print(f"format: {words['format']}; storage: {words['storage']}")
    if "budget" in words:
        held = "yes" if words["budget_held"] else "no"
        print(
            f"budget held: {held}, {words['budget_share']:.1%} of the operations measured, {words['budget']:.1%} asked"
        )
    if "bits" not in after:
        print("give --text to see what it does to bits per symbol, activity and operations")
