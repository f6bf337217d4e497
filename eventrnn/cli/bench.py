"""`eventrnn bench`: measure speed beside baselines, all sides in one run."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from eventrnn.bench.case import LAYER_BASELINES, PRODUCT_BASELINES
from eventrnn.bench.machine import device, versions
from eventrnn.cli.options import Json, Seed, Threads, parse_block, takes
from eventrnn.cli.terminal import as_line, progress, show
from eventrnn.pruning.patterns import parse_nm
from eventrnn.weights import FORMATS, STORAGES
from eventrnn.weights.nm import AXES

AGAINST = (
    f"Rivals, separated by commas: of the whole layer {', '.join(LAYER_BASELINES)} (torch is nn.GRU); of one product "
    f"{', '.join(PRODUCT_BASELINES)}; on a GPU cudnn, evnn-style or cusparse; or "
    "none. [torch; cudnn]"
)

DEFAULT_BASELINE = {"cpu": "torch", "cuda": "cudnn"}

bench_app = typer.Typer(rich_markup_mode=None, help="Measure speed, every side in one run.")


@bench_app.callback()
def bench() -> None:
    """Measure speed, every side in one run."""


@dataclass(frozen=True)
class InferenceOptions:
    """Options of `eventrnn bench inference`; the fields of `bench.Case`, sizes as text."""

    backend: Annotated[str, typer.Option(help="Engine to time: cpu or cuda.")] = "cpu"
    hidden: Annotated[int, typer.Option(help="Units, and inputs, of a layer.")] = 1350
    layers: Annotated[int, typer.Option(help="Layers.")] = 1
    batch: Annotated[int, typer.Option(help="Samples side by side.")] = 1
    activity: Annotated[float, typer.Option(help="Share of units that fire; thresholds are set to reach it.")] = 0.1
    sparsity: Annotated[
        float | None, typer.Option(help="Share of blocks or weights left out. [0.9; what dense and nm say themselves]")
    ] = None
    format: Annotated[str, typer.Option(help=f"Weight format: {', '.join(FORMATS)}.")] = "block"
    block: Annotated[str | None, typer.Option("--block", metavar="RxC", help="Block of the block format. [1x64]")] = (
        None
    )
    nm: Annotated[
        str | None, typer.Option("--nm", metavar="N:M[:pre]", help="Of the nm format: n kept of each m, and the axis.")
    ] = None
    dtype: Annotated[str, typer.Option(help=f"Storage of the weights: {', '.join(STORAGES)}.")] = "float32"
    variant: Annotated[str, typer.Option(help="Equations: evnn or paper.")] = "evnn"
    exact: Annotated[bool, typer.Option(help="On a GPU: without it, tensor cores where measured faster.")] = True
    threads: Threads = 1
    against: Annotated[str | None, typer.Option(help=AGAINST)] = None
    steps: Annotated[int, typer.Option(help="Time steps a run.")] = 200
    repeats: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.")] = 15
    seed: Seed = 0
    as_json: Json = False


@bench_app.command()
@takes(InferenceOptions)
def inference(given: InferenceOptions) -> None:
    """Time whole sequences of a random network beside its rivals: a dense network, or who does one of its products."""
    from eventrnn import bench

    case = _case(given) | {"against": given.against or DEFAULT_BASELINE.get(given.backend, "none")}
    case["nm"] = parse_nm(given.nm, AXES) if given.nm else None
    with progress() as report:
        result = bench.inference(report=lambda stage: report(stage, 0, 1, ""), **case)
    show("inference", result, given.as_json)


@dataclass(frozen=True)
class TrainingOptions:
    """Options of `eventrnn bench training`; the fields of `bench.TrainingCase`, sizes as text, and the engine."""

    backend: Annotated[str, typer.Option(help="Engine to time: cpu.")] = "cpu"
    hidden: Annotated[int, typer.Option(help="Units, and inputs, of the layer.")] = 1350
    batch: Annotated[int, typer.Option(help="Samples side by side.")] = 20
    steps: Annotated[int, typer.Option(help="Time steps of a window.")] = 70
    activity: Annotated[float, typer.Option(help="Share of units that fire; thresholds are set to reach it.")] = 0.1
    support: Annotated[
        float, typer.Option(help="Share of units with a slope in a step; the surrogate's width is set to reach it.")
    ] = 0.1
    sparsity: Annotated[float, typer.Option(help="Share of blocks left out.")] = 0.0
    block: Annotated[str | None, typer.Option("--block", metavar="RxC", help="Block, with a sparsity. [1x64]")] = None
    backward: Annotated[str, typer.Option(help="Products: auto, sparse or dense.")] = "auto"
    input_gradient: Annotated[
        str,
        typer.Option(
            help="Of the inputs: open (where a layer below could use it; PyTorch makes all of it), all, none."
        ),
    ] = "open"
    threads: Threads = 1
    against: Annotated[
        str,
        typer.Option(
            help="Rivals, separated by commas: torch (nn.GRU), torch-loop, torch-loop-indexed (this cell), or none."
        ),
    ] = "torch"
    repeats: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.")] = 7
    seed: Seed = 0
    as_json: Json = False


@bench_app.command()
@takes(TrainingOptions)
def training(given: TrainingOptions) -> None:
    """Time a window forward and back, one random layer, beside PyTorch; all gradients, no optimiser."""
    if given.backend != "cpu":
        raise ValueError(f"backend: got {given.backend!r}, need cpu")
    from eventrnn import bench

    case = _case(given)
    del case["backend"]
    with progress() as report:
        result = bench.training(report=lambda stage: report(stage, 0, 1, ""), **case)
    show("training", result, given.as_json)


def _case(given: InferenceOptions | TrainingOptions) -> dict[str, Any]:
    """The options as keyword arguments of the library, the block parsed, without `as_json`."""
    case = asdict(given)
    del case["as_json"]
    return case | {"block": parse_block(given.block) if given.block else None}


@bench_app.command()
def crossover(
    measure: Annotated[bool, typer.Option("--measure", help="Measure again, whatever is in the cache.")] = False,
    check: Annotated[
        bool, typer.Option("--verify", help="Time every way beside what auto picks; some minutes.")
    ] = False,
    hidden: Annotated[int, typer.Option(help="Units of the products in the table, and of --verify.")] = 1350,
    repeats: Annotated[int, typer.Option(help="Interleaved rounds of --verify; medians are compared.")] = 7,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Where the ways of a product cross on this machine: measured once (a minute), kept, looked up by "auto"."""
    for name, value, least in (("hidden", hidden, 16), ("repeats", repeats, 3)):
        if value < least:
            raise ValueError(f"{name}: got {value}, need a whole number >= {least}")
    from eventrnn.bench.crossover import ACTIVITIES, case_name, picks, verify
    from eventrnn.cpu import crossover as crossover_map

    with progress() as report:
        measuring, verifying = _stage(report, "measuring"), _stage(report, "verifying")
        found = crossover_map.save(crossover_map.measure(measuring)) if measure else crossover_map.load(measuring)
        checked = []
        for line in verify(found, hidden, repeats, verifying, seed) if check else ():
            checked.append(line)
            ratios = f"exact {line['exact_ratio']:.2f} ({line['picked']})"
            ratios += f", not exact {line['inexact_ratio']:.2f} ({line['picked_inexact']})"
            print(f"{case_name(line)}: {ratios}", file=sys.stderr)
    picked = picks(found, hidden)
    if as_json:
        record = {"cache": str(crossover_map.cache_path()), "times": found.times, "picks": picked, "verified": checked}
        print(as_line(record | {"device": device(), "versions": versions()}))
        return
    table = Table("weights", "drives", *(f"{a:.0%}" for a in ACTIVITIES), title="what auto picks, by activity")
    for line in picked:
        table.add_row(line["weights"], str(line["batch"]), *line["exact"])
    Console().print(table)
    if checked:
        worst = {kind: min(checked, key=lambda line: line[kind]) for kind in ("exact_ratio", "inexact_ratio")}
        for kind, line in worst.items():
            short = sum(each[kind] < 0.95 for each in checked)
            print(
                f"{kind.replace('_', ' ')}: {line[kind]:.2f} of the best way at worst ({case_name(line)}); "
                f"{short} of {len(checked)} below 0.95"
            )
    print(f"map: {crossover_map.cache_path()}")


