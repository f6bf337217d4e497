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
    algorithm. No algorithm is the best one. For a GRU the static one loses to the dynamic one from 1024 units on at
    batch 1, and to the standard one at batch 64, where the dynamic one takes eight times as long. At batch 16 a static
    LSTM takes a third of the time of a static GRU.

    cuDNN's times differ by a tenth from run to run: its fastest took 0.93 and 0.98 µs at 512 units in two runs of one
    hour, 1.19 and 1.30 µs at 1024, and 2.47 and 2.69 µs at 1344. Beside the smaller ones, ours are 1.74, 1.55 and 2.4
    times as fast.

    Since 5fc34ff 16 streams may have clusters of six blocks, of which this H200 holds 17; of eight it holds 15. In
    trial runs beside other work, at 768 units, clusters of four took 1.47 µs per step, of five 1.34 and of six 1.17 to
    1.20. At 1344 units, where the weights then lie in L2, clusters of six were slower than of four (4.8 and 4.4 µs).

    Rows with tensor cores have `exact=False`: weights and outputs are float16, as in cuDNN's fastest variants, and sums
    and cells float32. All other rows have the bits of the specification.

    Rows with tensor cores meet what was asked (2.5 times cuDNN with 64 streams of 768 and 1024 units, 3 times of 1350,
    1.2 times with dense weights). Rows that miss it (at batch 1 2 times at 1024 units and 1.2 times with dense weights,
    1.5 times with 16 streams, 2.5 and 3 times with 64):

    | row | predicted | found | what is left |
    | --- | --- | --- | --- |
    | 1024 units, one stream | 0.75 µs | 0.78 µs, 1.54 times (1.69 at 445640a) | a chain of latencies, see below |
    | dense, 1344 units, exact | 2.4 µs, 1.03 times | 2.76 µs, 0.92 times; before its product was pipelined (5fc34ff) \
0.90 | blocks wait through global memory; a warp adds 134 terms in order, by its instructions in 950 cycles, before in \
1500 |
    | 1024 units, 16 streams, exact | 1.5 µs, 1.35 times | 1.56 µs, 1.31 times | the recurrent kernel takes 2120 \
cycles (1.1 µs): products 1036, wait for other blocks 486, cells 508; the rest is the input product, with 190 \
instructions per strip and sample |
    | the same, tensor cores | 1.29 µs, 1.59 times | 1.33 µs in a trial run, 1.54 times the 2.05 µs of the row above; \
no line beside cuDNN yet | 1910 cycles: wait 980, products 480, cells with the copies to 15 other blocks 390 |
    | 64 streams, 768, 1024 and 1350 units, exact | 4.0, 5.3 and 8.0 µs | 3.66, 4.87 and 6.84 µs; 1.90, 1.58 \
