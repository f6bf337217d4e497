"""Tables of docs/results.md about inference on a GPU; see `tables.py`."""

from itertools import product

from result_lines import last, number, read, table, times

ALGORITHMS = ("standard", "persist-static", "persist-dynamic")


def every_cudnn() -> str:
    """One layer, 10 % of units active, beside cuDNN's GRU and LSTM in every algorithm and precision, called through its
    C API (`python experiments/every_cudnn.py`; baseline `cudnn-persistent` of `eventrnn bench inference --backend
    cuda`). Inputs are as wide as the layer, and the input product is in the time of both sides. An LSTM has a third
    more weights than a GRU of its size. GRU and LSTM: the fastest precision of each algorithm, standard /
    persist-static / persist-dynamic, from its first runs. `graph`: the call is captured as a CUDA graph.

    PyTorch calls the standard algorithm for every GRU of these sizes, and launches its kernels one by one: 14 to 18 µs
    per step at 512 units and batch 1, nearly three times its time as a graph, and fifteen times that of the static
    algorithm. No algorithm is the best one. For a GRU the static one loses to the dynamic one at 1344 units and batch
    1, and to the standard one at batch 64, where the dynamic one takes eight times as long. At batch 16 a static LSTM
    takes a third of the time of a static GRU. With one sample, a dense layer of 512 units in cuDNN is as fast as a
    pruned one here.

    FlashRNN (`flashrnn` 1.0.8) is not a baseline: its fused kernels did not build on that machine (extension
    `gpu_info2`), and its other ones took 18.8 µs per step for an LSTM of 768 units at batch 16, without the input
    product.
    """
    lines, rows = read("cudnn_persistent"), []
    for format, batch, hidden in product(("block", "dense"), (1, 16, 64), (512, 768, 1024, 1344, 1350)):
        line = last(lines, format=format, batch=batch, hidden=hidden)
        if line is None:
            continue
        cells = []
        for cell in ("GRU", "LSTM"):
            kinds = [f" {cell} {kind} " for kind in ALGORITHMS]
            found = [[us for name, us in line["against_first_us_per_step"].items() if kind in name] for kind in kinds]
            cells.append(" / ".join(number(min(us)) if us else "-" for us in found))
        fastest = line["against_variant"].removeprefix("cudnn-persistent ")
        weights = "dense" if format == "dense" else "90 % of 1x32 blocks pruned, bfloat16"
        us = (number(line["us_per_step"]), number(line["against_us_per_step"]), fastest, times(line["speedup"]))
        rows.append(((weights, str(hidden), str(batch), *us, *cells), [line]))
    columns = ("weights", "units", "batch", "µs per step", "cuDNN, µs", "its fastest variant", "times faster")
    return table((*columns, "GRU, µs", "LSTM, µs"), rows) if rows else ""


def single_steps() -> str:
    """Single steps of layers with 90 % of their 1x32 blocks pruned, bfloat16, 10 % active, in microseconds (`python
    experiments/gpu_steps.py`): one kernel per layer, beside a graph of all the kernels of a run, which other networks
    have. `call`: by the clock, from NumPy to NumPy. `GPU`: between two events around the work, with the start of the
    graph. On arrays of the GPU a call takes 65 to 76 µs in both forms, most of it on the host. The kernel has changed
    since the commit of these lines: its loads no longer wait for each other, of which the bits were compared on a GPU,
    and its count of blocks lies in another place, which has run in emulation only. Neither time was measured.
    """
    lines, rows = read("gpu_steps"), []
    for units, layers, batch in ((512, 1, 1), (1350, 1, 1), (1350, 3, 1), (1350, 1, 16)):
        line = last(lines, hidden=units, layers=layers, batch=batch)
        if line is not None:
            us = [number(line[name]) for name in ("call_us", "graph_call_us", "gpu_us", "graph_gpu_us")]
            faster = times(line["graph_call_us"] / line["call_us"])
            rows.append(((str(units), str(layers), str(batch), *us, faster), [line]))
    columns = ("units", "layers", "batch", "call", "call, as a graph", "GPU", "GPU, as a graph", "times faster")
    return table(columns, rows) if rows else ""


def cluster_phases() -> str:
    """Where a step of one layer goes in the kernel of the cluster plan, batch 1, 90 % of 1x32 blocks pruned, bfloat16,
    10 % active (`python experiments/gpu_phases.py`): cycles of a turn in the warp with the most products, from a
    variant of the kernel that reads the clock of the multiprocessor. `wait`: for the outputs of the other blocks;
    `cells`, in a warp that has a tile, includes the wait for the other warps of its block. Larger clusters are faster
    at every size: what smaller ones spare in the exchange, they lose in strips per multiprocessor. The exchange of
    outputs (drives and wait) takes about 340 of 1,720 cycles at 512 units, products and gates 780, cells 640.
    """
    lines, rows = read("gpu_phases"), []
    for units, blocks in product((512, 768, 1024, 1344), (16, 8, 4)):
        line = last(lines, hidden=units, cluster=blocks, batch=1)
        if line is not None:
            cycles = [f"{value:.0f}" for value in line["slowest"].values()]
            us = (number(line["us_per_step"]), number(line["clocked_us_per_step"]))
            rows.append(((str(units), str(blocks), *us, *cycles), [line]))
    phases = ("drives", "wait", "products", "barrier", "cells")
    return table(("units", "blocks", "µs per step", "with clocks", *phases), rows) if rows else ""
