"""The tables of docs/results.md for inference on CPUs: layers, products, and both on a second machine."""

from bench import BLAS as BLAS_LIBRARIES
from bench import DENSE, SPARSE_LIBRARIES, Row, acceptance, line_of
from result_lines import number, read, table, times

CPU_LAYER = (
    ("dense", DENSE),
    ("dense, 2 threads", DENSE | {"threads": 2}),
    ("dense, one call per step on both sides", DENSE | {"against": "torch-step"}),
    ("dense, bfloat16", DENSE | {"dtype": "bfloat16"}),
    ("dense, int8", DENSE | {"dtype": "int8"}),
    ("2:4 (N:M)", {"format": "nm", "nm": (2, 4, "post")}),
    ("90 % of 1x64 blocks pruned", {}),
    ("90 % of 1x64 blocks pruned, 2 threads", {"threads": 2}),
    ("90 % of 1x64 blocks pruned, one call per step on both sides", {"against": "torch-step"}),
    ("90 % of 1x64 blocks pruned, paper's variant", {"variant": "paper"}),
    ("90 % of 1x16 blocks pruned", {"block": (1, 16)}),
    ("95 % of 1x64 blocks pruned, 5 % active", {"sparsity": 0.95, "activity": 0.05}),
    ("90 % of single weights pruned (CSR)", {"format": "csr"}),
    ("90 % of 1x64 blocks pruned, 512 units", {"hidden": 512}),
    ("90 % of 1x64 blocks pruned, 2048 units", {"hidden": 2048}),
    ("90 % of 1x64 blocks pruned, 4096 units", {"hidden": 4096}),
    ("dense, 50 % active", DENSE | {"activity": 0.5}),
    ("dense, batch 20", DENSE | {"batch": 20}),
    ("90 % of 1x64 blocks pruned, batch 20", {"batch": 20}),
)

AT_20, AT_80 = ({"batch": batch, "steps": steps, "against": BLAS_LIBRARIES} for batch, steps in ((20, 64), (80, 24)))
CPU_PRODUCT = (
    ("90 % of 1x64 blocks pruned", {"block": (1, 64), "against": SPARSE_LIBRARIES}),
    ("90 % of 32x32 blocks pruned", {"block": (32, 32), "against": SPARSE_LIBRARIES}),
    ("90 % of 16x16 blocks pruned", {"block": (16, 16), "against": SPARSE_LIBRARIES}),
    ("90 % of single weights pruned (CSR)", {"format": "csr", "against": SPARSE_LIBRARIES}),
    ("dense, batch 20", DENSE | AT_20),
    ("dense, batch 80", DENSE | AT_80),
    ("dense, batch 20, all active", DENSE | AT_20 | {"activity": 1.0}),
    ("dense, batch 80, all active", DENSE | AT_80 | {"activity": 1.0}),
    ("90 % of 1x64 blocks pruned, batch 20", AT_20),
    ("90 % of 1x64 blocks pruned, batch 80", AT_80),
    ("dense, batch 20, 2 threads", DENSE | AT_20 | {"threads": 2}),
    ("dense, batch 80, 2 threads", DENSE | AT_80 | {"threads": 2}),
    ("90 % of 1x64 blocks pruned, batch 20, 2 threads", AT_20 | {"threads": 2}),
    ("90 % of 1x64 blocks pruned, batch 80, 2 threads", AT_80 | {"threads": 2}),
)


def cpu_layer() -> str:
    """One layer of 1350 units on 1350 inputs, batch 1, 10 % of inputs and units active, float32, one thread,
    unless the row says otherwise; whole sequences beside `torch.nn.GRU` in the same run (`python
    experiments/bench.py`). The last columns give the rate at which weights are read, as a share of a probe that
    only reads the same weights, and the multiplications executed.
    """
    lines, rows = read("cpu_inference"), []
    for name, case in CPU_LAYER:
        line = line_of(Row(name, case), lines)
        if line is not None:
            cells = (number(line["us_per_step"]), number(line["against_us_per_step"]), times(line["speedup"]))
            rows.append(
                ((name, *cells, f"{line['bandwidth_fraction']:.0%}", f"{line['executed_per_step']:,.0f}"), [line])
            )
    columns = (
        "weights",
        "µs per step",
        "`nn.GRU`",
        "times faster",
        "share of the probe's bandwidth",
        "executed per step",
    )
    return table(columns, rows)


