"""Layouts of the CPU engine that small cases would not choose: forced on them, they give the same bits."""

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_backends import assert_same, cases

from eventrnn import cpu, packing, plan
from eventrnn.network import Network, simulate


def _simulated(case, **options):
    return simulate(case.network, case.inputs, state=case.state, record=("events", "states"), **options)


@given(cases(), st.integers(1, 3))
def test_layouts_for_many_drives_give_the_specification_s_bits(case, threads):
    """Narrow windows of dense rows and blocks by column, whatever the number of rows and the width of a block."""
    with patch.multiple(plan, SHARED_ROWS=1, SHARED_BLOCKS=1, SHARED_WIDTH=1):
        forced = _simulated(case, threads=threads)
    assert_same(forced, _simulated(case, backend="reference"))


@given(cases(formats=("block",)))
def test_blocks_by_column_are_really_walked(case):
    with patch.multiple(plan, SHARED_ROWS=1, SHARED_BLOCKS=1, SHARED_WIDTH=1):
        packed = cpu.CpuEngine(case.network, 1).plan(5, 1)
    kinds = set(np.unique(packed.windows[:, :, packing.KIND]))
    # Windows that cut a block (the paper's variant may) stay with the clipped blocks.
    assert packing.BLOCK_COLUMNS in kinds and kinds <= {packing.BLOCK_COLUMNS, packing.RAGGED_BLOCKS, packing.BLOCKS}


@given(cases(formats=("block",)), st.booleans())
def test_prefetching_changes_nothing(case, far):
    with patch.object(packing, "NEAR_BYTES", -1 if far else 1 << 40):
        assert_same(_simulated(case), _simulated(case, backend="reference"))


@given(cases(max_steps=20), st.integers(1, 4))
def test_any_chunk_of_time_gives_the_same_bits(case, chunk):
    with patch.object(cpu, "LONGEST_CHUNK", chunk):
        assert_same(_simulated(case), _simulated(case, backend="reference"))


def test_a_batch_whose_drives_cannot_be_addressed_is_refused():
    engine = cpu.CpuEngine(Network.random([4], inputs=3, rng=np.random.default_rng(0)), 1)
    with pytest.raises(ValueError, match="split the batch"):
        engine._scratch(1 << 30)


def test_a_plan_holds_the_weights_once():
    plan = cpu.CpuEngine(Network.random([4], inputs=3, rng=np.random.default_rng(0)), 1).plan(1, 1)
    assert not any(isinstance(value, packing.Pools | list) for value in vars(plan).values())
