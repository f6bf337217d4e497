"""The command `count`: operations of a run over a text, their audit, NeuroBench's metrics and energy estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from rich.table import Table

from eventrnn._checks import need_choice
from eventrnn._files import printable
from eventrnn.cli.imports import own_model
from eventrnn.cli.options import (
    Fold,
    GivenModel,
    Json,
    NamedModel,
    Part,
    Text,
    Unknown,
    folded,
    load_symbols,
    model_file,
)
from eventrnn.cli.terminal import as_line, console
from eventrnn.counting import (
    ENERGY_TABLES,
    MEMORIES,
    NEUROBENCH_DIFFERENCES,
    NOTE,
    NeuroBenchMetrics,
    OpCounts,
    audit,
    audit_neurobench,
    compare_energy,
    energy,
    neurobench_metrics,
)
from eventrnn.counting import count as count_run
from eventrnn.network import Network
from eventrnn.simulation import Simulation, simulate
from eventrnn.weights.gated import need_matrices

# Columns that a table with six counts needs.
COUNT_WIDTH = 120


def count(
    model: GivenModel = None,
    named: NamedModel = None,
    text: Text = "builtin",
    part: Part = "test",
    symbols: Annotated[int, typer.Option(help="Number of symbols to read, at most.")] = 10_000,
    unknown: Unknown = None,
    fold: Fold = False,
    neurobench: Annotated[
        bool,
        typer.Option(
            "--neurobench",
            help="Also report the metrics of NeuroBench; where it is installed, beside those that it computes itself.",
        ),
    ] = False,
    with_energy: Annotated[
        bool,
        typer.Option("--energy", help="Also estimate energies, in several processes, beside dense float32 and int8."),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            help="With --energy: memory of the weights, fits, "
            + ", ".join(MEMORIES[1:])
            + ". [fits: the smallest that holds them]",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Count every operation of a run over a text, and audit the counts."""
    if symbols < 1:
        raise ValueError(f"symbols: got {symbols}, need a whole number >= 1")
    if memory is not None and not with_energy:
        raise ValueError(f"memory: got {memory!r} without --energy, whose estimate it belongs to; add --energy")
    if memory is not None:
        need_choice("memory", memory, MEMORIES)
    network = folded(own_model(model_file(model, named)), fold)
    if neurobench:
        need_matrices(network.matrices(), "NeuroBench")
    inputs = load_symbols(network, text, part, unknown)[:symbols, None]
    simulation = simulate(network, inputs, record="events")
    counts = count_run(network, simulation)
    audited = audit(network, simulation, counts)
    record = counts.as_dict() | {
        "reduction": counts.reduction,
        "audit_agrees": audited.agrees,
        "energy": energy(counts),
    }
    if with_energy:
        record["energies"] = compare_energy(network, simulation, memory=memory or "fits")
    if neurobench:
        metrics = neurobench_metrics(network, simulation)
        record["neurobench"] = _neurobench(network, simulation, metrics)
    if as_json:
        print(as_line(record))
        return
    title = f"operations of {counts.steps} steps of the {part} part of {text} ({NOTE})"
    _show_counts(counts, title)
    # The differences are printed once.
    print(replace(audited, differences=()) if neurobench else audited)
    if with_energy:
        _show_energies(record["energies"])
    if neurobench:
        _show_neurobench(record["neurobench"], counts)


def _show_counts(counts: OpCounts, title: str) -> None:
    columns = ("dense", "effective", "executed", "graded", "binary", "weight_bytes")
    columns += ("selection",) if counts.total.selection else ()
    table = Table("matrix", *(column.replace("_", " ") for column in columns), title=printable(title))
    for name, row in {**counts.matrices, "total": counts.total}.items():
        table.add_row(name, *(f"{getattr(row, column):,}" for column in columns))
    # A table wider than the terminal is better than truncated figures.
    console(least_width=COUNT_WIDTH).print(table)
    print(
        f"element-wise {sum(counts.gate_ops):,}, state bytes {sum(counts.state_bytes):,}, "
        f"dense / effective {counts.reduction:.1f}"
    )


# --- energy ---------------------------------------------------------------------------------------------------

ENGINE_WORDS = {
    "events": "this network",
    "events-int8": "the same in int8",
    "dense": "dense float32",
    "dense-int8": "dense int8",
}


def _show_energies(records: Sequence[Mapping[str, Any]]) -> None:
    columns = ("process", "engine", "weights in", "arithmetic", "weights", "gates", "state", "sum", "times this")
    table = Table(*columns, title="energy per step in nanojoules: an estimate from published tables, not a measurement")
    for record in records:
        own = next(
            (each for each in records if each["process"] == record["process"] and each["engine"] == "events"), None
        )
        steps = record["total_pj"] / record["per_step_pj"] if record["per_step_pj"] else 1
        parts = (record[f"{part}_pj"] / steps / 1e3 for part in ("arithmetic", "weights", "gates", "state", "total"))
        times = f"{record['total_pj'] / own['total_pj']:.2f}" if own and own["total_pj"] else ""
        table.add_row(
            record["process"],
            ENGINE_WORDS[record["engine"]],
            f"{record['memory']} ({record['bytes']:,} B)",
            *(f"{value:,.3f}" for value in parts),
            times,
        )
    console(least_width=COUNT_WIDTH).print(table)
    for name in {record["process"]: None for record in records}:
        print(f"{name}: {ENERGY_TABLES[name].process}")


# --- NeuroBench -----------------------------------------------------------------------------------------------


def _neurobench(network: Network, simulation: Simulation, metrics: NeuroBenchMetrics) -> dict[str, Any]:
    """The metrics, what the package says of the same run where it is installed, and the known differences."""
    record: dict[str, Any] = metrics.as_dict() | {"samples": metrics.samples, "version": None, "agrees": None}
    if find_spec("neurobench") is not None:
        from importlib.metadata import version

        audited = audit_neurobench(network, simulation, metrics)
        record |= {"version": version("neurobench"), "agrees": audited.agrees}
        record["by_neurobench"] = {quantity: found for _, quantity, _, found, _ in audited.rows}
    return record | {"differences": list(NEUROBENCH_DIFFERENCES)}


def _show_neurobench(record: Mapping[str, Any], counts: OpCounts) -> None:
    theirs = record.get("by_neurobench", {})
    columns = ("metric", "here", *(["NeuroBench"] if theirs else []), "here, per step")
    table = Table(*columns, title=f"metrics of NeuroBench; its operations are per sample, here of {counts.steps} steps")
    operations = record["SynapticOperations"]
    names = ("Footprint", "ParameterCount", "ConnectionSparsity", "ActivationSparsity", *operations)
    for name in names:
        value = operations.get(name, record.get(name))
        per_step = f"{value * counts.batch / counts.sample_steps:,.1f}" if name in operations else ""
        form = ",.4f" if "Sparsity" in name else ",.10g"
        table.add_row(name, f"{value:{form}}", *([f"{theirs[name]:{form}}"] if theirs else []), per_step)
    console().print(table)
    if record["version"] is None:
        print("neurobench is not installed, so that its own functions were not asked: pip install neurobench")
    else:
        print(f"neurobench {record['version']} {'agrees' if record['agrees'] else 'DIFFERS'}")
    for text in record["differences"]:
        print(f"note: {text}")