def cpu_product() -> str:
    """One product of such a layer beside the fastest of the libraries that compute it: SciPy, PyTorch and MKL
    sparse products for pruned weights, BLAS for batches. One thread unless the row says otherwise (`python
    experiments/bench.py`).
    """
    lines, rows = read("cpu_inference"), []
    for name, case in CPU_PRODUCT:
        line = line_of(Row(name, case), lines)
        if line is not None:
            ratio = times(line["speedup"])
            cells = (number(line["us_per_step"]), number(line["against_us_per_step"]), line["against_variant"], ratio)
            rows.append(((name, *cells), [line]))
    return table(("weights", "µs per step", "library, µs", "fastest library", "times faster"), rows)


OPEN_GOALS_TEXT = """The next table says what some of these rows lack of their goals. A loop in C over the panels of a
product, with nothing around it, was timed beside a loop that only reads the weights; in it, lists sorted by length,
rows in pairs, and the order of units in place of panels took as long or longer."""

# Goals of the second CPU that are missed: the goal, what the time consists of, what was tried.
OPEN_GOALS = (
    (
        "layer of 512 units, 40 times",
        "39 times in the table, 23 to 33 in six runs with a short warm-up; ours alone 4.0 to 4.7 µs on a quiet host, "
        "5 to 9 µs in other minutes: 1.0 µs per product, and 1.9 µs of cells, lists and biases, which stay without "
        "weights",
        "a longer warm-up of both sides: 40 times expected, no change found in a first trial. In nine pairs of "
        "runs, with one untimed run of each side (1.4 ms of ours, 40 of PyTorch's) and with 20 ms of each at least, "
        "as all benchmarks have it since: 29 times (quartiles 28 and 33) and 36 (36 and 44); the engine is the same",
    ),
    (
        "int8 products in integers, 5 times",
        "3.6 times in most minutes (5.5 to 5.9 µs and 20 to 21), 3.9 to 4.7 in others (3.3 to 3.8 µs and 14 to 18): "
        "860 segments take about 6.5 cycles each, conversion and multiplication of their weights alone 4, and "
        "fetching them 3.6; the ends of 64 loops of 13 segments can be mispredicted",
        "weights on a large page: 1.4 times as fast expected, 0.9 and 1.2 found; bits of units from a comparison of "
        "vectors in place of a bit per event: 0.2 µs expected, 0.96 and 1.02 times as fast found; neither kept. A "
        "longer warm-up: 3.6 times with and without. Not built: four segments interleaved as bytes, with weights + "
        "128 and events as two signed bytes: by count of instructions 1.6 µs of sums in place of 2.0, 4.5 to 5 "
        "times in a quiet minute",
    ),
    (
        "product, batch 20, 2.5 times",
        "the rate at which one core reads the weights, 11 to 13 GB/s on a busy host, 20 at best: the loop in C takes "
        "0.9 to 1.1 times as long as reading",
        "panels in one compiled loop that leaves silent units unread: 1.2 times as fast expected, 1.02 to 1.04 found, "
        "and 0.93 at 512 units; not kept",
    ),
    (
        "product, batch 80, 3.3 times",
        "the loop in C takes 1.3 to 1.4 times as long as reading; copies of drives take 0.35 ms",
        "the same: 1.15 expected, 1.02 to 1.04 found; not kept",
    ),
    (
        "training windows, 3.6 and 3.3 times, and 1.15 times commit 5385bcb",
        "80 samples reach 3.3 times; 20 samples: backward steps 30 %, forward steps 28 %, gradients of weights 15 %, "
        "of inputs 12 %, input products 11 %",
        "the same: 1.05 expected, 0.99 and 1.01 found. Beside commit 5385bcb, 20 samples: 0.96 (quartiles 0.82 "
        "and 1.10)",
    ),
)


