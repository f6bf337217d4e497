"""CUDA kernels as plain Python on host memory, for kernels whose threads do not communicate within a warp.

A kernel runs one block after the other, with one thread per block unless more are asked for. Several threads are Python
threads with one shared memory. The PTX instructions that a kernel calls are replaced by NumPy. Kernels whose warps
vote, shuffle or wait for each other cannot be run like this.
"""

from __future__ import annotations

import ctypes
import math
import threading
from functools import cache, partial
from types import CellType, FunctionType, SimpleNamespace

import numba
import numpy as np

from eventrnn import cells
from eventrnn.cuda import PRECISIONS
from support.fake_gpu import half, longs, rounded, widened

#: typed pointer of `ptx.py` -> of what it points to: the type in memory, its bytes, and the type of NumPy
KINDS = {
    f"global_{name}": (np.ctypeslib.as_ctypes_type(name), np.dtype(name).itemsize, getattr(np, name))
    for name in ("float32", "int64", "int32", "uint16", "float64", "uint8")
}

#: rules of `cells.py` that `ptx.py` compiles
RULES = ("egru_value", "egru_reset_gate", "egru_paper_value", "egru_backward", "egru_paper_backward")
RULES += ("egru_paper_reset_backward", "surrogate_slope", "exp_float32", "sigmoid", "gru_value", "gru_before_value")
RULES += ("lstm_value", "lstm_output", "gru_backward", "gru_before_backward", "lstm_backward")

#: types that convert a number, and what converts it as fast as Python can
TYPES = {id(getattr(numba, name)): getattr(np, name) for name in ("int32", "int64", "uint16", "float32", "float64")}

#: seconds after which a barrier that not all threads reach is an error
PATIENCE = 60


def fused():
    """`cells.fma` of three numbers."""
    function = ctypes.CDLL("libm.so.6").fmaf
    function.restype, function.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    return lambda a, b, c: np.float32(function(float(a), float(b), float(c)))


@cache
def rules() -> dict[str, FunctionType]:
    """The rules of `cells.py` over primitives for scalars, which are faster than those for arrays."""
    names = dict(
        vars(cells),
        fma=fused(),
        round_even=np.rint,
        select=lambda condition, a, b: a if condition else b,
        ldexp=lambda x, n: np.float32(math.ldexp(float(x), int(n))) if n == n else x,
    )

    def rule(name):
        return FunctionType(getattr(cells, name).__code__, names, name)

    names["exp_in_range"] = rule("exp_in_range")
    names |= {name: rule(f"{name}_float32") for name in ("exp", "sigmoid", "tanh")}
    names["exp_float32"] = names["exp"]
    names |= {name: rule(name) for name in ("egru_value_of_gates", *RULES) if names[name] is getattr(cells, name)}
    of_gates = FunctionType(cells.egru_value.__code__, names | {"sigmoid": lambda x: x}, "egru_value_of_gates")
    return {name: names[name] for name in RULES} | {"egru_value_of_gates": of_gates}


class Pointed:
    """An array of numbers at an address, like the typed pointers of `ptx.py`."""

    def __init__(self, address: int, kind: tuple):
        self.at, (self.number, self.size, self.kind) = int(address), kind

    def __getitem__(self, k):
        return self.kind(self.number.from_address(self.at + self.size * int(k)).value)

    def __setitem__(self, k, value):
        self.number.from_address(self.at + self.size * int(k)).value = self.kind(value).item()


def _raise_to(address, value):
    longs(address, 1)[0] = max(longs(address, 1)[0], value)


def _add(address, value):
    longs(address, 1)[0] += value


def _bits(number) -> np.int32:
    return np.float32(number).view(np.int32)


def _high(a, b) -> np.int64:
    product = (int(a) % (1 << 64)) * (int(b) % (1 << 64))
    return np.uint64(product >> 64).astype(np.int64)


