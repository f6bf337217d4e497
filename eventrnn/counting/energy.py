"""Energy estimate: a table of energies per operation (Horowitz 2014) times the counts of a run.

The table gives the energy of float32 arithmetic and of memory reads in a 45 nm process. It is an assumption about
hardware, not a measurement of this machine. Source: M. Horowitz, "Computing's energy problem (and what we can do about
it)", ISSCC 2014, figure 1.1.9.
"""

from __future__ import annotations

from eventrnn._checks import need_choice, need_flag, need_kind
from eventrnn.counting.counts import OpCounts

#: Energy in picojoules at 45 nm and 0.9 V (Horowitz 2014, figure 1.1.9): of one operation, or of one 64-bit read.
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
    """Estimated picojoules of a run: `HOROWITZ_2014` applied to counts and bytes.

    Parameters
    ----------
    counts : the counts of the run
    memory : the row of `HOROWITZ_2014` for reads of weights; cells and outputs use the row of 32 kB
    dense  : estimate a dense engine instead: every product is a MAC and every weight is read

    Effective products of binary events are accumulates (AC). All other executed products are multiply-accumulates
    (MAC), also those of binary events with stored zeros, and the multiplications that choose gated blocks. The
    element-wise work is multiplications. Returns picojoules by part, and their sum. Raises ValueError for an unknown
    memory.
    """
    need_kind("counts", counts, OpCounts, "the OpCounts of `count`")
    need_flag("dense", dense)
    need_choice("memory", memory, (name for name in HOROWITZ_2014 if name.endswith("64bit")))
    total, table = counts.total, HOROWITZ_2014
    macs, accumulates = (total.dense, 0) if dense else (total.executed - total.binary, total.binary)
    macs += 0 if dense else total.selection
    weight_bytes = 4 * total.dense if dense else total.weight_bytes
    parts = {
        "arithmetic_pj": macs * table["float32_mac"] + accumulates * table["float32_ac"],
        "weights_pj": weight_bytes / 8 * table[memory],
        "gates_pj": sum(counts.gate_ops) * table["float32_multiply"],
        "state_pj": sum(counts.state_bytes) / 8 * table["sram_32kb_64bit"],
    }
    return parts | {"total_pj": sum(parts.values())}