def cpu_other() -> str:
    """The same layers and products, and a dense training window of all weights on two threads, on a second machine:
    2.8 GHz, 1.25 MB of L2 cache per core. It also ran other work; what was measured had real-time priority, with the
    other core kept free in rows of one thread, except at the commits 39cb6fd (products) and 89fb97d. Beside the times,
    what is computed as a share of the multiplications and additions that the cores can do (`python
    experiments/bench.py --results experiments/results/cpu_inference_other.jsonl`, `python
    experiments/bench_training.py` likewise).
    """
    lines, rows = read("cpu_inference_other"), []
    for name, case in (*CPU_LAYER, *CPU_PRODUCT):
        line = line_of(Row(name, case), lines)
        if line is not None:
            share = f"{line['gflop_s'] / line['fma_gflop_s']:.0%}"
            cells = (name, f"{number(line['us_per_step'])} µs", f"{number(line['against_us_per_step'])} µs")
            rows.append(((*cells, line["against_variant"], times(line["speedup"]), share), [line]))
    for line in read("cpu_training_other"):
        each = line["against_each"]["torch"]
        operations = 2 * line["executed_per_iteration"] / line["ms_per_iteration"] / 1e6
        inputs = ", with the gradient of all inputs" if line["input_gradient"] == "all" else ""
        cells = (f"dense, training window, batch {line['batch']}, {line['threads']} threads{inputs}",)
        cells += (f"{number(line['ms_per_iteration'])} ms", f"{number(each['ms_per_iteration'])} ms", "`nn.GRU`")
        rows.append(((*cells, times(each["speedup"]), f"{operations / line['fma_gflop_s']:.0%}"), [line]))
    measured = table(("case", "ours", "beside", "which", "times faster", "share of the peak"), rows)
    cells = [("goal", "what is left", "tried, expected and found"), ("---",) * 3, *OPEN_GOALS]
    return f"{measured}\n\n{OPEN_GOALS_TEXT}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in cells)


def cpu_blocks() -> str:
    """The product of such a layer, 90 % of its blocks pruned and 10 % of its inputs active, beside a loop in C over
    blocks of 8 outputs and 4 inputs, which multiplies all inputs, one thread each (`python experiments/bench.py --only
    "against C" --results experiments/results/c_blocks.jsonl`). The loop stands for hand-written kernels such as those
    of Opus (`dnn/vec_avx.h`, commit 3da9f7a, of 12 June 2026). In a run of its own on the same machine, both compiled
    by GCC 12.2 with `-O3 -march=native`, 1352 inputs and 4056 outputs, medians of 12 rounds of 200 products: float32
    85.0 µs, Opus 84.3 µs, with the same bits; int8 16.3 µs, Opus 16.3 µs. The loop's int8 weights have 7 bits, so that
    instructions without VNNI sum them, too. All of it was measured with real-time priority, the other core kept free.

    What bounds these products: the float32 weights (2.2 MB) lie outside the L2 cache for both sides, so that a tenth
    of them is a tenth of the time at best. Ours decodes int8 weights and adds them in the order of the arithmetic
    contract, event by event. 860 segments of 64 weights take about 20 cycles each, the vector operations alone 8. A
    loop in C of the same form took 4.9 µs, and 2.9 µs without its stores: a load waits for a store in flight whose
    address has the same lower 12 bits. So it is with blocks of 4x8, which have 6,800 segments of 8 weights.

    Integer sums (`--no-exact`, [Numerics](numerics.md#integers)) have no order, and go output by output in registers.
    In runs of nothing else, whose weights stay in the L2 cache, they take 3.3 µs and exact sums 5.0. About 0.5 µs of
    them round the events, 0.7 µs find the segments of active units, and 2 µs add them; a loop that only fetches their
    860 cache lines from the L2 cache takes 1.1 µs. Integer sums take 5 to 6 µs in
    other minutes of the host, and the loop 20.
    A whole layer gained nothing that two runs each could tell. Exact sums go output by output as well, in ascending
    order of units, where a matrix has up to 512 KB: at 512 units in float32 a product takes 0.72 µs, and 0.98 event by
    event; at 1350 units the list costs about what the stores do. Blocks of 4x8 have no such path: the ends of the loops
    of 507 outputs of 8 columns would be mispredicted, 20 cycles each, more than a fifth of the time of the loop in C.
    """
    rows = []
    for row in acceptance():
        line = line_of(row, read("c_blocks")) if row.case.get("against") == "c-blocks" else None
        if line is not None:
            cells = (number(line["us_per_step"]), number(line["against_us_per_step"]), times(line["speedup"]))
            integers = "" if line.get("exact", True) else " in integers"
            name = f"90 % of {line['block']} blocks pruned, {line['dtype']}{integers}"
            rows.append(((name, *cells, f"{line['executed_per_step']:,.0f}"), [line]))
    return table(("weights", "µs per step", "loop in C, µs", "times faster", "executed per step"), rows)
