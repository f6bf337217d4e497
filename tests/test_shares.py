"""Division of work between threads: chunks from a counter, unit bounds that move, column tiles cut at the bounds."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrnn.cells import Cell
from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.kernels.sync import next_chunk
from eventrnn.cpu.tables import FIELDS, HIGH, LOW, VALUES
from eventrnn.network import Network
from eventrnn.state import State
from eventrnn.training import Model
from eventrnn.training.bptt.kernels.event_lists import TILE_ROWS, tile_rows
from eventrnn.training.bptt.kernels.load_balance import SLACK, barrier_and_rebalance, cut_tiles, even_bounds
from eventrnn.training.bptt.kernels.records import Rebalancing
from eventrnn.training.bptt.kernels.time_loops import WINDOW_ROWS
from eventrnn.training.bptt.sparse_pattern import Pattern, pack_matrix
from eventrnn.training.bptt.workspace import Workspace
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


def moved(bounds, waited, turns=1):
    """The unit bounds of every thread after it has waited alone at `turns` barriers."""
    threads = len(bounds) - 1
    balance = Rebalancing(np.zeros((2, threads), np.int64), np.tile(np.array(bounds), (threads, 1)), SLACK)
    for turn in range(turns):
        balance.waited[(turn + 1) % 2] = waited
        before = balance.waited.copy()
        for thread in range(threads):
            balance.waited[:] = before
            # The arrival of one thread reaches the target.
            barrier = np.zeros(1, np.int64)
            assert barrier_and_rebalance(barrier, thread, threads, 1, turn, balance) == 1 + threads
            assert balance.waited[turn % 2, thread] == 0
    assert (balance.unit_bounds == balance.unit_bounds[0]).all()
    return balance.unit_bounds[0].tolist()


def test_waiting_thread_takes_units_from_its_neighbours():
    edges = np.zeros(4, np.int64)
    even_bounds(150, 3, edges)
    assert edges.tolist() == [0, 64, 112, 150]
    assert moved(edges, [SLACK + 1, 0, 0]) == [0, 64 + LANES, 112, 150]
    assert moved(edges, [0, SLACK + 1, 0]) == [0, 64 - LANES, 112 + LANES, 150]
    assert moved(edges, [SLACK, 0, SLACK]) == edges.tolist()
    # Every thread keeps at least one unit.
    assert moved(edges, [SLACK + 1, 0, SLACK + 1], turns=20) == [0, 64 + LANES, 64 + 2 * LANES, 150]
    assert moved([0, 16, 24], [0, SLACK + 1], turns=3) == [0, 16, 24]


@given(n=st.integers(1, 200), rows=st.sampled_from([1, 40]), border=st.integers(0, 12), paper=st.booleans())
def test_tiles_cut_at_a_bound_are_the_whole(n, rows, border, paper):
    pattern = Pattern.of(None, (3, 3 * n), 2 * n)
    table = pack_matrix(pattern, [(0, n)], rows)
    whole, edges = table.tiles[0], sorted({0, min(n, border * LANES), n})
    first, last = (0, table.n_gate_tiles) if not paper else (table.n_gate_tiles, len(whole))
    columns, places = [], []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        mine = np.zeros((len(whole) + 1, FIELDS), np.int64)
        end = cut_tiles(whole, first, last, n, low, high, mine, 0)
        assert not mine[end:].any()
        for window in mine[:end]:
            covered = np.arange(window[LOW], window[HIGH])
            assert (covered % n >= low).all() and (covered % n < high).all()
            columns.append(covered)
            places.append(window[VALUES] + covered - window[LOW])
    order = np.argsort(np.concatenate(columns))
    of_whole = [np.arange(w[LOW], w[HIGH]) for w in whole[first:last]]
    at_whole = [w[VALUES] + np.arange(w[HIGH] - w[LOW]) for w in whole[first:last]]
    assert np.array_equal(np.concatenate(columns)[order], np.concatenate(of_whole))
    assert np.array_equal(np.concatenate(places)[order], np.concatenate(at_whole))


@pytest.mark.parametrize("variant", ["evnn", "paper"])
@pytest.mark.parametrize(("form", "batch"), [(0, 2), (0, 40), (1, 3), (5, 3)])
def test_results_do_not_depend_on_the_owner_of_a_unit(variant, form, batch, monkeypatch):
    rng = np.random.default_rng(batch)
    steps, units = 6, 150
    network = Network.random([units], inputs=30, rng=rng, threshold=0.05, cell=Cell(variant=variant))
    layer = network.layers[0]
    w_rec = pruned(layer.w_rec.to_dense(), *FORMATS[form], rng)
    network = replace(network, layers=(replace(layer, w_rec=w_rec),))
    x = (rng.normal(size=(steps, batch, 30)) * (rng.random((steps, batch, 30)) < 0.3)).astype(np.float32)
    upstream = rng.normal(size=(steps, batch, units)).astype(np.float32)
    waits, given = {1: [0], 2: [0, 9 * SLACK], 3: [0, 9 * SLACK, 0]}, []

    def rebalancing(workspace):
        # Waiting times as if a thread had waited before the first barrier.
        threads = workspace.threads
        given.append(np.zeros((threads, threads + 1), np.int64))
        return Rebalancing(np.array([waits[threads]] * 2, np.int64), given[-1], SLACK)

    monkeypatch.setattr(Workspace, "rebalancing", rebalancing)
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
    # A single step has one barrier, after which no bound can move back. So the bounds of both passes have moved.
    _, _, tape = model.forward(x[:1], State.zeros(network, batch))
    model.backward(tape, upstream[:1])
    even, there = np.zeros(4, np.int64), [0, 48, 128, 150]
    even_bounds(units, 3, even)
    forward, backward = given[-2:]
    assert (forward == (there if form == 0 else even)).all() and (backward == there).all()
