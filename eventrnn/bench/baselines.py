"""Baselines on a CPU: other libraries on the same weights, and the check that they compute the same.

A layer baseline is a dense network of the same size. A product baseline multiplies the same (3N, N) matrix, in its own
format, by the outputs of each step, as a dense or a sparse vector. A baseline has one or several variants; the
fastest variant counts.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, files
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from eventrnn.backend import INTEGERS
from eventrnn.bench.c_blocks import BLOCK, BlockLoop, compiled
from eventrnn.bench.networks import random_weights
from eventrnn.bench.timing import Run
from eventrnn.cpu.blas import BlasEngine
from eventrnn.cpu.single_product import Product
from eventrnn.events import Events
from eventrnn.network import Network
from eventrnn.reference_products import rounding_step
from eventrnn.simulation import simulate
from eventrnn.state import State
from eventrnn.weights import BlockCSR, Weights

U32 = 2.0**-24

#: step t -> its product: (3N, batch), or (3N,) for one sample; dense or sparse, of NumPy, SciPy or torch
Step = Callable[[int], Any]


def gamma(n: int) -> float:
    """Relative error of a float32 sum of n products in any order: n u / (1 - n u) (Higham 2002, section 3.1)."""
    return n * U32 / (1 - n * U32)


def product_bound(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Largest difference of two float32 results of one product, (B, P).

    Each result is within gamma(J) sum |w| |x| of the exact product (Higham 2002, section 3.1).

    weights : (J, P)
    values  : (B, J)
    """
    size = np.abs(values).astype(np.float64) @ np.abs(weights).astype(np.float64)
    return 2 * gamma(max(len(weights), 1)) * size


def rounding_bound(weights: BlockCSR, values: np.ndarray) -> np.ndarray:
    """Largest difference (B, P) that rounding makes to a product in integers, beside `product_bound`.

    It is half a step per value and code, with one unit more in the last place of the scaled value (J,).

    values : (B, J)
    """
    bits, codes = weights.integer_bits(), np.abs(weights.codes()).astype(np.float64)
    scaled = values * weights.scales
    halves = np.array([rounding_step(row, bits) / 2 for row in scaled])[:, None] + 2 * U32 * np.abs(scaled)
    return np.where(values != 0, halves, 0) @ codes


# --- one product --------------------------------------------------------------------------------------------


@dataclass
class ProductTask:
    """The product to compute, in the layouts that the baselines need.

    weights : (N, 3N), any format and storage; baselines use the float32 values
    events  : (steps, batch, N)
    """

    weights: Weights
    events: Events

    @cached_property
    def dense(self) -> np.ndarray:
        """The weights, (N, 3N) float32."""
        return self.weights.to_dense()

    @cached_property
    def outputs(self) -> np.ndarray:
        """The outputs, (steps, batch, N) float32."""
        return self.events.to_dense()

    @cached_property
    def columns(self) -> list[np.ndarray]:
        """The outputs of each step, (N, batch), or (N,) for one sample."""
        batch = self.outputs.shape[1]
        return [np.ascontiguousarray(y[0] if batch == 1 else y.T) for y in self.outputs]

    @property
    def block(self) -> tuple[int, int] | None:
        """Block of the transposed matrix; None where the weights are not stored in blocks."""
        if not isinstance(self.weights, BlockCSR):
            return None
        r, c = self.weights.block
        return c, r

    def in_blocks(self) -> tuple[sp.bsr_array, list[np.ndarray]]:
        """The transposed matrix as BSR, and the columns, both padded to whole blocks."""
        assert self.block is not None
        c, r = self.block
        extra = -self.dense.shape[0] % r, -self.dense.shape[1] % c
        padded = np.pad(self.dense, ((0, extra[0]), (0, extra[1]))).T
        columns = [np.pad(y, [(0, extra[0])] + [(0, 0)] * (y.ndim - 1)) for y in self.columns]
        return sp.bsr_array(padded, blocksize=(c, r)), columns


def _scipy(task: ProductTask) -> dict[str, Step]:
    by_output, by_input = sp.csr_array(task.dense.T), sp.csc_array(task.dense.T)
    columns = task.columns
    rows = [sp.csr_array(y.reshape(len(y), -1)) for y in columns]
    steps: dict[str, Step] = {
        "csr @ dense": lambda t: by_output @ columns[t],
        "csc @ dense": lambda t: by_input @ columns[t],
        "csr @ sparse": lambda t: by_output @ rows[t],
    }
    sparse_columns = [sp.csc_array(y) for y in rows]
    steps["csc @ sparse"] = lambda t: by_input @ sparse_columns[t]
    if task.block is not None:
        blocks, padded = task.in_blocks()
        steps["bsr @ dense"] = lambda t: blocks @ padded[t]
    return steps


