"""`eventrnn bench`: measure speed beside baselines, all in one run."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

import typer
from rich.table import Table

from eventrnn.bench.case import GPU_BASELINES, LAYER_BASELINES, PRODUCT_BASELINES
from eventrnn.bench.machine import device, versions
from eventrnn.cli.options import Json, Seed, Threads, parse_block, takes
from eventrnn.cli.terminal import as_line, console, progress, show
from eventrnn.pruning.patterns import parse_nm
from eventrnn.weights import FORMATS, STORAGES
from eventrnn.weights.nm import AXES

AGAINST = (
    f"Baselines, separated by commas. For a whole layer: {', '.join(LAYER_BASELINES)} (torch is nn.GRU). For one "
    f"product: {', '.join(PRODUCT_BASELINES)}. On a GPU: {', '.join(GPU_BASELINES[:-1])}. Or none. "
    "[torch; on a GPU cudnn-persistent]"
)

DEFAULT_BASELINE = {"cpu": "torch", "cuda": "cudnn-persistent"}

bench_app = typer.Typer(
    rich_markup_mode=None, add_completion=False, help="Measure speed beside baselines, all in one run."
)


@bench_app.callback()
def bench() -> None:
    """Measure speed beside baselines, all in one run."""


@dataclass(frozen=True)
class InferenceOptions:
    """Options of `eventrnn bench inference`; the fields of `bench.Case`, sizes as text."""

    backend: Annotated[str, typer.Option(help="Engine to time: cpu or cuda.")] = "cpu"
    hidden: Annotated[int, typer.Option(help="Number of units, and of inputs, of a layer.")] = 1350
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 1
    batch: Annotated[int, typer.Option(help="Number of samples of a batch.")] = 1
    activity: Annotated[
        float, typer.Option(help="Share of units that fire in a step; thresholds are set to reach it.")
    ] = 0.1
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of blocks or weights that are zero. [0.9; dense and nm fix it themselves]"),
    ] = None
    format: Annotated[str, typer.Option(help=f"Weight format: {', '.join(FORMATS)}.")] = "block"
    block: Annotated[
        str | None, typer.Option("--block", metavar="RxC", help="Size of a block of the block format. [1x64]")
    ] = None
    nm: Annotated[
        str | None,
        typer.Option("--nm", metavar="N:M[:pre]", help="Weights kept of each group of the nm format, and its axis."),
    ] = None
    dtype: Annotated[str, typer.Option(help=f"Storage type of the weights: {', '.join(STORAGES)}.")] = "float32"
    variant: Annotated[str, typer.Option(help="Variant of the equations: evnn or paper.")] = "evnn"
    exact: Annotated[
        bool,
        typer.Option(
            help="--no-exact lets a GPU use tensor cores where they are measured to be faster, and a CPU multiply int8 "
            "blocks of 64 columns in integers."
        ),
    ] = True
    threads: Threads = 1
    against: Annotated[str | None, typer.Option(help=AGAINST)] = None
    steps: Annotated[int, typer.Option(help="Number of time steps of a run.")] = 200
    repeats: Annotated[int, typer.Option(help="Number of interleaved rounds; medians are reported.")] = 15
    seed: Seed = 0
    as_json: Json = False


@bench_app.command()
@takes(InferenceOptions)
def inference(given: InferenceOptions) -> None:
    """Time whole sequences of a random network beside a dense one, or one of its products beside other libraries."""
    from eventrnn import bench

    case = _case(given) | {"against": given.against or DEFAULT_BASELINE.get(given.backend, "none")}
    case["nm"] = parse_nm(given.nm, AXES) if given.nm else None
    with progress() as report:
        result = bench.inference(report=lambda stage: report(stage, 0, 1, ""), **case)
    show("inference", result, given.as_json)


@dataclass(frozen=True)
class TrainingOptions:
    """Options of `eventrnn bench training`; the fields of `bench.TrainingCase` or `bench.GpuTrainingCase`, sizes as
    text, and the engine."""

    backend: Annotated[str, typer.Option(help="Engine to time: cpu or cuda.")] = "cpu"
    hidden: Annotated[int, typer.Option(help="Number of units, and of inputs, of the layer.")] = 1350
    batch: Annotated[int | None, typer.Option(help="Number of samples of a batch. [20; cuda: 64]")] = None
    steps: Annotated[int, typer.Option(help="Number of time steps of a window.")] = 70
    activity: Annotated[
        float, typer.Option(help="Share of units that fire in a step; thresholds are set to reach it.")
    ] = 0.1
    support: Annotated[
        float,
        typer.Option(
            help="Share of units with a non-zero surrogate derivative; the surrogate's width is set to reach it."
        ),
    ] = 0.1
    sparsity: Annotated[float, typer.Option(help="Share of blocks that are zero.")] = 0.0
    block: Annotated[
        str | None, typer.Option("--block", metavar="RxC", help="Size of a block, if a sparsity is given. [1x64]")
    ] = None
    nm: Annotated[
        str | None,
        typer.Option("--nm", metavar="N:M[:pre]", help="Weights kept of each group, in place of blocks."),
    ] = None
    backward: Annotated[str, typer.Option(help="Kernels of the backward products: auto, sparse or dense.")] = "auto"
    input_gradient: Annotated[
        str,
        typer.Option(
            help="Input gradient to compute: open (where a layer below could use it), all (as PyTorch does) or none. "
            "[open; beside torch-bridge all]",
            show_default=False,
        ),
    ] = ""
    precision: Annotated[
        str | None, typer.Option(help="Only with cuda: factors of products in bfloat16, tf32 or float32. [bfloat16]")
    ] = None
    threads: Threads = 1
    against: Annotated[
        str | None,
        typer.Option(
            help="Baselines, separated by commas: torch (nn.GRU), torch-loop, torch-loop-indexed (this cell), "
            "torch-bridge, dense (this engine without pruning); with cuda cudnn (nn.GRU and nn.LSTM), evnn-style, "
            "torch-loop, torch-bridge; or none. [torch; cuda: cudnn]"
        ),
    ] = None
    repeats: Annotated[int, typer.Option(help="Number of interleaved rounds; medians are reported.")] = 7
    seed: Seed = 0
    as_json: Json = False


@bench_app.command()
@takes(TrainingOptions)
def training(given: TrainingOptions) -> None:
    """Time one window of a random layer, forward and backward with all gradients, beside PyTorch."""
    from eventrnn import bench

    if given.backend not in ("cpu", "cuda"):
        raise ValueError(f"backend: got {given.backend!r}, need cpu or cuda")
    case = _case(given) | {"nm": parse_nm(given.nm, AXES) if given.nm else None}
    chosen = {name: value for name, value in case.items() if value is not None and name != "backend"}
    measure, kind = bench.training, bench.TrainingCase
    if given.backend == "cuda":
        from eventrnn.bench import gpu_training

        measure, kind = gpu_training.training, gpu_training.GpuTrainingCase
    case = {name: chosen.pop(name) for name in list(chosen) if name in {field.name for field in fields(kind)}}
    for name, value in chosen.items():
        if value != getattr(TrainingOptions(), name):
            raise ValueError(f"{name}: got {value}, which does not apply to backend {given.backend!r}; leave it out")
    with progress() as report:
        result = measure(report=lambda stage: report(stage, 0, 1, ""), **case)
    show("training", result, given.as_json)


def _case(given: InferenceOptions | TrainingOptions) -> dict[str, Any]:
    """The options as keyword arguments of the library: the block is parsed, and `as_json` is left out."""
    case = asdict(given)
    del case["as_json"]
    return case | {"block": parse_block(given.block) if given.block else None}


@bench_app.command()
def crossover(
    measure: Annotated[bool, typer.Option("--measure", help="Measure again and replace the cached map.")] = False,
    check: Annotated[
        bool, typer.Option("--verify", help="Time every kernel beside the one that auto selects; takes some minutes.")
    ] = False,
    hidden: Annotated[int, typer.Option(help="Number of units of the products in the table and of --verify.")] = 1350,
    repeats: Annotated[int, typer.Option(help="Number of interleaved rounds of --verify; medians are compared.")] = 7,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure which kernel is the fastest for which product, and cache the map for the backend auto; takes a minute."""
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
    table = Table("weights", "drives", *(f"{a:.0%}" for a in ACTIVITIES), title="kernel that auto selects, by activity")
    for line in picked:
        table.add_row(line["weights"], str(line["batch"]), *line["exact"])
    console().print(table)
    if checked:
        worst = {kind: min(checked, key=lambda line: line[kind]) for kind in ("exact_ratio", "inexact_ratio")}
        for kind, line in worst.items():
            short = sum(each[kind] < 0.95 for each in checked)
            print(
                f"{kind.replace('_', ' ')}: {line[kind]:.2f} of the fastest kernel at worst ({case_name(line)}); "
                f"{short} of {len(checked)} below 0.95"
            )
    print(f"map: {crossover_map.cache_path()}")


