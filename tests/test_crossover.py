"""The crossover map, and the backend that uses it: every exact kernel that it selects gives the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from eventrnn import simulation
from eventrnn._kernel_files import SourceChanged
from eventrnn.bench import crossover as crossing
from eventrnn.bench import timing
from eventrnn.cpu import crossover as maps
from eventrnn.cpu.crossover import ACTIVITY, AutoBackend, Crossover, ForcedPolicy, MeasuredPolicy
from eventrnn.cpu.engine import LONGEST_CHUNK, CpuEngine
from eventrnn.cpu.plan import BLAS_PRODUCT, DENSIFIED, DENSIFIED_TILED, FORMAT, KERNELS, TILED
from eventrnn.network import Network
from eventrnn.simulation import simulate
from eventrnn.testing import event_trains, networks
from eventrnn.weights import Dense, convert
from support.conformance import assert_same, cases
from support.crossover_map import invented_map


class ForcedBackend:
    """The cpu engine with one kernel for all products."""

    def __init__(self, pick: str, dense_activity_threshold: float):
        self.name, self.exact, self.way = "forced", pick != BLAS_PRODUCT, (pick, dense_activity_threshold)

    def engine(self, network, *, threads=1):
        return CpuEngine(network, threads, ForcedPolicy(*self.way))


@pytest.mark.parametrize("pick", [pick for pick in KERNELS if pick != BLAS_PRODUCT])
@given(case=cases(), threads=st.integers(1, 3), dense_activity_threshold=st.sampled_from((0.0, 0.3, 2.0)))
def test_every_exact_kernel_gives_the_bits_of_the_specification(pick, case, threads, dense_activity_threshold):
    options = {"state": case.state, "record": ("events", "states")}
    forced = simulate(
        case.network, case.inputs, backend=ForcedBackend(pick, dense_activity_threshold), threads=threads, **options
    )
    assert_same(forced, simulate(case.network, case.inputs, backend="reference", **options))
    assert set(forced.paths.values()) == {pick}


@given(case=cases(max_batch=20))
def test_auto_selects_different_kernels_with_equal_bits(case):
    options = {"state": case.state, "record": ("events", "states")}
    auto = simulate(case.network, case.inputs, backend="auto", **options)
    for way in auto.paths.values():
        event(way)
    assert auto.exact and BLAS_PRODUCT not in auto.paths.values()
    assert set(auto.paths) == set(case.network.matrices())
    assert_same(auto, simulate(case.network, case.inputs, backend="cpu", **options))


@given(data=st.data(), batch=st.integers(1, 20), threads=st.integers(1, 2))
def test_blas_products_are_right(data, batch, threads):
    """Sums of a few dyadic products are exact in any order, so a step from zero has equal bits through BLAS too."""
    network = data.draw(networks(layers=1, embedding=False, readout=False, dyadic=True))
    numbers = data.draw(event_trains(network.layers[0].inputs, 1, batch, dyadic=True)).to_dense()
    ours = simulate(network, numbers, backend=ForcedBackend(BLAS_PRODUCT, 2.0), threads=threads)
    assert set(ours.paths.values()) == {BLAS_PRODUCT} and not ours.exact
    assert np.array_equal(ours.output, simulate(network, numbers, backend="reference").output)


def test_inexact_auto_reports_where_it_used_blas():
    crossover = invented_map()
    cheap = {key: [[1e-9] * len(line) for line in table] for key, table in crossover.times.items() if "blas" in key}
    backend = AutoBackend(exact=False, crossover=Crossover({**crossover.times, **cheap}))
    network = Network.random([40], inputs=30, rng=np.random.default_rng(0))
    run = simulate(network, np.ones((3, 4, 30), np.float32), backend=backend)
    assert set(run.paths.values()) == {BLAS_PRODUCT}
    assert not run.exact


def test_a_run_of_which_a_part_used_blas_is_not_exact(monkeypatch):
    class LongOnly(ForcedPolicy):
        def select_kernel(self, weights, rows, activity):
            return BLAS_PRODUCT if rows >= LONGEST_CHUNK else FORMAT

    class Backend(ForcedBackend):
        def engine(self, network, *, threads=1):
            return CpuEngine(network, threads, LongOnly(*self.way))

    network = Network.random([16], inputs=4, rng=np.random.default_rng(0))
    x, backend = np.ones((LONGEST_CHUNK + 5, 2, 4), np.float32), Backend(BLAS_PRODUCT, 2.0)
    expected = {"layers.0.w_in": BLAS_PRODUCT, "layers.0.w_rec": FORMAT}
    # The last part is short: of an engine's run, of a batch of two lengths, and of a run that is recorded.
    monkeypatch.setattr(simulation, "RECORD_BYTES", 8 * 2 * 16 * LONGEST_CHUNK)
    for options in ({}, {"lengths": [LONGEST_CHUNK + 5, LONGEST_CHUNK]}, {"record": "events"}):
        run = simulate(network, x, backend=backend, **options)
        assert run.paths == expected and not run.exact
    short = simulate(network, x[:5], backend=backend)
    assert set(short.paths.values()) == {FORMAT} and short.exact


def test_predictions_meet_the_measured_points_and_grow_with_the_matrix():
    crossover = invented_map()
    for units in maps.UNITS:
        shape = (units, 3 * units)
        for r, rows in enumerate(maps.ROWS):
            for a, activity in enumerate(ACTIVITY):
                predicted = crossover.seconds("panels", shape, rows, activity)
                # The interpolation goes through logarithms in float64.
                assert np.float32(predicted) == np.float32(crossover.times[f"panels/{units}"][r][a])
    small, large = ((n, 3 * n) for n in (500, 2000))
    assert crossover.seconds("rows", small, 1, 0.1) < crossover.seconds("rows", large, 1, 0.1)
    assert crossover.seconds("single", small, 1, 0.1, 0.05) < crossover.seconds("single", small, 1, 0.1, 0.5)


def test_choices_follow_the_map():
    choice = MeasuredPolicy(invented_map(), may_blas=False)
    dense = Dense(np.ones((400, 1200), np.float32))
    assert choice.select_kernel(dense, 1, 0.01) == FORMAT
    assert choice.select_kernel(dense, 128, 1.0) == TILED
    single = convert(np.where(np.arange(1200) % 2 == 0, dense.values, np.float32(0)), "csr")
    assert choice.select_kernel(single, 128, 1.0) == DENSIFIED_TILED
    narrow = single.stored_as("bfloat16")
    assert choice.select_kernel(narrow, 128, 1.0) == TILED
    assert choice.select_kernel(narrow, 1, 0.01) == FORMAT
    assert set(choice.predicted(single, 1, 0.1)) == {FORMAT, TILED, DENSIFIED, DENSIFIED_TILED}
    assert set(choice.predicted(narrow, 1, 0.1)) == {FORMAT, TILED}
    assert 0 < choice.dense_activity_threshold(64) <= 1


def test_selected_kernel_changes_with_activity():
    """Few units fire at first, then all of them. The engine selects kernels anew for every chunk of a run."""
    rng = np.random.default_rng(0)
    network = Network.random([64], inputs=64, rng=rng)
    engine = AutoBackend().engine(network)
    engine.activity = [0.001, 0.001]
    quiet = engine.plan(1, 4).kernel_by_matrix
    engine.activity = [1.0, 1.0]
    assert quiet == dict.fromkeys(quiet, FORMAT)
    assert engine.plan(1, 64).kernel_by_matrix == dict.fromkeys(quiet, TILED)


def test_a_map_is_measured_once_and_kept(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setenv("EVENTRNN_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(maps, "measure", lambda report=None: measured.append(1) or invented_map())
    assert maps.load() == maps.load() == invented_map()
    assert len(measured) == 1
    maps.cache_path().write_text("{")
    assert maps.load() == invented_map()
    assert len(measured) == 2


def test_incomplete_map_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("EVENTRNN_CACHE", str(tmp_path))
    monkeypatch.setattr(maps, "measure", lambda report=None: invented_map())
    for kept in ('{"times": {}}', '{"times": {"rows/320": [[1]]}}', "[]", '{"times": 3}', "[" * 100_000):
        maps.cache_path().write_text(kept)
        assert maps.load() == invented_map()


def test_unwritable_cache_is_reported(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EVENTRNN_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="crossover map not kept"):
        maps.save(invented_map())


def test_map_of_sources_that_were_edited_is_no_fault_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EVENTRNN_CACHE", str(tmp_path))

    def changed(module):
        raise SourceChanged("product.py has changed since this process began; start another process")

    monkeypatch.setattr(maps, "source_digest", changed)
    with pytest.warns(UserWarning, match="^crossover map not kept: product.py has changed .* start another process$"):
        assert maps.save(invented_map()) == invented_map()
    assert not any(tmp_path.iterdir())


def test_measuring_fills_the_grid(monkeypatch):
    monkeypatch.setattr(maps, "UNITS", (22, 30))
    monkeypatch.setattr(maps, "RUN_SECONDS", 1e-9)
    stages = []
    crossover = maps.measure(lambda done, total, what: stages.append((done, total, what)))
    total = len(crossover.times) * maps.ROUNDS
    assert [stage[:2] for stage in stages] == [(k, total) for k in range(total + 1)]
    for key, table in crossover.times.items():
        rows = maps.ROWS if key.partition("/")[0] in maps.SHARED_ROWS else maps.EACH_ROWS
        assert np.shape(table) == (len(rows), len(ACTIVITY)), key
        assert (np.array(table) > 0).all()


def test_verify_times_the_kernel_of_auto_beside_the_others(monkeypatch):
    monkeypatch.setattr(crossing, "WEIGHTS", ({"format": "dense", "sparsity": 0.0}, {"format": "csr", "sparsity": 0.5}))
    monkeypatch.setattr(crossing, "BATCHES", (1, 20))
    monkeypatch.setattr(crossing, "ACTIVITIES", (0.1, 1.0))
    monkeypatch.setattr(timing, "SETTLE_SECONDS", 0.0)
    seen = []
    lines = list(crossing.verify(invented_map(), 32, 3, lambda done, total, what: seen.append((done, total)), seed=3))
    assert len(lines) == 8 and seen == [(k, 8) for k in range(9)]
    assert {line["format"] for line in lines} == {"dense", "csr"}
    for line in lines:
        times = line["microseconds"]
        assert {line["picked"], line["picked_inexact"], "blas"} <= set(times)
        assert times[line["picked"]] > 0 and 0 < line["exact_ratio"] <= 1 and 0 < line["inexact_ratio"] <= 1
    assert len({line["picked"] for line in lines}) > 1, "the invented map has more than one fastest kernel"