def _torch_csr(task: ProductTask) -> dict[str, Step]:
    torch = import_torch()
    matrix = sp.csr_array(task.dense.T)
    columns = [torch.from_numpy(y) for y in task.columns]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*in beta state", category=UserWarning)
        parts = (torch.from_numpy(part) for part in (matrix.indptr, matrix.indices, matrix.data))
        by_output = torch.sparse_csr_tensor(*parts, size=matrix.shape, check_invariants=True)
        steps: dict[str, Step] = {"csr @ dense": lambda t: by_output @ columns[t]}
        # torch's product on a CPU supports square blocks only.
        if task.block is not None and task.block[0] == task.block[1] > 1:
            bsr, padded_columns = task.in_blocks()
            padded = [torch.from_numpy(y) for y in padded_columns]
            parts = (torch.from_numpy(part) for part in (bsr.indptr, bsr.indices, bsr.data))
            blocks = torch.sparse_bsr_tensor(*parts, size=bsr.shape, check_invariants=True)
            steps["bsr @ dense"] = lambda t: blocks @ padded[t]
    return steps


def _mkl(task: ProductTask) -> dict[str, Step]:
    dot_product_mkl = import_mkl()
    by_output, by_input = sp.csr_matrix(task.dense.T), sp.csc_matrix(task.dense.T)
    columns = task.columns
    sparse = [sp.csr_matrix(y.reshape(len(y), -1)) for y in columns]
    steps: dict[str, Step] = {
        "csr @ dense": lambda t: dot_product_mkl(by_output, columns[t]),
        "csc @ dense": lambda t: dot_product_mkl(by_input, columns[t]),
        "csr @ sparse": lambda t: dot_product_mkl(by_output, sparse[t]),
    }
    # MKL's block format has square blocks only.
    if task.block is not None and task.block[0] == task.block[1] > 1:
        bsr, padded = task.in_blocks()
        blocks = sp.bsr_matrix(bsr)
        steps["bsr @ dense"] = lambda t: dot_product_mkl(blocks, padded[t])
    return steps


def _numpy(task: ProductTask) -> dict[str, Step]:
    outputs, by_input = task.outputs, task.dense
    by_output = np.ascontiguousarray(by_input.T)
    out = np.empty((outputs.shape[1], by_input.shape[1]), np.float32)
    return {
        "dot, rows by input": lambda t: np.dot(outputs[t], by_input, out).T,
        "dot, rows by output": lambda t: np.dot(outputs[t], by_output.T, out).T,
    }


def _torch_mm(task: ProductTask) -> dict[str, Step]:
    torch = import_torch()
    outputs, by_input = torch.from_numpy(task.outputs), torch.from_numpy(task.dense)
    by_output = by_input.T.contiguous()
    out = torch.empty(outputs.shape[1], by_input.shape[1])
    steps: dict[str, Step] = {
        "mm": lambda t: torch.mm(outputs[t], by_input, out=out).T,
        "linear": lambda t: torch.nn.functional.linear(outputs[t], by_output).T,
    }
    if outputs.shape[1] == 1:
        steps["mv"] = lambda t: torch.mv(by_output, outputs[t, 0])
    return steps


_PRODUCTS: dict[str, Callable[[ProductTask], dict[str, Step]]] = {
    "scipy": _scipy,
    "torch-csr": _torch_csr,
    "mkl": _mkl,
    "numpy": _numpy,
    "torch-mm": _torch_mm,
}


class Variant(NamedTuple):
    """One way in which a baseline computes a product.

    step : step t -> its product
    run  : products of all steps
    ours : our product that the answers are compared with
    off  : step t -> by how much, beyond rounding, its product may differ, (batch, 3N)
    """

    step: Step
    run: Run
    ours: Product
    off: Callable[[int], np.ndarray | float] = lambda t: 0.0


