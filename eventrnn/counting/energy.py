"""Energy estimates: published energies per operation and per byte, times the counts of a run.

A table is an assumption about hardware, not a measurement of this machine. `ENERGY_TABLES` has the tables and their
sources, and `compare_energy` puts a run beside dense engines, the quantised one included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eventrnn._checks import need_choice, need_kind
from eventrnn.counting.counts import OpCounts, count
from eventrnn.network import Network
from eventrnn.simulation import Simulation


@dataclass(frozen=True)
class EnergyTable:
    """Energies of one process, in picojoules.

    Attributes
    ----------
    process  : the process, and where the numbers are from
    add      : number type -> energy of an addition
    multiply : number type -> energy of a multiplication
    memory   : kind of memory -> energy of a read or write of 64 bits
    """

    process: str
    add: Mapping[str, float]
    multiply: Mapping[str, float]
    memory: Mapping[str, float]


#: Where a source gives a range, its lower end is taken, which favours engines that move many bytes: the dense ones.
ENERGY_TABLES = {
    "45nm": EnergyTable(
        'M. Horowitz, "Computing\'s energy problem", ISSCC 2014, figure 1.1.9; 45 nm, 0.9 V',
        add={"float32": 0.9, "float16": 0.4, "int32": 0.1, "int8": 0.03},
        multiply={"float32": 3.7, "float16": 1.1, "int32": 3.1, "int8": 0.2},
        memory={"sram_8kb": 10.0, "sram_32kb": 20.0, "sram_1mb": 100.0, "dram": 1300.0},
    ),
    "7nm": EnergyTable(
        'N. P. Jouppi et al., "Ten lessons from three generations shaped Google\'s TPUv4i", ISCA 2021, table 2; 7 nm',
        add={"float32": 0.38, "float16": 0.16, "bfloat16": 0.11, "int32": 0.03, "int8": 0.007},
        multiply={"float32": 1.31, "float16": 0.34, "bfloat16": 0.21, "int32": 1.48, "int8": 0.07},
        memory={
            "sram_8kb": 7.5,
            "sram_32kb": 8.5,
            "sram_1mb": 14.0,
            "dram": 1300.0,
            "gddr6": 350.0,
            "hbm2": 250.0,
        },
    ),
}

#: "events": this run, with float32 arithmetic; "dense": every product, in float32. The others have int8 factors, 32-bit
#: sums and all other numbers in int8: "events-int8" of the counts of a network stored as int8, and "dense-int8", which
#: a dense network would be quantised to
ENGINES = ("events", "events-int8", "dense", "dense-int8")

#: Memories of weights that `compare_energy` takes: the smallest that holds them, and those of all tables.
MEMORIES = ("fits", *dict.fromkeys(kind for table in ENERGY_TABLES.values() for kind in table.memory))

# Bytes that fit, by memory, from small to large. What does not fit is read from DRAM.
_SIZES = {"sram_8kb": 8 << 10, "sram_32kb": 32 << 10, "sram_1mb": 1 << 20}


def energy(
    counts: OpCounts, *, process: str = "45nm", memory: str = "sram_1mb", engine: str = "events"
) -> dict[str, float]:
    """Estimated picojoules of a run: a table applied to counts and bytes.

    Parameters
    ----------
    counts  : the counts of the run
    process : a name in `ENERGY_TABLES`
    memory  : the memory of the table that weights are read from; cells and outputs lie in 32 kB of SRAM
    engine  : a name in `ENGINES`

    Event by event, effective products of binary events are accumulates. All other executed products are
    multiply-accumulates, also those of binary events with stored zeros, and the multiplications that choose gated
    blocks. Bytes are those of the storage, with indices, whatever the arithmetic. A dense engine
    multiplies every weight, and reads it once per step for all samples of the batch. The element-wise work is
    multiplications. Returns picojoules by part, and their sum. Raises ValueError for an unknown name.
    """
    need_kind("counts", counts, OpCounts, "the OpCounts of `count`")
    table = ENERGY_TABLES[need_choice("process", process, ENERGY_TABLES)]
    need_choice("memory", memory, table.memory)
    total = counts.total
    if need_choice("engine", engine, ENGINES).startswith("events"):
        macs, accumulates, nbytes = total.executed - total.binary + total.selection, total.binary, total.weight_bytes
    else:
        macs, accumulates = total.dense, 0
        rows = counts.sample_steps
        nbytes = (4 if engine == "dense" else 1) * (total.dense // rows * counts.steps if rows else 0)
    kind, sums, width = ("int8", "int32", 1) if engine.endswith("int8") else ("float32", "float32", 4)
    parts = {
        "arithmetic_pj": macs * (table.multiply[kind] + table.add[sums]) + accumulates * table.add[sums],
        "weights_pj": nbytes / 8 * table.memory[memory],
        "gates_pj": sum(counts.gate_ops) * table.multiply[kind],
        # State bytes are counted in float32.
        "state_pj": sum(counts.state_bytes) * width / 4 / 8 * table.memory["sram_32kb"],
    }
    return parts | {"total_pj": sum(parts.values())}


def compare_energy(network: Network, simulation: Simulation, *, memory: str = "fits") -> list[dict[str, Any]]:
    """The energy of a run beside that of other engines, for every process of `ENERGY_TABLES` and engine of `ENGINES`.

    network, simulation : the network and its run, as `count` takes them
    memory  : the memory of weights; "fits" for the smallest of 8 kB, 32 kB and 1 MB of SRAM that holds those of the
              engine, and DRAM for larger ones. Tables without the memory are left out

    The events of the int8 engine are those of this run. Returns one record per process and engine: `process`, `engine`,
    `memory`, `bytes` of its weights, the parts and the sum of `energy`, and `per_step_pj`, the sum per step and sample.
    Raises ValueError for a memory that no table has, and as `count` does.
    """
    need_kind("network", network, Network, "a Network")
    need_choice("memory", memory, MEMORIES)
    narrow = network.untied().with_matrices({name: w.stored_as("int8") for name, w in network.matrices().items()})
    counts = {"events": count(network, simulation), "events-int8": count(narrow, simulation)}
    entries = sum(weights.shape[0] * weights.shape[1] for weights in network.matrices().values())
    sizes = {
        "events": sum(weights.nbytes for weights in network.matrices().values()),
        "events-int8": sum(weights.nbytes for weights in narrow.matrices().values()),
        "dense": 4 * entries,
        "dense-int8": entries,
    }
    records = []
    for process, table in ENERGY_TABLES.items():
        for engine in ENGINES:
            kind = _smallest(sizes[engine]) if memory == "fits" else memory
            if kind not in table.memory:
                continue
            parts = energy(counts.get(engine, counts["events"]), process=process, memory=kind, engine=engine)
            record = {"process": process, "engine": engine, "memory": kind, "bytes": sizes[engine]} | parts
            records.append(record | {"per_step_pj": parts["total_pj"] / max(1, simulation.sample_steps)})
    return records


def _smallest(nbytes: int) -> str:
    """The smallest memory that holds so many bytes."""
    return next((kind for kind, size in _SIZES.items() if nbytes <= size), "dram")
