"""Figures: the right numbers are drawn, labelled and written to the given file. Skipped without matplotlib."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="figures need matplotlib, the plots extra")

from eventrnn import canvas, plots
from eventrnn.events import Events
from eventrnn.weights import MatrixId, convert
from support.small_runs import of_kind


def events(steps=50, batch=2, size=8, share=0.2):
    rng = np.random.default_rng(0)
    values = rng.random((steps, batch, size)).astype(np.float32) + np.float32(0.5)
    return Events.from_dense(np.where(rng.random(values.shape) < share, values, np.float32(0)))


def labels(figure):
    return {axes.get_xlabel() for axes in figure.axes} | {axes.get_ylabel() for axes in figure.axes}


@pytest.mark.parametrize(("sample", "start", "steps"), [(0, 0, 50), (1, 10, 15), (0, 45, 1000)])
def test_raster_draws_every_event_of_the_part_shown(sample, start, steps):
    train = events()
    figure = plots.raster(train, sample=sample, start=start, steps=steps)
    part = train.to_dense()[start : start + steps, sample]
    (marks,) = figure.axes[0].collections
    time, unit = np.nonzero(part)
    assert np.array_equal(marks.get_offsets(), np.column_stack([time + start, unit]))
    assert np.array_equal(marks.get_array(), part[time, unit])
    assert f"{len(time):,} events of 8 units" in figure.axes[0].get_title(loc="left")
    assert {"unit", "time step", "active (%)", "value sent"} <= labels(figure)


def test_raster_of_silence_has_no_colour_bar(tmp_path):
    figure = plots.raster(Events.from_dense(np.zeros((5, 1, 3))), path=tmp_path / "silent.png")
    assert "value sent" not in labels(figure)
    assert (tmp_path / "silent.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("option", "message"),
    [({"sample": 2}, "sample: got 2, need a whole number 0 to 1"), ({"start": 50}, "start: got 50")],
)
def test_raster_refuses_invalid_layers_and_steps(option, message):
    with pytest.raises(ValueError, match=message):
        plots.raster(events(), **option)


def test_bars_show_the_numbers_and_their_ratios():
    figure = plots.bars(
        {"dense": 1_000_000, "effective": 20_000, "executed": 25_000},
        {"dense": 60.0, "event-driven": 6.0},
        title="Demo",
    )
    left, right = figure.axes
    assert [bar.get_height() for bar in left.patches] == [1_000_000, 20_000, 25_000]
    assert [bar.get_height() for bar in right.patches] == [60, 6]
    assert left.get_yscale() == "log" and right.get_yscale() == "linear"
    texts = [text.get_text() for text in left.texts]
    assert texts == ["1,000,000", "20,000\n50.0× less", "25,000\n40.0× less"]
    assert {"multiplications per step", "time per step (µs)"} <= labels(figure)
    assert figure.get_suptitle() == "Demo"


def test_bars_are_linear_for_small_ratios_and_name_larger_values_as_more():
    left, right = plots.bars({"dense": 10, "executed": 0}, {"dense": 2, "event-driven": 3}).axes
    assert left.get_yscale() == "linear"
    assert [text.get_text() for text in right.texts] == ["2", "3\n1.5× more"]


@pytest.mark.parametrize("values", [{}, {"dense": -1}, {"dense": float("nan")}])
def test_bars_refuse_missing_negative_and_non_finite_values(values):
    with pytest.raises(ValueError, match="operations: got"):
        plots.bars(values, {"dense": 1})
    with pytest.raises(ValueError, match="microseconds: got"):
        plots.bars({"dense": 1}, values)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_figure_format_follows_the_suffix(tmp_path, ending):
    path = tmp_path / f"figure.{ending}"
    plots.bars({"dense": 10, "executed": 1}, {"dense": 1}, path=path)
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(start)


def test_figures_do_not_use_pyplot_and_name_the_missing_package():
    code = """
import sys
from eventrnn import plots
assert "matplotlib" not in sys.modules
plots.bars({"dense": 1}, {"dense": 1})
assert "matplotlib.pyplot" not in sys.modules
for name in [name for name in sys.modules if name.startswith(("matplotlib", "eventrnn._figure"))]:
    del sys.modules[name]
sys.modules["matplotlib"] = None
try:
    plots.bars({"dense": 1}, {"dense": 1})
except ImportError as error:
    print(error)
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "plots need matplotlib: pip install 'eventrnn[plots]'"


def test_learning_curves(tmp_path):
    curves = {"egru": [(10, 300.0, 0.2), (20, 150.0, 0.1)], "gru": [(10, 280.0, 1.0), (20, 140.0, 1.0)]}
    figure = plots.learning_curves(curves, title="two", path=tmp_path / "curves.png")
    left, right = figure.axes
    assert [line.get_ydata().tolist() for line in left.lines] == [[300, 150], [280, 140]]
    assert [line.get_ydata().tolist() for line in right.lines] == [[20, 10], [100, 100]]
    assert left.get_yscale() == "log" and (tmp_path / "curves.png").stat().st_size > 0
    for bad in ({}, {"a": []}, {"a": [(1, float("nan"), 0.1)]}):
        with pytest.raises(ValueError, match="curves"):
            plots.learning_curves(bad)