and 1.30 times | 200 to 300 instructions per strip and sample; two multiprocessors per stream do not hold its \
weights, which are read from L2 |

    What brought 64 streams of 1350 units from 3.67 µs (10c3d0b) to 2.79, in trial runs of one hour: input products side
    by side with the time loop, on the 60 multiprocessors that it leaves free, 3.3 to 3.0 µs (predicted 2.9); half the
    warps, each with two tiles in registers and twice the cells per thread, 2.9 to 2.7 (predicted 2.6). Blocks that send
    the outputs of a team of warps as soon as it has them, or word by word with `st.async`, are as fast as those that
    send all at once: the warps of a block take turns and end together. Fewer than eight samples per cluster are
    exchanged without padding: 16 streams of 1024 units took 1.51 µs before and 1.33 after. At 512 and 768 units 64
    streams took 1.08 and 1.48 µs in trial runs; the row of 768 units is older.

    With tensor cores (`gpu_phases.py --no-exact`, 8711b83), 64 streams and 1350 units, a step of a cluster of nine
    blocks takes 4170 cycles: 1000 wait for the outputs of the others, 1400 multiply, and 1700 update cells and send.
    Every block receives 22 KB per step. Distributed shared memory takes about 1.8 cycles per 32 bytes, whatever the
    size of a store: 1270 cycles. Every launch of the time loop costs 25 to 35 µs, in which the weights are loaded, and
    the input products of the first steps are computed before it begins: 0.15 µs per step in a run of 1000. Eight
    clusters, of eight streams each, must be resident: this GPU holds 15 of 8 blocks, 9 of 9, and 7 of 10 to 16. The
    clock of the GPU was 1.5 to 1.8 GHz in these runs. One stream takes 1.32 µs this way at 1024 units (10c3d0b), 0.78
    by events.

    Dense weights of few streams are held in the registers of all blocks (predicted 1.1 µs at 1344 units and one stream,
    1.3 with eight; found 1.57 and 3.11). Every block polls all outputs in L2, so the time grows with the streams.

    Samples of all warps at 1024 units, by `ncu`, before the last changes of the kernel: a third wait for the outputs of
    the other blocks, a quarter for the result of the instruction before, 9 % for the barrier of the block, 8 % for
    shared memory, 2 % for instructions. Of 1500 cycles of a step, the exchange alone takes 550; then some 20 dependent
    instructions find the events, each event is a dependent multiplication, and two exponentials follow each other.

    FlashRNN (`flashrnn` 1.0.8) is not a baseline: its fused kernels did not build on that machine (extension
    `gpu_info2`), and its other ones took 18.8 µs per step for an LSTM of 768 units at batch 16, without the input
    product.
    """
    lines, rows = read("cudnn_persistent"), []
    sizes = product(("block", "dense"), (1, 8, 16, 64), (512, 768, 1024, 1344, 1350, 1536), (True, False))
    for format, batch, hidden, exact in sizes:
        line = last(lines, format=format, batch=batch, hidden=hidden, exact=exact)
        if line is None:
            continue
        cells = []
        for cell in ("GRU", "LSTM"):
            kinds = [f" {cell} {kind} " for kind in ALGORITHMS]
            found = [[us for name, us in line["against_first_us_per_step"].items() if kind in name] for kind in kinds]
            cells.append(" / ".join(number(min(us)) if us else "-" for us in found))
        fastest = line["against_variant"].removeprefix("cudnn-persistent ")
        weights = "dense" if format == "dense" else "90 % of 1x32 blocks pruned, bfloat16"
        weights += "" if exact else ", tensor cores"
        us = (number(line["us_per_step"]), number(line["against_us_per_step"]), fastest, times(line["speedup"]))
        rows.append(((weights, str(hidden), str(batch), *us, *cells), [line]))
    columns = ("weights", "units", "batch", "µs per step", "cuDNN, µs", "its fastest variant", "times faster")
    return table((*columns, "GRU, µs", "LSTM, µs"), rows) if rows else ""


def single_steps() -> str:
    """Single steps of layers with 90 % of their 1x32 blocks pruned, bfloat16, 10 % active, in microseconds (`python
    experiments/gpu_steps.py`): one kernel per layer, beside a graph of all the kernels of a run, which other networks
    have. `call`: by the clock, from NumPy to NumPy. `GPU`: between two events around the work, with the start of the
    graph. On arrays of the GPU a call takes 50 to 100 µs in both forms, most of it on the host. Every sample reads the
    weights by itself, so with many samples the graph is faster on the GPU; from 65 samples on it is what runs.
    """
    lines, rows = read("gpu_steps"), []
    for units, layers, batch in ((512, 1, 1), (1350, 1, 1), (1350, 3, 1), (1350, 1, 16), (512, 1, 64), (1350, 1, 64)):
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
    `cells`, in a warp that has a tile, includes the wait for the other warps of its block. Rows of 16 blocks are of the
    kernel for one stream, the others of the one for several, which one stream had before: at 16 blocks that one took
    0.97 µs at 512 units and 1.35 µs at 1344, on the same machine. Larger clusters were faster at every size: what
    smaller ones spare in the exchange, they lose in strips per multiprocessor. Since the lines of 16 blocks of ed3fcfa
    (0.57, 0.74, 0.82 and 1.08 µs) a lane sends its own output, to one block after the other, and to all of them without
    a branch, so that addresses are ready before the output; drives are loaded a step ahead. Loading up to 32 events of
    a strip together, in place of 16, changed nothing that could be measured.
    """
    lines, rows = read("gpu_phases"), []
    for units, blocks in product((512, 768, 1024, 1344), (16, 8, 4)):
        line = last(lines, hidden=units, cluster=blocks, batch=1, exact=True)
        if line is not None:
            cycles = [f"{value:.0f}" for value in line["slowest"].values()]
            us = (number(line["us_per_step"]), number(line["clocked_us_per_step"]))
            rows.append(((str(units), str(blocks), *us, *cycles), [line]))
    phases = ("drives", "wait", "products", "barrier", "cells")
    return table(("units", "blocks", "µs per step", "with clocks", *phases), rows) if rows else ""


def gated_phases() -> str:
    """Where a step of one layer with gated blocks goes, at batch 1, with 1536 units and half of the blocks of 128 x 128
    chosen (`python experiments/dynamic_blocks.py gpu --phases`, with `--rank 16` for gates of two factors): cycles of a
    phase, the median over the steps of the mean over the blocks of threads and, in brackets, of the slowest block. A
    variant of the kernel reads the clock of the multiprocessor. `outputs` and `all logits` are waiting for other
    blocks; with gates of rank 16 every block computes all logits, partly while it waits. Lines of 9b98bc9 were measured
    while trainings took turns on the same GPU: their cycles are those of a step between two turns, and they have no
    times.
    """
    lines, rows = [line for line in read("dynamic_blocks", timed=False) if line["what"] in ("gpu", "phases")], []
    lines = [line for line in lines if "phases" in line]
    for cell, kind, rank in product(("gru", "lstm"), ("phases", "dense_phases"), (None, 16)):
        for line in lines:
            if line["cell"] == cell and line["rank"] == rank and (kind == "phases" or rank is None):
                cycles = line[kind]["cycles"].values()
                gates = "none" if kind == "dense_phases" else f"rank {rank}" if rank else "one factor"
                each = [f"{phase['mean']:,.0f} ({phase['largest']:,.0f})" for phase in cycles]
                total = f"{sum(phase['mean'] for phase in cycles):,.0f}"
                rows.append(((cell.upper(), gates, *each, total), [line]))
    names = ("outputs", "logits", "all logits", "choice", "products", "cells")
    return table(("cell", "gates", *names, "together"), rows) if rows else ""
