"""The inference benchmark: refusals, baselines that compute the same, and the fields of a result. No timing decides."""

import importlib.util
import shutil
import sys

import numpy as np
import pytest

from eventrnn import bench, simulate
from eventrnn.bench import baselines, c_blocks, timing
from eventrnn.bench.bandwidth import Product, probes, product_reads
from eventrnn.bench.case import Case
from eventrnn.bench.machine import peak
from eventrnn.bench.networks import ACTIVITY_TOLERANCE, random_events, random_weights
from eventrnn.cpu.crossover import ForcedPolicy
from eventrnn.cpu.plan import TILED
from eventrnn.events import Events
from eventrnn.weights import convert
from support.tolerance import U32, gamma

NEEDS = {"torch": "torch", "torch-step": "torch", "torch-csr": "torch", "torch-mm": "torch", "mkl": "sparse_dot_mkl"}
SMALL = {"hidden": 48, "steps": 12, "repeats": 3, "activity": 0.2, "sparsity": 0.5}


needing_compiler = pytest.mark.skipif(not any(map(shutil.which, c_blocks.COMPILERS)), reason="needs a C compiler")


def needing(name):
    """The baseline as a parameter of a test that is skipped if its package is missing."""
    package = NEEDS.get(name)
    missing = package is not None and importlib.util.find_spec(package) is None
    marks = [needing_compiler] if name == "c-blocks" else [pytest.mark.skipif(missing, reason=f"needs {package}")]
    return pytest.param(name, marks=marks + ([pytest.mark.torch] if package == "torch" else []))


@pytest.fixture
def clock(monkeypatch):
    """Replace the timing: every run is called once and reported to take 2 s (ours), 1 s (the probe), 8 s, 9 s, …"""

    def interleaved(runs, repeats):
        taken = {"ours": 2.0, "probe": 1.0, "probe straight": 1.0}
        for run in runs.values():
            run()
        for k, name in enumerate(runs):
            taken.setdefault(name, 5.0 + k)
        return {name: [taken[name]] * repeats for name in runs}

    monkeypatch.setattr(timing, "interleaved", interleaved)


