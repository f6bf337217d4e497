"""`eventrnn bench`: speed, every side in one run."""

from __future__ import annotations

from typing import Annotated

import typer

from eventrnn.bench.case import LAYER_RIVALS, PRODUCT_RIVALS
from eventrnn.cli.options import Json, Seed, Threads, parse_block, parse_nm
from eventrnn.terminal import progress, show
from eventrnn.weights import FORMATS, STORAGES

AGAINST = (
    f"Rivals, separated by commas: of the whole layer {', '.join(LAYER_RIVALS)} (torch is nn.GRU); of one product "
    f"{', '.join(PRODUCT_RIVALS)}; or none."
)

bench_app = typer.Typer(rich_markup_mode=None, help="Measure speed, every side in one run.")


@bench_app.callback()
def bench() -> None:
    """Measure speed, every side in one run."""


@bench_app.command()
def inference(
    backend: Annotated[str, typer.Option(help="Engine to time: cpu.")] = "cpu",
    hidden: Annotated[int, typer.Option(help="Units, and inputs, of a layer.")] = 1350,
    layers: Annotated[int, typer.Option(help="Layers.")] = 1,
    batch: Annotated[int, typer.Option(help="Samples side by side.")] = 1,
    activity: Annotated[float, typer.Option(help="Share of units that fire; thresholds are set to reach it.")] = 0.1,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of blocks or weights left out. [0.9; what dense and nm say themselves]")
    ] = None,
    format: Annotated[str, typer.Option(help=f"Weight format: {', '.join(FORMATS)}.")] = "block",
    block: Annotated[
        str | None, typer.Option("--block", metavar="RxC", help="Block of the block format. [1x64]")
    ] = None,
    nm: Annotated[
        str | None, typer.Option("--nm", metavar="N:M[:pre]", help="Of the nm format: n kept of each m, and the axis.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Storage of the weights: {', '.join(STORAGES)}.")] = "float32",
    variant: Annotated[str, typer.Option(help="Equations: evnn or paper.")] = "evnn",
    threads: Threads = 1,
    against: Annotated[str, typer.Option(help=AGAINST)] = "torch",
    steps: Annotated[int, typer.Option(help="Time steps a run.")] = 200,
    repeats: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.")] = 15,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time whole sequences of a random network beside its rivals: a dense network, or who does one of its products."""
    if backend != "cpu":
        raise ValueError(f"backend: got {backend!r}, need cpu; for BLAS give --against blas")
    from eventrnn import bench

    with progress() as report:
        result = bench.inference(
            hidden=hidden, layers=layers, batch=batch, activity=activity, sparsity=sparsity, format=format,
            block=parse_block(block) if block else None, nm=parse_nm(nm) if nm else None, dtype=dtype,
            variant=variant, threads=threads, against=against, steps=steps, repeats=repeats, seed=seed,
            report=lambda stage: report(stage, 0, 1, ""),
        )  # fmt: skip
    show("inference", result, as_json)