class _Block:
    """The threads of a block."""

    def __init__(self, size: int):
        self.size, self.barrier, self.lock, self.shared = size, threading.Barrier(size), threading.Lock(), np.zeros(0)
        self.index = threading.local()
        self.index.x = 0

    def array(self, size: int, kind) -> np.ndarray:
        """The array in shared memory, one for all threads. What no thread wrote must not look like a result."""
        if self.size == 1:
            return np.zeros(size)
        with self.lock:
            if len(self.shared) != size:
                self.shared = np.full(size, np.nan, getattr(kind, "name", kind))
            return self.shared

    def run(self, call) -> None:
        """Call a function in all threads."""
        if self.size == 1:
            call()
            return
        errors: list[BaseException] = []

        def run(thread: int) -> None:
            self.index.x = thread
            try:
                with np.errstate(all="ignore"):
                    call()
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        self.shared = np.zeros(0)
        threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(self.size)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
        if errors:
            raise (real or errors)[0]

    def wait(self) -> None:
        """Wait for all threads."""
        if self.size > 1:
            self.barrier.wait(PATIENCE)


def in_python(function, grid: tuple[int, int], threads: int = 1):
    """A kernel as a Python function on host memory; `grid`: number of blocks along x and y; threads per block."""
    from eventrnn.cuda.kernels import ptx
    from eventrnn.cuda.kernels import tensor_core_cells as module
    from eventrnn.cuda.training.kernels import threads as shared

    own = _Block(threads)
    block = SimpleNamespace(x=0, y=0)
    there = SimpleNamespace(
        threadIdx=own.index,
        blockIdx=block,
        blockDim=SimpleNamespace(x=threads),
        gridDim=SimpleNamespace(x=grid[0], y=grid[1]),
        syncwarp=lambda mask: None,
        syncthreads=own.wait,
        shared=SimpleNamespace(array=own.array),
    )
    functions = SimpleNamespace(log=np.log, sqrt=np.sqrt, fsqrt_rn=np.sqrt, umul64hi=_high, float_as_int=_bits)
    fakes = {id(getattr(ptx, name)): lambda at, kind=kind: Pointed(at, kind) for name, kind in KINDS.items()}
    fakes |= {id(ptx.max_relaxed): _raise_to, id(ptx.add_relaxed): _add, id(ptx.cuda): there}
    fakes |= TYPES
    fakes[id(ptx.fma)] = fused()
    fakes[id(module.power_of_two_approx)] = lambda x: np.exp2(np.float32(x))
    fakes[id(module.reciprocal_approx)] = lambda x: np.float32(1) / np.float32(x)
    fakes |= {id(getattr(ptx, name)): rule for name, rule in rules().items()}
    fakes[id(shared.libdevice)] = functions
    fakes[id(shared.float_of)] = lambda bits: np.int32(bits).view(np.float32)
    fakes[id(shared.STORES["bfloat16"])] = lambda at, a: _store(at, [a], "bfloat16")
    fakes[id(shared.LOADS["bfloat16"])] = lambda at: widened(half(at, 1, "bfloat16").copy(), "bfloat16")[0]
    for name in PRECISIONS:
        fakes[id(module._LOADS[name])] = lambda at, p=name: tuple(widened(_pair(at, p), p))
        fakes[id(module._STORES[name])] = lambda at, a, p=name: _store(at, [a], p)
        fakes[id(module._PAIR_STORES[name])] = lambda at, a, b, p=name: _store(at, [a, b], p)
    made: dict[int, FunctionType] = {}

    def plain(value):
        if id(value) in fakes:
            return fakes[id(value)]
        value = getattr(value, "py_func", value)
        if not isinstance(value, FunctionType) or not (value.__module__ or "").startswith("eventrnn.cuda"):
            return value
        if id(value) not in made:
            names = dict(value.__globals__)
            names |= {name: plain(names[name]) for name in value.__code__.co_names if name in names}
            cells = tuple(CellType(plain(each.cell_contents)) for each in value.__closure__ or ())
            made[id(value)] = FunctionType(value.__code__, names, value.__name__, value.__defaults__, cells)
        return made[id(value)]

    kernel = plain(function)

    def run(*arguments):
        with np.errstate(all="ignore"):
            for block.y in range(grid[1]):
                for block.x in range(grid[0]):
                    own.run(partial(kernel, *map(np.int64, arguments)))

    return run


def _pair(address, precision):
    assert address % (2 * half(address, 1, precision).itemsize) == 0, "neighbours are loaded and stored as one word"
    return half(address, 2, precision).copy()


def _store(address, values, precision):
    assert address % (len(values) * half(address, 1, precision).itemsize) == 0
    half(address, len(values), precision)[:] = rounded(np.array(values, np.float32), precision)