LAYERS = [needing(name) for name in bench.LAYER_BASELINES]
PRODUCTS = [needing(name) for name in bench.PRODUCT_BASELINES if name != "float32"]
WEIGHTS = [
    {"format": "block", "block": (1, 16)},
    {"format": "block", "block": (4, 4)},
    {"format": "block", "block": (5, 7)},  # divides neither side
    {"format": "csr"},
    {"format": "dense", "sparsity": None},
    {"format": "nm", "sparsity": None, "nm": (2, 5, "pre")},
    {"format": "block", "block": (1, 16), "dtype": "int8"},
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize("baseline", PRODUCTS)
def test_product_baselines_compute_the_product(clock, baseline, batch, weights):
    line = bench.inference(**SMALL | weights | {"batch": batch, "against": baseline})
    assert line["measures"] == "product" and line["against_variant"].startswith(baseline)
    assert line["speedup"] == 4 and line["against_us_per_step"] == 8 / 12 * 1e6
    assert set(line["against_variants_us_per_step"]) >= {line["against_variant"]}


@pytest.mark.parametrize("variant", ["evnn", "paper"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("baseline", LAYERS)
def test_layer_baselines_agree_on_the_first_step(clock, baseline, batch, variant):
    case = {"layers": 2, "batch": batch, "variant": variant, "against": baseline, "hidden": 96, "block": (1, 16)}
    line = bench.inference(**SMALL | case | {"steps": 40, "repeats": 3})
    assert line["measures"] == "layer" and line["against_variant"] == baseline and line["speedup"] == 4


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("form", "block"), [("dense", None), ("csr", None), ("block", (1, 64)), ("block", (4, 4))])
@pytest.mark.parametrize("batch", [1, 40])
def test_single_product_keeps_the_contract(batch, form, block, threads):
    """The result is right within rounding, and has the bits of the dense format on one thread."""
    rng = np.random.default_rng(0)
    weights = random_weights((64, 192), sparsity=0.0 if form == "dense" else 0.5, format=form, block=block, rng=rng)
    events = random_events(5, batch, 64, 0.3, rng)
    product = Product(weights, events, threads)
    dense, values = weights.to_dense().astype(np.float64), events.to_dense().astype(np.float64)
    for t in range(5):
        exact, size = values[t] @ dense, np.abs(values[t]) @ np.abs(dense)
        assert (np.abs(product.result(t) - exact) <= 2 * gamma(64, U32) * size).all()
    twin = Product(convert(weights, "dense"), events, 1)
    assert all(np.array_equal(product.result(t), twin.result(t)) for t in range(5))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_probe_of_shared_single_weights_reads_the_panels_with_events(threads):
    weights = random_weights((150, 450), sparsity=0.7, format="csr", rng=np.random.default_rng(0))
    fired = np.zeros((2, 3, 150), np.float32)
    # Units 0 to 63 and 128 to 149 are the first and the last panel.
    fired[0, 1, [3, 60]] = fired[0, 2, 140] = fired[1, 0, 5] = 1
    product = Product(weights, Events.from_dense(fired), threads, ForcedPolicy(TILED, 2.0))
    (reads,) = product_reads(product)
    stored = weights.stored_out()
    first, last = int(stored[:64].sum()), int(stored[128:].sum())
    assert reads.nbytes == (4 + 2) * (first + last + first)
    probes(product.plan, [reads])["probe"]()


@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("weights", [*WEIGHTS[:5:2], {"format": "nm", "sparsity": None, "nm": (2, 4, "post")}], ids=str)
def test_narrow_weights_are_timed_against_float32(clock, weights, dtype, batch):
    line = bench.inference(**SMALL | weights | {"dtype": dtype, "against": "float32", "batch": batch})
    wide = bench.inference(**SMALL | weights | {"against": "numpy", "batch": batch})
    assert line["against_variant"] == "float32 ours" and line["speedup"] == 4 and line["dtype"] == dtype
    assert line["storage_bytes"] < wide["storage_bytes"] and line["executed_per_step"] == wide["executed_per_step"]
    assert line["bytes_per_step"] < wide["bytes_per_step"]


def test_wrong_result_is_never_timed(clock, monkeypatch):
    def off_by_one_step(task):
        return {"late": lambda t: task.dense.T @ task.columns[max(t - 1, 0)]}

    monkeypatch.setitem(baselines._PRODUCTS, "scipy", off_by_one_step)
    with pytest.raises(RuntimeError, match=r"against scipy late: sample 0, output \d+ .* computes something else"):
        bench.inference(**SMALL | {"against": "scipy", "block": (1, 16)})
    monkeypatch.setitem(baselines._PRODUCTS, "scipy", lambda task: {"narrow": lambda t: task.columns[t]})
    with pytest.raises(RuntimeError, match=r"shape \(1, 48\), ours \(1, 144\)"):
        bench.inference(**SMALL | {"against": "scipy", "block": (1, 16)})


def test_bound_of_a_product_is_twice_gamma():
    weights, values = np.array([[1.0, -2], [3, 4]], np.float32), np.array([[-1.0, 0.5]], np.float32)
    assert np.array_equal(baselines.product_bound(weights, values), 2 * gamma(2, U32) * np.array([[2.5, 4]]))


def test_result_line_holds_request_and_result(clock):
    line = bench.inference(**SMALL | {"against": "numpy,scipy", "block": (1, 16), "batch": 2})
    request = {"measures": "product", "format": "block", "block": "1x16", "nm": None, "against": "numpy,scipy"}
    assert line | request | {"dtype": "float32", "seed": 0} == line
    assert line["activity_asked"] == 0.2 and line["sparsity_asked"] == 0.5 == line["sparsity"]
    assert line["against_variant"] == "numpy dot, rows by input" and len(line["against_variants_us_per_step"]) == 7
    assert line["dense_per_step"] == 2 * 48 * 144
    assert line["effective_per_step"] == line["executed_per_step"] <= line["dense_per_step"] / 2
    # Half of 144 columns in blocks of 16, 48 rows: 4 bytes per weight, 4 per block, 8 per row pointer.
    assert line["storage_bytes"] == 4 * 48 * 72 + 4 * 48 * 9 // 2 + 8 * 49
    assert line["gflop_s"] == 2 * line["executed_per_step"] / (line["us_per_step"] * 1e3)
    assert line["fma_gflop_s"] > 0 and line["fma_scaling"] is None and 0 < line["bandwidth_fraction"] < 1
    assert Case(**SMALL | {"against": "numpy,scipy", "block": (1, 16), "batch": 2}).record().items() <= line.items()


def test_two_threads_add_a_probe_of_the_second_core():
    assert peak(1)["fma_scaling"] is None and peak(2)["fma_scaling"] > 0


def test_against_none_times_only_this_package(clock):
    line = bench.inference(**SMALL | {"against": "none", "hidden": 96, "steps": 40, "block": (1, 16)})
    assert line["measures"] == "layer" and line["speedup"] is None and line["against_variants_us_per_step"] == {}


@pytest.mark.parametrize("activity", [0.05, 0.3, 0.5, 0.9, 1.0])
def test_every_activity_can_be_reached(activity):
    rng = np.random.default_rng(0)
    network = bench.random_network(128, 2, sparsity=0.5, format="csr", block=None, variant="evnn", rng=rng)
    inputs = random_events(60, 2, 128, activity, rng)
    reached = simulate(bench.at_activity(network, inputs, activity), inputs).activity
    assert all(abs(each - activity) <= ACTIVITY_TOLERANCE * activity for each in reached)


@pytest.mark.parametrize("axis", ["pre", "post"])
@pytest.mark.parametrize(("n", "m", "shape"), [(2, 4, (12, 36)), (1, 5, (13, 39)), (3, 4, (6, 18))])
def test_random_groups_keep_n_of_m(n, m, shape, axis):
    mask = bench.networks._nm_mask(shape, n, m, axis, np.random.default_rng(0))
    lines = mask if axis == "post" else mask.T
    for start in range(0, lines.shape[1], m):
        group = lines[:, start : start + m]
        assert (group.sum(axis=1) == min(n, group.shape[1])).all()
    assert mask.shape == shape and len(np.unique(lines[:, :m], axis=0)) > 1


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"against": "torch,scipy"}, "one kind at a time"),
        ({"against": "scipy,nobody"}, "against: got 'nobody', need one of torch"),
        ({"against": "none,torch"}, "against: got 'none'"),
        ({"against": "float32"}, "baseline for narrower weights"),
        ({"against": "scipy", "layers": 2}, "layers: got 2, but scipy is a baseline of one product"),
        ({"against": "mkl", "variant": "paper"}, "variant: got 'paper', but mkl"),
        ({"against": "c-blocks", "threads": 2}, "threads: got 2, but the baseline c-blocks has one"),
        ({"against": "c-blocks", "hidden": 3}, "hidden: got 3, but a block of the baseline c-blocks has 4 inputs"),
        ({"format": "csr", "block": (1, 16)}, "block: got .* for format 'csr', which takes none"),
        ({"format": "csr", "nm": (2, 4, "post")}, "nm: got .* for format 'csr'"),
        ({"format": "sieve"}, "format: got 'sieve'"),
        ({"format": "nm"}, "nm: got None for format 'nm'"),
        ({"format": "nm", "nm": (5, 4, "pre")}, "nm: got 5:4"),
        ({"format": "nm", "nm": (2, 4, "pre"), "sparsity": 0.5}, "nm=2:4 fixes it"),
        ({"dtype": "float8"}, "dtype: got 'float8', need one of float32"),
        ({"repeats": 2}, "repeats: got 2"),
        ({"batch": 0}, "batch: got 0"),
    ],
)
def test_bench_refuses_conflicting_options(case, message):
    with pytest.raises(ValueError, match=message):
        Case(**case)