def _stage(report, stage: str):
    return lambda done, total, note: report(stage, done, total, note)


@bench_app.command()
def pruning(
    rows: Annotated[int, typer.Option(help="Number of rows (presynaptic units) of the matrix.")] = 4096,
    columns: Annotated[int, typer.Option(help="Number of columns of the matrix.")] = 4096,
    nm: Annotated[
        str, typer.Option("--nm", metavar="N:M", help="Weights kept of each m, in rows and in columns.")
    ] = "4:8",
    methods: Annotated[str, typer.Option(help="Methods, separated by commas: exact, greedy.")] = "exact,greedy",
    threads: Threads = 1,
    repeats: Annotated[int, typer.Option(help="Number of interleaved rounds; medians are reported.")] = 3,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time transposable N:M masks by every method, and show the magnitude they keep beside published times."""
    from eventrnn.bench import masks

    n, m, axis = parse_nm(nm)
    if axis != "post":
        raise ValueError(f"nm: got {nm!r}, but masks along both axes are timed; leave the axis out")
    with progress() as report:
        result = masks.masks(
            rows=rows,
            columns=columns,
            n=n,
            m=m,
            methods=tuple(methods.split(",")),
            threads=threads,
            repeats=repeats,
            seed=seed,
            report=lambda stage: report(stage, 0, 1, ""),
        )
    if as_json:
        print(as_line(result))
        return
    table = Table(
        *(
            "method",
            "matrix",
            "n:m",
            "seconds",
            "processor seconds",
            "µs per tile",
            "magnitude kept",
            "of the optimum",
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
    console(least_width=150).print(table)
    print(f"masks of a tile: {', '.join(f'{k} {v:,}' for k, v in result['masks_of_a_tile'].items())}")
