"""Layouts of packed weights that small networks would not get by themselves, and how to force them."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np

from eventrnn.cpu import memory, packing, plan
from eventrnn.cpu.tables import (
    BLOCKS,
    FEW_BLOCKS,
    HIGH,
    KIND,
    LOW,
    MASKED,
    ROW_TILES,
    ROWS,
    SCATTER,
    SINGLE_TILES,
    STRIPS,
)
from eventrnn.simulation import RECORDABLE, Simulation, simulate
from support.conformance import assert_same, cases
from support.wide_blocks import wide_block_cases

NEVER = 1 << 30
FEW, MANY = {"SHARED_EVENTS": NEVER}, {"SHARED_EVENTS": 0}
# Without AVX-512 the kernels read masks as well, only slower.
MASKS, INDICES = {"AVX512": True, "MASKED_FROM": 0, "FILL": NEVER}, {"MASKED_FROM": 2, "FILL": NEVER}
TILES = {"FILL": -NEVER}
NARROW = {"WIDEST_SCATTER": 16}
UNITS = {"FEW_SEGMENTS": 0, "STRIP_TERMS": NEVER}
STRIP = {"STRIP_TERMS": 0, "SELECTS": True}
#: name -> constants of the modules, the formats that they decide upon, and the kinds of window that must come out
FORCED = {
    "rows": (FEW, ("dense",), {ROWS}),
    "panels": ({**MANY, "DENSE_ACTIVITY_THRESHOLD": 2}, ("dense",), {ROW_TILES}),
    "every unit": ({**MANY, "DENSE_ACTIVITY_THRESHOLD": 0}, ("dense",), {ROW_TILES}),
    "masks": (MASKS, ("csr", "nm"), {MASKED}),
    "indices": (INDICES, ("csr", "nm"), {SCATTER}),
    "narrow masks": ({**MASKS, **NARROW}, ("csr", "nm"), {MASKED}),
    "narrow indices": ({**INDICES, **NARROW}, ("csr", "nm"), {SCATTER}),
    "single tiles": (TILES, ("csr", "nm"), {SINGLE_TILES}),
    "blocks": ({**MANY, **INDICES, **UNITS, "PREFETCHED_BYTES": 0}, ("block",), {BLOCKS, SCATTER}),
    "few blocks": (
        {**MANY, **INDICES, "FEW_SEGMENTS": NEVER, "STRIP_TERMS": NEVER},
        ("block",),
        {FEW_BLOCKS, BLOCKS, SCATTER},
    ),
    "blocks of single weights": ({**MANY, **MASKS, **NARROW, **UNITS}, ("block",), {BLOCKS, MASKED, SCATTER}),
    "strips": ({**FEW, **STRIP}, ("wide block",), {STRIPS, BLOCKS}),
    "tiles of blocks": ({**TILES, **UNITS}, ("block",), {BLOCKS, SINGLE_TILES}),
}


@contextmanager
def forced(constants: dict):
    """Set constants of `plan`, `packing` and `memory`, by name."""
    with ExitStack() as stack:
        for module in (plan, packing, memory):
            for name, value in constants.items():
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, value))
        yield


def kinds(engine) -> set[int]:
    """The kinds of all non-empty column windows of an engine."""
    windows = np.concatenate([each.column_tiles.reshape(-1, packing.FIELDS) for each in engine.plans.values()])
    return {int(kind) for kind in windows[windows[:, HIGH] > windows[:, LOW], KIND]}


def simulated(case, **options) -> Simulation:
    return simulate(case.network, case.inputs, state=case.state, record=RECORDABLE, **options)


def check_layout(backend, layout, data, threads) -> None:
    """A forced layout really comes out, and gives the bits of the specification."""
    constants, formats, expected = FORCED[layout]
    wide = "wide block" in formats
    case = data.draw(wide_block_cases() if wide else cases(formats=formats))
    with forced(constants):
        tested = case.simulator(backend, threads=threads)
        got = tested.run(case.inputs, record=RECORDABLE)
    found = kinds(tested.engine)
    # A block matrix is cut into segments of blocks or, where no segment width divides its blocks, into single weights.
    # Several threads may divide the columns of a gate within a block; such blocks are added unit by unit.
    assert found == expected or (not {"block", "wide block"}.isdisjoint(formats) and found <= expected)
    assert not wide or threads > 1 or STRIPS in found
    assert_same(simulated(case, backend="reference"), got)