@pytest.mark.parametrize("baseline", ["torch", "torch-csr", "mkl"])
def test_a_missing_package_is_named(monkeypatch, baseline):
    monkeypatch.setitem(sys.modules, NEEDS[baseline], None)
    with pytest.raises(ValueError, match=f"{NEEDS[baseline]}.* not installed"):
        bench.inference(**SMALL | {"against": baseline, "block": (1, 16)})


@needing_compiler
def test_c_blocks_are_whole_numbers_in_int8():
    """Products of rounded inputs and weights are summed without error, over padded and empty block rows."""
    rng = np.random.default_rng(0)
    dense = random_weights((30, 43), sparsity=0.6, format="block", block=c_blocks.BLOCK, rng=rng).to_dense()
    dense[:, 8:16] = 0
    loop = c_blocks.BlockLoop.of(dense, "int8")
    x = np.pad(rng.uniform(-1, 1, (3, 2, 30)), ((0, 0), (0, 0), (0, 2))).astype(np.float32)
    out = np.zeros((2, loop.outputs), np.float32)
    assert (loop.inputs, loop.outputs) == (32, 48) and loop.index[loop.index[0] + 1] == 0
    for t in range(3):
        loop.multiply(x[: t + 1], out)
        rounded = np.rint(127 + 127 * x[t]).astype(int) - 127
        weights = np.rint(loop.meant / np.where(loop.scale > 0, 127 * loop.scale, 1)).astype(int)
        assert np.abs(weights).max() == c_blocks.LARGEST_WEIGHT
        assert np.array_equal(out, loop.scale * (rounded @ weights).astype(np.float32))
        exact = x[t, :, :30].astype(np.float64) @ dense
        off = np.abs(out[:, :43] - exact)
        bound = loop.inexactness(dense, x[t, :, :30]) + gamma(3, U32) * np.abs(out[:, :43])
        assert (off <= bound).all() and off.max() > 0


