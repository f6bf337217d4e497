"""Products with 2:4 sparse weights on sparse tensor cores beside dense ones (a claim of Hubara et al. 2021).

    python experiments/sparse_tensor_cores.py

Needs PyTorch and an NVIDIA GPU of compute capability 8.0 or above. Weights (outputs, inputs) and inputs (batch, inputs)
are float16 random numbers. The dense product is `torch.nn.functional.linear`, by cuBLAS. The sparse one is the same
call with the weights as `torch.sparse.to_sparse_semi_structured` makes them, by cuSPARSELt, and also cuSPARSELt with
the fastest algorithm that its search finds for the size. The dense product has the same weights, zeros included. A CUDA
graph of `REPEATS` products is replayed, one side after the other; a line has medians of microseconds per product. Every
result is compared with the product in float64.
"""

from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from command_line import command
from records import Records
from torch.nn.functional import linear

from eventrnn.backend import BackendUnavailable

RESULTS = Path(__file__).parent / "results" / "sparse_tensor_cores.jsonl"
KEY = ("inputs", "outputs", "batch")
SIZES, BATCHES = ((4096, 4096), (1536, 4608)), (16, 64, 256, 1024, 4096, 16384)
REPEATS = 20

# PyTorch has no public names for the search of cuSPARSELt.
sparse_ops = torch.ops.aten

# Rows of a result that are compared in float64.
COMPARED = 64


def pruned(outputs: int, inputs: int) -> torch.Tensor:
    """Random weights (outputs, inputs) of which the two largest of each four neighbouring inputs are kept."""
    weights = torch.randn(outputs, inputs // 4, 4, device="cuda", dtype=torch.float32) / inputs**0.5
    kept = weights.abs().topk(2, dim=2).indices
    mask = torch.zeros_like(weights).scatter_(2, kept, 1.0)
    return (weights * mask).reshape(outputs, inputs).to(torch.float16)


def captured(product) -> torch.cuda.CUDAGraph:
    """A graph of `REPEATS` calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            product()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            product()
    return graph


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Time of one product in a replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end) / REPEATS


def measured(inputs: int, outputs: int, batch: int, rounds: int) -> dict:
    """The line of one size."""
    dense = pruned(outputs, inputs)
    x = torch.randn(batch, inputs, device="cuda", dtype=torch.float16)
    sparse, packed = torch.sparse.to_sparse_semi_structured(dense), sparse_ops._cslt_compress(dense)
    algorithm = sparse_ops._cslt_sparse_mm_search(packed, x.T)
    products = {
        "dense": lambda: linear(x, dense),
        "sparse": lambda: linear(x, sparse),
        "searched": lambda: sparse_ops._cslt_sparse_mm(packed, x.T, alg_id=algorithm).T,
    }
    exact = x[:COMPARED].double() @ dense.double().T
    errors = {}
    for name, product in products.items():
        found = product()[:COMPARED].double()
        errors[name] = float((found - exact).norm() / exact.norm())
        if not errors[name] < 1e-3:
            raise ValueError(f"{name}: the relative error is {errors[name]:.2g}; float16 allows 1e-3")
    graphs = {name: captured(product) for name, product in products.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    # The first round warms up.
    for turn in range(rounds + 1):
        for name, graph in graphs.items():
            us = microseconds(graph)
            if turn:
                times[name].append(us)
    at = {name: median(each) for name, each in times.items()}
    return {
        "inputs": inputs,
        "outputs": outputs,
        "batch": batch,
        "rounds": rounds,
        "us": at,
        "speedup": {name: at["dense"] / at[name] for name in ("sparse", "searched")},
        "dense_tflops": 2e-6 * inputs * outputs * batch / at["dense"],
        "relative_error": errors,
        "backend": type(sparse).__name__,
        "gpu": torch.cuda.get_device_name(),
        "cusparselt": torch.backends.cusparselt.version(),
    }


def main(
    rounds: Annotated[int, typer.Option(min=3, help="Timed replays of each side.")] = 21,
    results: Annotated[Path, typer.Option(help="File to which a line per size is appended.")] = RESULTS,
) -> None:
    if not torch.cuda.is_available():
        raise BackendUnavailable("PyTorch finds no GPU here; run it where torch.cuda.is_available()")
    torch.manual_seed(0)
    records = Records(results, KEY)
    for inputs, outputs in SIZES:
        for batch in BATCHES:
            line = records.add(measured(inputs, outputs, batch, rounds))
            us = ", ".join(f"{name} {each:.1f} us" for name, each in line["us"].items())
            print(f"{inputs} x {outputs}, batch {batch}: {us}; {line['dense_tflops']:.0f} TFLOP/s dense", flush=True)


if __name__ == "__main__":
    command(main, __doc__).run()