def _c_blocks(ours: Product) -> dict[str, Variant]:
    """The loop over blocks in C. In place of weights that are not in such blocks it gets random ones that are, with the
    same share pruned."""
    weights, dtype = ours.weights, "int8" if ours.weights.storage == "int8" else "float32"
    compiled()
    if not isinstance(weights, BlockCSR) or weights.block != BLOCK:
        pruned, rng = 1 - weights.nnz / (weights.shape[0] * weights.shape[1]), np.random.default_rng(0)
        weights = random_weights(
            weights.shape, sparsity=pruned, format="block", block=BLOCK, dtype=weights.storage, rng=rng
        )
        ours = Product(weights, ours.events)
    dense, x = weights.to_dense(), ours.events.to_dense()
    loop = BlockLoop.of(dense, dtype)
    padded = np.pad(x, ((0, 0), (0, 0), (0, loop.inputs - x.shape[2])))
    out = np.zeros((ours.batch, loop.outputs), np.float32)

    def step(t: int) -> np.ndarray:
        loop.multiply(padded[t : t + 1], out)
        return out.T

    runs = Variant(step, lambda: loop.multiply(padded, out), ours, lambda t: loop.inexactness(dense, x[t]))
    return {f"c-blocks {dtype}, {BLOCK[1]} outputs x {BLOCK[0]} inputs": runs}