def test_mask_map_draws_the_share_left_of_every_matrix(tmp_path):
    rng = np.random.default_rng(0)
    w_rec = MatrixId("layers.0.w_rec", 4)
    left = {w_rec: rng.random((6, 12)) < 0.4, "readout": rng.random((600, 5)) < 0.2}
    matrices = {name: convert(mask.astype(np.float32), "csr") for name, mask in left.items()}
    figure = plots.mask_map(matrices, title="Pruned", path=tmp_path / "masks.png")
    small, tall = figure.axes[:2]
    assert np.array_equal(small.collections[0].get_array().reshape(6, 12), left["layers.0.w_rec"])
    # 600 units in 200 tiles of three.
    assert np.array_equal(
        tall.collections[0].get_array().reshape(200, 5),
        left["readout"].reshape(200, 3, 5).sum(axis=1) / 3,
    )
    assert len(small.lines) == 3 and not tall.lines  # between gates
    # A name that does not state the gates gets no lines.
    assert not plots.mask_map({str(w_rec): matrices[w_rec]}).axes[0].lines
    assert f"{100 * left['readout'].mean():.1f} % of the weights left" in tall.get_title(loc="left")
    assert (tmp_path / "masks.png").stat().st_size > 0
    with pytest.raises(ValueError, match="matrices: got none"):
        plots.mask_map({})


def test_saved_full_disk_leaves_the_old_picture(tmp_path, monkeypatch):
    figure, path = plots.bars({"dense": 2.0}, {"dense": 1.0}), tmp_path / "a.svg"

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            canvas.saved(figure, path)
        assert not list(tmp_path.iterdir())
    canvas.saved(figure, path)
    old = path.read_bytes()
    assert old.startswith(b"<?xml")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        canvas.saved(figure, path)
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_saved_existing_picture_is_kept_on_request(tmp_path):
    figure = plots.bars({"dense": 2.0}, {"dense": 1.0})
    canvas.saved(figure, tmp_path / "a")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileExistsError):
        canvas.saved(figure, tmp_path / "a.png", overwrite=False)
    with pytest.raises(ValueError, match="xyz"):
        canvas.saved(figure, tmp_path / "a.xyz")


def test_margins_show_the_shares_on_both_sides_of_the_threshold():
    distances = np.array([-1.0, -0.5, 0.25, 0.5, 1.0])
    figure = plots.margins({"layers.0": distances})
    assert "60.0% above 0, smallest distance 2.5e-01" in figure.axes[0].get_title(loc="left")
    (bars,) = figure.axes[0].patches
    values, edges, _ = bars.get_data()
    # In counts of the five distances, which are whole numbers.
    assert round(5 * values.sum()) == 5 and round(5 * values[edges[:-1] >= 0].sum()) == 3
    with pytest.raises(ValueError, match="at least one layer"):
        plots.margins({})
    with pytest.raises(ValueError, match=r"layers\.0: got 0 values"):
        plots.margins({"layers.0": []})


def test_operations_of_steps_are_stacked_in_order():
    figure = plots.operations_by_step({"layers.0.w_in": [3, 1, 2], "readout": [1, 1, 4]}, dense=40)
    lower, upper = (patch.get_data() for patch in figure.axes[0].patches)
    assert list(lower.values) == [3, 1, 2] and list(upper.baseline) == [3, 1, 2] and list(upper.values) == [4, 2, 6]
    assert "4 multiplications per step, 10.0 times fewer than dense, over 3 steps" in figure.axes[0].get_title(
        loc="left"
    )
    for given in ({}, {"a": [1, 2], "b": [1]}, {"a": [-1]}, {"a": []}):
        with pytest.raises(ValueError, match="operations: "):
            plots.operations_by_step(given)


@pytest.mark.parametrize("span", [3, 6, 9, 120, 1e5])
def test_labels_of_a_logarithmic_axis_do_not_overlap(span):
    figure = plots.learning_curves({"run": [(k, 7 * span ** (k / 9), 0.1) for k in range(10)]})
    figure.draw_without_rendering()
    axis = figure.axes[0].yaxis
    low, high = figure.axes[0].get_ylim()
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    shown = [
        tick.label1.get_window_extent() for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_text()
    ]
    assert len(shown) >= 2
    assert not any(a.overlaps(b) for k, a in enumerate(shown) for b in shown[:k])


def test_front_holds_the_models_that_no_other_beats():
    points = [(3, 5), (1, 9), (2, 9), (2, 6), (2, 6), (4, 5), (5, 1)]
    front = plots.pareto_front(points)
    beaten = [any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in points) for a in points]
    assert front == [1, 3, 0, 6]
    assert {points[k] for k in front} == {a for a, lost in zip(points, beaten, strict=True) if not lost}
    figure = plots.pareto({str(k): point for k, point in enumerate(points)})
    assert "4 of 7 models" in figure.axes[0].get_title(loc="left")
    with pytest.raises(ValueError, match="need a finite cost > 0"):
        plots.pareto({"a": (0, 1)})


def test_animation_has_one_frame_per_step(tmp_path):
    from PIL import Image

    path, told = tmp_path / "moving.gif", []
    train = events(steps=9)
    assert plots.animated_raster(train, path, start=2, steps=5, drawn=lambda *done: told.append(done)) == 5
    assert told == [(k, 5) for k in range(1, 6)]
    with Image.open(path) as image:
        assert image.n_frames == 5
    with pytest.raises(FileExistsError):
        plots.animated_raster(events(steps=3), path, steps=1, overwrite=False)
    with pytest.raises(ValueError, match=r"ends in \.gif"):
        plots.animated_raster(events(steps=3), tmp_path / "moving.png")


def test_masks_of_gated_blocks_are_those_of_the_stored_blocks():
    network = of_kind("gated", [9], inputs=6)
    figure = plots.mask_map(network.matrices())
    for axes, weights in zip(figure.axes, network.matrices().values(), strict=False):
        assert axes.collections[0].get_array().mean() == np.mean(weights.blocks.to_dense() != 0)


def test_notebooks_show_figures():
    figure = plots.raster(events(steps=3))
    assert figure._repr_png_().startswith(b"\x89PNG")