def _stage(report, stage: str):
    return lambda done, total, note: report(stage, done, total, note)


@bench_app.command()
def pruning(
    rows: Annotated[int, typer.Option(help="Presynaptic units of the matrix.")] = 4096,
    columns: Annotated[int, typer.Option(help="Postsynaptic rows of the matrix.")] = 4096,
    nm: Annotated[str, typer.Option("--nm", metavar="N:M", help="Kept of each m, in rows and columns.")] = "4:8",
    methods: Annotated[str, typer.Option(help="Of exact, greedy; separated by commas.")] = "exact,greedy",
    threads: Threads = 1,
    repeats: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.")] = 3,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time transposable N:M masks by every method, say how much they keep, beside what others report."""
    from eventrnn.bench import masks

    n, m, axis = parse_nm(nm)
    if axis != "post":
        raise ValueError(f"nm: got {nm!r}, but masks along both axes are timed; leave the axis out")
    with progress() as report:
        result = masks.masks(
            rows=rows, columns=columns, n=n, m=m, methods=tuple(methods.split(",")), threads=threads, repeats=repeats,
            seed=seed, report=lambda stage: report(stage, 0, 1, ""),
        )  # fmt: skip
    if as_json:
        print(as_line(result))
        return
    table = Table(
        *(
            "method",
            "matrix",
            "n:m",
            "seconds",
            "of processors",
            "µs a tile",
            "magnitude kept",
            "of the exact",
            "measured by",
        ),
        title=f"transposable masks, {threads} thread{'s' * (threads > 1)}, {result['device']}",
    )
    for name, line in result["methods"].items():
        share = "" if line["of_exact"] is None else f"{line['of_exact']:.4%}"
        times = (f"{line['seconds']:.3g}", f"{line['cpu_seconds']:.3g}", f"{line['us_per_tile']:.2f}")
        kept = (f"{line['kept_magnitude']:.2%}", share)
        table.add_row(name, result["matrix"], result["nm"], *times, *kept, "this run")
    for source, method, side, groups, seconds, machine in masks.LITERATURE:
        table.add_row(method, f"{side}x{side}", groups, f"{seconds:.3g}", "", "", "", "", f"{source}, {machine}")
    Console(width=max(150, Console().width)).print(table)
    print(f"masks of a tile: {', '.join(f'{k} {v:,}' for k, v in result['masks_of_a_tile'].items())}")
