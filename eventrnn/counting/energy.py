"""MOVED."""

from __future__ import annotations

from eventrnn.counting.counts import OpCounts

#: Energy of one operation in picojoules, 45 nm, 0.9 V: Horowitz, ISSCC 2014, figure 1.1.9. Memory: 64-bit reads.
HOROWITZ_2014 = {
    "float32_mac": 4.6,
    "float32_ac": 0.9,
    "float32_multiply": 3.7,
    "sram_8kb_64bit": 10.0,
    "sram_32kb_64bit": 20.0,
    "sram_1mb_64bit": 100.0,
    "dram_64bit": 1300.0,
}


def energy(counts: OpCounts, *, memory: str = "sram_1mb_64bit", dense: bool = False) -> dict[str, float]:
    """Estimated picojoules of a run: a cited table applied to counts and bytes; an assumption, not a measurement.

    `memory` names the row of `HOROWITZ_2014` that weights are read from; state is taken from the 32 kB row. Executed
    products of binary events are accumulates, all others MACs; element-wise work is multiplications. `dense=True`
    estimates the dense engine: every product a MAC, every weight read.
    """
    if memory not in HOROWITZ_2014 or not memory.endswith("64bit"):
        choices = ", ".join(name for name in HOROWITZ_2014 if name.endswith("64bit"))
        raise ValueError(f"memory: got {memory!r}, need one of {choices}")
    total, table = counts.total, HOROWITZ_2014
    macs, accumulates = (total.dense, 0) if dense else (total.executed - total.binary, total.binary)
    weight_bytes = 4 * total.dense if dense else total.weight_bytes
    parts = {
        "arithmetic_pj": macs * table["float32_mac"] + accumulates * table["float32_ac"],
        "weights_pj": weight_bytes / 8 * table[memory],
        "gates_pj": sum(counts.gate_ops) * table["float32_multiply"],
        "state_pj": sum(counts.state_bytes) / 8 * table["sram_32kb_64bit"],
    }
    return parts | {"total_pj": sum(parts.values())}
