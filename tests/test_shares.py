"""Division of work between threads: chunks from a counter, and units that belong to one thread each."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrnn.cells import Cell
from eventrnn.cpu.kernels.sync import next_chunk
from eventrnn.network import Network
from eventrnn.state import State
from eventrnn.training import Model
from eventrnn.training.bptt.kernels.event_lists import TILE_ROWS, tile_rows
from eventrnn.training.bptt.kernels.time_loops import WINDOW_ROWS
from support.pruned_weights import FORMATS, pruned


@given(size=st.integers(0, 3000), most=st.integers(1, 500), least=st.integers(1, 50), parts=st.integers(1, 5))
def test_queue_hands_out_every_item_once(size, most, least, parts):
    counter, end, sizes = np.zeros(1, np.int64), 0, []
    while True:
        first, count = next_chunk(counter, size, max(most, least), least, parts)
        if count == 0:
            break
        assert first == end and count <= max(most, least)
        end, sizes = first + count, [*sizes, count]
    assert end == size
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True) and all(each >= least for each in sizes[:-1])


def test_tiles_never_exceed_their_scratch_memory():
    for rows in range(1, 2 * WINDOW_ROWS):
        unit = tile_rows(min(rows, WINDOW_ROWS))
        assert unit <= TILE_ROWS
        for units in range(1, -(-min(rows, WINDOW_ROWS) // unit) + 1):
            for some in {
                units * unit,
                *(rows - first for first in range(0, rows, unit) if rows - first < units * unit),
            }:
                tile = tile_rows(min(some, rows))
                assert tile <= unit and -(-min(some, rows) // tile) <= units


@pytest.mark.parametrize("variant", ["evnn", "paper"])
@pytest.mark.parametrize(("form", "batch"), [(0, 2), (0, 40), (1, 3), (5, 3)])
def test_results_do_not_depend_on_the_owner_of_a_unit(variant, form, batch):
    rng = np.random.default_rng(batch)
    steps, units = 6, 150
    network = Network.random([units], inputs=30, rng=rng, threshold=0.05, cell=Cell(variant=variant))
    layer = network.layers[0]
    w_rec = pruned(layer.w_rec.to_dense(), *FORMATS[form], rng)
    network = replace(network, layers=(replace(layer, w_rec=w_rec),))
    x = (rng.normal(size=(steps, batch, 30)) * (rng.random((steps, batch, 30)) < 0.3)).astype(np.float32)
    upstream = rng.normal(size=(steps, batch, units)).astype(np.float32)
    found = []
    for threads in (1, 2, 3):
        model = Model(network, backward="sparse", threads=threads)
        # All units fire in some steps, so that the event lists are full.
        full = State((np.full((batch, units), 5, np.float32),), (np.ones((batch, units), np.float32),))
        output, state, tape = model.forward(x, full)
        gradients = model.backward(tape, upstream, d_inputs=True)
        found.append({**gradients, "output": output, "cells": state.cells[0]})
    for each in found[1:]:
        assert all(np.array_equal(value, each[name]) for name, value in found[0].items())