@dataclass(frozen=True)
class ProductBaselines:
    """Every variant of the named baselines of one product."""

    variants: dict[str, Variant]

    @classmethod
    def of(cls, names: tuple[str, ...], ours: Product) -> ProductBaselines:
        """Convert the weights for every baseline. Raises ValueError where a package or a compiler is not installed."""
        task, variants = ProductTask(ours.weights, ours.events), {}
        for name in names:
            if name == "float32":
                twin = Product(ours.weights.stored_as("float32"), ours.events, ours.threads)
                variants["float32 ours"] = Variant(lambda t, twin=twin: twin.result(t).T, twin.run, ours)
            elif name == "c-blocks":
                variants |= _c_blocks(ours)
            else:
                for variant, step in _PRODUCTS[name](task).items():
                    variants[f"{name} {variant}"] = Variant(step, _all_steps(step, ours.steps), ours)
        return cls(variants)

    @property
    def runs(self) -> dict[str, Run]:
        """Variant -> products of all steps."""
        return {name: variant.run for name, variant in self.variants.items()}

    def check(self) -> None:
        """Compare the first, the middle and the last step.

        Raises RuntimeError where the result of a baseline differs from ours by more than rounding.
        """
        for name, (step, _, ours, off) in self.variants.items():
            dense, outputs, n_post = ours.weights.to_dense(), ours.events.to_dense(), ours.weights.shape[1]
            for t in sorted({0, ours.steps // 2, ours.steps - 1}):
                got: Any = step(t)
                theirs = got.toarray() if sp.issparse(got) else np.asarray(got)
                bound = product_bound(dense, outputs[t]) + off(t)
                if INTEGERS in ours.plan.kernel_by_matrix.values() and isinstance(ours.weights, BlockCSR):
                    bound = bound + rounding_bound(ours.weights, outputs[t])
                _need_close(name, theirs.reshape(len(theirs), -1)[:n_post].T, ours.result(t), bound)


def _all_steps(step: Step, steps: int) -> Run:
    def run() -> None:
        for t in range(steps):
            step(t)

    return run


# --- a whole layer ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerBaselines:
    """The named baselines of a network, with its weights made dense.

    runs  : baseline -> run of the whole sequence
    first : baseline -> values of the first layer in the first step from a zero state, (batch, N): the output of a GRU,
            the cell value before the event of our cells. Both follow the same equations up to there
    """

    network: Network
    inputs: Events
    runs: dict[str, Run]
    first: dict[str, Callable[[], np.ndarray]]

    @classmethod
    def of(cls, names: tuple[str, ...], network: Network, inputs: Events) -> LayerBaselines:
        """Prepare every baseline. Raises ValueError where a package is not installed."""
        runs, first = {}, {}
        for name in names:
            runs[name], first[name] = (_blas if name == "blas" else _torch_gru)(network, inputs, name)
        return cls(network, inputs, runs, first)

    def check(self) -> None:
        """Compare the first step. Raises RuntimeError where a baseline differs from us by more than rounding.

        The bound: two pre-activations of a gate differ by at most `product_bound`; the state is zero, so only the
        input contributes. The slopes of sigmoid and tanh are at most 1/4 and 1, those of v = (1 - u) g in u and in g
        at most 1. Activations and products of numbers below 1 are exact to 16 units in the last place.
        """
        if not self.runs:
            return
        layer, n = self.network.layers[0], self.network.layers[0].units
        x = self.inputs.to_dense()[0]
        simulation = simulate(Network((layer,)), x[None], record=("events", "states"))
        ours = before_event(simulation.events[0].to_dense()[0], simulation.states[0][0])
        # The bias is one more term of the sum.
        terms = np.vstack([layer.w_in.to_dense(), layer.bias_in])
        apart = product_bound(terms, np.column_stack([x, np.ones(len(x), np.float32)]))
        bound = apart[:, :n] / 4 + apart[:, 2 * n :] + 32 * U32
        for name, values in self.first.items():
            _need_close(name, values(), ours, bound)


def before_event(outputs: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Cell value v before the event, from the outputs and cells after a step: the output where there is an event, else
    the cell. Holds for both variants."""
    return np.where(outputs != 0, outputs, cells)


def _blas(network: Network, inputs: Events, name: str) -> tuple[Run, Callable[[], np.ndarray]]:
    engine = BlasEngine(network)
    prepared = engine.prepare(inputs)
    state = State.zeros(network, inputs.shape[1])

    def first() -> np.ndarray:
        trace = engine.run(prepared.chunk(0, 1), state, record_events=True, record_states=True)
        return before_event(trace.events[0][0], trace.states[0][0])

    return (lambda: engine.run(prepared, state)), first


def torch_gru(network: Network) -> Any:
    """torch.nn.GRU with the weights of the network made dense. Raises ValueError where torch is not installed."""
    torch = import_torch()
    layers = network.layers
    gru = torch.nn.GRU(layers[0].inputs, layers[0].units, len(layers))
    with torch.no_grad():
        for k, layer in enumerate(layers):
            n = layer.units
            # torch orders the gates (r, u, g), we order them (u, r, g).
            order = np.r_[n : 2 * n, 0:n, 2 * n : 3 * n]
            for kind, array in (
                ("weight_ih", layer.w_in.to_dense().T),
                ("weight_hh", layer.w_rec.to_dense().T),
                ("bias_ih", layer.bias_in),
                ("bias_hh", layer.bias_rec),
            ):
                getattr(gru, f"{kind}_l{k}").copy_(torch.from_numpy(np.ascontiguousarray(array[order])))
    return gru


def _torch_gru(network: Network, inputs: Events, name: str) -> tuple[Run, Callable[[], np.ndarray]]:
    torch, gru = import_torch(), torch_gru(network)
    x = torch.from_numpy(inputs.to_dense())

    def sequence():
        with torch.inference_mode():
            return gru(x)

    def stepwise():
        with torch.inference_mode():
            state = None
            for t in range(len(x)):
                _, state = gru(x[t : t + 1], state)
            return state

    def first() -> np.ndarray:
        with torch.inference_mode():
            _, state = gru(x[:1])
            return state[0].numpy()

    return (sequence if name == "torch" else stepwise), first


def import_torch() -> Any:
    """The torch module. Raises ValueError where it is not installed."""
    try:
        import torch
    except ImportError:
        raise ValueError("against: torch is not installed; pip install torch, or use --against blas") from None
    return torch


def import_mkl() -> Any:
    """`dot_product_mkl` of sparse_dot_mkl. Raises ValueError where it is not installed or finds no MKL."""
    # sparse_dot_mkl loads MKL by file name. It finds the library of the Python package `mkl` only if that is loaded.
    with suppress(PackageNotFoundError):
        for path in files("mkl") or ():
            if path.name.startswith("libmkl_rt.so"):
                ctypes.CDLL(str(path.locate()))
    try:
        from sparse_dot_mkl import dot_product_mkl
    except ImportError:
        raise ValueError(
            "against: mkl needs sparse_dot_mkl, which is not installed or finds no MKL; pip install sparse_dot_mkl mkl"
        ) from None
    return dot_product_mkl


def _need_close(name: str, theirs: np.ndarray, ours: np.ndarray, bound: np.ndarray) -> None:
    if theirs.shape != ours.shape:
        raise RuntimeError(f"against {name}: result has shape {theirs.shape}, ours {ours.shape}")
    apart = np.abs(theirs.astype(np.float64) - ours)
    if not (apart <= bound).all():
        at = np.unravel_index(int(np.argmax(apart - bound)), apart.shape)
        raise RuntimeError(
            f"against {name}: sample {at[0]}, output {at[1]} is {theirs[at]}, ours {ours[at]}; the difference exceeds "
            f"rounding ({bound[at]:.1e}), so it computes something else"
        )