@needing_compiler
def test_c_blocks_have_blocks_of_their_own_where_ours_have_others(clock):
    line = bench.inference(**SMALL | {"against": "c-blocks", "block": (1, 16)})
    assert "-O3" in line["versions"]["c-blocks"]
    rng = np.random.default_rng(0)
    weights, events = random_weights((48, 144), sparsity=0.5, format="csr", rng=rng), random_events(3, 1, 48, 0.2, rng)
    ours = Product(weights, events)
    ((_, variant),) = baselines.ProductBaselines.of(("c-blocks",), ours).variants.items()
    assert variant.ours.weights.block == c_blocks.BLOCK and variant.ours.events is events
    assert abs(variant.ours.weights.nnz - weights.nnz) < 32


def test_without_a_compiler_the_reason_is_stated(monkeypatch):
    c_blocks.compiled.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="c-blocks needs a C compiler, and none of cc, gcc, clang is installed"):
        bench.inference(**SMALL | {"against": "c-blocks", "block": (1, 16)})


@needing_compiler
def test_what_a_compiler_refuses_is_told(monkeypatch):
    c_blocks.compiled.cache_clear()
    monkeypatch.setattr(c_blocks, "FLAGS", ("-no-such-flag",))
    with pytest.raises(ValueError, match="cannot compile c-blocks: .*no-such-flag"):
        c_blocks.compiled()


def test_sparsity_follows_the_format_where_it_is_not_given():
    assert [Case(format=name).left_out for name in ("dense", "csr", "block")] == [0, 0.9, 0.9]
    assert Case(format="nm", nm=(1, 4, "pre")).left_out == 0.75 and Case().block == (1, 64)


def test_every_side_is_warmed_up_for_as_long_and_timed_in_turn(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: calls.append("pause"))

    def run(name, seconds):
        def called():
            calls.append(name)
            now[0] += seconds

        return called

    # Powers of two, whose sums are exact.
    seconds = timing.interleaved({"short": run("short", 2**-8), "long": run("long", 2**-4)}, 2)
    assert seconds == {"short": [2**-8] * 2, "long": [2**-4] * 2}
    untimed = int(np.ceil(timing.WARM_SECONDS * 2**8))
    assert untimed > 1 and calls == (["pause"] + ["short"] * (untimed + 1) + ["pause", "long", "long"]) * 2
